"""Labels a tiny dataset anew with a real teacher, so that its distances are that teacher's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from builders.relabel import relabel_epoch
from builders.teacher import Teacher
from nrrdd_format.dataset import open_dataset
from nrrdd_format.decoding import decode_image
from nrrdd_format.manifest import CODEC_EXTENSIONS, MANIFEST_NAME, Manifest
from nrrdd_format.pairs import PairRecords, draw_pairs
from nrrdd_format.records import encode_shard_records
from nrrdd_format.replay import stack_images
from nrrdd_format.shards import EncodedImage, ShardEntry, ShardReader, write_shard

Change = Callable[[PairRecords], PairRecords]


def label_dataset(path: Path, teacher: Teacher, change: Change = lambda records: records) -> None:
    """Rewrites every shard with the teacher's distances (`change` may spoil them) and names it in the manifest."""
    with open_dataset(path) as dataset:
        manifest = dataset.manifest
        entries = tuple(_label(shard, manifest, teacher, change) for shard in dataset.shards)
    named = replace(manifest.teacher, architecture=teacher.architecture, sha256=teacher.sha256)
    replace(manifest, teacher=named, shards=entries).save(path / MANIFEST_NAME)


def _label(shard: ShardReader, manifest: Manifest, teacher: Teacher, change: Change) -> ShardEntry:
    data = [shard.image_bytes(image) for image in range(shard.images)]
    records = [change(_labelled(shard, data, manifest, teacher, epoch)) for epoch in range(shard.epochs)]
    named = zip(shard.indices.tolist(), shard.labels.tolist(), data, strict=True)
    return write_shard(
        shard.path,
        shard=shard.shard,
        images=[EncodedImage(index=index, label=label, data=one) for index, label, one in named],
        extension=CODEC_EXTENSIONS[manifest.images.codec],
        blocks=encode_shard_records(records, shard.layout, shard.shard),
        epochs=shard.epochs,
        layout=shard.layout,
    )


def _labelled(shard: ShardReader, data: list[bytes], manifest: Manifest, teacher: Teacher, epoch: int) -> PairRecords:
    info, pairs = manifest.images, draw_pairs(shard.layout, shard.shard, epoch)
    return relabel_epoch(
        stack_images([decode_image(one, info.size) for one in data]),
        shard.labels,
        pairs,
        model=teacher.model,
        temperature=manifest.records.temperature,
        mean=info.mean,
        std=info.std,
        further=shard.layout.further,
    )
