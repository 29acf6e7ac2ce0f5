"""Datasets of Hugging Face's library `datasets`: images and labels in columns of a table that lies on disk.

Rows are read one at a time from the memory-mapped table. Nothing in a dataset is run: the library no longer takes
scripts.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from builders.class_names import some
from builders.image_sets import Columns, PackedImages, Splits, first_side
from builders.images import UnusableImage
from nrrdd_format.errors import ConfigError, DataError
from nrrdd_format.limits import MAX_CLASSES

TESTS = ("test", "validation", "valid", "val")
"""Names of splits that may test a teacher; one without labels does not count."""
_SAVED = ("dataset_dict.json", "state.json")
"""What `save_to_disk` leaves: of several splits, or of one."""
_TABLE_FILES = ("*.parquet", "data/*.parquet")
_BATCH = 1000


@dataclass(frozen=True, kw_only=True, eq=False)
class TableImages(PackedImages):
    """Images in a column of a table."""

    table: Any
    """A `datasets.Dataset` with the one column of undecoded images."""
    split: str

    def encoded(self, row: int) -> Path | bytes:
        (value,) = self.table[row].values()
        data, path = (value.get("bytes"), value.get("path")) if isinstance(value, dict) else (value, None)
        if isinstance(data, bytes):
            return data
        if isinstance(path, str) and os.path.isabs(path):
            return Path(path)
        raise UnusableImage("holds neither an image's bytes nor the path of a file on this machine")

    def row_name(self, row: int) -> str:
        return f"{self.split}/{row:07d}"

    def facts(self) -> Iterator[bytes]:
        """The size of every row's bytes, or its path."""
        import pyarrow as pa
        import pyarrow.compute as pc

        for batch in self.table.with_format("arrow").iter(_BATCH):
            column = batch.column(0)
            is_struct = pa.types.is_struct(column.type)
            # Chunk by chunk: one array of them all would be a copy of the images.
            data = [pc.struct_field(chunk, "bytes") if is_struct else chunk for chunk in column.chunks]
            yield str([length for part in data for length in pc.binary_length(part).to_pylist()]).encode()
            if is_struct and any(part.null_count for part in data):
                paths = (pc.struct_field(chunk, "path").to_pylist() for chunk in column.chunks)
                yield str([path for part in paths for path in part]).encode()


@dataclass(frozen=True, kw_only=True)
class _Training:
    """The training split of a dataset, and the columns it was found in."""

    splits: Any
    image: str
    label: str
    classes: list[Any]
    images: TableImages


def load_hub(data_dir: Path, columns: Columns, size: int | None, largest: int) -> Splits:
    """Loads the training split, and a test split where there is one with labels.

    Args:
        data_dir: a folder by `save_to_disk`, or what `load_dataset` takes: a folder of files, a name on the hub.
        columns: the columns of images and labels. Default: those of the kinds Image and ClassLabel.
        size: S; None: the shorter side of the first usable image, at most `largest`.

    Raises:
        ConfigError: `datasets` is not installed, or a column that is not there or must be named.
        DataError: no such dataset, no usable image, or rows without label.
    """
    found = _load_training(data_dir, columns, size, largest)
    return Splits(class_names=[str(value) for value in found.classes], train=found.images, test=_test_split(found))


def load_hub_images(data_dir: Path, columns: Columns, largest: int) -> tuple[list[str], TableImages]:
    """The classes and images of the training split alone; arguments and errors are those of `load_hub`."""
    found = _load_training(data_dir, columns, None, largest)
    return [str(value) for value in found.classes], found.images


def _load_training(data_dir: Path, columns: Columns, size: int | None, largest: int) -> _Training:
    splits = _load(data_dir)
    name = "train" if "train" in splits else next(iter(splits)) if len(splits) == 1 else None
    if name is None:
        raise DataError(f"{data_dir}: found the splits {some(list(splits))}, expected one named train")
    table = splits[name]
    image, label = _image_column(data_dir, table, columns.image), _label_column(data_dir, table, columns.label)
    classes = _class_values(data_dir, table, label)
    labels = _labels(table, label, classes)
    if labels is None:
        raise DataError(f"{data_dir}: rows of the split {name} have no label in the column {label}")
    images = TableImages(
        labels=labels, rows=np.arange(len(labels)), size=size or largest, table=_undecoded(table, image), split=name
    )
    if size is None:
        images = _sized(data_dir, images, largest)
    return _Training(splits=splits, image=image, label=label, classes=classes, images=images)


def is_hub_folder(folder: Path) -> bool:
    """Whether a folder holds what `save_to_disk` leaves, or Parquet files."""
    return any((folder / name).is_file() for name in _SAVED) or any(
        True for pattern in _TABLE_FILES for _ in folder.glob(pattern)
    )


