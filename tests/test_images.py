"""builders.images on real bytes: every kind of image it must read, and every kind of file it must refuse."""

from __future__ import annotations

import os
import pickle
import struct
import zlib
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from builders import images
from builders.images import UnusableImage, read_rgb, resize_to
from nrrdd_format.errors import DataError

PIXELS = np.random.Generator(np.random.Philox(7)).integers(0, 256, (40, 30, 3), dtype=np.uint8)
RED, WHITE = [255, 0, 0], [255, 255, 255]


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def photo(kind: str = "JPEG") -> bytes:
    return encoded(Image.fromarray(PIXELS), kind)


def png_announcing(width: int, height: int) -> bytes:
    """A small PNG whose header claims any size."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 10)) + chunk(b"IEND", b"")
    )


def turned_jpeg(orientation: int) -> bytes:
    """A photo, red above and white below, that asks to be turned when shown."""
    image = Image.new("RGB", (32, 32), "white")
    image.paste("red", (0, 0, 32, 16))
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(image, "JPEG", exif=exif, quality=100, subsampling=0)


@pytest.mark.parametrize("kind", ["BMP", "PNG", "PPM", "TIFF"])
def test_lossless_formats_give_their_pixels(kind: str) -> None:
    np.testing.assert_array_equal(read_rgb(photo(kind)), PIXELS)


@pytest.mark.parametrize("kind", ["GIF", "JPEG", "WEBP"])
def test_other_formats_are_read(kind: str) -> None:
    result = read_rgb(photo(kind))
    assert result.shape == (40, 30, 3)
    assert result.dtype == np.uint8


def test_content_counts_not_the_file_ending(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    path.write_bytes(photo("PNG"))
    np.testing.assert_array_equal(read_rgb(path), PIXELS)


def test_cmyk_jpeg() -> None:
    cyan = read_rgb(encoded(Image.new("CMYK", (8, 8), (255, 0, 0, 0)), "JPEG", quality=100))
    np.testing.assert_allclose(cyan[0, 0].astype(int), [0, 255, 255], atol=2)


def test_palette_png() -> None:
    image = Image.new("P", (4, 4), 1)
    image.putpalette(WHITE + RED)
    assert read_rgb(encoded(image, "PNG"))[0, 0].tolist() == RED


def test_transparent_palette_png_is_laid_on_white() -> None:
    image = Image.new("P", (4, 4), 0)
    image.putpalette(RED)
    assert read_rgb(encoded(image, "PNG", transparency=0))[0, 0].tolist() == WHITE


@pytest.mark.parametrize(("alpha", "expected"), [(255, [200, 0, 0]), (0, WHITE), (128, [227, 127, 127])], ids=str)
def test_alpha_is_laid_on_white(alpha: int, expected: list[int]) -> None:
    pixel = read_rgb(encoded(Image.new("RGBA", (4, 4), (200, 0, 0, alpha)), "PNG"))[0, 0]
    np.testing.assert_allclose(pixel.astype(int), expected, atol=1)


def test_grey_with_alpha() -> None:
    assert read_rgb(encoded(Image.new("LA", (4, 4), (0, 0)), "PNG"))[0, 0].tolist() == WHITE


def test_grey_becomes_rgb() -> None:
    assert read_rgb(encoded(Image.new("L", (4, 4), 77), "PNG"))[0, 0].tolist() == [77, 77, 77]


def test_black_and_white_becomes_rgb() -> None:
    assert read_rgb(encoded(Image.new("1", (4, 4), 1), "PNG"))[0, 0].tolist() == WHITE


@pytest.mark.parametrize(("level", "expected"), [(0, 0), (256, 1), (40000, 156), (65535, 255)])
@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bit_greys_are_scaled_not_clipped(kind: str, level: int, expected: int) -> None:
    data = encoded(Image.fromarray(np.full((4, 4), level, dtype=np.uint16)), kind)
    assert read_rgb(data)[0, 0].tolist() == [expected] * 3


@pytest.mark.parametrize(
    ("orientation", "red_side"),
    [
        (1, np.s_[:8, :]),
        (3, np.s_[-8:, :]),
        (6, np.s_[:, -8:]),
        (8, np.s_[:, :8]),
    ],
    ids=["upright", "half turn", "quarter right", "quarter left"],
)
def test_exif_orientation_is_applied(orientation: int, red_side: tuple[slice, slice]) -> None:
    side = read_rgb(turned_jpeg(orientation))[red_side]
    np.testing.assert_allclose(side.reshape(-1, 3).mean(axis=0), RED, atol=5)


def test_garbage_in_exif_does_not_spoil_an_image() -> None:
    data = encoded(Image.fromarray(PIXELS), "JPEG", exif=b"Exif\0\0no TIFF header at all")
    assert read_rgb(data).shape == (40, 30, 3)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "is empty"),
        (bytes(1000), "not an image"),
        (b"<html>404 not found</html>", "not an image"),
        (photo("EPS"), "not an image"),
        (photo()[:10], "cannot be decoded"),
        (photo()[: len(photo()) // 2], "truncated"),
        (photo()[:-2], "truncated"),
        (photo("PNG")[: len(photo("PNG")) // 2], "truncated"),
        (encoded(Image.new("RGB", (1, 1)), "PNG"), "1x1 pixels"),
        (encoded(Image.new("RGB", (500, 1)), "PNG"), "500x1 pixels"),
        (png_announcing(9000, 9000), "9000x9000 pixels"),
        (png_announcing(60000, 60000), "decompression bomb"),
        (encoded(Image.fromarray(np.ones((4, 4), dtype=np.float32)), "TIFF"), "floating-point"),
        (encoded(Image.fromarray(np.full((4, 4), 1 << 20, dtype=np.int32)), "TIFF"), "beyond 16 bits"),
    ],
    ids=[
        "empty",
        "zeros",
        "text",
        "foreign format",
        "start of header",
        "half a JPEG",
        "JPEG without its end",
        "half a PNG",
        "one pixel",
        "one row",
        "large header",
        "huge header",
        "floats",
        "32-bit integers",
    ],
)
def test_unusable_bytes_say_why(data: bytes, reason: str) -> None:
    with pytest.raises(UnusableImage, match=reason) as caught:
        read_rgb(data)
    assert "\n" not in str(caught.value)


def test_damaged_png_data() -> None:
    data = bytearray(photo("PNG"))
    data[len(data) // 2] ^= 0xFF
    with pytest.raises(UnusableImage, match="cannot be decoded"):
        read_rgb(bytes(data))


def test_a_size_between_our_bound_and_pillows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "MAX_PIXELS", 40 * 30 - 1)
    with pytest.raises(UnusableImage, match="30x40 pixels, more than the 1199 allowed"):
        read_rgb(photo())


def test_a_file_beyond_the_bound_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "huge.png"
    path.touch()
    os.truncate(path, images.MAX_FILE_BYTES + 1)
    with pytest.raises(UnusableImage, match="more than the 268435456 bytes"):
        read_rgb(path)


def test_the_error_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "page.jpg"
    path.write_text("hello")
    with pytest.raises(UnusableImage) as caught:
        read_rgb(path)
    assert caught.value.path == str(path)
    assert str(caught.value).startswith(f"{path}: is not an image")


def test_a_missing_file_is_no_unusable_image(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gone\.jpg: cannot be read \(No such file") as caught:
        read_rgb(tmp_path / "gone.jpg")
    assert not isinstance(caught.value, UnusableImage)


def test_the_error_survives_a_trip_between_processes() -> None:
    error = pickle.loads(pickle.dumps(UnusableImage("is empty", "a/b.jpg")))
    assert (str(error), error.reason, error.path) == ("a/b.jpg: is empty", "is empty", "a/b.jpg")


@given(
    position=st.floats(0, 1, exclude_max=True),
    flip=st.integers(1, 255),
    kind=st.sampled_from(["GIF", "JPEG", "PNG", "TIFF", "WEBP"]),
)
def test_any_damaged_byte_gives_an_image_or_one_error(position: float, flip: int, kind: str) -> None:
    data = bytearray(photo(kind))
    data[int(position * len(data))] ^= flip
    try:
        assert read_rgb(bytes(data)).dtype == np.uint8
    except UnusableImage as error:
        assert "\n" not in str(error)


def test_a_square_of_the_right_size_stays_as_it_is() -> None:
    square = PIXELS[:30]
    np.testing.assert_array_equal(resize_to(square, 30), square)


@pytest.mark.parametrize("shape", [(40, 30), (30, 40), (31, 30), (30, 30)])
def test_only_the_centre_is_kept(shape: tuple[int, int]) -> None:
    tall = np.zeros((*shape, 3), dtype=np.uint8)
    top, left = (shape[0] - 30) // 2, (shape[1] - 30) // 2
    tall[top : top + 30, left : left + 30] = PIXELS[:30]
    np.testing.assert_array_equal(resize_to(tall, 30), PIXELS[:30])


@pytest.mark.parametrize("size", [6, 12, 60])
def test_resizing_is_that_of_the_shorter_side_then_the_centre(size: int) -> None:
    whole = Image.fromarray(PIXELS).resize((size, size * 40 // 30), Image.Resampling.BILINEAR)
    top = (whole.height - size) // 2
    np.testing.assert_array_equal(resize_to(PIXELS, size), np.asarray(whole)[top : top + size])


def test_a_very_long_image_costs_no_more_than_a_square() -> None:
    assert resize_to(np.zeros((2, 60000, 3), dtype=np.uint8), 224).shape == (224, 224, 3)
