"""One mesh (`data`, `fsdp`, `tensor`), the rules that place every leaf on it, and which rows lie in which process.

Batches are split over `data` and `fsdp` together, parameters as `config.mesh.rules` say. With several processes a
global array has parts that this process does not hold: it puts and reads its own rows.
"""

import itertools
import math
import re
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from vigos_jax.errors import InputError

AXES = ("data", "fsdp", "tensor")
_SHOWN = 5  # leaves that one error names


def make_mesh(*, data: int, fsdp: int, tensor: int, devices: list[Any] | None = None) -> Mesh:
    """A mesh over all devices of all processes. One axis may be -1: it takes the remaining devices.

    Raises:
      InputError: the axes do not multiply to the number of devices, or two processes share some of their rows only.
    """
    devices = jax.devices() if devices is None else devices
    n, shape = len(devices), {"data": data, "fsdp": fsdp, "tensor": tensor}
    asked = "config.mesh " + ", ".join(f"{axis}={size}" for axis, size in shape.items())
    rest = [axis for axis, size in shape.items() if size == -1]
    if len(rest) > 1 or any(size < 1 for axis, size in shape.items() if axis not in rest):
        raise InputError(f"{asked}: axes must be at least 1 (one may be -1: the rest)")
    fixed = math.prod(size for axis, size in shape.items() if axis not in rest)
    if rest and n % fixed == 0:
        shape[rest[0]] = n // fixed
    if math.prod(shape.values()) != n:
        raise InputError(f"{asked} does not cover the {n} device(s); their product must be {n}")
    mesh = jax.make_mesh(tuple(shape.values()), AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)
    holders = list(_rows_of_processes(mesh).values())
    if any(a & b and a != b for a, b in itertools.combinations(holders, 2)):
        raise InputError(
            f"{asked}: a process would hold some, not all, of the rows of another; choose a tensor that divides the "
            f"{n // len(holders)} devices of a process, or is a multiple of them"
        )
    return mesh


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows over `data` and `fsdp`."""
    return NamedSharding(mesh, P(("data", "fsdp")))


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of an array that every device holds whole."""
    return NamedSharding(mesh, P())


def device_memory(mesh: Mesh) -> int | None:
    """Bytes of a device's memory that programs may use; None where it does not say, as a CPU."""
    stats = mesh.local_devices[0].memory_stats()
    return stats.get("bytes_limit") if stats else None


def check_batch(mesh: Mesh, *, batch_size: int, micro_batches: int) -> None:
    """Raises InputError unless every micro-batch divides over the devices that split it."""
    shards = mesh.shape["data"] * mesh.shape["fsdp"] * micro_batches
    if batch_size < 1 or batch_size % shards:
        raise InputError(
            f"config.batch_size={batch_size} must be a positive multiple of mesh.data * mesh.fsdp * "
            f"gradient_accumulation_steps = {shards}; the nearest is {max(1, round(batch_size / shards)) * shards}"
        )


# -- rows -------------------------------------------------------------------------------------------------------


def _rows_of_processes(mesh: Mesh) -> dict[int, frozenset[int]]:
    """Per process, which of the equal parts of a batch its devices hold."""
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    rows: dict[int, set[int]] = {}
    for device, (part,) in batch_sharding(mesh).devices_indices_map((shards,)).items():
        rows.setdefault(device.process_index, set()).update(range(shards)[part])
    return {process: frozenset(own) for process, own in sorted(rows.items())}


def own_rows(mesh: Mesh, size: int) -> list[int]:
    """Numbers of the rows of a global batch of `size` that this process holds, ascending; several may hold the same.

    What this process reads, packs and puts on the mesh are these rows, in this order.
    """
    parts = sorted(_rows_of_processes(mesh)[jax.process_index()])
    each = size // (mesh.shape["data"] * mesh.shape["fsdp"])
    return [part * each + i for part in parts for i in range(each)]


def counts_rows(mesh: Mesh) -> bool:
    """Whether this process is the first that holds its rows: sums over rows are made of those processes'."""
    rows = _rows_of_processes(mesh)
    return jax.process_index() == next(process for process, own in rows.items() if own == rows[jax.process_index()])


def read_rows(x: jax.Array, mesh: Mesh) -> np.ndarray:
    """This process's rows of a global array, in the order of `own_rows`. All processes must call it."""
    if jax.process_count() == 1:
        return np.asarray(x)
    parts = {s.index[0].start or 0: s.data for s in jax.device_put(x, batch_sharding(mesh)).addressable_shards}
    return np.concatenate([np.asarray(parts[start]) for start in sorted(parts)])


# -- leaves -----------------------------------------------------------------------------------------------------


