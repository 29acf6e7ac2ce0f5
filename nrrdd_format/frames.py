"""A msgpack map behind its length and checksum: u32 length, u32 crc32, payload (SPEC.md section 4)."""

from __future__ import annotations

import struct
import zlib
from typing import Any

import msgpack

from nrrdd_format.errors import FormatError
from nrrdd_format.limits import MAX_EPOCHS, MAX_HEADER_BYTES, MAX_IMAGES

PREFIX = struct.Struct("<II")
_MAX_LIST = max(MAX_EPOCHS, MAX_IMAGES + 1)


def pack_frame(content: dict[str, Any]) -> bytes:
    """Frame a map of plain values."""
    payload: bytes = msgpack.packb(content, use_bin_type=True)
    if len(payload) > MAX_HEADER_BYTES:
        raise ValueError(f"header of {len(payload)} bytes is over the limit of {MAX_HEADER_BYTES}")
    return PREFIX.pack(len(payload), zlib.crc32(payload)) + payload


def payload_length(prefix: bytes, room: int) -> int:
    """The payload's length according to the prefix, if it fits into `room` bytes and the limit."""
    if len(prefix) < PREFIX.size:
        raise FormatError(f"{len(prefix)} bytes, expected at least {PREFIX.size}")
    length: int = PREFIX.unpack(prefix[: PREFIX.size])[0]
    if length > min(room - PREFIX.size, MAX_HEADER_BYTES):
        raise FormatError(f"header states {length} bytes, expected at most {min(room - PREFIX.size, MAX_HEADER_BYTES)}")
    return length


def unpack_frame(data: bytes) -> dict[str, Any]:
    """The map in a frame that fills `data` exactly. Raises FormatError if it does not, or is damaged."""
    length, crc = payload_length(data, len(data)), PREFIX.unpack(data[: PREFIX.size])[1]
    payload = data[PREFIX.size :]
    if len(payload) != length:
        raise FormatError(f"header states {length} bytes, found {len(payload)}")
    if zlib.crc32(payload) != crc:
        raise FormatError(f"header has crc32 {zlib.crc32(payload):08x}, expected {crc:08x}")
    return _unpack_map(payload)


def _unpack_map(payload: bytes) -> dict[str, Any]:
    try:
        content = msgpack.unpackb(
            payload, max_str_len=4096, max_bin_len=0, max_array_len=_MAX_LIST, max_map_len=64, max_ext_len=0
        )
    except (ValueError, msgpack.UnpackException) as error:  # malformed, or longer than allowed
        raise FormatError(f"header is not the expected msgpack: {error}") from None
    if not isinstance(content, dict):
        raise FormatError(f"header holds a {type(content).__name__}, expected a map")
    return content
