"""Token sequences and images of single rows, and the padded host arrays of `models.inputs` that they become."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np

from vigos_jax.data.processor import EncodedImage
from vigos_jax.models.config import ModelConfig, VisionConfig
from vigos_jax.models.inputs import TextInputs, VisionInputs
from vigos_jax.models.positions import mrope_positions, vision_layout

T = TypeVar("T")


def host(struct: Callable[..., T], **arrays: Any) -> T:
    """A struct of device arrays with numpy arrays in their place, until it is put on the mesh."""
    return struct(**arrays)


class TokenSequence(NamedTuple):
    """One row of `TextInputs`, without its batch and its padding: [t], positions [3, t]."""

    ids: np.ndarray
    positions: np.ndarray
    segment_ids: np.ndarray
    image_index: np.ndarray


def padding(n: int) -> TokenSequence:
    """n padding tokens."""
    zeros = np.zeros(n, np.int32)
    return TokenSequence(zeros, np.zeros((3, n), np.int32), zeros, zeros - 1)


EMPTY = padding(0)


def token_sequence(
    images: Sequence[EncodedImage], prompt: Sequence[int], config: ModelConfig, completion: Sequence[int] = ()
) -> TokenSequence:
    """A prompt with these images, and its completion.

    Only image tokens of the prompt stand for images; a sampled image token is an ordinary token.
    """
    positions = mrope_positions(
        prompt,
        [i.grid for i in images],
        visual_ids=config.visual_ids,
        merge_size=config.vision.spatial_merge_size,
        time_steps=[i.time_step for i in images],
    )
    is_image = np.isin(np.asarray(prompt, np.int32), config.visual_ids)
    image_index = np.where(is_image, np.cumsum(is_image) - 1, -1)
    after, n = next_position(positions), len(completion)
    ids = np.asarray((*prompt, *completion), np.int32)
    positions = np.concatenate([positions, np.broadcast_to(after + np.arange(n), (3, n))], 1)
    image_index = np.concatenate([image_index, np.full(n, -1)])
    return TokenSequence(ids, positions, np.ones(len(ids), np.int32), image_index)


def next_position(positions: np.ndarray) -> int:
    """The next text position after a sequence with these positions that ends with text."""
    return int(positions[0, -1]) + 1 if positions.size else 0


def padded_text(sequences: Sequence[TokenSequence], length: int, *, branches: int | None = None) -> TextInputs:
    """Pads sequences to `length`. branches: see `TextInputs`."""
    b = len(sequences)
    ids, segments = np.zeros((b, length), np.int32), np.zeros((b, length), np.int32)
    positions, image_index = np.zeros((b, 3, length), np.int32), np.full((b, length), -1, np.int32)
    for i, row in enumerate(sequences):
        n = len(row.ids)
        ids[i, :n], positions[i, :, :n], segments[i, :n] = row.ids, row.positions, row.segment_ids
        image_index[i, :n] = row.image_index
    return host(
        TextInputs, ids=ids, positions=positions, segment_ids=segments, image_index=image_index, branches=branches
    )


def padded_vision(images: Sequence[Sequence[EncodedImage]], slots: int, config: VisionConfig) -> VisionInputs:
    """Each row's images, laid out in at least so many window slots."""
    layouts = [vision_layout([i.grid for i in row], config) for row in images]
    slots = -(-max(slots, 1) // config.window_patches) * config.window_patches  # whole windows
    b = len(images)
    patches = np.zeros((b, slots, config.patch_dim), np.float32)
    image_ids = np.zeros((b, slots), np.int32)
    hw, grid = np.zeros((b, slots, 2), np.int32), np.zeros((b, slots, 2), np.int32)
    token_unit = np.zeros((b, slots // config.merge_unit), np.int32)
    for i, (row, x) in enumerate(zip(images, layouts, strict=True)):
        if not row:
            continue
        n, used = len(x.source), x.source >= 0
        patches[i, :n][used] = np.concatenate([image.patches for image in row])[x.source[used]]
        image_ids[i, :n], hw[i, :n], grid[i, :n] = x.image_ids, x.hw, x.grid
        token_unit[i, : len(x.token_unit)] = x.token_unit
    return host(VisionInputs, patches=patches, image_ids=image_ids, hw=hw, grid=grid, token_unit=token_unit)
