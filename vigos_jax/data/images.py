"""Images from files, bytes and data sets: decoded and upright, or refused with the reason.

Nothing is executed, and nothing is fetched.
"""

import base64
import binascii
import io
import os
import pathlib
import re
import urllib.parse
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageOps, PngImagePlugin

from vigos_jax.errors import InputError, one_line

MAX_PIXELS = 80_000_000  # a larger image is refused by its header; below the size at which PIL itself warns
MAX_BYTES = 2**29  # a larger file is refused unread
_ORIENTATION = 0x0112  # of EXIF; from 5 on, width and height are exchanged
_DATA_URL = re.compile(r"data:[\w/+.-]*(?:;[\w=.-]+)*?(?P<base64>;base64)?,", re.IGNORECASE)
_BASE64_STARTS = ("iVBORw0KGgo", "/9j/", "UklGR", "R0lGOD", "Qk", "SUkqAA", "TU0AK", "UDY", "UDU", "AAAA")  # of FORMATS
_BASE64 = re.compile(r"[A-Za-z0-9+/\s]+={0,2}\s*")
_LEAST_BASE64 = 60  # characters; no image is smaller, and few paths without a dot are longer
# Not all that PIL can read: some of its readers start other programs.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")


# Where a mapping may hold an image, in the order of precedence; some write "" for what is not there.
IMAGE_KEYS = ("bytes", "path", "image", "image_url", "url", "base64", "data")
_PNG: Any = PngImagePlugin
_PNG.MAX_TEXT_CHUNK = 2**26  # bytes; image generators write their whole program into a PNG


class TrustedRoot(str):
    """A folder named by the user: symlinks in it may lead anywhere."""


class BadImage(InputError):
    """An image that cannot be used.

    Attributes:
      kind: bad_image_type, image_missing, image_remote, image_outside_folder, image_unreadable, image_too_large,
        image_too_small or image_too_narrow; of videos bad_video; of roles' images those of `views.view_of`.
    """

    def __init__(self, kind: str, detail: str):
        super().__init__(f"{kind}: {detail}")
        self.kind = kind


def read_image(item: object, *, image_roots: Sequence[str]) -> Image.Image:
    """A decoded, upright RGB image (what is transparent on white; the first frame of a moving one).

    Args:
      item: bytes of an image file, a path (`file://` too), a data URL, the base64 of a file, a dict of `bytes` or
        `path`, or a PIL image.
      image_roots: folders that a path may lead into, links followed; a relative one starts at the first.
        `("/folder", "/")` allows any absolute path, `()` no path at all.

    Raises:
      BadImage: what is wrong with it.
    """
    try:
        return upright_rgb(_eight_bits(_open(item, image_roots)))
    except BadImage:
        raise
    except Exception as e:  # a broken file makes PIL raise almost anything
        raise BadImage("image_unreadable", f"{one_line(e, most=120)}; choices: {', '.join(FORMATS)}") from e


def read_mask(item: object, *, image_roots: Sequence[str]) -> np.ndarray:
    """bool [H, W] of an upright image, as `read_image` takes it: where it is neither black nor transparent."""
    try:
        image = ImageOps.exif_transpose(_open(item, image_roots))
        if image.has_transparency_data:
            colour, alpha = np.split(np.asarray(image.convert("RGBA")), [3], axis=-1)
            return (colour.max(-1) > 0) & (alpha[..., 0] > 0)
        # Numbers of other modes are labels: as colours, small ones would be rounded to black.
        marks = np.asarray(image if image.mode[0] in "1LIFR" else image.convert("RGB"))
        return (marks != 0).any(-1) if marks.ndim == 3 else marks != 0
    except BadImage:
        raise
    except Exception as e:  # as of `read_image`
        raise BadImage("image_unreadable", f"{one_line(e, most=120)}; choices: {', '.join(FORMATS)}") from e


def upright_rgb(image: Image.Image) -> Image.Image:
    """An image turned as its EXIF says, in RGB; what is transparent lies on white, as the models were trained."""
    image = ImageOps.exif_transpose(image)
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image).convert("RGB")


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

    An EXIF orientation that a PNG stores after its pixels is ignored.
    """
    try:
        image = _open(item, image_roots)
        # A TIFF's size is upright already. PngImageFile's own getexif would decode the image.
        turned = image.format != "TIFF" and Image.Image.getexif(image).get(_ORIENTATION, 1) >= 5
    except BadImage:
        raise
    except Exception as e:
        raise BadImage("image_unreadable", one_line(e, most=120)) from e
    return image.size[::-1] if turned else image.size


def image_bytes(item: object, *, image_roots: Sequence[str]) -> bytes:
    """The bytes an image is made of, undecoded where they are a file's; BadImage if there are none."""
    item = _content(item, image_roots)
    return item if isinstance(item, bytes) else f"{item.mode} {item.size} ".encode() + item.tobytes()


