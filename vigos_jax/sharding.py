"""One mesh (`data`, `fsdp`, `tensor`), one ordered list of rules from parameter path to partition.

Batches are split over `data` and `fsdp` together. Parameters are split over `fsdp` and `tensor`; the vision tower,
whose published widths do not divide well, over `fsdp` alone.
"""

import re
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from vigos_jax.errors import InputError

AXES = ("data", "fsdp", "tensor")

# First match wins; paths look like "params/layers/q_proj/kernel". Stacked leaves have the layer axis first.
PARAM_RULES = (
    (r"visual/blocks/.*lora|visual/.*/(a|b)$", P()),
    (r"visual/blocks/.*(qkv|gate_proj|up_proj)/kernel", P(None, "fsdp", None)),
    (r"visual/blocks/.*(proj)/kernel", P(None, None, "fsdp")),
    (r"visual/(patch_embed|merger_in|merger_out)/kernel", P(None, "fsdp")),
    (r"visual/", P()),
    (r"layers/.*(q_proj|k_proj|v_proj|gate_proj|up_proj)/kernel", P(None, "fsdp", "tensor")),
    (r"layers/.*(o_proj|down_proj)/kernel", P(None, "tensor", "fsdp")),
    (r"layers/.*/bias", P(None, "tensor")),
    (r"layers/.*(q_proj|k_proj|v_proj|gate_proj|up_proj)/a", P(None, "fsdp", None)),
    (r"layers/.*(q_proj|k_proj|v_proj|gate_proj|up_proj)/b", P(None, None, "tensor")),
    (r"layers/.*(o_proj|down_proj)/a", P(None, "tensor", None)),
    (r"layers/.*(o_proj|down_proj)/b", P(None, None, "fsdp")),
    (r"embedding", P("tensor", "fsdp")),
    (r"lm_head", P("fsdp", "tensor")),
    (r"", P()),
)


def make_mesh(*, data: int, fsdp: int, tensor: int, devices: list[Any] | None = None) -> Mesh:
    """A mesh over all devices. `data=-1` takes what the other axes leave.

    Raises:
      InputError: the axes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    n = len(devices)
    if fsdp < 1 or tensor < 1 or data == 0 or data < -1:
        raise InputError(
            f"config.mesh data={data}, fsdp={fsdp}, tensor={tensor}: axes must be at least 1 (data may be -1: the rest)"
        )
    if data == -1 and n % (fsdp * tensor) == 0:
        data = n // (fsdp * tensor)
    if data * fsdp * tensor != n:
        raise InputError(
            f"config.mesh data={data}, fsdp={fsdp}, tensor={tensor} does not cover the {n} device(s); "
            f"their product must be {n}"
        )
    return jax.make_mesh((data, fsdp, tensor), AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows over `data` and `fsdp`."""
    return NamedSharding(mesh, P(("data", "fsdp")))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, P())


def check_batch(mesh: Mesh, *, batch_size: int, accumulation: int) -> None:
    """Raises InputError unless every micro-batch divides over the devices that split it."""
    ways = mesh.shape["data"] * mesh.shape["fsdp"] * accumulation
    if batch_size < 1 or batch_size % ways:
        raise InputError(
            f"config.batch_size={batch_size} must be a positive multiple of mesh.data * mesh.fsdp * accumulation = "
            f"{ways}; the nearest is {max(1, round(batch_size / ways)) * ways}"
        )


def path_string(path: tuple[Any, ...]) -> str:
    """"params/layers/q_proj/kernel" for a key path of jax.tree_util."""
    return "/".join(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path)


def tree_shardings(tree: Any, mesh: Mesh) -> Any:
    """Shardings for a tree of arrays or shapes: parameters, adapters, or optimizer state of the same paths.

    Raises:
      InputError: lists every leaf whose dimension its mesh axis does not divide.
    """
    problems = []

    def one(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        name = path_string(path)
        spec = next(spec for pattern, spec in PARAM_RULES if re.search(pattern, name))
        if not leaf.shape:
            spec = P()
        for size, axis in zip(leaf.shape, spec, strict=False):
            if axis is not None and size % mesh.shape[axis]:
                problems.append(f"{name} {list(leaf.shape)}: {size} is no multiple of {axis}={mesh.shape[axis]}")
        return NamedSharding(mesh, spec)

    out = jax.tree_util.tree_map_with_path(one, tree)
    if problems:
        raise InputError("the mesh does not divide the model: " + "; ".join(problems[:5]))
    return out
