"""The training loop, top to bottom: batch, rollout, parse, pack, step, log, save."""

import contextlib
import math
import pathlib
from typing import Any

import jax
import jax.numpy as jnp

from vigos_jax.data.bad_rows import BadRows
from vigos_jax.data.loader import data_state, order_of, resume_batch
from vigos_jax.errors import InputError, Stopped
from vigos_jax.evaluation import demo_scores
from vigos_jax.export.export import export
from vigos_jax.export.model_card import RunFacts
from vigos_jax.method.rows import Rollout
from vigos_jax.models.variables import shares_vision
from vigos_jax.report.run_page import write_run_page
from vigos_jax.rollouts.engine import EngineFactory, EngineFailed
from vigos_jax.rollouts.engines import check_engine, engine_of
from vigos_jax.rollouts.parse import FAILED, parse, records, rollout_counts, rollout_metrics
from vigos_jax.rollouts.sampler import Completions
from vigos_jax.rollouts.sampling import Sampling
from vigos_jax.runtime import workdir as files
from vigos_jax.runtime.distributed import exchange, first_decides, is_first
from vigos_jax.runtime.files import write_json
from vigos_jax.runtime.lock import held
from vigos_jax.runtime.progress import say
from vigos_jax.runtime.sharding import check_batch, replicated, tree_shardings
from vigos_jax.runtime.signals import Interrupt
from vigos_jax.session import Session, load, open_source
from vigos_jax.teachers import check_teachers, with_teachers
from vigos_jax.training.batches import Batch, Batches
from vigos_jax.training.checkpoints import Checkpoints
from vigos_jax.training.guards import Health, sampler_gap_bound, write_nonfinite
from vigos_jax.training.periodic_eval import StepEvaluations
from vigos_jax.training.quantization_cost import quantization_cost
from vigos_jax.training.rollout_queue import RolloutQueue
from vigos_jax.training.run_folder import check_export, check_workdir, export_folder, is_exported, open_workdir
from vigos_jax.training.run_log import RunLog
from vigos_jax.training.snapshots import Snapshots
from vigos_jax.training.step import TrainState, make_optimizer, train_step_of
from vigos_jax.training.trackers import check_installed


def _initial_state(config, session: Session, tx: Any) -> TrainState:
    abstract = jax.eval_shape(tx.init, session.trained)
    shardings = tree_shardings(abstract, session.mesh, config.mesh.rules)
    follows = config.teacher.weights == "ema"
    return TrainState(
        step=jax.device_put(jnp.int32(0), replicated(session.mesh)),
        trained=session.trained,
        opt_state=jax.jit(tx.init, out_shardings=shardings)(session.trained),
        # Copied, because the state is donated to the train step, and a buffer can be donated only once.
        average=jax.tree.map(jnp.copy, session.trained) if follows else {},
    )


def train(config, workdir: pathlib.Path, *, open_engine: EngineFactory | None = None) -> int:
    """Runs `config.steps` optimizer steps in `workdir`, resuming from its newest checkpoint if there is one.

    A run can be extended by raising `config.steps`, if the longer schedule gives the steps already taken the same
    learning rates.

    Writes config.json, metrics.jsonl, report.jsonl, report.html and checkpoints/; with `config.eval_every` also
    eval.jsonl and eval/; at the end, with `config.export.after_training`, export/, and on the demo results.json.
    docs/files.md lists the rest. With several processes all call it with the same, shared workdir: the first writes
    the files, but every process writes its part of each checkpoint and its own file in nonfinite/.

    Args:
      open_engine: builds the engine of both rollouts and evaluations; None for the engines that the config names.

    Returns:
      The number of rows of the whole run, from before a resume too, that were bad or could not be sampled, plus the
      number of evaluation questions that could not be asked.

    Raises:
      Stopped: a signal arrived. All completed steps are saved, except, with several processes, a step whose snapshot
        servers were still sampling.
      InputError: the config or the data is bad. Or a guard (`config.guards`) or the engine ended the run: then all
        completed steps are saved.
    """
    open_rollout = open_engine or engine_of(config, workdir)
    open_evaluation = open_engine or engine_of(config, workdir, for_evaluation=True)
    with contextlib.ExitStack() as stack:
        interrupt = stack.enter_context(Interrupt())
        with interrupt.at_once():
            stack.enter_context(held(workdir, called=f"to --workdir {workdir}"))
            first_decides(lambda: check_workdir(config, workdir))
            first_decides(lambda: check_installed(config.log))
            if open_engine is None:
                check_engine(config, trains=True)
            source = open_source(config)
            check_teachers(config)
            session = with_teachers(load(config, for_training=True), config)
            check_batch(session.mesh, batch_size=config.batch_size, micro_batches=config.gradient_accumulation_steps)
            if config.export.after_training:
                first_decides(lambda: check_export(config, workdir, has_adapter="lora" in session.trained))
            evaluations = StepEvaluations(config, session, workdir, open_engine=open_evaluation)
            stack.callback(evaluations.close)
            first_decides(lambda: open_workdir(config, workdir))
            if not (workdir / files.CONFIG).exists():
                raise InputError(f"--workdir {workdir} is not the first process's; choose a folder all hosts share")

        with Run(config, workdir, session, source, evaluations=evaluations, open_engine=open_rollout) as run:
            run.resume(interrupt)
            while run.number < config.steps and run.ending is None:
                run.step()
                run.keep(interrupt)
        if run.ending is not None:  # raised only here, as leaving the `with` block waits for the last checkpoint
            raise run.ending
        trained = run.state.trained
        with interrupt.at_once():
            has_results = source.has_own_evaluation and config.demo_eval.questions > 0
            if has_results and first_decides(lambda: not (workdir / files.RESULTS).exists()):
                _evaluate(config, workdir, session, trained, open_evaluation)
            if config.export.after_training and first_decides(lambda: not is_exported(config, workdir)):
                _export(config, workdir, session, trained)
        if is_first():
            write_run_page(workdir)
            _show(config, workdir)
        return run.bad_rows + first_decides(evaluations.errors)


