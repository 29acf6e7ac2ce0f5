"""WebDataset shards as a source: images and labels as members of tar files, read in any order from their places.

Shards behind URLs are fetched once into a cache, where they lie as any others do.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from builders.class_names import read_lines, some
from builders.image_sets import Columns, PackedImages, Place, Splits, first_side
from builders.images import MAX_FILE_BYTES, UnusableImage
from builders.remote_shards import fetch_shards
from builders.tar_index import Label, ShardIndex, index_shards, read_at
from nrrdd_format.errors import DataError, counted, shown
from nrrdd_format.limits import MAX_CLASSES
from nrrdd_format.remote import is_url, local_path

CLASS_NAMES = "classnames.txt"
"""A file beside the shards, or beside the splits' folders: the class of label k in line k."""
TESTS = ("test", "val", "validation")
_SPLIT = re.compile(r"(?<![a-z])(train|test|validation|val)(?![a-z])")
_SPLIT_FOLDER = re.compile(r"(?:.*-)?(train|test|validation|val)(?:-[0-9a-f]{12})?")


@dataclass(frozen=True, kw_only=True, eq=False)
class TarImages(PackedImages):
    """Images in tar files: image row r lies in `shards[shard[r]]`, `length[r]` bytes from `offset[r]` on."""

    shards: tuple[Path, ...]
    keys: tuple[str, ...]
    shard: NDArray[np.int32]
    offset: NDArray[np.int64]
    length: NDArray[np.int64]

    def encoded(self, row: int) -> Path | bytes:
        path, offset, length = self.shards[self.shard[row]], int(self.offset[row]), int(self.length[row])
        if length > MAX_FILE_BYTES:
            raise UnusableImage(f"has {length} bytes, more than the {MAX_FILE_BYTES} allowed for an image file")
        try:
            with open(path, "rb") as file:
                data = read_at(file, offset, length)
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error
        if len(data) != length:
            raise DataError(
                f"{path}: ends within {self.keys[row]}, at byte {offset + len(data)}; replace it by a whole copy"
            )
        return data

    def row_name(self, row: int) -> str:
        return f"{self.shards[self.shard[row]].name}/{self.keys[row]}"

    def facts(self) -> Iterator[bytes]:
        """Names of shards and samples, and where their images lie."""
        yield from (f"{path.name}\n".encode(errors="surrogateescape") for path in self.shards)
        yield from (f"{key}\n".encode(errors="surrogateescape") for key in self.keys)
        yield from (self.shard.tobytes(), self.offset.tobytes(), self.length.tobytes())


@dataclass(frozen=True, kw_only=True)
class TarPlaces:
    """Where the shards of a source lie: a folder with them in it, folders `train` and `test`, or patterns.

    Attributes:
        data: a folder, or a pattern such as `path/{000..099}.tar`, of a URL too.
        test: the same of the test split, where it does not lie with the training split.
        cache_dir: holds the shards of URLs, and indexes.
    """

    data: Place
    test: Place | None
    cache_dir: Path


def load_tars(places: TarPlaces, columns: Columns, size: int | None, largest: int) -> tuple[Path, Splits]:
    """Indexes the shards of the training split, and of a test split where there is one.

    Args:
        places: where they lie.
        columns: the ending of the image's member where a sample has several (`left.jpg`); the ending of the label's
            member, or the key of the label in the JSON member. Default: `cls`, then `label` in `json`.
        size: S; None: the shorter side of the first usable image, at most `largest`.

    Returns:
        The folder around the shards, and the splits.

    Raises:
        ConfigError: a URL that cannot be read.
        DataError: shards are missing or damaged, or a sample has no label, or several images.
        OutputError: shards of a URL cannot be kept.
    """
    root, train, test = find_shards(places.data, places.cache_dir)
    if places.test is not None:
        test = _shards_of(places.test, "--test-dir", places.cache_dir)
    indexes = index_shards(train, columns, places.cache_dir)
    names = _class_names(root, train, indexes)
    images = _images(train, indexes, names, size or largest)
    if size is None:
        side = first_side((images.encoded(row) for row in range(len(images))), largest)
        if side is None:
            raise DataError(f"{root}: found no usable image in {counted(len(train), 'shard')}")
        images = replace(images, size=side)
    held_out = _images(test, index_shards(test, columns, places.cache_dir), names, images.size) if test else None
    return root, Splits(class_names=[str(name) for name in names], train=images, test=held_out)


