"""Image views: what a role's teacher sees in place of the row's images, set per role in `config.roles`.

The student always sees the row's own images. A view's images are made from these (cut out, blanked, made smaller), come
from another column or another row, or are left out; a row that cannot give them is a bad row. Roles with the same view
and weights share one packed sequence, for which each image of the view is encoded once in a step.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from vigos_jax.data.images import BadImage, read_mask
from vigos_jax.data.processor import EncodedImage, PixelLimits, Processor
from vigos_jax.data.visuals import Visual, images_of_row, read_visuals
from vigos_jax.errors import InputError
from vigos_jax.grading.options import parse_literal

KINDS = ("original", "none", "blank", "crop", "resized", "other", "shuffled")
_COLUMN, _PIXELS = ("crop", "other"), ("resized",)  # the kinds that need one
FIELDS = ("image", "image_column", "image_margin", "image_pixels")  # of an entry of config.roles
_LARGEST_MARGIN = 100.0
_GREY = (128, 128, 128)

Box = tuple[float, float, float, float]  # x1, y1, x2, y2 in pixels, x2 and y2 excluded


@dataclasses.dataclass(frozen=True)
class ImageView:
    """Which images; hashable, and equal for roles that may share a sequence.

    Attributes:
      kind: "original" is the row's own; "none" no image at all; "blank" grey ones of the same sizes; "crop" the part of
        the row's one image that a box or mask names; "resized" the row's own with fewer pixels; "other" those of a
        further column; "shuffled" another row's.
      column: of "crop", a box (x1, y1, x2, y2) in pixels of the image, a list of boxes or a mask; of "other", images.
      margin: of "crop", what is added on each side of the box, as a share of the box's own width and height.
      pixels: of "resized", the most that an image has.
    """

    kind: str = "original"
    column: str = ""
    margin: float = 0.0
    pixels: int = 0

    @property
    def is_read(self) -> bool:
        """Whether its images are encoded separately from the row's own: all kinds but "original" and "none"."""
        return self.kind not in ("original", "none")


ORIGINAL, NONE = ImageView(), ImageView("none")


def read_view(where: str, entry: Mapping[str, Any]) -> ImageView:
    """The view of an entry of `config.roles`; InputError if a field is wrong, missing or of another kind's.

    Args:
      where: the entry, for messages.
      entry: with all of FIELDS.
    """
    kind, column, margin, pixels = (entry[field] for field in FIELDS)
    if kind not in KINDS:
        raise InputError(f"{where}.image={kind!r} is unknown; choices: {', '.join(KINDS)}")
    if not isinstance(column, str) or bool(column) != (kind in _COLUMN):
        what = "a column of the data" if kind in _COLUMN else f"'', as image={kind!r} reads no column"
        raise InputError(f"{where}.image_column={column!r} must be {what}")
    is_number = isinstance(margin, int | float) and not isinstance(margin, bool)
    if not is_number or not 0 <= margin <= _LARGEST_MARGIN or (margin and kind != "crop"):
        raise InputError(f"{where}.image_margin={margin!r} must be from 0 to {_LARGEST_MARGIN:g}, and 0 without a crop")
    is_whole = isinstance(pixels, int) and not isinstance(pixels, bool)
    if not is_whole or pixels < 0 or bool(pixels) != (kind in _PIXELS):
        what = "a whole number above 0" if kind in _PIXELS else f"0, as image={kind!r} keeps the run's own limits"
        raise InputError(f"{where}.image_pixels={pixels!r} must be {what}")
    return ImageView(kind, column, float(margin), pixels)


@dataclasses.dataclass(frozen=True)
class ViewOfRow:
    """A row's decoded images under a view, and the limits that they are resized by."""

    view: ImageView
    visuals: tuple[Visual, ...]

    @property
    def is_alike(self) -> bool:
        """Whether its images have the sizes of the row's own."""
        return self.view.kind == "blank"

    def limits(self, pixels: PixelLimits, processor: Processor) -> PixelLimits:
        """The limits of the row's own images, lowered to the view's `pixels` if it has any."""
        if not self.view.pixels:
            return pixels
        whole = processor.limits(pixels)
        most = min(whole.most, max(self.view.pixels, processor.merge_unit**2))
        return PixelLimits(min(whole.least, most), most)

    def layout(self, processor: Processor, pixels: PixelLimits) -> tuple[EncodedImage, ...]:
        """What `encode` gives, without patches."""
        limits = self.limits(pixels, processor)
        return tuple(image for v in self.visuals for image in v.layout(processor, limits))

    def encode(self, processor: Processor, pixels: PixelLimits) -> tuple[EncodedImage, ...]:
        """The view's patches."""
        limits = self.limits(pixels, processor)
        return tuple(image for v in self.visuals for image in v.encode(processor, limits))


def view_of(
    view: ImageView,
    visuals: tuple[Visual, ...],
    value: object,
    others: Callable[[], Iterator[tuple[Visual, ...]]],
    **reading: Any,
) -> tuple[Visual, ...]:
    """A row's images under a view, decoded.

    Args:
      visuals: the row's own.
      value: of the view's column.
      others: images of other rows, one row after the other.
      reading: `image_roots` and `least_side`, as of `Visual.read`.

    Raises:
      BadImage: "no_box", "bad_box", "bad_mask" or "crop_of_several" (images, or a video) of a crop; "no_other_image" if
        the column is empty, or no other row has another image; what else may be wrong with an image.
    """
    if view.kind == "crop":
        return _cut_out(visuals, value, view, **reading)
    if view.kind == "blank":
        return _blanked(visuals)
    if view.kind == "other":
        items = images_of_row({"images": value})
        if not items:
            raise BadImage("no_other_image", f"{view.column} is empty")
        return read_visuals(items, **reading)
    if view.kind == "shuffled":
        own = _pixels(visuals)
        other = next((o for o in others() if _pixels(o) != own), None)
        if other is None:
            raise BadImage("no_other_image", "no other row that was looked at has another image")
        return other
    return visuals  # of "resized", whose limits are its own


