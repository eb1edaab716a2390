"""Images for servers: the pixels that the processor cut, bit by bit, and the same patches when they are read again."""

import base64
import io

import numpy as np
import pytest
from helpers import make_processor_folder
from PIL import Image

from vigos_jax.data.processor import PixelLimits, Processor
from vigos_jax.rollouts.server_images import pixels_of, png_uri


@pytest.fixture(scope="module", params=["qwen2_5_vl", "qwen3_vl"])
def processor(request, tmp_path_factory):
    return Processor.load(make_processor_folder(tmp_path_factory.mktemp("folder"), family=request.param))


def noise(width, height, mode="RGB"):
    channels = {"RGB": 3, "RGBA": 4}[mode]
    pixels = np.random.default_rng(width).integers(0, 256, (height, width, channels), np.uint8)
    return Image.fromarray(pixels, mode)


def resized(image, processor, limits):
    """By the processor's own resize, without what it does afterwards."""
    p = processor._image_processor
    size = {"shortest_edge": limits.least, "longest_edge": limits.most}
    options = {"do_rescale": False, "do_normalize": False, "size": size, "return_tensors": "np"}
    raw = p(images=image, input_data_format="channels_last", **options)
    _, h, w = raw["image_grid_thw"][0]
    m, s, n = p.merge_size, p.patch_size, p.temporal_patch_size
    x = raw["pixel_values"].reshape(h // m, w // m, m, m, 3, n, s, s)
    out = np.zeros((h * s, w * s, 3), np.uint8)
    for (a, b, c, d), _ in np.ndenumerate(x[..., 0, 0, 0, 0]):  # patch by patch, not as the code under test does it
        top, left = (a * m + c) * s, (b * m + d) * s
        out[top : top + s, left : left + s] = x[a, b, c, d, :, 1].transpose(1, 2, 0)
    return out


@pytest.mark.parametrize("size", [(84, 84), (97, 61), (31, 140), (13, 11), (400, 333)])
def test_pixels_are_the_processors_own(processor, size):
    image = noise(*size)
    encoded = processor.encode_image(image)
    pixels = pixels_of(encoded, processor)
    np.testing.assert_array_equal(pixels, resized(image, processor, processor.limits()))
    assert pixels.shape[:2] == tuple(side * processor.patch_size for side in encoded.grid[1:])


def test_a_png_is_read_as_the_same_patches(processor):
    for image in (noise(97, 61), noise(50, 120, "RGBA")):
        encoded = processor.encode_image(image, PixelLimits(most=2 * 56 * 112))
        data = base64.b64decode(png_uri(encoded, processor).removeprefix("data:image/png;base64,"))
        again = processor.encode_image(Image.open(io.BytesIO(data)))
        assert again.grid == encoded.grid
        np.testing.assert_array_equal(again.patches, encoded.patches)


def test_frames_of_a_video_are_not_an_image(processor):
    (frames, *_) = processor.encode_video([noise(84, 84)] * 2, fps=2.0)
    with pytest.raises(ValueError, match="video"):
        pixels_of(frames, processor)
