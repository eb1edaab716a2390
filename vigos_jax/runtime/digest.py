"""Numbers that tell arrays apart by their bits, computed where the arrays lie, and the same on every mesh."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from vigos_jax.runtime.sharding import path_string

Array = jax.Array
_SALTS = (0, 0x9E3779B9)


def digests(tree: Any) -> dict[str, str]:
    """16 hexadecimal digits for each leaf, by its path; they change with any of its bits and with their places.

    With several processes all must call it.
    """
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    if not leaves:
        return {}
    sharding = leaves[0][1].sharding
    out = NamedSharding(sharding.mesh, P()) if isinstance(sharding, NamedSharding) else None
    numbers = jax.device_get(jax.jit(_digest, out_shardings=out)([leaf for _, leaf in leaves]))  # [n, 2]
    return {path_string(path): f"{a:08x}{b:08x}" for (path, _), (a, b) in zip(leaves, numbers.tolist(), strict=True)}


def _digest(leaves: list[Array]) -> Array:  # uint32 [n, 2]
    return jnp.array([[_sum(x, salt) for salt in _SALTS] for x in leaves])


def _sum(x: Array, salt: int) -> Array:
    """The sum, modulo 2**32, of every element's bits mixed with its place."""
    unsigned = jnp.dtype(f"uint{8 * x.dtype.itemsize}")
    bits = jax.lax.bitcast_convert_type(x, unsigned).astype(jnp.uint32)
    place, stride = jnp.zeros(x.shape, jnp.uint32), 1
    for axis in reversed(range(x.ndim)):
        place += jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis) * jnp.uint32(stride % 2**32)
        stride *= x.shape[axis]
    return jnp.sum(_mix(bits ^ _mix(place ^ jnp.uint32(salt))), dtype=jnp.uint32)


def _mix(x: Array) -> Array:
    """A bijection of 32-bit numbers in which every bit of the input moves about half of the output's."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
