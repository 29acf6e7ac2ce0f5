"""Where the images of tar shards lie: every shard is gone through once, header by header, and the result is kept.

A sample is what consecutive members of one key hold: `<key>.jpg` beside `<key>.cls` or `<key>.json`.
"""

from __future__ import annotations

import hashlib
import json
import os
import tarfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import BinaryIO, cast

from builders.image_sets import Columns
from builders.images import EXTENSIONS
from builders.progress import Progress
from nrrdd_format.errors import DataError, OutputError
from nrrdd_format.files import atomic_write, locked

LABEL, MAX_LABEL_BYTES = "label", 1 << 20
MAX_LABEL_DIGITS = 18
"""Of a label that is a number."""
MAX_HEADER_BYTES = 1 << 20
"""Of an extended tar header, which holds a long name."""
MAX_INDEX_BYTES = 1 << 30
"""Of a kept index."""
MAX_OFFSET = 1 << 62
VERSION = 1
"""Of what is kept: another one is made anew."""
_BLOCK = bytes(tarfile.BLOCKSIZE)

Label = int | str


@dataclass(frozen=True, kw_only=True)
class ShardIndex:
    """The images of one shard in order: the keys of their samples, their labels as they were read, and their places."""

    keys: list[str]
    labels: list[Label]
    offsets: list[int]
    lengths: list[int]


def index_shards(shards: Sequence[Path], columns: Columns, cache_dir: Path) -> list[ShardIndex]:
    """The index of every shard: as it is kept, or else made and kept in `cache_dir`, by one process at a time.

    Raises:
        DataError: shards are missing or damaged, or a sample has no label, or several images.
    """
    folder = cache_dir / "indexes"
    kept = [_load(_kept_at(folder, path, columns)) for path in shards]
    missing = [number for number, index in enumerate(kept) if index is None]
    with ExitStack() as stack:
        if missing:
            with suppress(OSError):  # where nothing can be kept, the index is made anew each time
                folder.mkdir(parents=True, exist_ok=True)
                stack.enter_context(locked(folder / "lock"))
            progress = stack.enter_context(Progress(len(missing), "index", "shard"))
        for number in missing:
            kept[number] = _load(_kept_at(folder, shards[number], columns))  # another process may have been faster
            if kept[number] is None:
                kept[number] = _make_and_keep(shards[number], columns, folder)
            progress.advance()
    return [index for index in kept if index is not None]


def check_tar(where: str, file: BinaryIO) -> None:
    """Raises DataError, naming `where`, unless the file is a whole tar."""
    for _ in _members(where, file):
        pass


def read_at(file: BinaryIO, offset: int, length: int) -> bytes:
    """So many bytes from there on, or fewer if the file ends before."""
    file.seek(offset)
    return file.read(length)


def _kept_at(folder: Path, path: Path, columns: Columns) -> Path:
    """Where a shard's index is kept: another size or time of the shard, or other columns, lead elsewhere."""
    try:
        stat = path.stat()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error
    facts = [VERSION, str(path.resolve()), stat.st_size, stat.st_mtime_ns, columns.image, columns.label]
    return folder / f"{hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]}.json"


def _load(path: Path) -> ShardIndex | None:
    """A kept index; None: there is none, or none that is sound."""
    try:
        if path.stat().st_size > MAX_INDEX_BYTES:
            return None
        index = ShardIndex(**json.loads(path.read_bytes()))
        numbers = [*index.offsets, *index.lengths]
        is_sound = (
            len({len(column) for column in (index.keys, index.labels, index.offsets, index.lengths)}) == 1
            and all(type(key) is str for key in index.keys)
            and all(type(label) in (int, str) for label in index.labels)
            and all(type(number) is int and 0 <= number < MAX_OFFSET for number in numbers)
        )
    except (OSError, ValueError, TypeError, RecursionError):
        return None
    return index if is_sound else None


