"""Makes the golden datasets of every format version.

Run from the repository: `PYTHONPATH=.:tests python tests/golden/make_golden.py`.

They hold generated images only. Each folder has a dataset and `expected.json`, the content every reader must find in
it. Golden folders of released versions are never made again, only added to.
"""

from __future__ import annotations

import hashlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tiny_dataset import tiny_manifest, write_tiny

from nrrdd_format.dataset import open_dataset
from nrrdd_format.pairs import Coding
from nrrdd_format.shards import ShardReader

HERE = Path(__file__).resolve().parent
DATASETS: dict[str, tuple[Coding, int | None, int | None]] = {
    "v1.0-explicit": ("explicit", None, None),
    "v1.0-derived": ("derived", None, None),
    "v1.0-verbatim": ("verbatim", None, None),
    "v1.1-explicit": ("explicit", 2, None),
    "v2.0-explicit": ("explicit", 2, 2),
}
"""By folder: coding, classes in a prior, further classes of a pair; the version is the lowest that has these."""
MANY_CLASSES = 300
"""Where pairs have further classes, whose numbers so take two bytes."""


def write_golden(folder: Path, name: str) -> Path:
    """Writes the golden dataset of one name: three epochs in blocks of two."""
    coding, priors, further = DATASETS[name]
    classes = 3 if further is None else MANY_CLASSES
    manifest = tiny_manifest(coding=coding, epochs=3, block_epochs=2, priors=priors, further=further, classes=classes)
    return write_tiny(folder, manifest, shards=1)


def dataset_content(folder: Path) -> dict[str, Any]:
    """What a dataset holds, as JSON values: `expected.json`."""
    with open_dataset(folder) as dataset:
        return {
            "dataset_id": dataset.manifest.dataset_id,
            "class_names": list(dataset.manifest.dataset.class_names),
            "shards": [_shard_content(reader) for reader in dataset.shards],
        }


def _shard_content(reader: ShardReader) -> dict[str, Any]:
    return {
        "indices": reader.indices.tolist(),
        "labels": reader.labels.tolist(),
        "pixels_sha256": [_pixels_sha256(reader.image_bytes(i)) for i in range(reader.images)],
        "epochs": [_epoch_content(reader, epoch) for epoch in range(reader.epochs)],
        **_prior_content(reader),
    }


def _prior_content(reader: ShardReader) -> dict[str, Any]:
    """By image, the classes of its prior and their distances; nothing without priors."""
    priors = reader.priors
    if priors is None:
        return {}
    distances = priors.distances(reader.layout.levels)
    return {"prior_classes": priors.classes.tolist(), "prior_distances": [_plain(row) for row in distances]}


def _epoch_content(reader: ShardReader, epoch: int) -> dict[str, Any]:
    records = reader.records(epoch)
    return {name: _plain(column) for name, column in records.columns().items()}


def _plain(column: NDArray[Any]) -> list[Any]:
    """JSON values; a float32 as the shortest decimal that reads back as itself."""
    if column.dtype != np.float32:
        return list(column.tolist())
    return [float(str(v)) if v.ndim == 0 else _plain(v) for v in column]


def _pixels_sha256(data: bytes) -> str:
    pixels = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    return hashlib.sha256(pixels.tobytes()).hexdigest()


def main() -> None:
    """Write the golden datasets that are not there yet."""
    for name in DATASETS:
        folder = HERE / name
        if folder.exists():
            continue
        write_golden(folder, name)
        text = json.dumps(dataset_content(folder), separators=(",", ":"))
        (folder / "expected.json").write_text(text.replace('},"', '},\n"').replace('],"', '],\n"') + "\n")


if __name__ == "__main__":
    main()
