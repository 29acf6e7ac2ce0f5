"""The source datasets by name: where their images lie, and the conventions they are distilled with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from builders.array_sources import load_cifar, load_digits
from builders.class_names import are_wnids, beside, check_wnids, name_wnids, select_classes, some
from builders.conventions import DATASETS, Colour, default_model
from builders.folders import class_folders, list_classes, list_test, natural_side
from builders.hub_images import load_hub
from builders.image_sets import MAX_SIZE, MIN_SIZE, PLAIN, Columns, ImageSet, Place, Splits, named_faults
from builders.tar_images import TarPlaces, load_tars
from nrrdd_format.errors import ConfigError, DataError
from nrrdd_format.files import default_cache_dir
from nrrdd_format.remote import is_url, local_path

LARGEST_DEFAULT = 224
"""Side beyond which images of no size of their own are not read unless `--size` says so."""

WITH_COLUMNS = ("hf", "webdataset")
"""Datasets that take `--image-column` and `--label-column`."""

OPEN_SIZES = tuple(name for name, dataset in DATASETS.items() if dataset.size is None)
"""Datasets that take `--size`: any images may be in them."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """A labelled image dataset, ready to be distilled.

    `wnids` are WordNet identifiers of the classes, None where they have none. `test` is None where no test
    split was found. All images are read at `size` x `size` px; `mean` and `std` normalise RGB values / 255.
    `flip`: a mirrored image still shows its class. `beta`: patches in one synthetic image (RDED's factor).
    """

    name: str
    class_names: list[str]
    wnids: list[str] | None
    train: ImageSet
    test: ImageSet | None
    size: int
    mean: Colour
    std: Colour
    flip: bool
    beta: int
    default_model: str


@named_faults()
def load_source(
    name: str,
    *,
    data_dir: Place | None,
    test_dir: Place | None = None,
    classes: Sequence[str] | None = None,
    size: int | None = None,
    columns: Columns = PLAIN,
    cache_dir: Path | None = None,
) -> Source:
    """Finds a dataset's images and says how they are treated.

    Args:
        name: a key of `conventions.DATASETS`.
        data_dir: the folder that holds the dataset; CIFAR is downloaded there if it is missing. A WebDataset's shards
            may lie behind URLs.
        test_dir: the test split's folder, where it does not lie beside the training split.
        classes: only these classes, by name or WNID; they keep the dataset's order, labelled 0, 1, …
        size: side in pixels to read images of no size of their own at (`OPEN_SIZES`). Default: the shorter side of
            the first usable image, made even, at most 224.
        columns: where images and labels stand in a dataset of Hugging Face, or in the samples of a WebDataset.
        cache_dir: keeps a WebDataset's shards behind URLs, and its index. Default: `nrrdd` in the user's cache folder.

    Raises:
        ConfigError: an unknown name or class, or an option that this dataset does not take.
        DataError: the images are missing or not laid out as expected.
    """
    check_name(name)
    check_size(name, size)
    _check_columns(name, columns)
    check_cache_dir(name, cache_dir)
    if name == "webdataset" and data_dir is not None:
        places = TarPlaces(data=data_dir, test=test_dir, cache_dir=cache_dir or default_cache_dir())
        return _packed_source(name, *load_tars(places, columns, size, LARGEST_DEFAULT), classes)
    data_dir, test_dir = local_folder("--data-dir", name, data_dir), local_folder("--test-dir", name, test_dir)
    if name == "digits":
        return _digits_source(data_dir, test_dir, classes)
    if data_dir is None:
        raise DataError(f"{name}: --data-dir is missing; give the folder that holds {DATASETS[name].layout}")
    if name == "hf":
        _refuse_test_dir(name, test_dir)
        return _packed_source(name, beside(data_dir), load_hub(data_dir, columns, size, LARGEST_DEFAULT), classes)
    if name in ("cifar10", "cifar100") and not (data_dir / "train").is_dir():
        return _cifar_source(name, data_dir, test_dir, classes)
    return _folder_source(name, data_dir, test_dir, classes, size)


def check_name(name: str) -> None:
    """Raises ConfigError unless `name` is a dataset's."""
    if name not in DATASETS:
        raise ConfigError(f"--dataset: found {name!r}, expected one of {', '.join(DATASETS)}")


def local_folder(option: str, name: str, place: Place | None) -> Path | None:
    """The folder that an option names; raises ConfigError for a URL, which only shards may have."""
    if place is None or isinstance(place, Path):
        return place
    if is_url(place, option):
        raise ConfigError(
            f"{option}: {name} is read from a folder, not from a URL; only webdataset's shards may have one"
        )
    return local_path(place, option)


def _digits_source(data_dir: Path | None, test_dir: Path | None, classes: Sequence[str] | None) -> Source:
    for option, given in (("--data-dir", data_dir), ("--test-dir", test_dir)):
        if given is not None:
            raise ConfigError(f"{option}: digits comes with scikit-learn and takes no folder; leave the option out")
    return _splits_source("digits", load_digits(32), classes)


def _cifar_source(name: str, data_dir: Path, test_dir: Path | None, classes: Sequence[str] | None) -> Source:
    _refuse_test_dir(f"torchvision's {name}", test_dir)
    return _splits_source(name, load_cifar(name, data_dir, DATASETS[name].layout, 32), classes)


def _refuse_test_dir(name: str, test_dir: Path | None) -> None:
    if test_dir is not None:
        raise ConfigError(f"--test-dir: {name} brings its own test split; leave the option out")


def _splits_source(
    name: str, splits: Splits, classes: Sequence[str] | None, wnids: Sequence[str] | None = None
) -> Source:
    chosen = select_classes(splits.class_names, wnids, classes)
    return make_source(
        name,
        class_names=[splits.class_names[label] for label in chosen],
        wnids=None if wnids is None else [wnids[label] for label in chosen],
        train=splits.train.restricted_to(chosen),
        test=None if splits.test is None else splits.test.restricted_to(chosen),
        size=splits.train.size,
    )


def _packed_source(name: str, root: Path, splits: Splits, classes: Sequence[str] | None) -> Source:
    """A source whose images lie in large files; classes that are named by WNIDs get their words from beside these."""
    wnids = splits.class_names if are_wnids(splits.class_names) else None
    if wnids is not None:
        splits = replace(splits, class_names=name_wnids(root, wnids))
    return _without_gaps(_splits_source(name, splits, classes, wnids))


def _without_gaps(source: Source) -> Source:
    """The source, if both its splits have images of every class; raises DataError if not."""
    for which, images in (("training", source.train), ("test", source.test)):
        empty = set() if images is None else set(range(len(source.class_names))) - set(images.labels.tolist())
        if empty:
            named = some([source.class_names[label] for label in sorted(empty)])
            raise DataError(f"{source.name}: the {which} split has no images for {named}")
    return source


def _folder_source(
    name: str, data_dir: Path, test_dir: Path | None, classes: Sequence[str] | None, size: int | None
) -> Source:
    root, train = _find_train(name, data_dir)
    return _split_source(name, root, train, _find_test(name, root, test_dir), classes, size)


@named_faults()
def load_split(name: str, split: Path, *, classes: Sequence[str] | None = None, size: int | None = None) -> Source:
    """A dataset of which one split is there, a folder of class folders: its classes, and its images as `train`.

    Raises:
        ConfigError: an unknown class, or a size that this dataset does not take.
        DataError: the images are missing or not laid out as expected.
    """
    check_size(name, size)
    return _split_source(name, None, split, None, classes, size)


def _split_source(
    name: str, root: Path | None, train: Path, test: Path | None, classes: Sequence[str] | None, size: int | None
) -> Source:
    dataset = DATASETS[name]
    folders = class_folders(train)
    _check_classes(name, train, folders)
    names = name_wnids(root or train, folders) if dataset.wnids else folders
    chosen = select_classes(names, folders if dataset.wnids else None, classes)
    kept = [folders[label] for label in chosen]
    images = list_classes(train, kept, MAX_SIZE)
    side = size or dataset.size or natural_side(images, kept, LARGEST_DEFAULT)
    return make_source(
        name,
        class_names=[names[label] for label in chosen],
        wnids=kept if dataset.wnids else None,
        train=replace(images, size=side),
        test=None if test is None else list_test(test, kept, folders, side),
        size=side,
    )


def make_source(
    name: str,
    *,
    class_names: list[str],
    wnids: list[str] | None,
    train: ImageSet,
    test: ImageSet | None,
    size: int,
) -> Source:
    """These classes and images under the conventions of the dataset `name`."""
    dataset = DATASETS[name]
    return Source(
        name=name,
        class_names=class_names,
        wnids=wnids,
        train=train,
        test=test,
        size=size,
        mean=dataset.mean,
        std=dataset.std,
        flip=dataset.flip,
        beta=dataset.beta or (4 if size > 64 else 1),
        default_model=default_model(size),
    )


def _find_train(name: str, data_dir: Path) -> tuple[Path | None, Path]:
    """The folder around the splits (None: there is only one split) and the training split."""
    layout = DATASETS[name].layout
    if not data_dir.is_dir():
        raise DataError(f"{data_dir}: no such folder; {name} expects --data-dir to hold {layout}")
    if (data_dir / "train").is_dir():
        return data_dir, data_dir / "train"
    inner = DATASETS[name].inner
    roots = sorted(root for root in data_dir.glob(inner) if (root / "train").is_dir()) if inner else []
    if len(roots) > 1:
        found = some([root.name for root in roots])
        raise DataError(f"{data_dir}: found several copies of {name} ({found}); give one of them as --data-dir")
    if roots:
        return roots[0], roots[0] / "train"
    if name == "imagefolder":
        return _find_bare_train(data_dir)
    raise DataError(f"{data_dir}: found no folder 'train'; {name} expects {layout}")


def _find_bare_train(data_dir: Path) -> tuple[Path | None, Path]:
    """A data folder without `train` inside: it is the training split itself, alone or beside a test split."""
    if data_dir.resolve().name == "train":
        return data_dir.resolve().parent, data_dir
    tests = [split for split in ("test", "val") if (data_dir / split).is_dir()]
    if tests:
        raise DataError(
            f"{data_dir}: found a folder {tests[0]!r} but no 'train'; "
            f"imagefolder expects {DATASETS['imagefolder'].layout}"
        )
    return None, data_dir


def _find_test(name: str, root: Path | None, test_dir: Path | None) -> Path | None:
    if test_dir is not None:
        if not test_dir.is_dir():
            raise DataError(f"{test_dir}: no such folder; --test-dir must hold one folder of images for each class")
        return test_dir
    candidates = [root / split for split in DATASETS[name].tests] if root is not None else []
    return next((split for split in candidates if split.is_dir()), None)


def _check_classes(name: str, train: Path, folders: list[str]) -> None:
    dataset = DATASETS[name]
    if dataset.wnids:
        check_wnids(train, folders)
    if dataset.classes is not None and len(folders) != dataset.classes:
        raise DataError(
            f"{train}: found {len(folders)}/{dataset.classes} class folders of {name}; complete the folder, "
            f"or use --dataset imagefolder for a part of it"
        )
    if len(folders) < 2:
        raise DataError(f"{train}: found 1 class folder ({folders[0]}), expected 2 or more: {dataset.layout}")


def _check_columns(name: str, columns: Columns) -> None:
    """Refuses options that this dataset does not take."""
    for option, column in (("--image-column", columns.image), ("--label-column", columns.label)):
        if column is not None and name not in WITH_COLUMNS:
            raise ConfigError(f"{option}: {name} has no columns; leave the option out, or use --dataset hf")


def check_cache_dir(name: str, cache_dir: Path | None) -> None:
    """Raises ConfigError for a cache that this dataset does not use."""
    if cache_dir is not None and name != "webdataset":
        raise ConfigError(f"--cache-dir: {name} keeps nothing there, only webdataset does; leave the option out")


def check_size(name: str, size: int | None) -> None:
    """Raises ConfigError for a side that this dataset does not take."""
    if size is None:
        return
    if name not in OPEN_SIZES:
        raise ConfigError(f"--size: {name} is read at its own size; use --dataset imagefolder to choose another")
    if not MIN_SIZE <= size <= MAX_SIZE:
        raise ConfigError(f"--size: found {size}, expected {MIN_SIZE} to {MAX_SIZE} pixels")
