"""Packed branches as causal sequences and windows as rows, for kernels that support only those.

`Attend` is (q, k, v, mask) -> [B, T, N, H], any kernel.
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from vigos_jax.models.attention_masks import Branches, Causal, Images, Windows
from vigos_jax.models.shapes import Array, Float, Int

Attend = Callable[..., Any]


def branch_by_branch(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    mask: Branches,
    attend: Attend,
) -> Float[Array, "B T N H"]:
    """Attention of packed rows, one branch at a time as the causal sequence [prefix | branch].

    A branch may fill the row, so each sequence has T slots, of which a kernel computes those in use. Without gaps the
    first branch already follows the prefix; every other branch is moved next to the prefix, and its outputs are moved
    back. This takes one kernel call per branch, plus one for the prefix if there are gaps, and at most one copy of q,
    k and v at a time.
    """
    ids = jnp.asarray(mask.segment_ids)
    prefix = jnp.sum(ids == 1, -1, keepdims=True)  # [B, 1]
    in_place = prefix if mask.has_gaps else prefix + jnp.sum(ids == 2, -1, keepdims=True)
    out = attend(q, k, v, Causal(in_place[:, 0]))
    slot = jnp.arange(ids.shape[1])
    for segment in range(2 if mask.has_gaps else 3, 2 + (mask.most or 0)):
        own = ids == segment
        length = jnp.sum(own, -1, keepdims=True)
        shift = jnp.where(length > 0, jnp.argmax(own, -1, keepdims=True) - prefix, 0)
        source = jnp.where(slot < prefix, slot, jnp.minimum(slot + shift, ids.shape[1] - 1))  # [B, T]
        moved = (_at(x, source) for x in (q, k, v))
        branch = attend(*moved, Causal((prefix + length)[:, 0]))
        out = jnp.where(own[:, :, None, None], _at(branch, jnp.maximum(slot - shift, 0)), out)
    return out


def _at(x: Float[Array, "B T N H"], slots: Int[Array, "B T"]) -> Float[Array, "B T N H"]:
    return jnp.take_along_axis(x, slots[:, :, None, None], axis=1)


def windows_as_rows(
    q: Float[Array, "B S N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    mask: Windows,
    attend: Attend,
) -> Float[Array, "B S N H"]:
    """Attention inside windows, each a row of its own."""
    split = lambda x: x.reshape(-1, mask.window, *x.shape[2:])  # noqa: E731
    rows = Images(split(jnp.asarray(mask.ids)), mask.most)
    return attend(*map(split, (q, k, v)), rows).reshape(q.shape)
