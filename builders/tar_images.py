"""WebDataset shards as a source: images and labels as members of tar files, read in any order.

A sample is what consecutive members of one key hold: `<key>.jpg` beside `<key>.cls` or `<key>.json`. Every shard is
gone through once, header by header, for where its images lie; after that an image is read from its place.
"""

from __future__ import annotations

import json
import os
import re
import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np
from numpy.typing import NDArray

from builders.class_names import read_lines, some
from builders.image_sets import Columns, PackedImages, Splits, first_side
from builders.images import EXTENSIONS, MAX_FILE_BYTES, UnusableImage
from builders.progress import Progress
from nrrdd_format.errors import DataError, shown
from nrrdd_format.limits import MAX_CLASSES

CLASS_NAMES = "classnames.txt"
"""A file beside the shards, or beside the splits' folders: the class of label k in line k."""
TESTS = ("test", "val", "validation")
LABEL, MAX_LABEL_BYTES = "label", 1 << 20
MAX_LABEL_DIGITS = 18
"""Of a label that is a number."""
MAX_HEADER_BYTES = 1 << 20
"""Of an extended tar header, which holds a long name."""
_BLOCK = bytes(tarfile.BLOCKSIZE)
_URL = re.compile(r"pipe:|[a-z][a-z0-9+.-]*:/")
_SPLIT = re.compile(r"(?<![a-z])(train|test|validation|val)(?![a-z])")

Label = int | str


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
                data = _read(file, offset, length)
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error
        if len(data) != length:
            raise DataError(f"{path}: ends within {self.keys[row]}, at byte {offset + len(data)}; fetch it again")
        return data

    def row_name(self, row: int) -> str:
        return f"{self.shards[self.shard[row]].name}/{self.keys[row]}"

    def facts(self) -> Iterator[bytes]:
        """Names of shards and samples, and where their images lie."""
        yield from (f"{path.name}\n".encode(errors="surrogateescape") for path in self.shards)
        yield from (f"{key}\n".encode(errors="surrogateescape") for key in self.keys)
        yield from (self.shard.tobytes(), self.offset.tobytes(), self.length.tobytes())


@dataclass(kw_only=True)
class _Index:
    """Where the images of one split lie, and the labels as they were read."""

    shards: list[Path]
    keys: list[str] = field(default_factory=list)
    labels: list[Label] = field(default_factory=list)
    places: list[tuple[int, int, int]] = field(default_factory=list)
    """Shard, offset and length of each image."""


def load_tars(data_dir: Path, test_dir: Path | None, columns: Columns, size: int | None, largest: int) -> Splits:
    """Indexes the shards of the training split, and of a test split where there is one.

    Args:
        data_dir: a folder of shards, a folder with folders `train` and `test` (or `val`) of shards, or a pattern such
            as `path/{000..099}.tar`. In one folder for all, names tell the splits apart.
        test_dir: a folder or pattern of the test split's shards.
        columns: the ending of the image's member where a sample has several (`left.jpg`); the ending of the label's
            member, or the key of the label in the JSON member. Default: `cls`, then `label` in `json`.
        size: S; None: the shorter side of the first usable image, at most `largest`.

    Raises:
        DataError: shards are missing or damaged, or a sample has no label, or several images.
    """
    root, train, test = find_shards(data_dir)
    if test_dir is not None:
        test = _shards_of(test_dir, "--test-dir")
    index = _index(train, columns)
    names = _class_names(root, index)
    images = _images(index, names, size or largest)
    if size is None:
        side = first_side((images.encoded(row) for row in range(len(images))), largest)
        if side is None:
            raise DataError(f"{data_dir}: found no usable image in {len(train)} shards")
        images = replace(images, size=side)
    held_out = _images(_index(test, columns), names, images.size) if test else None
    return Splits(class_names=[str(name) for name in names], train=images, test=held_out)