def _make_and_keep(path: Path, columns: Columns, folder: Path) -> ShardIndex:
    kept_at = _kept_at(folder, path, columns)  # before it is read, in case it changes meanwhile
    index = ShardIndex(keys=[], labels=[], offsets=[], lengths=[])
    with _opened(path) as file:
        for key, members in groupby(_members(str(path), file), key=lambda member: member[0]):
            _add_sample(
                index, f"{path}: sample {key!r}", key, {ending: place for _, ending, *place in members}, file, columns
            )
    with suppress(OutputError), atomic_write(kept_at) as kept:
        kept.write(json.dumps(asdict(index), separators=(",", ":")).encode())
    return index


def _opened(path: Path) -> BinaryIO:
    try:
        return open(path, "rb")
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error


def _members(where: str, file: BinaryIO) -> Iterator[tuple[str, str, int, int]]:
    """Key, ending, offset and length of every file in a tar, in order; hidden ones and `__…__` do not count.

    Raises:
        DataError: the tar is damaged, or ends without its end marker; Python's reader passes over either in silence.
    """
    try:
        with tarfile.open(fileobj=cast(BinaryIO, _Bounded(file)), mode="r:") as archive:
            end = 0
            while (member := archive.next()) is not None:
                archive.members = []  # type: ignore[attr-defined]  # they would pile up
                if member.size < 0 or archive.offset <= end:  # a negative size leads back to the same header
                    raise tarfile.ReadError(f"the header before byte {archive.offset} states a size of {member.size}")
                end = archive.offset
                folder, name = os.path.split(member.name)
                key, _, ending = name.partition(".")
                if member.isreg() and not member.issparse() and key and not member.name.startswith("__"):
                    yield os.path.join(folder, key), ending.lower(), member.offset_data, member.size
            end = archive.offset
    except (tarfile.TarError, EOFError, OSError, ValueError, OverflowError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"{where}: is no whole tar file ({reason}); replace it by a whole copy") from error
    if read_at(file, end, len(_BLOCK)) != _BLOCK:
        raise DataError(
            f"{where}: is damaged or cut off at byte {end}, before the tar's end marker; replace it by a whole copy"
        )


class _Bounded:
    """A file for `tarfile`, which asks for as many bytes as an extended header says it has."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def read(self, size: int) -> bytes:
        if not 0 <= size <= MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"an extended header states {size} bytes, expected at most {MAX_HEADER_BYTES}")
        return self._file.read(size)

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()


def _add_sample(
    index: ShardIndex, where: str, key: str, members: dict[str, list[int]], file: BinaryIO, columns: Columns
) -> None:
    """Adds a sample's image and label to the index; a sample without image is passed over."""
    wanted = [columns.image.lower()] if columns.image else [ending for ending in members if f".{ending}" in EXTENSIONS]
    found = [ending for ending in wanted if ending in members]
    if len(found) > 1:
        raise DataError(f"{where} has several images ({', '.join(found)}); name one with --image-column")
    if found:
        offset, length = members[found[0]]
        index.labels.append(_label(where, members, file, columns.label))
        index.keys.append(key)
        index.offsets.append(offset)
        index.lengths.append(length)


def _label(where: str, members: dict[str, list[int]], file: BinaryIO, named: str | None) -> Label:
    for ending in (named.lower() if named else None, "cls" if named is None else None):
        if ending in members:
            text = _text(where, ending, members[ending], file).strip()
            is_number = text.isdecimal() and text.isascii() and len(text) <= MAX_LABEL_DIGITS
            return int(text) if is_number else text
    name = named or LABEL
    if "json" in members:
        try:
            content = json.loads(_text(where, "json", members["json"], file))
        except (ValueError, RecursionError) as error:
            raise DataError(f"{where}: its .json cannot be read ({error})") from error
        value = content.get(name) if isinstance(content, dict) else None
        if isinstance(value, (int, str)) and not isinstance(value, bool):
            return value
    raise DataError(
        f"{where} has no label: found {', '.join(members)}, expected a member .cls, or .json with the number or name "
        f"of the class under {name!r}; name another with --label-column"
    )


def _text(where: str, ending: str, place: Sequence[int], file: BinaryIO) -> str:
    offset, length = place
    if length > MAX_LABEL_BYTES:
        raise DataError(f"{where}: its .{ending} has {length} bytes, expected at most {MAX_LABEL_BYTES}")
    try:
        return read_at(file, offset, length).decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: its .{ending} is no UTF-8 text") from error
