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
from vigos_jax.method.packing import Rollout
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
        # A copy: the step's donated state may not hold one buffer twice.
        average=jax.tree.map(jnp.copy, session.trained) if follows else {},
    )


def train(config, workdir: pathlib.Path, *, open_engine: EngineFactory | None = None) -> int:
    """Runs `config.steps` optimizer steps in `workdir`, going on from its newest checkpoint if there is one.

    A run that has taken them may go on to more, where their learning rates are those of the longer run.

    Writes config.json, metrics.jsonl, report.jsonl and report.html, checkpoints/, with `config.eval_every` eval.jsonl
    and eval/, at the end export/ and, on the demo, results.json. With several processes all call it, on the same
    workdir: the first writes, all write the checkpoints.

    Args:
      open_engine: makes what samples, for rollouts and evaluations alike; None for the engines that the config names.

    Returns:
      How many rows of all its batches were unusable, and questions of its evaluations.

    Raises:
      Stopped: a signal came, and everything that was done is saved.
      InputError: bad config or data, or a run that is not well (`config.guards`), which is saved too.
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
            session = load(config, for_training=True)
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
        if run.ending is not None:  # only now: the last checkpoint is whole
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
    """A run of `config.steps` optimizer steps. A context manager: leaving it, on whatever way, closes all it holds.

    Attributes:
      number: optimizer steps taken so far.
      state: after those steps.
      ending: why no further step may be taken, None while there may: Stopped for a signal, InputError for a run that
        is not well. Both are saved.
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
        self._sick = workdir / files.SKIPPED
        self._shown = ("loss", *(f"{r.name}/loss" for r in session.roles), "valid_rate", "accuracy")
        self._lost = ""  # why the engine cannot sample
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
        """Goes to the newest checkpoint, or to the start, and makes everything ready for the steps that are left."""
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
            say(f"going on from step {self.number} of {config.steps} in {self._workdir}")
        self._health = Health(config.guards, saved_health, largest_gap=bound)
        if bound < math.inf:
            say(f"a step whose sampler_logp_gap is above {bound:g} ends the run (config.guards.sampler_gap)")
        self._engine = self._open_engine(session, Sampling(**config.sampling))
        self._closes.callback(self._engine.close)
        self._snapshots = Snapshots(config, session, self._source, self._engine, self._workdir)
        with interrupt.at_once():
            self._evaluations.at(self.number, self.state.trained)  # the step may have been saved, but not evaluated
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
        """One optimizer step: rollout, parse, pack, update; its row of metrics.jsonl.

        Where the engine cannot sample, or a signal ends its work, nothing has happened: `keep` saves and ends the run.
        """
        config, session = self._config, self._session
        if self.number >= config.steps:
            raise ValueError(f"the run is over after {config.steps} steps")
        upcoming = self._rollouts.upcoming
        self._log.begin("rollout", upcoming and upcoming.prompts)
        try:
            batch, sampled = self._rollouts.take(self.state.trained, step=self.number)
        except EngineFailed as e:
            self._lost = str(e)
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
        self.state, values = self._train_step(self.state, session.base, micro_batches, key)
        # The devices are at work: time to grade what was sampled, and to read and pack what comes next.
        counts = self._batches.total(rollout_counts(session, batch.examples, rollouts))
        self.number += 1
        self._rollouts.read()
        values = {k: float(v) for k, v in jax.device_get(values).items()}
        self._record(batch, rollouts, counts, values | {"rollout_staleness": self.number - 1 - sampled.step})

    def _count(self, batch: Batch, sampled: Completions) -> None:
        """Counts the rows that cannot be used, and those that could not be sampled; InputError for too many."""
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
        rate: Any = self._learning_rate(self.number - 1 - self._health.skipped)
        learning_rate = float(rate)
        row = {"step": self.number, "learning_rate": learning_rate} | values
        row |= rollout_metrics(counts) | {"bad_rows": self._bad_rows.bad, "rollout_failed": self._failed_rows.bad}
        self._health.update(row)
        row |= {"skipped_steps": self._health.skipped, "alerts": len(self._health.alerts)}
        row |= {"seconds/data": batch.seconds}  # during the last step's update, but for the first
        self._log.write(row, tokens=counts.get("tokens", 0), shown=self._shown)
        if row["skipped"]:
            write_nonfinite(self._sick, row, records(self._session, batch.examples, rollouts))
        for text in self._health.news:
            say(f"warning: {text}")

    def keep(self, interrupt: Interrupt) -> None:
        """After a step: a checkpoint, an evaluation, a snapshot, where their turn has come; whether to go on."""
        config, number = self._config, self.number
        # Every process learns here of a signal that any of them received, and of one that has failed.
        signals = sorted(filter(None, exchange(interrupt.asked)))
        unwell = self._lost or self._failing() or self._health.reason_to_stop(self._sick)
        is_last = bool(signals or unwell) or number == config.steps
        if is_last or number % config.checkpoint_every == 0 or self._evaluations.due(number):
            self._save()
        for rows in (self._bad_rows, self._failed_rows):
            if is_last and rows.bad:
                say(rows.summary())
        saved = f"saved at step {number} of {config.steps}"
        if self._lost:
            self.ending = InputError(f"{self._lost}; {saved}; the same command goes on")
        elif unwell:
            self.ending = InputError(f"{unwell}; {saved}")
        elif signals:
            self.ending = Stopped(f"{signals[0]}: stopped, {saved}; the same command goes on")
        if self.ending is not None:
            return
        try:
            self._snapshots.at(number, self.state)  # about as long as a step, so that a signal can wait for it
            if self._evaluations.due(number):
                with interrupt.at_once():
                    self._evaluations.at(number, self.state.trained)
        except EngineFailed as e:
            self._save()
            self.ending = InputError(f"{e}; {saved}; the same command goes on")

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
        """Why the servers are too bad to go on with: more rows failed than may be bad; "" for none."""
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