def find_shards(data_dir: Path) -> tuple[Path, list[Path], list[Path]]:
    """The folder around the shards, and the shards of the training and the test split (none: there is no such split).

    Raises:
        DataError: no shards of a training split.
    """
    if (data_dir / "train").is_dir():
        test = next((data_dir / name for name in TESTS if (data_dir / name).is_dir()), None)
        train_shards = _shards_of(data_dir / "train", "--data-dir")
        return data_dir, train_shards, [] if test is None else _shards_of(test, "--data-dir")
    shards = _shards_of(data_dir, "--data-dir")
    splits = {path: found[1] for path in shards if (found := _SPLIT.search(path.name.lower()))}
    train = [path for path in shards if splits.get(path) == "train"]
    if not train:
        return shards[0].parent, shards, []
    return shards[0].parent, train, [path for path in shards if splits.get(path) in TESTS]


def _shards_of(place: Path, option: str) -> list[Path]:
    """The .tar files of a folder, or those that a pattern names."""
    if _URL.match(str(place)):
        raise DataError(f"{option}: {place}: shards are read from a disk, not from a URL; copy them to a folder first")
    if place.is_dir():
        shards = sorted(path for path in place.glob("*.tar") if not path.name.startswith("."))
    else:
        from webdataset.shardlists import expand_urls

        shards = [Path(name) for name in expand_urls(str(place))]
    if not shards:
        raise DataError(f"{place}: found no .tar files; {option} expects a folder of them, or path/{{000..099}}.tar")
    gone = [path.name for path in shards if not path.is_file()]
    if gone:
        raise DataError(f"{place}: found no file {some(gone)}; {option} expects a folder of .tar files, or a pattern")
    return shards


def _index(shards: list[Path], columns: Columns) -> _Index:
    index = _Index(shards=shards)
    with Progress(len(shards), "index", "shard") as progress:
        for number, path in enumerate(shards):
            with _opened(path) as file:
                for key, members in groupby(_members(path, file), key=lambda member: member[0]):
                    _add_sample(index, number, key, {ending: place for _, ending, *place in members}, file, columns)
            progress.advance()
    if not index.keys:
        raise DataError(f"{shards[0].parent}: found no images in {len(shards)} shards; expected members such as 0.jpg")
    return index


def _opened(path: Path) -> BinaryIO:
    try:
        return open(path, "rb")
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error


def _members(path: Path, file: BinaryIO) -> Iterator[tuple[str, str, int, int]]:
    """Key, ending, offset and length of every file in a tar, in order; hidden ones and `__…__` do not count.

    Raises:
        DataError: the tar is damaged, or ends without its end marker; Python's reader passes over either in silence.
    """
    try:
        with tarfile.open(fileobj=cast(BinaryIO, _Bounded(file)), mode="r:") as archive:
            end = 0
            while (member := archive.next()) is not None:
                archive.members = []  # type: ignore[attr-defined]  # they would pile up
                if member.size < 0 or archive.offset <= end:  # a negative size leads back to the same header
                    raise tarfile.ReadError(f"the header before byte {archive.offset} states a size of {member.size}")
                end = archive.offset
                folder, name = os.path.split(member.name)
                key, _, ending = name.partition(".")
                if member.isreg() and not member.issparse() and key and not member.name.startswith("__"):
                    yield os.path.join(folder, key), ending.lower(), member.offset_data, member.size
            end = archive.offset
    except (tarfile.TarError, EOFError, OSError, ValueError, OverflowError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"{path}: is no whole tar file ({reason}); fetch it again") from error
    if _read(file, end, len(_BLOCK)) != _BLOCK:
        raise DataError(f"{path}: is damaged or cut off at byte {end}, before the tar's end marker; fetch it again")


