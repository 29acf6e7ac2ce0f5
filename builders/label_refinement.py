"""Label refinement: keeps the teacher's prediction for a mixed image on the two classes it was mixed from.

The paper's Eq. 12 is reconstructed here. `soft` is the cross-entropy of T(x̃_mix) against λ·y_i + (1−λ)·y_j; `pair` is
−log(p_i + p_j), which asks only that the mass lies on the two classes. Partners are drawn inside the batch, and mixes
from the codebook that the records draw from.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from builders.config import LabelRefinement
from nrrdd_format import draws
from nrrdd_format.codebooks import MixTable
from nrrdd_format.replay import mix


class LabelRefinementLoss:
    """L_lr of one batch; draws are keyed by (seed, batch, step)."""

    def __init__(self, targets: Tensor, kind: LabelRefinement, mixes: MixTable, seed: int, batch: int) -> None:
        self._targets, self._kind, self._mixes = targets, kind, mixes
        self._seed, self._batch = seed, batch
        self._partners = partner_choices(targets.cpu().numpy())

    def __call__(self, model: nn.Module, pixels: Tensor, step: int) -> Tensor:
        """The loss (scalar) of the batch mixed with freshly drawn partners."""
        org = torch.arange(len(pixels), device=pixels.device)
        aug = torch.from_numpy(self._draw_partners(step)).to(pixels.device)
        is_cutmix, box, lam = self._draw_mixes(step, pixels.device)
        log_p: Tensor = model(mix(pixels, org, aug, is_cutmix, box, lam)).float().log_softmax(1)
        log_p_org = log_p.gather(1, self._targets[org, None]).squeeze(1)
        log_p_aug = log_p.gather(1, self._targets[aug, None]).squeeze(1)
        if self._kind == "soft":
            return -(lam * log_p_org + (1 - lam) * log_p_aug).mean()
        same = self._targets[org] == self._targets[aug]
        return -torch.where(same, log_p_org, torch.logaddexp(log_p_org, log_p_aug)).mean()

    def _draw_mixes(self, step: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """is_cutmix (B,), mix_box (B, 4) and lam (B,) of freshly drawn mixes."""
        count, mixes = len(self._partners), self._mixes
        drawn = draws.integers(self._seed, "refinement-mix", self._batch, step, count=count, high=len(mixes))
        columns = (mixes.is_cutmix[drawn], mixes.box[drawn].astype(np.int64), mixes.lam[drawn])
        is_cutmix, box, lam = (torch.from_numpy(column).to(device) for column in columns)
        return is_cutmix, box, lam

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
