"""Verified copies of shards, and folders that appear under their final name only when they are whole."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nrrdd_format.errors import FormatError, OutputError
from nrrdd_format.files import atomic_write
from nrrdd_format.shards import ShardEntry

_CHUNK = 2**20


def copy_shard(source: Path, entry: ShardEntry, target: Path) -> None:
    """Copy a shard's file byte for byte; it gets its name only if it is the file that the manifest's entry describes.

    Raises:
        FormatError: the source is missing or another file.
        OutputError: the target cannot be written.
    """
    with atomic_write(target) as file:
        for chunk in verified_chunks(source, entry):
            file.write(chunk)


def verified_chunks(source: Path, entry: ShardEntry) -> Iterator[bytes]:
    """The bytes of a shard's file in pieces, no more than the entry's size.

    Raises FormatError after the last if they are not those that the entry describes.
    """
    digest, left = hashlib.sha256(), entry.bytes
    try:
        with open(source, "rb") as file:
            while chunk := file.read(min(_CHUNK, left)):
                digest.update(chunk)
                left -= len(chunk)
                yield chunk
            left -= len(file.read(1))
    except OSError as error:
        raise FormatError(f"cannot be read: {error.strerror}", path=source) from None
    if left:
        found = f"more than {entry.bytes}" if left < 0 else str(entry.bytes - left)
        raise FormatError(f"the file has {found} bytes, expected {entry.bytes} (manifest)", path=source)
    if digest.hexdigest() != entry.sha256:
        raise FormatError(f"sha256 is {digest.hexdigest()}, expected {entry.sha256} (manifest)", path=source)


def check_shard(file: Path, entry: ShardEntry) -> None:
    """Reads a shard's file and raises FormatError unless it is the one that the entry describes."""
    for _ in verified_chunks(file, entry):
        pass


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """Makes a hidden folder beside `out` to be filled; on success it becomes `out`, on any error it is removed.

    Raises OutputError where `out` exists already or cannot be made.
    """
    if os.path.lexists(out):  # which, unlike Path's own, takes any name
        raise OutputError(f"{out}: exists already; move it away or choose another folder")
    partial = out.with_name(f".{out.name}.partial-{os.getpid()}")
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise OutputError(f"{out}: cannot make the folder ({error.strerror}); choose another folder") from error
    try:
        yield partial
        _rename(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _rename(partial: Path, out: Path) -> None:
    try:
        partial.rename(out)
    except OSError as error:
        raise OutputError(f"{out}: cannot take this name ({error.strerror}); choose another folder") from error
