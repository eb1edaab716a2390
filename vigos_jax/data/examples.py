"""Rows of a source as Examples: their images and texts, read and checked. A row that cannot be used says why."""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from vigos_jax.data.cleaning import clean_problem, clean_reference
from vigos_jax.data.images import BadImage, image_size, read_image
from vigos_jax.data.processor import EncodedImage, Processor
from vigos_jax.data.sources import raw_row

MIN_FPS, MAX_FPS = 1e-3, 1e3  # of a video's frames


@dataclasses.dataclass(frozen=True, eq=False)
class Example:
    """One row, ready for the model; a bad one has no images and empty texts."""

    id: str
    images: tuple[EncodedImage, ...] = ()
    problem: str = ""  # cleaned
    reference: str = ""  # cleaned reference answer
    fields: Mapping[str, str] = dataclasses.field(default_factory=dict)  # texts of further columns
    bad_reason: str | None = None  # None, or a short kind such as "image_unreadable"


class _BadRow(Exception):
    """The row cannot be used."""

    def __init__(self, kind: str):
        super().__init__(kind)
        self.kind = kind


@dataclasses.dataclass(frozen=True, eq=False)
class Encoder:
    """Reads a source's rows; picklable if `too_long` is.

    Attributes:
      max_images: more images and videos than this make a row bad.
      fields: further columns of texts that prompts show; a row without one of them is bad.
      image_roots: folders that images may lie in, beside the source's own; see `read_image`.
      too_long: names the kind of an example that does not fit, None if it fits.
    """

    processor: Processor
    max_images: int
    fields: tuple[str, ...] = ()
    image_roots: tuple[str, ...] = ()
    too_long: Callable[[Example], str | None] | None = None

    def __call__(self, source: Any, index: int) -> Example:
        """Row `index` of a source.

        Images in a row are bytes, `{bytes, path}`, paths or PIL images, one or a list; a video among them is
        `{frames: images, fps: frames per second}`.
        """
        row = source[index]
        own = raw_row(row, index)
        roots = (*getattr(source, "image_roots", ()), *self.image_roots)
        try:
            if row.get("bad_reason"):
                raise _BadRow(row["bad_reason"])
            problem, reference = _texts(own["problem"], own["answer"])
            encoded = [_encode(item, self.processor, roots) for item in _items(own["images"], self.max_images)]
            images = tuple(image for images in encoded for image in images)
            fields = {name: _field(row, name) for name in self.fields}
            example = Example(own["id"], images, problem, reference, fields)
            if self.too_long is not None and (kind := self.too_long(example)):
                raise _BadRow(kind)
        except (_BadRow, BadImage) as e:
            return Example(own["id"], bad_reason=e.kind)
        return example


def _field(row: Mapping[str, Any], name: str) -> str:
    """The text of a further column, as it is."""
    value = row.get(name)
    if not isinstance(value, str) or not value.strip():
        raise _BadRow(f"no_{name}")
    if not is_unicode(value):
        raise _BadRow("text_not_unicode")
    return value


def _texts(problem: object, answer: object) -> tuple[str, str]:
    """Cleaned (problem, reference)."""
    if problem is not None and not isinstance(problem, str):
        raise _BadRow("bad_problem_type")
    if answer is not None and not isinstance(answer, str | int | float):
        raise _BadRow("bad_answer_type")
    problem, reference = clean_problem(problem), clean_reference(answer)
    if not problem:
        raise _BadRow("empty_problem")
    if not reference:
        raise _BadRow("empty_answer")
    if not is_unicode(problem + reference):
        raise _BadRow("text_not_unicode")
    return problem, reference


def is_unicode(text: str) -> bool:
    """False for half a surrogate pair, which JSON can hold and no tokenizer takes."""
    return re.search("[\ud800-\udfff]", text) is None


def _items(images: object, max_images: int) -> list[object]:
    items = list(images) if isinstance(images, list | tuple | np.ndarray) else [images]
    items = [item for item in items if item is not None]
    if not items:
        raise _BadRow("no_image")
    if len(items) > max_images:
        raise _BadRow("too_many_images")
    return items


def _encode(item: object, processor: Processor, image_roots: Sequence[str]) -> tuple[EncodedImage, ...]:
    """An image's patches, or those of a video's frames."""

    def read(item: object) -> Image.Image:
        image = read_image(item, image_roots=image_roots)
        if min(image.size) < processor.merge_unit:  # the image processor would blow it up; too little to train on
            raise BadImage("image_too_small", f"{image.width} x {image.height} pixels")
        return image

    if not isinstance(item, Mapping) or not _is_video(item):
        return (processor.encode_image(read(item)),)
    frames, fps = _frames(item), item.get("fps")
    if isinstance(fps, bool) or not isinstance(fps, int | float) or not MIN_FPS <= fps <= MAX_FPS:
        raise BadImage("bad_video", f"fps {fps!r} must be the frames per second, {MIN_FPS:g} to {MAX_FPS:g}")
    return processor.encode_video([read(frame) for frame in frames], fps=fps)


def _is_video(item: object) -> bool:
    return isinstance(item, Mapping) and item.get("frames") is not None


def _frames(video: Mapping[str, Any]) -> Sequence[object]:
    frames = video["frames"]
    if not isinstance(frames, list | tuple | np.ndarray) or not len(frames):
        raise BadImage("bad_video", "its frames must be a list of images")
    return list(frames)


def row_size(row: Mapping[str, Any], *, processor: Processor, image_roots: Sequence[str]) -> int:
    """About how many prompt tokens a raw row will have, from its images' headers and the length of its question."""
    images = row.get("images")
    items = list(images) if isinstance(images, list | tuple | np.ndarray) else [images]
    tokens = 0
    for item in items:
        try:
            frames = _frames(item) if _is_video(item) else [item]
            blocks = -(-len(frames) // processor.frames_per_patch) if _is_video(item) else 1
            tokens += blocks * processor.visual_tokens(*image_size(frames[0], image_roots=image_roots))
        except BadImage:  # a bad row, wherever it stands
            continue
    problem = row.get("problem")
    return tokens + len(problem) // 4 if isinstance(problem, str) else tokens