def _cut_out(visuals: Sequence[Visual], value: object, view: ImageView, **reading: Any) -> tuple[Visual, ...]:
    if len(visuals) != 1 or visuals[0].fps is not None:
        raise BadImage("crop_of_several", f"{view.column} is for one image, and the row has {_count(visuals)}")
    image = visuals[0].frames[0]
    box = box_of(value, image.size, column=view.column, image_roots=reading["image_roots"])
    return (Visual((image.crop(_whole(box, image.size, margin=view.margin, least=reading["least_side"])),)),)


def _count(visuals: Sequence[Visual]) -> str:
    return "a video" if any(v.fps is not None for v in visuals) else f"{len(visuals)}"


def box_of(value: object, size: tuple[int, int], *, column: str, image_roots: Sequence[str]) -> Box:
    """The smallest box around the boxes of a column's value, or around what a mask marks; BadImage if there is none.

    Args:
      value: four numbers, a list of such, the literal of either, or a mask: an image of the same size, marked where it
        is neither black nor transparent.
      size: (width, height) of the image.
    """
    if value is None or (isinstance(value, str) and not value.strip()):
        raise BadImage("no_box", f"{column} is {value!r}")
    if isinstance(value, str) and value.lstrip().startswith(("[", "(")):
        parsed = parse_literal(value)
        value = value if parsed is None else parsed
    if isinstance(value, list | tuple) and len(value) == 1 and not isinstance(value[0], list | tuple | np.ndarray):
        value = value[0]  # a list of one mask
    if not isinstance(value, list | tuple | np.ndarray):
        return _marked(value, size, column=column, image_roots=image_roots)
    nested = not len(value) or isinstance(value[0], list | tuple | np.ndarray)
    boxes = [_numbers(box, column) for box in (value if nested else [value])]
    if not boxes:
        raise BadImage("no_box", f"{column} is empty")
    for x1, y1, x2, y2 in boxes:
        is_share = max(x2, y2) <= 1 < min(size)
        if is_share or not (0 <= x1 <= x2 - 1 and x2 <= size[0] and 0 <= y1 <= y2 - 1 and y2 <= size[1]):
            raise BadImage(
                "bad_box",
                f"{column} has ({x1:g}, {y1:g}, {x2:g}, {y2:g}), which must be (x1, y1, x2, y2) in pixels of an image "
                f"of {size[0]} x {size[1]}, x1 < x2 and y1 < y2; shares of the image and other scales are not read",
            )
    least, most = np.min(boxes, 0), np.max(boxes, 0)
    return float(least[0]), float(least[1]), float(most[2]), float(most[3])


def _numbers(box: object, column: str) -> Box:
    try:
        if isinstance(box, str | Mapping) or any(isinstance(x, bool | str) for x in box):  # type: ignore[union-attr]
            raise TypeError
        x1, y1, x2, y2 = (float(x) for x in box)  # type: ignore[union-attr]
    except (TypeError, ValueError, OverflowError) as e:
        raise BadImage("bad_box", f"{column} has {str(box)[:60]!r}, not four numbers") from e
    if not all(map(math.isfinite, (x1, y1, x2, y2))):
        raise BadImage("bad_box", f"{column} has {str(box)[:60]}, whose numbers must be finite")
    return x1, y1, x2, y2


def _marked(value: object, size: tuple[int, int], *, column: str, image_roots: Sequence[str]) -> Box:
    try:
        mask = read_mask(value, image_roots=image_roots)
    except BadImage as e:
        raise BadImage("bad_mask", f"{column}: {e}") from e
    if mask.shape != size[::-1]:
        sides = f"{mask.shape[1]} x {mask.shape[0]}"
        raise BadImage("bad_mask", f"{column} has {sides} pixels, and its image {size[0]} x {size[1]}")
    rows, columns = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
    if not len(rows):
        raise BadImage("bad_mask", f"{column} marks nothing: it is black")
    return float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)


def _whole(box: Box, size: tuple[int, int], *, margin: float, least: int) -> tuple[int, int, int, int]:
    """Rounds a box with its margin outwards to whole pixels inside the image, with sides of at least `least` pixels.

    The image's own sides must be at least as long.
    """
    sides = []
    for low, high, end in ((box[0], box[2], size[0]), (box[1], box[3], size[1])):
        extra = margin * (high - low)
        first, last = math.floor(max(0.0, low - extra)), math.ceil(min(float(end), high + extra))
        lack = max(0, least - (last - first))
        first = max(0, min(first - lack // 2, end - max(least, last - first)))
        sides.append((first, min(end, max(last, first + least))))
    (x1, x2), (y1, y2) = sides
    return x1, y1, x2, y2


def _blanked(visuals: Sequence[Visual]) -> tuple[Visual, ...]:
    """Grey images of the same sizes."""
    return tuple(Visual(tuple(Image.new("RGB", f.size, _GREY) for f in v.frames), v.fps) for v in visuals)


def _pixels(visuals: Sequence[Visual]) -> list[tuple[tuple[int, int], bytes]]:
    return [(frame.size, frame.tobytes()) for v in visuals for frame in v.frames]
