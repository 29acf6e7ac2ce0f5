"""What completes a DBR label beyond its two distances: images' priors, and further classes of each pair.

Both are part of the format, and a build makes them where it is asked to; here a dataset gets them that was built
without, so that students with and without see the same images. FKD's top 5 are no part of it: a batch gets them on its
way from the loader to the student.

Shapes: B pairs, x further classes of each, C classes in all.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.student import Batches
from builders.job import PRIOR_EPOCHS
from builders.relabel import prior_masses, relabel_epoch
from builders.teacher import Teacher
from loaders import ClassDistances, DBRBatch
from nrrdd_format.copies import new_folder
from nrrdd_format.dataset import open_dataset
from nrrdd_format.manifest import CODEC_EXTENSIONS, MANIFEST_NAME, Manifest
from nrrdd_format.pairs import PairRecords, RecordLayout, draw_pairs
from nrrdd_format.priors import Priors, choose_priors
from nrrdd_format.records import encode_shard_records
from nrrdd_format.replay import decode_image, stack_images
from nrrdd_format.shards import ShardEntry, ShardReader, write_shard


def complete(path: Path, teacher: Teacher, *, priors: int | None, further: int | None, out: Path, device: str) -> Path:
    """Writes a drawn dataset with priors and further classes into the new folder `out`, as a build would; returns it.

    Args:
        path: the dataset.
        teacher: its teacher, on `device`.
        priors: classes in each image's prior; None: no priors.
        further: further classes of each pair; None: none.

    Raises:
        ConfigError: there are not as many classes.
    """
    with open_dataset(path) as dataset, new_folder(out) as folder:
        records = replace(dataset.manifest.records, priors=priors, further=further)
        manifest = replace(dataset.manifest, records=records)
        entries = tuple(
            _Completion(reader, manifest, manifest.layout(number), teacher, device).write(folder / entry.name)
            for number, (reader, entry) in enumerate(zip(dataset.shards, manifest.shards, strict=True))
        )
        replace(manifest, shards=entries).save(folder / MANIFEST_NAME)
    return out


class _Completion:
    """One shard and what its teacher sees in it."""

    def __init__(
        self, reader: ShardReader, manifest: Manifest, layout: RecordLayout, teacher: Teacher, device: str
    ) -> None:
        self._reader, self._manifest, self._layout, self._model = reader, manifest, layout, teacher.model
        decoded = [decode_image(image.data, manifest.images.size) for image in reader.encoded_images()]
        self._images = stack_images(decoded).to(device)

    def write(self, path: Path) -> ShardEntry:
        """Writes the shard with what completes it."""
        reader = self._reader
        return write_shard(
            path,
            shard=reader.shard,
            images=list(reader.encoded_images()),
            extension=CODEC_EXTENSIONS[self._manifest.images.codec],
            blocks=encode_shard_records(map(self._with_further, reader.all_records()), self._layout, reader.shard),
            epochs=reader.epochs,
            layout=self._layout,
            priors=self._priors(),
        )

    def _with_further(self, records: PairRecords) -> PairRecords:
        """The pairs of an epoch, their distances as stored."""
        if self._layout.further is None:
            return records
        found = relabel_epoch(
            self._images,
            self._reader.labels,
            records,
            model=self._model,
            temperature=self._manifest.records.temperature,
            mean=self._manifest.images.mean,
            std=self._manifest.images.std,
            further=self._layout.further,
        )
        return replace(records, further_classes=found.further_classes, further_distances=found.further_distances)

    def _priors(self) -> Priors | None:
        layout, reader = self._layout, self._reader
        if layout.priors is None:
            return None
        masses = prior_masses(
            self._images,
            reader.labels,
            [draw_pairs(layout, reader.shard, epoch) for epoch in range(PRIOR_EPOCHS)],
            model=self._model,
            temperature=self._manifest.records.temperature,
            mean=self._manifest.images.mean,
            std=self._manifest.images.std,
        )
        return choose_priors(masses, reader.labels, layout.priors, layout.levels)


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