def _content(item: object, image_roots: Sequence[str]) -> bytes | Image.Image:
    """A file's bytes, or a PIL image as it is."""
    if isinstance(item, Mapping):
        held = held_in(item)
        if held is None:
            raise BadImage("image_missing", "neither bytes nor a path")
        return _content(held, image_roots)
    if isinstance(item, os.PathLike):
        item = os.fspath(item)
    if isinstance(item, str):
        data = _inline(item)
        return _read_file(item, image_roots) if data is None else data
    if isinstance(item, bytes | bytearray):
        return bytes(item)
    if isinstance(item, Image.Image):
        return item
    choices = "bytes, path, data URL, base64, dict of bytes or path, PIL image"
    raise BadImage("bad_image_type", f"{type(item).__name__}; choices: {choices}")


def held_in(item: Mapping[str, Any]) -> Any:
    """What a mapping holds of an image: `{"bytes": ..., "path": ...}`, `{"image_url": {"url": ...}}`; None without."""
    values = (item.get(key) for key in IMAGE_KEYS)
    value = next((v for v in values if v is not None and not (isinstance(v, str | bytes) and not v)), None)
    return held_in(value) if isinstance(value, Mapping) else value


def _inline(text: str) -> bytes | None:
    """The bytes that a data URL or a file's base64 spells out; None for a path."""
    match = _DATA_URL.match(text[:200])
    if match:
        if not match["base64"]:
            raise BadImage("image_unreadable", f"data URL {text[:40]!r} is not base64")
        text = urllib.parse.unquote(text[match.end() :])
    elif not text.startswith(_BASE64_STARTS) or len(text) < _LEAST_BASE64 or not _BASE64.fullmatch(text):
        return None
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError) as e:
        raise BadImage("image_unreadable", f"its base64 is broken: {e}") from e


def _open(item: object, image_roots: Sequence[str]) -> Image.Image:
    """The image, its header read and no more; BadImage if it has more than MAX_PIXELS."""
    content = _content(item, image_roots)
    if isinstance(content, bytes):
        try:
            content = Image.open(io.BytesIO(content), formats=FORMATS)
        except (Image.DecompressionBombError, Image.DecompressionBombWarning) as e:
            raise BadImage("image_too_large", f"far too many pixels; at most {MAX_PIXELS} are read") from e
    if content.width * content.height > MAX_PIXELS:
        raise BadImage("image_too_large", f"{content.width} x {content.height} pixels; at most {MAX_PIXELS} are read")
    return content


def _read_file(path: str, image_roots: Sequence[str]) -> bytes:
    if path.lower().startswith("file:"):
        path = re.sub("^file:(?://(?:localhost(?=/))?)?", "", path, flags=re.IGNORECASE)
    elif re.match(r"[a-zA-Z][a-zA-Z0-9+.-]+://", path):
        raise BadImage("image_remote", f"{path[:100]!r} is not on this machine, and nothing is fetched; use a file")
    try:
        places = [place for spelling in _spellings(path) for place in _places(spelling, image_roots)]
    except ValueError as e:  # a zero byte in the name
        raise BadImage("image_missing", repr(path)) from e
    inside = [real for real, is_inside in places if is_inside]
    if not inside:
        where = ", ".join(image_roots) or "no folder"
        raise BadImage("image_outside_folder", f"{path!r} must lie in {where} (config.data.image_folder)")
    real = next(filter(os.path.isfile, inside), None)
    if real is None:
        raise BadImage("image_missing", f"{path!r} is not a file in {image_roots[0]}")
    try:
        if (size := os.path.getsize(real)) > MAX_BYTES:
            raise BadImage("image_too_large", f"{path!r} has {size} bytes; at most {MAX_BYTES} are read")
        return pathlib.Path(real).read_bytes()
    except OSError as e:
        raise BadImage("image_unreadable", f"{path!r}: {e.strerror}") from e


def _spellings(path: str) -> list[str]:
    """A path as it stands, then as an address or as Windows write it."""
    return list(dict.fromkeys([path, urllib.parse.unquote(path), path.replace("\\", "/")]))


def _places(path: str, image_roots: Sequence[str]) -> Iterator[tuple[str, bool]]:
    """(where a path leads to from each root, links followed; whether it may lead there)."""
    roots = [os.path.realpath(root) for root in image_roots]
    for root in image_roots:
        place = os.path.join(root, path)
        real = os.path.realpath(place)
        is_inside = any(real.startswith(os.path.join(r, "")) for r in roots)
        if isinstance(root, TrustedRoot):  # the text itself may not lead out of it
            is_inside = is_inside or os.path.abspath(place).startswith(os.path.join(os.path.abspath(root), ""))
        yield real, is_inside