class Run:
    """A run of `config.steps` optimizer steps.

    A context manager: enter it, call `resume` once, then alternate `step` and `keep`. Leaving it, normally or by an
    exception, closes the engine, the log, the data workers and the checkpoints.

    Attributes:
      number: optimizer steps taken so far.
      state: the train state after those steps; it exists once `resume` has been called.
      ending: why the run must stop, or None while it may continue: Stopped for a signal, InputError for a guard or an
        engine that failed. All completed steps are saved when it is set.
    """

    def __init__(
        self,
        config,
        workdir: pathlib.Path,
        session: Session,
        source: Any,
        *,
        evaluations: StepEvaluations,
        open_engine: EngineFactory,
    ):
        self._config, self._workdir, self._session, self._source = config, workdir, session, source
        self._evaluations, self._open_engine = evaluations, open_engine
        self._closes = contextlib.ExitStack()
        self._tx, self._learning_rate = make_optimizer(config.optimizer, steps=config.steps)
        self._dropout_key = jax.random.fold_in(jax.random.key(config.seed), 2)
        self._one_tower = shares_vision(session.trained)
        self._nonfinite_folder = workdir / files.SKIPPED
        self._shown = ("loss", *(f"{r.name}/loss" for r in session.roles), "valid_rate", "accuracy")
        self._engine_error = ""  # why sampling failed in the last `step`
        self.number = 0
        self.ending: Stopped | InputError | None = None

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, *error: Any) -> bool | None:
        return self._closes.__exit__(*error)

    @property
    def bad_rows(self) -> int:
        """How many rows of the run so far could not be used, or not be sampled."""
        return self._bad_rows.bad + self._failed_rows.bad

    def resume(self, interrupt: Interrupt) -> None:
        """Restores the newest checkpoint, if there is one, and prepares the remaining steps.

        It also takes the evaluation and the snapshot that are due at the restored step, unless an earlier run has
        taken them, and in a run with a quantised base measures, once, what quantisation costs.

        Args:
          interrupt: lets a signal stop the evaluation and the snapshot at once.

        Raises:
          InputError: the checkpoint is of other data, all checkpoints are broken, or the engine failed.
          Stopped: a signal arrived during the evaluation or the snapshot.
        """
        config, session = self._config, self._session
        self._checkpoints = self._closes.enter_context(Checkpoints(self._workdir, keep=config.keep_checkpoints))
        self.state = _initial_state(config, session, self._tx)
        self._bad_rows, self._failed_rows = BadRows(), BadRows()
        bound, saved_health = sampler_gap_bound(config), None
        self._saved = 0
        if found := self._checkpoints.restore_newest(self.state):
            self.number, self.state, saved = found
            resume_batch(saved, self._place_in_data())
            self._bad_rows.update(saved["rows_seen"], saved["bad_rows"], saved.get("bad_examples"))
            self._failed_rows.update(saved["rows_seen"], saved.get("failed_rows", {}), saved.get("failed_examples"))
            saved_health, self._saved = saved["health"], self.number
            say(f"resuming from step {self.number} of {config.steps} in {self._workdir}")
        self._health = Health(config.guards, saved_health, largest_gap=bound)
        if bound < math.inf:
            say(f"a step whose sampler_logp_gap is above {bound:g} ends the run (config.guards.sampler_gap)")
        self._engine = self._open_engine(session, Sampling(**config.sampling))
        self._closes.callback(self._engine.close)
        self._snapshots = Snapshots(config, session, self._source, self._engine, self._workdir)
        with interrupt.at_once():
            # The earlier run may have been stopped after it saved this step and before it evaluated it.
            self._evaluations.at(self.number, self.state.trained)
            self._snapshots.at(self.number, self.state)
        if self.number == config.steps:
            return
        self._train_step = train_step_of(config, session.model, session.objective, self._tx, self.state)
        batches = Batches(config, session, self._source, prepare=self._engine.prepare, first=self.number)
        self._batches = self._closes.enter_context(batches)
        self._log = self._closes.enter_context(RunLog(config, self._workdir, first=self.number))
        self._rollouts = RolloutQueue(config, self._engine, self._batches, first=self.number)
        record = self._workdir / files.QUANTIZATION
        if config.model.quantization != "none" and first_decides(lambda: not record.exists()):
            assert self._rollouts.upcoming is not None  # the run is not over
            cost = quantization_cost(session, config, self._rollouts.upcoming.rows)
            first_decides(lambda: write_json(record, cost))

    def step(self) -> None:
        """Takes one optimizer step (rollout, parse, pack, update) and writes its row of metrics.jsonl.

        If the engine fails or a signal interrupts sampling, it returns before the update: `number` and `state` are
        unchanged, and the next `keep` saves and ends the run.

        Raises:
          InputError: too many rows of the data are bad.
          ValueError: the run has already taken `config.steps` steps.
        """
        config, session = self._config, self._session
        if self.number >= config.steps:
            raise ValueError(f"the run is over after {config.steps} steps")
        upcoming = self._rollouts.upcoming
        self._log.begin("rollout", upcoming and upcoming.prompts)
        try:
            batch, sampled = self._rollouts.take(self.state.trained, step=self.number)
        except EngineFailed as e:
            self._engine_error = str(e)
            return
        except Stopped:
            return
        self._count(batch, sampled.completions)
        self._log.begin("pack")

        rollouts = parse(session, batch.rows, sampled.completions)
        # Where student, teachers and rollouts share the vision tower, it need not run again.
        images = sampled.images if self._one_tower else None
        micro_batches = self._batches.micro_batches(batch.rows, rollouts, images)
        self._log.begin("update", micro_batches)

        key = jax.random.fold_in(self._dropout_key, self.number)
        self.state, values = self._train_step(self.state, session.base, micro_batches, key, others=session.others)
        # The train step runs asynchronously: grade the rollouts and read the next batch meanwhile.
        counts = self._batches.total(rollout_counts(session, batch.examples, rollouts))
        self.number += 1
        self._rollouts.read()
        values = {k: float(v) for k, v in jax.device_get(values).items()}
        self._record(batch, rollouts, counts, values | {"rollout_staleness": self.number - 1 - sampled.step})

    def _count(self, batch: Batch, sampled: Completions) -> None:
        """Adds a batch to the counts of bad rows and of rows that could not be sampled.

        Too many failed rows end the run later, in `keep`, which saves it first.

        Raises:
          InputError: too many rows are bad (see `BadRows.check`). Nothing is saved first.
        """
        size, fraction = self._config.batch_size, self._config.data.max_bad_fraction
        self._bad_rows.update(size, batch.bad_rows, batch.bad_examples)
        self._bad_rows.check(fraction)
        reasons = [why for i in range(len(batch.rows)) if (why := sampled.failure(i)) is not None]
        failed = self._batches.total({FAILED: len(reasons)})
        told = next(filter(None, exchange(reasons[0] if reasons else None)), None)
        self._failed_rows.update(size, failed, {FAILED: told} if told else None)

    def _record(
        self, batch: Batch, rollouts: list[Rollout | None], counts: dict[str, int], values: dict[str, float]
    ) -> None:
        """Writes the row of the step just taken, and what went wrong in it."""
        # A skipped step leaves the optimizer's own count as it was, so the schedule lags by the skipped steps.
        rate: Any = self._learning_rate(self.number - 1 - self._health.skipped)
        learning_rate = float(rate)
        row = {"step": self.number, "learning_rate": learning_rate} | values
        row |= rollout_metrics(counts) | {"bad_rows": self._bad_rows.bad, "rollout_failed": self._failed_rows.bad}
        self._health.update(row)
        row |= {"skipped_steps": self._health.skipped, "alerts": len(self._health.alerts)}
        row |= {"seconds/data": batch.seconds}  # overlaps an earlier step's update, except in the first step
        self._log.write(row, tokens=counts.get("tokens", 0), shown=self._shown)
        if row["skipped"]:
            write_nonfinite(self._nonfinite_folder, row, records(self._session, batch.examples, rollouts))
        for text in self._health.news:
            say(f"warning: {text}")

    def keep(self, interrupt: Interrupt) -> None:
        """Does what is due after a step: checkpoint, snapshot, evaluation. Sets `ending` if the run must stop.

        All processes must call it after the same step, since they exchange pending signals here. A run that must stop
        is saved, but takes neither a snapshot nor an evaluation.

        Raises:
          InputError: the checkpoint cannot be written, or another process has failed.
          Stopped: a signal arrived during the evaluation (the step is already saved) or while servers sampled a
            snapshot (the step is then saved only if there is one process).
        """
        config, number = self._config, self.number
        # A signal to any process must stop all of them after the same step. `exchange` raises if a process has failed.
        signals = sorted(filter(None, exchange(interrupt.asked)))
        unwell = self._engine_error or self._failing() or self._health.reason_to_stop(self._nonfinite_folder)
        is_last = bool(signals or unwell) or number == config.steps
        if is_last or number % config.checkpoint_every == 0 or self._evaluations.due(number):
            self._save()
        for rows in (self._bad_rows, self._failed_rows):
            if is_last and rows.bad:
                say(rows.summary())
        saved = f"saved at step {number} of {config.steps}"
        if self._engine_error:
            self.ending = InputError(f"{self._engine_error}; {saved}; the same command resumes")
        elif unwell:
            self.ending = InputError(f"{unwell}; {saved}")
        elif signals:
            self.ending = Stopped(f"{signals[0]}: stopped, {saved}; the same command resumes")
        if self.ending is not None:
            return
        self._look(interrupt, saved)

    def _look(self, interrupt: Interrupt, saved: str) -> None:
        """Takes the snapshot and the evaluation of this step, where they are due; errors as of `keep`."""
        try:
            # Takes about as long as a step. Signals wait until it is done, unless servers sample: that raises Stopped.
            self._snapshots.at(self.number, self.state)
            if self._evaluations.due(self.number):
                with interrupt.at_once():
                    self._evaluations.at(self.number, self.state.trained)
        except EngineFailed as e:
            self._save()
            self.ending = InputError(f"{e}; {saved}; the same command resumes")
        except Stopped:  # other processes may not have stopped, and all must save together
            if jax.process_count() == 1:
                self._save()
            raise

    def _save(self) -> None:
        """A checkpoint of the present step, unless there is one; before the first step there is nothing to keep."""
        if self._saved == self.number:
            return
        bad, failed = self._bad_rows, self._failed_rows
        seen = {"rows_seen": bad.rows, "bad_rows": dict(bad.reasons), "bad_examples": bad.examples}
        seen |= {"failed_rows": dict(failed.reasons), "failed_examples": failed.examples}
        self._log.sync()
        self._checkpoints.save(self.state, self._place_in_data() | seen | {"health": self._health.state()})
        self._saved = self.number

    def _failing(self) -> str:
        """Why too many rows could not be sampled (above `config.data.max_bad_fraction`); "" if few enough could not."""
        try:
            self._failed_rows.check(self._config.data.max_bad_fraction)
        except InputError as e:
            return f"config.rollout.urls: {e}"
        return ""

    def _place_in_data(self) -> dict[str, Any]:
        """What a checkpoint keeps of the data: the next batch, and what makes it the same one."""
        return data_state(self._source, order_of(self._config), next_batch=self.number)


def _evaluate(config, workdir: pathlib.Path, session: Session, trained: Any, open_engine: EngineFactory) -> None:
    students, sampling = {"base": {}, "trained": trained}, Sampling(**config.sampling)
    results, answers = demo_scores.evaluate_demo(session, students, config, sampling=sampling, open_engine=open_engine)
    if not is_first():
        return
    write_json(workdir / files.RESULTS, results)
    print(demo_scores.samples_text(answers["base"], answers["trained"]))
    print()
    print(demo_scores.table_text(results))
    print()


def _export(config, workdir: pathlib.Path, session: Session, trained: Any) -> None:
    facts, record = RunFacts.of(workdir, config.steps), workdir / files.EXPORTED
    export(session, trained, config, export_folder(config, workdir), run=facts, record=record)


def _show(config, workdir: pathlib.Path) -> None:
    print(f"the run is complete: {workdir}")
    parts = (files.CONFIG, files.METRICS, files.PAGE, files.EVALUATIONS, files.RESULTS, files.CHECKPOINTS)
    exported = [export_folder(config, workdir)] if is_exported(config, workdir) else []
    for path in [*(workdir / p for p in parts), *exported]:
        if path.exists():
            print(f"  {path}")
