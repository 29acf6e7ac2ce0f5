"""Finds the training images of each class that can be used, and names those that cannot."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from builders.image_sets import ImageSet
from builders.images import UnusableImage
from builders.prefetch import in_processes


@dataclass(frozen=True, kw_only=True)
class Usable:
    """Images of one class.

    `indices` into the image set are usable, in the order asked for; `bad` holds (name, reason) of every image
    that was passed over on the way.
    """

    indices: list[int]
    bad: list[tuple[str, str]]


def usable_images(
    image_set: ImageSet, candidates: Sequence[NDArray[np.int64]], *, needed: int, processes: int = 1
) -> Iterator[Usable]:
    """Takes images of every class in the order of its candidates until `needed` of them have decoded.

    Args:
        image_set: the images.
        candidates: for each class, indices of images, int64, each at most once.
        needed: how many usable images of each are wanted; fewer come back where there are no more.
        processes: how many decode what is wanted if all is sound; what replaces bad images is read in this one.

    Raises:
        DataError: a file cannot be read at all; that says nothing about its image, so no other replaces it.
    """
    fault = partial(_fault, image_set)
    wanted = [of_class[:needed] for of_class in candidates]
    with closing(in_processes(fault, np.concatenate([np.empty(0, np.int64), *wanted]), processes)) as faults:
        for of_class in candidates:
            found = Usable(indices=[], bad=[])
            for number, index in enumerate(of_class.tolist()):
                if len(found.indices) == needed:
                    break
                error = next(faults) if number < needed else fault(index)
                if error is None:
                    found.indices.append(index)
                else:
                    found.bad.append((image_set.name(index), error.reason))
            yield found


def _fault(image_set: ImageSet, index: int) -> UnusableImage | None:
    try:
        image_set.read(index)
    except UnusableImage as error:
        return error
    return None
