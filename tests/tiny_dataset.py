"""A dataset of a few generated images, for tests that need a real one on disk."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from nrrdd_format.codebooks import Codebooks, MixKind, distance_levels, mix_codebook, view_codebook
from nrrdd_format.manifest import MANIFEST_NAME, DatasetInfo, ImagesInfo, Manifest, RecordsInfo, TeacherInfo
from nrrdd_format.records import Coding, draw_pairs, encode_epoch
from nrrdd_format.shards import EncodedImage, ShardEntry, shard_name, write_shard

SIZE = 16
CLASSES = ("circle", "square", "star")


def tiny_manifest(
    *, coding: Coding = "explicit", epochs: int = 2, flip: bool = True, mix: MixKind = "both"
) -> Manifest:
    """A manifest that lists no shards yet."""
    codebooks = Codebooks(
        views=view_codebook(5, SIZE, (0.3, 1.0), count=6),
        mixes=tuple(mix_codebook(5, SIZE, mix, count=5)),
        distances=distance_levels(16),
    )
    return Manifest(
        dataset=DatasetInfo(name="tiny", class_names=CLASSES, source_license="CC0-1.0"),
        images=ImagesInfo(
            count=0,
            ipc=1,
            size=SIZE,
            codec="png",
            quality=None,
            mean=(0.5, 0.5, 0.5),
            std=(0.25, 0.25, 0.25),
            flip=flip,
        ),
        records=RecordsInfo(coding=coding, epochs=epochs, cycle=3, mix_group=2, seed=11, mix=mix),
        codebooks=codebooks,
        teacher=TeacherInfo(architecture="conv3", sha256="0" * 64, top1=0.75),
        method={"note": "generated for tests"},
    )


def tiny_images(first: int, count: int) -> list[EncodedImage]:
    """`count` smooth colour gradients as PNG, numbered from `first`."""
    return [EncodedImage(index=first + i, label=(first + i) % len(CLASSES), data=_png(first + i)) for i in range(count)]


def tiny_levels(pairs: int, epoch: int, step: int) -> NDArray[np.uint8]:
    """Level indices (P,) below 16 that differ between pairs and epochs."""
    return ((np.arange(pairs) * step + epoch) % 16).astype(np.uint8)


def write_tiny(folder: Path, manifest: Manifest | None = None, *, shards: int = 2, images: int = 7) -> Path:
    """Write a dataset with so many shards of so many images into `folder` and return it."""
    manifest = manifest or tiny_manifest()
    folder.mkdir(parents=True, exist_ok=True)
    entries = [_write_tiny_shard(folder, manifest, shard, images) for shard in range(shards)]
    whole = replace(manifest, images=replace(manifest.images, count=shards * images), shards=tuple(entries))
    whole.save(folder / MANIFEST_NAME)
    return folder


def _write_tiny_shard(folder: Path, manifest: Manifest, shard: int, images: int) -> ShardEntry:
    layout = manifest.layout_for(images)
    blocks = [
        encode_epoch(
            draw_pairs(layout, shard, epoch), layout, tiny_levels(images, epoch, 5), tiny_levels(images, epoch, 7)
        )
        for epoch in range(manifest.records.epochs)
    ]
    return write_shard(
        folder / shard_name(shard),
        shard=shard,
        images=tiny_images(shard * images, images),
        extension="png",
        blocks=blocks,
        layout=layout,
    )


def _png(number: int) -> bytes:
    x, y = np.meshgrid(np.arange(SIZE), np.arange(SIZE))
    pixels = np.stack([x * 16, y * 16, (x + y) * 8 + number], axis=-1) % 256
    buffer = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()
