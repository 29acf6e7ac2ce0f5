"""A folder of shards fetched from a URL, which several processes and trainings share.

    <cache_dir>/lock                                   held while room is made or a file gets or loses its name
    <cache_dir>/<dataset id>/shard-00000.tar           a whole shard, checked when it was fetched
    <cache_dir>/<dataset id>/shard-00000.tar.lock      shared by who wants the shard, held exclusively by who evicts it
    <cache_dir>/<dataset id>/shard-00000.tar.part      a shard being fetched, of its full size from the beginning
    <cache_dir>/<dataset id>/shard-00000.tar.part.lock held exclusively by who fetches, or evicts what is left of it

So a shard that has been damaged is fetched anew while others read it: what they have open stays what it was.

Locks are the operating system's (flock): they end with the process that holds them, however it ends, so what a
killed one leaves is an unlocked .part, which is written anew or evicted. Lock files are empty and stay. A process
forked from one that holds has the same open files, so what is let go is unlocked, not only closed.
"""

from __future__ import annotations

import fcntl
import os
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from nrrdd_format.copies import check_shard
from nrrdd_format.errors import FormatError, NrrddError, OutputError
from nrrdd_format.files import locked, release
from nrrdd_format.remote import RemoteFolder
from nrrdd_format.shards import ShardEntry

_POLL = 0.05  # seconds between looks at what another process fetches
_PATIENCE = 5  # longest pauses of a fetch that another process may show no progress: its timeout may be a longer one


