"""How well level tables of one size fit real distances: their errors and what they cost, on kept samples.

Shapes: N pairs in a sample, L levels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.exact_distances import joint_entropy, load_sample
from benchmarks.results_io import markdown_table
from nrrdd_format.codebooks import distance_levels, quantize

LEVELS = 16
KNEES = (0.1, 0.3, 1.0)


@dataclass(frozen=True, kw_only=True)
class Fit:
    """A table of levels on a sample.

    Attributes:
        error_d, error_p: mean of |d − level| in nats, and of |exp(−d) − exp(−level)|.
        bits: joint entropy of both levels of a pair.
    """

    spacing: str
    sample: str
    error_d: float
    error_p: float
    bits: float


def measure_spacings(samples: Sequence[Path]) -> list[Fit]:
    """Every spacing on every sample."""
    tables = {"log d, from 0.001": np.geomspace(1e-3, 16, LEVELS).astype(np.float32)}
    tables |= {f"log(1 + d / {knee})": distance_levels(LEVELS, knee=knee) for knee in KNEES}
    return [_fit(spacing, levels, path) for spacing, levels in tables.items() for path in samples]


def spacing_table(fits: Sequence[Fit]) -> str:
    """All fits as Markdown: a row for each spacing, three columns for each sample."""
    samples = list(dict.fromkeys(fit.sample for fit in fits))
    header = [f"{LEVELS} levels, even in", *(f"{name}: {what}" for name in samples for what in ("d", "p", "bits"))]
    rows = []
    for spacing in dict.fromkeys(fit.spacing for fit in fits):
        here = {fit.sample: fit for fit in fits if fit.spacing == spacing}
        cells = [(here[name].error_d, here[name].error_p, here[name].bits) for name in samples]
        rows.append([spacing, *(text for d, p, bits in cells for text in (f"{d:.3f}", f"{p:.4f}", f"{bits:.2f}"))])
    return markdown_table(header, rows) if rows else ""


def _fit(spacing: str, levels: NDArray[np.float32], path: Path) -> Fit:
    distances = load_sample(path)
    rounded = levels[quantize(distances, levels)]
    return Fit(
        spacing=spacing,
        sample=path.stem,
        error_d=float(np.abs(rounded - distances).mean()),
        error_p=float(np.abs(np.exp(-rounded) - np.exp(-distances)).mean()),
        bits=joint_entropy(distances, levels),
    )
