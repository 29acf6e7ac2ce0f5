"""Generated images and labels for `benchmarks.loader_throughput`, laid out as each of the compared loaders wants them.

The JPEGs have a photograph's spectrum and weigh what one of a distilled photograph does: 17 KB at 224 px. Classes and
distances are of no account for speed and are drawn at random.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from builders.config import BLOCK_PAIRS
from builders.fkd_layout import SAMPLER_SEED, FkdBatch, batch_path, sampler_orders, write_batch
from nrrdd_format import draws
from nrrdd_format.codebooks import Codebooks, MixTable, distance_levels, mix_codebook, view_codebook
from nrrdd_format.manifest import MANIFEST_NAME, DatasetInfo, ImagesInfo, Manifest, RecordsInfo, TeacherInfo
from nrrdd_format.pairs import PairRecords, RecordLayout, draw_pairs
from nrrdd_format.records import encode_shard_records
from nrrdd_format.shards import EncodedImage, ShardEntry, shard_name, write_shard

CLASSES = 1000
EPOCHS = 4
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SEED = 0
_SHARDS, _SHARD_IMAGES = 4, 500
_QUALITY = 90
_COARSEST = 4
"""Side of the coarsest octave of a picture, in pixels; an octave's contrast falls with its fineness."""


@dataclass(frozen=True, kw_only=True)
class Data:
    """One set of images in a folder, in every form that has been written.

    Attributes:
        folder: holds all of it.
        size: S, the side in pixels.
        images: how many there are.
        batch: pairs in a batch; soft labels are stored by the batch.
    """

    folder: Path
    size: int
    images: int
    batch: int

    @property
    def dataset(self) -> Path:
        """The nrrdd dataset; other readers take its shards as plain tar files of images."""
        return self.folder / "dataset"

    @property
    def files(self) -> Path:
        """The same images as single files."""
        return self.folder / "images"

    @property
    def soft_labels(self) -> Path:
        """Soft labels in FKD's layout."""
        return self.folder / "soft-labels"

    @property
    def streaming(self) -> Path:
        """The same images in MosaicML Streaming's shards."""
        return self.folder / "streaming"

    def image_files(self) -> list[Path]:
        """The single files in order."""
        return [self.files / f"{number:07d}.jpg" for number in range(self.images)]

    def shard_files(self) -> list[str]:
        """The tar files of the dataset."""
        return sorted(str(path) for path in self.dataset.glob("*.tar"))


def write_data(data: Data) -> Data:
    """Writes the dataset, the single files and the soft labels, and returns `data`."""
    for folder in (data.dataset, data.files, data.soft_labels):
        folder.mkdir(parents=True)
    for number, path in enumerate(data.image_files()):
        path.write_bytes(encoded_picture(number, data.size))
    _write_dataset(data)
    _write_soft_labels(data)
    return data


def label_of(image: int) -> int:
    """The class of an image."""
    return image % CLASSES


