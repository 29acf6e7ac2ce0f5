"""Folders of images of one size in the order that torchvision's ImageFolder gives them: read for an import, named
for an export.

`classes.txt` beside the class folders has a line for each: the folder, the class's name and, where there is one, its
WNID, separated by tabs.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast, overload

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torchvision.datasets import ImageFolder

from builders.class_names import are_wnids, name_wnids, read_lines
from builders.images import UnusableImage
from builders.progress import Progress
from nrrdd_format.errors import DataError, FormatError
from nrrdd_format.image_file import check_image
from nrrdd_format.limits import MAX_IMAGE_BYTES
from nrrdd_format.manifest import CODEC_EXTENSIONS, Codec
from nrrdd_format.shards import EncodedImage

CLASSES_FILE = "classes.txt"
_UNSAFE = re.compile(r"[^\w .,()'+-]")
_MAX_NAME = 60


@dataclass(frozen=True, kw_only=True)
class Classes:
    """The classes of a folder; label k is entry k."""

    names: tuple[str, ...]
    wnids: tuple[str, ...] | None


@dataclass(frozen=True, kw_only=True)
class FolderFiles(Sequence[EncodedImage]):
    """The image files of a folder, read when they are asked for; image k has number k."""

    paths: tuple[Path, ...]
    labels: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.paths)

    @overload
    def __getitem__(self, index: int) -> EncodedImage: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[EncodedImage]: ...
    def __getitem__(self, index: int | slice) -> EncodedImage | Sequence[EncodedImage]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        number = range(len(self))[index]
        return EncodedImage(index=number, label=int(self.labels[number]), data=read_image_file(self.paths[number]))


def open_folder(root: Path) -> tuple[FolderFiles, Classes]:
    """Lists the images of a folder `<class>/<image>` in torchvision's order, and its classes.

    Raises:
        DataError: there is no such folder, a class without images, or an unusable classes.txt.
    """
    try:
        folder = ImageFolder(root)
    except (OSError, RuntimeError) as error:  # FileNotFoundError for an empty class too
        reason = " ".join(str(error).split())
        raise DataError(f"{root}: expected a folder of images for each class ({reason})") from error
    labels = np.array([label for _, label in folder.samples], np.int64)
    files = FolderFiles(paths=tuple(Path(path) for path, _ in folder.samples), labels=labels)
    return files, read_classes(root, folder.classes)


def check_files(files: FolderFiles) -> tuple[Codec, int]:
    """Decodes every image; returns the codec and the side in pixels that all of them have.

    Raises:
        DataError: an image is damaged, not square, or of another codec or size than the first.
    """
    codec, size = _kind(files.paths[0], files[0].data)
    with Progress(len(files), "check images", "image") as progress:
        for path, image in zip(files.paths, files, strict=True):
            try:
                check_image(image.data, codec, size)
            except FormatError as error:
                expected = f"expected {codec} of {size}x{size} pixels as the first image, {files.paths[0].name}"
                raise DataError(f"{path}: {error.reason}; {expected}") from error
            progress.advance()
    return codec, size


def class_folders(classes: Classes) -> list[str]:
    """A folder name for each class, such that sorting the names keeps the order of the labels.

    They are the WNIDs, or else the names, with a number in front where the order asks for one.
    """
    names = [_UNSAFE.sub("_", name)[:_MAX_NAME].strip(" .") for name in classes.wnids or classes.names]
    if all(names) and names == sorted(names) and len({name.casefold() for name in names}) == len(names):
        return names
    digits = len(str(len(names) - 1))
    return [f"{label:0{digits}}_{name}" for label, name in enumerate(names)]


def classes_text(classes: Classes) -> str:
    """The content of classes.txt."""
    columns = [class_folders(classes), classes.names, *([] if classes.wnids is None else [classes.wnids])]
    return "".join("\t".join(" ".join(text.split()) for text in row) + "\n" for row in zip(*columns, strict=True))


def read_classes(root: Path, folders: Sequence[str]) -> Classes:
    """The classes of sorted class folders: as classes.txt says, else by WNID, else by the folders' names.

    Raises:
        DataError: classes.txt is unusable.
    """
    path = root / CLASSES_FILE
    if path.is_file():
        return _listed(path, [line.split("\t") for line in read_lines(path)], folders)
    if are_wnids(folders):
        return Classes(names=tuple(name_wnids(root, folders)), wnids=tuple(folders))
    return Classes(names=tuple(folders), wnids=None)


def _listed(path: Path, rows: Sequence[Sequence[str]], folders: Sequence[str]) -> Classes:
    columns = {len(row) for row in rows}
    if [row[0] for row in rows] != list(folders) or columns not in ({2}, {3}):
        raise DataError(
            f"{path}: expected a line for each of the {len(folders)} class folders, sorted: the folder, a tab, the "
            "class's name and maybe a tab and its WNID; correct the file or move it away"
        )
    wnids = tuple(row[2] for row in rows) if columns == {3} else None
    return Classes(names=tuple(row[1] for row in rows), wnids=wnids)


def _kind(path: Path, data: bytes) -> tuple[Codec, int]:
    """Codec and side of one image."""
    try:
        with Image.open(io.BytesIO(data), formats=tuple(codec.upper() for codec in CODEC_EXTENSIONS)) as image:
            (width, height), found = image.size, str(image.format).lower()
    except Exception as error:  # Pillow's readers raise whatever they stumble over
        raise DataError(f"{path}: expected a JPEG, PNG or WebP image ({error})") from error
    if width != height:
        raise DataError(f"{path}: {width}x{height} pixels, expected a square: distilled images of training size")
    if found not in CODEC_EXTENSIONS:  # "mpo", several JPEGs in one file
        raise DataError(f"{path}: a picture of kind {found}, expected {', '.join(CODEC_EXTENSIONS)}")
    return cast(Codec, found), width


def read_image_file(path: Path) -> bytes:
    """The bytes of one image file.

    Raises:
        UnusableImage: it is larger than a shard's images may be, or empty.
        DataError: it cannot be read at all.
    """
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_IMAGE_BYTES + 1)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error
    if not 1 <= len(data) <= MAX_IMAGE_BYTES:
        raise UnusableImage(f"expected an image of 1..{MAX_IMAGE_BYTES} bytes", str(path))
    return data
