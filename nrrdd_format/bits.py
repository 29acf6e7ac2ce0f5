"""Bit packing: unsigned fields of known widths in one stream, lowest bit first (SPEC.md section 6)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

MAX_WIDTH = 18


def width_of(count: NDArray[np.int64] | int) -> NDArray[np.int64]:
    """Bits that hold every value in 0..count-1 (0 bits for a single value), elementwise."""
    return np.searchsorted(2 ** np.arange(MAX_WIDTH + 1), count).astype(np.int64)


def packed_bytes(widths: NDArray[np.int64]) -> int:
    """Length in bytes of fields with these widths, padded with zero bits to a whole byte."""
    return (int(widths.sum()) + 7) // 8


def pack(values: NDArray[np.int64], widths: NDArray[np.int64]) -> bytes:
    """Pack `values[i]` into `widths[i]` bits, in order; every width is at most MAX_WIDTH."""
    if values.shape != widths.shape or np.any(values < 0) or np.any(values >> widths):
        raise ValueError("bit packing: a value does not fit its width")
    bit = np.arange(MAX_WIDTH)
    table = ((values[:, None] >> bit) & 1).astype(np.uint8)
    return np.packbits(table[bit < widths[:, None]], bitorder="little").tobytes()


def unpack(stream: NDArray[np.uint8], widths: NDArray[np.int64]) -> NDArray[np.int64]:
    """The inverse of `pack`; the stream has exactly `packed_bytes(widths)` bytes, padding bits are ignored."""
    starts = np.cumsum(widths) - widths
    byte = starts >> 3
    padded = np.concatenate([stream, np.zeros(4, np.uint8)]).astype(np.int64)
    window = padded[byte]
    for k in range(1, 4):  # a field of up to 18 bits lies within four bytes
        window |= padded[byte + k] << (8 * k)
    values: NDArray[np.int64] = (window >> (starts & 7)) & ((1 << widths) - 1)
    return values


def padding_bits(stream: NDArray[np.uint8], widths: NDArray[np.int64]) -> int:
    """The padding bits of the last byte as a number; 0 in a well-formed stream."""
    used = int(widths.sum()) % 8
    return int(stream[-1]) >> used if used else 0
