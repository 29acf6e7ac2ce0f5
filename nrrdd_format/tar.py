"""The USTAR subset that shards use: every byte follows from member names and sizes (SPEC.md section 4)."""

from __future__ import annotations

import struct

from nrrdd_format.errors import FormatError

BLOCK = 512
END = bytes(2 * BLOCK)
_LAYOUT = struct.Struct("100s8s8s8s12s12s8s1s100s6s2s32s32s8s8s155s12x")


def header(name: str, size: int) -> bytes:
    """The 512-byte header of a regular file: mode 0644 and every other piece of metadata zero or empty."""
    encoded = name.encode("ascii")
    if not 0 < len(encoded) <= 100 or not 0 <= size < 8**11:
        raise ValueError(f"tar member {name!r} of {size} bytes does not fit a USTAR header")
    zero, big = b"0000000", b"00000000000"
    block = _LAYOUT.pack(
        encoded, b"0000644", zero, zero, b"%011o" % size, big, b" " * 8, b"0",  # name .. typeflag
        b"", b"ustar", b"00", b"", b"", b"", b"", b"",  # linkname .. prefix
    )  # fmt: skip
    checksum = b"%06o\0 " % sum(block)
    return block[:148] + checksum + block[156:]


def stated_size(block: bytes) -> int:
    """The size field of a header block. Raises FormatError if it is not octal digits."""
    digits = block[124:135]
    if not digits.isdigit() or b"8" in digits or b"9" in digits:
        raise FormatError(f"tar header states size {digits!r}, expected 11 octal digits")
    return int(digits, 8)


def padded(size: int) -> int:
    """`size` rounded up to whole blocks: the room a member's data takes."""
    return -(-size // BLOCK) * BLOCK
