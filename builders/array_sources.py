"""The datasets that fit in memory as arrays: scikit-learn's digits, and torchvision's CIFAR files."""

from __future__ import annotations

from http.client import HTTPException
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray

from builders.image_sets import ArrayImages, Splits
from nrrdd_format import draws
from nrrdd_format.errors import DataError

TEST_SHARE = 0.2
"""Share of each digit's images that form the test split; scikit-learn has none of its own."""


def load_digits(size: int) -> Splits:
    """scikit-learn's 1797 handwritten digits (8x8 greys), split once and for all: 80 % training, 20 % test.

    Raises:
        DataError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits as load
    except ImportError as error:
        raise DataError("digits: scikit-learn is not installed; run: pip install 'nrrdd[digits]'") from error
    greys, labels = load(return_X_y=True)
    pixels = np.rint(greys.reshape(-1, 8, 8, 1) * (255 / 16)).astype(np.uint8).repeat(3, axis=3)
    digits = _images(pixels, labels, "digits", size)
    in_test = _test_members(digits.labels)
    return Splits(
        class_names=[str(digit) for digit in range(10)],
        train=digits.taken(np.flatnonzero(~in_test)),
        test=digits.taken(np.flatnonzero(in_test)),
    )


def load_cifar(name: str, data_dir: Path, layout: str, size: int) -> Splits:
    """CIFAR-10 or CIFAR-100 from torchvision's files in `data_dir`, downloaded first if missing.

    The files are pickles: torchvision compares each with a known checksum before it opens any.

    Raises:
        DataError: the files are not there (or damaged) and cannot be downloaded.
    """
    from torchvision import datasets

    kind = datasets.CIFAR10 if name == "cifar10" else datasets.CIFAR100
    try:
        train, test = (kind(str(data_dir), train=part, download=True) for part in (True, False))
    except (OSError, RuntimeError, HTTPException) as error:
        reason = " ".join(str(error).split())
        raise DataError(
            f"{data_dir}: {name} is not there and cannot be downloaded ({reason}); expected {layout}"
        ) from error
    return Splits(
        class_names=list(train.classes),
        train=_images(train.data, train.targets, "train", size),
        test=_images(test.data, test.targets, "test", size),
    )


def _test_members(labels: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Which images belong to the test split: bool (n,); every class gives the same share."""
    chosen = np.zeros(len(labels), dtype=np.bool_)
    for digit in range(10):
        members = np.flatnonzero(labels == digit)
        order = draws.permutation(0, "digits-split", digit, count=len(members))
        chosen[members[order[: round(TEST_SHARE * len(members))]]] = True
    return chosen


def _images(pixels: NDArray[np.uint8], labels: ArrayLike, prefix: str, size: int) -> ArrayImages:
    return ArrayImages(
        pixels=pixels,
        labels=np.asarray(labels, dtype=np.int64),
        numbers=np.arange(len(pixels)),
        prefix=prefix,
        size=size,
    )