def find_shards(place: Place, cache_dir: Path) -> tuple[Path, list[Path], list[Path]]:
    """The folder around the shards, and the shards of the training and the test split (none: there is no such split).

    Raises:
        DataError: no shards of a training split.
    """
    if isinstance(place, Path) and (place / "train").is_dir():
        test = next((place / name for name in TESTS if (place / name).is_dir()), None)
        train_shards = _shards_of(place / "train", "--data-dir", cache_dir)
        return place, train_shards, [] if test is None else _shards_of(test, "--data-dir", cache_dir)
    shards = _shards_of(place, "--data-dir", cache_dir)
    splits = {path: split for path in shards if (split := _split(path))}
    train = [path for path in shards if splits.get(path) == "train"]
    if not train:
        return shards[0].parent, shards, []
    return shards[0].parent, train, [path for path in shards if splits.get(path) in TESTS]


def _split(shard: Path) -> str | None:
    """The split that a shard's name tells, or else its folder's (which for a URL ends in the URL's last word)."""
    found = _SPLIT.search(shard.name.lower()) or _SPLIT_FOLDER.fullmatch(shard.parent.name.lower())
    return found[1] if found else None


def _shards_of(place: Place, option: str, cache_dir: Path) -> list[Path]:
    """The .tar files of a folder, or those that a pattern names; those of URLs are fetched."""
    if is_url(place, option):
        return fetch_shards(expand(str(place)), option, cache_dir, beside=CLASS_NAMES)
    place = local_path(place, option)
    if place.is_dir():
        shards = sorted(path for path in place.glob("*.tar") if not path.name.startswith("."))
    else:
        shards = [Path(name) for name in expand(str(place))]
    if not shards:
        raise DataError(f"{place}: found no .tar files; {option} expects a folder of them, or path/{{000..099}}.tar")
    gone = [path.name for path in shards if not path.is_file()]
    if gone:
        raise DataError(f"{place}: found no file {some(gone)}; {option} expects a folder of .tar files, or a pattern")
    return shards


def expand(pattern: str) -> list[str]:
    """The names that a pattern stands for. Raises DataError: its braces do not match."""
    from webdataset.shardlists import expand_urls

    try:
        names: list[str] = expand_urls(pattern)
    except ValueError as error:
        raise DataError(f"{pattern}: {error}; expected a pattern as path/{{000..099}}.tar") from error
    return names


def _class_names(root: Path, shards: Sequence[Path], indexes: Sequence[ShardIndex]) -> list[Label]:
    """The classes in the order of their labels: as classnames.txt says, else the labels themselves."""
    for folder in (root, root.parent):
        if (folder / CLASS_NAMES).is_file():
            return list(read_lines(folder / CLASS_NAMES))
    values = {label for index in indexes for label in index.labels}
    if not values:
        raise DataError(f"{root}: found no images in {counted(len(shards), 'shard')}; expected members such as 0.jpg")
    if len(values) > MAX_CLASSES:
        raise DataError(f"{root}: found {len(values)} different labels, expected at most {MAX_CLASSES} classes")
    numbers = [value for value in values if isinstance(value, int)]
    if len(numbers) == len(values):
        if not 0 <= min(numbers) <= max(numbers) < MAX_CLASSES:
            raise DataError(f"{root}: found labels {min(numbers)} to {max(numbers)}, expected classes numbered from 0")
        return list(range(max(numbers) + 1))
    if numbers:
        raise DataError(
            f"{root}: found numbers and names as labels, as {min(numbers)}; expected one of both throughout"
        )
    return sorted(map(str, values))


def _images(shards: Sequence[Path], indexes: Sequence[ShardIndex], names: Sequence[Label], size: int) -> TarImages:
    read = [label for index in indexes for label in index.labels]
    keys = tuple(key for index in indexes for key in index.keys)
    shard = np.repeat(np.arange(len(shards), dtype=np.int32), [len(index.keys) for index in indexes])
    named = {value for value in read if isinstance(value, str)}
    if repeated := [str(name) for name, count in Counter(names).items() if count > 1 and name in named]:
        raise DataError(f"{CLASS_NAMES}: several classes are named {some(repeated)}, which samples have as label")
    known = {name: label for label, name in enumerate(names)}
    labels = np.empty(len(keys), np.int64)
    for row, value in enumerate(read):
        label = value if isinstance(value, int) and 0 <= value < len(names) else known.get(value, known.get(str(value)))
        if label is None:
            where = f"{shards[shard[row]]}: sample {keys[row]!r}"
            raise DataError(f"{where} has the label {shown(value)}, expected one of the {len(names)} classes")
        labels[row] = label
    return TarImages(
        labels=labels,
        rows=np.arange(len(labels)),
        size=size,
        shards=tuple(shards),
        keys=keys,
        shard=shard,
        offset=np.array([offset for index in indexes for offset in index.offsets], np.int64),
        length=np.array([length for index in indexes for length in index.lengths], np.int64),
    )
