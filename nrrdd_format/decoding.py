"""Decoding of images in shards, for builder and loader alike.

JPEG in the form that encoders write goes through simplejpeg, which takes less time than Pillow for the same pixels
(`benchmarks/decoders.py`); all else through Pillow, which also says what is wrong with a file.
"""

from __future__ import annotations

import io

import numpy as np
import torch
from PIL import Image
from simplejpeg import decode_jpeg
from torch import Tensor

from nrrdd_format.errors import FormatError
from nrrdd_format.image_file import check_scans, decoder_words, plain_jpeg_size

PICTURE_FORMATS = ("JPEG", "PNG", "WEBP")


def decode_image(data: bytes, size: int) -> Tensor:
    """Decodes one image of a shard.

    The size in the header is checked before any pixel is decoded, so a damaged file cannot ask for gigabytes.

    Args:
        data: the encoded JPEG, PNG or WebP file.
        size: S, the side that the manifest promises.

    Returns:
        (3, S, S) uint8 RGB, channels last in memory.

    Raises:
        FormatError: no such image, or another size. The caller adds shard and member (`FormatError.located`).
    """
    check_scans(data)
    if plain_jpeg_size(data) == (size, size):
        try:
            return torch.from_numpy(decode_jpeg(data)).permute(2, 0, 1)
        except ValueError:  # damaged: Pillow shows what of it there is, or says what is wrong
            pass
    return _decode_with_pillow(data, size)


def _decode_with_pillow(data: bytes, size: int) -> Tensor:
    try:
        picture = Image.open(io.BytesIO(data), formats=PICTURE_FORMATS)
        if picture.size == (size, size):
            rgb = picture if picture.mode == "RGB" else picture.convert("RGB")  # which copies even then
            return torch.from_numpy(np.array(rgb)).permute(2, 0, 1)
    except Exception as error:  # Pillow's decoders raise whatever they stumble over
        found = decoder_words(error)
        raise FormatError(f"not a readable JPEG, PNG or WebP image ({found}); fetch the file again") from error
    width, height = picture.size
    raise FormatError(f"image of {width}x{height} pixels, expected {size}x{size} as in the manifest")
