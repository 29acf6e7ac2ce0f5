"""A batch of pairs: before replay, as worker processes read it, and after, as the training loop gets it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from nrrdd_format.replay import PairTensors, replay


@dataclass(frozen=True, kw_only=True)
class DBRBatch:
    """B mixed images and what is known about each; all tensors lie on one device."""

    images: Tensor
    """(B, 3, S, S) float32, normalised, channels last in memory."""
    label_org: Tensor
    """(B,) int64, class y_i of the image that the pair starts from."""
    label_aug: Tensor
    """(B,) int64, class y_j of the image that is mixed in."""
    lam: Tensor
    """(B,) float32, share of `org`; with CutMix the exact share of the area."""
    distance_org: Tensor
    """(B,) float32 nats, the teacher's -log p[y_i]."""
    distance_aug: Tensor
    """(B,) float32 nats, the teacher's -log p[y_j]."""

    def __len__(self) -> int:
        return len(self.lam)

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> DBRBatch:
        """The same on another device."""
        return DBRBatch(**{f.name: getattr(self, f.name).to(device, non_blocking=non_blocking) for f in fields(self)})

    def pin_memory(self) -> DBRBatch:
        """The same in page-locked memory."""
        return DBRBatch(**{f.name: getattr(self, f.name).pin_memory() for f in fields(self)})


@dataclass(frozen=True, kw_only=True)
class PlannedBatch:
    """A batch before replay: uint8 images and the plan of its pairs; the rest is as in `DBRBatch`."""

    pairs: PairTensors
    label_org: Tensor
    label_aug: Tensor
    distance_org: Tensor
    distance_aug: Tensor

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> PlannedBatch:
        """The same on another device."""
        return PlannedBatch(
            **{f.name: getattr(self, f.name).to(device, non_blocking=non_blocking) for f in fields(self)}
        )

    def pin_memory(self) -> PlannedBatch:
        """The same in page-locked memory."""
        return PlannedBatch(**{f.name: getattr(self, f.name).pin_memory() for f in fields(self)})

    def replayed(self, *, mean: Sequence[float], std: Sequence[float]) -> DBRBatch:
        """The finished batch, made on the device where this one lies."""
        return DBRBatch(
            images=replay(self.pairs, mean=mean, std=std),
            label_org=self.label_org,
            label_aug=self.label_aug,
            lam=self.pairs.lam,
            distance_org=self.distance_org,
            distance_aug=self.distance_aug,
        )
