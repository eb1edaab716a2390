"""Splits a batch into groups of rows that are computed one after the other, to bound the memory.

A group has the same number of neighbouring rows of every shard, so that each device works on rows that it holds.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from vigos_jax.models.config import ModelConfig
from vigos_jax.models.layers import ROWS, place
from vigos_jax.models.shapes import Array, Int

_SHARE = 1 / 16  # of a device's memory, for what encoding or prefilling a group holds for a while


def shards_of(mesh: Mesh | None) -> int:
    """In how many parts the mesh splits rows."""
    return 1 if mesh is None else mesh.shape["data"] * mesh.shape["fsdp"]


def group_count(rows: int, most: int, *, mesh: Mesh | None) -> int:
    """The fewest groups of equal size with at most `most` rows, or one row of each shard; 0 for no limit."""
    each = rows // shards_of(mesh)
    if not most:
        return 1
    return next(n for n in range(1, each + 1) if each % n == 0 and (rows // n <= most or n == each))


def rows_for_memory(config: ModelConfig, *, prompt: int, patches: int, memory: float, itemsize: int) -> int:
    """Rows of one shard whose encoding or prefill holds at most a sixteenth of a device's memory, at least one.

    Args:
      prompt: tokens of a row; patches: its window slots.
      memory: bytes of a device.
      itemsize: bytes of a number of the computation.
    """
    c, v = config, config.vision
    states = 4 * c.hidden_size + 2 * c.intermediate_size + 2 * (c.num_heads + 2 * c.num_kv_heads) * c.head_dim
    kept = 2 * c.num_layers * c.num_kv_heads * c.head_dim
    prefill = itemsize * prompt * (states + kept) + 4 * c.vocab_size
    encode = itemsize * patches * (v.patch_dim + 8 * v.hidden_size + 2 * v.intermediate_size)
    return max(1, int(memory * _SHARE / max(prefill, encode, 1)))


def take_rows(tree: Any, group: Int[Array, ""], *, groups: int, mesh: Mesh | None) -> Any:
    """The rows of one group, of every array of a tree."""
    shards = shards_of(mesh)

    def take(x):
        rows = x.shape[0] // groups
        x = x.reshape(shards, groups, rows // shards, *x.shape[1:])
        return place(jax.lax.dynamic_index_in_dim(x, group, 1, keepdims=False).reshape(rows, *x.shape[3:]), mesh, ROWS)

    return jax.tree.map(take, tree)


def put_rows(whole: Any, part: Any, group: Int[Array, ""], *, groups: int, mesh: Mesh | None) -> Any:
    """`whole` with `part` as the rows of a group; numbers without rows are the part's."""
    shards = shards_of(mesh)

    def put(x, new):
        if not new.ndim:
            return new
        rows = new.shape[0] // shards
        split = x.reshape(shards, groups, rows, *x.shape[1:])
        new = new.reshape(shards, 1, rows, *new.shape[1:])
        return place(jax.lax.dynamic_update_slice_in_dim(split, new, group, 1).reshape(x.shape), mesh, ROWS)

    return jax.tree.map(put, whole, part)


def room_for(part: Any, *, groups: int, mesh: Mesh | None) -> Any:
    """Arrays for `groups` times the rows of `part`, zeros."""

    def make(x):
        if not x.ndim:
            return x
        filled = jnp.broadcast_to(x[:1], (groups * x.shape[0], *x.shape[1:]))  # keys have no zeros
        return place(filled if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else jnp.zeros_like(filled), mesh, ROWS)

    return jax.tree.map(make, part)
