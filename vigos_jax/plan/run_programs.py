"""The programs of a run, compiled for the planned devices, and what each of them takes there."""

import dataclasses
import functools
import itertools
import pathlib
import re
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from vigos_jax.models.kv_cache import KeyValues
from vigos_jax.plan.abstract_run import AbstractRun, device_bytes
from vigos_jax.plan.devices import Topology
from vigos_jax.plan.operations import flops
from vigos_jax.plan.program_cost import read_traffic
from vigos_jax.plan.table import Program
from vigos_jax.rollouts.sampler import Sampler
from vigos_jax.rollouts.sampling import Sampling
from vigos_jax.training.step import train_step_of

_GB = 1e9
_EOS = (0, 1)  # which tokens end a row does not matter to the program


def capacity(run: AbstractRun) -> int:
    """Completion slots that the cache has grown to when the planned completion is sampled."""
    return next(n for n in sampler_of(run).capacities if n >= run.config.plan.completion)


def sampler_of(run: AbstractRun, memory: float | None = None) -> Sampler:
    """The run's sampler. memory: bytes of a device, as it bounds a group of rows."""
    sizes = tuple(run.config.buckets.completion)
    return Sampler(run.model, Sampling(**run.config.sampling), eos_ids=_EOS, cache_sizes=sizes, memory=memory)


def programs_of(run: AbstractRun, target: Topology, only: tuple[str, ...]) -> Iterator[Program]:
    """Yields the compiled programs in the order of a step.

    If one does not fit, the programs that need the shapes of its results are not compiled.

    Args:
      only: names of programs, () for all. Any name of the rollout or of the update brings all of that phase, but
        "prefill" comes alone.
    """
    b = run.config.batch_size
    # What stays on the devices throughout a step; "prompts" counts two batches, this step's and the next one's.
    stays = {"base": run.base, "state": run.state, "images": run.images(b), "prompts": (run.prompts(b),) * 2}
    stays["others"] = run.others
    if "params" in run.state.trained:
        stays["student"] = run.student["params"]
    measure = functools.partial(measured, run, target, sampler_steps=run.config.plan.completion)

    def beside(*used: str) -> int:
        return sum(device_bytes(tree) for name, tree in stays.items() if name not in used)

    if not only or "encode" in only:
        yield _encode(run, target, measure, beside)
    if not only or {"prefill", "weights", "grow", "decode"} & set(only):
        rollout = _rollout(run, target, measure, beside)
        # The others build on prefill.
        yield from rollout if not only or {"weights", "grow", "decode"} & set(only) else itertools.islice(rollout, 1)
    if not only or {"gradient", "update"} & set(only):
        yield from _update(run, measure, beside)


_Measure = Callable[..., tuple[Program, Any]]
_Beside = Callable[..., int]  # bytes of what stays on a device, but for the named parts


def _handed(run: AbstractRun) -> tuple[str, int]:
    """Returns (the entry of `stays` with the sampler's parameters, bytes of its adapter or 0 without one).

    The adapter is an argument of the sampler's programs and part of `state` as well, so it is subtracted once.
    """
    return ("student", 0) if "params" in run.state.trained else ("base", device_bytes(run.state.trained))


