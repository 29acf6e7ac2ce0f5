"""What a dataset is, holds and costs, as plain values and as text."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nrrdd_format.dataset import open_dataset, open_shard
from nrrdd_format.errors import ConfigError
from nrrdd_format.manifest import Manifest
from nrrdd_format.pairs import PairRecords
from nrrdd_format.shards import ShardReader

SHOWN_CLASSES = 20
SHOWN_EPOCHS = 10
QUANTILES = {"5%": 0.05, "25%": 0.25, "median": 0.5, "75%": 0.75, "95%": 0.95}
_NAME_WIDTH = 40
_TEXTS = ("wnid", "class")  # columns set on the left
_DISTANCES = ("distance_org", "distance_aug")


def describe(
    path: str | os.PathLike[str], *, record: tuple[int, int, int] | None = None, epochs: int | None = None
) -> dict[str, Any]:
    """The dataset's key figures, its classes, the statistics of its epochs and where its bytes go.

    Args:
        path: the dataset.
        record: (shard, epoch, pair), positions from 0: that pair as well, under `record`.
        epochs: statistics of the first so many stored epochs only; None: of all, which reads every record.

    Returns:
        JSON values. Bytes are those of the files; distances are in nats; a quantile is the smallest level that so large
        a share of the pairs does not exceed.

    Raises:
        FormatError: the dataset is damaged.
        ConfigError: a record that does not exist.
    """
    with open_dataset(path) as dataset:
        manifest, folder = dataset.manifest, dataset.path
    chosen = None if record is None else _record(folder, manifest, *record)
    count = manifest.records.epochs if epochs is None else min(epochs, manifest.records.epochs)
    sums = _Sums(
        images=np.zeros(len(manifest.dataset.class_names), np.int64),
        epochs=[_EpochSums(levels=np.zeros((2, len(manifest.codebooks.distances)), np.int64)) for _ in range(count)],
    )
    for index in range(len(manifest.shards)):
        with open_shard(folder, manifest, index) as reader:
            sums.add(reader, manifest.codebooks.distances)
    facts = {
        **_summary(manifest),
        "share_of_bytes": _shares(manifest, sums),
        "class_table": _classes(manifest, sums.images),
        "epoch_table": [_epoch(number, one, manifest) for number, one in enumerate(sums.epochs) if one.pairs],
    }
    return facts if chosen is None else {**facts, "record": chosen}


def render(description: dict[str, Any]) -> str:
    """`describe`'s values as text: one a line, nested values indented, of long tables the first rows."""
    facts = {key: value for key, value in description.items() if key not in ("class_table", "epoch_table", "record")}
    lines = [*_lines(facts, ""), "", *_class_lines(description["class_table"])]
    if description["epoch_table"]:
        lines += ["", *_epoch_lines(description["epoch_table"], description["epochs"])]
    if "record" in description:
        lines += ["", *_lines({"record": description["record"]}, "")]
    return "\n".join(lines)


@dataclass(kw_only=True)
class _EpochSums:
    """Sums over the pairs of one epoch."""

    levels: NDArray[np.int64]  # (2, L) how often each level occurs, of org and of aug
    pairs: int = 0
    lam: float = 0.0
    cutmix: int = 0
    same_class: int = 0

    def add(self, records: PairRecords, labels: NDArray[np.int64], table: NDArray[np.float32]) -> None:
        self.pairs += len(records)
        self.lam += float(records.lam.sum(dtype=np.float64))
        self.cutmix += int(records.is_cutmix.sum())
        self.same_class += int((labels[records.index_org] == labels[records.index_aug]).sum())
        for row, distances in enumerate((records.distance_org, records.distance_aug)):
            self.levels[row] += np.bincount(np.searchsorted(table, distances), minlength=len(table))


@dataclass(kw_only=True)
class _Sums:
    """Sums over the shards."""

    images: NDArray[np.int64]  # by class
    epochs: list[_EpochSums] = field(default_factory=list)
    image_bytes: int = 0

    def add(self, reader: ShardReader, table: NDArray[np.float32]) -> None:
        self.images += np.bincount(reader.labels, minlength=len(self.images))
        self.image_bytes += sum(member.size for member in reader.header.members[:-1])
        for one, records in zip(self.epochs, reader.all_records(), strict=False):
            one.add(records, reader.labels, table)


