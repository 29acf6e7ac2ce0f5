"""Distilled images that exist already (RDED's, SRe2L's, EDC's, an export of ours): a folder for each class.

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
from pathlib import Path

import numpy as np
from PIL import Image

from builders.class_names import some
from builders.config import EncodingSettings
from builders.encoding import encode_image
from builders.folders import class_folders, image_names
from builders.image_folder import Classes, read_classes, read_image_file
from builders.image_sets import FolderImages
from nrrdd_format.errors import DataError, FormatError
from nrrdd_format.image_file import check_image
from nrrdd_format.manifest import Codec

_NUMBERED = re.compile(r"(\D*)(\d+)")
_SIGNATURES: tuple[tuple[Codec, re.Pattern[bytes]], ...] = (
    ("jpeg", re.compile(rb"\xff\xd8\xff")),
    ("png", re.compile(rb"\x89PNG\r\n\x1a\n")),
    ("webp", re.compile(rb"RIFF....WEBP", re.DOTALL)),
)
_ORIENTATION, _UPRIGHT = 0x0112, (None, 1)  # EXIF's tag, and its values for pictures that are not to be turned


@dataclass(frozen=True, kw_only=True)
class GivenFolders:
    """The class folders of given images; label k is entry k."""

    root: Path
    folders: tuple[str, ...]
    classes: Classes


@dataclass(frozen=True, kw_only=True)
class GivenImages:
    """The images of a dataset in the order of their numbers.

    Attributes:
        files: image i is the (i // C)-th of class i % C.
        ipc: images per class.
        codec: that of all files; None where they have several, or one that no shard stores.
        sha256: digest of the files' contents and classes.
    """

    files: FolderImages
    ipc: int
    codec: Codec | None
    sha256: str


def find_given(root: Path) -> GivenFolders:
    """Finds the class folders of a folder of distilled images.

    Labels follow the sorted names, as with torchvision's ImageFolder; folders numbered from 0 (`new000`, `10`) follow
    their numbers. `classes.txt`, as `nrrdd export` writes it, may name the classes.

    Raises:
        DataError: there is no such folder, it holds no folders, or classes.txt is unusable.
    """
    folders = class_folders(root)
    classes = read_classes(root, folders)
    order = _order(folders)
    return GivenFolders(
        root=root,
        folders=tuple(folders[k] for k in order),
        classes=Classes(
            names=tuple(classes.names[k] for k in order),
            wnids=None if classes.wnids is None else tuple(classes.wnids[k] for k in order),
        ),
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
    given: GivenFolders, class_names: Sequence[str], wnids: Sequence[str] | None, *, subset: bool
) -> tuple[list[str], bool]:
    """The folder of each of the source's classes, and whether they were matched by position.

    Classes match by WNID, or else by name. Where no folder bears a name of the source's and there are as many of them,
    they match by position.

    Args:
        given: the folders.
        class_names, wnids: the source's classes, in the order of their labels.
        subset: the source's classes were chosen from more, so folders of others may be there.

    Raises:
        DataError: a class without a folder, or a folder without a class.
    """
    for keys, wanted in ((given.classes.wnids, wnids), (given.classes.names, class_names)):
        if keys is not None and wanted is not None and not set(keys).isdisjoint(wanted):
            return _by_name(given, keys, wanted, subset), False
    if len(given.folders) != len(class_names):
        raise DataError(
            f"{given.root}: found {len(given.folders)} class folders ({some(given.folders)}), none named as one of the "
            f"source's {len(class_names)} classes ({some(wnids or class_names)}); name them alike"
        )
    return list(given.folders), True


def _by_name(given: GivenFolders, keys: Sequence[str], wanted: Sequence[str], subset: bool) -> list[str]:
    for what, names in (("folders", keys), ("of the source's classes", wanted)):
        if repeated := [name for name, count in Counter(names).items() if count > 1]:
            raise DataError(f"{given.root}: several {what} are named {some(repeated)}, expected one of each name")
    folders = dict(zip(keys, given.folders, strict=True))
    missing = [name for name in wanted if name not in folders]
    if missing:
        raise DataError(f"{given.root}: found no folder for {some(missing)}; add it, or choose classes with --classes")
    unknown = [folder for name, folder in folders.items() if name not in wanted]
    if unknown and not subset:
        raise DataError(f"{given.root}: found folders of classes that the source lacks: {some(unknown)}")
    return [folders[name] for name in wanted]


def list_given(root: Path, folders: Sequence[str], class_names: Sequence[str], *, ipc: int, size: int) -> GivenImages:
    """Lists and hashes the images of the classes' folders.

    Args:
        root: the folder around the class folders.
        folders: the folder of each class.
        class_names: their names.
        ipc: take the first so many images of each class; 0: all, and then every class must have as many.
        size: S.

    Raises:
        DataError: a class has too few images, or the classes have different numbers of them; a file cannot be read.
    """
    by_class = [list(image_names(root, folder)) for folder in folders]
    taken = _images_per_class(root, [len(names) for names in by_class], class_names, ipc)
    names = [names[place] for place in range(taken) for names in by_class]
    files = FolderImages(root=root, names=names, labels=np.arange(len(names)) % len(folders), size=size)
    sha256, codec = _survey(files)
    return GivenImages(files=files, ipc=taken, codec=codec, sha256=sha256)


def _images_per_class(root: Path, counts: Sequence[int], class_names: Sequence[str], ipc: int) -> int:
    least, most = min(counts), max(counts)
    wanted = ipc or most
    few = [f"{name} ({n})" for name, n in zip(class_names, counts, strict=True) if n < wanted]
    if not few:
        return wanted
    if ipc or not least:
        expected = f"{ipc} or more, as --ipc says" if ipc else "at least one"
        short = few if ipc else [f"{name} (0)" for name, n in zip(class_names, counts, strict=True) if not n]
        raise DataError(f"{root}: too few images in {some(short)}; expected {expected}")
    raise DataError(
        f"{root}: the classes have {least} to {most} images, fewer than {most} in {some(few)}; a dataset has equally "
        f"many of each: complete them, or take the first {least} of each with --ipc {least}"
    )


def _survey(files: FolderImages) -> tuple[str, Codec | None]:
    """SHA-256 over the files and their labels, and the codec of them all."""
    digest, codecs = hashlib.sha256(), set()
    for name, label in zip(files.names, files.labels.tolist(), strict=True):
        data = read_image_file(files.root / name)
        codecs.add(_codec_of(data))
        digest.update(os.fsencode(name) + f"\0{label}\0{len(data)}\n".encode())
        digest.update(data)
    return digest.hexdigest(), codecs.pop() if len(codecs) == 1 else None


def _codec_of(data: bytes) -> Codec | None:
    return next((codec for codec, signature in _SIGNATURES if signature.match(data)), None)


def stored_bytes(given: GivenImages, number: int, settings: EncodingSettings, *, keep: bool) -> bytes:
    """The bytes a shard stores of one image: those of the file if it fits and `keep`, else its pixels encoded anew.

    Raises:
        DataError: the file is no image, damaged, or cannot be read.
    """
    if keep:
        data = read_image_file(given.files.root / given.files.names[number])
        if _fits(data, settings.codec, given.files.size):
            return data
    return encode_image(given.files.read(number), settings)


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
