"""Encoding: refined images become the bytes that a shard holds, and come back as everyone will see them."""

from __future__ import annotations

import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from builders.config import EncodingSettings


def encode_image(image: NDArray[np.uint8], settings: EncodingSettings) -> bytes:
    """Encodes one image.

    Args:
        image: (3, S, S) uint8 RGB.
        settings: codec and quality.
    """
    picture = Image.fromarray(np.ascontiguousarray(image.transpose(1, 2, 0)))
    buffer = io.BytesIO()
    if settings.codec == "png":
        picture.save(buffer, "PNG", optimize=True)
    elif settings.codec == "webp":
        picture.save(buffer, "WEBP", quality=settings.quality, method=6)
    else:
        # 4:4:4: refinement writes fine colour detail that chroma subsampling would throw away.
        picture.save(buffer, "JPEG", quality=settings.quality, subsampling=0, optimize=True)
    return buffer.getvalue()
