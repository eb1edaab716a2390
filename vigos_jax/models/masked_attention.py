"""XLA attention under any mask, forward and backward in parts, so that only one part's logits are in memory."""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from vigos_jax.models.attention_masks import Described, visible
from vigos_jax.models.shapes import Array, Bool, Float, Int

_MASKED = -1e30
# Memory limit of one part on a device, in bytes: logits, attention weights, their gradients and the mask.
PART_BYTES = 512 * 2**20


class Parts(NamedTuple):
    """How attention is split into parts.

    Attributes:
      shards: number of devices that the rows are split over; every part has rows of all of them.
      rows: number of parts that the rows of a device are split into.
      queries: number of parts that the queries of such a part are split into.
    """

    shards: int
    rows: int
    queries: int


def parts_of(b: int, t: int, s: int, n: int, *, itemsize: int, mesh: Mesh | None) -> Parts:
    """As few parts as keep each below `PART_BYTES`: rows first, as then keys and values are read once.

    Args:
      b, t, s, n: rows, queries, keys, query heads.
      itemsize: bytes of a number in the products.
    """
    shards, tensor = (mesh.shape["data"] * mesh.shape["fsdp"], mesh.shape["tensor"]) if mesh is not None else (1, 1)
    shards = math.gcd(shards, b)
    heads = n // math.gcd(n, tensor)
    # Logits and their gradient in float32, both again in the products' dtype; a boolean for all heads.
    row = t * s * (heads * (8 + 2 * itemsize) + 1)
    most = max(1, PART_BYTES // max(row, 1))
    here = b // shards
    size = next(n for n in range(min(most, here), 0, -1) if here % n == 0)
    return Parts(shards, here // size, min(t, math.ceil(size * row / PART_BYTES)))


def masked_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    mask: Described | Bool[Array, "B T S"],
    *,
    mesh: Mesh | None = None,
) -> Float[Array, "B T N H"]:
    """Softmax attention; see `attention.attention`."""
    b, t, n, _ = q.shape
    return _masked(parts_of(b, t, k.shape[1], n, itemsize=q.dtype.itemsize, mesh=mesh), q, k, v, mask)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _masked(parts, q, k, v, mask):
    """The backward pass computes the weights anew: none are kept, on any platform."""
    return _masked_forward(parts, q, k, v, mask)[0]


def _masked_forward(parts, q, k, v, mask):
    def rows(q, k, v, mask):  # of one part
        t, slots = q.shape[1], k.shape[1]
        k, v = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)

        def queries(at, q):
            return _part_forward(q, k, v, visible(mask, at, slots))

        if parts.queries == 1:
            return queries(jnp.arange(t), q)
        out = jax.lax.map(lambda x: queries(*x), (_numbers(parts, t), _split_queries(parts, q)))
        return jax.tree.map(lambda x: _join_queries(x, t), out)

    out, log_total = _over_rows(rows, parts, (q, k, v, mask))
    return out, (q, k, v, mask, out, log_total)


def _masked_backward(parts, residuals, d_out):
    def rows(q, k, v, mask, out, log_total, d_out):  # of one part
        t, slots = q.shape[1], k.shape[1]
        shape, dtype = k.shape, k.dtype
        k, v = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)

        def queries(at, q, out, log_total, d_out):
            return _part_backward(q, out, log_total, d_out, k, v, visible(mask, at, slots))

        def add(total, x):
            d_q, *d_kv = queries(*x)
            return jax.tree.map(jnp.add, total, tuple(d_kv)), d_q

        if parts.queries == 1:
            d_q, *d_kv = queries(jnp.arange(t), q, out, log_total, d_out)
        else:
            zeros = jnp.zeros((shape[0], shape[2], shape[1], shape[3]), jnp.float32)
            split = (_split_queries(parts, x) for x in (q, out, log_total, d_out))
            d_kv, d_q = jax.lax.scan(add, (zeros, zeros), (_numbers(parts, t), *split))
            d_q = _join_queries(d_q, t)
        return d_q, *(x.astype(dtype).transpose(0, 2, 1, 3) for x in d_kv)

    return *_over_rows(rows, parts, (*residuals, d_out)), None


_masked.defvjp(_masked_forward, _masked_backward)


# Parts.


def _over_rows(function: Any, parts: Parts, arrays: tuple) -> Any:
    """function(*arrays), whose first axes are rows, part by part."""
    if parts.rows == 1:
        return function(*arrays)

    def split(x):  # [B, ...] -> [parts, rows of a part from every device, ...]
        x = x.reshape(parts.shards, parts.rows, -1, *x.shape[1:]).swapaxes(0, 1)
        return x.reshape(parts.rows, -1, *x.shape[3:])

    def join(x):
        x = x.reshape(parts.rows, parts.shards, -1, *x.shape[2:]).swapaxes(0, 1)
        return x.reshape(-1, *x.shape[3:])

    return jax.tree.map(join, jax.lax.map(lambda x: function(*x), jax.tree.map(split, arrays)))