def _encode(run: AbstractRun, target: Topology, measure: _Measure, beside: _Beside) -> Program:
    sampler, (student, twice) = sampler_of(run, target.rates.memory_gb * _GB), _handed(run)
    groups = sampler.micro_groups(run.prompts(run.config.batch_size))
    vision = run.vision(run.config.batch_size // groups)
    # With one group, its output is the batch's "images" and its input is in "prompts"; with several, both are extra.
    extra = beside(student, "images") if groups == 1 else beside(student) + device_bytes(vision)
    function = sampler.programs.encode
    return measure("encode", groups, function, run.student, vision, beside=extra - twice - device_bytes(vision))[0]


def _rollout(run: AbstractRun, target: Topology, measure: _Measure, beside: _Beside) -> Iterator[Program]:
    """Prefill of one group of rows, and the decoding of all."""
    sampler, (student, twice) = sampler_of(run, target.rates.memory_gb * _GB), _handed(run)
    groups = sampler.micro_groups(run.prompts(run.config.batch_size))
    rows, programs = run.config.batch_size // groups, sampler.programs
    given = (run.prompts(rows), run.images(rows), run.whole(jax.eval_shape(lambda: jax.random.key(0)).dtype, rows))
    # With one group, its prompts and images are the batch's, which `beside` counts; with several, they are copies.
    extra = beside(student) - twice - (device_bytes(given[:2]) if groups == 1 else 0)
    program, part = measure("prefill", groups, programs.prefill, run.student, *given, beside=extra)
    if part is None:
        yield program
        return
    state = _of_all(part, groups)
    yield program if groups == 1 else dataclasses.replace(program, beside=program.beside + device_bytes(state))
    extra = beside(student) - twice + device_bytes(state)
    program, own = measure("weights", 1, programs.weights, run.student, beside=extra)
    yield program
    if own is None:
        return
    capacities = sampler.capacities[: sampler.capacities.index(capacity(run)) + 1]
    if len(capacities) > 1:
        before, slots = _grown(state, capacities[-2]), capacities[-1] - capacities[-2]
        entries = [x for x in before.cache.layers if isinstance(x, KeyValues)]
        # The cache grows layer by layer: memory peaks at the last one, when all the others have grown.
        extra = beside() + device_bytes(own) + device_bytes(_grown(state, capacities[-1]))
        extra -= device_bytes(_grown(state, capacities[-1]).cache.layers[-1])
        runs = (len(capacities) - 1) * len(entries)
        yield measure("grow", runs, programs.grow, entries[-1], slots, beside=extra)[0]
    weights = sampler.weights(run.student, own)
    read = device_bytes(weights.outer) + (device_bytes(run.student["params"]["layers"]) if weights.is_stacked else 0)
    last, until = _grown(state, capacities[-1]), run.whole(jnp.int32)
    yield measure("decode", 1, programs.decode, weights, last, until, beside=beside() - read)[0]


def _update(run: AbstractRun, measure: _Measure, beside: _Beside) -> Iterator[Program]:
    """The step's programs."""
    config, micro = run.config, run.config.batch_size // run.config.gradient_accumulation_steps
    step = train_step_of(config, run.model, run.objective, run.tx, run.state)
    batch, normalizers = run.scores(micro), run.whole(jnp.float32, len(run.objective.roles))
    key, average = run.whole(jax.eval_shape(lambda: jax.random.key(0)).dtype), run.state.average
    extra = beside("base", "others") - device_bytes(run.state.trained) - device_bytes(average)
    args = (run.state.trained, run.base, average, batch, normalizers, key, run.others)
    program, sums = measure("gradient", config.gradient_accumulation_steps, step.gradient, *args, beside=extra)
    if sums is not None and config.gradient_accumulation_steps > 1:  # the sums of the earlier micro-batches
        program = dataclasses.replace(program, beside=program.beside + device_bytes(sums))
    yield program
    if sums is not None:
        yield measure("update", 1, step.update, run.state, sums, normalizers, beside=beside("state"))[0]


def _resized(x: jax.ShapeDtypeStruct, axis: int, size: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((*x.shape[:axis], size, *x.shape[axis + 1 :]), x.dtype, sharding=x.sharding)


def _of_all(part: Any, groups: int) -> Any:
    """The shapes of one group's decoding state (`part`), enlarged to the rows of all groups."""
    return jax.tree.map(lambda x: _resized(x, 0, groups * x.shape[0]) if x.ndim else x, part)


def _grown(state: Any, capacity: int) -> Any:
    """The shapes of the decoding state if its cache has `capacity` completion slots; shardings are unchanged."""
    slots = state.prompt_slots + capacity

    def grown(x: Any) -> Any:
        if not isinstance(x, KeyValues):
            return x
        return jax.tree.map(lambda a: _resized(a, x.slots_axis, slots), x)

    cache = state.cache.replace(layers=tuple(grown(x) for x in state.cache.layers))
    return state.replace(cache=cache, visible=_resized(state.visible, 1, slots))


def measured(
    run: AbstractRun,
    target: Topology,
    name: str,
    runs: int,
    function: Any,
    *args: Any,
    beside: int,
    sampler_steps: int,
) -> tuple[Program, Any]:
    """Compiles one program; returns (its costs, its results as shapes with shardings).

    If it does not fit, `Program.refused` says why, and the results are None.
    """
    started = time.perf_counter()
    traced = function.trace(*args)
    n = len(target.devices)
    operations = flops(traced.jaxpr, trip_count=sampler_steps) / n
    # The GPU compiler refuses the option.
    options = {} if target.platform == "gpu" else {"exec_time_optimization_effort": float(run.config.plan.effort)}
    try:
        compiled = traced.lower().compile(options)
    except jax.errors.JaxRuntimeError as e:
        if "RESOURCE_EXHAUSTED" not in str(e) and "out of memory" not in str(e).lower():
            raise
        return Program(name, runs, beside=beside, flops=operations, refused=_refusal(str(e))), None
    seconds = time.perf_counter() - started
    if run.config.plan.programs:
        folder = pathlib.Path(run.config.plan.programs).expanduser()
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.txt").write_text(compiled.as_text(), encoding="utf-8")
    memory = compiled.memory_analysis()
    emulates = target.platform == "cpu" and run.model.dtype != jnp.float32
    traffic = read_traffic(compiled.as_text(), devices=n, trip_count=sampler_steps, emulates_16_bits=emulates)
    program = Program(
        name,
        runs,
        arguments=memory.argument_size_in_bytes,
        outputs=memory.output_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        aliased=memory.alias_size_in_bytes,
        beside=beside + _unread(args, compiled),
        flops=operations,
        traffic=traffic.memory,
        kernels=traffic.kernels,
        split_sums=traffic.split_sums,
        largest=traffic.largest,
        compile_seconds=seconds,
        moved=traffic.moved(),
        # The sampler's own loop is counted as it was asked to be.
        unknown_loops=tuple(x for x in traffic.unknown_loops if name != "decode"),
    )
    place = lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)  # noqa: E731
    results = jax.tree.map(place, traced.out_info, compiled.output_shardings)
    assert all(isinstance(s, NamedSharding) for s in jax.tree.leaves(compiled.output_shardings))
    return program, results


def _unread(args: tuple[Any, ...], compiled: Any) -> int:
    """Bytes on one device of unused arguments: not in the compiler's argument size, but still in memory."""
    is_none = lambda x: x is None  # noqa: E731
    given = [x for x in jax.tree.leaves(args, is_leaf=is_none) if not isinstance(x, int)]
    read = jax.tree.leaves(compiled.input_shardings[0], is_leaf=is_none)
    return device_bytes([x for x, sharding in zip(given, read, strict=True) if x is not None and sharding is None])


def _refusal(message: str) -> str:
    """What the compiler says of the memory it would need, in a few words."""
    used = re.search(r"[Uu]sed [\d.]+[KMG] of [\d.]+[KMG]", message)
    return used[0] if used else "the compiler finds no way to fit it"
