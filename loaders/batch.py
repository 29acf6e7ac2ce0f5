"""A batch of pairs: before replay, as worker processes read it, and after, as the training loop gets it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from nrrdd_format.replay import PairTensors, TensorGroup, replay


@dataclass(frozen=True, kw_only=True)
class ClassDistances(TensorGroup):
    """Some classes of each of B rows and their distances."""

    classes: Tensor
    """(B, k) int64."""
    distances: Tensor
    """(B, k) float32 nats, -log p."""


@dataclass(frozen=True, kw_only=True)
class DBRBatch(TensorGroup):
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


@dataclass(frozen=True, kw_only=True)
class PlannedBatch(TensorGroup):
    """A batch before replay: uint8 images and the plan of its pairs; the rest is as in `DBRBatch`."""

    pairs: PairTensors
    label_org: Tensor
    label_aug: Tensor
    distance_org: Tensor
    distance_aug: Tensor
    prior_org: ClassDistances | None = None
    prior_aug: ClassDistances | None = None
    further: ClassDistances | None = None

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
