"""How large images are made: the folder's limits, the user's, and what fits the buckets."""

import numpy as np
import pytest
from helpers import make_processor_folder
from PIL import Image
from tiny_rows import GOOD, encode, picture

from vigos_jax.data.examples import row_size
from vigos_jax.data.processor import PixelLimits, Processor

SIZES = [(28, 28), (30, 40), (200, 100), (57, 900), (1400, 1000), (3000, 17), (640, 480), (27, 29)]


@pytest.fixture(scope="module", params=[14, 16])
def processor(tmp_path_factory, request):
    options = {"family": "qwen3_vl"} if request.param == 16 else {}
    return Processor.load(make_processor_folder(tmp_path_factory.mktemp("model"), max_pixels=250_000, **options))


def noise(width, height):
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("limits", [PixelLimits(), PixelLimits(90_000, 0), PixelLimits(1, 10_000)])
def test_a_layout_is_that_of_the_encoded_image(processor, size, limits):
    encoded = processor.encode_image(noise(*size), limits)
    layout = processor.image_layout(*size, limits)
    assert layout.grid == encoded.grid and len(encoded.patches) == np.prod(encoded.grid)
    assert processor.visual_tokens(*size, limits) == len(encoded.patches) // 4
    pixels = np.prod(encoded.grid) * processor.patch_size**2
    assert pixels <= max(processor.limits(limits).most, max(size) * processor.merge_unit)


def test_the_users_limits(processor):
    full, small = (processor.encode_image(noise(600, 400), PixelLimits(0, most)) for most in (0, 40_000))
    assert np.prod(small.grid) * processor.patch_size**2 <= 40_000 < np.prod(full.grid) * processor.patch_size**2
    large = processor.encode_image(noise(30, 30), PixelLimits(50_000, 0))
    assert np.prod(large.grid) * processor.patch_size**2 >= 50_000
    assert processor.limits(PixelLimits(0, 100)) == PixelLimits(100, 100)  # below the folder's least
    np.testing.assert_array_equal(full.patches, processor.encode_image(noise(600, 400)).patches)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5])
def test_a_videos_layout_is_that_of_the_encoded_video(processor, count):
    frames = [noise(120, 90)] * count
    layout = processor.video_layout([f.size for f in frames], fps=3.0)
    encoded = processor.encode_video(frames, fps=3.0)
    for a, b in zip(layout, encoded, strict=True):
        assert (a.grid, a.label, a.time_step) == (b.grid, b.label, b.time_step)


def tokens(processor, example) -> int:
    return sum(int(np.prod(image.grid)) for image in example.images) // processor.merge_size**2


def fits(processor, most: int):
    """A bucket of `most` visual tokens."""
    return lambda example: "patches_too_long" if tokens(processor, example) > most else None


@pytest.mark.slow
@pytest.mark.parametrize("most", [9, 16, 60, 200])
def test_a_photo_is_made_to_fit(processor, most):
    photo = GOOD | {"images": [Image.new("RGB", (4000, 3000))]}
    example = encode(photo, processor, too_long=fits(processor, most))
    assert example.bad_reason is None and example.shrunk
    assert 0.5 * most - 4 <= tokens(processor, example) <= most
    assert len(example.images[0].patches) == np.prod(example.images[0].grid)
    h, w = example.images[0].grid[1:]
    assert most < 50 or 1.1 < w / h < 1.6  # it keeps its shape


def test_what_fits_is_left_alone(processor):
    row = GOOD | {"images": [noise(200, 100)]}
    one, same = encode(row, processor), encode(row, processor, too_long=fits(processor, 300))
    assert not same.shrunk
    np.testing.assert_array_equal(one.images[0].patches, same.images[0].patches)


def test_images_of_a_row_share_one_limit(processor):
    """The same number of pixels for each: small ones keep theirs, what is left is the large ones'."""
    row = GOOD | {"images": [noise(60, 60), noise(2000, 1000), noise(1000, 2000)]}
    example = encode(row, processor, max_images=3, too_long=fits(processor, 120))
    small, wide, high = (int(np.prod(image.grid)) // 4 for image in example.images)
    assert example.images[0].grid == encode(GOOD | {"images": [noise(60, 60)]}, processor).images[0].grid
    assert small + wide + high <= 120 and abs(wide - high) <= 12 and wide > 3 * small


def test_frames_of_a_video_are_made_to_fit(processor):
    row = GOOD | {"images": [{"frames": [noise(900, 600)] * 4, "fps": 2.0}]}
    example = encode(row, processor, too_long=fits(processor, 80))
    assert example.shrunk and tokens(processor, example) <= 80 and tokens(processor, example) > 40


def test_what_cannot_fit_is_a_bad_row(processor):
    example = encode(GOOD | {"images": [noise(400, 300)]}, processor, too_long=lambda e: "prompt_too_long")
    assert example.bad_reason == "prompt_too_long"
    assert "images of 400 x 300 pixels" in example.bad_detail


def test_rows_are_grouped_by_the_size_they_get(processor):
    row = {"images": [picture(size=(900, 900))], "problem": ""}
    options = {"processor": processor, "image_roots": ()}
    assert row_size(row, **options, pixels=PixelLimits(0, 40_000)) < row_size(row, **options)
