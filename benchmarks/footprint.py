"""Bytes on disk: what a dataset's labels take, and what the same pairs take as soft labels. Every byte is counted.

Whatever of a dataset's files is not an image member (its data, tar header and padding) counts as label: the record
blocks, the shards' headers and ends, and the manifest with its codebooks.
"""

from __future__ import annotations

import json
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from benchmarks.fkd_store import BATCH, FkdStore, Form
from nrrdd_format import tar
from nrrdd_format.dataset import DistilledDataset, open_dataset
from nrrdd_format.errors import ConfigError, FormatError
from nrrdd_format.manifest import MANIFEST_NAME
from nrrdd_format.pairs import Coding, PairRecords, RecordLayout
from nrrdd_format.records import encode_block, encode_shard_records
from nrrdd_format.shard_header import HEADER_NAME, RECORDS_NAME
from nrrdd_format.shards import ShardEntry, ShardReader, write_shard

CODINGS: tuple[Coding, ...] = ("explicit", "derived")
FULL_BATCHES = 5


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """Sizes of one dataset, in bytes.

    Attributes:
        images: number of images.
        pairs: number of pairs, of all epochs.
        image_data: the encoded images themselves, without their tar headers.
        image_members: the same with their tar headers and padding.
        records: the record members with their tar headers and padding.
        shard_overhead: the shards' own headers and ends.
        manifest: the manifest with its codebooks.
        shards: number of shards.
        manifest_entry: what one shard adds to the manifest, included there.
    """

    images: int
    pairs: int
    image_data: int
    image_members: int
    records: int
    shard_overhead: int
    manifest: int
    shards: int
    manifest_entry: int

    @property
    def image_share(self) -> float:
        """Share of all bytes that are images, with their tar headers and padding; the rest are labels."""
        return self.image_members / (self.image_members + self.labels)

    @property
    def labels(self) -> int:
        """Every byte that is not an image."""
        return self.records + self.shard_overhead + self.manifest

    def labels_at(self, images: int, epochs: int) -> float:
        """Label bytes of a larger dataset: records grow with the pairs, the rest with the images or not at all."""
        shards = self.shards / self.images * images
        manifest = self.manifest + (shards - self.shards) * self.manifest_entry
        return self.records / self.pairs * images * epochs + self.shard_overhead / self.images * images + manifest


def measure(dataset: DistilledDataset) -> Footprint:
    """Measures the files of a dataset. Raises FormatError where one is damaged."""
    manifest = dataset.manifest
    shards = [_measure_shard(dataset.path / entry.name) for entry in manifest.shards]
    return Footprint(
        images=manifest.images.count,
        pairs=manifest.records.epochs * sum(entry.pairs_per_epoch for entry in manifest.shards),
        image_data=sum(shard.image_data for shard in shards),
        image_members=sum(shard.image_members for shard in shards),
        records=sum(shard.records for shard in shards),
        shard_overhead=sum(shard.overhead for shard in shards),
        manifest=(dataset.path / MANIFEST_NAME).stat().st_size,
        shards=len(manifest.shards),
        manifest_entry=len(json.dumps(asdict(manifest.shards[0]), separators=(",", ":"))) + 1,
    )


@dataclass(frozen=True, kw_only=True)
class _ShardSizes:
    image_data: int
    image_members: int
    records: int
    overhead: int


def _measure_shard(path: Path) -> _ShardSizes:
    try:
        with tarfile.open(path) as archive:
            members = archive.getmembers()
    except (OSError, tarfile.TarError) as error:
        raise FormatError("cannot be read as a tar file; nrrdd verify says what is wrong with it", path=path) from error
    images = [member for member in members if member.name not in (HEADER_NAME, RECORDS_NAME)]
    records = sum(_on_disk(member) for member in members if member.name == RECORDS_NAME)
    image_members = sum(_on_disk(member) for member in images)
    return _ShardSizes(
        image_data=sum(member.size for member in images),
        image_members=image_members,
        records=records,
        overhead=path.stat().st_size - records - image_members,
    )


