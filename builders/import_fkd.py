"""Imports an FKD or SRe2L relabel store: its images and its pairs become one shard with verbatim records.

A store keeps the teacher's logits for every pair; what is kept of them here are two distances.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from builders.bounds import MAX_SEED, between, manifest_text
from builders.config import BLOCK_PAIRS, BuildConfig
from builders.conventions import DATASETS, Colour
from builders.fkd_epochs import EpochReader, FkdSource, open_source
from builders.fkd_layout import SAMPLER_SEED
from builders.image_folder import FolderFiles
from nrrdd_format import tar
from nrrdd_format.codebooks import Codebooks, distance_levels
from nrrdd_format.copies import new_folder
from nrrdd_format.files import atomic_write
from nrrdd_format.limits import MAX_EPOCHS
from nrrdd_format.manifest import (
    CODEC_EXTENSIONS,
    MANIFEST_NAME,
    DatasetInfo,
    ImagesInfo,
    Manifest,
    RecordsInfo,
    TeacherInfo,
)
from nrrdd_format.records import encode_shard_records
from nrrdd_format.shards import ShardEntry, shard_name, write_shard
from nrrdd_format.versions import version_text

UNKNOWN_TEACHER = "unknown"
UNKNOWN_SHA256 = "0" * 64
"""Stand for the teacher where it is not stated: a store does not name it. No weights have this hash."""


@dataclass(frozen=True, kw_only=True)
class ImportConfig:
    """The options of `nrrdd import-fkd`. `None` means: what suits the dataset, or all there is."""

    store: Path
    images: Path
    out: Path
    sampler_seed: int = SAMPLER_SEED
    epochs: int | None = None
    dataset_name: str = "imagefolder"
    source_license: str | None = None
    mean: Colour | None = None
    std: Colour | None = None
    """How the teacher's input was normalised, of a pixel's value / 255; see `normalisation`."""
    temperature: float = 1.0
    distance_levels: int = BuildConfig.distance_levels
    teacher: str = UNKNOWN_TEACHER
    teacher_sha256: str = UNKNOWN_SHA256
    teacher_top1: float | None = None
    min_agreement: float | None = None

    def __post_init__(self) -> None:
        between("--sampler-seed", self.sampler_seed, 0, MAX_SEED)
        if self.epochs is not None:
            between("--epochs", self.epochs, 1, MAX_EPOCHS)
        between("--temperature", self.temperature, 1e-3, 1e3)
        if self.min_agreement is not None:
            between("--min-agreement", self.min_agreement, 0, 1)
        manifest_text("--dataset-name", self.dataset_name)
        manifest_text("--source-license", self.source_license)
        manifest_text("--teacher", self.teacher)

    @property
    def normalisation(self) -> tuple[Colour, Colour]:
        """Mean and standard deviation: as given, else those of the dataset with this name, else ImageNet's."""
        known = DATASETS.get(self.dataset_name, DATASETS["imagefolder"])
        return self.mean or known.mean, self.std or known.std


@dataclass(frozen=True, kw_only=True)
class ImportFacts:
    """What an import came to.

    Attributes:
        images, epochs, pairs: how many; pairs of all epochs.
        store_bytes: the batch files that were read.
        label_bytes: the new dataset without its images: record blocks, shard header and manifest.
        agreement: share of pairs whose highest logit is that of one of their two classes.
        chance: that share in an order of images that has nothing to do with the logits.
        doubt: probability, at most, that such an order comes to that agreement.
    """

    images: int
    epochs: int
    pairs: int
    store_bytes: int
    label_bytes: int
    agreement: float
    chance: float
    doubt: float

    @property
    def ratio(self) -> float:
        """How many times smaller the labels have become."""
        return self.store_bytes / self.label_bytes


def import_fkd(config: ImportConfig) -> ImportFacts:
    """Makes a dataset of a store and its images, in the new folder `config.out`.

    Raises:
        ConfigError: an option that cannot work.
        DataError: unusable images.
        FormatError: an unusable store; names the file and what was found.
        OutputError: the folder exists already or cannot be written.
    """
    with new_folder(config.out) as folder:
        source = open_source(config.store, config.images, config.epochs)
        manifest = make_manifest(config, source)
        reader = EpochReader(
            source,
            sampler_seed=config.sampler_seed,
            temperature=config.temperature,
            min_agreement=config.min_agreement,
        )
        entry = _write(folder / shard_name(0), source, manifest, reader)
        agreement = reader.agreed / reader.pairs
        manifest = replace(
            manifest,
            images=replace(manifest.images, count=entry.images),
            records=replace(manifest.records, mix=reader.mix),
            method=manifest.method | {"agreement": round(agreement, 4)},
            shards=(entry,),
        )
        manifest.save(folder / MANIFEST_NAME)
        with atomic_write(folder / "README.md") as file:
            file.write(import_card(manifest).encode())
        return ImportFacts(
            images=entry.images,
            epochs=source.epochs,
            pairs=reader.pairs,
            store_bytes=reader.bytes,
            label_bytes=_label_bytes(entry, source.files, folder),
            agreement=agreement,
            chance=reader.agreed_by_chance / reader.pairs,
            doubt=reader.doubt,
        )


