"""Decoding of images in shards: Pillow's pixels whichever decoder made them, refusals before any pixel is decoded."""

from __future__ import annotations

import io
from typing import Any, NoReturn

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from nrrdd_format import decoding
from nrrdd_format.decoding import decode_image
from nrrdd_format.errors import FormatError
from nrrdd_format.image_file import plain_jpeg_size

SIDE = 21  # no multiple of a block's side
PIXELS = Image.fromarray(np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), np.uint8))
TURNED = Image.Exif()
TURNED[0x0112] = 6  # orientation: a quarter turn

PLAIN_JPEGS: dict[str, dict[str, Any]] = {
    "4:4:4": {"subsampling": 0},
    "4:2:2": {"subsampling": 1},
    "4:2:0": {"subsampling": 2},
    "coarse": {"quality": 5},
    "progressive": {"progressive": True, "quality": 90},
    "optimised": {"optimize": True},
    "restarts": {"restart_marker_blocks": 1},
    "EXIF": {"exif": TURNED},
    "comment": {"comment": b"\xff\xc0 is no frame here"},
    "RGB kept": {"keep_rgb": True},
}


def encoded(size: tuple[int, int], kind: str, mode: str = "RGB") -> bytes:
    return saved(Image.new(mode, size, 120), kind)


def saved(image: Image.Image, kind: str = "JPEG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def by_pillow(data: bytes) -> Tensor:
    return torch.from_numpy(np.array(Image.open(io.BytesIO(data)).convert("RGB"))).permute(2, 0, 1)


def unused(*_: object, **__: object) -> NoReturn:
    raise AssertionError("this decoder is not wanted here")


@pytest.mark.parametrize("options", PLAIN_JPEGS.values(), ids=PLAIN_JPEGS)
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_plain_jpegs_have_pillows_pixels(options: dict[str, Any], mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data = saved(PIXELS.convert(mode), **options)
    monkeypatch.setattr(decoding, "_decode_with_pillow", unused)
    image = decode_image(data, SIDE)
    assert torch.equal(image, by_pillow(data))
    assert (image.dtype, image.shape, image.stride(0)) == (torch.uint8, (3, SIDE, SIDE), 1)


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "CMYK"])
def test_other_images_are_pillows(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data = saved(PIXELS.convert("CMYK")) if kind == "CMYK" else saved(PIXELS, kind)
    monkeypatch.setattr(decoding, "decode_jpeg", unused)
    assert torch.equal(decode_image(data, SIDE), by_pillow(data))


@given(
    which=st.sampled_from([saved(PIXELS, **options) for options in PLAIN_JPEGS.values()]),
    changes=st.lists(st.tuples(st.integers(2, 2000), st.integers(0, 255)), max_size=4),
    end=st.integers(20, 4000),
)
def test_a_damaged_jpeg_is_refused_or_has_pillows_pixels(
    which: bytes, changes: list[tuple[int, int]], end: int
) -> None:
    data = bytearray(which[:end])
    for at, value in changes:
        data[at % len(data)] = value
    try:
        expected = by_pillow(bytes(data))
    except Exception:  # whatever Pillow stumbles over
        expected = None
    try:
        found = decode_image(bytes(data), SIDE)
    except FormatError:
        found = None
    if expected is None or expected.shape != (3, SIDE, SIDE):
        assert found is None or found.shape == (3, SIDE, SIDE)
    else:
        assert found is not None and torch.equal(found, expected)


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_another_size_is_refused_before_decoding(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded((9000, 6), kind)
    monkeypatch.setattr(decoding, "decode_jpeg", unused)
    with pytest.raises(FormatError, match="9000x6 pixels, expected 6x6"):
        decode_image(data[: 60 if kind == "PNG" else 700], 6)  # the header alone: the pixels are not there


@pytest.mark.parametrize("data", [b"", b"hello", encoded((6, 6), "GIF", mode="L"), encoded((6, 6), "JPEG")[:200]])
def test_what_is_no_image_is_refused(data: bytes) -> None:
    with pytest.raises(FormatError, match="fetch the file again"):
        decode_image(data, 6)


@pytest.mark.parametrize(("kind", "kept"), [("PNG", 45), ("JPEG", 630)])
def test_damaged_pixels_are_refused(kind: str, kept: int) -> None:
    with pytest.raises(FormatError, match="truncated"):
        decode_image(encoded((6, 6), kind)[:kept], 6)


def frame(marker: bytes = b"\xff\xc0", bits: int = 8, colours: int = 3) -> bytes:
    return marker + b"\x00\x11" + bytes([bits, 0, 5, 0, 7, colours]) + bytes(9)


@pytest.mark.parametrize(
    ("data", "size"),
    [
        (b"\xff\xd8" + frame(), (7, 5)),
        (b"\xff\xd8\xff\xe0\x00\x04ab\xff\xfe\x00\x02" + frame(b"\xff\xc2"), (7, 5)),
        (b"\xff\xd8" + frame(colours=1), (7, 5)),
        (frame(), None),  # no start of an image
        (b"\xff\xd8" + frame()[:9], None),  # the file ends within the frame's header
        (b"\xff\xd8" + frame(bits=12), None),
        (b"\xff\xd8" + frame(colours=4), None),
        (b"\xff\xd8" + frame(b"\xff\xc9"), None),  # arithmetic coding
        (b"\xff\xd8\xff\xe0\x00\x01" + frame(), None),  # a length shorter than its own two bytes
        (b"\xff\xd8\xff\xda\x00\x02" + frame(), None),  # a scan before any frame
        (b"\xff\xd8\x00" + frame(), None),  # a byte between segments, which decoders skip
        (b"\xff\xd8\xff" + frame(), None),  # a fill byte
    ],
)
def test_the_size_of_a_plain_jpeg(data: bytes, size: tuple[int, int] | None) -> None:
    assert plain_jpeg_size(data) == size
