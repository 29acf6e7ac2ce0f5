"""Relabeling: the teacher's two distances for every pair of one shard and epoch (paper, Eq. 8), and images' priors.

The teacher sees what the student will see: the images as a shard holds them, encoded and decoded again, replayed by
the same code as in the loader.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from nrrdd_format.errors import TeacherError
from nrrdd_format.pairs import PairRecords
from nrrdd_format.replay import plan_batch, replay

BATCH = 250


def relabel_epoch(
    images: Tensor,
    labels: NDArray[np.int64],
    records: PairRecords,
    *,
    model: nn.Module,
    temperature: float,
    mean: Sequence[float],
    std: Sequence[float],
) -> NDArray[np.float32]:
    """Distances of some pairs of one stored epoch of one shard.

    Args:
        images: (n, 3, S, S) uint8 on the teacher's device, as decoded from the shard's bytes.
        labels: (n,) classes of the images.
        records: the pairs, their views and mixes.
        model: the teacher, in eval mode.
        temperature: τ of the softmax.
        mean, std: the teacher's normalisation.

    Returns:
        (2, P) float32: d_org = −log p[y_i] and d_aug = −log p[y_j] in nats.

    Raises:
        TeacherError: a distance is not finite.
    """
    parts = [
        distances_of(_logits(images, pairs, model, mean, std), labels, pairs, temperature)
        for pairs in _batches(records)
    ]
    distances = np.concatenate(parts, axis=1)
    if not np.isfinite(distances).all():
        raise TeacherError(
            "the teacher gives a distance that is not finite; its weights are damaged or its logits overflow"
        )
    return distances


def prior_masses(
    images: Tensor,
    labels: NDArray[np.int64],
    epochs: Sequence[PairRecords],
    *,
    model: nn.Module,
    temperature: float,
    mean: Sequence[float],
    std: Sequence[float],
) -> NDArray[np.float32]:
    """What the teacher gives to each class in the pairs that an image takes part in, on average.

    A class counts in the pairs that have it as neither of their two, and a pair counts by the image's share in it:
    what a pair stores of its own classes needs no prior.

    Args:
        epochs: pairs, each of whose images stands in one as `org` and in one as `aug`.
        images, labels, model, temperature, mean, std: as for `relabel_epoch`.

    Returns:
        (n, C) float32, 0 for an image's own class.
    """
    sums: list[Tensor] = []
    for records in epochs:
        for pairs in _batches(records):
            log_p = (_logits(images, pairs, model, mean, std).float() / temperature).log_softmax(1)
            sums = sums or [log_p.new_zeros(len(labels), log_p.shape[1], dtype=torch.float64) for _ in range(2)]
            _add_masses(sums, log_p.double().exp(), labels, pairs)
    total, weight = sums
    masses: NDArray[np.float32] = (total / weight.clamp_min(1e-12)).float().cpu().numpy()
    return masses


def _add_masses(sums: list[Tensor], p: Tensor, labels: NDArray[np.int64], pairs: PairRecords) -> None:
    """Adds p (B, C) without the pairs' own classes to the images' sums (n, C), and where it counts to their weights."""
    counts = torch.ones_like(p)
    for index in (pairs.index_org, pairs.index_aug):
        counts.scatter_(1, torch.from_numpy(labels[index])[:, None].to(p.device), 0.0)
    lam = torch.from_numpy(pairs.lam).to(p)[:, None]
    for index, share in ((pairs.index_org, lam), (pairs.index_aug, 1 - lam)):
        rows = torch.from_numpy(index).to(p.device)
        sums[0].index_add_(0, rows, p * counts * share)
        sums[1].index_add_(0, rows, counts * share)


def _batches(records: PairRecords) -> Iterator[PairRecords]:
    for start in range(0, len(records), BATCH):
        yield records.take(np.arange(start, min(start + BATCH, len(records))))


@torch.no_grad()
def _logits(
    images: Tensor, pairs: PairRecords, model: nn.Module, mean: Sequence[float], std: Sequence[float]
) -> Tensor:
    """The teacher's logits (B, C) for some pairs."""
    plan = plan_batch([(0, pairs)])
    used = images[torch.from_numpy(plan.image).to(images.device)]
    logits: Tensor = model(replay(plan.with_images(used).to(images.device), mean=mean, std=std))
    return logits


def distances_of(
    logits: Tensor, labels: NDArray[np.int64], pairs: PairRecords, temperature: float
) -> NDArray[np.float32]:
    """d_org and d_aug (2, B) of pairs from the logits (B, C) of their mixed images; `labels` (n,) are the images'."""
    log_p = (logits.float() / temperature).log_softmax(1)
    targets = np.stack([labels[pairs.index_org], labels[pairs.index_aug]], axis=1)
    distances: NDArray[np.float32] = -log_p.gather(1, torch.from_numpy(targets).to(log_p.device)).cpu().numpy().T
    return distances
