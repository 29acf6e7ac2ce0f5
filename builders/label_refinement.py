"""Label refinement: keeps the teacher's prediction for a mixed image on the two classes it was mixed from.

The paper's Eq. 12 is reconstructed here. `soft` is the cross-entropy of T(x̃_mix) against λ·y_i + (1−λ)·y_j; `pair` is
−log(p_i + p_j), which asks only that the mass lies on the two classes. Partners are drawn inside the batch, views and
mixes from the codebooks that the records draw from.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from builders.config import LabelRefinement
from nrrdd_format import draws
from nrrdd_format.codebooks import MixTable
from nrrdd_format.replay import apply_views, mix


@dataclass(frozen=True, kw_only=True, eq=False)
class PairTables:
    """What the dataset's pairs are drawn from.

    Attributes:
        views: (V, 4) int16, crops; None: whole images are mixed.
        flip: whether views are flipped.
        mixes: the codebook of mixes.
    """

    views: NDArray[np.int16] | None
    flip: bool
    mixes: MixTable


@dataclass(frozen=True, kw_only=True)
class Mixes:
    """How each image of a batch is seen, what it is mixed with, and how; tensors on one device.

    Attributes:
        view: (B, 4) int64, the crop of each image; None: all of it.
        flip: (B,) bool.
        aug: (B,) int64, the partner's place in the batch.
        is_cutmix: (B,) bool.
        box: (B, 4) int64, for CutMix.
        lam: (B,) float, the share of the image itself.
    """

    view: Tensor | None
    flip: Tensor
    aug: Tensor
    is_cutmix: Tensor
    box: Tensor
    lam: Tensor


def label_refinement_loss(
    model: Callable[[Tensor], Tensor], pixels: Tensor, targets: Tensor, mixes: Mixes, kind: LabelRefinement
) -> Tensor:
    """L_lr (scalar) of images (B, 3, S, S) of classes `targets` (B,), each mixed with its partner."""
    org = torch.arange(len(pixels), device=pixels.device)
    views = pixels if mixes.view is None else apply_views(pixels, mixes.view, mixes.flip)
    mixed = mix(views, org, mixes.aug, mixes.is_cutmix, mixes.box, mixes.lam)
    log_p = model(mixed).float().log_softmax(1)
    partners = targets[mixes.aug]
    log_p_org = log_p.gather(1, targets[:, None]).squeeze(1)
    log_p_aug = log_p.gather(1, partners[:, None]).squeeze(1)
    if kind == "soft":
        return -(mixes.lam * log_p_org + (1 - mixes.lam) * log_p_aug).mean()
    return -torch.where(targets == partners, log_p_org, torch.logaddexp(log_p_org, log_p_aug)).mean()


class MixDraws:
    """The mixes of one batch, fresh in every step; draws are keyed by (seed, batch, step)."""

    def __init__(self, labels: NDArray[np.int64], tables: PairTables, seed: int, batch: int) -> None:
        self._partners, self._tables = partner_choices(labels), tables
        self._seed, self._batch = seed, batch

    def draw(self, step: int, device: torch.device) -> Mixes:
        """The step's mixes."""
        count, table = len(self._partners), self._tables.mixes
        drawn = draws.integers(self._seed, "refinement-mix", self._batch, step, count=count, high=len(table))
        columns = {
            "flip": self._draw_flips(step),
            "aug": self._draw_partners(step),
            "is_cutmix": table.is_cutmix[drawn],
            "box": table.box[drawn].astype(np.int64),
            "lam": table.lam[drawn],
        }
        views = self._draw_views(step)
        return Mixes(
            view=None if views is None else _sent(views, device),
            **{name: _sent(column, device) for name, column in columns.items()},
        )

    def _draw_views(self, step: int) -> NDArray[np.int64] | None:
        count, views = len(self._partners), self._tables.views
        if views is None:
            return None
        drawn = draws.integers(self._seed, "refinement-view", self._batch, step, count=count, high=len(views))
        return views[drawn].astype(np.int64)

    def _draw_flips(self, step: int) -> NDArray[np.bool_]:
        count = len(self._partners)
        if not self._tables.flip:
            return np.zeros(count, bool)
        return draws.uniform(self._seed, "refinement-flip", self._batch, step, count=count) < 0.5

    def _draw_partners(self, step: int) -> NDArray[np.int64]:
        chance = draws.uniform(self._seed, "refinement-partner", self._batch, step, count=len(self._partners))
        return np.array([choices[int(u * len(choices))] for u, choices in zip(chance, self._partners, strict=True)])


def _sent(column: NDArray[Any], device: torch.device) -> Tensor:
    """The column on the device; a GPU goes on with the step before meanwhile."""
    return torch.from_numpy(column).to(device, non_blocking=True)


def partner_choices(labels: NDArray[np.int64]) -> list[NDArray[np.int64]]:
    """For each image of a batch, the images it may be mixed with: those of other classes, else all but itself."""
    everyone = np.arange(len(labels))
    choices = []
    for index, label in enumerate(labels):
        others = np.flatnonzero(labels != label)
        choices.append(others if len(others) else everyone[everyone != index])
    return choices
