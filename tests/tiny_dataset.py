"""A dataset of a few generated images, for tests that need a real one on disk."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from nrrdd_format import draws
from nrrdd_format.codebooks import Codebooks, MixKind, distance_levels, mix_codebook, view_codebook
from nrrdd_format.manifest import MANIFEST_NAME, DatasetInfo, ImagesInfo, Manifest, RecordsInfo, TeacherInfo
from nrrdd_format.pairs import Coding, PairRecords, RecordLayout, cycle_bounds, draw_pairs
from nrrdd_format.priors import Priors, choose_priors
from nrrdd_format.records import encode_shard_records
from nrrdd_format.shards import EncodedImage, ShardEntry, shard_name, write_shard

SIZE = 16
CLASSES = ("circle", "square", "star")


def tiny_manifest(
    *,
    coding: Coding = "explicit",
    epochs: int = 2,
    block_epochs: int = 1,
    flip: bool = True,
    mix: MixKind = "both",
    priors: int | None = None,
    further: int | None = None,
    classes: int = len(CLASSES),
) -> Manifest:
    """A manifest that lists no shards yet."""
    drawn = coding != "verbatim"
    class_names = CLASSES + tuple(f"class {k}" for k in range(len(CLASSES), classes))  # images are of the first three
    codebooks = Codebooks(
        views=view_codebook(5, SIZE, (0.3, 1.0), count=6) if drawn else None,
        mixes=tuple(mix_codebook(5, SIZE, mix, count=5)) if drawn else None,
        distances=distance_levels(16),
    )
    return Manifest(
        dataset=DatasetInfo(name="tiny", class_names=class_names, source_license="CC0-1.0"),
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
        records=RecordsInfo(
            coding=coding,
            epochs=epochs,
            cycle=3,
            mix_group=2,
            block_epochs=block_epochs,
            seed=11,
            mix=mix,
            priors=priors,
            further=further,
        ),
        codebooks=codebooks,
        teacher=TeacherInfo(architecture="conv3", sha256="0" * 64, top1=0.75),
        method={"note": "generated for tests"},
    )


def tiny_images(first: int, count: int) -> list[EncodedImage]:
    """`count` smooth colour gradients as PNG, numbered from `first`."""
    return [EncodedImage(index=first + i, label=(first + i) % len(CLASSES), data=_png(first + i)) for i in range(count)]


def tiny_priors(layout: RecordLayout, shard: int) -> Priors | None:
    """Priors that differ between images, as the layout wants them."""
    if layout.priors is None:
        return None
    labels = (shard * layout.images + np.arange(layout.images)) % len(CLASSES)
    masses = draws.uniform(7, "priors", shard, count=layout.images * layout.classes).reshape(-1, layout.classes)
    return choose_priors(masses, labels, layout.priors, layout.levels)


def tiny_records(layout: RecordLayout, shard: int, epoch: int) -> PairRecords:
    """The pairs of an epoch with distances that differ between pairs and epochs."""
    pairs = free_pairs(layout, epoch) if layout.coding == "verbatim" else draw_pairs(layout, shard, epoch)
    org, aug = (layout.levels[tiny_levels(layout, epoch, step)] for step in (5, 7))
    labels = (shard * layout.images + np.arange(layout.images)) % len(CLASSES)
    return with_further(replace(pairs, distance_org=org, distance_aug=aug), layout, labels, epoch)


def with_further(records: PairRecords, layout: RecordLayout, labels: NDArray[np.int64], seed: int) -> PairRecords:
    """The pairs with any further classes that the layout allows; `labels` (n,) are the images'."""
    if layout.further is None:
        return records
    shape = (len(records), layout.further)
    chances = draws.uniform(seed, "further", count=len(records) * layout.classes).reshape(-1, layout.classes)
    for index in (records.index_org, records.index_aug):
        chances[np.arange(len(records)), labels[index]] = 1
    levels = draws.integers(seed, "further-levels", count=shape[0] * shape[1], high=len(layout.levels)).reshape(shape)
    return replace(
        records,
        further_classes=np.argsort(chances, axis=1, kind="stable")[:, : layout.further],
        further_distances=layout.levels[np.sort(levels, axis=1)],
    )


def free_pairs(layout: RecordLayout, seed: int) -> PairRecords:
    """Pairs as the format never draws them: partners at will within a cycle, any boxes, any λ."""
    pairs, group, size = layout.pairs, layout.group_of_pair, layout.size
    org = draws.permutation(seed, "free-order", count=layout.images)[:pairs]
    bounds = cycle_bounds(pairs, layout.cycle)
    starts, lengths = (np.repeat(values, np.diff(bounds)) for values in (bounds[:-1], np.diff(bounds)))
    aug = starts + (draws.uniform(seed, "free-partner", count=pairs) * lengths).astype(np.int64)
    views = _free_boxes(seed, "free-view", pairs, size)
    flips = (draws.uniform(seed, "free-flip", count=pairs) < 0.5) & layout.flip
    is_cutmix = draws.uniform(seed, "free-kind", count=layout.groups) < 0.5
    mix_box = np.where(is_cutmix[:, None], _free_boxes(seed, "free-mix", layout.groups, size), np.int16(0))
    return PairRecords(
        index_org=org,
        index_aug=org[aug],
        view_org=views,
        view_aug=views[aug],
        flip_org=flips,
        flip_aug=flips[aug],
        is_cutmix=is_cutmix[group],
        mix_box=mix_box[group],
        lam=draws.uniform(seed, "free-lam", count=layout.groups).astype(np.float32)[group],
        distance_org=np.full(pairs, np.nan, np.float32),
        distance_aug=np.full(pairs, np.nan, np.float32),
    )


def _free_boxes(seed: int, purpose: str, count: int, size: int) -> NDArray[np.int16]:
    """Boxes (count, 4) between any two pixels of an image."""
    ends = np.sort(draws.integers(seed, purpose, count=4 * count, high=size).reshape(2, 2, count), axis=0)
    return np.stack([*ends[0], *(ends[1] - ends[0] + 1)], axis=1).astype(np.int16)


def tiny_levels(layout: RecordLayout, epoch: int, step: int) -> NDArray[np.int64]:
    """Level indices (P,) that differ between pairs and epochs."""
    return (np.arange(layout.pairs) * step + epoch) % len(layout.levels)


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
    epochs = manifest.records.epochs
    blocks = encode_shard_records((tiny_records(layout, shard, epoch) for epoch in range(epochs)), layout, shard)
    return write_shard(
        folder / shard_name(shard),
        shard=shard,
        images=tiny_images(shard * images, images),
        extension="png",
        blocks=blocks,
        epochs=epochs,
        layout=layout,
        priors=tiny_priors(layout, shard),
    )


def _png(number: int) -> bytes:
    x, y = np.meshgrid(np.arange(SIZE), np.arange(SIZE))
    pixels = np.stack([x * 16, y * 16, (x + y) * 8 + number], axis=-1) % 256
    buffer = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()
