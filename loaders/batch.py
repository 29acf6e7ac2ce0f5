"""A batch of pairs: before replay, as worker processes read it, and after, as the training loop gets it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from nrrdd_format.replay import PairTensors, replay


@dataclass(frozen=True, kw_only=True)
class ClassDistances:
    """Some classes of each of B rows and their distances."""

    classes: Tensor
    """(B, k) int64."""
    distances: Tensor
    """(B, k) float32 nats, -log p."""

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> ClassDistances:
        """The same on another device."""
        return ClassDistances(**_each(self, lambda value: value.to(device, non_blocking=non_blocking)))

    def pin_memory(self) -> ClassDistances:
        """The same in page-locked memory."""
        return ClassDistances(**_each(self, lambda value: value.pin_memory()))


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
    prior_org: ClassDistances | None = None
    """The image's prior: what the teacher sees in it beside y_i; None where the dataset stores none."""
    prior_aug: ClassDistances | None = None
    """The same of the image that is mixed in, beside y_j."""
    further: ClassDistances | None = None
    """More of what the teacher sees in the pair, classes other than y_i and y_j; None where the dataset stores none."""

    def __len__(self) -> int:
        return len(self.lam)

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> DBRBatch:
        """The same on another device."""
        return DBRBatch(**_each(self, lambda value: value.to(device, non_blocking=non_blocking)))

    def pin_memory(self) -> DBRBatch:
        """The same in page-locked memory."""
        return DBRBatch(**_each(self, lambda value: value.pin_memory()))


@dataclass(frozen=True, kw_only=True)
class PlannedBatch:
    """A batch before replay: uint8 images and the plan of its pairs; the rest is as in `DBRBatch`."""

    pairs: PairTensors
    label_org: Tensor
    label_aug: Tensor
    distance_org: Tensor
    distance_aug: Tensor
    prior_org: ClassDistances | None = None
    prior_aug: ClassDistances | None = None
    further: ClassDistances | None = None

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> PlannedBatch:
        """The same on another device."""
        return PlannedBatch(**_each(self, lambda value: value.to(device, non_blocking=non_blocking)))

    def pin_memory(self) -> PlannedBatch:
        """The same in page-locked memory."""
        return PlannedBatch(**_each(self, lambda value: value.pin_memory()))

    def replayed(self, *, mean: Sequence[float], std: Sequence[float]) -> DBRBatch:
        """The finished batch, made on the device where this one lies."""
        return DBRBatch(
            images=replay(self.pairs, mean=mean, std=std),
            label_org=self.label_org,
            label_aug=self.label_aug,
            lam=self.pairs.lam,
            distance_org=self.distance_org,
            distance_aug=self.distance_aug,
            prior_org=self.prior_org,
            prior_aug=self.prior_aug,
            further=self.further,
        )


def _each(parts: DBRBatch | PlannedBatch | ClassDistances, change: Callable[[Any], Any]) -> dict[str, Any]:
    """Every field changed; what is None stays so."""
    values = {f.name: getattr(parts, f.name) for f in fields(parts)}
    return {name: None if value is None else change(value) for name, value in values.items()}
