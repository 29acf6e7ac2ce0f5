"""Further classes: what the teacher sees in each pair beside the pair's two classes (SPEC.md section 6).

Shapes: K epochs, P pairs an epoch, x further classes of each pair, C classes in all, L levels. In a record block they
are b + 1 columns: the b bytes of the class numbers, the lowest first, and the levels.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from nrrdd_format.codebooks import quantize
from nrrdd_format.errors import FormatError


def column_count(classes: int) -> int:
    """b + 1: a byte for each eight bits of a class number, and one for the level."""
    return -(-(classes - 1).bit_length() // 8) + 1


def pack_further(
    classes: Sequence[NDArray[np.int64]],
    distances: Sequence[NDArray[np.float32]],
    count: int,
    table: NDArray[np.float32],
) -> list[bytes]:
    """The columns of some epochs' further classes and their distances (P, x) each; `count` is C.

    Raises FormatError for classes or distances that break a rule.
    """
    numbers = np.stack(classes)  # (K, P, x)
    levels = quantize(np.stack(distances), table)
    for each in zip(numbers, levels, strict=True):
        _check(*each, count, len(table))
    planes = [*(numbers >> 8 * byte & 255 for byte in range(column_count(count) - 1)), levels]
    return [plane.astype(np.uint8).transpose(2, 0, 1).tobytes() for plane in planes]


def unpack_further(
    columns: NDArray[np.uint8], count: int, table: NDArray[np.float32]
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """One epoch's further classes and their distances, (P, x) each, from its part (b + 1, x, P) of the columns.

    Raises FormatError for what breaks a rule.
    """
    *planes, levels = columns.transpose(0, 2, 1)
    classes = sum((plane.astype(np.int64) << 8 * byte for byte, plane in enumerate(planes)), np.int64(0))
    assert isinstance(classes, np.ndarray)
    _check(classes, levels, count, len(table))
    return classes, table[levels]


def check_labels(classes: NDArray[np.int64], *own: NDArray[np.int64]) -> None:
    """Refuses further classes (P, x) that name a class of the pair itself, `own` (P,) each. Raises FormatError."""
    for labels in own:
        pairs = np.flatnonzero((classes == labels[:, None]).any(1))
        if len(pairs):
            raise FormatError(
                f"further classes of pair {pairs[0]}: name its own {labels[pairs[0]]}, expected others only"
            )


def _check(classes: NDArray[np.int64], levels: NDArray[np.uint8], count: int, high: int) -> None:
    """Classes (P, x) are known and all different, levels (P, x) known and not falling."""
    ordered = np.sort(classes, axis=1)
    faults = (
        ((classes >= count).any(1), f"expected classes less than {count}"),
        ((np.diff(ordered, axis=1) == 0).any(1), "expected different classes"),
        ((levels >= high).any(1), f"expected levels less than {high}"),
        ((levels[:, 1:] < levels[:, :-1]).any(1), "expected levels that do not fall"),
    )
    for wrong, expected in faults:
        if wrong.any():
            pair = int(np.flatnonzero(wrong)[0])
            found = f"classes {classes[pair].tolist()}, levels {levels[pair].tolist()}"
            raise FormatError(f"further classes of pair {pair}: {found}, {expected}")
