"""The pairs of a stored epoch: which images meet, under which views and mixes (SPEC.md sections 5 and 7).

Shapes: n images a shard, P pairs an epoch, G = ceil(P / mix_group) mix groups, S side of an image in pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from nrrdd_format import draws
from nrrdd_format.codebooks import MixTable
from nrrdd_format.errors import ConfigError, require
from nrrdd_format.limits import (
    MAX_DRAWN_IMAGES,
    MAX_EPOCHS,
    MAX_FURTHER,
    MAX_IMAGE_SIDE,
    MAX_IMAGES,
    MAX_LEVELS,
    MAX_MIXES,
    MAX_PRIORS,
    MAX_VIEWS,
)

Coding = Literal["explicit", "derived", "verbatim"]


@dataclass(frozen=True, kw_only=True, eq=False)
class RecordLayout:
    """Everything besides the bytes that is needed to read one shard's record blocks."""

    images: int  # n, images in the shard
    pairs: int  # P, pairs an epoch; n, or less with verbatim coding
    classes: int  # C, classes of the dataset
    size: int  # S
    cycle: int  # g, images that are only each other's partners
    mix_group: int  # consecutive pairs that share one mix
    block_epochs: int  # K, epochs in one record block
    flip: bool  # whether views may be flipped
    coding: Coding
    seed: int
    views: NDArray[np.int16] | None  # (V, 4); None with verbatim coding
    mixes: MixTable | None  # M entries; None with verbatim coding
    levels: NDArray[np.float32]  # (L,) distances in nats
    priors: int | None = None  # k, classes in each image's prior; None: there are none
    further: int | None = None  # x, further classes of each pair; None: there are none

    def __post_init__(self) -> None:
        most = MAX_IMAGES if self.coding == "verbatim" else MAX_DRAWN_IMAGES
        require(2 <= self.images <= most, f"{self.images} images in a shard: expected 2..{most} ({self.coding} coding)")
        require(2 <= self.size <= MAX_IMAGE_SIDE, f"image size {self.size}: expected 2..{MAX_IMAGE_SIDE}")
        require(2 <= self.cycle <= MAX_IMAGES, f"cycle {self.cycle}: expected 2..{MAX_IMAGES}")
        require(1 <= self.mix_group <= MAX_IMAGES, f"mix_group {self.mix_group}: expected 1..{MAX_IMAGES}")
        require(1 <= self.block_epochs <= MAX_EPOCHS, f"block_epochs {self.block_epochs}: expected 1..{MAX_EPOCHS}")
        require(1 <= len(self.levels) <= MAX_LEVELS, f"{len(self.levels)} levels: expected 1..{MAX_LEVELS}")
        self._check_priors()
        self._check_further()
        if self.coding == "verbatim":
            self._check_verbatim()
        else:
            self._check_drawn()

    def _check_priors(self) -> None:
        if self.priors is None:
            return
        require(
            1 <= self.priors < self.classes,
            f"priors of {self.priors} classes: expected 1..{self.classes - 1}, the others of {self.classes}",
        )
        require(
            self.images * self.priors <= MAX_PRIORS,
            f"{self.images} images in a shard with priors of {self.priors} classes: expected at most {MAX_PRIORS} in "
            "all; store fewer classes or put fewer images in a shard",
        )

    def _check_further(self) -> None:
        most = min(MAX_FURTHER, self.classes - 2)
        require(
            self.further is None or 1 <= self.further <= most,
            f"{self.further} further classes of a pair: expected 1..{most}, beside its own two of {self.classes}",
        )

    def _check_verbatim(self) -> None:
        require(2 <= self.pairs <= self.images, f"{self.pairs} pairs for {self.images} images: expected 2..n")
        require(self.views is None and self.mixes is None, "verbatim coding: expected no codebooks of views and mixes")

    def _check_drawn(self) -> None:
        require(self.coding in ("explicit", "derived"), f"coding {self.coding!r}: expected explicit or derived")
        require(self.pairs == self.images, f"{self.pairs} pairs for {self.images} images: expected as many pairs")
        views, mixes = self.views, self.mixes
        require(views is not None and 1 <= len(views) <= MAX_VIEWS, f"views: expected a codebook of 1..{MAX_VIEWS}")
        require(mixes is not None and 1 <= len(mixes) <= MAX_MIXES, f"mixes: expected a codebook of 1..{MAX_MIXES}")

    @property
    def groups(self) -> int:
        """G, the number of mixes of one epoch."""
        return -(-self.pairs // self.mix_group)

    @property
    def group_of_pair(self) -> NDArray[np.int64]:
        """The mix group of every pair, (P,)."""
        return np.arange(self.pairs) // self.mix_group

    @property
    def codebooks(self) -> tuple[NDArray[np.int16], MixTable]:
        """The codebooks of views and mixes, which explicit and derived coding have."""
        if self.views is None or self.mixes is None:
            raise ConfigError("verbatim coding has no codebooks of views and mixes")
        return self.views, self.mixes


@dataclass(frozen=True, kw_only=True, eq=False)
class PairRecords:
    """The pairs of one epoch of one shard, as columns of length P."""

    index_org: NDArray[np.int64]  # index of the image within its shard
    index_aug: NDArray[np.int64]
    view_org: NDArray[np.int16]  # (P, 4) crop [top, left, height, width], pixels
    view_aug: NDArray[np.int16]
    flip_org: NDArray[np.bool_]
    flip_aug: NDArray[np.bool_]
    is_cutmix: NDArray[np.bool_]
    mix_box: NDArray[np.int16]  # (P, 4) box [top, left, height, width] pasted from aug; zeros for Mixup
    lam: NDArray[np.float32]  # share of org
    distance_org: NDArray[np.float32]  # nats; NaN before relabeling
    distance_aug: NDArray[np.float32]
    further_classes: NDArray[np.int64] | None = None  # (P, x) others than the pair's, the likeliest first; None: x = 0
    further_distances: NDArray[np.float32] | None = None  # (P, x) nats, not falling

    def __len__(self) -> int:
        return len(self.index_org)

    def take(self, pairs: NDArray[np.int64] | slice) -> PairRecords:
        """The chosen pairs, in the order given."""
        return PairRecords(**{name: column[pairs] for name, column in self.columns().items()})

    def columns(self) -> dict[str, NDArray[Any]]:
        """The columns that there are, by name."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: column for name, column in values.items() if column is not None}

    @classmethod
    def concatenate(cls, parts: Sequence[PairRecords]) -> PairRecords:
        """The pairs of all parts, one part after the other."""
        columns = [part.columns() for part in parts]
        return cls(**{name: np.concatenate([each[name] for each in columns]) for name in columns[0]})


@dataclass(frozen=True, kw_only=True, eq=False)
class PairDraws:
    """What chance decides for one epoch of one shard, as codebook indices."""

    order: NDArray[np.int64]  # (P,) a permutation of the images; pair t has org = order[t]
    view: NDArray[np.int64]  # (n,) by image
    flip: NDArray[np.bool_]  # (n,) by image
    mix: NDArray[np.int64]  # (G,) pair t uses mix[t // mix_group]


def cycle_bounds(pairs: int, cycle: int) -> NDArray[np.int64]:
    """Bounds b (k+1,) of the closed cycles: cycle c is positions b[c]:b[c+1] of the order.

    Every cycle has `cycle` positions except the last, which is shorter, or one longer where a single position
    would be left over.
    """
    starts = list(range(0, pairs, cycle))
    if len(starts) > 1 and pairs % cycle == 1:
        starts.pop()
    return np.array([*starts, pairs], np.int64)


def next_in_cycle(layout: RecordLayout) -> NDArray[np.int64]:
    """Position (P,) of each pair's `aug` in the order: the next one in its cycle, the first for the last."""
    bounds = cycle_bounds(layout.pairs, layout.cycle)
    following = np.arange(1, layout.pairs + 1)
    following[bounds[1:] - 1] = bounds[:-1]
    return following


def draw_pairs(layout: RecordLayout, shard: int, epoch: int) -> PairRecords:
    """The pairs that the format draws for one epoch of one shard (SPEC.md section 7), distances NaN.

    Builders label exactly these; derived coding stores nothing else of them.
    """

    def pick(purpose: str, count: int, high: int) -> NDArray[np.int64]:
        return draws.integers(layout.seed, purpose, shard, epoch, count=count, high=high)

    views, mixes = layout.codebooks
    flip = pick("flip", layout.images, 2) if layout.flip else np.zeros(layout.images, np.int64)
    drawn = PairDraws(
        order=draws.permutation(layout.seed, "order", shard, epoch, count=layout.images),
        view=pick("view", layout.images, len(views)),
        flip=flip.astype(bool),
        mix=pick("mix", layout.groups, len(mixes)),
    )
    return expand(drawn, layout)


def expand(drawn: PairDraws, layout: RecordLayout) -> PairRecords:
    """The records that codebook indices stand for, with NaN distances."""
    views, mixes = layout.codebooks
    org, aug = drawn.order, drawn.order[next_in_cycle(layout)]
    mix = drawn.mix[layout.group_of_pair]
    return PairRecords(
        index_org=org,
        index_aug=aug,
        view_org=views[drawn.view[org]],
        view_aug=views[drawn.view[aug]],
        flip_org=drawn.flip[org],
        flip_aug=drawn.flip[aug],
        is_cutmix=mixes.is_cutmix[mix],
        mix_box=mixes.box[mix],
        lam=mixes.lam[mix],
        distance_org=np.full(layout.pairs, np.nan, np.float32),
        distance_aug=np.full(layout.pairs, np.nan, np.float32),
    )
