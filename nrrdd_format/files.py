"""Files that appear under their final name only when they are whole, and locks between processes."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from nrrdd_format.errors import OutputError


@contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """Opens a temporary file beside `path` for writing; on success it is synced to disk and renamed to `path`.

    On any error the temporary file is removed and `path` stays as it was.

    Raises:
        OutputError: the disk is full, the folder is missing or read-only, or `path` is a folder.
    """
    temporary = path.parent / f".{path.name}.tmp-{os.getpid()}"  # a folder may have no name: "." and "/"
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except OSError as error:
        raise OutputError(
            f"{path}: cannot write ({error.strerror or error}); make room or choose a writable folder"
        ) from error
    finally:
        with suppress(OSError):  # where the folder is none, nothing is there to be removed
            temporary.unlink()


def make_folder(path: Path, remedy: str = "choose a writable place") -> None:
    """Makes a folder and those above it, where they are missing; `remedy` says in the error's message what to do.

    Raises:
        OutputError: it cannot be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{path}: cannot make the folder ({error.strerror}); {remedy}") from error


def default_cache_dir() -> Path:
    """The folder for what can be fetched or made again: `nrrdd` in the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nrrdd"


@contextmanager
def locked(path: Path, on_wait: Callable[[], object] = lambda: None) -> Iterator[None]:
    """Holds the lock of a file, which is made where it is missing, and stays; `on_wait` is called before waiting.

    The lock is the operating system's (flock): it ends with the process that holds it, and those forked from it while
    it did, however they end.

    Raises:
        OSError: the file cannot be made, or its file system has no locks.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            on_wait()
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        release(descriptor)


def release(descriptor: int) -> None:
    """Gives up a file's lock and closes it: a process forked meanwhile has it open too, and would go on holding it."""
    fcntl.flock(descriptor, fcntl.LOCK_UN)
    os.close(descriptor)


def _sync_folder(folder: Path) -> None:
    """Makes the rename itself survive a power failure."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
