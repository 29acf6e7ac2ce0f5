"""What completes a DBR label beyond its two distances: images' priors, and further classes of each pair.

Priors are part of the format. Further classes are studied here: a batch gets them on its way from the loader to the
student, rounded as they would be stored, and their bytes are those of the columns that a record block would gain.

Shapes: B pairs, x further classes of each, C classes in all.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import zstandard
from numpy.typing import NDArray
from torch import Tensor, nn

from benchmarks.student import Batches
from builders.job import PRIOR_EPOCHS
from builders.relabel import prior_masses
from builders.teacher import Teacher
from loaders import ClassDistances, DBRBatch, DBRLoader
from nrrdd_format.copies import new_folder
from nrrdd_format.dataset import DistilledDataset, open_dataset
from nrrdd_format.manifest import CODEC_EXTENSIONS, MANIFEST_NAME, Manifest
from nrrdd_format.pairs import RecordLayout, draw_pairs
from nrrdd_format.priors import Priors, choose_priors
from nrrdd_format.records import encode_shard_records
from nrrdd_format.replay import decode_image, stack_images
from nrrdd_format.shards import ShardEntry, ShardReader, write_shard

COUNTED_PAIRS = 20_000
"""Pairs whose further classes are coded to measure their bytes: about a record block."""
_ZSTD_LEVEL = 19


def with_priors(path: Path, teacher: Teacher, count: int, out: Path, *, device: str) -> Path:
    """Writes a drawn dataset with priors of `count` classes into the new folder `out`, as a build would; returns it."""
    with open_dataset(path) as dataset, new_folder(out) as folder:
        manifest = replace(dataset.manifest, records=replace(dataset.manifest.records, priors=count))
        entries = tuple(
            _write(reader, manifest, manifest.layout(number), teacher, folder / manifest.shards[number].name, device)
            for number, reader in enumerate(dataset.shards)
        )
        replace(manifest, shards=entries).save(folder / MANIFEST_NAME)
    return out


def _write(
    reader: ShardReader, manifest: Manifest, layout: RecordLayout, teacher: Teacher, path: Path, device: str
) -> ShardEntry:
    return write_shard(
        path,
        shard=reader.shard,
        images=list(reader.encoded_images()),
        extension=CODEC_EXTENSIONS[manifest.images.codec],
        blocks=encode_shard_records(reader.all_records(), layout, reader.shard),
        epochs=reader.epochs,
        layout=layout,
        priors=_priors(reader, manifest, layout, teacher, device),
    )


def _priors(reader: ShardReader, manifest: Manifest, layout: RecordLayout, teacher: Teacher, device: str) -> Priors:
    assert layout.priors is not None
    decoded = stack_images([decode_image(image.data, manifest.images.size) for image in reader.encoded_images()])
    masses = prior_masses(
        decoded.to(device),
        reader.labels,
        [draw_pairs(layout, reader.shard, epoch) for epoch in range(PRIOR_EPOCHS)],
        model=teacher.model,
        temperature=manifest.records.temperature,
        mean=manifest.images.mean,
        std=manifest.images.std,
    )
    return choose_priors(masses, reader.labels, layout.priors, layout.levels)


class WithFurther:
    """Gives each batch the `count` likeliest other classes of the teacher's prediction, their distances rounded."""

    def __init__(self, loader: DBRLoader, dataset: DistilledDataset, teacher: nn.Module, count: int) -> None:
        records = dataset.manifest.records
        self._loader, self._teacher, self._count = loader, teacher, count
        self._temperature = records.temperature
        self._table = torch.from_numpy(dataset.manifest.codebooks.distances)
        self._classes = len(dataset.manifest.dataset.class_names)
        self._columns: list[tuple[NDArray[np.int64], NDArray[np.int64]]] = []  # classes and levels of counted pairs

    def set_epoch(self, epoch: int) -> None:
        """Chooses the epoch that the next iteration goes through."""
        self._loader.set_epoch(epoch)

    def __iter__(self) -> Iterator[DBRBatch]:
        """The batches of that epoch."""
        return map(self._changed, self._loader)

    def bytes_per_pair(self) -> float:
        """What the columns take for the pairs seen first: class numbers byte by byte, and levels, each a zstd frame."""
        if not self._columns:
            return 0.0
        classes, levels = (np.concatenate(part) for part in zip(*self._columns, strict=True))
        planes = range(-(-(self._classes - 1).bit_length() // 8))
        parts = [*((classes >> 8 * plane & 255) for plane in planes), levels]
        coder = zstandard.ZstdCompressor(level=_ZSTD_LEVEL)
        return sum(len(coder.compress(part.astype(np.uint8).tobytes())) for part in parts) / len(classes)

    def _changed(self, batch: DBRBatch) -> DBRBatch:
        if not self._count:
            return batch
        log_p = predicted(self._teacher, batch, self._temperature)
        for labels in (batch.label_org, batch.label_aug):
            log_p = log_p.scatter(1, labels[:, None], -torch.inf)
        # Where both images have one class there is one more class beside them than elsewhere.
        distances, classes = log_p.neg().topk(min(self._count, self._classes - 2), largest=False)
        table = self._table.to(distances)
        levels = torch.bucketize(distances, (table[:-1] + table[1:]) / 2)
        if sum(len(part) for part, _ in self._columns) < COUNTED_PAIRS:
            self._columns.append((classes.cpu().numpy(), levels.cpu().numpy()))
        return replace(batch, further=ClassDistances(classes=classes, distances=table[levels]))


class TopClasses:
    """Gives each batch the teacher's `count` likeliest classes and nothing else: FKD's labels with marginal smoothing.

    The loss of completed labels then spreads what is left evenly over all other classes, as that does.
    """

    def __init__(self, loader: Batches, teacher: nn.Module, temperature: float, count: int = 5) -> None:
        self._loader, self._teacher, self._temperature, self._count = loader, teacher, temperature, count

    def set_epoch(self, epoch: int) -> None:
        """Chooses the epoch that the next iteration goes through."""
        self._loader.set_epoch(epoch)

    def __iter__(self) -> Iterator[DBRBatch]:
        """The batches of that epoch."""
        return map(self._changed, self._loader)

    def _changed(self, batch: DBRBatch) -> DBRBatch:
        distances, classes = predicted(self._teacher, batch, self._temperature).neg().topk(self._count, largest=False)
        return replace(
            batch,
            label_org=classes[:, 0],
            label_aug=classes[:, 1],
            distance_org=distances[:, 0],
            distance_aug=distances[:, 1],
            prior_org=None,
            prior_aug=None,
            further=ClassDistances(classes=classes[:, 2:], distances=distances[:, 2:]),
        )


@torch.no_grad()
def predicted(teacher: nn.Module, batch: DBRBatch, temperature: float) -> Tensor:
    """The teacher's log p (B, C) of a batch."""
    logits: Tensor = teacher(batch.images)
    return (logits.float() / temperature).log_softmax(1)
