"""Relabeling: the teacher's two distances for every pair of a shard and epoch (paper, Eq. 8), and what completes them.

The teacher sees what the student will see: the images as a shard holds them, encoded and decoded again, replayed by
the same code as in the loader.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from builders.memory import at_once
from nrrdd_format.errors import TeacherError
from nrrdd_format.pairs import PairRecords
from nrrdd_format.replay import plan_batch, replay

BATCH = 250
"""Pairs that the teacher is shown at once, unless the images are large."""


def pairs_at_once(size: int) -> int:
    """Pairs of images of `size` px that the teacher is shown at once."""
    return at_once(BATCH, size)


def relabel_epoch(
    images: Tensor,
    labels: NDArray[np.int64],
    records: PairRecords,
    *,
    model: nn.Module,
    temperature: float,
    mean: Sequence[float],
    std: Sequence[float],
    further: int | None = None,
) -> PairRecords:
    """Labels some pairs of one stored epoch of one shard.

    Args:
        images: (n, 3, S, S) uint8 on the teacher's device, as decoded from the shard's bytes.
        labels: (n,) classes of the images.
        records: the pairs, their views and mixes.
        model: the teacher, in eval mode.
        temperature: τ of the softmax.
        mean, std: the teacher's normalisation.
        further: how many further classes; None: none.

    Returns:
        The pairs with their distances and further classes, as `label_pairs` gives them.

    Raises:
        TeacherError: a distance is not finite.
    """
    labelled = PairRecords.concatenate(
        [
            label_pairs(_logits(images, pairs, model, mean, std), labels, pairs, temperature, further)
            for pairs in _batches(records, images.shape[-1])
        ]
    )
    columns = (labelled.distance_org, labelled.distance_aug, labelled.further_distances)
    if not all(np.isfinite(column).all() for column in columns if column is not None):
        raise TeacherError(
            "the teacher gives a distance that is not finite; its weights are damaged or its logits overflow"
        )
    return labelled


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
        for pairs in _batches(records, images.shape[-1]):
            log_p = _log_p(_logits(images, pairs, model, mean, std), temperature)
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


def _batches(records: PairRecords, size: int) -> Iterator[PairRecords]:
    count = pairs_at_once(size)
    for start in range(0, len(records), count):
        yield records.take(np.arange(start, min(start + count, len(records))))


@torch.no_grad()
def _logits(
    images: Tensor, pairs: PairRecords, model: nn.Module, mean: Sequence[float], std: Sequence[float]
) -> Tensor:
    """The teacher's logits (B, C) for some pairs."""
    plan = plan_batch([(0, pairs)])
    used = images[torch.from_numpy(plan.image).to(images.device)]
    logits: Tensor = model(replay(plan.with_images(used).to(images.device), mean=mean, std=std))
    return logits


def label_pairs(
    logits: Tensor,
    labels: NDArray[np.int64],
    pairs: PairRecords,
    temperature: float,
    further: int | None = None,
) -> PairRecords:
    """The pairs with what the teacher says of them.

    Args:
        logits: (B, C) of the mixed images.
        labels: (n,) classes of the images.
        pairs: B of them.
        temperature: τ of the softmax.
        further: how many further classes, at most C - 2; None: none. They are the likeliest but the pair's own, of
            equals the lower.

    Returns:
        With d_org = −log p[y_i], d_aug = −log p[y_j] and the distances of the further classes, in nats.
    """
    distances = -_log_p(logits, temperature)
    own = torch.from_numpy(np.stack([labels[pairs.index_org], labels[pairs.index_aug]], axis=1)).to(distances.device)
    org, aug = distances.gather(1, own).cpu().numpy().T
    labelled = replace(pairs, distance_org=org, distance_aug=aug)
    if further is None:
        return labelled
    others, classes = distances.scatter(1, own, torch.inf).sort(dim=1, stable=True)
    return replace(
        labelled,
        further_classes=classes[:, :further].cpu().numpy(),
        further_distances=others[:, :further].cpu().numpy(),
    )


def _log_p(logits: Tensor, temperature: float) -> Tensor:
    return (logits.float() / temperature).log_softmax(1)
