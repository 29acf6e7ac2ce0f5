"""Codes of a teacher's whole prediction in a few bytes a pair: what completed labels are compared with.

Two that fit any number of classes: a low-rank code (the largest principal components of log p, each rounded to 16
levels) and a product code (the classes in groups of equal size, each group's log p replaced by the nearest of 256
centroids, one byte). Both are fitted to a dataset's own pairs; what a fit takes (a matrix of K × r numbers, 256 × K
numbers) is not counted. The format has neither: `benchmarks.accuracy_by_bytes` shows what they would bring.

Shapes: B pairs, K classes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
import zstandard
from torch import Tensor

from builders.teacher import Teacher
from loaders import DBRBatch, DBRLoader
from loaders.batch import ClassDistances
from nrrdd_format import draws
from nrrdd_format.dataset import open_dataset

LEVELS = 16
"""Of a component of the low-rank code."""
REACH = 3.0
"""Standard deviations that they span on either side."""
CENTROIDS = 256
ROUNDS = 12
"""Of k-means."""
FIT_PAIRS = 8000
LOWEST = -16.0
"""log p below it is coded as this."""
TINY = 1e-12
_ZSTD_LEVEL = 19


class LogitCode(Protocol):
    """A code of predictions."""

    def encode(self, log_p: Tensor) -> Tensor:
        """Codes, (B, n) uint8, of log p (B, K)."""

    def decode(self, codes: Tensor) -> Tensor:
        """log p (B, K) as far as the codes (B, n) tell, up to a constant in each row."""


@dataclass(frozen=True, kw_only=True)
class LowRank:
    """`mean` (K,), `basis` (K, r) and the `deviation` (r,) of each component over the fitted pairs."""

    mean: Tensor
    basis: Tensor
    deviation: Tensor

    @staticmethod
    def fit(log_p: Tensor, rank: int) -> LowRank:
        """Fits to log p (N, K); `rank` components."""
        centred = _centred(log_p)
        mean = centred.mean(0)
        _, _, directions = torch.linalg.svd(centred - mean, full_matrices=False)
        basis = directions[:rank].T.contiguous()
        return LowRank(mean=mean, basis=basis, deviation=((centred - mean) @ basis).std(0).clamp_min(TINY))

    def encode(self, log_p: Tensor) -> Tensor:
        """Codes 0 to 15, (B, r) uint8."""
        places = ((_centred(log_p) - self.mean) @ self.basis / self.deviation + REACH) / (2 * REACH) * (LEVELS - 1)
        return places.round().clamp(0, LEVELS - 1).to(torch.uint8)

    def decode(self, codes: Tensor) -> Tensor:
        """See `LogitCode`."""
        components = (codes.float() / (LEVELS - 1) * 2 * REACH - REACH) * self.deviation
        return self.mean + components @ self.basis.T


@dataclass(frozen=True, kw_only=True)
class ProductCode:
    """For each group of classes, in their order, its `centroids` (256, classes of the group)."""

    centroids: tuple[Tensor, ...]

    @staticmethod
    def fit(log_p: Tensor, parts: int, seed: int) -> ProductCode:
        """Fits to log p (N, K) by k-means in each of `parts` groups of classes."""
        groups = _centred(log_p).tensor_split(parts, dim=1)
        return ProductCode(centroids=tuple(_k_means(group, seed, part) for part, group in enumerate(groups)))

    def encode(self, log_p: Tensor) -> Tensor:
        """The nearest centroid of each group, (B, parts) uint8."""
        groups = _centred(log_p).tensor_split(len(self.centroids), dim=1)
        nearest = [torch.cdist(of, to).argmin(1) for of, to in zip(groups, self.centroids, strict=True)]
        return torch.stack(nearest, dim=1).to(torch.uint8)

    def decode(self, codes: Tensor) -> Tensor:
        """See `LogitCode`."""
        return torch.cat([group[codes[:, part].long()] for part, group in enumerate(self.centroids)], dim=1)


def _centred(log_p: Tensor) -> Tensor:
    """log p without what softmax does not see, its mean over the classes."""
    bounded = log_p.clamp_min(LOWEST)
    return bounded - bounded.mean(1, keepdim=True)


def _k_means(points: Tensor, seed: int, part: int) -> Tensor:
    """256 centroids of points (N, D), fewer points repeated; from points drawn by the seed."""
    chosen = draws.generator(seed, "product-code", part).permutation(len(points))
    centroids = points[torch.from_numpy(np.resize(chosen, CENTROIDS))].clone()
    for _ in range(ROUNDS):
        nearest = torch.cdist(points, centroids).argmin(1)
        counts = torch.bincount(nearest, minlength=CENTROIDS)
        sums = torch.zeros_like(centroids).index_add_(0, nearest, points)
        centroids = torch.where(counts[:, None] > 0, sums / counts[:, None].clamp_min(1), centroids)
    return centroids


@dataclass(frozen=True)
class CodedBatches:
    """Batches of a loader with further classes in the place of those it stores: all others, as the code tells them.

    The two distances stay as stored; what they leave is spread over the other classes as the decoded prediction says.
    """

    loader: DBRLoader
    teacher: Teacher
    code: LogitCode
    temperature: float
    """Of the stored distances (the manifest's)."""

    def set_epoch(self, epoch: int) -> None:
        """Chooses the epoch that the next iteration goes through."""
        self.loader.set_epoch(epoch)

    def __iter__(self) -> Iterator[DBRBatch]:
        """The batches of that epoch."""
        for batch in self.loader:
            decoded = self.code.decode(self.code.encode(predict(self.teacher, batch, self.temperature)))
            yield replace(batch, further=spread_rest(batch, decoded))


def spread_rest(batch: DBRBatch, log_p: Tensor) -> ClassDistances:
    """What a pair's two distances leave, spread over the K − 2 likeliest other classes by log p (B, K)."""
    rest = 1 - batch.distance_org.neg().exp()
    rest = rest - torch.where(batch.label_org == batch.label_aug, 0.0, batch.distance_aug.neg().exp())
    others = log_p
    for labels in (batch.label_org, batch.label_aug):
        others = others.scatter(1, labels[:, None], -torch.inf)
    likeliest, classes = others.softmax(1).topk(log_p.shape[1] - 2, dim=1)
    distances = -(rest.clamp_min(0)[:, None] * likeliest).clamp_min(TINY).log()
    return ClassDistances(classes=classes, distances=distances)


def predict(teacher: Teacher, batch: DBRBatch, temperature: float) -> Tensor:
    """The teacher's log p (B, K) of a batch's pairs, at the temperature that their distances have."""
    with torch.no_grad():
        logits: Tensor = teacher.model(batch.images)
        return (logits / temperature).log_softmax(1)


def predictions(path: Path, teacher: Teacher, *, epochs: int, device: str) -> Tensor:
    """The teacher's log p (N, K) of all pairs of a dataset's first epochs."""
    loader = DBRLoader(path, 100, device=device)
    temperature = open_dataset(path).manifest.records.temperature
    found = []
    for epoch in range(epochs):
        loader.set_epoch(epoch)
        found += [predict(teacher, batch, temperature) for batch in loader]
    return torch.cat(found)


def coded_bytes(code: LogitCode, log_p: Tensor) -> float:
    """Bytes a pair of codes of log p (N, K), column by column in one zstd frame."""
    columns = code.encode(log_p).T.contiguous().cpu().numpy()
    return len(zstandard.ZstdCompressor(level=_ZSTD_LEVEL).compress(columns.tobytes())) / len(log_p)
