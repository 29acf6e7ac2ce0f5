"""What a build starts from: a source dataset, and its distilled images where they exist already."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from builders.class_names import select_classes, some
from builders.config import BuildConfig
from builders.conventions import DATASETS
from builders.folders import ignored_notes
from builders.given_images import FoundImages, GivenImages, find_folders, find_table, match_classes, take_given
from builders.image_sets import PLAIN, Columns, ImageSet
from builders.sources import (
    OPEN_SIZES,
    WITH_COLUMNS,
    Source,
    check_cache_dir,
    check_name,
    check_size,
    load_source,
    load_split,
    local_folder,
    make_source,
)
from nrrdd_format.errors import ConfigError, DataError


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """The images of a build.

    Attributes:
        source: the source dataset; where only given images are there, their classes under its conventions.
        given: the distilled images that exist already; None: the build makes them.
        real: real images to test the teacher on; None: there are none.
        notices: what the user should know of how the images were read, each a line.
    """

    source: Source
    given: GivenImages | None = None
    real: ImageSet | None
    notices: tuple[str, ...] = ()


def load_inputs(config: BuildConfig) -> Inputs:
    """Finds all images that the options name.

    Raises:
        ConfigError: an unknown name or class, or an option that this dataset does not take.
        DataError: images are missing or not laid out as expected, or given and real ones disagree on the classes.
    """
    if config.from_images is not None:
        check_name(config.dataset)
        inputs = _load_given(config, _find_given(config, config.from_images))
    else:
        source = _load_source(config, config.size)
        inputs = Inputs(source=source, real=source.test if source.test is not None else source.train)
    given = None if inputs.given is None else inputs.given.files
    ignored = ignored_notes(given, inputs.source.train, inputs.source.test)
    return replace(inputs, notices=inputs.notices + ignored)


def _find_given(config: BuildConfig, place: Path) -> FoundImages:
    return find_folders(place) if config.given_table is None else find_table(config.given_table, _columns(config))


def _columns(config: BuildConfig) -> Columns:
    return Columns(image=config.image_column, label=config.label_column)


def _load_source(config: BuildConfig, size: int | None) -> Source:
    only_given = config.given_table is not None and config.dataset not in WITH_COLUMNS
    return load_source(
        config.dataset,
        data_dir=config.data_dir,
        test_dir=config.test_dir,
        classes=config.classes,
        size=size,
        columns=PLAIN if only_given else _columns(config),
        cache_dir=config.cache_dir,
    )


def _load_given(config: BuildConfig, found: FoundImages) -> Inputs:
    name, size = config.dataset, config.size
    check_cache_dir(name, config.cache_dir)
    if name in OPEN_SIZES and size is None:
        size = found.images.size
    if config.data_dir is not None or name == "digits":
        source = _load_source(config, size)
    elif config.given_table is None and _columns(config) != PLAIN:
        raise ConfigError(
            "--image-column and --label-column: found without --data-dir, expected with it, or with --from-images hf:…"
        )
    elif config.test_dir is not None:
        split = local_folder("--test-dir", name, config.test_dir)
        assert split is not None
        source = load_split(name, split, classes=config.classes, size=size)
    else:
        return _alone(config, found, size)
    chosen, by_position = match_classes(found, source.class_names, source.wnids, subset=config.classes is not None)
    return Inputs(
        source=source,
        given=take_given(found, chosen, source.class_names, ipc=config.ipc, size=source.size),
        real=source.test if source.test is not None else source.train,
        notices=(_paired(found.folders, source),) if by_position else (),
    )


def _paired(folders: Sequence[str], source: Source) -> str:
    pairs = [f"{folder} = {name}" for folder, name in zip(folders, source.class_names, strict=True)]
    return f"classes of the given images are taken in the source's order: {some(pairs)}"


def _alone(config: BuildConfig, found: FoundImages, size: int | None) -> Inputs:
    """Given images without any real ones: they say themselves what the classes are."""
    name, known = config.dataset, DATASETS[config.dataset]
    check_size(name, size)
    if known.classes is not None and len(found.folders) != known.classes and config.classes is None:
        raise DataError(
            f"{found.place}: found {len(found.folders)}/{known.classes} classes of {name}; complete them, or use "
            f"--dataset imagefolder"
        )
    names, wnids = found.classes.names, found.classes.wnids
    chosen = select_classes(names, wnids, config.classes)
    class_names = [names[label] for label in chosen]
    side = known.size or size
    assert side is not None
    given = take_given(found, chosen, class_names, ipc=config.ipc, size=side)
    source = make_source(
        name,
        class_names=class_names,
        wnids=None if wnids is None else [wnids[label] for label in chosen],
        train=given.files,
        test=None,
        size=side,
    )
    return Inputs(source=source, given=given, real=None)
