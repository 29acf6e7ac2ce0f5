"""Names of classes: words for WNIDs (WordNet's identifiers, as ImageNet's folders have), labels for names."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from nrrdd_format.errors import ConfigError, DataError

WORD_FILES = ("LOC_synset_mapping.txt", "synset_words.txt", "words.txt", "classes*.txt")
"""Files that give words for WNIDs, one WNID and its words a line."""

IMAGENETTE = {
    "n01440764": "tench",
    "n02102040": "English springer",
    "n02979186": "cassette player",
    "n03000684": "chain saw",
    "n03028079": "church",
    "n03394916": "French horn",
    "n03417042": "garbage truck",
    "n03425413": "gas pump",
    "n03445777": "golf ball",
    "n03888257": "parachute",
}
"""ImageNette's classes; its archive brings no names."""

MAX_TEXT_BYTES = 1 << 24
_WNID = re.compile(r"n\d{8}")


def are_wnids(names: Sequence[str]) -> bool:
    """Whether every name is a WNID."""
    return all(_WNID.fullmatch(name) for name in names)


def check_wnids(split: Path, folders: Sequence[str]) -> None:
    """Raises DataError unless every class folder is named by a WNID."""
    others = [folder for folder in folders if not _WNID.fullmatch(folder)]
    if others:
        raise DataError(f"{split}: expected class folders named by WNIDs such as n01440764, found {some(others)}")


def name_wnids(root: Path, wnids: Sequence[str]) -> list[str]:
    """The words for each WNID from the files in `root` (else ImageNette's, else the WNID), no two alike.

    Where two classes share their words, as ImageNet's two cranes do, the WNID is added to both.
    """
    words = IMAGENETTE | _read_words(root)
    names = [words.get(wnid, wnid) for wnid in wnids]
    count = Counter(names)
    return [name if count[name] == 1 else f"{name} ({wnid})" for name, wnid in zip(names, wnids, strict=True)]


def beside(place: Path) -> Path:
    """Where files about a dataset lie: in its folder, or next to its file."""
    return place if place.is_dir() else place.parent


def select_classes(names: Sequence[str], wnids: Sequence[str] | None, wanted: Sequence[str] | None) -> list[int]:
    """The labels of the wanted classes, in the dataset's order; all of them if `wanted` is None.

    A class is wanted by its name, its WNID, or the first of the comma-separated words of its name.

    Raises:
        ConfigError: a wanted class is unknown or fits several classes, or fewer than two are wanted.
    """
    if wanted is None:
        return list(range(len(names)))
    chosen = sorted({_find(name, names, wnids) for name in wanted})
    if len(chosen) < 2:
        raise ConfigError(f"--classes: found {len(chosen)} different classes, expected 2 or more")
    return chosen


def some(names: Sequence[str], shown: int = 5) -> str:
    """The first few names, and how many there are where that is more."""
    listed = ", ".join(names[:shown])
    return listed if len(names) <= shown else f"{listed}, … ({len(names)} in all)"


def read_lines(path: Path) -> list[str]:
    """The lines of a small UTF-8 text file that hold something.

    Raises:
        DataError: the file cannot be read, is not text, or is longer than 16 MiB.
    """
    try:
        with open(path, "rb") as file:
            text = file.read(MAX_TEXT_BYTES + 1)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error
    if len(text) > MAX_TEXT_BYTES:
        raise DataError(f"{path}: expected a text file of at most {MAX_TEXT_BYTES} bytes")
    try:
        return [line for line in text.decode("utf-8").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: expected UTF-8 text, found other bytes at offset {error.start}") from error


def _read_words(root: Path) -> dict[str, str]:
    files = [path for pattern in WORD_FILES for path in sorted(root.glob(pattern))]
    rows = [line.split(maxsplit=1) for path in files for line in read_lines(path)]
    return {row[0]: row[1].strip() for row in rows if len(row) == 2 and _WNID.fullmatch(row[0])}


def _find(wanted: str, names: Sequence[str], wnids: Sequence[str] | None) -> int:
    found = {label for label, name in enumerate(names) if wanted in (name, name.split(",")[0])}
    if wnids is not None and wanted in wnids:
        found = {list(wnids).index(wanted)}
    if not found:
        raise ConfigError(f"--classes: found {wanted!r}, expected names out of: {some(names)}")
    if len(found) > 1:
        raise ConfigError(f"--classes: {wanted!r} fits several classes: {some([names[k] for k in sorted(found)])}")
    return found.pop()
