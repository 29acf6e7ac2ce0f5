"""Priors: what the teacher sees in each image of a shard beside the image's own class (SPEC.md section 5).

Shapes: n images, k classes in each image's prior, C classes in all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nrrdd_format.codebooks import quantize
from nrrdd_format.errors import ConfigError, FormatError, shown
from nrrdd_format.frames import list_in

GAPS, LEVELS = "prior_gaps", "prior_levels"
"""Keys of the map in front of the record blocks."""
_LEAST = 1e-30  # keeps the logarithm of a probability of zero finite


@dataclass(frozen=True, kw_only=True, eq=False)
class Priors:
    """The k likeliest other classes of every image, in ascending order of the classes."""

    classes: NDArray[np.int64]  # (n, k)
    levels: NDArray[np.uint8]  # (n, k) indices of -log p among the distance levels

    def distances(self, table: NDArray[np.float32]) -> NDArray[np.float32]:
        """-log p in nats, (n, k)."""
        found: NDArray[np.float32] = table[self.levels]
        return found

    def pack(self) -> dict[str, list[int]]:
        """As plain lists, image by image: each class as its gap to the one before, and the levels."""
        gaps = np.diff(self.classes, axis=1, prepend=-1) - 1
        return {GAPS: gaps.ravel().tolist(), LEVELS: self.levels.ravel().tolist()}

    @classmethod
    def unpack(cls, content: Mapping[str, Any], *, images: int, count: int, classes: int, levels: int) -> Priors:
        """Reads what `pack` gives: `count` of `classes` classes for each of `images` images.

        Raises FormatError for lists of another length and for values out of their range.
        """
        gaps = _numbers(content, GAPS, images * count, classes).reshape(images, count)
        stored = _numbers(content, LEVELS, images * count, levels).reshape(images, count)
        found = np.cumsum(gaps + 1, axis=1) - 1
        over = np.flatnonzero(found[:, -1] >= classes)
        if len(over):
            raise FormatError(f"prior of image {over[0]}: class {found[over[0], -1]}, expected less than {classes}")
        return cls(classes=found, levels=stored.astype(np.uint8))

    def take(self, images: NDArray[np.int64]) -> Priors:
        """The priors of the chosen images, in the order given."""
        return Priors(classes=self.classes[images], levels=self.levels[images])

    @classmethod
    def concatenate(cls, parts: Sequence[Priors]) -> Priors:
        """The priors of all parts' images, one part after the other."""
        return cls(
            classes=np.concatenate([part.classes for part in parts]),
            levels=np.concatenate([part.levels for part in parts]),
        )

    def check_labels(self, labels: NDArray[np.int64]) -> None:
        """Refuses a prior that names the image's own class; `labels` (n,) are the images'. Raises FormatError."""
        own = np.flatnonzero((self.classes == labels[:, None]).any(1))
        if len(own):
            raise FormatError(f"prior of image {own[0]}: names its own class {labels[own[0]]}, expected others only")


def choose_priors(
    masses: NDArray[np.floating], labels: NDArray[np.int64], count: int, table: NDArray[np.float32]
) -> Priors:
    """The `count` likeliest classes of every image but its own, their shares of all other classes rounded to levels.

    Args:
        masses: (n, C) what the teacher gives to each class, not negative, on any scale.
        labels: (n,) the images' own classes.
        count: k, 1 to C - 1.
        table: (L,) the distance levels, ascending.

    Raises:
        ConfigError: k is out of its range.
    """
    others = masses.astype(np.float64)
    others[np.arange(len(labels)), labels] = 0
    if not 1 <= count < others.shape[1]:
        raise ConfigError(f"priors of {count} classes, expected 1..{others.shape[1] - 1}: all but the image's own")
    shares = others / np.maximum(others.sum(1, keepdims=True), _LEAST)
    shares[np.arange(len(labels)), labels] = -1
    classes = np.sort(np.argsort(-shares, axis=1, kind="stable")[:, :count], axis=1)
    chosen = np.take_along_axis(shares, classes, 1)
    return Priors(classes=classes, levels=quantize(-np.log(np.maximum(chosen, _LEAST)), table))


def _numbers(content: Mapping[str, Any], name: str, count: int, high: int) -> NDArray[np.int64]:
    """The list of exactly `count` integers in [0, high) under this name."""
    values = list_in(content, name, count, count)
    wrong = next((i for i, value in enumerate(values) if type(value) is not int or not 0 <= value < high), None)
    if wrong is not None:
        raise FormatError(f"{name}[{wrong}] is {shown(values[wrong])}, expected 0..{high - 1}")
    return np.array(values, np.int64)
