"""The training loop, top to bottom: batch, rollout, parse, pack, step, log, save."""

import functools
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vigos_jax import evaluate
from vigos_jax.checkpoint import Checkpoints
from vigos_jax.config import differences, read_json, to_json
from vigos_jax.data import BadRows, data_state, make_batches, resume_batch
from vigos_jax.errors import InputError
from vigos_jax.export import export
from vigos_jax.inputs import ScoreBatch
from vigos_jax.loading import Loaded, load, open_source, sampling_of
from vigos_jax.metrics import CompileCounter, MetricsFile, Progress, say, write_json
from vigos_jax.models.variables import shares_vision
from vigos_jax.packing import Rollout, Row, length_groups, pack_prompts, pack_scores
from vigos_jax.rollouts import Reader, parse, rollout_metrics
from vigos_jax.sampler import Sampler, row_keys
from vigos_jax.sharding import batch_sharding, check_batch, replicated, tree_shardings
from vigos_jax.step import TrainState, make_optimizer, make_train_step


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
    if config.export.kind == "adapter" and not has_adapter:
        raise InputError("config.export.kind=adapter needs an adapter, and config.lora.rank=0; choices: merged")
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

    Writes config.json, metrics.jsonl, checkpoints/, at the end export/ and, on the demo, results.json.
    """
    _check_workdir(config, workdir)
    source = open_source(config)
    loaded = load(config, for_training=True)
    check_batch(loaded.mesh, batch_size=config.batch_size, accumulation=config.accumulation)
    has_results = config.data.source == "demo" and config.evaluate.questions > 0
    options = {k: v for k, v in config.optimizer.items()}
    tx, learning_rate = make_optimizer(steps=config.steps, **options)
    reader = Reader.of(loaded, config)
    place = functools.partial(
        data_state,
        source,
        batch_size=config.batch_size,
        seed=config.seed,
        shuffle=config.data.shuffle,
        window=config.data.window,
    )

    output = pathlib.Path(config.export.output).expanduser() if config.export.output else workdir / "export"
    if config.export.after_training:
        _check_export(config, workdir, output, has_adapter="lora" in loaded.trained)
    _open_workdir(config, workdir)
    with Checkpoints(workdir, keep=config.keep_checkpoints) as checkpoints:
        state = _initial_state(config, loaded, tx)
        first = checkpoints.latest_step() or 0
        bad_rows = BadRows()
        if first:
            state, saved = checkpoints.restore(first, state)
            resume_batch(saved, place(next_batch=first))
            bad_rows.rows = saved["rows_seen"]
            bad_rows.reasons.update(saved["bad_rows"])
            say(f"going on from step {first} of {config.steps} in {workdir}")
        if first < config.steps:
            state = _steps(
                config, workdir, loaded, tx, learning_rate, source, reader, place, checkpoints, state, bad_rows
            )
    if has_results and not (workdir / "results.json").exists():
        _evaluate(config, workdir, loaded, state.trained)
    if config.export.after_training and jax.process_index() == 0 and not output.exists():
        export(
            loaded,
            state.trained,
            output,
            kind=config.export.kind,
            dtype=config.export.dtype,
            max_shard_gb=config.export.max_shard_gb,
        )
    _show(workdir, output)


def _steps(
    config, workdir, loaded, tx, learning_rate, source, reader, place, checkpoints, state, bad_rows
) -> TrainState:
    """The loop itself, from the state's step to the last."""
    first = int(state.step)
    has_adapter_dropout = "lora" in state.trained and loaded.model.lora.dropout > 0
    shardings = jax.tree.map(lambda x: x.sharding, state)
    train_step = make_train_step(
        loaded.model,
        tx,
        roles=loaded.roles,
        chunk=config.loss.chunk,
        use_dropout=has_adapter_dropout,
        temperature=config.loss.temperature,
        reduction=config.loss.reduction,
        teacher_weights=config.teacher.weights,
        ema_rate=config.teacher.ema_rate,
        shardings=(shardings, replicated(loaded.mesh)),
    )
    one_tower = shares_vision(state.trained)
    take = jax.jit(lambda x, rows: x[rows], out_shardings=batch_sharding(loaded.mesh))
    pack = functools.partial(_micro_batches, loaded, take, config.accumulation)
    sampler = Sampler(
        loaded.model,
        sampling_of(config),
        eos_ids=loaded.processor.eos_ids,
        cache_sizes=loaded.buckets.completion,
    )
    batches = make_batches(
        source,
        processor=loaded.processor,
        batch_size=config.batch_size,
        seed=config.seed,
        shuffle=config.data.shuffle,
        max_images=config.data.max_images,
        fields=tuple(config.data.fields),
        window=config.data.window,
        workers=config.data.workers,
        too_long=functools.partial(reader.too_long, max_completion=config.sampling.max_tokens),
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        start_batch=first,
    )
    compiled = CompileCounter()
    metrics_file = MetricsFile(workdir / "metrics.jsonl", next_step=first + 1)
    progress = Progress(total=config.steps, start=first, title="train", every=config.log_every)
    shapes = _Shapes()
    dropout_key = jax.random.fold_in(jax.random.key(config.seed), 2)

    def prepare() -> tuple[Any, ...]:
        """The next batch: its examples, rows, prompts on the mesh, and the seconds that took."""
        start = time.monotonic()
        examples = next(batches)
        rows = [reader.row(e) for e in examples]
        prompts = loaded.put_batch(pack_prompts(rows, config=loaded.config, buckets=loaded.buckets))
        return examples, rows, prompts, time.monotonic() - start

    upcoming = prepare()
    for step in range(first, config.steps):
        examples, rows, prompts, data_seconds = upcoming
        programs = compiled.programs
        bad_rows.update(examples)
        bad_rows.check(config.data.max_bad_fraction)
        shapes.note(progress, "rollout", prompts)
        times = [time.monotonic()]

        keys = row_keys(config.seed, step, config.batch_size)
        student = sampler.ready(loaded.student(state.trained))
        images = sampler.encode(student, prompts.vision)
        sampled = sampler(student, prompts, keys, images)
        times.append(time.monotonic())

        rollouts = parse(loaded, rows, sampled)
        # Where student, teachers and rollouts see with the same eyes, the tower need not run again.
        micro_batches = pack(rows, rollouts, images if one_tower else None)
        shapes.note(progress, "update", micro_batches)
        times.append(time.monotonic())

        state, values = train_step(state, loaded.base, micro_batches, jax.random.fold_in(dropout_key, step))
        # The devices are at work: time to grade what was sampled, and to read and pack what comes next.
        sampled_metrics = rollout_metrics(loaded, examples, rollouts)
        upcoming = prepare() if step + 1 < config.steps else None
        values = {k: float(v) for k, v in jax.device_get(values).items()}
        times.append(time.monotonic())

        row = {"step": step + 1, "learning_rate": float(learning_rate(step))} | values
        row |= sampled_metrics | {"bad_rows": bad_rows.bad, "compilations": compiled.programs - programs}
        phases = ("rollout", "pack", "update")
        row |= {"seconds/data": data_seconds}  # during the last step's update, but for the first
        row |= {f"seconds/{p}": b - a for p, a, b in zip(phases, times[:-1], times[1:], strict=True)}
        if jax.process_index() == 0:
            metrics_file.write(row)
        shown = {"loss": row["loss"]} | {r.name: row[f"{r.name}/loss"] for r in loaded.roles}
        progress.update(step + 1, shown | {"valid": row.get("valid_rate", 0.0), "accuracy": row.get("accuracy", 0.0)})
        if (step + 1) % config.checkpoint_every == 0 or step + 1 == config.steps:
            seen = {"rows_seen": bad_rows.rows, "bad_rows": dict(bad_rows.reasons)}
            checkpoints.save(state, place(next_batch=step + 1) | seen)
    progress.close()
    compiled.close()
    metrics_file.close()
    if hasattr(batches, "close"):
        batches.close()
    if bad_rows.bad:
        say(bad_rows.summary())
    return state


