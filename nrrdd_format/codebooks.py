"""Codebooks: every real-valued part of a record is an index into a table that the manifest holds.

Crops and mixes are drawn from these tables before anything is computed from them, so a shard stores
exactly what the teacher saw. Distances are rounded to the nearest level.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from nrrdd_format import draws
from nrrdd_format.errors import FormatError, require
from nrrdd_format.limits import MAX_IMAGE_SIDE, MAX_LEVELS, MAX_MIXES, MAX_VIEWS

MixKind = Literal["cutmix", "mixup", "both"]
MixEntry = tuple[int, int, int, int] | float
"""CutMix: the box [top, left, height, width] in pixels; Mixup: lam, a multiple of 1/256."""

LAM_STEPS = 256
_CROP_ATTEMPTS, _LEAST_RATIO, _MOST_RATIO = 10, 3 / 4, 4 / 3  # as torchvision's RandomResizedCrop
_CUTMIX_ALPHA, _MIXUP_ALPHA = 1.0, 0.8
_MOST_DISTANCE = 16.0


@dataclass(frozen=True, kw_only=True, eq=False)
class MixTable:
    """A mix codebook as columns of length M, for vectorised lookup."""

    is_cutmix: NDArray[np.bool_]  # (M,)
    box: NDArray[np.int16]  # (M, 4), zeros for Mixup
    lam: NDArray[np.float32]  # (M,) share of `org`; CutMix: 1 - height * width / size**2

    def __len__(self) -> int:
        return len(self.lam)

    @classmethod
    def from_entries(cls, entries: Sequence[MixEntry], size: int) -> MixTable:
        """Columns of `entries` for images of `size` pixels a side."""
        is_cutmix = np.array([isinstance(e, tuple) for e in entries], bool)
        box = np.array([e if isinstance(e, tuple) else (0, 0, 0, 0) for e in entries], np.int16)
        lam = [1.0 - e[2] * e[3] / size**2 if isinstance(e, tuple) else e for e in entries]
        return cls(is_cutmix=is_cutmix, box=box.reshape(-1, 4), lam=np.array(lam, np.float32))


@dataclass(frozen=True, kw_only=True, eq=False)
class Codebooks:
    """The tables of a dataset; verbatim records need none of views and mixes."""

    views: NDArray[np.int16] | None  # (V, 4) crop boxes [top, left, height, width] in pixels
    mixes: tuple[MixEntry, ...] | None
    distances: NDArray[np.float32]  # (L,) ascending, nats

    def mix_table(self, size: int) -> MixTable | None:
        """The mixes as columns, for images of `size` pixels a side."""
        return None if self.mixes is None else MixTable.from_entries(self.mixes, size)


def view_codebook(seed: int, size: int, scale: tuple[float, float], count: int = 512) -> NDArray[np.int16]:
    """`count` crop boxes (count, 4) [top, left, height, width] for images of `size` pixels a side.

    Drawn by the rule of torchvision's RandomResizedCrop: area share uniform in `scale`, logarithm of the
    aspect ratio uniform. `scale=(1, 1)` gives one box, the whole image. Raises ConfigError.
    """
    require(1 <= size <= MAX_IMAGE_SIDE, f"image size {size}: expected 1..{MAX_IMAGE_SIDE}")
    require(1 <= count <= MAX_VIEWS, f"view codebook of {count} entries: expected 1..{MAX_VIEWS}")
    require(0 < scale[0] <= scale[1] <= 1, f"view scale {scale}: expected 0 < low <= high <= 1")
    if scale[0] == 1:
        return np.array([[0, 0, size, size]], np.int16)
    rng = draws.generator(seed, "view-codebook")
    return np.array([_crop(rng, size, scale) for _ in range(count)], np.int16)


def _crop(rng: np.random.Generator, size: int, scale: tuple[float, float]) -> tuple[int, int, int, int]:
    for _ in range(_CROP_ATTEMPTS):
        area = size * size * rng.uniform(*scale)
        aspect = float(np.exp(rng.uniform(np.log(_LEAST_RATIO), np.log(_MOST_RATIO))))
        height, width = round((area / aspect) ** 0.5), round((area * aspect) ** 0.5)
        if 0 < height <= size and 0 < width <= size:
            top, left = rng.integers(size - height + 1), rng.integers(size - width + 1)
            return int(top), int(left), height, width
    return 0, 0, size, size


def mix_codebook(seed: int, size: int, kind: MixKind = "cutmix", count: int = 1024) -> list[MixEntry]:
    """`count` mixes for images of `size` pixels a side.

    CutMix entries are boxes clipped to the image, never empty, never the whole image; Mixup entries are lam
    in (0, 1), multiples of 1/256. `kind="both"` alternates the two. Raises ConfigError.
    """
    require(kind in ("cutmix", "mixup", "both"), f"mix kind {kind!r}: expected cutmix, mixup or both")
    require(2 <= size <= MAX_IMAGE_SIDE, f"image size {size}: expected 2..{MAX_IMAGE_SIDE}")
    require(1 <= count <= MAX_MIXES, f"mix codebook of {count} entries: expected 1..{MAX_MIXES}")
    rng = draws.generator(seed, "mix-codebook")
    cutmix = [kind == "cutmix" or (kind == "both" and i % 2 == 0) for i in range(count)]
    return [_cutmix(rng, size) if cut else _mixup(rng) for cut in cutmix]


def _cutmix(rng: np.random.Generator, size: int) -> MixEntry:
    while True:
        side = int(size * (1.0 - rng.beta(_CUTMIX_ALPHA, _CUTMIX_ALPHA)) ** 0.5)
        centre = rng.integers(size, size=2)
        low = np.clip(centre - side // 2, 0, size)
        height, width = (np.clip(centre - side // 2 + side, 0, size) - low).tolist()
        if 0 < height * width < size * size:
            return int(low[0]), int(low[1]), height, width


def _mixup(rng: np.random.Generator) -> MixEntry:
    return float(np.clip(round(rng.beta(_MIXUP_ALPHA, _MIXUP_ALPHA) * LAM_STEPS), 1, LAM_STEPS - 1)) / LAM_STEPS


def distance_levels(count: int = 16, knee: float = 0.3) -> NDArray[np.float32]:
    """`count` distances in nats, float32, from 0 to 16, equally spaced in log(1 + d / knee).

    Steps are nearly even below `knee`, where every one of them changes p = exp(-d), and grow with the distance above.
    """
    require(2 <= count <= MAX_LEVELS, f"{count} distance levels: expected 2..{MAX_LEVELS}")
    require(knee > 0, f"distance levels with a knee at {knee}: expected a positive number")
    return (knee * np.expm1(np.linspace(0.0, np.log1p(_MOST_DISTANCE / knee), count))).astype(np.float32)


def quantize(distances: NDArray[np.floating], levels: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Index of the level nearest to each distance, of two equally near ones the lower.

    `distances` in nats, any shape. Raises FormatError for a distance that is negative or not finite.
    """
    values = np.asarray(distances, np.float64)
    bad = ~(np.isfinite(values) & (values >= 0))
    if bad.any():
        raise FormatError(f"distance {values[bad][0]}: expected a finite number >= 0 (teacher output is broken)")
    exact = levels.astype(np.float64)
    return np.searchsorted((exact[:-1] + exact[1:]) / 2, values).astype(np.uint8)
