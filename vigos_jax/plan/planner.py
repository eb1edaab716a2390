"""`--mode plan`: memory and time of a run on devices that are not present. Its programs are compiled but never run.

Memory is what the compiler assigns on one device plus what stays resident between programs. Time is a roofline lower
bound: a program takes as long as its slowest resource (arithmetic, memory or interconnect) takes at full rate.
"""

import dataclasses
import functools
import json
import math
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from vigos_jax.errors import InputError
from vigos_jax.models.quantization import is_quantised
from vigos_jax.plan.abstract_run import AbstractRun, describe, device_bytes
from vigos_jax.plan.devices import Topology, topology
from vigos_jax.plan.floors import cache_bytes, decode_floor
from vigos_jax.plan.run_programs import capacity, programs_of
from vigos_jax.plan.table import Plan, report

_GB = 1e9
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
    c = run.model.config
    slots = run.sizes.prompt + capacity(run)
    of_decode = {
        "tokens": config.plan.completion,
        "floor": config.plan.completion * decode_floor(run, slots=slots),
    }
    layers = {"encode": c.vision.depth, "prefill": c.num_layers, "decode": c.num_layers, "gradient": c.num_layers}
    programs = tuple(
        dataclasses.replace(p, layers=layers.get(p.name, 0), **(of_decode if p.name == "decode" else {}))
        for p in programs_of(run, target, only)
    )
    return Plan(
        model=config.model.path,
        topology=target.name,
        devices=len(target.devices),
        rates=target.rates,
        mesh=dict(run.mesh.shape),
        sizes=run.sizes.json(),
        batch_size=config.batch_size,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        remat=config.model.remat,
        attention=run.model.attention,
        dtype=config.model.dtype,
        parameters=_count(run.base),
        trained=_count(run.state.trained),
        base_bytes=device_bytes(run.base),
        trained_bytes=device_bytes(run.state.trained),
        opt_state_bytes=device_bytes(run.state.opt_state),
        cache_bytes=sum(cache_bytes(run, slots=slots)),
        programs=programs,
        notes=_notes(run, target),
    )


def _count(tree: Any) -> int:
    """Parameters of a tree of shapes."""
    shape = lambda x: x.kernel_shape if is_quantised(x) else x.shape  # noqa: E731
    return sum(math.prod(shape(x)) for x in jax.tree.leaves(tree, is_leaf=is_quantised))


def _notes(run: AbstractRun, target: Topology) -> tuple[str, ...]:
    """Facts of the devices without which the numbers mislead."""
    out = [
        f"teacher {path}: {_count(other.params) / 1e9:.2f} G parameters, {device_bytes(other.params) / _GB:.1f} GB on "
        "each device"
        for path, other in run.others.items()
    ]
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


# -- what would fit ---------------------------------------------------------------------------------------------


def _changes(config, mesh: dict[str, int], failed: set[str]) -> Iterator[dict[str, Any]]:
    """Yields config changes to try, cheapest first; the first ones do not change what is learned."""
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
        # Also more micro-batches: otherwise a device's activations grow as its weights shrink.
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
    """Compiles the changes in turn until everything fits; returns `advice` and `tried` of a Plan."""
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