def _load(data_dir: Path) -> Any:
    """The splits by name."""
    try:
        import datasets
    except ImportError as error:
        raise ConfigError("datasets is not installed; run: pip install 'nrrdd[datasets]'") from error
    try:
        if any((data_dir / name).is_file() for name in _SAVED):
            loaded = datasets.load_from_disk(str(data_dir))
        else:
            loaded = datasets.load_dataset(str(data_dir))
    except Exception as error:  # the library passes on whatever its readers of a dozen formats raise
        reason = " ".join(str(error).split())[:300]
        raise DataError(
            f"{data_dir}: datasets cannot load it ({reason}); check the folder's or dataset's name"
        ) from error
    return loaded if isinstance(loaded, dict) else {"train": loaded}


def _image_column(data_dir: Path, table: Any, named: str | None) -> str:
    found = [name for name, feature in table.features.items() if type(feature).__name__ == "Image"]
    chosen = _choose(data_dir, table, named, found, "--image-column", "images")
    feature = table.features[chosen]
    if type(feature).__name__ != "Image" and getattr(feature, "dtype", None) not in ("binary", "large_binary"):
        raise ConfigError(
            f"--image-column: {chosen} of {data_dir} holds {_kind(feature)}, expected images or their bytes"
        )
    return chosen


def _label_column(data_dir: Path, table: Any, named: str | None) -> str:
    found = [name for name, feature in table.features.items() if type(feature).__name__ == "ClassLabel"]
    if not found and "label" in table.features:
        found = ["label"]
    chosen = _choose(data_dir, table, named, found, "--label-column", "labels")
    feature = table.features[chosen]
    dtype = str(getattr(feature, "dtype", None))
    if type(feature).__name__ not in ("ClassLabel", "Value") or not re.fullmatch(r"u?int\d+|(large_)?string", dtype):
        raise ConfigError(f"--label-column: {chosen} of {data_dir} holds {_kind(feature)}, expected numbers or names")
    return chosen


def _kind(feature: Any) -> str:
    """What a column holds, in a word or two."""
    return f"{type(feature).__name__} ({feature.dtype})" if hasattr(feature, "dtype") else type(feature).__name__


def _choose(data_dir: Path, table: Any, named: str | None, found: list[str], option: str, what: str) -> str:
    columns = list(table.features)
    if named is not None:
        if named not in columns:
            raise ConfigError(f"{option}: found {named!r}, expected a column of {data_dir}: {some(columns)}")
        return named
    if len(found) != 1:
        raise ConfigError(
            f"{option}: {data_dir} has {len(found)} columns of {what} ({some(found or columns)}); name the one to use"
        )
    return found[0]


def _class_values(data_dir: Path, table: Any, label: str) -> list[Any]:
    """The classes in the order of their labels: a ClassLabel's names, else the sorted values of the column."""
    names = getattr(table.features[label], "names", None)
    if names is not None:
        return list(names)
    values = table.unique(label)
    if len({type(value) for value in values}) != 1 or not isinstance(values[0], (int, str)):
        raise DataError(f"{data_dir}: the column {label} holds {some([repr(v) for v in values])}, expected class names")
    if len(values) > MAX_CLASSES:
        raise DataError(f"{data_dir}: the column {label} holds {len(values)} different values, too many for classes")
    return sorted(values)


def _labels(table: Any, label: str, classes: list[Any]) -> NDArray[np.int64] | None:
    """The label of every row, int64 (n,); None where a row has none of the classes."""
    column = table.select_columns([label]).with_format("arrow")
    values = [value for batch in column.iter(_BATCH) for value in batch.column(0).to_pylist()]
    if hasattr(table.features[label], "names"):
        known = {number: number for number in range(len(classes))}
    else:
        known = {value: number for number, value in enumerate(classes)}
    labels = np.array([known.get(value, -1) for value in values], np.int64)
    return labels if (labels >= 0).all() else None


def _undecoded(table: Any, image: str) -> Any:
    """The table's images alone, as they are encoded."""
    import datasets

    alone = table.select_columns([image]).with_format(None)
    is_image = isinstance(table.features[image], datasets.Image)
    return alone.cast_column(image, datasets.Image(decode=False)) if is_image else alone


def _sized(data_dir: Path, images: TableImages, largest: int) -> TableImages:
    side = first_side((images.encoded(row) for row in range(len(images))), largest)
    if side is None:
        raise DataError(f"{data_dir}: found no usable image in the split {images.split}")
    return replace(images, size=side)


def _test_split(found: _Training) -> TableImages | None:
    for name in TESTS:
        table = found.splits.get(name)
        if name == found.images.split or table is None or not {found.image, found.label} <= set(table.features):
            continue
        labels = _labels(table, found.label, found.classes)
        if labels is not None:
            size, rows = found.images.size, np.arange(len(labels))
            return TableImages(labels=labels, rows=rows, size=size, table=_undecoded(table, found.image), split=name)
    return None
