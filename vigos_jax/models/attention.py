"""Attention, and the one place where its implementation is chosen: XLA everywhere, cuDNN on GPUs, splash on TPUs.

cuDNN and splash serve the student, whose rows are plain causal sequences (`Causal`). What a mask describes (packed
teachers, left-padded prompts, a cache, images) is XLA's on every platform: attention is a few percent of it.
"""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from vigos_jax.errors import InputError
from vigos_jax.models.shapes import Array, Bool, Float, Int

_MASKED = -1e30
_MAX_QUERIES = 2048  # logits of more at a time would be gigabytes
_SPLASH_BLOCK = 128  # sequence lengths it takes are multiples of this


class Causal(flax.struct.PyTreeNode):
    """Each row is one sequence, then padding: a query attends to itself and what comes before it.

    Attributes:
      lengths: int32 [B], tokens of each row. What stands at the padding afterwards is finite, and means nothing.
    """

    lengths: Int[Array, "B"]


def choose(asked: str, *, platform: str, dtype: Any) -> str:
    """The implementation for what `config.model.attention` asks; "auto" is the device's fast one, where it has one.

    Args:
      platform: "cpu", "gpu" or "tpu".
      dtype: of computation; the fast kernels multiply in 16 bits.

    Raises:
      InputError: what is asked for does not run there.
    """
    fast = {"gpu": "cudnn", "tpu": "splash"}.get(platform) if jnp.dtype(dtype) != jnp.float32 else None
    if asked == "auto":
        return fast or "xla"
    if asked not in ("xla", fast):
        choices = ", ".join(("auto", "xla", fast) if fast else ("auto", "xla"))
        raise InputError(
            f"config.model.attention={asked!r} does not run on {platform} in {jnp.dtype(dtype)}; choices: {choices}"
        )
    return asked


def attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    mask: Bool[Array, "B T S"] | Causal,
    *,
    implementation: str = "xla",
    mesh: Mesh | None = None,
) -> Float[Array, "B T N H"]:
    """Softmax attention with grouped key/value heads.

    Args:
      q, k, v: N is a multiple of K.
      mask: true where query t attends to key s, or `Causal`. A query that attends to nothing gives a finite result.
      implementation: "xla", "cudnn" or "splash", for `Causal`; a mask is XLA's.
      mesh: over which splash splits rows and heads; None for one device.

    Returns:
      In q's dtype; logits and softmax are float32.
    """
    t = q.shape[1]
    if isinstance(mask, Causal):
        if implementation == "cudnn":
            lengths = jnp.maximum(mask.lengths, 1)  # a bad row has none
            return jax.nn.dot_product_attention(
                q, k, v, is_causal=True, query_seq_lengths=lengths, key_value_seq_lengths=lengths,
                implementation="cudnn",
            )  # fmt: skip
        if implementation == "splash" and t % _SPLASH_BLOCK == 0:
            return splash(q, k, v, mask.lengths, mesh=mesh)
        at = jnp.arange(t)
        mask = (at[:, None] >= at) & (at < jnp.maximum(mask.lengths, 1)[:, None, None])
    if t <= _MAX_QUERIES:
        return _masked(q, k, v, mask)
    parts = -(-t // _MAX_QUERIES)
    size = -(-t // parts)

    def split(x):  # [B, T, ...] -> [parts, B, size, ...]
        x = jnp.pad(x, [(0, 0), (0, parts * size - t)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(x.shape[0], parts, size, *x.shape[2:]), 1, 0)

    out = jax.lax.map(lambda x: _masked(x[0], k, v, x[1]), (split(q), split(mask)))
    return jnp.moveaxis(out, 0, 1).reshape(q.shape[0], parts * size, *q.shape[2:])[:, :t]


@jax.custom_vjp
def _masked(q, k, v, mask):
    """`attention` under a mask. The backward pass computes the [T, S] weights anew: none are kept, on any platform."""
    return _masked_forward(q, k, v, mask)[0]


def _heads_first(
    q: Float[Array, "B T N H"], kv_heads: int
) -> Float[Array, "B {kv_heads} N*T//{kv_heads} H"]:  # G = N / K query heads beside each other
    b, t, n, h = q.shape
    return q.reshape(b, t, kv_heads, n // kv_heads, h).transpose(0, 2, 3, 1, 4).reshape(b, kv_heads, -1, h)


def _tokens_first(x: Float[Array, "B K GT H"], t: int) -> Float[Array, "B {t} K*GT//{t} H"]:  # and back
    b, k, gt, h = x.shape
    return x.reshape(b, k, gt // t, t, h).transpose(0, 3, 1, 2, 4).reshape(b, t, -1, h)


def _weighted(
    q: Float[Array, "B K GT H"], k: Float[Array, "B K S H"], mask: Bool[Array, "B T S"]
) -> Float[Array, "B K GT S"]:
    """Masked logits in float32. One product per key/value head: its query heads are rows of it."""
    logits = jnp.einsum("bkth,bksh->bkts", q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
    b, t, s = mask.shape
    split = logits.reshape(b, k.shape[1], -1, t, s)
    return jnp.where(mask[:, None, None], split, _MASKED).reshape(logits.shape)


def _masked_forward(q, k, v, mask):
    t = q.shape[1]
    q, k, v = _heads_first(q, k.shape[2]), k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)
    logits = _weighted(q, k, mask)
    largest = jnp.max(logits, -1, keepdims=True)
    weights = jnp.exp(logits - largest)
    total = jnp.sum(weights, -1, keepdims=True)
    out = jnp.einsum("bkts,bksh->bkth", weights.astype(v.dtype), v, preferred_element_type=jnp.float32) / total
    out = out.astype(v.dtype)
    return _tokens_first(out, t), (q, k, v, mask, out, largest + jnp.log(total))


def _masked_backward(residuals, d_out):
    q, k, v, mask, out, log_total = residuals
    t, dtype = d_out.shape[1], q.dtype
    d_out = _heads_first(d_out, k.shape[1])
    weights = jnp.exp(_weighted(q, k, mask) - log_total)  # [B, K, G*T, S]
    d_v = jnp.einsum("bkts,bkth->bksh", weights.astype(dtype), d_out)
    d_weights = jnp.einsum("bkth,bksh->bkts", d_out, v, preferred_element_type=jnp.float32)
    mean = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), -1, keepdims=True)
    d_logits = (weights * (d_weights - mean) * q.shape[-1] ** -0.5).astype(dtype)
    d_q = jnp.einsum("bkts,bksh->bkth", d_logits, k)
    d_k = jnp.einsum("bkts,bkth->bksh", d_logits, q)
    return _tokens_first(d_q, t), d_k.transpose(0, 2, 1, 3), d_v.transpose(0, 2, 1, 3), None


_masked.defvjp(_masked_forward, _masked_backward)


def splash(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    lengths: Int[Array, "B"],
    *,
    mesh: Mesh | None = None,
    interpret: bool = False,
) -> Float[Array, "B T N H"]:
    """Pallas splash attention for TPUs: the lower triangle alone, block by block, T a multiple of 128.

    Args:
      interpret: runs the kernel anywhere, slowly, to check its numbers.
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    t, n, h = q.shape[1:]
    tensor = mesh.shape["tensor"] if mesh is not None else 1
    if k.shape[2] % tensor:  # every part needs a head of its own
        k, v = (jnp.repeat(x, n // x.shape[2], axis=2) for x in (k, v))

    def local(q, k, v, lengths):
        # A kernel per key/value head and its group of query heads.
        b, kv_heads = q.shape[0], k.shape[2]
        causal = masks.MultiHeadMask([masks.CausalMask((t, t))] * (q.shape[2] // kv_heads))
        size = next(s for s in (512, 256, _SPLASH_BLOCK) if t % s == 0)
        blocks = kernel.BlockSizes(size, size, size, size, size, size, size, size)
        attend: Any = kernel.make_splash_mqa(
            causal, block_sizes=blocks, head_shards=1, q_seq_shards=1, interpret=interpret
        )
        segments = (jnp.arange(t) < lengths[:, None]).astype(jnp.int32)  # [B, T]
        q = _heads_first(q * h**-0.5, kv_heads).reshape(b, kv_heads, -1, t, h)
        k, v = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)
        over_heads = jax.vmap(attend, (0, 0, 0, None))
        out: Any = jax.vmap(over_heads)(q, k, v, kernel.SegmentIds(segments, segments))  # [B, K, G, T, H]
        return _tokens_first(out.reshape(b, kv_heads, -1, h), t)

    if mesh is None:
        return local(q, k, v, lengths)
    rows, heads = P(("data", "fsdp")), P(("data", "fsdp"), None, "tensor")
    # The kernel's own arrays carry no sharding, which the check would refuse.
    return jax.shard_map(local, mesh=mesh, in_specs=(heads, heads, heads, rows), out_specs=heads, check_vma=False)(
        q, k, v, lengths
    )
