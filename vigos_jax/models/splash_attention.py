"""Pallas splash attention for TPUs: causal sequences by their lower triangle alone, images, windows by the diagonal."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

from vigos_jax.models.attention_masks import Causal, Images, Windows
from vigos_jax.models.masked_attention import heads_first, tokens_first
from vigos_jax.models.shapes import AnyArray, Array, Float, Int

_BLOCK = 128  # sequence lengths are multiples of this


class _Diagonal(masks.Mask):
    """Square blocks along the diagonal are computed; segment ids mask within them."""

    def __init__(self, length: int, block: int):
        self._length, self._block = length, block

    @property
    def shape(self) -> tuple[int, int]:
        return self._length, self._length

    def __getitem__(self, idx: Any) -> np.ndarray:
        q, k = (np.arange(self._length)[part] // self._block for part in idx)
        return q[:, None] == k


def splash_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    mask: Causal | Images | Windows,
    *,
    interpret: bool = False,
) -> Float[Array, "B T N H"]:
    """Softmax attention, block by block.

    Args:
      interpret: runs the kernel anywhere, slowly, to check its numbers.
    """
    b, t, n, h = q.shape
    padded = lambda x: jnp.pad(x, [(0, 0), (0, -t % _BLOCK)] + [(0, 0)] * (x.ndim - 2))  # noqa: E731
    segments = padded(_segments(mask, t))  # [B, T]
    q, k, v = (padded(x) for x in (q * h**-0.5, k, v))
    length, kv_heads = q.shape[1], k.shape[2]
    size, pairs = _blocks(mask, length)
    blocks = kernel.BlockSizes(size, size, size, size, size, size, size, size)
    # A kernel per key/value head and its group of query heads.
    attend: Any = kernel.make_splash_mqa(
        masks.MultiHeadMask([pairs] * (n // kv_heads)), block_sizes=blocks, head_shards=1, q_seq_shards=1,
        interpret=interpret,
    )  # fmt: skip
    q = heads_first(q, kv_heads).reshape(b, kv_heads, -1, length, h)
    k, v = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)
    over_heads = jax.vmap(attend, (0, 0, 0, None))
    out: Any = jax.vmap(over_heads)(q, k, v, kernel.SegmentIds(segments, segments))  # [B, K, G, T, H]
    return tokens_first(out.reshape(b, kv_heads, -1, h), length)[:, :t]


def _segments(mask: Causal | Images | Windows, t: int) -> Int[AnyArray, "B {t}"]:
    """Segment ids: a query may attend to a key if theirs are equal and the kernel's own mask allows it."""
    if isinstance(mask, Causal):
        return (jnp.arange(t) < jnp.maximum(mask.lengths, 1)[:, None]).astype(jnp.int32)  # a bad row has none
    return jnp.asarray(mask.numbers() if isinstance(mask, Windows) else mask.ids)


def _blocks(mask: Causal | Images | Windows, length: int) -> tuple[int, masks.Mask]:
    """(side of the kernel's blocks, the mask that says which are computed)."""
    shape = (length, length)
    size = next(s for s in (512, 256, _BLOCK) if length % s == 0)
    if isinstance(mask, Causal):
        return size, masks.CausalMask(shape)
    if isinstance(mask, Images):
        return size, masks.FullMask(shape)
    # Blocks of whole windows, as small as they can be: what lies off a block's own windows is computed for nothing.
    sizes = [s for s in (128, 256, 512) if length % s == 0 and s % mask.window == 0]
    return (sizes[0], _Diagonal(length, sizes[0])) if sizes else (size, masks.FullMask(shape))
