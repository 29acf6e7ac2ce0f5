"""Shards of a source behind URLs: fetched once into a folder of the cache, a few at a time, where they stay.

    <cache_dir>/sources/<host>-<folder>-<digest>/000.tar    a whole shard, under the name it has there
    <cache_dir>/sources/<host>-<folder>-<digest>/lock       held by the process that fetches

Once all are there, the network is not asked for anything.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import sys
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import closing
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

from tqdm import tqdm

from builders.class_names import MAX_TEXT_BYTES
from builders.prefetch import in_threads
from builders.progress import Progress
from builders.quantities import shown_size
from builders.tar_index import check_tar
from nrrdd_format.errors import DataError, FormatError, OutputError, counted
from nrrdd_format.files import atomic_write, locked
from nrrdd_format.limits import MAX_SHARD_BYTES
from nrrdd_format.remote import RefusedError, RemoteFolder, is_url

ASKING_THREADS = 16
"""Requests for the size of a shard at a time."""
FETCHING_THREADS = 4
"""Shards on their way at a time: one connection seldom fills a link."""
_NAME = re.compile(r"[^/.][^/]*\.tar")


def fetch_shards(urls: Sequence[str], option: str, cache_dir: Path, *, beside: str) -> list[Path]:
    """Where the shards lie on this machine, after fetching those that are missing.

    Args:
        urls: of .tar files.
        option: the option that named them.
        cache_dir: holds the folders of fetched shards.
        beside: a text file that may lie beside them or in the folder above, and is fetched with them.

    Raises:
        ConfigError: a URL of a scheme that is not read, or whose package is not installed.
        DataError: a shard cannot be fetched, or is no whole tar.
        OutputError: the cache has no room, or cannot be written.
    """
    shards = [_split(url, option) for url in urls]
    for folder_url in dict.fromkeys(url for url, _ in shards):
        remote = RemoteFolder(url=folder_url)
        names = [name for url, name in shards if url == folder_url]
        try:
            _fetch_missing(remote, names, _target(cache_dir, remote), beside)
        except FormatError as error:
            raise DataError(f"{option}: {error}") from error
    return [_target(cache_dir, RemoteFolder(url=url)) / name for url, name in shards]


def _split(url: str, option: str) -> tuple[str, str]:
    """The URL of a shard's folder, with the query of the shard's, and the shard's name."""
    parts = urlsplit(url)
    folder, _, name = parts.path.rpartition("/")
    if not is_url(url, option) or not _NAME.fullmatch(name):
        shown = RemoteFolder(url=url).shown().rstrip("/")
        raise DataError(f"{option}: {shown} names no .tar file; expected a pattern as https://host/{{000..099}}.tar")
    return parts._replace(path=folder, fragment="").geturl(), name


def _target(cache_dir: Path, remote: RemoteFolder) -> Path:
    """The folder for the shards of a URL; tokens do not count."""
    shown = remote.shown()
    words = re.sub(r"[^A-Za-z0-9]+", "-", shown.partition("://")[2]).strip("-")
    return cache_dir / "sources" / f"{words[-60:].strip('-')}-{hashlib.sha256(shown.encode()).hexdigest()[:12]}"


def _fetch_missing(remote: RemoteFolder, names: Sequence[str], target: Path, beside: str) -> None:
    if not _missing(names, target):
        return
    try:
        target.mkdir(parents=True, exist_ok=True)
        with locked(target / "lock", lambda: _say(f"{target}: waiting for another process that fetches shards")):
            for leftover in target.glob(".*.tmp-*"):
                leftover.unlink()
            if missing := _missing(names, target):
                _fetch_all(remote, missing, target, beside)
    except OSError as error:
        raise OutputError(
            f"{target}: cannot keep shards here ({error.strerror or error}); choose another --cache-dir"
        ) from error


def _missing(names: Sequence[str], target: Path) -> list[str]:
    return [name for name in names if not (target / name).is_file()]


