"""Lists the images of a split kept as files: a folder for each class, or one folder and a list.

Listings are sorted, so that they do not depend on the file system. Hidden files and files without an image's
ending do not count, and the latter are counted; whether the others really are images shows when they are read.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from builders.class_names import read_lines, some
from builders.image_sets import FolderImages, ImageSet, first_side
from builders.images import EXTENSIONS
from nrrdd_format.errors import DataError, counted

ANNOTATIONS = "val_annotations.txt"
"""Tiny-ImageNet's list of validation images: file name, WNID and a box on each line, separated by tabs."""

ABOUT_IMAGES = (".csv", ".json", ".md", ".txt", ".xml")
"""Endings of files that say something of images, as Tiny-ImageNet's lists of boxes do; nobody misses these."""


def class_folders(split: Path) -> list[str]:
    """The names of a split's class folders, sorted.

    Raises:
        DataError: the split cannot be read or holds no folder.
    """
    try:
        with os.scandir(split) as entries:
            folders = sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))
    except OSError as error:
        raise DataError(f"{split}: cannot be read ({error.strerror or error})") from error
    if not folders:
        raise DataError(f"{split}: found no folders, expected one folder of images for each class")
    return folders


def list_folders(split: Path, folders: Sequence[str], size: int) -> FolderImages:
    """The images of a split kept as class folders; images of `folders[k]`, at any depth, get label k."""
    files = [sorted(_files(split, folder)) for folder in folders]
    by_class = [[file for file in of_class if _is_image(file)] for of_class in files]
    others = Counter(_ending(file) for of_class in files for file in of_class if not _is_image(file))
    return FolderImages(
        root=split,
        names=[name for names in by_class for name in names],
        labels=np.repeat(np.arange(len(folders), dtype=np.int64), [len(names) for names in by_class]),
        size=size,
        ignored={ending: count for ending, count in sorted(others.items()) if ending not in ABOUT_IMAGES},
    )


def list_classes(split: Path, folders: Sequence[str], size: int) -> FolderImages:
    """What `list_folders` finds.

    Raises:
        DataError: a class has no image; all such classes are named.
    """
    images = list_folders(split, folders, size)
    counts = np.bincount(images.labels, minlength=len(folders)).tolist()
    empty = [folder for folder, count in zip(folders, counts, strict=True) if not count]
    if empty:
        message = f"{split}: found no images for {some(empty)}; add images to each or remove the class"
        raise DataError(with_ignored(message, images))
    return images


def natural_side(images: FolderImages, folders: Sequence[str], largest: int) -> int:
    """The side at which images of no size of their own are read (see `first_side`).

    Raises:
        DataError: no image is usable.
    """
    side = first_side((images.file(index) for index in range(len(images))), largest)
    if side is None:
        raise DataError(with_ignored(f"{images.root}: found no usable image in the folders {some(folders)}", images))
    return side


def with_ignored(message: str, images: ImageSet) -> str:
    """A message about a split, and behind it how many files were passed over for their endings, if any were."""
    words = _ignored(images)
    return message if words is None else f"{message}; {words}"


def ignored_notes(*splits: ImageSet | None) -> tuple[str, ...]:
    """For each split of which files were passed over for their endings a line that says so, no two alike."""
    folders = [images for images in splits if isinstance(images, FolderImages) and images.ignored]
    return tuple(dict.fromkeys(f"{images.root}: {_ignored(images)}" for images in folders))


def _ignored(images: ImageSet) -> str | None:
    if not isinstance(images, FolderImages) or not images.ignored:
        return None
    count = counted(sum(images.ignored.values()), "file")
    return f"ignored {count} for the ending ({some(list(images.ignored))}), read are {', '.join(EXTENSIONS)}"


def list_test(split: Path, folders: Sequence[str], train_folders: Sequence[str], size: int) -> FolderImages:
    """The images of a test split for the classes `folders`, labelled as in `list_classes`.

    Raises:
        DataError: a class has no image, or the split has a class that is not one of `train_folders`.
    """
    if (split / ANNOTATIONS).is_file():
        return _list_annotated(split, folders, train_folders, size)
    _refuse_unknown(split, class_folders(split), train_folders)
    return list_classes(split, folders, size)


def image_names(split: Path, folder: str) -> list[str]:
    """Paths, relative to the split, of all images below one of its folders, sorted."""
    return sorted(filter(_is_image, _files(split, folder)))


def _files(split: Path, folder: str) -> Iterator[str]:
    """Paths, relative to the split, of all files below one of its folders that are in sight."""
    top = split / folder
    for parent, _, files in os.walk(top, onerror=_raise) if top.is_dir() else ():
        base = Path(parent).relative_to(split).as_posix()
        yield from (f"{base}/{file}" for file in files if not file.startswith("."))


def _is_image(file: str) -> bool:
    return file.lower().endswith(EXTENSIONS)


def _ending(file: str) -> str:
    return os.path.splitext(file)[1].lower() or "none"


def _raise(error: OSError) -> None:
    raise DataError(f"{error.filename}: cannot be read ({error.strerror or error})") from error


def _list_annotated(split: Path, folders: Sequence[str], train_folders: Sequence[str], size: int) -> FolderImages:
    labels = {folder: label for label, folder in enumerate(folders)}
    rows = [line.split("\t") for line in read_lines(split / ANNOTATIONS)]
    for number, row in enumerate(rows, start=1):
        if len(row) < 2:
            raise DataError(f"{split / ANNOTATIONS}: line {number}: expected a file name, a tab and a WNID")
    _refuse_unknown(split, sorted({row[1] for row in rows}), train_folders)
    kept = sorted((f"images/{row[0]}", labels[row[1]]) for row in rows if row[1] in labels)
    missing = [folder for folder, label in labels.items() if label not in {label for _, label in kept}]
    if missing:
        raise DataError(f"{split / ANNOTATIONS}: found no images for {some(missing)}")
    return FolderImages(
        root=split,
        names=[name for name, _ in kept],
        labels=np.array([label for _, label in kept], dtype=np.int64),
        size=size,
    )


def _refuse_unknown(split: Path, found: Sequence[str], train_folders: Sequence[str]) -> None:
    unknown = sorted(set(found) - set(train_folders))
    if unknown:
        raise DataError(
            f"{split}: found classes that the training split lacks: {some(unknown)}; "
            f"both splits need the same class folders"
        )
