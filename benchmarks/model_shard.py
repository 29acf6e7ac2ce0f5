"""A full shard as a build of ImageNet-1k would write it, to measure bytes on without the build.

1000 generated images of as many classes at 224 px, 300 epochs of pairs drawn by the format, and distances drawn from a
sample of a real teacher's (`benchmarks.exact_distances`): pixels, classes and pairs are of no account for the records'
size, the joint distribution of both distances decides it.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.exact_distances import Distances
from builders.config import BLOCK_PAIRS
from nrrdd_format import draws
from nrrdd_format.codebooks import Codebooks, distance_levels, mix_codebook, view_codebook
from nrrdd_format.manifest import MANIFEST_NAME, DatasetInfo, ImagesInfo, Manifest, RecordsInfo, TeacherInfo
from nrrdd_format.pairs import Coding, PairRecords, RecordLayout, draw_pairs
from nrrdd_format.records import encode_shard_records
from nrrdd_format.shards import EncodedImage, shard_name, write_shard

CLASSES, SIZE, EPOCHS = 1000, 224, 300
IMAGES = 1000
QUALITY = 90


def write_model_shard(folder: Path, coding: Coding, sample: Distances, *, epochs: int = EPOCHS, seed: int = 0) -> Path:
    """Writes a dataset of one shard into `folder` and returns it.

    Args:
        folder: an empty folder.
        coding: of the records.
        sample: (2, N) distances to draw from, both of a pair together.
        epochs: stored epochs.
        seed: of every draw.
    """
    manifest = _manifest(coding, epochs, seed)
    layout = manifest.layout_for(IMAGES)
    entry = write_shard(
        folder / shard_name(0),
        shard=0,
        images=[EncodedImage(index=k, label=k % CLASSES, data=picture(seed, k)) for k in range(IMAGES)],
        extension="jpg",
        blocks=encode_shard_records(_epochs(layout, sample, epochs, seed), layout, 0),
        epochs=epochs,
        layout=layout,
    )
    replace(manifest, shards=(entry,)).save(folder / MANIFEST_NAME)
    return folder


def block_bytes_per_pair(coding: Coding, sample: Distances, block_epochs: int, *, epochs: int, seed: int = 0) -> float:
    """What record blocks of so many epochs take a pair, without tar headers and the block table."""
    layout = replace(_manifest(coding, epochs, seed).layout_for(IMAGES), block_epochs=block_epochs)
    blocks = encode_shard_records(_epochs(layout, sample, epochs, seed), layout, 0)
    return sum(map(len, blocks)) / (epochs * layout.pairs)


def _manifest(coding: Coding, epochs: int, seed: int) -> Manifest:
    """As `build-distilled --dataset imagenet --ipc 200` would write it, with the defaults of its options."""
    return Manifest(
        dataset=DatasetInfo(
            name="imagenet",
            class_names=tuple(f"class {k}" for k in range(CLASSES)),
            wnids=tuple(f"n{k:08d}" for k in range(CLASSES)),
        ),
        images=ImagesInfo(
            count=IMAGES,
            ipc=200,
            size=SIZE,
            codec="jpeg",
            quality=QUALITY,
            mean=(0.485, 0.456, 0.406),
            std=(0.229, 0.224, 0.225),
            flip=True,
        ),
        records=RecordsInfo(coding=coding, epochs=epochs, block_epochs=BLOCK_PAIRS // IMAGES, seed=seed),
        codebooks=Codebooks(
            views=view_codebook(seed, SIZE, (0.5, 1.0)),
            mixes=tuple(mix_codebook(seed, SIZE)),
            distances=distance_levels(),
        ),
        teacher=TeacherInfo(architecture="resnet18", sha256="0" * 64, top1=0.6976),
    )


def _epochs(layout: RecordLayout, sample: Distances, epochs: int, seed: int) -> Iterator[PairRecords]:
    for epoch in range(epochs):
        chosen = draws.integers(seed, "model-distances", epoch, count=layout.pairs, high=sample.shape[1])
        org, aug = sample[:, chosen]
        yield replace(draw_pairs(layout, 0, epoch), distance_org=org, distance_aug=aug)


def picture(seed: int, index: int) -> bytes:
    """A generated JPEG about as large as one of a distilled photograph, 17 KB."""
    coarse = draws.integers(seed, "model-image", index, count=16 * 16 * 3, high=256).astype(np.uint8)
    picture = Image.fromarray(coarse.reshape(16, 16, 3)).resize((SIZE, SIZE), Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=QUALITY, subsampling=0)
    return buffer.getvalue()
