"""Distilled images that exist already (RDED's, SRe2L's, EDC's, an export of ours): class folders, or a table.

They are numbered class-interleaved, as those a build makes itself (see `builders.job`). A file that is already what a
shard stores keeps its bytes, so that no image is compressed a second time.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from builders.class_names import are_wnids, beside, name_wnids, some
from builders.config import HUB_PREFIX, EncodingSettings
from builders.encoding import encode_image
from builders.folders import class_folders, list_folders, natural_side, with_ignored
from builders.hub_images import is_hub_folder, load_hub_images
from builders.image_folder import Classes, read_classes, read_image_file
from builders.image_sets import MAX_SIZE, Columns, FileImages, members_by_class, named_faults
from builders.images import UnusableImage
from builders.prefetch import in_processes, named_deaths, reading_processes
from builders.progress import Progress
from nrrdd_format.errors import DataError, FormatError
from nrrdd_format.image_file import check_image
from nrrdd_format.limits import MAX_IMAGE_BYTES
from nrrdd_format.manifest import Codec

_NUMBERED = re.compile(r"(\D*)(\d+)")
_SIGNATURES: tuple[tuple[Codec, re.Pattern[bytes]], ...] = (
    ("jpeg", re.compile(rb"\xff\xd8\xff")),
    ("png", re.compile(rb"\x89PNG\r\n\x1a\n")),
    ("webp", re.compile(rb"RIFF....WEBP", re.DOTALL)),
)
_ORIENTATION, _UPRIGHT = 0x0112, (None, 1)  # EXIF's tag, and its values for pictures that are not to be turned


@dataclass(frozen=True, kw_only=True)
class FoundImages:
    """Given images as they lie there, whatever their number; label k is entry k of `folders` and `classes`.

    Attributes:
        place: what messages call the whole: the folder, or the dataset of Hugging Face.
        folders: the class folders, or the classes of the label column.
        classes: the classes these stand for, as far as they can be told without the source.
        images: all of them. S is the shorter side of the first usable one, made even.
    """

    place: str
    folders: tuple[str, ...]
    classes: Classes
    images: FileImages


@dataclass(frozen=True, kw_only=True)
class GivenImages:
    """The images of a dataset in the order of their numbers.

    Attributes:
        place: what messages call the whole.
        files: image i is the (i // C)-th of class i % C.
        ipc: images per class.
        codec: that of all files; None where they have several, or one that no shard stores.
        sha256: digest of the files' contents and classes.
    """

    place: str
    files: FileImages
    ipc: int
    codec: Codec | None
    sha256: str


@named_faults()
def find_folders(root: Path) -> FoundImages:
    """Finds the images of a folder with a folder for each class.

    Labels follow the sorted names, as with torchvision's ImageFolder; folders numbered from 0 (`new000`, `10`) follow
    their numbers. `classes.txt`, as `nrrdd export` writes it, may name the classes.

    Raises:
        DataError: there is no such folder, it holds no folders or no usable image, or classes.txt is unusable.
    """
    if is_hub_folder(root):
        raise DataError(f"{root}: is a dataset of Hugging Face, not a folder of class folders; write hf:{root}")
    folders = class_folders(root)
    images = list_folders(root, folders, MAX_SIZE)
    side = natural_side(images, folders, MAX_SIZE)
    return _ordered(str(root), folders, read_classes(root, folders), images, side)


@named_faults()
def find_table(data_dir: Path, columns: Columns) -> FoundImages:
    """Finds the images of the training split, or the only one, of a dataset of Hugging Face.

    Labels follow the ClassLabel or the sorted values of the label column; classes numbered from 0 follow their numbers.

    Args:
        data_dir: a folder by `save_to_disk`, a folder of Parquet files, or a name on the hub.
        columns: the columns of images and labels; default: those of the kinds Image and ClassLabel.

    Raises:
        ConfigError: `datasets` is not installed, or a column that is not there or must be named.
        DataError: no such dataset, no usable image, or rows without label.
    """
    values, images = load_hub_images(data_dir, columns, MAX_SIZE)
    classes = Classes(names=tuple(values), wnids=None)
    if are_wnids(values):
        classes = Classes(names=tuple(name_wnids(beside(data_dir), values)), wnids=tuple(values))
    return _ordered(f"{HUB_PREFIX}{data_dir}", values, classes, images, images.size)


def _ordered(place: str, folders: Sequence[str], classes: Classes, images: FileImages, size: int) -> FoundImages:
    """The classes and labels in the order of the numbers that the folders' names end in, where they have such."""
    order = _order(folders)
    labels = np.argsort(order)[images.labels]
    return FoundImages(
        place=place,
        folders=tuple(folders[k] for k in order),
        classes=Classes(
            names=tuple(classes.names[k] for k in order),
            wnids=None if classes.wnids is None else tuple(classes.wnids[k] for k in order),
        ),
        images=images.arranged(np.arange(len(labels)), labels, size),
    )


def _order(folders: Sequence[str]) -> list[int]:
    """Positions of the folders by label: as sorted, or by the numbers 0 to C − 1 that their names end in."""
    parts = [_NUMBERED.fullmatch(folder) for folder in folders]
    numbers = [int(part[2]) for part in parts if part]
    prefixes = {part[1] for part in parts if part}
    if len(prefixes) == 1 and sorted(numbers) == list(range(len(folders))):
        return sorted(range(len(folders)), key=numbers.__getitem__)
    return list(range(len(folders)))


def match_classes(
    found: FoundImages, class_names: Sequence[str], wnids: Sequence[str] | None, *, subset: bool
) -> tuple[list[int], bool]:
    """The label that the given images have for each of the source's classes, and whether position alone says so.

    Classes match by WNID, or else by name. Where none bears a name of the source's and there are as many of them, they
    match by position.

    Args:
        found: the given images.
        class_names, wnids: the source's classes, in the order of their labels.
        subset: the source's classes were chosen from more, so images of others may be there.

    Raises:
        DataError: a class without given images, or given images without a class.
    """
    for keys, wanted in ((found.classes.wnids, wnids), (found.classes.names, class_names)):
        if keys is not None and wanted is not None and not set(keys).isdisjoint(wanted):
            return _by_name(found, keys, wanted, subset), False
    if len(found.folders) != len(class_names):
        raise DataError(
            f"{found.place}: found {len(found.folders)} classes ({some(found.folders)}), none named as one of the "
            f"source's {len(class_names)} ({some(wnids or class_names)}); name them alike"
        )
    return list(range(len(found.folders))), True


def _by_name(found: FoundImages, keys: Sequence[str], wanted: Sequence[str], subset: bool) -> list[int]:
    for what, names in (("classes", keys), ("of the source's classes", wanted)):
        if repeated := [name for name, count in Counter(names).items() if count > 1]:
            raise DataError(f"{found.place}: several {what} are named {some(repeated)}, expected one of each name")
    labels = {name: label for label, name in enumerate(keys)}
    missing = [name for name in wanted if name not in labels]
    if missing:
        raise DataError(
            f"{found.place}: found no class {some(missing)}; add its images, or choose classes with --classes"
        )
    unknown = [found.folders[label] for name, label in labels.items() if name not in wanted]
    if unknown and not subset:
        raise DataError(f"{found.place}: found classes that the source lacks: {some(unknown)}")
    return [labels[name] for name in wanted]


def take_given(
    found: FoundImages, chosen: Sequence[int], class_names: Sequence[str], *, ipc: int, size: int
) -> GivenImages:
    """Takes the images of the dataset's classes, and hashes them.

    Args:
        found: the given images.
        chosen: the label that each of the dataset's classes has there.
        class_names: their names.
        ipc: take the first so many images of each class; 0: all, and then every class must have as many.
        size: S.

    Raises:
        DataError: a class has too few images, or the classes have different numbers of them; files that cannot be
            read.
    """
    members = members_by_class(found.images.labels, len(found.folders))
    by_class = [members[label] for label in chosen]
    taken = _images_per_class(found, [len(indices) for indices in by_class], class_names, ipc)
    indices = np.stack([indices[:taken] for indices in by_class], axis=1).ravel()
    files = found.images.arranged(indices, np.arange(len(indices)) % len(chosen), size)
    sha256, codec = _survey(found.place, files)
    return GivenImages(place=found.place, files=files, ipc=taken, codec=codec, sha256=sha256)


def _images_per_class(found: FoundImages, counts: Sequence[int], class_names: Sequence[str], ipc: int) -> int:
    least, most = min(counts), max(counts)
    wanted = ipc or most
    few = [f"{name} ({n})" for name, n in zip(class_names, counts, strict=True) if n < wanted]
    if not few:
        return wanted
    if ipc or not least:
        expected = f"{ipc} or more, as --ipc says" if ipc else "at least one"
        short = few if ipc else [f"{name} (0)" for name, n in zip(class_names, counts, strict=True) if not n]
        raise DataError(
            with_ignored(f"{found.place}: too few images in {some(short)}; expected {expected}", found.images)
        )
    message = (
        f"{found.place}: the classes have {least} to {most} images, fewer than {most} in {some(few)}; a dataset has "
        f"equally many of each: complete them, or take the first {least} of each with --ipc {least}"
    )
    raise DataError(with_ignored(message, found.images))


def _survey(place: str, files: FileImages) -> tuple[str, Codec | None]:
    """SHA-256 over the files and their labels, and the codec of them all."""
    digest, codecs = hashlib.sha256(), set()
    for number, label in enumerate(files.labels.tolist()):
        try:
            data = _file_bytes(files, number)
        except DataError:
            refuse_unusable(place, files, range(len(files)), reading_processes(None, len(files)))
            raise
        codecs.add(_codec_of(data))
        digest.update(os.fsencode(files.name(number)) + f"\0{label}\0{len(data)}\n".encode())
        digest.update(data)
    return digest.hexdigest(), codecs.pop() if len(codecs) == 1 else None


def refuse_unusable(place: str, files: FileImages, numbers: Sequence[int] | NDArray[np.int64], processes: int) -> None:
    """Decodes the images with these numbers in so many processes.

    Raises:
        DataError: some cannot be stored; the first few are named.
    """
    with Progress(len(numbers), "check images", "image") as progress, named_deaths():
        bad = []
        for fault in in_processes(partial(_fault, files), numbers, processes):
            if fault is not None:
                bad.append(fault)
            progress.advance()
    if bad:
        raise DataError(f"{place}: {some(bad, shown=3)}; replace what cannot be used")


def _fault(files: FileImages, number: int) -> str | None:
    try:
        _file_bytes(files, number)
        files.read(number)
    except UnusableImage as error:
        return f"{files.name(number)}: {error.reason}"
    except DataError as error:
        return str(error)  # names the file
    return None


def _file_bytes(files: FileImages, number: int) -> bytes:
    """One image's file.

    Raises:
        UnusableImage: it is larger than a shard's images may be.
        DataError: it cannot be read at all.
    """
    file = files.file(number)
    if isinstance(file, Path):
        return read_image_file(file)
    if not 1 <= len(file) <= MAX_IMAGE_BYTES:
        raise UnusableImage(f"expected an image of 1..{MAX_IMAGE_BYTES} bytes")
    return file


def _codec_of(data: bytes) -> Codec | None:
    return next((codec for codec, signature in _SIGNATURES if signature.match(data)), None)


def stored_bytes(given: GivenImages, number: int, settings: EncodingSettings, *, keep: bool) -> bytes:
    """The bytes a shard stores of one image: those of the file if it fits and `keep`, else its pixels encoded anew.

    Raises:
        DataError: the file is no image, damaged, or cannot be read.
    """
    try:
        if keep and _fits(data := _file_bytes(given.files, number), settings.codec, given.files.size):
            return data
        return encode_image(given.files.read(number), settings)
    except UnusableImage as error:
        raise DataError(f"{given.place}: {given.files.name(number)}: {error.reason}") from error


def _fits(data: bytes, codec: Codec, size: int) -> bool:
    """Whether a file is an image as a shard stores it, one picture that shows the same to every reader.

    An orientation tag or transparent colours are heeded by some and not by others.
    """
    try:
        check_image(data, codec, size)
    except FormatError:
        return False
    with Image.open(io.BytesIO(data)) as image:
        is_plain = getattr(image, "n_frames", 1) == 1 and "transparency" not in image.info
        return is_plain and image.getexif().get(_ORIENTATION) in _UPRIGHT