class ShardCache:
    """The shards of one dataset, fetched when wanted; those held stay until they are let go.

    Can be pickled; each process holds for itself. Every method raises OutputError where the folder cannot be used.
    """

    def __init__(self, remote: RemoteFolder, dataset_id: str, root: Path, limit_bytes: int | None) -> None:
        self.folder = root / dataset_id
        self._root = root
        self._remote = remote
        self.limit_bytes = limit_bytes
        self._held: dict[str, int] = {}  # name of a shard -> the descriptor that holds its lock
        self._holder = os.getpid()

    def hold(self, entries: Sequence[ShardEntry]) -> None:
        """Fetches these shards where they are missing, and lets go of all others.

        What another process is fetching is waited for, so processes that want the same shards fetch different ones;
        it may take any time, as long as bytes or new attempts come.

        Raises FormatError naming the URL: a shard cannot be fetched; OutputError: another process holds one and does
        nothing.
        """
        self._forget_the_parents()
        seen: list[int] = []
        deadline, patience = 0.0, _PATIENCE * self._remote.longest_pause
        with _disk_errors(self.folder):
            here = {entry.name for entry in entries if self._is_here(entry)}  # others may have discarded what is held
            for name in self._held.keys() - here:
                release(self._held.pop(name))
            waiting = [entry for entry in entries if entry.name not in self._held]
            while waiting := [entry for entry in waiting if not self._try_hold(entry)]:
                progress = [_modified(self._part(entry)) for entry in waiting]
                if progress != seen:
                    seen, deadline = progress, time.monotonic() + patience
                elif time.monotonic() > deadline:
                    raise OutputError(
                        f"{self._part(waiting[0])}: another process holds this shard and has not gone on for "
                        f"{patience:g} seconds; end it or choose another cache_dir"
                    )
                time.sleep(_POLL)

    def prefetch(self, entries: Sequence[ShardEntry]) -> None:
        """Fetches these shards in the background, so far as they are missing and no other process does."""
        missing = [entry for entry in entries if not self._is_here(entry)]
        if missing:
            threading.Thread(target=self._prefetch, args=(missing,), daemon=True).start()

    def path(self, entry: ShardEntry) -> Path:
        """Where a shard lies once it is held."""
        return self.folder / entry.name

    def discard_damaged(self, entry: ShardEntry) -> bool:
        """Removes a shard that is not what the manifest says: who needs it next fetches it anew.

        Returns whether it did. False: the shard is sound, or another process has removed it meanwhile.
        """
        path = self.path(entry)
        with _disk_errors(self.folder):
            found = _inode(path)
            if found is None or _is_sound(path, entry):
                return False
            with locked(self._root / "lock"):
                damaged = found == _inode(path)  # not what another process has fetched since
                if damaged:
                    path.unlink()
        return damaged

    def _forget_the_parents(self) -> None:
        """In a forked process: closes what its parent holds, without unlocking it."""
        if self._holder != os.getpid():
            self._close_held()
            self._holder = os.getpid()

    def _close_held(self) -> None:
        while self._held:
            os.close(self._held.popitem()[1])

    def _prefetch(self, entries: Iterable[ShardEntry]) -> None:
        with suppress(NrrddError, OSError):  # whoever comes to need the shard tries again, and says what is wrong
            for entry in entries:
                self._try_fetch(entry)

    def _try_hold(self, entry: ShardEntry) -> bool:
        """Holds a shard, fetched if it is missing; False: another process is at it."""
        lock = self._open_lock(self.path(entry))
        try:
            if not _locked(lock, fcntl.LOCK_SH):
                return False
            if not self._is_here(entry):
                self._try_fetch(entry)
            if self._is_here(entry):
                _touch(self.path(entry))
                self._held[entry.name], lock = lock, -1
                return True
        finally:
            if lock != -1:
                release(lock)
        return False

    def _try_fetch(self, entry: ShardEntry) -> None:
        """Fetches a shard unless another process does, or has done so."""
        lock = self._open_lock(self._part(entry))
        try:
            if _locked(lock, fcntl.LOCK_EX) and not self._is_here(entry):
                self._fetch(entry)
        finally:
            release(lock)

    def _fetch(self, entry: ShardEntry) -> None:
        """Fetches a shard; this process holds the lock of its .part."""
        part = self._part(entry)
        try:
            self._reserve(entry)
            self._remote.retried(entry.name, lambda: self._write(entry, part))
            with locked(self._root / "lock"):
                os.replace(part, self.path(entry))
        finally:
            part.unlink(missing_ok=True)

    def _write(self, entry: ShardEntry, part: Path) -> None:
        os.utime(part)  # a new attempt is progress, even if no byte of it comes
        with open(part, "r+b") as file:
            for piece in self._remote.shard(entry):
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())

    def _reserve(self, entry: ShardEntry) -> None:
        """Makes the file to be written, at its full size so that others count it, after making room for it."""
        part = self._part(entry)
        part.unlink(missing_ok=True)
        with locked(self._root / "lock"):
            if self.limit_bytes is not None:
                self._evict(self.limit_bytes, entry)
            with open(part, "wb") as file:
                file.truncate(entry.bytes)

    def _evict(self, limit: int, entry: ShardEntry) -> None:
        """Removes what a killed process left, then the shards held longest ago that nobody holds, as far as needed."""
        files = [file for file in self._root.glob("*/shard-*") if file.suffix in (".tar", ".part")]
        sizes = {file: _size(file) for file in files}
        for file in sorted(files, key=lambda file: (file.suffix == ".tar", _modified(file))):
            if sum(sizes.values()) + entry.bytes <= limit:
                return
            if self._removed(file):
                del sizes[file]
        used = sum(sizes.values())
        if used + entry.bytes > limit:
            raise OutputError(
                f"{self._root}: no room for {self._remote.shown(entry.name)}: {used} bytes of shards are in use, "
                f"{entry.bytes} more are needed, cache_limit_bytes is {limit}; raise it or choose another cache_dir"
            )

    def _removed(self, file: Path) -> bool:
        """Removes a shard, or what is there of it, unless somebody reads or fetches it."""
        lock = self._open_lock(file)
        try:
            free = _locked(lock, fcntl.LOCK_EX)
            if free:
                file.unlink(missing_ok=True)
            return free
        finally:
            release(lock)

    def _is_here(self, entry: ShardEntry) -> bool:
        """A file of another size has been damaged since it was checked, and is fetched anew."""
        try:
            return self.path(entry).stat().st_size == entry.bytes
        except FileNotFoundError:
            return False

    def _part(self, entry: ShardEntry) -> Path:
        return self.folder / f"{entry.name}.part"

    def _open_lock(self, file: Path) -> int:
        file.parent.mkdir(parents=True, exist_ok=True)
        return os.open(f"{file}.lock", os.O_RDWR | os.O_CREAT, 0o644)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_held": {}}

    def __del__(self) -> None:
        self._close_held()


def _locked(descriptor: int, kind: int) -> bool:
    """Takes a lock of this kind if that needs no waiting."""
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_sound(path: Path, entry: ShardEntry) -> bool:
    """Reads a whole shard and compares it with the manifest."""
    try:
        check_shard(path, entry)
    except FormatError:
        return False
    return True


def _inode(file: Path) -> int | None:
    """What tells a file from another of the same name; None: there is none."""
    try:
        return file.stat().st_ino
    except FileNotFoundError:
        return None


def _touch(file: Path) -> None:
    """Marks a file as wanted now, unless another process has just removed it."""
    with suppress(FileNotFoundError):
        os.utime(file)


def _size(file: Path) -> int:
    """Bytes of a file; 0: it has gone, as a .part does when its fetch fails."""
    try:
        return file.stat().st_size
    except FileNotFoundError:
        return 0


def _modified(file: Path) -> int:
    """When a file was last changed, in ns; 0: there is none."""
    try:
        return file.stat().st_mtime_ns
    except FileNotFoundError:
        return 0


@contextmanager
def _disk_errors(folder: Path) -> Iterator[None]:
    """What the network does wrong is a FormatError, so an OSError comes from the disk."""
    try:
        yield
    except OSError as error:
        raise OutputError(
            f"{folder}: cannot keep shards here ({error.strerror or error}); make room or choose another cache_dir"
        ) from error
