"""Bytes and seconds as people say them."""

from __future__ import annotations


def shown_duration(seconds: float) -> str:
    """0.31 s, 12 min, 3.4 h, 2.1 d, 7.3 years."""
    if seconds >= 2 * 365 * 86400:
        return f"{seconds / (365 * 86400):.3g} years"
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"


def shown_size(count: float) -> str:
    """532 bytes, 1.5 KB, 42 MB."""
    for unit, length in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("KB", 1e3)):
        if count >= length:
            return f"{count / length:.3g} {unit}"
    return f"{count:.0f} bytes"
