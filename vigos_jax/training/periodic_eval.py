"""Benchmarks during training: `config.eval` on the present student, every `config.eval_every` optimizer steps."""

import pathlib
import time

from vigos_jax.evaluation.benchmark import Evaluation, output_of
from vigos_jax.evaluation.statistics import number_text
from vigos_jax.models.variables import Variables
from vigos_jax.rollouts.engine import EngineFactory
from vigos_jax.runtime import workdir as files
from vigos_jax.runtime.distributed import first_decides, is_first
from vigos_jax.runtime.jsonl import read_steps
from vigos_jax.runtime.progress import say
from vigos_jax.session import Session
from vigos_jax.training.run_log import MetricsFile


class StepEvaluations:
    """Writes a row of WORKDIR/eval.jsonl for every step evaluated; does nothing if `config.eval_every` is 0.

    A row has `step`, `model` (the student's fingerprint), `seconds`, and the numbers of each task as TASK/NUMBER, null
    if there is nothing to count. Training is not affected: the run's random keys are not used. All processes must
    construct it and call `at`.

    Raises:
      InputError: see `Evaluation`; raised before the first step.
    """

    def __init__(self, config, session: Session, workdir: pathlib.Path, *, open_engine: EngineFactory):
        self._every = config.eval_every
        if self._every:
            self._evaluation = Evaluation(session, config, open_engine=open_engine)
            self._file, self._output = workdir / files.EVALUATIONS, output_of(config, workdir)

    def due(self, step: int) -> bool:
        """Whether the student after `step` steps has its turn."""
        return bool(self._every) and step > 0 and step % self._every == 0

    def at(self, step: int, trained: Variables) -> None:
        """Evaluates the student after `step` steps, if its turn has come and no row has it already.

        A step that is done again, because its checkpoint was lost, gives the same student: its answers are there.
        """
        if not self.due(step):
            return
        model = self._evaluation.fingerprint(trained)
        if first_decides(lambda: self._has(step, model)):
            return
        start = time.monotonic()
        results = self._evaluation.run(trained, output=self._output)
        if not is_first():
            return
        row = {"step": step, "model": model, "seconds": time.monotonic() - start}
        for r in results:
            row |= {f"{r.task.name}/{k}": v for k, v in r.numbers.items() if v is None or isinstance(v, int | float)}
        file = MetricsFile(self._file, next_step=step)
        file.write(row)
        file.close()
        say(f"step {step}: " + ", ".join(f"{r.task.title} {number_text(r.numbers['avg'])}" for r in results))

    def errors(self) -> int:
        """How many questions could not be asked, at all steps of the run together."""
        if not self._every:
            return 0
        rows, _ = read_steps(self._file)
        return sum(n for row in rows for k, n in row.value.items() if k.endswith("/errors") and isinstance(n, int))

    def close(self) -> None:
        """Closes the evaluation's engine."""
        if self._every:
            self._evaluation.close()

    def _has(self, step: int, model: str) -> bool:
        rows, _ = read_steps(self._file)  # what is torn is reported where the next row is written
        return any((row.value["step"], row.value.get("model")) == (step, model) for row in rows)
