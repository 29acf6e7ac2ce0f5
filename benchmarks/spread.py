"""How repeated measurements are summed up in the reports: one value a seed."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean, stdev

T_95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}
"""Student's t: half the width of a mean's 95 % interval in standard errors, by the number of values."""


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Mean and sample standard deviation; the mean alone of a single value."""
    average = f"{mean(values):.{digits}f}"
    return f"{average} ± {stdev(values):.{digits}f}" if len(values) > 1 else average


def interval(before: Sequence[float], after: Sequence[float]) -> str:
    """Mean of the paired differences, signed, with its 95 % interval; the mean alone outside 2 to 10 values."""
    paired = gaps(before, after)
    count = len(paired)
    width = f" ± {T_95[count] * stdev(paired) / count**0.5:.2f}" if count in T_95 else ""
    return f"{mean(paired):+.2f}{width}"


def gaps(before: Sequence[float], after: Sequence[float]) -> list[float]:
    """What each seed gained."""
    return [late - early for early, late in zip(before, after, strict=True)]
