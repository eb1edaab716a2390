"""The training loop, top to bottom: batch, rollout, parse, pack, step, log, save."""

import functools
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from vigos_jax.config import differences, read_json, to_json
from vigos_jax.data.loader import BadRows, data_state, resume_batch
from vigos_jax.errors import InputError, Stopped
from vigos_jax.evaluation import demo_scores
from vigos_jax.export.export import check_options, export
from vigos_jax.export.model_card import Run
from vigos_jax.method.roles import TeacherRole
from vigos_jax.models.variables import shares_vision
from vigos_jax.models.vlm import VisionLanguageModel
from vigos_jax.report.run_page import write_run_page
from vigos_jax.rollouts.parse import parse, records, rollout_counts, rollout_metrics
from vigos_jax.rollouts.sampler import Sampler, row_keys
from vigos_jax.rollouts.sampling import Sampling
from vigos_jax.runtime.distributed import exchange, first_decides, is_first
from vigos_jax.runtime.files import write_json
from vigos_jax.runtime.progress import say
from vigos_jax.runtime.sharding import check_batch, replicated, tree_shardings
from vigos_jax.runtime.signals import Interrupt
from vigos_jax.session import Loaded, load, open_source
from vigos_jax.training.batches import Batches
from vigos_jax.training.checkpoints import Checkpoints
from vigos_jax.training.guards import Health, write_sick
from vigos_jax.training.periodic_eval import StepEvaluations
from vigos_jax.training.run_log import RunLog
from vigos_jax.training.snapshots import Snapshots
from vigos_jax.training.step import TrainState, TrainStep, make_optimizer, make_train_step
from vigos_jax.training.trackers import check_installed


def _check_workdir(config, workdir: pathlib.Path) -> None:
    """Raises InputError if the workdir holds a run of another config."""
    path = workdir / "config.json"
    changed = differences(read_json(path), config) if path.exists() else []
    if changed:
        raise InputError(f"{workdir} holds another run ({'; '.join(changed)}); choose another --workdir")


def _open_workdir(config, workdir: pathlib.Path) -> None:
    """Makes the workdir this config's own. Only when a run can begin: a mistyped one must not take it."""
    path = workdir / "config.json"
    if path.exists():
        return
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".tmp")
        temporary.write_text(to_json(config) + "\n", encoding="utf-8")
        temporary.rename(path)
    except OSError as e:
        raise InputError(f"cannot write to --workdir {workdir}: {e.strerror}; choose a writable folder") from e


def _check_export(config, workdir: pathlib.Path, output: pathlib.Path, *, has_adapter: bool) -> None:
    """Raises InputError if the export at the end of the run is bound to fail, before the run has cost anything."""
    check_options(config, has_adapter=has_adapter)
    if output.exists() and not (workdir / "config.json").exists():
        raise InputError(f"config.export.output={str(output)!r} exists already; choose another folder")


def _initial_state(config, loaded: Loaded, tx: Any) -> TrainState:
    abstract = jax.eval_shape(tx.init, loaded.trained)
    shardings = tree_shardings(abstract, loaded.mesh, config.mesh.rules)
    follows = config.teacher.weights == "ema"
    return TrainState(
        step=jax.device_put(jnp.int32(0), replicated(loaded.mesh)),
        trained=loaded.trained,
        opt_state=jax.jit(tx.init, out_shardings=shardings)(loaded.trained),
        # A copy: the step's donated state may not hold one buffer twice.
        average=jax.tree.map(jnp.copy, loaded.trained) if follows else {},
    )


