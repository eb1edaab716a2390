"""The arrays a model reads. B batch, S patch slots, M visual tokens, T tokens."""

import flax.struct

from vigos_jax.models.shapes import Array, Float, Int


class VisionInputs(flax.struct.PyTreeNode):
    """The images of each row, laid out in window slots (see `positions.VisionLayout`).

    Attributes:
      patches: float [B, S, patch_dim], zeros in empty slots.
      image_ids: int32 [B, S], frame number from 1, 0 in empty slots.
      hw: int32 [B, S, 2], patch row and column.
      grid: int32 [B, S, 2], rows and columns of the patch's image.
      token_unit: int32 [B, M], the slot group of each visual token in reading order (0 past the row's last).
    """

    patches: Float[Array, "B S patch_dim"]
    image_ids: Int[Array, "B S"]
    hw: Int[Array, "B S 2"]
    grid: Int[Array, "B S 2"]
    token_unit: Int[Array, "B M"]


class TextInputs(flax.struct.PyTreeNode):
    """Token sequences, one per row; several branches may share one row after a common prefix.

    Attributes:
      ids: int32 [B, T].
      positions: int32 [B, 3, T], M-RoPE positions.
      segment_ids: int32 [B, T]; 0 padding, 1 the shared prefix (or the whole sequence), 2.. the branches after it.
      image_index: int32 [B, T], which visual token of the row stands here, -1 for text.
      branches: the most in a row, for rows laid out as prefix, branches, padding; fused attention kernels need it.
        None: unknown layout, XLA attends under any segment_ids.
    """

    ids: Int[Array, "B T"]
    positions: Int[Array, "B 3 T"]
    segment_ids: Int[Array, "B T"]
    image_index: Int[Array, "B T"]
    branches: int | None = flax.struct.field(pytree_node=False, default=None)
