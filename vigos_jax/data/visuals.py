"""Images and videos of a row: decoded, and made as large as the row has room for."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeGuard

import numpy as np
from PIL import Image

from vigos_jax.data.images import BadImage, read_image
from vigos_jax.data.processor import EncodedImage, PixelLimits, Processor
from vigos_jax.grading.options import parse_literal

MIN_FPS, MAX_FPS = 1e-3, 1e3  # of a video's frames


class TooLong(Exception):
    """A row does not fit, however small its images are made.

    Attributes:
      kind: which bucket it does not fit, like "prompt_too_long".
    """

    def __init__(self, kind: str, detail: str):
        super().__init__(detail)
        self.kind = kind


@dataclasses.dataclass(frozen=True)
class Visual:
    """An image, or a video's frames: decoded, not resized. `fps` is None for an image."""

    frames: tuple[Image.Image, ...]
    fps: float | None = None

    @classmethod
    def read(cls, item: object, *, image_roots: Sequence[str], least_side: int = 1) -> "Visual":
        """One item of a row, as `read_image` takes it, or a video, `{frames: images, fps: frames per second}`.

        Args:
          least_side: pixels; a smaller image would only be blown up.

        Raises:
          BadImage: it cannot be used.
        """

        def read(item: object) -> Image.Image:
            image = read_image(item, image_roots=image_roots)
            if min(image.size) < least_side:
                raise BadImage("image_too_small", f"{image.width} x {image.height} pixels")
            return image

        if not isinstance(item, Mapping) or not is_video(item):
            return cls((read(item),))
        frames, fps = frames_of(item), item.get("fps")
        if isinstance(fps, bool) or not isinstance(fps, int | float) or not MIN_FPS <= fps <= MAX_FPS:
            raise BadImage("bad_video", f"fps {fps!r} must be the frames per second, {MIN_FPS:g} to {MAX_FPS:g}")
        return cls(tuple(read(frame) for frame in frames), fps)

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """(width, height) of the frames."""
        return [frame.size for frame in self.frames]

    def layout(self, processor: Processor, pixels: PixelLimits) -> tuple[EncodedImage, ...]:
        """What `encode` gives, without patches."""
        if self.fps is None:
            return (processor.image_layout(*self.sizes[0], pixels),)
        return processor.video_layout(self.sizes, fps=self.fps, wanted=pixels)

    def encode(self, processor: Processor, pixels: PixelLimits) -> tuple[EncodedImage, ...]:
        """An image's patches, or those of a video's frames."""
        if self.fps is None:
            return (processor.encode_image(self.frames[0], pixels),)
        return processor.encode_video(self.frames, fps=self.fps, wanted=pixels)


def images_of_row(row: Mapping[str, Any]) -> list[object]:
    """A source's row's images, undecoded; a text may be the literal of a list of paths."""
    images = row.get("images")
    if isinstance(images, str) and images.lstrip().startswith("["):
        images = parse_literal(images) or images
    items = list(images) if isinstance(images, list | tuple | np.ndarray) else [images]
    return [item for item in items if item is not None and not (isinstance(item, str) and not item.strip())]


def read_visuals(items: Sequence[object], *, image_roots: Sequence[str], least_side: int) -> tuple[Visual, ...]:
    """Each item, decoded; BadImage as of `Visual.read`."""
    return tuple(Visual.read(item, image_roots=image_roots, least_side=least_side) for item in items)


def is_video(item: object) -> TypeGuard[Mapping[str, Any]]:
    """Whether an item of a row is a video."""
    return isinstance(item, Mapping) and item.get("frames") is not None


def frames_of(video: Mapping[str, Any]) -> Sequence[object]:
    """A video's frames, undecoded; BadImage without any."""
    frames = video["frames"]
    if not isinstance(frames, list | tuple | np.ndarray) or not len(frames):
        raise BadImage("bad_video", "its frames must be a list of images")
    return list(frames)


@dataclasses.dataclass(frozen=True)
class Outline:
    """An image of which only the size is known: what `fitting` needs of one."""

    size: tuple[int, int]

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """As of `Visual`."""
        return [self.size]

    def layout(self, processor: Processor, pixels: PixelLimits) -> tuple[EncodedImage, ...]:
        """As of `Visual`."""
        return (processor.image_layout(*self.size, pixels),)


def layouts(visuals: Sequence[Visual | Outline], processor: Processor, limits: PixelLimits) -> tuple[EncodedImage, ...]:
    """Every image's layout under these limits."""
    return tuple(image for v in visuals for image in v.layout(processor, limits))


def smallest(wanted: PixelLimits, processor: Processor) -> PixelLimits:
    """The limits of the smallest images that `wanted` leaves room for."""
    limits, token = processor.limits(wanted), processor.merge_unit**2
    return PixelLimits(limits.least, -(-limits.least // token) * token)


def fitting(
    visuals: Sequence[Visual | Outline],
    processor: Processor,
    wanted: PixelLimits,
    reason: Callable[[PixelLimits], str | None],
) -> PixelLimits:
    """The wanted limits if a row fits with them, else those of the largest images with which it does.

    The upper limit is the same for all images of the row: small ones keep their size.

    Args:
      reason: why a row whose images are resized by these limits does not fit; None if it does.

    Raises:
      TooLong: it does not fit with the smallest images either.
    """
    kind = reason(wanted)
    if kind is None:
        return wanted
    limits = processor.limits(wanted)
    token = processor.merge_unit**2  # pixels
    small, large = -(-limits.least // token), limits.most // token  # the one fits, the other does not
    if reason(smallest(wanted, processor)) is not None:
        raise TooLong(kind, f"images of {', '.join(f'{w} x {h}' for v in visuals for w, h in v.sizes[:1])} pixels")
    while large - small > 1:
        middle = (small + large) // 2
        fits = reason(PixelLimits(limits.least, middle * token)) is None
        small, large = (middle, large) if fits else (small, middle)
    return PixelLimits(limits.least, small * token)
