"""The images of one split, read one at a time: from files in a folder, or from an array in memory."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from builders.images import read_rgb, resize_to
from nrrdd_format.errors import DataError


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
    """Image files below `root`; `names` are their paths relative to it, with forward slashes."""

    root: Path
    names: list[str]
    labels: NDArray[np.int64]
    size: int

    def __len__(self) -> int:
        return len(self.names)

    def name(self, index: int) -> str:
        return self.names[index]

    def read(self, index: int) -> NDArray[np.uint8]:
        return _channels_first(resize_to(read_rgb(self.root / self.names[index]), self.size))

    def fingerprint(self) -> str:
        """Covers names, labels, file sizes and S: quick for many files, blind to edits of equal length."""
        return _sha256(
            os.fsencode(f"{name}\0{label}\0{_file_size(self.root / name)}\0{self.size}\n")
            for name, label in zip(self.names, self.labels, strict=True)
        )


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


def _channels_first(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return np.ascontiguousarray(image.transpose(2, 0, 1))


def _file_size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error


def _sha256(parts: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()
