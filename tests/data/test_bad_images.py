"""Pictures as they come: broken, huge, turned, of other depths, somewhere else. Each is read, or named."""

import base64
import io
import json
import os
import pathlib
import subprocess
import sys
import urllib.parse

import numpy as np
import pytest
from PIL import Image
from tiny_rows import GOOD, encode

from vigos_jax.data import images
from vigos_jax.data.images import BadImage, image_size, read_image
from vigos_jax.errors import InputError

ROOT = pathlib.Path(__file__).resolve().parents[2]


def file_bytes(image: Image.Image, format="PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def turned(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


RAMP = np.linspace(0, 65535, 64 * 96).reshape(96, 64).astype(np.uint16)
NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (96, 64, 3), np.uint8))


# Depths and colours.


@pytest.mark.parametrize("format", ["PNG", "TIFF", "PPM", "JPEG2000"])
def test_sixteen_bits_keep_their_shades(format):
    picture = read_image(file_bytes(Image.fromarray(RAMP), format), image_roots=())
    assert picture.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(picture), np.repeat((RAMP >> 8)[..., None], 3, -1))


def test_sixteen_bits_are_turned_upright():
    picture = read_image(file_bytes(Image.fromarray(RAMP), exif=turned(6)), image_roots=())
    np.testing.assert_array_equal(np.asarray(picture)[..., 0], np.rot90(RAMP >> 8, -1))


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_numbers_without_a_scale_are_no_shades(dtype):
    data = file_bytes(Image.fromarray(np.linspace(0, 1000, 4096).reshape(64, 64).astype(dtype)), "TIFF")
    with pytest.raises(BadImage, match="image_unreadable: mode . has no scale; choices: 8 or 16 bits"):
        read_image(data, image_roots=())


@pytest.mark.parametrize("format", ["JPEG", "TIFF"])
def test_cmyk(format):
    options = {"quality": 95} if format == "JPEG" else {}
    flat = Image.new("RGB", (64, 64), (200, 30, 90))
    picture = read_image(file_bytes(flat.convert("CMYK"), format, **options), image_roots=())
    assert np.abs(np.asarray(picture).astype(int) - np.asarray(flat)).max() < 8


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG", "TIFF"])
def test_of_a_moving_picture_the_first_frame(format):
    first, others = Image.new("RGB", (64, 64), "red"), [Image.new("RGB", (64, 64), c) for c in ("lime", "blue")]
    options = {"lossless": True} if format == "WEBP" else {}
    data = file_bytes(first, format, save_all=True, append_images=others, **options)
    assert Image.open(io.BytesIO(data)).n_frames == 3
    assert set(read_image(data, image_roots=()).getdata()) == {(255, 0, 0)}


# The way up.


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation(format, orientation):
    wide = Image.new("RGB", (80, 60), "red")
    wide.paste("blue", (0, 0, 40, 30))  # a corner that shows where it went
    data = file_bytes(wide, format, exif=turned(orientation))
    picture = read_image(data, image_roots=())
    assert picture.size == ((60, 80) if orientation >= 5 else (80, 60)) == image_size(data, image_roots=())
    corners = [(x, y) for y in (5, -5) for x in (5, -5)]
    blue = [i for i, (x, y) in enumerate(corners) if picture.getpixel((x % picture.width, y % picture.height))[2] > 128]
    # By the standard: where the stored picture's upper left corner is shown. 0 1 is the upper row, 2 3 the lower.
    assert blue == [{1: 0, 2: 1, 3: 3, 4: 2, 5: 0, 6: 1, 7: 3, 8: 2}[orientation]]


def test_exif_that_is_none_does_not_matter():
    picture = read_image(file_bytes(NOISE, "JPEG", exif=b"Exif\0\0" + b"no exif" * 9), image_roots=())
    assert picture.size == NOISE.size


# Broken.


