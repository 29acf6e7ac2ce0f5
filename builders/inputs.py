"""What a build starts from: a source dataset, and its distilled images where they exist already."""

from __future__ import annotations

from dataclasses import dataclass

from builders.class_names import select_classes, some
from builders.config import BuildConfig
from builders.conventions import DATASETS
from builders.given_images import GivenFolders, GivenImages, find_given, list_given, match_classes
from builders.image_sets import MAX_SIZE, Columns, ImageSet
from builders.sources import (
    OPEN_SIZES,
    Source,
    check_name,
    check_size,
    load_source,
    load_split,
    make_source,
    natural_side,
)
from nrrdd_format.errors import ConfigError, DataError


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """The images of a build.

    Attributes:
        source: the source dataset; where only given images are there, their classes under its conventions.
        given: the distilled images that exist already; None: the build makes them.
        real: real images to test the teacher on; None: there are none.
        notice: what the user should know of how the images were read.
    """

    source: Source
    given: GivenImages | None = None
    real: ImageSet | None
    notice: str | None = None


def load_inputs(config: BuildConfig) -> Inputs:
    """Finds all images that the options name.

    Raises:
        ConfigError: an unknown name or class, or an option that this dataset does not take.
        DataError: images are missing or not laid out as expected, or two folders disagree on the classes.
    """
    if config.from_images is not None:
        check_name(config.dataset)
        return _load_given(config, find_given(config.from_images))
    source = _load_source(config, config.size)
    return Inputs(source=source, real=source.test if source.test is not None else source.train)


def _load_source(config: BuildConfig, size: int | None) -> Source:
    return load_source(
        config.dataset,
        data_dir=config.data_dir,
        test_dir=config.test_dir,
        classes=config.classes,
        size=size,
        columns=Columns(image=config.image_column, label=config.label_column),
    )


def _load_given(config: BuildConfig, given: GivenFolders) -> Inputs:
    name, size = config.dataset, config.size
    if name in OPEN_SIZES and size is None:
        size = natural_side(given.root, given.folders, MAX_SIZE)
    if config.data_dir is not None or name == "digits":
        source = _load_source(config, size)
    elif config.image_column is not None or config.label_column is not None:
        raise ConfigError("--image-column and --label-column: found without --data-dir, expected with it")
    elif config.test_dir is not None:
        source = load_split(name, config.test_dir, classes=config.classes, size=size)
    else:
        return _alone(config, given, size)
    folders, by_position = match_classes(given, source.class_names, source.wnids, subset=config.classes is not None)
    return Inputs(
        source=source,
        given=list_given(given.root, folders, source.class_names, ipc=config.ipc, size=source.size),
        real=source.test if source.test is not None else source.train,
        notice=_paired(folders, source) if by_position else None,
    )


def _paired(folders: list[str], source: Source) -> str:
    pairs = [f"{folder} = {name}" for folder, name in zip(folders, source.class_names, strict=True)]
    return f"class folders of the given images are taken in the source's order: {some(pairs)}"


def _alone(config: BuildConfig, given: GivenFolders, size: int | None) -> Inputs:
    """Given images without any real ones: their folders say what the classes are."""
    name, known = config.dataset, DATASETS[config.dataset]
    check_size(name, size)
    if known.classes is not None and len(given.folders) != known.classes and config.classes is None:
        raise DataError(
            f"{given.root}: found {len(given.folders)}/{known.classes} class folders of {name}; complete them, or use "
            f"--dataset imagefolder"
        )
    names, wnids = given.classes.names, given.classes.wnids
    chosen = select_classes(names, wnids, config.classes)
    class_names = [names[label] for label in chosen]
    side = known.size or size
    assert side is not None
    images = list_given(given.root, [given.folders[k] for k in chosen], class_names, ipc=config.ipc, size=side)
    source = make_source(
        name,
        class_names=class_names,
        wnids=None if wnids is None else [wnids[label] for label in chosen],
        train=images.files,
        test=None,
        size=side,
    )
    return Inputs(source=source, given=images, real=None)
