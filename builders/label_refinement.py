"""Label refinement: keeps the teacher's prediction for a mixed image on the two classes it was mixed from.

The paper's Eq. 12 is reconstructed here. `soft` is the cross-entropy of T(x̃_mix) against λ·y_i + (1−λ)·y_j; `pair` is
−log(p_i + p_j), which asks only that the mass lies on the two classes. Partners are drawn inside the batch, and mixes
from the codebook that the records draw from.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from builders.config import LabelRefinement
from nrrdd_format import draws
from nrrdd_format.codebooks import MixTable
from nrrdd_format.replay import mix


@dataclass(frozen=True, kw_only=True)
class Mixes:
    """What each image of a batch is mixed with, and how; tensors on one device.

    Attributes:
        aug: (B,) int64, the partner's place in the batch.
        is_cutmix: (B,) bool.
        box: (B, 4) int64, for CutMix.
        lam: (B,) float, the share of the image itself.
    """

    aug: Tensor
    is_cutmix: Tensor
    box: Tensor
    lam: Tensor


def label_refinement_loss(
    model: Callable[[Tensor], Tensor], pixels: Tensor, targets: Tensor, mixes: Mixes, kind: LabelRefinement
) -> Tensor:
    """L_lr (scalar) of images (B, 3, S, S) of classes `targets` (B,), each mixed with its partner."""
    org = torch.arange(len(pixels), device=pixels.device)
    mixed = mix(pixels, org, mixes.aug, mixes.is_cutmix, mixes.box, mixes.lam)
    log_p = model(mixed).float().log_softmax(1)
    partners = targets[mixes.aug]
    log_p_org = log_p.gather(1, targets[:, None]).squeeze(1)
    log_p_aug = log_p.gather(1, partners[:, None]).squeeze(1)
    if kind == "soft":
        return -(mixes.lam * log_p_org + (1 - mixes.lam) * log_p_aug).mean()
    return -torch.where(targets == partners, log_p_org, torch.logaddexp(log_p_org, log_p_aug)).mean()


class MixDraws:
    """The mixes of one batch, fresh in every step; draws are keyed by (seed, batch, step)."""

    def __init__(self, labels: NDArray[np.int64], table: MixTable, seed: int, batch: int) -> None:
        self._partners, self._table = partner_choices(labels), table
        self._seed, self._batch = seed, batch

    def draw(self, step: int, device: torch.device) -> Mixes:
        """The step's mixes."""
        count, table = len(self._partners), self._table
        drawn = draws.integers(self._seed, "refinement-mix", self._batch, step, count=count, high=len(table))
        columns = {
            "aug": self._draw_partners(step),
            "is_cutmix": table.is_cutmix[drawn],
            "box": table.box[drawn].astype(np.int64),
            "lam": table.lam[drawn],
        }
        return Mixes(**{name: torch.from_numpy(column).to(device) for name, column in columns.items()})

    def _draw_partners(self, step: int) -> NDArray[np.int64]:
        chance = draws.uniform(self._seed, "refinement-partner", self._batch, step, count=len(self._partners))
        return np.array([choices[int(u * len(choices))] for u, choices in zip(chance, self._partners, strict=True)])


def partner_choices(labels: NDArray[np.int64]) -> list[NDArray[np.int64]]:
    """For each image of a batch, the images it may be mixed with: those of other classes, else all but itself."""
    everyone = np.arange(len(labels))
    choices = []
    for index, label in enumerate(labels):
        others = np.flatnonzero(labels != label)
        choices.append(others if len(others) else everyone[everyone != index])
    return choices