def path_string(path: tuple[Any, ...]) -> str:
    """Text like "params/layers/q_proj/kernel" for a key path of jax.tree_util."""
    return "/".join(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path)


def parse_rules(rules: Sequence[Any]) -> tuple[tuple[re.Pattern[str], P], ...]:
    """`config.mesh.rules` as patterns and partitions; lists, as JSON has them, are as good as tuples.

    Raises:
      InputError: a rule is not a pair (regular expression, axes), or its axes are not axes of the mesh.
    """
    if not isinstance(rules, list | tuple):
        raise InputError(f"config.mesh.rules={rules!r} must be a list of rules")
    out = []
    for i, rule in enumerate(rules):
        where = f"config.mesh.rules[{i}]={rule!r}"
        if not isinstance(rule, list | tuple) or len(rule) != 2 or not isinstance(rule[1], list | tuple):
            raise InputError(f"{where} must be a pair: a pattern of paths, and an axis or None per dimension")
        try:
            pattern = re.compile(rule[0])
        except (re.error, TypeError) as e:
            raise InputError(f"{where} must be a regular expression: {e}") from e
        if strangers := [axis for axis in rule[1] if axis is not None and axis not in AXES]:
            raise InputError(f"{where} names the axis {strangers[0]!r}; choices: {', '.join(AXES)}, None")
        named = [axis for axis in rule[1] if axis is not None]
        if twice := [axis for axis in named if named.count(axis) > 1]:
            raise InputError(f"{where} uses {twice[0]} twice; an axis must split one dimension only")
        out.append((pattern, P(*rule[1])))
    return tuple(out)


def tree_shardings(tree: Any, mesh: Mesh | AbstractMesh, rules: Sequence[Any]) -> Any:
    """Shardings for a tree of arrays or shapes: parameters, adapters, or optimizer state of the same paths.

    Args:
      rules: `config.mesh.rules`.

    Raises:
      InputError: a bad rule, a leaf that no rule matches or whose rule has more axes than it has dimensions; or
        dimensions that their axes do not divide, with the nearest meshes of as many devices that do.
    """
    parsed = parse_rules(rules)
    leaves = [(path_string(path), leaf.shape) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)]
    specs = [_spec(name, shape, parsed) for name, shape in leaves]
    shape = dict(mesh.shape)
    if problems := list(_problems(leaves, specs, shape)):
        asked = ", ".join(f"{axis}={size}" for axis, size in shape.items())
        more = f"; and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        raise InputError(
            f"config.mesh {asked} does not divide the model: {'; '.join(problems[:_SHOWN])}{more}; "
            f"the nearest that do: {_nearest(leaves, specs, shape)}"
        )
    return jax.tree.unflatten(jax.tree.structure(tree), [NamedSharding(mesh, spec) for spec in specs])


def _spec(name: str, shape: tuple[int, ...], rules: tuple[tuple[re.Pattern[str], P], ...]) -> P:
    """The partition of the first rule that matches. A dimension of size one stays whole, whatever its axis."""
    for pattern, spec in rules:
        if pattern.search(name):
            if len(spec) > len(shape):
                raise InputError(
                    f"config.mesh.rules: {pattern.pattern!r} has {len(spec)} axes for {name} {list(shape)}, "
                    f"which has {len(shape)} dimension(s) and needs no more"
                )
            return P(*(None if size == 1 else axis for axis, size in zip(spec, shape, strict=False)))
    raise InputError(f"config.mesh.rules: none matches {name}; end them with ('', ()), which leaves the rest whole")


def _problems(leaves: list[tuple[str, tuple[int, ...]]], specs: list[P], mesh: dict[str, int]) -> Iterator[str]:
    for (name, shape), spec in zip(leaves, specs, strict=True):
        for size, axis in zip(shape, spec, strict=False):
            if axis is not None and size % mesh[axis]:
                yield f"{name} {list(shape)}: {size} is not a multiple of {axis}={mesh[axis]}"


def _nearest(leaves: list[tuple[str, tuple[int, ...]]], specs: list[P], mesh: dict[str, int]) -> str:
    """The three meshes of as many devices that divide all leaves and differ least from `mesh`, as text."""
    n = math.prod(mesh.values())
    divisors = [d for d in range(1, n + 1) if n % d == 0]
    shapes = [(n // (f * t), f, t) for f in divisors for t in divisors if n % (f * t) == 0]
    good = [s for s in shapes if not any(_problems(leaves, specs, dict(zip(AXES, s, strict=True))))]
    good.sort(key=lambda s: sum(abs(math.log2(a / b)) for a, b in zip(s, mesh.values(), strict=True)))
    text = [" ".join(f"{axis}={size}" for axis, size in zip(AXES, s, strict=True)) for s in good[:3]]
    return ", ".join(text) or f"none of {n} devices; change config.mesh.rules"
