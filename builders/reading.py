"""Reads image sets in batches, for training and testing teachers and students."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from builders.image_sets import ImageSet
from builders.images import UnusableImage
from builders.prefetch import from_processes

Skipped = list[tuple[str, str]]
"""Names of unusable images, each with the reason."""
Batch = tuple[Tensor, Tensor, Skipped]
"""Images (B, 3, S, S) uint8, their labels (B,) int64, and what was left out."""
WORKERS = "--workers"
"""The option that says how many processes read a teacher's images."""
_NO_IMAGES = torch.empty((0, 3, 1, 1), dtype=torch.uint8)


def read_usable(images: ImageSet, indices: Iterable[int]) -> Batch:
    """Reads the images with these indices, in order, leaving out the unusable ones."""
    pixels, labels, skipped = [], [], []
    for index in indices:
        try:
            pixels.append(torch.from_numpy(images.read(index)))
        except UnusableImage as error:
            skipped.append((images.name(index), error.reason))
            continue
        labels.append(int(images.labels[index]))
    return torch.stack(pixels) if pixels else _NO_IMAGES, torch.tensor(labels, dtype=torch.int64), skipped


def named(skipped: Sequence[tuple[str, str]]) -> list[dict[str, str]]:
    """What was left out as a log holds it."""
    return [{"image": name, "reason": reason} for name, reason in skipped]


def read_batches(images: ImageSet, batches: Sequence[NDArray[np.int64]], workers: int = 0) -> Iterator[Batch]:
    """Reads one batch after the other, ahead of the caller in `workers` processes (0: in this one).

    Raises:
        DataError: a process has died.
    """
    yield from from_processes(_Batches(images=images, batches=batches), workers, option=WORKERS)


@dataclass(frozen=True, kw_only=True)
class _Batches(Dataset[Batch]):
    """Whole batches as the items of a dataset, so that a worker reads a batch at a time."""

    images: ImageSet
    batches: Sequence[NDArray[np.int64]]

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, position: int) -> Batch:
        return read_usable(self.images, self.batches[position].tolist())
