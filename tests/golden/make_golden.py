"""Makes the golden datasets of the current format version.

Run from the repository: `PYTHONPATH=.:tests python tests/golden/make_golden.py`.

They hold generated images only. Each folder has a dataset and `expected.json`, the content every reader must find in
it. Golden folders of released versions are never made again, only added to.
"""

from __future__ import annotations

import hashlib
import io
import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tiny_dataset import tiny_manifest, write_tiny

from nrrdd_format.dataset import open_dataset
from nrrdd_format.manifest import VERSION
from nrrdd_format.pairs import Coding
from nrrdd_format.shards import ShardReader

HERE = Path(__file__).resolve().parent
CODINGS: tuple[Coding, ...] = ("explicit", "derived", "verbatim")


def write_golden(folder: Path, coding: Coding) -> Path:
    """Writes the golden dataset of one coding: three epochs in blocks of two."""
    return write_tiny(folder, tiny_manifest(coding=coding, epochs=3, block_epochs=2), shards=1)


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
    }


def _epoch_content(reader: ShardReader, epoch: int) -> dict[str, Any]:
    records = reader.records(epoch)
    columns = {f.name: getattr(records, f.name) for f in fields(records)}
    return {name: _plain(column) for name, column in columns.items()}


def _plain(column: NDArray[Any]) -> list[Any]:
    """JSON values; a float32 as the shortest decimal that reads back as itself."""
    return [float(str(v)) for v in column] if column.dtype == np.float32 else list(column.tolist())


def _pixels_sha256(data: bytes) -> str:
    pixels = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    return hashlib.sha256(pixels.tobytes()).hexdigest()


def main() -> None:
    """Write every golden dataset of the current version."""
    for coding in CODINGS:
        folder = HERE / f"v{VERSION[0]}.{VERSION[1]}-{coding}"
        write_golden(folder, coding)
        text = json.dumps(dataset_content(folder), separators=(",", ":"))
        (folder / "expected.json").write_text(text.replace('},"', '},\n"').replace('],"', '],\n"') + "\n")


if __name__ == "__main__":
    main()
