"""An image member is one whole file: what decoders let pass is found all the same."""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from nrrdd_format.errors import FormatError
from nrrdd_format.image_file import check_image
from nrrdd_format.manifest import Codec

SIZE = 16
CODECS = get_args(Codec)


def picture(codec: str, size: int = SIZE, mode: str = "RGB", **options: Any) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (size, size, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(buffer, codec.upper(), **options)
    return buffer.getvalue()


EXIF = b"Exif\x00\x00II*\x00\x08\x00\x00\x00" + bytes(6)  # a table without entries
WHOLE: list[tuple[Codec, bytes]] = [
    ("png", picture("png")),
    ("png", picture("png", mode="L")),
    ("jpeg", picture("jpeg", quality=90)),
    ("jpeg", picture("jpeg", progressive=True)),  # several scans
    ("jpeg", picture("jpeg", mode="L", restart_marker_blocks=1)),
    ("jpeg", picture("jpeg", comment=b"\xff\xd9 is an end marker elsewhere")),
    ("jpeg", picture("jpeg", exif=EXIF)),
    ("webp", picture("webp")),
    ("webp", picture("webp", lossless=True)),
]


@pytest.mark.parametrize(("codec", "data"), WHOLE)
def test_whole_files_pass(codec: Codec, data: bytes) -> None:
    check_image(data, codec, SIZE)


@pytest.mark.parametrize(("codec", "mode"), [("png", "P"), ("png", "RGBA"), ("png", "1"), ("jpeg", "CMYK")])
def test_other_kinds_of_pixels_are_refused(codec: Codec, mode: str) -> None:
    """How they become RGB is each decoder's own, and the distances hold for one only."""
    with pytest.raises(FormatError, match=f"pixels of kind {mode}, expected 8-bit RGB or grey"):
        check_image(picture(codec, mode=mode), codec, SIZE)


def test_a_jpeg_that_repeats_a_scan_is_refused() -> None:
    """Each costs as much time as the whole image."""
    data = picture("jpeg", progressive=True)
    last = data.rindex(b"\xff\xda")
    with pytest.raises(FormatError, match=r"is a JPEG of about 1[0-9]{2} scans, expected at most 64"):
        check_image(data[:last] + data[last:-2] * 100 + data[-2:], "jpeg", SIZE)


@pytest.mark.parametrize(("codec", "data"), WHOLE)
def test_nothing_may_be_missing_or_follow(codec: Codec, data: bytes) -> None:
    for damaged in (data[:-1], data[:-2], data[:-12], data + b"\x00", data + data, data + b"\xff\xd9"):
        with pytest.raises(FormatError, match=f"is not a whole {codec} image"):
            check_image(damaged, codec, SIZE)


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


PNG = picture("png")


@pytest.mark.parametrize(
    "data",
    [
        PNG[:-12] + chunk(b"tEXt", b"no end"),
        PNG[:-1] + b"\x00",  # the end chunk's checksum
        PNG[:-12] + chunk(b"tEXt", b"note")[:-1] + b"\x00" + PNG[-12:],
        PNG[:-12] + struct.pack(">I", 2**31) + b"tEXt" + PNG[-12:],  # a length that lies
    ],
)
def test_every_chunk_of_a_png_counts(data: bytes) -> None:
    check_image(PNG[:-12] + chunk(b"tEXt", b"note") + PNG[-12:], "png", SIZE)
    with pytest.raises(FormatError, match="is not a whole png image"):
        check_image(data, "png", SIZE)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("data", [b"", b"text", b"\xff\xd8", b"\xff\xd8\xff\xe0\xff\xff", b"RIFF", PNG[:8]])
def test_what_is_no_image_is_refused(codec: Codec, data: bytes) -> None:
    with pytest.raises(FormatError, match="is not a whole"):
        check_image(data, codec, SIZE)


@pytest.mark.parametrize(("codec", "other"), [(a, b) for a in CODECS for b in CODECS if a != b])
def test_another_codec_is_refused(codec: Codec, other: Codec) -> None:
    with pytest.raises(FormatError, match=f"is not a whole {codec} image"):
        check_image(picture(other), codec, SIZE)


@pytest.mark.parametrize("codec", CODECS)
def test_the_size_is_checked_before_any_pixel(codec: Codec, monkeypatch: pytest.MonkeyPatch) -> None:
    data = picture(codec, 20)
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    with pytest.raises(FormatError, match="image is 20x20, expected 16x16"):
        check_image(data, codec, SIZE)


@given(codec_data=st.sampled_from(WHOLE), cut=st.integers(0, 2000), flips=st.lists(st.integers(0, 2000), max_size=4))
def test_damage_is_a_format_error_or_another_image(codec_data: tuple[Codec, bytes], cut: int, flips: list[int]) -> None:
    codec, data = codec_data
    damaged = bytearray(data[: max(0, len(data) - cut)])
    for at in flips:
        if damaged:
            damaged[at % len(damaged)] ^= 1 << at % 8
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, on odd metadata
        try:
            check_image(bytes(damaged), codec, SIZE)
        except FormatError:
            return
    assert not 0 < cut < len(data), "a truncated file passed"
