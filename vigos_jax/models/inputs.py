"""The arrays a model reads. B batch, S patch slots, M visual tokens, T tokens."""

import flax.struct
import jax

Array = jax.Array


@flax.struct.dataclass
class VisionInputs:
    """The images of each row, laid out in window slots (see `geometry.VisionLayout`).

    Attributes:
      patches: float [B, S, patch_dim], zeros in empty slots.
      image_ids: int32 [B, S], frame number from 1, 0 in empty slots.
      hw: int32 [B, S, 2], patch row and column.
      grid: int32 [B, S, 2], rows and columns of the patch's image.
      token_unit: int32 [B, M], the slot group of each visual token in reading order (0 past the row's last).
    """

    patches: Array
    image_ids: Array
    hw: Array
    grid: Array
    token_unit: Array


@flax.struct.dataclass
class TextInputs:
    """Token sequences, one per row; several branches may share one row behind a common prefix.

    Attributes:
      ids: int32 [B, T].
      positions: int32 [B, 3, T], M-RoPE positions.
      segment_ids: int32 [B, T]; 0 padding, 1 the shared prefix (or the whole sequence), 2.. the branches behind it.
      image_index: int32 [B, T], which visual token of the row stands here, -1 for text.
    """

    ids: Array
    positions: Array
    segment_ids: Array
    image_index: Array
