"""Verification: every rule of SPEC.md that can be checked without a teacher, for a whole dataset."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from nrrdd_format.dataset import open_shard
from nrrdd_format.errors import FormatError
from nrrdd_format.manifest import Codec, Manifest, manifest_path
from nrrdd_format.shards import ShardReader, file_sha256


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
    cannot be read is one problem, and nothing else is checked then.
    """
    file = manifest_path(path)
    try:
        manifest = Manifest.load(file)
    except FormatError as error:
        return [Problem(shard=None, member=None, offset=None, message=str(error))]
    owners: dict[int, str] = {}
    return [
        Problem(shard=entry.name, member=error.member, offset=error.offset, message=error.reason)
        for index, entry in enumerate(manifest.shards)
        for error in _shard_errors(file.parent, manifest, index, owners)
    ]


def _shard_errors(folder: Path, manifest: Manifest, index: int, owners: dict[int, str]) -> Iterator[FormatError]:
    """Faults of one shard; `owners` maps the images of earlier shards to the shard's name."""
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
        yield from _content_errors(reader, manifest)


def _content_errors(reader: ShardReader, manifest: Manifest) -> Iterator[FormatError]:
    for image in range(reader.images):
        try:
            _decode(reader.image_bytes(image), manifest.images.codec, manifest.images.size)
        except FormatError as error:
            yield error.located(member=reader.header.members[image].name)
    for epoch in range(reader.epochs):
        try:
            reader.records(epoch)
        except FormatError as error:
            yield error
    try:
        reader.check_rest()
    except FormatError as error:
        yield error


def _decode(data: bytes, codec: Codec, size: int) -> None:
    """Decode an image; its header must state the manifest's codec and size before any pixel is decoded."""
    try:
        with Image.open(io.BytesIO(data), formats=(codec.upper(),)) as image:
            if image.size != (size, size):
                raise FormatError(f"image is {image.size[0]}x{image.size[1]}, expected {size}x{size} (manifest)")
            image.load()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise FormatError(f"is not a whole {codec} image: {error}") from None


def _repetition_errors(reader: ShardReader, name: str, owners: dict[int, str]) -> Iterator[FormatError]:
    """An image's number must occur once in the dataset."""
    for image, number in enumerate(reader.indices.tolist()):
        if owners.setdefault(number, name) != name:
            member = reader.header.members[image].name
            yield FormatError(f"image {number} is in {owners[number]} already, expected once", member=member)
