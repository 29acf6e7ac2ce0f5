"""A tiny dataset of random images and distances, made by the format's own writer: for tests of readers."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tiny_dataset import with_further
from torch import Tensor

from loaders import ClassDistances, DBRBatch
from nrrdd_format import draws
from nrrdd_format.codebooks import Codebooks, MixKind, distance_levels, mix_codebook, view_codebook
from nrrdd_format.manifest import (
    CODEC_EXTENSIONS,
    Codec,
    DatasetInfo,
    ImagesInfo,
    Manifest,
    RecordsInfo,
    TeacherInfo,
)
from nrrdd_format.pairs import Coding, PairRecords, RecordLayout, draw_pairs
from nrrdd_format.priors import choose_priors
from nrrdd_format.records import encode_shard_records
from nrrdd_format.shards import EncodedImage, ShardEntry, shard_name, write_shard


def make_tiny_dataset(
    path: Path,
    *,
    classes: int = 3,
    ipc: int = 4,
    size: int = 16,
    epochs: int = 3,
    shards: int = 2,
    cycle: int = 3,
    mix_group: int = 2,
    block_epochs: int = 2,
    mix: MixKind = "both",
    coding: Coding = "explicit",
    codec: Codec = "png",
    flip: bool = True,
    seed: int = 0,
    priors: int | None = None,
    further: int | None = None,
) -> Path:
    """Writes a dataset of classes * ipc images into the new folder `path` and returns it.

    Image k is of class k % classes; every shard gets as many images as the others, or one more.
    """
    path.mkdir(parents=True)
    manifest = Manifest(
        dataset=DatasetInfo(name="tiny", class_names=tuple(f"class {k}" for k in range(classes))),
        images=ImagesInfo(
            count=classes * ipc,
            ipc=ipc,
            size=size,
            codec=codec,
            quality=None if codec == "png" else 90,
            mean=(0.5, 0.4, 0.3),
            std=(0.2, 0.25, 0.3),
            flip=flip,
        ),
        records=RecordsInfo(
            coding=coding,
            epochs=epochs,
            cycle=cycle,
            mix_group=mix_group,
            block_epochs=block_epochs,
            seed=seed,
            mix=mix,
            temperature=1.0,
            priors=priors,
            further=further,
        ),
        codebooks=Codebooks(
            views=view_codebook(seed, size, (0.3, 1.0), count=32),
            mixes=tuple(mix_codebook(seed, size, mix, count=16)),
            distances=distance_levels(),
        ),
        teacher=TeacherInfo(architecture="conv3", sha256="0" * 64, top1=0.9),
        shards=(),
    )
    parts = np.array_split(np.arange(classes * ipc), shards)
    entries = [_write(path, manifest, shard, part.tolist()) for shard, part in enumerate(parts)]
    replace(manifest, shards=tuple(entries)).save(path / "dataset.json")
    return path


def batch_columns(batch: DBRBatch) -> dict[str, Tensor]:
    """All tensors of a batch by name, those of its priors as `prior_org.classes` and so on."""
    found: dict[str, Tensor] = {}
    for field in fields(batch):
        value = getattr(batch, field.name)
        nested = {} if value is None else {"": value} if isinstance(value, Tensor) else vars(value)
        found |= {f"{field.name}.{name}".rstrip("."): part for name, part in nested.items()}
    return found


def batch_of(columns: Mapping[str, Tensor]) -> DBRBatch:
    """The batch with these columns."""
    plain: dict[str, Any] = {name: column for name, column in columns.items() if "." not in name}
    nested: dict[str, Any] = {
        name: ClassDistances(classes=columns[f"{name}.classes"], distances=columns[f"{name}.distances"])
        for name in {name.partition(".")[0] for name in columns if "." in name}
    }
    return DBRBatch(**plain, **nested)


def _write(path: Path, manifest: Manifest, shard: int, indices: list[int]) -> ShardEntry:
    info = manifest.images
    classes, seed = len(manifest.dataset.class_names), manifest.records.seed
    layout = manifest.layout_for(len(indices))
    epochs = manifest.records.epochs
    labels = np.array(indices) % classes
    masses = draws.uniform(seed, "tiny-priors", shard, count=len(indices) * classes).reshape(-1, classes)
    priors = manifest.records.priors
    pairs = (with_further(_labelled(layout, seed, shard, epoch), layout, labels, epoch) for epoch in range(epochs))
    return write_shard(
        path / shard_name(shard),
        shard=shard,
        images=[
            EncodedImage(index=k, label=k % classes, data=_picture(seed, k, info.size, info.codec)) for k in indices
        ],
        extension=CODEC_EXTENSIONS[info.codec],
        blocks=encode_shard_records(pairs, layout, shard),
        epochs=epochs,
        layout=layout,
        priors=None if priors is None else choose_priors(masses, labels, priors, layout.levels),
    )


def _labelled(layout: RecordLayout, seed: int, shard: int, epoch: int) -> PairRecords:
    """The pairs of an epoch with random distances."""
    drawn = draws.uniform(seed, "tiny-distances", shard, epoch, count=2 * layout.pairs).reshape(2, -1)
    org, aug = -np.log(np.clip(drawn / 2, 1e-3, 1)).astype(np.float32)
    return replace(draw_pairs(layout, shard, epoch), distance_org=org, distance_aug=aug)


def _picture(seed: int, index: int, size: int, codec: Codec) -> bytes:
    """A smooth random picture, encoded."""
    coarse = draws.integers(seed, "tiny-image", index, count=4 * 4 * 3, high=256).astype(np.uint8)
    image = Image.fromarray(coarse.reshape(4, 4, 3)).resize((size, size), Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    image.save(buffer, codec.upper(), **({} if codec == "png" else {"quality": 90}))
    return buffer.getvalue()
