"""A compressed msgpack map behind its length and checksum: u32 length, u32 crc32, payload (SPEC.md section 4)."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import msgpack
import zstandard

from nrrdd_format.compression import decompress, stated_size
from nrrdd_format.errors import ConfigError, FormatError, shown
from nrrdd_format.limits import MAX_EPOCHS, MAX_HEADER_BYTES, MAX_IMAGES

PREFIX = struct.Struct("<II")
_MAX_LIST = max(MAX_EPOCHS, MAX_IMAGES + 1)
_MAX_ENTRIES = 4 * MAX_IMAGES + 64  # of all lists together: a row of three for each member
_MAX_KEYS = 64  # of all maps together
_ZSTD_LEVEL = 19


def pack_frame(content: dict[str, Any]) -> bytes:
    """Frame a map of plain values."""
    packed: bytes = msgpack.packb(content, use_bin_type=True)
    if len(packed) > MAX_HEADER_BYTES:
        raise ConfigError(
            f"header of {len(packed)} bytes, expected at most {MAX_HEADER_BYTES}: put fewer images in a shard"
        )
    payload = zstandard.ZstdCompressor(level=_ZSTD_LEVEL).compress(packed)
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
    size = stated_size(payload, "header")
    if size > MAX_HEADER_BYTES:
        raise FormatError(f"header states {size} bytes of content, expected at most {MAX_HEADER_BYTES}")
    return _unpack_map(decompress(payload, size, "header"))


def list_in(content: Mapping[str, Any], key: str, low: int, high: int) -> list[Any]:
    """The list of low..high entries that a frame's map has under this key. Raises FormatError if it has none."""
    value = content.get(key)
    if not isinstance(value, list) or not low <= len(value) <= high:
        found = f"{len(value)} entries" if isinstance(value, list) else shown(value)
        raise FormatError(f"{key}: {found}, expected a list of {low if low == high else f'{low}..{high}'} entries")
    return value


def _unpack_map(packed: bytes) -> dict[str, Any]:
    try:
        content = msgpack.unpackb(
            packed,
            max_str_len=4096,
            max_bin_len=0,
            max_array_len=_MAX_LIST,
            max_map_len=_MAX_KEYS,
            max_ext_len=0,
            ext_hook=_refuse_extension,  # an empty one, which max_ext_len lets pass
            list_hook=_at_most(_MAX_ENTRIES, "list entries"),
            object_pairs_hook=_unique_at_most(_MAX_KEYS),
        )
    except (ValueError, msgpack.UnpackException) as error:  # malformed, or longer than allowed
        raise FormatError(f"header is not the expected msgpack: {error}") from None
    if not isinstance(content, dict):
        raise FormatError(f"header holds a {type(content).__name__}, expected a map")
    return content


def _unique_at_most(limit: int) -> Callable[[list[tuple[Any, Any]]], dict[Any, Any]]:
    """Makes maps of pairs, each key once, and counts them."""
    count = _at_most(limit, "map keys")

    def make(pairs: list[tuple[Any, Any]]) -> dict[Any, Any]:
        made = dict(pairs)
        if len(made) != len(pairs):
            raise ValueError("a key appears twice in a map")
        count(made)
        _refuse_binary(made.values())
        return made

    return make


def _at_most(limit: int, what: str) -> Callable[[Any], Any]:
    """Counts containers and what they hold while they are decoded: millions of empty ones fit into a few bytes."""
    count = 0

    def check(value: Any) -> Any:
        nonlocal count
        count += len(value) or 1
        if count > limit:
            raise ValueError(f"more than {limit} {what}")
        _refuse_binary(value)
        return value

    return check


def _refuse_binary(values: Iterable[Any]) -> None:
    """Also an empty one, which max_bin_len lets pass."""
    if bytes in map(type, values):
        raise ValueError("a binary value")


def _refuse_extension(code: int, data: bytes) -> Any:
    raise ValueError(f"a value of extension type {code}")