def _write_dataset(data: Data) -> None:
    manifest = _manifest(data)
    shards = max(_SHARDS, -(-data.images // _SHARD_IMAGES))
    parts = np.array_split(np.arange(data.images), min(shards, data.images))
    entries = tuple(_write_shard(data, manifest, shard, part.tolist()) for shard, part in enumerate(parts))
    replace(manifest, shards=entries).save(data.dataset / MANIFEST_NAME)


def _write_shard(data: Data, manifest: Manifest, shard: int, indices: list[int]) -> ShardEntry:
    layout = manifest.layout_for(len(indices))
    files = data.image_files()
    return write_shard(
        data.dataset / shard_name(shard),
        shard=shard,
        images=[EncodedImage(index=k, label=label_of(k), data=files[k].read_bytes()) for k in indices],
        extension="jpg",
        blocks=encode_shard_records(_records(layout, shard), layout, shard),
        epochs=EPOCHS,
        layout=layout,
    )


def _records(layout: RecordLayout, shard: int) -> Iterator[PairRecords]:
    for epoch in range(EPOCHS):
        chosen = draws.integers(
            SEED, "throughput-distances", shard, epoch, count=2 * layout.pairs, high=len(layout.levels)
        )
        org, aug = layout.levels[chosen].reshape(2, -1)
        yield replace(draw_pairs(layout, shard, epoch), distance_org=org, distance_aug=aug)


def _manifest(data: Data) -> Manifest:
    """As `build-distilled` would write it with the defaults of its options, but with both kinds of mix."""
    return Manifest(
        dataset=DatasetInfo(name="generated", class_names=tuple(f"class {k}" for k in range(CLASSES))),
        images=ImagesInfo(
            count=data.images,
            ipc=max(1, data.images // CLASSES),
            size=data.size,
            codec="jpeg",
            quality=_QUALITY,
            mean=MEAN,
            std=STD,
            flip=True,
        ),
        records=RecordsInfo(
            coding="explicit", epochs=EPOCHS, block_epochs=max(1, min(EPOCHS, BLOCK_PAIRS // data.images)), seed=SEED
        ),
        codebooks=Codebooks(
            views=view_codebook(SEED, data.size, (0.5, 1.0)),
            mixes=tuple(mix_codebook(SEED, data.size)),
            distances=distance_levels(),
        ),
        teacher=TeacherInfo(architecture="resnet18", sha256="0" * 64, top1=0.6976),
    )


def _write_soft_labels(data: Data) -> None:
    views = view_codebook(SEED, data.size, (0.5, 1.0))
    mixes = MixTable.from_entries(mix_codebook(SEED, data.size), data.size)
    for epoch, order in zip(range(EPOCHS), sampler_orders(data.images, SAMPLER_SEED), strict=False):
        batch_path(data.soft_labels, epoch, 0).parent.mkdir()
        for number, start in enumerate(range(0, len(order), data.batch)):
            count = len(order[start : start + data.batch])
            batch = _soft_label_batch(epoch, number, count, views[np.arange(count) % len(views)], mixes)
            write_batch(batch_path(data.soft_labels, epoch, number), batch, data.size)


def _soft_label_batch(epoch: int, number: int, count: int, views: np.ndarray, mixes: MixTable) -> FkdBatch:
    """One file's content; fp16 logits for all classes."""
    top, left, height, width = mixes.box[number % len(mixes)].tolist()
    generator = torch.Generator().manual_seed(draws.torch_seed(SEED, "throughput-logits", epoch, number))
    return FkdBatch(
        views=views,
        flip=draws.integers(SEED, "throughput-flip", epoch, number, count=count, high=2) == 1,
        mix_index=draws.permutation(SEED, "throughput-mix", epoch, number, count=count),
        mix_box=(top, left, height, width),
        lam=float(mixes.lam[number % len(mixes)]),
        logits=torch.randn(count, CLASSES, generator=generator).half(),
    )


def encoded_picture(number: int, size: int) -> bytes:
    """One of the JPEGs."""
    buffer = io.BytesIO()
    Image.fromarray(picture(number, size)).save(buffer, "JPEG", quality=_QUALITY, subsampling=0)
    return buffer.getvalue()


def picture(number: int, size: int) -> np.ndarray:
    """Noise of all scales, the finer the fainter: (S, S, 3) uint8."""
    total = np.full((size, size, 3), 128.0, np.float32)
    side = min(_COARSEST, size)
    while side <= size:
        noise = draws.uniform(SEED, "throughput-image", number, side, count=side * side * 3)
        octave = (noise.reshape(side, side, 3) * 256).astype(np.uint8)
        grown = Image.fromarray(octave).resize((size, size), Image.Resampling.BICUBIC)
        total += (np.asarray(grown, np.float32) - 127.5) * (_COARSEST / side)
        side *= 2
    return total.clip(0, 255).astype(np.uint8)
