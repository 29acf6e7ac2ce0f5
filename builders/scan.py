"""Finds the training images of one class that can be used, and names those that cannot."""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from builders.image_sets import ImageSet
from builders.images import UnusableImage
from builders.prefetch import read_ahead


@dataclass(frozen=True, kw_only=True)
class Usable:
    """Images of one class.

    `indices` into the image set are usable, in the order asked for; `bad` holds (name, reason) of every image
    that was passed over on the way.
    """

    indices: list[int]
    bad: list[tuple[str, str]]


def usable_images(image_set: ImageSet, candidates: NDArray[np.int64], *, needed: int, threads: int = 1) -> Usable:
    """Takes images of a class in the order of `candidates` until `needed` of them have decoded.

    Args:
        image_set: the images.
        candidates: indices of images of one class, int64, each at most once.
        needed: how many usable images are wanted; fewer come back where there are no more.
        threads: how many images are decoded at once.

    Raises:
        DataError: a file cannot be read at all; that says nothing about its image, so no other replaces it.
    """
    indices: list[int] = []
    bad: list[tuple[str, str]] = []

    def fault(index: int) -> UnusableImage | None:
        try:
            image_set.read(index)
        except UnusableImage as error:
            return error
        return None

    # Chunks of what is still needed: nothing is read that is not wanted, and a sound class is one chunk.
    rest = candidates.tolist()
    while rest and len(indices) < needed:
        chunk, rest = rest[: needed - len(indices)], rest[needed - len(indices) :]
        with closing(read_ahead(fault, chunk, threads)) as faults:
            for index, error in zip(chunk, faults, strict=True):
                if error is None:
                    indices.append(index)
                else:
                    bad.append((image_set.name(index), error.reason))
    return Usable(indices=indices, bad=bad)
