"""What a dataset is and costs, as plain values and as text."""

from __future__ import annotations

import os
from dataclasses import fields
from typing import Any

import numpy as np

from nrrdd_format.dataset import DistilledDataset, open_dataset
from nrrdd_format.errors import ConfigError
from nrrdd_format.records import PairRecords


def describe(path: str | os.PathLike[str], *, record: tuple[int, int, int] | None = None) -> dict[str, Any]:
    """The dataset's key figures; with `record=(shard, epoch, pair)`, positions from 0, that pair as well.

    Bytes are those of the files. Raises FormatError for a damaged dataset, ConfigError for a wrong `record`.
    """
    with open_dataset(path) as dataset:
        summary = _summary(dataset)
        return summary if record is None else {**summary, "record": _record(dataset, *record)}


def render(description: dict[str, Any]) -> str:
    """`describe`'s values, one a line, nested values indented."""
    return "\n".join(_lines(description, ""))


def _summary(dataset: DistilledDataset) -> dict[str, Any]:
    m = dataset.manifest
    pairs = sum(s.pairs_per_epoch for s in m.shards) * m.records.epochs
    record_bytes = sum(s.record_bytes for s in m.shards)
    return {
        "dataset": m.dataset.name,
        "dataset_id": m.dataset_id,
        "classes": len(m.dataset.class_names),
        "images": m.images.count,
        "images_per_class": m.images.ipc,
        "image_size": m.images.size,
        "codec": m.images.codec,
        "coding": m.records.coding,
        "epochs": m.records.epochs,
        "pairs": pairs,
        "mix": m.records.mix,
        "temperature": m.records.temperature,
        "codebooks": {
            "views": len(m.codebooks.views),
            "mixes": len(m.codebooks.mixes),
            "distances": len(m.codebooks.distances),
        },
        "teacher": {
            "architecture": m.teacher.architecture,
            "sha256": m.teacher.sha256,
            "top1": m.teacher.top1,
        },
        "shards": len(m.shards),
        "bytes": sum(s.bytes for s in m.shards),
        "record_bytes": record_bytes,
        "record_bytes_per_pair": round(record_bytes / pairs, 3) if pairs else None,
    }


def _record(dataset: DistilledDataset, shard: int, epoch: int, pair: int) -> dict[str, Any]:
    m = dataset.manifest
    _within("shard", shard, len(m.shards))
    _within("epoch", epoch, m.records.epochs)
    _within("pair", pair, m.shards[shard].pairs_per_epoch)
    reader = dataset.shards[shard]
    one = reader.records(epoch).take(slice(pair, pair + 1))
    names = m.dataset.class_names
    labels = reader.labels[[one.index_org[0], one.index_aug[0]]]
    position = {"shard": m.shards[shard].name, "epoch": epoch, "pair": pair}
    return {**position, "class_org": names[labels[0]], "class_aug": names[labels[1]], **_plain(one)}


def _plain(one: PairRecords) -> dict[str, Any]:
    """A single record as Python values; distances in nats, shortened to what float32 distinguishes."""
    values = {f.name: getattr(one, f.name)[0] for f in fields(one)}
    return {name: float(str(v)) if isinstance(v, np.floating) else v.tolist() for name, v in values.items()}


def _within(what: str, value: int, count: int) -> None:
    if not 0 <= value < count:
        raise ConfigError(f"{what} {value} does not exist: expected 0..{count - 1}")


def _lines(values: dict[str, Any], indent: str) -> list[str]:
    width = max(map(len, values))
    lines = []
    for key, value in values.items():
        if isinstance(value, dict):
            lines += [f"{indent}{key}", *_lines(value, indent + "  ")]
        else:
            lines.append(f"{indent}{key:{width}}  {'-' if value is None else value}")
    return lines