def train(config, workdir: pathlib.Path) -> None:
    """Runs `config.steps` optimizer steps in `workdir`, going on from its newest checkpoint if there is one.

    Writes config.json, metrics.jsonl, report.jsonl and report.html, checkpoints/, with `config.eval_every` eval.jsonl
    and eval/, at the end export/ and, on the demo, results.json. With several processes all call it, on the same
    workdir: the first writes, all write the checkpoints.

    Raises:
      Stopped: a signal came, and everything that was done is saved.
      InputError: bad config or data, or a run that is not well (`config.guards`), which is saved too.
    """
    with Interrupt() as interrupt:
        with interrupt.at_once():
            first_decides(lambda: _check_workdir(config, workdir))
            first_decides(lambda: check_installed(config))
            source = open_source(config)
            loaded = load(config, for_training=True)
            check_batch(loaded.mesh, batch_size=config.batch_size, accumulation=config.accumulation)
            output = pathlib.Path(config.export.output).expanduser() if config.export.output else workdir / "export"
            if config.export.after_training:
                first_decides(lambda: _check_export(config, workdir, output, has_adapter="lora" in loaded.trained))
            evaluations = StepEvaluations(config, loaded, workdir)
            first_decides(lambda: _open_workdir(config, workdir))
            if not (workdir / "config.json").exists():
                raise InputError(f"--workdir {workdir} is not the first process's; choose a folder all hosts share")

        trained = _steps(config, workdir, loaded, source, evaluations, interrupt)
        with interrupt.at_once():
            has_results = config.data.source == "demo" and config.evaluate.questions > 0
            if has_results and first_decides(lambda: not (workdir / "results.json").exists()):
                _evaluate(config, workdir, loaded, trained)
            if config.export.after_training and first_decides(lambda: not output.exists()):
                export(loaded, trained, config, output, run=Run.of(workdir, config.steps))
    if is_first():
        write_run_page(workdir)
        _show(workdir, output)


def _steps(
    config, workdir: pathlib.Path, loaded: Loaded, source: Any, evaluations: StepEvaluations, interrupt: Interrupt
) -> Any:
    """All steps that are not in the newest checkpoint; returns the trained weights."""
    options = {k: v for k, v in config.optimizer.items()}
    tx, learning_rate = make_optimizer(steps=config.steps, **options)
    place = functools.partial(
        data_state,
        source,
        batch_size=config.batch_size,
        seed=config.seed,
        shuffle=config.data.shuffle,
        window=config.data.window,
    )
    with Checkpoints(workdir, keep=config.keep_checkpoints) as checkpoints:
        state, bad_rows, health = _initial_state(config, loaded, tx), BadRows(), Health(config.guards)
        first = 0
        if found := checkpoints.restore_newest(state):
            first, state, saved = found
            resume_batch(saved, place(next_batch=first))
            bad_rows.update(saved["rows_seen"], saved["bad_rows"])
            health = Health(config.guards, saved["health"])
            say(f"going on from step {first} of {config.steps} in {workdir}")
        sampler = Sampler(
            loaded.model,
            Sampling(**config.sampling),
            eos_ids=loaded.processor.eos_ids,
            cache_sizes=loaded.buckets.completion,
        )
        snapshots = Snapshots(config, loaded, source, sampler, workdir)
        with interrupt.at_once():
            evaluations.at(first, state.trained)  # the step may have been saved, but not evaluated
            snapshots.at(first, state)
        if first == config.steps:
            return state.trained

        train_step = train_step_of(config, loaded.model, loaded.roles, tx, state)
        one_tower = shares_vision(state.trained)
        dropout_key = jax.random.fold_in(jax.random.key(config.seed), 2)
        batches = Batches(config, loaded, source, first=first)
        log = RunLog(config, workdir, first=first)
        shown = ("loss", *(f"{r.name}/loss" for r in loaded.roles), "valid_rate", "accuracy")
        sick, upcoming = workdir / "sick", batches.next()
        for step in range(first, config.steps):
            batch = upcoming
            bad_rows.update(config.batch_size, batch.bad_rows)
            bad_rows.check(config.data.max_bad_fraction)
            log.begin("rollout", batch.prompts)

            keys = row_keys(config.seed, step, config.batch_size)
            student = sampler.ready(loaded.student(state.trained))
            images = sampler.encode(student, batch.prompts.vision)
            sampled = sampler(student, batch.prompts, keys, images)
            log.begin("pack")

            rollouts = parse(loaded, batch.rows, sampled)
            # Where student, teachers and rollouts see with the same eyes, the tower need not run again.
            micro_batches = batches.micro_batches(batch.rows, rollouts, images if one_tower else None)
            log.begin("update", micro_batches)

            state, values = train_step(state, loaded.base, micro_batches, jax.random.fold_in(dropout_key, step))
            # The devices are at work: time to grade what was sampled, and to read and pack what comes next.
            counts = batches.total(rollout_counts(loaded, batch.examples, rollouts))
            upcoming = batches.next() if step + 1 < config.steps else None
            values = {k: float(v) for k, v in jax.device_get(values).items()}

            row = {"step": step + 1, "learning_rate": float(learning_rate(step - health.skipped))} | values
            row |= rollout_metrics(counts) | {"bad_rows": bad_rows.bad}
            health.update(row)
            row |= {"skipped_steps": health.skipped, "alerts": len(health.alerts)}
            row |= {"seconds/data": batch.seconds}  # during the last step's update, but for the first
            log.write(row, tokens=counts.get("tokens", 0), shown=shown)
            if row["skipped"]:
                write_sick(sick, row, records(loaded, batch.examples, rollouts))
            for text in health.news:
                say(f"warning: {text}")
            # Every process hears here of a signal that any of them got, and of one that has failed.
            signals = sorted(filter(None, exchange(interrupt.asked)))
            unwell = health.reason_to_stop(sick)
            is_last = bool(signals or unwell) or step + 1 == config.steps
            if is_last or (step + 1) % config.checkpoint_every == 0 or evaluations.due(step + 1):
                seen = {"rows_seen": bad_rows.rows, "bad_rows": dict(bad_rows.reasons), "health": health.state()}
                log.sync()
                checkpoints.save(state, place(next_batch=step + 1) | seen)
            if signals or unwell:
                break
            snapshots.at(step + 1, state)  # about as long as a step, so that a signal can wait for it
            if evaluations.due(step + 1):
                with interrupt.at_once():
                    evaluations.at(step + 1, state.trained)
        log.close()
        batches.close()
    if bad_rows.bad:
        say(bad_rows.summary())
    if unwell:
        raise InputError(f"{unwell}; saved at step {step + 1} of {config.steps}")
    if signals:
        raise Stopped(f"{signals[0]}: stopped, saved at step {step + 1} of {config.steps}; the same command goes on")
    return state.trained


