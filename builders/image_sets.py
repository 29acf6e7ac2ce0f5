"""The images of one split, read one at a time: from a folder, from an array in memory, or out of large files."""

from __future__ import annotations

import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from builders.images import UnusableImage, read_rgb, resize_to
from nrrdd_format.errors import DataError

Packed = TypeVar("Packed", bound="PackedImages")
Place = Path | str
"""A folder or file; str: behind a URL."""

MIN_SIZE, MAX_SIZE = 8, 1024
"""Bounds of the images' side: the smallest default network halves it three times."""


class ImageSet(Protocol):
    """The labelled images of one split, all read at the same size S."""

    @property
    def labels(self) -> NDArray[np.int64]:
        """Class of every image: int64 (n,)."""

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """A stable name of an image: its path below the split's folder, or a number in the dataset."""

    def read(self, index: int) -> NDArray[np.uint8]:
        """One image: uint8 RGB (3, S, S).

        Raises:
            UnusableImage: the file is no image, or damaged.
            DataError: the file cannot be read at all.
        """

    def fingerprint(self) -> str:
        """Hex SHA-256 of what decides which images these are; equal as long as the source stays the same."""


@dataclass(frozen=True, kw_only=True)
class FolderImages:
    """Image files below `root`; `names` are their paths relative to it, with forward slashes.

    `ignored` counts, by ending, the files beside them that have no image's ending.
    """

    root: Path
    names: list[str]
    labels: NDArray[np.int64]
    size: int
    ignored: Mapping[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.names)

    def name(self, index: int) -> str:
        return self.names[index]

    def file(self, index: int) -> Path:
        """Where an image lies."""
        return self.root / self.names[index]

    def read(self, index: int) -> NDArray[np.uint8]:
        return _channels_first(resize_to(read_rgb(self.file(index)), self.size))

    def fingerprint(self) -> str:
        """Covers names, labels, file sizes and S: quick for many files, blind to edits of equal length."""
        return _sha256(  # no Path for each file: there may be millions
            os.fsencode(f"{name}\0{label}\0{_file_size(os.path.join(self.root, name))}\0{self.size}\n")
            for name, label in zip(self.names, self.labels.tolist(), strict=True)
        )

    def arranged(self, indices: NDArray[np.int64], labels: NDArray[np.int64], size: int) -> FolderImages:
        """The images at `indices`, in that order, labelled anew and read at another size."""
        return replace(self, names=[self.names[index] for index in indices], labels=labels, size=size)


@dataclass(frozen=True, kw_only=True)
class ArrayImages:
    """Images held in memory: `pixels` uint8 RGB (n, H, W, 3); `numbers` name them, as `<prefix>/<number>`."""

    pixels: NDArray[np.uint8]
    labels: NDArray[np.int64]
    numbers: NDArray[np.int64]
    prefix: str
    size: int

    def __len__(self) -> int:
        return len(self.pixels)

    def name(self, index: int) -> str:
        return f"{self.prefix}/{self.numbers[index]:05d}"

    def read(self, index: int) -> NDArray[np.uint8]:
        return _channels_first(resize_to(self.pixels[index], self.size))

    def fingerprint(self) -> str:
        parts = (self.pixels, self.labels, self.numbers)
        return _sha256(
            [f"{self.prefix} {self.size} {self.pixels.shape}\n".encode(), *(part.tobytes() for part in parts)]
        )

    def taken(self, indices: NDArray[np.int64]) -> ArrayImages:
        """The images at `indices`, in that order, under their old names."""
        return replace(self, pixels=self.pixels[indices], labels=self.labels[indices], numbers=self.numbers[indices])

    def restricted_to(self, classes: list[int]) -> ArrayImages:
        """The images of these classes only, relabelled 0, 1, …; `classes` ascends."""
        kept = self.taken(np.flatnonzero(np.isin(self.labels, classes)))
        return replace(kept, labels=np.searchsorted(classes, kept.labels).astype(np.int64))