def _summary(m: Manifest) -> dict[str, Any]:
    pairs = sum(s.pairs_per_epoch for s in m.shards) * m.records.epochs
    record_bytes = sum(s.record_bytes for s in m.shards)
    return {
        "dataset": m.dataset.name,
        "dataset_id": m.dataset_id,
        "source_license": m.dataset.source_license,
        "classes": len(m.dataset.class_names),
        "images": m.images.count,
        "images_per_class": m.images.ipc,
        "image_size": m.images.size,
        "codec": m.images.codec,
        "quality": m.images.quality,
        "flip": m.images.flip,
        "coding": m.records.coding,
        "epochs": m.records.epochs,
        "pairs": pairs,
        "cycle": m.records.cycle,
        "mix_group": m.records.mix_group,
        "block_epochs": m.records.block_epochs,
        "mix": m.records.mix,
        "temperature": m.records.temperature,
        "priors": m.records.priors,
        "further": m.records.further,
        "codebooks": {
            "views": None if m.codebooks.views is None else len(m.codebooks.views),
            "mixes": None if m.codebooks.mixes is None else len(m.codebooks.mixes),
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


def _shares(manifest: Manifest, sums: _Sums) -> dict[str, float | None]:
    """Where the shards' bytes go; the rest are tar headers, padding, the shards' own headers and their ends."""
    total = sum(s.bytes for s in manifest.shards)
    records = sum(s.record_bytes for s in manifest.shards)
    parts = {"images": sums.image_bytes, "records": records, "headers": total - sums.image_bytes - records}
    return {name: round(count / total, 4) if total else None for name, count in parts.items()}


def _classes(manifest: Manifest, images: NDArray[np.int64]) -> list[dict[str, Any]]:
    names = manifest.dataset.class_names
    wnids = manifest.dataset.wnids or [None] * len(names)
    rows = zip(names, wnids, images.tolist(), strict=True)
    return [{"label": k, "name": name, "wnid": wnid, "images": count} for k, (name, wnid, count) in enumerate(rows)]


def _epoch(number: int, sums: _EpochSums, manifest: Manifest) -> dict[str, Any]:
    table = manifest.codebooks.distances
    return {
        "epoch": number,
        "pairs": sums.pairs,
        "mean_lam": round(sums.lam / sums.pairs, 4),
        "cutmix_share": round(sums.cutmix / sums.pairs, 4),
        "same_class_share": round(sums.same_class / sums.pairs, 4),
        "distance_org": _distribution(sums.levels[0], table),
        "distance_aug": _distribution(sums.levels[1], table),
    }


def _distribution(counts: NDArray[np.int64], table: NDArray[np.float32]) -> dict[str, float]:
    """Mean and quantiles of distances that are levels of the table, from how often each occurs."""
    reached = np.cumsum(counts)
    mean = float(counts @ table.astype(np.float64)) / int(reached[-1])
    quantiles = {name: table[np.searchsorted(reached, share * reached[-1])] for name, share in QUANTILES.items()}
    return {"mean": round(mean, 4)} | {name: _short_float(value) for name, value in quantiles.items()}


def _record(folder: Path, m: Manifest, shard: int, epoch: int, pair: int) -> dict[str, Any]:
    _within("shard", shard, len(m.shards))
    _within("epoch", epoch, m.records.epochs)
    _within("pair", pair, m.shards[shard].pairs_per_epoch)
    with open_shard(folder, m, shard) as reader:
        one = reader.records(epoch).take(slice(pair, pair + 1))
    names = m.dataset.class_names
    labels = reader.labels[[one.index_org[0], one.index_aug[0]]]
    position = {"shard": m.shards[shard].name, "epoch": epoch, "pair": pair}
    return {**position, "class_org": names[labels[0]], "class_aug": names[labels[1]], **_plain(one)} | _further(
        one, names
    )


def _further(one: PairRecords, names: Sequence[str]) -> dict[str, Any]:
    """The further classes by name, where there are any."""
    if one.further_classes is None:
        return {}
    return {"further_classes": [names[label] for label in one.further_classes[0].tolist()]}


def _plain(one: PairRecords) -> dict[str, Any]:
    """A single record as Python values; distances in nats, shortened to what float32 distinguishes."""
    return {name: _plain_value(column[0]) for name, column in one.columns().items()}


def _plain_value(value: Any) -> Any:
    """Of a number, or of a row of them."""
    if isinstance(value, np.ndarray) and value.dtype == np.float32:
        return [_short_float(each) for each in value]
    return _short_float(value) if isinstance(value, np.floating) else value.tolist()


def _short_float(value: np.floating) -> float:
    return float(str(value))


def _within(what: str, value: int, count: int) -> None:
    if not 0 <= value < count:
        expected = f"expected 0..{count - 1}" if count else "there is none"
        raise ConfigError(f"{what} {value} does not exist: {expected}")


def _lines(values: dict[str, Any], indent: str) -> Iterator[str]:
    width = max(map(len, values))
    for key, value in values.items():
        if isinstance(value, dict):
            yield f"{indent}{key}"
            yield from _lines(value, indent + "  ")
        else:
            yield f"{indent}{key:{width}}  {'-' if value is None else value}"


def _class_lines(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    shown = [[r["label"], r["images"], r["wnid"] or "-", _short(r["name"])] for r in rows[:SHOWN_CLASSES]]
    yield from _table(["label", "images", "wnid", "class"], shown)
    if len(rows) > len(shown):
        yield f"… {len(rows) - len(shown)} more classes"


def _epoch_lines(rows: Sequence[dict[str, Any]], stored: int) -> Iterator[str]:
    """Distances as their mean, then their quantiles, of org and of aug."""
    values = ("epoch", "pairs", "mean_lam", "cutmix_share", "same_class_share")
    shown = [
        [*(r[key] for key in values), *(f"{v:.3g}" for key in _DISTANCES for v in r[key].values())]
        for r in rows[:SHOWN_EPOCHS]
    ]
    header = ["epoch", "pairs", "lam", "cutmix", "same class", "d_org", *QUANTILES, "d_aug", *QUANTILES]
    yield from _table(header, shown)
    if stored > len(shown):
        yield f"… {stored - len(shown)} more epochs"


def _table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> Iterator[str]:
    """Columns two spaces apart, numbers on the right, texts on the left."""
    widths = [max(len(str(cell)) for cell in column) for column in zip(header, *rows, strict=True)]
    for row in [header, *rows]:
        cells = [
            str(cell).ljust(width) if name in _TEXTS else str(cell).rjust(width)
            for cell, width, name in zip(row, widths, header, strict=True)
        ]
        yield "  ".join(cells).rstrip()


def _short(name: str) -> str:
    return name if len(name) <= _NAME_WIDTH else name[: _NAME_WIDTH - 1] + "…"