def _numbers(parts: Parts, t: int) -> Int[Array, "{parts.queries} {-(-t//parts.queries)}"]:
    """The queries' numbers; the last part may go beyond t."""
    return jnp.arange(parts.queries * -(-t // parts.queries)).reshape(parts.queries, -1)


def _split_queries(parts: Parts, x: Float[Array, "B T *rest"]) -> Float[Array, "parts B t *rest"]:
    t = x.shape[1]
    size = -(-t // parts.queries)
    x = jnp.pad(x, [(0, 0), (0, parts.queries * size - t)] + [(0, 0)] * (x.ndim - 2))
    return jnp.moveaxis(x.reshape(x.shape[0], parts.queries, size, *x.shape[2:]), 1, 0)


def _join_queries(x: Float[Array, "parts B t *rest"], t: int) -> Float[Array, "B {t} *rest"]:
    return jnp.moveaxis(x, 0, 1).reshape(x.shape[1], -1, *x.shape[3:])[:, :t]


# One part.


def heads_first(x: Float[Array, "B T N H"], kv_heads: int) -> Float[Array, "B {kv_heads} N*T//{kv_heads} H"]:
    """The N / K query heads of a key/value head one after the other: rows of one product."""
    b, t, n, h = x.shape
    return x.reshape(b, t, kv_heads, n // kv_heads, h).transpose(0, 2, 3, 1, 4).reshape(b, kv_heads, -1, h)


def tokens_first(x: Float[Array, "B K GT H"], t: int) -> Float[Array, "B {t} K*GT//{t} H"]:
    """Undoes `heads_first`."""
    b, k, gt, h = x.shape
    return x.reshape(b, k, gt // t, t, h).transpose(0, 3, 1, 2, 4).reshape(b, t, -1, h)


def _logits(
    q: Float[Array, "B K GT H"], k: Float[Array, "B K S H"], mask: Bool[Array, "B T S"]
) -> Float[Array, "B K GT S"]:
    """Masked, in float32."""
    logits = jnp.einsum("bkth,bksh->bkts", q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
    b, t, s = mask.shape
    split = logits.reshape(b, k.shape[1], -1, t, s)
    return jnp.where(mask[:, None, None], split, _MASKED).reshape(logits.shape)


def _part_forward(
    q: Float[Array, "B T N H"], k: Float[Array, "B K S H"], v: Float[Array, "B K S H"], mask: Bool[Array, "B T S"]
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N 1"]]:
    """(output, log of the sum of exponentials in float32)."""
    t = q.shape[1]
    logits = _logits(heads_first(q, k.shape[1]), k, mask)
    largest = jnp.max(logits, -1, keepdims=True)
    weights = jnp.exp(logits - largest)
    total = jnp.sum(weights, -1, keepdims=True)
    out = jnp.einsum("bkts,bksh->bkth", weights.astype(v.dtype), v, preferred_element_type=jnp.float32) / total
    return tokens_first(out.astype(v.dtype), t), tokens_first(largest + jnp.log(total), t)


def _part_backward(
    q: Float[Array, "B T N H"],
    out: Float[Array, "B T N H"],
    log_total: Float[Array, "B T N 1"],
    d_out: Float[Array, "B T N H"],
    k: Float[Array, "B K S H"],
    v: Float[Array, "B K S H"],
    mask: Bool[Array, "B T S"],
) -> tuple[Float[Array, "B T N H"], Float[Array, "B K S H"], Float[Array, "B K S H"]]:
    """Gradients of q in its dtype, of k and v in float32."""
    t, dtype = q.shape[1], q.dtype
    q, out, log_total, d_out = (heads_first(x, k.shape[1]) for x in (q, out, log_total, d_out))
    weights = jnp.exp(_logits(q, k, mask) - log_total)  # [B, K, G*T, S]
    d_v = jnp.einsum("bkts,bkth->bksh", weights.astype(dtype), d_out, preferred_element_type=jnp.float32)
    d_weights = jnp.einsum("bkth,bksh->bkts", d_out, v, preferred_element_type=jnp.float32)
    mean = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), -1, keepdims=True)
    d_logits = (weights * (d_weights - mean) * q.shape[-1] ** -0.5).astype(dtype)
    d_q = jnp.einsum("bkts,bksh->bkth", d_logits, k)
    d_k = jnp.einsum("bkts,bkth->bksh", d_logits, q, preferred_element_type=jnp.float32)
    return tokens_first(d_q, t), d_k, d_v
