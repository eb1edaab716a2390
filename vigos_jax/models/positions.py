"""Where things are: patches in attention windows, tokens on the M-RoPE grid. Host-side numpy, no parameters.

Qwen2.5-VL's tower attends inside square windows in most blocks. Here every window gets the same number of slots
(`VisionConfig.window_patches`), partly empty at an image's right and bottom edge, so that window attention is one
batched product over `[windows, slots]` and needs no index list on the device.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from vigos_jax.models.config import VisionConfig
from vigos_jax.models.shapes import Int

Grid = tuple[int, int, int]  # (time, height, width) in patches


@dataclasses.dataclass(frozen=True)
class VisionLayout:
    """How the patches of one row's images lie in window slots. S slots, M visual tokens.

    Attributes:
      source: int32 [S], index into the row's concatenated patches, -1 for an empty slot.
      image_ids: int32 [S], number of the slot's frame counted from 1 over all images, 0 for an empty slot.
      hw: int32 [S, 2], patch row and column inside its image.
      grid: int32 [S, 2], rows and columns of the patch's image; 0 for an empty slot.
      token_unit: int32 [M], for each visual token in reading order, the group of `merge_unit` slots it comes from.
    """

    source: Int[np.ndarray, "S"]
    image_ids: Int[np.ndarray, "S"]
    hw: Int[np.ndarray, "S 2"]
    grid: Int[np.ndarray, "S 2"]
    token_unit: Int[np.ndarray, "M"]


def visual_token_count(grid: Grid, merge_size: int) -> int:
    """Visual tokens of an image with this patch grid."""
    t, h, w = grid
    return t * (h // merge_size) * (w // merge_size)


def vision_layout(grids: Sequence[Grid], vision: VisionConfig) -> VisionLayout:
    """Lays out the patches of a row's images, which arrive grouped by visual token in reading order."""
    merge, side, unit = vision.spatial_merge_size, vision.window_side, vision.merge_unit
    source, image_ids, hw, grid, token_unit = [], [], [], [], []
    first_patch, first_unit, frame = 0, 0, 0
    for t, h, w in grids:
        rows, cols = h // merge, w // merge  # visual tokens
        windows_h, windows_w = -(-rows // side), -(-cols // side)
        row, col = np.meshgrid(np.arange(rows), np.arange(cols), indexing="ij")
        window = (row // side) * windows_w + col // side
        slot_unit = window * side**2 + (row % side) * side + col % side  # [rows, cols]
        patch_row = merge * row[..., None] + np.repeat(np.arange(merge), merge)  # [rows, cols, unit]
        patch_col = merge * col[..., None] + np.tile(np.arange(merge), merge)
        for _ in range(t):
            frame += 1
            slots = windows_h * windows_w * side**2 * unit
            s, ids = np.full(slots, -1), np.zeros(slots)
            pos, size = np.zeros((slots, 2)), np.zeros((slots, 2))
            index = (slot_unit[..., None] * unit + np.arange(unit)).reshape(-1)
            s[index] = first_patch + np.arange(rows * cols * unit)
            ids[index] = frame
            pos[index] = np.stack([patch_row.reshape(-1), patch_col.reshape(-1)], -1)
            size[index] = h, w
            source.append(s)
            image_ids.append(ids)
            hw.append(pos)
            grid.append(size)
            token_unit.append(first_unit + slot_unit.reshape(-1))
            first_patch += rows * cols * unit
            first_unit += slots // unit
    if not grids:
        return VisionLayout(*(np.zeros(s, np.int32) for s in (0, 0, (0, 2), (0, 2), 0)))
    return VisionLayout(*(np.concatenate(a).astype(np.int32) for a in (source, image_ids, hw, grid, token_unit)))


def mrope_positions(
    ids: Sequence[int],
    grids: Sequence[Grid],
    *,
    visual_ids: Sequence[int],
    merge_size: int,
    time_steps: Sequence[float] | None = None,
) -> Int[np.ndarray, "3 {len(ids)}"]:
    """M-RoPE positions of a token sequence: text counts up by one, an image spans a (time, height, width) box.

    Text after a box continues at its start plus its larger side. As in transformers, its length in time does not count:
    the positions of a long video may overlap those of the text after it.

    Args:
      ids: T token ids with image tokens expanded.
      grids: the patch grids of the images, in order.
      visual_ids: the tokens that stand for a piece of an image or of a video.
      time_steps: per grid, positions from one of its frames to the next; default 1.

    Returns:
      int32 [3, T].
    """
    is_visual = np.isin(np.asarray(ids, np.int64), visual_ids)
    out = np.zeros((3, len(ids)), np.int32)
    boxes = iter(zip(grids, [1.0] * len(grids) if time_steps is None else time_steps, strict=True))
    next_position, i = 0, 0
    while i < len(ids):
        if not is_visual[i]:
            stop = i
            while stop < len(ids) and not is_visual[stop]:
                stop += 1
            out[:, i:stop] = next_position + np.arange(stop - i)
            next_position += stop - i
            i = stop
            continue
        (t, h, w), time_step = next(boxes)
        box = np.indices((t, h // merge_size, w // merge_size)).reshape(3, -1)
        box[0] = np.floor(box[0] * time_step)
        out[:, i : i + box.shape[1]] = next_position + box
        next_position += max(h, w) // merge_size
        i += box.shape[1]
    return out