def _micro_batches(
    loaded: Loaded,
    take: Callable[[jax.Array, np.ndarray], jax.Array],
    count: int,
    rows: list[Row],
    rollouts: list[Rollout | None],
    images: jax.Array | None,
) -> list[ScoreBatch]:
    """The step's rows in `count` micro-batches by length, on the mesh.

    Args:
      take: picks rows of `images`.
      images: [B, M, D], the rows' visual tokens if they serve everyone; else each micro-batch brings its pictures.
    """
    out = []
    for group in length_groups(rows, rollouts, count):
        batch = pack_scores(
            [rows[i] for i in group],
            [rollouts[i] for i in group],
            roles=loaded.roles,
            config=loaded.config,
            buckets=loaded.buckets,
            with_images=images is None,
        )
        batch = loaded.put_batch(batch)
        if images is not None:
            batch = batch.replace(image_embeds=images if count == 1 else take(images, np.array(group)))
        out.append(batch)
    return out


def declared_programs(buckets: Mapping[str, Sequence[int]], *, max_tokens: int) -> dict[str, int]:
    """The most programs a run can compile, by kind: one for each combination of declared sizes that it can meet.

    "other" are the update, adding up and grouping micro-batches, and what jax compiles for keys, copies and casts.
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


class _Shapes:
    """Says on the progress bar that a program is about to be compiled: when a batch has shapes not met before."""

    def __init__(self):
        self._met: set[Any] = set()

    def note(self, progress: Progress, what: str, batch: Any) -> None:
        shapes = (what, *(x.shape for x in jax.tree.leaves(batch)))
        if shapes not in self._met:
            self._met.add(shapes)
            progress.note(f"compiling the {what} (shapes not met before)")


def _evaluate(config, workdir: pathlib.Path, loaded: Loaded, trained: Any) -> None:
    students = {"base": loaded.student({}), "trained": loaded.student(trained)}
    results, answers = evaluate.evaluate_demo(loaded, students, config, sampling=sampling_of(config))
    write_json(workdir / "results.json", results)
    print(evaluate.samples_text(answers["base"], answers["trained"]))
    print()
    print(evaluate.table_text(results))
    print()


def _show(workdir: pathlib.Path, output: pathlib.Path) -> None:
    print(f"the run is complete: {workdir}")
    parts = ("config.json", "metrics.jsonl", "results.json", "checkpoints")
    for path in [*(workdir / p for p in parts), output]:
        if path.exists():
            print(f"  {path}")
