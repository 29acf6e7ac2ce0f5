"""One image file of any usual kind to 8-bit RGB pixels, or one clear reason why not.

Real folders hold CMYK JPEGs, palette PNGs, rotated photos and broken files; all of that ends here.
"""

from __future__ import annotations

from io import BytesIO
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from nrrdd_format.errors import DataError

EXTENSIONS = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
"""Endings (in any case) of the files that count as images; their content may be any of the formats below."""

FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
"""Pillow decoders that are tried; others start foreign programs (EPS) or are never used for photographs."""

MAX_FILE_BYTES = 1 << 28
MAX_PIXELS = 1 << 26
"""Bounds on what is read and decoded: a header of a few bytes can announce an image that fills the memory."""

_WITH_ALPHA = ("LA", "La", "PA", "RGBA", "RGBa")

MIN_SIDE = 2
"""Side in pixels below which an image shows nothing to learn from."""


class UnusableImage(DataError):
    """Bytes that do not give an image; `reason` says why, `path` is the file (None: bytes in memory)."""

    def __init__(self, reason: str, path: str | None = None) -> None:
        super().__init__(reason, path)
        self.reason = reason
        self.path = path

    def __str__(self) -> str:
        return self.reason if self.path is None else f"{self.path}: {self.reason}"


def read_rgb(source: Path | bytes) -> NDArray[np.uint8]:
    """Decodes one image: uint8 RGB (H, W, 3), upright.

    Grey becomes RGB, CMYK and palettes are converted, 16-bit greys scaled to 8, transparent parts laid on
    white, and the EXIF orientation applied. Of an animation the first frame counts.

    Raises:
        UnusableImage: not an image, truncated or damaged, a pixel wide, or beyond the bounds above.
        DataError: the file cannot be read at all (missing, no permission, failing disk).
    """
    if isinstance(source, bytes):
        return _decode(source)
    try:
        return _decode(_read_file(source))
    except UnusableImage as error:
        raise UnusableImage(error.reason, str(source)) from error


def resize_to(image: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """Cuts the centred square out of an image (H, W, 3) and resizes it to (size, size, 3).

    The same as resizing the shorter side and cropping the centre, without ever holding the long side resized.
    Bilinear, with antialiasing when it shrinks.
    """
    height, width = image.shape[:2]
    if height == width == size:
        return image
    side = min(height, width)
    left, top = (width - side) // 2, (height - side) // 2
    box = (left, top, left + side, top + side)
    return np.array(Image.fromarray(image).resize((size, size), Image.Resampling.BILINEAR, box=box))


def _read_file(path: Path) -> bytes:
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise UnusableImage(f"has more than the {MAX_FILE_BYTES} bytes allowed for an image file")
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error


def _decode(data: bytes) -> NDArray[np.uint8]:
    if not data:
        raise UnusableImage("is empty (0 bytes)")
    try:
        with Image.open(BytesIO(data), formats=FORMATS) as image:
            _check_extent(*image.size)
            image.load()
            return np.array(_to_rgb(ImageOps.exif_transpose(image)))
    except (UnusableImage, MemoryError):
        raise
    except UnidentifiedImageError as error:
        raise UnusableImage(f"is not an image of a known format ({', '.join(FORMATS)})") from error
    except Exception as error:  # Pillow's decoders meet damaged bytes with a dozen kinds of exception
        raise UnusableImage(f"cannot be decoded ({' '.join(str(error).split())})") from error


def _check_extent(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise UnusableImage(f"announces {width}x{height} pixels, more than the {MAX_PIXELS} allowed")
    if min(width, height) < MIN_SIDE:
        raise UnusableImage(f"is {width}x{height} pixels, expected {MIN_SIDE} or more on each side")


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise UnusableImage("has floating-point pixels, whose range is unknown")
    if image.mode.startswith("I"):
        return _from_16_bits(image)
    if image.mode in _WITH_ALPHA or "transparency" in image.info:
        layer = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
    return image.convert("RGB")


def _from_16_bits(image: Image.Image) -> Image.Image:
    """Scales 16-bit greys to 8 bits; Pillow's own conversion would clip all but the darkest 256 levels."""
    levels = np.asarray(image).astype(np.int64)
    if levels.min() < 0 or levels.max() > 65535:
        raise UnusableImage("has integer pixels beyond 16 bits, whose range is unknown")
    return Image.fromarray(((levels * 255 + 32767) // 65535).astype(np.uint8)).convert("RGB")
