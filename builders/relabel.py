"""Relabeling: the teacher's two distances for every pair of one shard and epoch (paper, Eq. 8).

The teacher sees what the student will see: the images as a shard holds them, encoded and decoded again, replayed by
the same code as in the loader.
"""

from __future__ import annotations

from collections.abc import Sequence

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
    parts = []
    for start in range(0, len(records), BATCH):
        pairs = records.take(np.arange(start, min(start + BATCH, len(records))))
        parts.append(_distances(images, labels, pairs, model, temperature, mean, std))
    distances = np.concatenate(parts, axis=1)
    if not np.isfinite(distances).all():
        raise TeacherError(
            "the teacher gives a distance that is not finite; its weights are damaged or its logits overflow"
        )
    return distances


@torch.no_grad()
def _distances(
    images: Tensor,
    labels: NDArray[np.int64],
    pairs: PairRecords,
    model: nn.Module,
    temperature: float,
    mean: Sequence[float],
    std: Sequence[float],
) -> NDArray[np.float32]:
    """d_org and d_aug of some pairs: (2, B) float32."""
    plan = plan_batch([(0, pairs)])
    used = images[torch.from_numpy(plan.image).to(images.device)]
    mixed = replay(plan.with_images(used).to(images.device), mean=mean, std=std)
    return distances_of(model(mixed), labels, pairs, temperature)


def distances_of(
    logits: Tensor, labels: NDArray[np.int64], pairs: PairRecords, temperature: float
) -> NDArray[np.float32]:
    """d_org and d_aug (2, B) of pairs from the logits (B, C) of their mixed images; `labels` (n,) are the images'."""
    log_p = (logits.float() / temperature).log_softmax(1)
    targets = np.stack([labels[pairs.index_org], labels[pairs.index_aug]], axis=1)
    distances: NDArray[np.float32] = -log_p.gather(1, torch.from_numpy(targets).to(log_p.device)).cpu().numpy().T
    return distances