def train_step_of(
    config, model: VisionLanguageModel, roles: tuple[TeacherRole, ...], tx: Any, state: TrainState
) -> TrainStep:
    """The step that a config asks for. state: of arrays, or of shapes with the shardings that they will have."""
    shardings = jax.tree.map(lambda x: x.sharding, state)
    return make_train_step(
        model,
        tx,
        roles=roles,
        chunk=config.loss.chunk,
        use_dropout="lora" in state.trained and model.lora.dropout > 0,
        temperature=config.loss.temperature,
        reduction=config.loss.reduction,
        teacher_weights=config.teacher.weights,
        ema_rate=config.teacher.ema_rate,
        shardings=(shardings, replicated(model.mesh)),
    )


def declared_programs(buckets: Mapping[str, Sequence[int]], *, max_tokens: int) -> dict[str, int]:
    """The most programs a run can compile, by kind: one for each combination of declared sizes that it can meet.

    "other" are the update, adding up and grouping micro-batches, and what jax compiles for keys, copies and casts.
    Scoring a snapshot takes programs of its own, between the steps: at most as many as "gradient" for one micro-batch.
    """
    capacities = len([n for n in buckets["completion"] if n < max_tokens]) + 1
    images, prompts, sequences = len(buckets["patches"]), len(buckets["prompt"]), len(buckets["sequence"])
    entries = len(buckets["completion"])
    return {
        "encode": images,
        "prefill": images * prompts,
        "decode": prompts * capacities,
        "grow": prompts * (capacities - 1),
        "gradient": images * sequences**2 * entries,
        "shares": entries,
        "other": 40,
    }


def _evaluate(config, workdir: pathlib.Path, loaded: Loaded, trained: Any) -> None:
    students = {"base": loaded.student({}), "trained": loaded.student(trained)}
    results, answers = demo_scores.evaluate_demo(loaded, students, config, sampling=Sampling(**config.sampling))
    if not is_first():
        return
    write_json(workdir / "results.json", results)
    print(demo_scores.samples_text(answers["base"], answers["trained"]))
    print()
    print(demo_scores.table_text(results))
    print()


def _show(workdir: pathlib.Path, output: pathlib.Path) -> None:
    print(f"the run is complete: {workdir}")
    parts = ("config.json", "metrics.jsonl", "report.html", "eval.jsonl", "results.json", "checkpoints")
    for path in [*(workdir / p for p in parts), output]:
        if path.exists():
            print(f"  {path}")