@pytest.mark.parametrize("format", images.FORMATS)
def test_cut_anywhere_it_is_read_or_named(format):
    data = file_bytes(NOISE, format)
    outcomes = []
    for n in [0, 1, 4, 16, *range(32, len(data), max(1, len(data) // 40))]:
        try:
            outcomes.append(read_image(data[:n], image_roots=()).size)
        except BadImage as e:
            assert "\n" not in str(e)
            outcomes.append(e.kind)
    assert set(outcomes) <= {NOISE.size, "image_unreadable", "image_too_large"}
    assert outcomes[:4] == ["image_unreadable"] * 4


@pytest.mark.filterwarnings("ignore::UserWarning")  # PIL's, about what was flipped
@pytest.mark.parametrize("format", images.FORMATS)
def test_any_flipped_bits_it_is_read_or_named(format):
    data, rng = file_bytes(NOISE, format), np.random.default_rng(1)
    for _ in range(60):
        broken = bytearray(data)
        for at in rng.integers(0, min(len(data), 400), 3):
            broken[at] ^= 1 << int(rng.integers(8))
        for look in (read_image, image_size):
            try:
                look(bytes(broken), image_roots=())
            except BadImage as e:
                assert e.kind in ("image_unreadable", "image_too_large")


@pytest.mark.parametrize(
    "name, data, kind",
    [
        ("picture.txt", file_bytes(NOISE), None),  # what it is counts, not what it is called
        ("picture.jpg", file_bytes(NOISE, "WEBP"), None),
        ("picture.png", b"just text", "image_unreadable"),
        ("picture.png", b"", "image_unreadable"),
        ("picture.svg", b"<svg xmlns='http://www.w3.org/2000/svg'/>", "image_unreadable"),
        ("picture.png", b"%PDF-1.4", "image_unreadable"),
        ("picture.png", file_bytes(Image.new("RGB", (1, 5000))), "image_too_small"),
        ("picture.png", file_bytes(Image.new("RGB", (5000, 1))), "image_too_small"),
        ("picture.png", file_bytes(Image.new("L", (28, 5700))), "image_too_narrow"),
    ],
)
def test_a_row_with_such_a_file(processor, tmp_path, name, data, kind):
    (tmp_path / name).write_bytes(data)
    example = encode(GOOD | {"images": [name]}, processor, image_roots=(str(tmp_path),))
    assert example.bad_reason == kind and bool(example.images) == (kind is None)


# Huge.

GROWTH = """
import json, re, sys
import PIL.Image
from vigos_jax.data import images
PIL.Image.init()
images.MAX_PIXELS, look, path = int(sys.argv[1]), getattr(images, sys.argv[2]), sys.argv[3]
# Not getrusage's: that peak begins with the parent's.
peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1])
data = open(path, "rb").read()
before = peak()
try:
    said = str(look(data, image_roots=()))
except images.BadImage as e:
    said = e.kind
print(json.dumps([said, (peak() - before) / 1024]))
"""


def growth(path: pathlib.Path, look: str, *, cap: int = images.MAX_PIXELS) -> tuple[str, float]:
    """What `look` says about a picture, and by how many MiB the peak memory of a fresh process rises."""
    command = [sys.executable, "-W", "ignore", "-c", GROWTH, str(cap), look, str(path)]
    out = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return tuple(json.loads(out))


@pytest.mark.slow
@pytest.mark.parametrize("format", ["PNG", "GIF", "WEBP", "JPEG2000"])
def test_a_hundred_megapixels_are_refused_before_they_take_memory(tmp_path, format):
    path = tmp_path / "huge"
    path.write_bytes(file_bytes(Image.new("L", (10_000, 10_000)), format))
    for look in ("read_image", "image_size"):
        said, mebibytes = growth(path, look)
        assert said == "image_too_large" and mebibytes < 10, (look, mebibytes)  # decoded: 95 or more
    if format == "PNG":  # the measure can fail
        said, mebibytes = growth(path, "read_image", cap=10**9)
        assert said != "image_too_large" and mebibytes > 90


def test_the_size_of_a_picture_is_read_without_its_pixels(tmp_path):
    path = tmp_path / "large.png"
    path.write_bytes(file_bytes(Image.new("L", (8000, 8000))))
    said, mebibytes = growth(path, "image_size")
    assert said == "(8000, 8000)" and mebibytes < 10


def test_a_huge_file_is_refused_unread(tmp_path):
    with (tmp_path / "huge.png").open("wb") as file:
        file.truncate(images.MAX_BYTES + 1)  # takes no room on the disk
    with pytest.raises(BadImage, match="image_too_large: 'huge.png' has 536870913 bytes; at most 536870912 are read"):
        read_image("huge.png", image_roots=(str(tmp_path),))


# Spelled otherwise.

PNG = file_bytes(NOISE)
BASE64 = base64.b64encode(PNG).decode()


@pytest.mark.parametrize(
    "item",
    [
        f"data:image/png;base64,{BASE64}",
        f"data:;base64,{BASE64}",
        f"DATA:image/png;charset=x;base64,{BASE64[:100]}\n{BASE64[100:]}",
        "data:image/png;base64," + urllib.parse.quote(BASE64),
        BASE64,
        "\n".join(BASE64[i : i + 76] for i in range(0, len(BASE64), 76)),
        "sub/a.png",
        "sub\\a.png",
        "file://{folder}/sub/a.png",
        "file:///{folder}/sub/a%2Epng",
        {"bytes": "", "path": "sub/a.png"},
        {"bytes": b"", "path": "sub/a.png"},
        {"bytes": None, "path": "sub\\a.png"},
        {"bytes": PNG, "path": None},
        {"bytes": PNG, "path": "no/such/file.png"},
        {"bytes": BASE64},
        {"path": f"data:image/png;base64,{BASE64}"},
        pathlib.Path("sub/a.png"),
        bytearray(PNG),
        NOISE,
    ],
    ids=lambda item: repr(item)[:40],
)
def test_images_as_people_write_them(tmp_path, item):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.png").write_bytes(PNG)
    item = item.format(folder=tmp_path) if isinstance(item, str) else item
    roots = (str(tmp_path),)
    np.testing.assert_array_equal(np.asarray(read_image(item, image_roots=roots)), np.asarray(NOISE))
    assert image_size(item, image_roots=roots) == NOISE.size
    assert images.image_bytes(item, image_roots=roots)[:8] == (PNG[:8] if item is not NOISE else b"RGB (64,")


@pytest.mark.parametrize("format", images.FORMATS)
def test_base64_of_every_format(format):
    data = file_bytes(NOISE, format)
    assert read_image(base64.b64encode(data).decode(), image_roots=()).size == NOISE.size


@pytest.mark.parametrize(
    "item, kind",
    [
        ("https://example.org/a.png", "image_remote"),
        ("s3://bucket/a.png", "image_remote"),
        ({"bytes": None, "path": "http://example.org/a.png"}, "image_remote"),
        ("file:///etc/passwd", "image_outside_folder"),
        ("file://host/../../etc/passwd", "image_outside_folder"),
        ("..\\..\\etc\\passwd", "image_missing"),
        ("C:\\pictures\\a.png", "image_missing"),
        (f"data:image/png;base64,{BASE64[:99]}!", "image_unreadable"),
        ("data:image/svg+xml,<svg/>", "image_unreadable"),
        ("data:image/png;base64,", "image_unreadable"),
        (BASE64[:61], "image_unreadable"),
        ("/9j/a.jpg", "image_outside_folder"),
        ({"bytes": "", "path": ""}, "image_missing"),
        ({}, "image_missing"),
        (7, "bad_image_type"),
    ],
    ids=lambda item: repr(item)[:40],
)
def test_images_that_are_none(tmp_path, item, kind):
    with pytest.raises(BadImage) as e:
        read_image(item, image_roots=(str(tmp_path),))
    assert e.value.kind == kind and "\n" not in str(e.value) and len(str(e.value)) < 300


# Somewhere else.


def test_nothing_leads_out_of_the_data_folder(processor, tmp_path):
    data, outside = tmp_path / "data", tmp_path / "outside"
    for folder in (data, data / "sub", outside):
        folder.mkdir()
    (outside / "a.png").write_bytes(file_bytes(NOISE))
    (data / "a.png").write_bytes(file_bytes(NOISE))
    (data / "file.png").symlink_to(outside / "a.png")
    (data / "folder").symlink_to(outside)
    (data / "twice.png").symlink_to(data / "file.png")
    (data / "loop.png").symlink_to(data / "loop.png")
    (data / "inside.png").symlink_to(data / "a.png")
    os.mkfifo(data / "pipe.png")
    expected = {
        **dict.fromkeys(["a.png", "sub/../a.png", "inside.png", str(data / "a.png"), "./a.png"]),
        **dict.fromkeys(["../outside/a.png", "sub/../../outside/a.png", "/dev/zero"], "image_outside_folder"),
        **dict.fromkeys(["file.png", "folder/a.png", "twice.png", str(outside / "a.png")], "image_outside_folder"),
        **dict.fromkeys(["none.png", "sub", "loop.png", "pipe.png", "a.png\0", "a" * 5000, "\ud800"], "image_missing"),
    }
    for path, kind in expected.items():
        example = encode(GOOD | {"images": path}, processor, image_roots=(str(data),))
        assert example.bad_reason == kind, path


def test_an_unreadable_picture_of_a_command_line_is_one_line(tmp_path):
    (tmp_path / "a.png").write_bytes(b"")
    with pytest.raises(InputError) as e:
        read_image(str(tmp_path / "a.png"), image_roots=("/",))
    assert "\n" not in str(e.value)