class _Bounded:
    """A file for `tarfile`, which asks for as many bytes as an extended header says it has."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def read(self, size: int) -> bytes:
        if not 0 <= size <= MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"an extended header states {size} bytes, expected at most {MAX_HEADER_BYTES}")
        return self._file.read(size)

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()


def _read(file: BinaryIO, offset: int, length: int) -> bytes:
    file.seek(offset)
    return file.read(length)


def _add_sample(
    index: _Index, shard: int, key: str, members: dict[str, list[int]], file: BinaryIO, columns: Columns
) -> None:
    """Adds a sample's image and label to the index; a sample without image is passed over."""
    where = f"{index.shards[shard]}: sample {key!r}"
    wanted = [columns.image.lower()] if columns.image else [ending for ending in members if f".{ending}" in EXTENSIONS]
    found = [ending for ending in wanted if ending in members]
    if len(found) > 1:
        raise DataError(f"{where} has several images ({', '.join(found)}); name one with --image-column")
    if found:
        index.labels.append(_label(where, members, file, columns.label))
        index.keys.append(key)
        index.places.append((shard, *members[found[0]]))  # type: ignore[arg-type]


def _label(where: str, members: dict[str, list[int]], file: BinaryIO, named: str | None) -> Label:
    for ending in (named.lower() if named else None, "cls" if named is None else None):
        if ending in members:
            text = _text(where, ending, members[ending], file).strip()
            is_number = text.isdecimal() and text.isascii() and len(text) <= MAX_LABEL_DIGITS
            return int(text) if is_number else text
    name = named or LABEL
    if "json" in members:
        try:
            content = json.loads(_text(where, "json", members["json"], file))
        except (ValueError, RecursionError) as error:
            raise DataError(f"{where}: its .json cannot be read ({error})") from error
        value = content.get(name) if isinstance(content, dict) else None
        if isinstance(value, (int, str)) and not isinstance(value, bool):
            return value
    raise DataError(
        f"{where} has no label: found {', '.join(members)}, expected a member .cls, or .json with the number or name "
        f"of the class under {name!r}; name another with --label-column"
    )


def _text(where: str, ending: str, place: Sequence[int], file: BinaryIO) -> str:
    offset, length = place
    if length > MAX_LABEL_BYTES:
        raise DataError(f"{where}: its .{ending} has {length} bytes, expected at most {MAX_LABEL_BYTES}")
    try:
        return _read(file, offset, length).decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: its .{ending} is no UTF-8 text") from error


def _class_names(root: Path, index: _Index) -> list[Label]:
    """The classes in the order of their labels: as classnames.txt says, else the labels themselves."""
    for folder in (root, root.parent):
        if (folder / CLASS_NAMES).is_file():
            return list(read_lines(folder / CLASS_NAMES))
    values = set(index.labels)
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


def _images(index: _Index, names: Sequence[Label], size: int) -> TarImages:
    named = {value for value in index.labels if isinstance(value, str)}
    if repeated := [str(name) for name, count in Counter(names).items() if count > 1 and name in named]:
        raise DataError(f"{CLASS_NAMES}: several classes are named {some(repeated)}, which samples have as label")
    known = {name: label for label, name in enumerate(names)}
    labels = np.empty(len(index.keys), np.int64)
    for row, value in enumerate(index.labels):
        label = value if isinstance(value, int) and 0 <= value < len(names) else known.get(value, known.get(str(value)))
        if label is None:
            where = f"{index.shards[index.places[row][0]]}: sample {index.keys[row]!r}"
            raise DataError(f"{where} has the label {shown(value)}, expected one of the {len(names)} classes")
        labels[row] = label
    places = np.array(index.places, np.int64).reshape(-1, 3)
    return TarImages(
        labels=labels,
        rows=np.arange(len(labels)),
        size=size,
        shards=tuple(index.shards),
        keys=tuple(index.keys),
        shard=places[:, 0].astype(np.int32),
        offset=np.ascontiguousarray(places[:, 1]),
        length=np.ascontiguousarray(places[:, 2]),
    )
