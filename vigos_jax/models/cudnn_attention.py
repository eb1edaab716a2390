"""cuDNN's fused attention, for NVIDIA cards from Ampere on, in 16 bits: causal sequences, and images side by side."""

from typing import Literal

import jax
import jax.numpy as jnp

from vigos_jax.models.attention_masks import Causal, Images
from vigos_jax.models.shapes import Array, Float, Int

# Supported on every card; head sizes are multiples of 8. cuDNN documents 256 for all passes on Hopper only; jax allows
# it from Hopper on, judged by the process's own card. XLA compiles it for any card without asking cuDNN: not tried.
MAX_HEAD_DIM = 128
# Subtracted from an unscaled logit for each bit in which two image ids differ: exact in 16 bits, and larger than the
# difference between any two logits of one query.
_APART = 2.0**15


def cudnn_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    mask: Causal | Images,
    *,
    implementation: Literal["cudnn", "xla"] = "cudnn",
) -> Float[Array, "B T N H"]:
    """Softmax attention without a [T, T] array in memory.

    cuDNN supports lengths but not segments. Images are separated by extra features of queries and keys, two per bit of
    an image id: their dot product is 0 for equal ids, large and negative for different ones.

    Args:
      implementation: of `jax.nn.dot_product_attention`; "xla" computes the same function on any device.
    """
    h = q.shape[-1]
    if isinstance(mask, Images):
        bits = _bits(mask)
        numbers = (jnp.asarray(mask.ids)[:, :, None] >> jnp.arange(bits)) & 1  # [B, T, bits]
        of_q, of_k = jnp.concatenate([numbers, 1 - numbers], -1), jnp.concatenate([numbers - 1, -numbers], -1) * _APART
        q, k, v = _widen(q, of_q), _widen(k, of_k), _widen(v, jnp.zeros_like(of_q))
        out = jax.nn.dot_product_attention(q, k, v, scale=h**-0.5, implementation=implementation)
        return out[..., :h]
    lengths = jnp.maximum(mask.lengths, 1).astype(jnp.int32)  # a bad row has none
    # What a kernel leaves at padding, forward and backward, is not specified: here it is zero.
    real = (jnp.arange(q.shape[1]) < lengths[:, None])[:, :, None, None]
    q, k, v = (jnp.where(real, x, 0) for x in (q, k, v))
    out = jax.nn.dot_product_attention(
        q, k, v, scale=h**-0.5, is_causal=True, query_seq_lengths=lengths, key_value_seq_lengths=lengths,
        implementation=implementation,
    )  # fmt: skip
    return jnp.where(real, out, 0)


def width(head_dim: int, mask: object) -> int:
    """Width of the heads that cuDNN is given for heads of `head_dim`."""
    features = 2 * _bits(mask) if isinstance(mask, Images) else 0
    return head_dim if not features else -(-(head_dim + features) // 8) * 8


def _bits(mask: Images) -> int:
    return mask.most.bit_length()


def _widen(
    x: Float[Array, "B T N H"], features: Int[Array, "B T f"] | Float[Array, "B T f"]
) -> Float[Array, "B T N W"]:
    b, t, n, h = x.shape
    rest = -(h + features.shape[-1]) % 8
    features = jnp.pad(features.astype(x.dtype), ((0, 0), (0, 0), (0, rest)))[:, :, None]
    return jnp.concatenate([x, jnp.broadcast_to(features, (b, t, n, features.shape[-1]))], -1)
