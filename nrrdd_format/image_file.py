"""Image members: whether the bytes are one whole JPEG, PNG or WebP file of the manifest's size (SPEC.md section 4).

Decoders stop once they have all pixels, so they accept a file that lost its end or has something behind it. A file's
own structure says where it ends.
"""

from __future__ import annotations

import io
import re
import struct
import zlib

from PIL import Image

from nrrdd_format.errors import FormatError
from nrrdd_format.manifest import Codec

_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_PNG_DEPTH = 24
"""Where the first chunk states the bits of a colour."""
_PNG_CHUNK = struct.Struct(">I4s")  # length of the data, type; a CRC-32 follows the data
# JPEG markers: an end, those without a length, and the one that compressed data follow.
_EOI, _SOS, _BARE = 0xD9, 0xDA, {0x01, *range(0xD0, 0xD9)}
_JPEG_MARKER = re.compile(rb"\xff+([^\x00\xff])")
_JPEG_SCAN_END = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")  # in compressed data, FF stands before 00 or a restart


_SOI = b"\xff\xd8"
_FRAME = struct.Struct(">HHBHHB")  # marker, length, bits of a sample, height, width, components
_FRAMES = {0xFFC0, 0xFFC1, 0xFFC2}
_BEFORE_FRAME = {0xFFC4, 0xFFDB, 0xFFDD, *range(0xFFE0, 0xFFF0), 0xFFFE}
_MODES = ("RGB", "L")
_SCAN = re.compile(rb"\xff\xda")  # found twice as fast as by bytes.count
_MAX_SCANS = 64


def check_scans(data: bytes) -> None:
    """Refuses a JPEG with more scans than any encoder makes: each costs as much time as the whole image.

    The marker cannot stand inside compressed data. Raises FormatError.
    """
    if data.startswith(_SOI) and (scans := sum(1 for _ in _SCAN.finditer(data))) > _MAX_SCANS:
        raise FormatError(f"is a JPEG of about {scans} scans, expected at most {_MAX_SCANS}")


def plain_jpeg_size(data: bytes) -> tuple[int, int] | None:
    """Width and height of a JPEG in the form that encoders write; None for all else.

    That is 8-bit grey or colours in baseline, extended or progressive coding, and before the frame nothing but tables,
    comments and application data, one behind the other: whoever decodes it finds the same frame.
    """
    if not data.startswith(_SOI):
        return None
    at = len(_SOI)
    while len(data) >= at + _FRAME.size:
        kind, length, bits, height, width, colours = _FRAME.unpack_from(data, at)
        if kind in _FRAMES:
            return (width, height) if bits == 8 and colours in (1, 3) else None
        if kind not in _BEFORE_FRAME or length < 2:
            return None
        at += 2 + length
    return None


def check_image(data: bytes, codec: Codec, size: int) -> None:
    """Decode an image and check that it ends where its file ends.

    Its header must state the codec and S × S pixels before any pixel is decoded. Raises FormatError.
    """
    check_scans(data)
    try:
        with Image.open(io.BytesIO(data), formats=(codec.upper(),)) as image:
            if image.size == (size, size) and image.mode in _MODES:
                image.load()
    except Exception as error:  # Pillow's decoders raise whatever they stumble over
        raise FormatError(f"is not a whole {codec} image: {decoder_words(error)}") from None
    if image.size != (size, size):
        raise FormatError(f"image is {image.size[0]}x{image.size[1]}, expected {size}x{size} (manifest)")
    if image.mode not in _MODES:
        raise FormatError(f"image has pixels of kind {image.mode}, expected 8-bit RGB or grey")
    if codec == "png" and data[_PNG_DEPTH] != 8:  # which Pillow reads as 8-bit
        raise FormatError(f"image has {data[_PNG_DEPTH]} bits a colour, expected 8")
    try:
        end = {"jpeg": _jpeg_end, "png": _png_end, "webp": _webp_end}[codec](data)
    except (IndexError, struct.error):  # a length that points past the end
        end = None
    if end is None:
        raise FormatError(f"is not a whole {codec} image: {_MISSING[codec]}")
    if end != len(data):
        raise FormatError(f"is not a whole {codec} image: its end is at byte {end}, expected {len(data)} (member size)")


def decoder_words(error: Exception) -> str:
    """What a decoder says, without the name of the object it was given."""
    return re.sub(r" *<[^<>]*>", "", str(error).partition("\n")[0]) or type(error).__name__


_MISSING = {
    "jpeg": "the file ends before its end marker (EOI)",
    "png": "the file ends before its end chunk (IEND), or a chunk is damaged",
    "webp": "the file ends before its RIFF container",
}


def _jpeg_end(data: bytes) -> int | None:
    """Where the end marker ends."""
    at = 0
    while (marker := _JPEG_MARKER.match(data, at)) is not None:
        kind, at = marker[1][0], marker.end()
        if kind == _EOI:
            return at
        if kind in _BARE:
            continue
        at += struct.unpack_from(">H", data, at)[0]
        if kind == _SOS:
            following = _JPEG_SCAN_END.search(data, at)
            at = len(data) if following is None else following.start()
    return None


def _png_end(data: bytes) -> int | None:
    """Where the end chunk ends, if every chunk matches its checksum."""
    at, kind = len(_PNG_SIGNATURE), b""
    while kind != b"IEND":
        length, kind = _PNG_CHUNK.unpack_from(data, at)
        end = at + _PNG_CHUNK.size + length
        if zlib.crc32(data[at + 4 : end]) != struct.unpack_from(">I", data, end)[0]:
            return None
        at = end + 4
    return at


def _webp_end(data: bytes) -> int | None:
    """Where the RIFF container ends, if the file holds all of it."""
    end: int = 8 + struct.unpack_from("<I", data, 4)[0]
    return end if end <= len(data) else None