def _fetch_all(remote: RemoteFolder, names: Sequence[str], target: Path, beside: str) -> None:
    sizes = _sizes(remote, names)
    known = [size for size in sizes if size is not None]
    total = sum(known) if len(known) == len(sizes) else None
    free = shutil.disk_usage(target).free
    if sum(known) > free:
        raise OutputError(
            f"{target}: {shown_size(free)} free on its disk, expected {shown_size(sum(known))} for "
            f"{counted(len(names), 'shard')} of {remote.shown()}; make room or choose another --cache-dir"
        )
    amount = "of unknown size" if total is None else f"of {shown_size(total)} in all"
    shards = f"{len(names)} shard{'s' if len(names) > 1 else ''}"
    _say(f"fetching {shards} {amount} from {remote.shown()} into {target} ({shown_size(free)} free)")
    _fetch_text(remote, beside, target)
    with Progress(total, "fetch", "B") as progress:
        _fetch_side_by_side(remote, dict(zip(names, sizes, strict=True)), target, progress)


def _fetch_side_by_side(
    remote: RemoteFolder, sizes: Mapping[str, int | None], target: Path, progress: Progress
) -> None:
    """Fetches shards of these sizes; the first fault ends those that are on their way, too."""
    stop = threading.Event()
    with ThreadPoolExecutor(min(FETCHING_THREADS, len(sizes)), thread_name_prefix="fetch") as pool:
        fetching = [
            pool.submit(remote.retried, name, partial(_fetch, remote, name, size, target, progress, stop))
            for name, size in sizes.items()
        ]
        try:
            for done in as_completed(fetching):
                done.result()
        except BaseException:
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _sizes(remote: RemoteFolder, names: Sequence[str]) -> list[int | None]:
    """Bytes of every shard, as far as the server says. That it has them all shows before any is fetched."""

    def ask(name: str) -> int | None:
        return remote.retried(name, partial(remote.size, name))

    sizes = []
    answers = in_threads(ask, names, min(ASKING_THREADS, len(names)))
    with Progress(len(names), "sizes", "shard") as progress, closing(answers):
        for size in answers:
            sizes.append(size)
            progress.advance()
    return sizes


class _Stopped(Exception):
    """Ends a thread whose result nobody waits for any more."""


def _fetch(
    remote: RemoteFolder, name: str, size: int | None, target: Path, progress: Progress, stop: threading.Event
) -> None:
    """Fetches one shard, which gets its name once it is whole."""
    done = 0
    with atomic_write(target / name) as file:
        try:
            for piece in remote.pieces(name, MAX_SHARD_BYTES if size is None else size):
                if stop.is_set():
                    raise _Stopped
                file.write(piece)
                done += len(piece)
                progress.advance(len(piece))
            if size is not None and done != size:
                raise FormatError(f"{'more' if done > size else done} bytes came, expected {size} as the server said")
        except FormatError:
            progress.advance(-done)
            raise
        file.flush()
        with open(file.name, "rb") as written:
            check_tar(remote.shown(name), written)


def _fetch_text(remote: RemoteFolder, name: str, target: Path) -> None:
    """Fetches a text file that lies beside the shards or in the folder above, if there is one."""
    parts = urlsplit(remote.url)
    above = parts._replace(path=parts.path.rpartition("/")[0]).geturl()
    for url in dict.fromkeys((remote.url, above)):
        folder = RemoteFolder(url=url)
        try:
            pieces = folder.retried(name, partial(_whole, folder, name))
        except RefusedError:
            continue
        with atomic_write(target / name) as file:
            file.writelines(pieces)
        return


def _whole(folder: RemoteFolder, name: str) -> list[bytes]:
    """The pieces of a text file; a longer one than may be read is cut off after one byte too many."""
    return list(folder.pieces(name, MAX_TEXT_BYTES))


def _say(message: str) -> None:
    tqdm.write(message, file=sys.stderr)
