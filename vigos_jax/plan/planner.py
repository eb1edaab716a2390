"""`--mode plan`: what a run takes on devices that are not here. Its own programs are compiled for them, never run.

Memory is what the compiler assigns on one device, and what stays there between programs. Time is a lower bound: each
program takes what the busiest of its three resources takes at full rate, arithmetic, memory or interconnect.
"""

import dataclasses
import functools
import json
import math
import pathlib
import re
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from vigos_jax.errors import InputError
from vigos_jax.plan.abstract_run import AbstractRun, describe, device_bytes
from vigos_jax.plan.devices import Topology, topology
from vigos_jax.plan.floors import decode_floor
from vigos_jax.plan.operations import flops
from vigos_jax.plan.program_cost import read_traffic
from vigos_jax.plan.table import Plan, Program, report
from vigos_jax.rollouts.sampler import Sampler
from vigos_jax.rollouts.sampling import Sampling
from vigos_jax.training.step import train_step_of

_GB = 1e9
_EOS = (0, 1)  # which tokens end a row does not matter to the program
_ONLY_GRADIENT = ("model.remat", "gradient_accumulation_steps")  # changes that leave all other programs as they are


def plan(config) -> str:
    """Compiles the run's programs for `config.plan.topology` and says what they take; also as JSON, if asked to.

    Raises:
      InputError: an unknown topology or model, a mesh that does not divide, sizes beyond the buckets, no compiler.
    """
    target = topology(config.plan)
    output = pathlib.Path(config.plan.output).expanduser() if config.plan.output else None
    if output is not None and not output.parent.is_dir():
        raise InputError(f"config.plan.output={str(output)!r}: its folder must exist")
    result = compile_plan(config, target)
    if not result.fits and config.plan.advise:
        result = dataclasses.replace(result, **_advice(config, target, result))
    if output is not None:
        output.write_text(json.dumps(result.to_json(), indent=2) + "\n", encoding="utf-8")
    return report(result)


# -- its programs -----------------------------------------------------------------------------------------------


