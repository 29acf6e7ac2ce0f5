"""Verification: every rule of SPEC.md that can be checked without a teacher, for a whole dataset."""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from nrrdd_format import tar
from nrrdd_format.dataset import open_shard
from nrrdd_format.errors import FormatError
from nrrdd_format.image_file import check_image
from nrrdd_format.manifest import Manifest, manifest_path
from nrrdd_format.shards import ShardReader, file_sha256

_CHUNK = 2**20


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One fault. `shard` is the file's name (None: the manifest); `member` and `offset` may be unknown."""

    shard: str | None
    member: str | None
    offset: int | None
    message: str

    def __str__(self) -> str:
        return str(FormatError(self.message, path=self.shard, member=self.member, offset=self.offset))


def verify_dataset(path: str | os.PathLike[str]) -> list[Problem]:
    """Check a dataset folder: manifest, hashes, every image decoded, every record decoded, all padding.

    Returns every problem found, in file order; an empty list means that the dataset is whole. A manifest that
    cannot be read is one problem, and nothing else is checked then; nor is the rest of a shard whose header cannot be
    trusted.
    """
    return list(find_problems(path))


def find_problems(path: str | os.PathLike[str]) -> Iterator[Problem]:
    """The problems of `verify_dataset`, each as soon as it is found."""
    file = manifest_path(path)
    try:
        manifest = Manifest.load(file)
    except FormatError as error:
        yield Problem(shard=None, member=None, offset=None, message=str(error))
        return
    owners: dict[int, str] = {}
    for index in range(len(manifest.shards)):
        yield from shard_problems(file.parent, manifest, index, owners)


def shard_problems(folder: Path, manifest: Manifest, index: int, owners: dict[int, str]) -> Iterator[Problem]:
    """The problems of `manifest.shards[index]`.

    `owners` maps the image numbers of the shards looked at before to their shard; those of this one are added.
    """
    name = manifest.shards[index].name
    for error in _shard_errors(folder, manifest, index, owners):
        yield Problem(shard=name, member=error.member, offset=error.offset, message=error.reason)


def _shard_errors(folder: Path, manifest: Manifest, index: int, owners: dict[int, str]) -> Iterator[FormatError]:
    entry = manifest.shards[index]
    try:
        digest = file_sha256(folder / entry.name)
    except OSError as error:
        yield FormatError(f"cannot be read: {error.strerror}: fetch the shard again")
        return
    if digest != entry.sha256:
        yield FormatError(f"sha256 is {digest}, expected {entry.sha256} (manifest): fetch the shard again")
    try:
        reader = open_shard(folder, manifest, index)
    except FormatError as error:
        yield error
        return
    with reader:
        yield from _repetition_errors(reader, entry.name, owners)
        yield from _image_errors(reader, manifest)
        yield from _record_errors(reader)
        yield from unread_faults(reader)


def _repetition_errors(reader: ShardReader, name: str, owners: dict[int, str]) -> Iterator[FormatError]:
    """An image's number must occur once in the dataset."""
    for image, number in enumerate(reader.indices.tolist()):
        if owners.setdefault(number, name) != name:
            member = reader.header.members[image].name
            yield FormatError(f"image {number} is in {owners[number]} already, expected once", member=member)


def _image_errors(reader: ShardReader, manifest: Manifest) -> Iterator[FormatError]:
    for image in range(reader.images):
        try:
            check_image(reader.image_bytes(image), manifest.images.codec, manifest.images.size)
        except FormatError as error:
            yield error.located(member=reader.header.members[image].name)


def _record_errors(reader: ShardReader) -> Iterator[FormatError]:
    """One fault a block: the epochs of a block share what is wrong with it."""
    try:
        blocks = reader.blocks
    except FormatError as error:
        yield error
        return
    for number in range(blocks):
        try:
            for _ in reader.block_records(number):
                pass
        except FormatError as error:
            yield error


def unread_faults(reader: ShardReader) -> Iterator[FormatError]:
    """What reading images and records leaves out: the record member's own checksum, and all padding."""
    places = list(reader.places())
    name, start, size = places[-1]
    crc = 0
    for offset in range(start, start + size, _CHUNK):
        crc = zlib.crc32(reader.raw_bytes(offset, min(_CHUNK, start + size - offset), name), crc)
    expected = reader.header.members[-1].crc32
    if crc != expected:
        reason = f"crc32 {crc:08x}, expected {expected:08x}: the bytes are damaged"
        yield FormatError(reason, member=name, offset=start)
    for member, offset, length in places:
        yield from _padding_errors(reader, member, offset + length, tar.padded(length) - length)
    yield from _padding_errors(reader, None, start + tar.padded(size), len(tar.END))


def _padding_errors(reader: ShardReader, member: str | None, offset: int, size: int) -> Iterator[FormatError]:
    padding = reader.raw_bytes(offset, size, member)
    set_bytes = len(padding.lstrip(b"\0"))
    if set_bytes:
        yield FormatError("padding is not all zeros", member=member, offset=offset + size - set_bytes)
