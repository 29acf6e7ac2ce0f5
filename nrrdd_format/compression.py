"""zstd frames whose size is known, or bounded, before anything is unpacked."""

from __future__ import annotations

import zstandard

from nrrdd_format.errors import FormatError


def stated_size(data: bytes, what: str) -> int:
    """The content size that a zstd frame states. Raises FormatError, naming `what`, if it states none."""
    try:
        size: int = zstandard.get_frame_parameters(data).content_size
    except zstandard.ZstdError as error:
        raise FormatError(f"{what} is not a valid zstd frame: {error}") from None
    if size == zstandard.CONTENTSIZE_UNKNOWN:
        raise FormatError(f"{what} states no length of its content")
    return size


def decompress(data: bytes, size: int, what: str) -> bytes:
    """The content of the one zstd frame in `data`, which must be of `size` bytes; nothing larger is allocated.

    Raises:
        FormatError: naming `what`, however the bytes are wrong.
    """
    stated = stated_size(data, what)
    if stated != size:
        raise FormatError(f"{what} states {stated} bytes of content, expected {size}")
    try:
        content: bytes = zstandard.ZstdDecompressor().decompress(data, max_output_size=size, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise FormatError(f"{what} is not a valid zstd frame: {error}") from None
    if len(content) != size:
        raise FormatError(f"{what} holds {len(content)} bytes of content, expected {size}")
    return content