def _write(path: Path, source: FkdSource, manifest: Manifest, reader: EpochReader) -> ShardEntry:
    """Reads the store and writes the shard."""
    layout = manifest.layout_for(len(source.files), source.pairs)
    return write_shard(
        path,
        shard=0,
        images=source.files,
        extension=CODEC_EXTENSIONS[source.codec],
        blocks=encode_shard_records(reader.epochs(), layout, 0),
        epochs=source.epochs,
        layout=layout,
    )


def make_manifest(config: ImportConfig, source: FkdSource) -> Manifest:
    """The manifest, still without shard; raises FormatError for an option that no manifest can hold."""
    mean, std = config.normalisation
    manifest = Manifest(
        dataset=DatasetInfo(
            name=config.dataset_name,
            class_names=source.classes.names,
            wnids=source.classes.wnids,
            source_license=config.source_license,
        ),
        images=ImagesInfo(
            count=0,
            ipc=max(1, round(len(source.files) / len(source.classes.names))),
            size=source.size,
            codec=source.codec,
            quality=None,
            mean=mean,
            std=std,
            flip=True,
        ),
        records=RecordsInfo(
            coding="verbatim",
            epochs=source.epochs,
            cycle=max(2, source.batch),
            mix_group=source.batch,
            block_epochs=max(1, min(source.epochs, BLOCK_PAIRS // source.pairs)),
            seed=0,
            temperature=config.temperature,
        ),
        codebooks=Codebooks(views=None, mixes=None, distances=distance_levels(config.distance_levels)),
        teacher=TeacherInfo(architecture=config.teacher, sha256=config.teacher_sha256, top1=config.teacher_top1),
        method={"name": "FKD import", "sampler_seed": config.sampler_seed, "batch_size": source.batch},
    )
    manifest.encode()  # checks it now, not after hours of reading
    return manifest


def _label_bytes(entry: ShardEntry, files: FolderFiles, folder: Path) -> int:
    """Bytes of the dataset besides the images' members (their headers, data and padding) and the card."""
    images = sum(tar.BLOCK + tar.padded(path.stat().st_size) for path in files.paths)
    return entry.bytes - images + (folder / MANIFEST_NAME).stat().st_size


CARD = """\
# {name}, imported from soft labels

{count} images of {size}×{size} pixels in {classes} classes, with {epochs} epochs of mixed pairs from an FKD relabel
store. For each pair two distances to the teacher stand in for its soft label (DBR).

| | |
|---|---|
| images | {codec}, byte for byte as they were |
| pair records | {record_bytes:,} bytes, {pairs:,} pairs, {per_pair:.2f} bytes a pair |
| teacher | {architecture}, weights SHA-256 `{sha256}` (64 zeros: not stated) |
| format | nrrdd {version} |

## Load it

```python
from loaders import DBRLoader, DBRLoss

loader, loss_function = DBRLoader("path/to/this/folder", batch_size={batch_size}), DBRLoss()
for batch in loader:
    loss = loss_function(model(batch.images), batch)
```

The images and soft labels are the work of whoever made the store. Licence of the source, as stated at the import:
**{license}**.
"""


def import_card(manifest: Manifest) -> str:
    """The Markdown beside the shard, from the manifest alone."""
    (entry,), images = manifest.shards, manifest.images
    pairs = manifest.records.epochs * entry.pairs_per_epoch
    return CARD.format(
        name=manifest.dataset.name,
        count=images.count,
        size=images.size,
        classes=len(manifest.dataset.class_names),
        epochs=manifest.records.epochs,
        codec=images.codec.upper(),
        record_bytes=entry.record_bytes,
        pairs=pairs,
        per_pair=entry.record_bytes / pairs,
        architecture=manifest.teacher.architecture,
        sha256=manifest.teacher.sha256,
        version=version_text(manifest.version),
        batch_size=min(100, entry.pairs_per_epoch),
        license=manifest.dataset.source_license or "not stated",
    )
