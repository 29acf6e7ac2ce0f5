"""What completes a DBR label beyond its two distances: images' priors, and further classes of each pair.

Both are part of the format, and a build makes them where it is asked to; here a dataset gets them that was built
without, so that students with and without see the same images.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from builders.job import PRIOR_EPOCHS
from builders.relabel import prior_masses, relabel_epoch
from builders.teacher import Teacher
from nrrdd_format.copies import new_folder
from nrrdd_format.dataset import open_dataset
from nrrdd_format.decoding import decode_image
from nrrdd_format.errors import ConfigError
from nrrdd_format.manifest import CODEC_EXTENSIONS, MANIFEST_NAME, Manifest
from nrrdd_format.pairs import PairRecords, RecordLayout, draw_pairs
from nrrdd_format.priors import Priors, choose_priors
from nrrdd_format.records import encode_shard_records
from nrrdd_format.replay import stack_images
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


def check_completed(copy: Path, path: Path) -> None:
    """Refuses a completed dataset whose images, or manifest but for what was added, are not those of the one at `path`.

    Raises:
        ConfigError: it was completed from another.
    """
    with open_dataset(copy) as completed, open_dataset(path) as source:
        same = _bare(completed.manifest).dataset_id == _bare(source.manifest).dataset_id
        shards = zip(completed.shards, source.shards, strict=False)
        same &= len(completed.shards) == len(source.shards)
        if not same or any(list(new.encoded_images()) != list(old.encoded_images()) for new, old in shards):
            raise ConfigError(f"{copy}: was completed from another dataset than {path}; choose another --out")


def _bare(manifest: Manifest) -> Manifest:
    """A manifest without what completing changes."""
    return replace(manifest, records=replace(manifest.records, priors=None, further=None), shards=())


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
