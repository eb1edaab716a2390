"""Images as sent to servers: exactly the pixels that the processor's patches are made of.

A server resizes images with another library, which changes pixels, but leaves an image of the final size unchanged. So
the patches are turned back into the resized, upright RGB image.
"""

import base64
import io

import numpy as np
from PIL import Image

from vigos_jax.data.processor import EncodedImage, Processor


def pixels_of(image: EncodedImage, processor: Processor) -> np.ndarray:
    """The resized image of an `encode_image`, uint8 [H, W, 3]: equal to what was normalised and cut.

    ValueError for frames of a video.
    """
    t, h, w = image.grid
    if t != 1 or image.label is not None:
        raise ValueError("frames of a video are not an image")
    m, p, n = processor.merge_size, processor.patch_size, processor.frames_per_patch
    blocks = image.patches.reshape(h // m, w // m, m, m, 3, n, p, p)[:, :, :, :, :, 0]  # its n frames are equal
    pixels = blocks.transpose(0, 2, 5, 1, 3, 6, 4).reshape(h * p, w * p, 3)  # rows, columns, channels
    mean, std, scale = processor.normalization
    return np.clip(np.round((pixels * std + mean) / scale), 0, 255).astype(np.uint8)


def png_uri(image: EncodedImage, processor: Processor) -> str:
    """A data URL of `pixels_of`, compressed without loss."""
    file = io.BytesIO()
    Image.fromarray(pixels_of(image, processor)).save(file, "PNG", compress_level=1)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode("ascii")