def _on_disk(member: tarfile.TarInfo) -> int:
    """A member's bytes in the archive: its header, its data and the padding behind."""
    return tar.BLOCK + tar.padded(member.size)


@contextmanager
def recoded(dataset: DistilledDataset, coding: Coding) -> Iterator[DistilledDataset]:
    """The dataset with its records coded as asked: itself, or a copy for the time being.

    Raises:
        ConfigError: derived coding of pairs that were not drawn by the format's own rule.
    """
    if dataset.manifest.records.coding == coding:
        yield dataset
        return
    with tempfile.TemporaryDirectory() as folder:
        recode(dataset, coding, Path(folder))
        with open_dataset(folder) as copy:
            yield copy


def codings_of(dataset: DistilledDataset) -> Sequence[Coding]:
    """The codings a dataset is measured in: pairs that the format did not draw for its shards have no choice."""
    coding = dataset.manifest.records.coding
    return CODINGS if coding == "derived" or _is_derivable(dataset) else [coding]


def _is_derivable(dataset: DistilledDataset) -> bool:
    """Whether the pairs of the first epoch are those that the format draws: derived records could hold them."""
    if dataset.manifest.records.coding == "verbatim":
        return False
    shard = dataset.shards[0]
    layout = replace(shard.layout, coding="derived", block_epochs=1)
    try:
        encode_block([shard.records(0)], layout, shard=shard.shard, first_epoch=0)
    except ConfigError:
        return False
    return True


def recode(dataset: DistilledDataset, coding: Coding, out: Path) -> None:
    """Writes the dataset into the folder `out` with its records coded as asked.

    Raises:
        ConfigError: derived coding of pairs that were not drawn by the format's own rule.
    """
    manifest = dataset.manifest
    recoded = replace(manifest, records=replace(manifest.records, coding=coding))
    entries = tuple(
        _recode_shard(shard, recoded.layout(number), manifest.records.epochs, out / entry.name)
        for number, (shard, entry) in enumerate(zip(dataset.shards, manifest.shards, strict=True))
    )
    replace(recoded, shards=entries).save(out / MANIFEST_NAME)


def soft_label_bytes(dataset: DistilledDataset, form: Form = "fp16") -> float:
    """Bytes of soft labels for all of a dataset's pairs: one epoch, written and measured, times the epochs."""
    manifest = dataset.manifest
    pairs = epoch_pairs(dataset)
    classes = len(manifest.dataset.class_names)
    each = fkd_bytes_per_pair(pairs, size=manifest.images.size, num_classes=classes, form=form)
    return each * len(pairs) * manifest.records.epochs


def fkd_bytes_per_pair(pairs: PairRecords, *, size: int, num_classes: int, form: Form = "fp16") -> float:
    """Bytes a pair takes in a store of soft labels, measured by writing the given pairs into one."""
    store = FkdStore(size=size, num_classes=num_classes, form=form)
    with tempfile.TemporaryDirectory() as folder:
        return store.write_epoch(Path(folder), 0, pairs) / len(pairs)


def epoch_pairs(dataset: DistilledDataset) -> PairRecords:
    """The pairs of the first stored epoch, of all shards."""
    return PairRecords.concatenate([shard.records(0) for shard in dataset.shards])


def in_full_batches(pairs: PairRecords) -> PairRecords:
    """500 of the pairs (repeated where there are fewer): a small dataset's last batch would be too dear."""
    return pairs.take(np.resize(np.arange(len(pairs)), FULL_BATCHES * BATCH))


def _recode_shard(shard: ShardReader, layout: RecordLayout, epochs: int, path: Path) -> ShardEntry:
    extension = Path(shard.header.members[0].name).suffix.removeprefix(".")
    return write_shard(
        path,
        shard=shard.shard,
        images=list(shard.encoded_images()),
        extension=extension,
        blocks=encode_shard_records(shard.all_records(), layout, shard.shard),
        epochs=epochs,
        layout=layout,
        priors=shard.priors,
    )