def compile_plan(config, target: Topology, *, only: tuple[str, ...] = ()) -> Plan:
    """Compiles the programs of one step, all or the named ones and what they build on."""
    run = describe(config, target)
    count = lambda tree: sum(math.prod(x.shape) for x in jax.tree.leaves(tree))  # noqa: E731
    c, shards = run.model.config, run.mesh.shape["data"] * run.mesh.shape["fsdp"]
    heads = c.num_kv_heads // (run.mesh.shape["tensor"] if c.num_kv_heads % run.mesh.shape["tensor"] == 0 else 1)
    slots = run.sizes.prompt + _capacity(run)
    cache = 2 * c.num_layers * (config.batch_size // shards) * slots * heads * c.head_dim * run.model.dtype.itemsize
    of_decode = {
        "tokens": config.plan.completion,
        "floor": config.plan.completion * decode_floor(run, cache_bytes=cache),
    }
    layers = {"encode": c.vision.depth, "prefill": c.num_layers, "decode": c.num_layers, "gradient": c.num_layers}
    programs = tuple(
        dataclasses.replace(p, layers=layers.get(p.name, 0), **(of_decode if p.name == "decode" else {}))
        for p in _programs(run, target, only)
    )
    return Plan(
        model=config.model.path,
        topology=target.name,
        devices=len(target.devices),
        rates=target.rates,
        mesh=dict(run.mesh.shape),
        sizes=dataclasses.asdict(run.sizes),
        batch_size=config.batch_size,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        remat=config.model.remat,
        attention=run.model.attention,
        dtype=config.model.dtype,
        parameters=count(run.base),
        trained=count(run.state.trained),
        base_bytes=device_bytes(run.base),
        trained_bytes=device_bytes(run.state.trained),
        opt_state_bytes=device_bytes(run.state.opt_state),
        cache_bytes=cache,
        programs=programs,
        notes=_notes(run, target),
    )


def _notes(run: AbstractRun, target: Topology) -> tuple[str, ...]:
    """Facts of the devices without which the numbers mislead."""
    out = []
    if run.model.dtype == jnp.bfloat16 and not target.has_bfloat16:
        out.append(
            f"{target.name}: no bfloat16 units: bfloat16 products run in float32, far below "
            f"{target.rates.tflops:g} TFLOP/s"
        )
    if not target.has_fused_attention:
        out.append(f"{target.name}: no fused attention: attention is XLA's")
    if target.platform == "cpu" and run.model.dtype != jnp.float32:
        out.append(f"a CPU computes {run.model.dtype} in float32: temporaries are up to twice a GPU's")
    return tuple(out)


def _capacity(run: AbstractRun) -> int:
    """Completion slots that the cache has grown to when the planned completion is sampled."""
    return next(n for n in _sampler(run).capacities if n >= run.config.plan.completion)


def _sampler(run: AbstractRun) -> Sampler:
    sizes = tuple(run.config.buckets.completion)
    return Sampler(run.model, Sampling(**run.config.sampling), eos_ids=_EOS, cache_sizes=sizes)


def _programs(run: AbstractRun, target: Topology, only: tuple[str, ...]) -> Iterator[Program]:
    """In the order of a step. What another program would have made, had it fit, is not compiled on."""
    config, b = run.config, run.config.batch_size
    micro = b // config.gradient_accumulation_steps
    sampler, step = _sampler(run), train_step_of(config, run.model, run.objective, run.tx, run.state)
    prompts, until = run.prompts(b), run.whole(jnp.int32)
    keys = run.whole(jax.eval_shape(lambda: jax.random.key(0)).dtype, b)
    # What a step has at hand all the time, beside the two batches of prompts, this step's and the next.
    stays = {"base": run.base, "state": run.state, "images": run.images(b), "prompts": (prompts, prompts)}
    if run.student["params"] is not run.base and "params" in run.state.trained:
        stays["student"] = run.student["params"]
    wanted = lambda *names: not only or any(name in only for name in names)  # noqa: E731
    measure = functools.partial(_measure, run, target, sampler_steps=config.plan.completion)

    def beside(*used: str) -> int:
        return sum(device_bytes(tree) for name, tree in stays.items() if name not in used)

    rollout = "student" if "student" in stays else "base"
    trained = device_bytes(run.state.trained)  # counted with the state; the sampler is handed an adapter too
    if wanted("encode"):
        extra = beside(rollout, "images") - (trained if rollout == "base" else 0) - device_bytes(run.vision(b))
        yield measure("encode", 1, sampler.programs.encode, run.student, run.vision(b), beside=extra)[0]
    if wanted("prefill", "grow", "decode"):
        extra = beside(rollout, "images", "prompts") - (trained if rollout == "base" else 0) + device_bytes(prompts)
        program, state = measure(
            "prefill", 1, sampler.programs.prefill, run.student, prompts, run.images(b), keys, beside=extra
        )
        yield program
        if state is not None:
            capacities = sampler.capacities[: sampler.capacities.index(_capacity(run)) + 1]
            last = _grown(state, capacities[-1])
            if len(capacities) > 1:
                before = _grown(state, capacities[-2])
                slots = capacities[-1] - capacities[-2]
                yield measure("grow", len(capacities) - 1, sampler.programs.grow, before, slots, beside=beside())[0]
            extra = beside(rollout) - (trained if rollout == "base" else 0)
            yield measure("decode", 1, sampler.programs.decode, run.student, last, until, beside=extra)[0]
    if wanted("gradient", "update"):
        batch, normalizers = run.scores(micro), run.whole(jnp.float32, len(run.objective.roles))
        key = run.whole(keys.dtype)
        average = run.state.average
        extra = beside("base") - trained - device_bytes(average)
        args = (run.state.trained, run.base, average, batch, normalizers, key)
        program, sums = measure("gradient", config.gradient_accumulation_steps, step.gradient, *args, beside=extra)
        if sums is not None and config.gradient_accumulation_steps > 1:  # those of the micro-batches before
            program = dataclasses.replace(program, beside=program.beside + device_bytes(sums))
        yield program
        if sums is not None:
            yield measure("update", 1, step.update, run.state, sums, normalizers, beside=beside("state"))[0]


def _grown(state: Any, capacity: int) -> Any:
    """The decoding state with a cache of so many completion slots, rows where they were."""

    def resize(x: jax.ShapeDtypeStruct, axis: int) -> jax.ShapeDtypeStruct:
        shape = (*x.shape[:axis], state.prompt_slots + capacity, *x.shape[axis + 1 :])
        return jax.ShapeDtypeStruct(shape, x.dtype, sharding=x.sharding)

    cache = state.cache.replace(k=resize(state.cache.k, 2), v=resize(state.cache.v, 2))
    return state.replace(cache=cache, visible=resize(state.visible, 1))


def _measure(
    run: AbstractRun,
    target: Topology,
    name: str,
    runs: int,
    function: Any,
    *args: Any,
    beside: int,
    sampler_steps: int,
) -> tuple[Program, Any]:
    """Compiles one program; returns what it takes, and its results as shapes, or None where it does not fit at all."""
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
    """Bytes on one device of arguments that the program does not read, and so does not count: they are there."""
    is_none = lambda x: x is None  # noqa: E731
    given = [x for x in jax.tree.leaves(args, is_leaf=is_none) if not isinstance(x, int)]
    read = jax.tree.leaves(compiled.input_shardings[0], is_leaf=is_none)
    return device_bytes([x for x, sharding in zip(given, read, strict=True) if x is not None and sharding is None])


def _refusal(message: str) -> str:
    """What the compiler says of the memory it would need, in a few words."""
    used = re.search(r"[Uu]sed [\d.]+[KMG] of [\d.]+[KMG]", message)
    return used[0] if used else "the compiler finds no way to fit it"


# -- what would fit ---------------------------------------------------------------------------------------------


def _changes(config, mesh: dict[str, int], failed: set[str]) -> Iterator[dict[str, Any]]:
    """Changes of a config, from the one that costs least: none of the first ones changes what is learned."""
    if failed <= {"gradient"}:
        if config.model.remat != "full":
            yield {"model.remat": "full"}
        shards = mesh["data"] * mesh["fsdp"]
        for n in (2, 4, 8):
            if config.batch_size % (shards * config.gradient_accumulation_steps * n) == 0:
                yield {"model.remat": "full", "gradient_accumulation_steps": config.gradient_accumulation_steps * n}
    data, fsdp, tensor = mesh["data"], mesh["fsdp"], mesh["tensor"]
    while data % 2 == 0:
        data, fsdp = data // 2, fsdp * 2
        yield {"mesh.data": data, "mesh.fsdp": fsdp, "mesh.tensor": tensor}
    shards = data * fsdp
    while shards % 2 == 0 and tensor < 8:
        shards, tensor = shards // 2, tensor * 2
        # Fewer rows at a time, or the activations of a device would grow as its weights shrink.
        rows = max(1, config.batch_size // (shards * config.gradient_accumulation_steps))
        more = next((n for n in (4, 2) if rows % n == 0), 1)
        yield {
            "mesh.data": 1, "mesh.fsdp": shards, "mesh.tensor": tensor,
            "gradient_accumulation_steps": config.gradient_accumulation_steps * more, "model.remat": "full",
        }  # fmt: skip
    for part in (2, 4):
        if config.plan.completion // part:
            yield {"plan.completion": config.plan.completion // part, "model.remat": "full"}


def _advice(config, target: Topology, result: Plan) -> dict[str, Any]:
    """Compiles one change after the other until everything fits: the `advice` and `tried` of a Plan."""
    failed = {p.name for p in result.programs if not result.holds(p)}
    tried = []
    for change in _changes(config, result.mesh, failed):
        changed = config.copy_and_resolve_references()
        words = ", ".join(f"config.{k}={v}" for k, v in change.items() if _get(config, k) != v)
        with changed.unlocked():
            changed.update_from_flattened_dict(change)
        only = ("gradient",) if all(k in _ONLY_GRADIENT for k in change) else ()
        try:
            other = compile_plan(changed, target, only=only)
        except InputError:  # such a mesh does not divide the model or the batch
            continue
        tried.append(f"{words}: {other.peak / _GB:.1f} GB" if other.is_whole else f"{words}: refused by the compiler")
        if other.fits:
            return {"advice": words, "tried": tuple(tried)}
    return {"advice": None, "tried": tuple(tried)}


def _get(config, field: str) -> Any:
    return functools.reduce(lambda node, part: node[part], field.split("."), config)
