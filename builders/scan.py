"""Finds the training images of one class that can be used, and names those that cannot."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from builders.image_sets import ImageSet
from builders.images import UnusableImage


@dataclass(frozen=True, kw_only=True)
class Usable:
    """Images of one class.

    `indices` into the image set are usable, in the order asked for; `bad` holds (name, reason) of every image
    that was passed over on the way.
    """

    indices: list[int]
    bad: list[tuple[str, str]]


def usable_images(image_set: ImageSet, class_label: int, *, needed: int, order: NDArray[np.int64]) -> Usable:
    """Takes the images of a class in `order` until `needed` of them have decoded.

    Args:
        image_set: the images.
        class_label: the class.
        needed: how many usable images are wanted; fewer come back where the class has no more.
        order: positions within the class, int64, each at most once; images it leaves out are never taken.

    Raises:
        DataError: a file cannot be read at all; that says nothing about its image, so no other replaces it.
    """
    members = np.flatnonzero(image_set.labels == class_label)
    indices: list[int] = []
    bad: list[tuple[str, str]] = []
    for index in members[order].tolist():
        if len(indices) == needed:
            break
        try:
            image_set.read(index)
        except UnusableImage as error:
            bad.append((image_set.name(index), error.reason))
        else:
            indices.append(index)
    return Usable(indices=indices, bad=bad)
