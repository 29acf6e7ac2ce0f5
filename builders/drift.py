"""Drift: whether a dataset's distances are those its teacher gives, computed anew for a sample of its pairs.

A stored distance is the level nearest to the teacher's, so the one computed anew should lie between the middles to the
neighbouring levels. On another device it may lie a little beyond: replayed pixels differ by up to one grey level of
255, and convolutions may run in TF32. Tried with networks for digits and CIFAR-10, that moves a distance d by 0.2 to
0.8 % of d + 0.1 on average, and none further than 5 % beyond its middle; a bicubic resize moves 5 to 38 % of them so
far. What lies further is unexplained: other weights, other images, another replay, or wrong records.

Shapes: N pairs in the sample, B in a batch, L levels.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from builders.progress import Progress
from builders.relabel import label_pairs, pairs_at_once
from builders.teacher import Teacher
from nrrdd_format import draws
from nrrdd_format.codebooks import quantize
from nrrdd_format.dataset import DistilledDataset, open_shard
from nrrdd_format.decoding import decode_image
from nrrdd_format.errors import ConfigError, TeacherError
from nrrdd_format.manifest import Manifest
from nrrdd_format.pairs import PairRecords
from nrrdd_format.replay import plan_batch, replay, stack_images
from nrrdd_format.shards import ShardReader

ALLOWANCE = 0.05
"""Of d + 0.1: how far beyond the middle to the next level a distance may lie."""
KNEE = 0.1
"""Nats below which a distance's error no longer shrinks with it."""
TOLERATED_SHARE = 0.01
"""Of distances beyond that."""


@dataclass(frozen=True, kw_only=True)
class Drift:
    """How the distances computed anew differ from those stored.

    Attributes:
        pairs: size of the sample; two distances each.
        mean_nats, max_nats: of |stored − computed|. A computed distance beyond the last level counts as that level.
        other_level_share: distances that would be stored as another level.
        far_share: those whose level is more than one away.
        unexplained_share: those that neither the rounding nor another device explains.
    """

    pairs: int
    mean_nats: float
    max_nats: float
    other_level_share: float
    far_share: float
    unexplained_share: float

    @property
    def explained(self) -> bool:
        """Whether the distances are this teacher's."""
        return self.unexplained_share <= TOLERATED_SHARE

    def to_json(self) -> dict[str, Any]:
        """The figures and the verdict."""
        return asdict(self) | {"explained": self.explained}


def measure_drift(
    dataset: DistilledDataset, teacher: Teacher, *, sample: int, seed: int, device: torch.device | str
) -> Drift:
    """Computes the distances of a sample of the pairs anew and compares them with those stored.

    Args:
        dataset: a sound dataset that has pairs.
        teacher: the one named in its manifest, on `device`.
        sample: N from 1, spread evenly over shards and epochs; all pairs where there are no more.
        seed: of the draw.
        device: where to compute.

    Raises:
        ConfigError: the dataset holds no pairs.
        FormatError: the dataset is damaged.
        TeacherError: a distance is not finite.
    """
    manifest = dataset.manifest
    chosen = draw_sample(manifest, sample, seed)
    levels = manifest.codebooks.distances
    stored, computed = [], []
    with Progress(len(chosen), "distances anew", "pair") as progress:
        for shard in np.unique(chosen[:, 0]).tolist():
            with open_shard(dataset.path, manifest, shard) as reader:
                for pairs in _sampled_records(reader, chosen[chosen[:, 0] == shard]):
                    stored.append(np.stack([pairs.distance_org, pairs.distance_aug]))
                    computed.append(_recompute(reader, pairs, manifest, teacher, device))
                    progress.advance(len(pairs))
    return compare(np.concatenate(stored, axis=1), np.concatenate(computed, axis=1), levels)


def draw_sample(manifest: Manifest, sample: int, seed: int) -> NDArray[np.int64]:
    """Rows (N, 3) of shard, epoch and pair, positions from 0, ascending: one drawn from each of N stretches.

    The stretches are whole pairs, as equal as can be; all pairs where there are no more than `sample`.
    """
    sizes = np.array([entry.pairs_per_epoch for entry in manifest.shards], np.int64)
    ends = np.cumsum(sizes * manifest.records.epochs)
    total = int(ends[-1]) if len(ends) else 0
    if not total:
        raise ConfigError("the dataset lists no shards, so no distances can be computed anew; finish its build")
    count = min(sample, total)
    edges = np.arange(count + 1) * total // count
    within = draws.uniform(seed, "drift-sample", count=count)
    numbers = edges[:-1] + (within * np.diff(edges)).astype(np.int64)
    shard = np.searchsorted(ends, numbers, side="right")
    epoch, pair = np.divmod(numbers - (ends - sizes * manifest.records.epochs)[shard], sizes[shard])
    return np.column_stack([shard, epoch, pair])


def compare(stored: NDArray[np.float32], computed: NDArray[np.float32], levels: NDArray[np.float32]) -> Drift:
    """The drift from distances (2, N) stored, which are levels, to those computed, in nats."""
    found, exact = computed.astype(np.float64), levels.astype(np.float64)
    level = quantize(stored, levels).astype(np.int64)
    nats = np.abs(exact[level] - found.clip(exact[0], exact[-1]))
    steps = np.abs(level - quantize(computed, levels))
    middles = np.concatenate([[-np.inf], (exact[:-1] + exact[1:]) / 2, [np.inf]])
    beyond = np.maximum(middles[level] - found, found - middles[level + 1])
    return Drift(
        pairs=stored.shape[1],
        mean_nats=float(nats.mean()),
        max_nats=float(nats.max()),
        other_level_share=float((steps > 0).mean()),
        far_share=float((steps > 1).mean()),
        unexplained_share=float((beyond > ALLOWANCE * (found + KNEE)).mean()),
    )


def _sampled_records(reader: ShardReader, chosen: NDArray[np.int64]) -> Iterator[PairRecords]:
    """The chosen pairs of one shard in batches, each of one epoch: an image has one view in an epoch."""
    for epoch in np.unique(chosen[:, 1]).tolist():
        pairs = chosen[chosen[:, 1] == epoch, 2]
        records = reader.records(epoch)
        count = pairs_at_once(reader.layout.size)
        for start in range(0, len(pairs), count):
            yield records.take(pairs[start : start + count])


@torch.no_grad()
def _recompute(
    reader: ShardReader, pairs: PairRecords, manifest: Manifest, teacher: Teacher, device: torch.device | str
) -> NDArray[np.float32]:
    """Both distances (2, B) of some pairs of one epoch of a shard; only their own images are decoded."""
    plan, info = plan_batch([(0, pairs)]), manifest.images
    images = stack_images([decode_image(reader.image_bytes(image), info.size) for image in plan.image.tolist()])
    mixed = replay(plan.with_images(images).to(device), mean=info.mean, std=info.std)
    computed = label_pairs(teacher.model(mixed), reader.labels, pairs, manifest.records.temperature)
    distances = np.stack([computed.distance_org, computed.distance_aug])
    if not np.isfinite(distances).all():
        raise TeacherError(f"{reader.path}: the teacher gives a distance that is not finite; its weights are damaged")
    return distances