@dataclass(frozen=True, kw_only=True, eq=False)
class PackedImages(ABC):
    """Images that lie encoded in larger files; a subclass says where. `rows` number them there."""

    labels: NDArray[np.int64]
    rows: NDArray[np.int64]
    size: int

    @abstractmethod
    def encoded(self, row: int) -> Path | bytes:
        """The image file of a row, or where it lies; raises UnusableImage or DataError."""

    @abstractmethod
    def row_name(self, row: int) -> str:
        """A stable name of a row."""

    @abstractmethod
    def facts(self) -> Iterator[bytes]:
        """What the fingerprint covers besides rows, labels and S."""

    def __len__(self) -> int:
        return len(self.rows)

    def name(self, index: int) -> str:
        return self.row_name(int(self.rows[index]))

    def file(self, index: int) -> Path | bytes:
        """An image's file, or where it lies; raises UnusableImage or DataError."""
        return self.encoded(int(self.rows[index]))

    def read(self, index: int) -> NDArray[np.uint8]:
        return _channels_first(resize_to(read_rgb(self.file(index)), self.size))

    def fingerprint(self) -> str:
        """Covers rows, labels, S and what the subclass knows without reading the images."""
        start = f"{self.size} {len(self)}\n".encode()
        return _sha256(chain((start, self.rows.tobytes(), self.labels.tobytes()), self.facts()))

    def restricted_to(self: Packed, classes: list[int]) -> Packed:
        """The images of these classes only, relabelled 0, 1, …; `classes` ascends."""
        kept = np.isin(self.labels, classes)
        labels = np.searchsorted(classes, self.labels[kept]).astype(np.int64)
        return replace(self, rows=self.rows[kept], labels=labels)

    def arranged(self: Packed, indices: NDArray[np.int64], labels: NDArray[np.int64], size: int) -> Packed:
        """The images at `indices`, in that order, labelled anew and read at another size."""
        return replace(self, rows=self.rows[indices], labels=labels, size=size)


@dataclass(frozen=True, kw_only=True)
class Columns:
    """Where images and labels stand in a table's rows, or in samples; None: where they are plain to see."""

    image: str | None = None
    label: str | None = None


PLAIN = Columns()


class DivisibleImages(ImageSet, Protocol):
    """An image set that can be restricted to some of its classes."""

    @property
    def size(self) -> int:
        """S."""

    def restricted_to(self, classes: list[int]) -> ImageSet:
        """The images of these classes only, relabelled 0, 1, …; `classes` ascends."""


class FileImages(ImageSet, Protocol):
    """An image set whose images are files, on a disk or within larger ones."""

    @property
    def size(self) -> int:
        """S."""

    def file(self, index: int) -> Path | bytes:
        """An image's file, or where it lies; raises UnusableImage or DataError."""

    def arranged(self, indices: NDArray[np.int64], labels: NDArray[np.int64], size: int) -> FileImages:
        """The images at `indices`, in that order, labelled anew and read at another size."""


@dataclass(frozen=True, kw_only=True)
class Splits:
    """Both splits of a dataset and its class names."""

    class_names: list[str]
    train: DivisibleImages
    test: DivisibleImages | None


@contextmanager
def named_faults() -> Iterator[None]:
    """For finding images: what the operating system refuses, such as a look into a closed folder, becomes one line.

    Raises:
        DataError: names the file or folder.
    """
    try:
        yield
    except OSError as error:
        if error.filename is None:
            raise
        raise DataError(f"{error.filename}: cannot be read ({error.strerror or error})") from error


def members_by_class(labels: NDArray[np.int64], classes: int) -> list[NDArray[np.int64]]:
    """Indices of the images of every class, ascending."""
    counts = np.bincount(labels, minlength=classes)
    return np.split(np.argsort(labels, kind="stable"), np.cumsum(counts)[:-1])


def first_side(encoded: Iterable[Path | bytes], largest: int) -> int | None:
    """The shorter side of the first usable image, made even so that patches can tile it, from 8 to `largest` px.

    None: no image is usable.
    """
    for file in encoded:
        try:
            height, width, _ = read_rgb(file).shape
        except UnusableImage:
            continue
        side = int(min(height, width))
        return min(max(side - side % 2, MIN_SIZE), largest)
    return None


def _channels_first(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return np.ascontiguousarray(image.transpose(2, 0, 1))


def _file_size(path: str) -> int:
    try:
        return os.stat(path).st_size
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error


def _sha256(parts: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()
