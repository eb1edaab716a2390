"""Images from files, bytes and data sets: decoded and upright, or refused with the reason. Nothing is executed."""

import io
import os
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image, ImageOps

from vigos_jax.errors import InputError

MAX_PIXELS = 80_000_000  # a larger image is refused by its header; below the size at which PIL itself warns
MAX_BYTES = 2**29  # a larger file is refused unread
_ORIENTATION = 0x0112  # of EXIF; from 5 on, width and height are exchanged
# Not all that PIL can read: some of its readers start other programs.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")


class BadImage(InputError):
    """An image that cannot be used.

    Attributes:
      kind: bad_image_type, image_missing, image_outside_folder, image_unreadable, image_too_large,
        image_too_small or image_too_narrow.
    """

    def __init__(self, kind: str, detail: str):
        super().__init__(f"{kind}: {detail}")
        self.kind = kind


def read_image(item: object, *, image_roots: Sequence[str]) -> Image.Image:
    """A decoded, upright RGB image (alpha dropped; the first frame of a moving one).

    Args:
      item: bytes of an image file, a path, a dict of `bytes` or `path`, or a PIL image.
      image_roots: folders that a path may lead into, links followed; a relative one starts at the first.
        `("/folder", "/")` allows any absolute path, `()` no path at all.

    Raises:
      BadImage: what is wrong with it.
    """
    try:
        return ImageOps.exif_transpose(_eight_bits(_open(item, image_roots))).convert("RGB")
    except BadImage:
        raise
    except Exception as e:  # a broken file makes PIL raise almost anything
        raise BadImage("image_unreadable", f"{type(e).__name__}; choices: {', '.join(FORMATS)}") from e


def _eight_bits(image: Image.Image) -> Image.Image:
    """The upper 8 of a grey image's 16 bits: PIL's own conversion would turn almost all of it white."""
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM"):
        upper = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        upper.info = image.info  # where the orientation stands
        return upper
    if image.mode in ("I", "F"):
        raise BadImage("image_unreadable", f"mode {image.mode} has no scale; choices: 8 or 16 bits a channel")
    return image


def image_size(item: object, *, image_roots: Sequence[str]) -> tuple[int, int]:
    """(width, height) of an image as `read_image` would give it, from its header alone; BadImage if it has none.

    A PNG may say behind its pixels that it lies on its side; that is not looked for.
    """
    try:
        image = _open(item, image_roots)
        # A TIFF's size is upright already. PngImageFile's own getexif would decode the image.
        turned = image.format != "TIFF" and Image.Image.getexif(image).get(_ORIENTATION, 1) >= 5
    except BadImage:
        raise
    except Exception as e:
        raise BadImage("image_unreadable", type(e).__name__) from e
    return image.size[::-1] if turned else image.size


def image_bytes(item: object, *, image_roots: Sequence[str]) -> bytes:
    """The bytes an image is made of, undecoded where they are a file's; BadImage if there are none."""
    if isinstance(item, Mapping):
        item = item.get("path") if item.get("bytes") is None else item["bytes"]
    if isinstance(item, str):
        return _read_file(item, image_roots)
    if isinstance(item, bytes | bytearray):
        return bytes(item)
    if isinstance(item, Image.Image):
        return f"{item.mode} {item.size} ".encode() + item.tobytes()
    raise BadImage("bad_image_type", f"{type(item).__name__}; choices: bytes, path, dict of them, PIL image")


def _open(item: object, image_roots: Sequence[str]) -> Image.Image:
    """The image, its header read and no more; BadImage if it has more than MAX_PIXELS."""
    if isinstance(item, Mapping):
        item = item.get("path") if item.get("bytes") is None else item["bytes"]
        if item is None:
            raise BadImage("image_missing", "neither bytes nor a path")
    if isinstance(item, str):
        item = _read_file(item, image_roots)
    if isinstance(item, bytes | bytearray):
        try:
            item = Image.open(io.BytesIO(item), formats=FORMATS)
        except (Image.DecompressionBombError, Image.DecompressionBombWarning) as e:
            raise BadImage("image_too_large", f"far too many pixels; at most {MAX_PIXELS} are read") from e
    if not isinstance(item, Image.Image):
        raise BadImage("bad_image_type", f"{type(item).__name__}; choices: bytes, path, dict of them, PIL image")
    if item.width * item.height > MAX_PIXELS:
        raise BadImage("image_too_large", f"{item.width} x {item.height} pixels; at most {MAX_PIXELS} are read")
    return item


def _read_file(path: str, image_roots: Sequence[str]) -> bytes:
    roots = [os.path.realpath(root) for root in image_roots]
    try:
        real = os.path.realpath(os.path.join(*roots[:1], path))
    except ValueError as e:  # a zero byte in the name
        raise BadImage("image_missing", repr(path)) from e
    if not any(real.startswith(os.path.join(root, "")) for root in roots):
        raise BadImage("image_outside_folder", f"{path!r} must lie in {', '.join(roots) or 'no folder'}")
    if not os.path.isfile(real):
        raise BadImage("image_missing", f"{path!r} is not a file")
    try:
        if (size := os.path.getsize(real)) > MAX_BYTES:
            raise BadImage("image_too_large", f"{path!r} has {size} bytes; at most {MAX_BYTES} are read")
        return pathlib.Path(real).read_bytes()
    except OSError as e:
        raise BadImage("image_unreadable", f"{path!r}: {e.strerror}") from e
