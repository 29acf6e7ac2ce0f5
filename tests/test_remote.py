"""Datasets behind URLs: a real HTTP server on loopback that fails in every way, and a cache that processes share."""

from __future__ import annotations

import errno
import fcntl
import gc
import multiprocessing
import os
import pickle
import re
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from threading import Timer
from typing import Any

import pytest
from faulty_server import (
    DatasetServer,
    Fault,
    Handler,
    alter,
    cut,
    hang_up,
    lengthen,
    say_nothing,
    send,
    serving,
    stall,
    status,
    truncate,
)
from make_dataset import batch_columns, make_tiny_dataset
from tiny_dataset import tiny_manifest

from loaders import DBRLoader, cache, order
from loaders.cache import ShardCache
from nrrdd_format import remote
from nrrdd_format.dataset import open_dataset
from nrrdd_format.errors import ConfigError, FormatError, OutputError
from nrrdd_format.files import default_cache_dir
from nrrdd_format.manifest import Manifest
from nrrdd_format.remote import RefusedError, RemoteFolder, is_url, local_path
from nrrdd_format.shards import ShardEntry

SHARDS = 4
PAIRS = 24
FORK = multiprocessing.get_context("fork")  # a started process would spend seconds on importing torch


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_dataset(tmp_path_factory.mktemp("remote") / "tiny", ipc=PAIRS // 3, shards=SHARDS)


@pytest.fixture
def server(dataset: Path) -> Iterator[DatasetServer]:
    with serving(dataset) as server:
        yield server


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "_FIRST_WAIT", 0.01)


@pytest.fixture
def loader_of(server: DatasetServer, tmp_path: Path) -> Callable[..., DBRLoader]:
    """`DBRLoader` of the served dataset, with an empty cache."""
    return partial(DBRLoader, server.url, 5, cache_dir=tmp_path / "cache", timeout=5, attempts=3)


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows of one shard."""
    monkeypatch.setattr(order, "WINDOW_SHARDS", (1, 1))


def keys(loader: DBRLoader) -> list[tuple[bytes, ...]]:
    return [tuple(column.numpy().tobytes() for column in batch_columns(batch).values()) for batch in loader]


def shard_cache(
    server: DatasetServer, root: Path, *, timeout: float = 5, limit: int | None = None
) -> tuple[ShardCache, tuple[ShardEntry, ...]]:
    manifest = Manifest.load(server.folder / "dataset.json")
    folder = RemoteFolder(url=server.url, timeout=timeout, attempts=2)
    return ShardCache(folder, manifest.dataset_id, root, limit), manifest.shards


def names(folder: Path) -> set[str]:
    """What lies in a cache folder, without locks."""
    return {file.name for file in folder.glob("*/*") if file.suffix != ".lock"}


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("windows", ["wide", "narrow"])
def test_a_url_gives_what_the_folder_gives_and_each_file_travels_once(
    windows: str,
    num_workers: int,
    dataset: Path,
    server: DatasetServer,
    loader_of: Callable[..., DBRLoader],
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    if windows == "narrow":
        request.getfixturevalue("narrow")
    remote_loader, local = loader_of(num_workers=num_workers), DBRLoader(dataset, 5)
    for _ in range(2):
        assert keys(remote_loader) == keys(local)
    files = {"dataset.json", *(f"shard-0000{k}.tar" for k in range(SHARDS))}
    assert server.fetched == dict.fromkeys(files, 1)
    assert names(tmp_path / "cache") == files - {"dataset.json"}
    assert keys(loader_of(num_workers=0)) == keys(DBRLoader(dataset, 5))
    assert server.fetched == {**dict.fromkeys(files, 1), "dataset.json": 2}


def test_the_first_batch_needs_the_first_window_only(
    narrow: None, server: DatasetServer, loader_of: Callable[..., DBRLoader]
) -> None:
    pairs = order.ShardPairs(pairs_per_shard=(6,) * SHARDS, cycle=3)
    windows = order.EpochOrder(0, 0, pairs).windows
    for shard in (shard for window in windows[2:] for shard in window):
        server.faults[f"shard-0000{shard}.tar"] = [say_nothing] * 9
    assert len(next(iter(loader_of()))) == 5
    assert set(server.fetched) <= {"dataset.json", *(f"shard-0000{window[0]}.tar" for window in windows[:2])}


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        *(("dataset.json", fault) for fault in (cut, hang_up, status(500), status(503), truncate)),
        *(("shard-00001.tar", fault) for fault in (cut, hang_up, status(500), truncate, lengthen, alter)),
    ],
)
def test_a_passing_fault_is_retried(
    name: str, fault: Fault, dataset: Path, server: DatasetServer, loader_of: Callable[..., DBRLoader]
) -> None:
    server.faults[name] = [fault, fault]
    assert keys(loader_of()) == keys(DBRLoader(dataset, 5))
    assert server.fetched[name] == 3


@pytest.mark.parametrize("fault", [stall, say_nothing])
@pytest.mark.parametrize("name", ["dataset.json", "shard-00001.tar"])
def test_a_stall_is_retried(
    fault: Fault, name: str, dataset: Path, server: DatasetServer, loader_of: Callable[..., DBRLoader]
) -> None:
    server.faults[name] = [fault]
    assert keys(loader_of(timeout=0.3)) == keys(DBRLoader(dataset, 5))
    assert server.fetched[name] == 2


@pytest.mark.parametrize(
    ("fault", "found"),
    [
        (cut, r"cannot be fetched \(3 attempts\): ClientPayloadError"),
        (hang_up, r"cannot be fetched \(3 attempts\): ServerDisconnectedError"),
        (stall, r"cannot be fetched \(3 attempts\): nothing came for 0.3 seconds"),
        (status(500), r"cannot be fetched \(3 attempts\): the server answers 500 Internal Server Error"),
        (status(404), r"cannot be fetched: there is no such file"),
        (status(403), r"cannot be fetched: the server answers 403 Forbidden"),
        (truncate, r"cannot be fetched \(3 attempts\): \d+ bytes came, expected \d+ \(manifest\)"),
        (lengthen, r"cannot be fetched \(3 attempts\): more than \d+ bytes came, expected \d+ \(manifest\)"),
        (alter, r"cannot be fetched \(3 attempts\): sha256 is [0-9a-f]{64}, expected [0-9a-f]{64} \(manifest\)"),
    ],
)
def test_a_lasting_fault_is_named_and_leaves_nothing(
    fault: Fault,
    found: str,
    server: DatasetServer,
    loader_of: Callable[..., DBRLoader],
    tmp_path: Path,
) -> None:
    server.faults["shard-00001.tar"] = [fault] * 9
    with pytest.raises(FormatError, match=found) as caught:
        list(loader_of(timeout=0.3))
    assert caught.value.path == f"{server.url}/shard-00001.tar"
    assert "\n" not in str(caught.value)
    assert "shard-00001.tar" not in names(tmp_path / "cache")
    assert not any(name.endswith(".part") for name in names(tmp_path / "cache"))


def test_a_lasting_fault_is_named_by_workers_too(server: DatasetServer, loader_of: Callable[..., DBRLoader]) -> None:
    server.faults["shard-00001.tar"] = [alter] * 99
    loader = loader_of(num_workers=2)
    with pytest.raises(FormatError, match=r"shard-00001\.tar: cannot be fetched \(3 attempts\): sha256 is"):
        list(loader)
    del loader
    gc.collect()  # ends the workers, which are at their next batches, while there is a server


@pytest.mark.parametrize(
    ("fault", "found"),
    [
        (status(404), "cannot be fetched: there is no such file"),
        (cut, r"cannot be fetched \(3 attempts\): ClientPayloadError"),
        (truncate, r"cannot be fetched \(3 attempts\): what came is not valid JSON"),
        (lengthen, r"cannot be fetched \(3 attempts\): what came is not valid JSON"),
    ],
)
def test_a_bad_manifest_is_named(
    fault: Fault, found: str, server: DatasetServer, loader_of: Callable[..., DBRLoader]
) -> None:
    server.faults["dataset.json"] = [fault] * 9
    with pytest.raises(FormatError, match=found) as caught:
        loader_of()
    assert caught.value.path == f"{server.url}/dataset.json"


def test_a_loader_goes_on_once_the_server_does(
    dataset: Path, server: DatasetServer, loader_of: Callable[..., DBRLoader]
) -> None:
    loader = loader_of()
    server.faults["shard-00001.tar"] = [status(500)] * 3
    with pytest.raises(FormatError, match="500"):
        list(loader)
    assert keys(loader) == keys(DBRLoader(dataset, 5))


def test_no_server_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        FormatError, match=r"^http://127\.0\.0\.1:9/data/dataset\.json: cannot be fetched \(2 attempts\)"
    ):
        DBRLoader("http://127.0.0.1:9/data", 5, cache_dir=tmp_path, attempts=2)


def test_a_token_travels_and_is_not_shown(
    server: DatasetServer, loader_of: Callable[..., DBRLoader], tmp_path: Path
) -> None:
    url = f"{server.url}/dataset.json?token=s3cret"
    list(DBRLoader(url, 5, cache_dir=tmp_path))
    assert {query for _, query in server.requests} == {"token=s3cret"}
    for fault in (status(500), status(404), cut, hang_up):
        server.faults["dataset.json"] = [fault] * 9
        with pytest.raises(FormatError) as caught:
            DBRLoader(url, 5, cache_dir=tmp_path, attempts=1)
        assert "s3cret" not in str(caught.value)
    assert RemoteFolder(url="https://user:word@host/data?a=b").shown("x.tar") == "https://host/data/x.tar"


def redirect(handler: Handler, data: bytes) -> None:
    """To itself, for ever: the error quotes the URL."""
    handler.send_response(302)
    handler.send_header("Location", handler.path)
    handler.send_header("Content-Length", "0")
    handler.end_headers()


@pytest.mark.parametrize("token", ["s3cret", "a%2Fb%3Ds3cret", "s3cret%20x", "s3cret x", "s3cret'x", "s3cret\u00e9"])
def test_a_signature_is_not_shown_in_any_form(token: str, server: DatasetServer) -> None:
    server.faults["dataset.json"] = [redirect] * 99
    with pytest.raises(FormatError, match=r"TooManyRedirects: .*dataset\.json\?\.\.\.") as caught:
        RemoteFolder(url=f"{server.url}?sig={token}", attempts=1).manifest()
    assert not any(word in str(caught.value) for word in ("s3cret", "sig", "%2F"))


@pytest.mark.parametrize("fault", [status(500), status(404), redirect])
def test_no_traceback_shows_a_token(fault: Fault, server: DatasetServer, tmp_path: Path) -> None:
    """A script that does not catch the error prints all that led to it, whose texts quote the whole URL."""
    server.faults["dataset.json"] = [fault] * 99
    url = f"{server.url.replace('//', '//me:passw0rd@')}?token=s3cret"
    folder = RemoteFolder(url=url, attempts=2)
    for ask in (lambda: DBRLoader(url, 5, cache_dir=tmp_path, attempts=2), lambda: folder.size("no-shard.tar")):
        with pytest.raises(FormatError) as caught:
            ask()
        text = "".join(traceback.format_exception(caught.value))
        assert "s3cret" not in text and "passw0rd" not in text


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("no host in https://me:a%40b@host/x?sig=1&b=2", "no host in https://...@host/x?..."),
        ("no host in https://me:a@b@host/x", "no host in https://...@host/x"),
        (
            "moved (url='http://other/x?t=1#f'), twice: s3://b/x?t=2",
            "moved (url='http://other/x?... twice: s3://b/x?...",
        ),
        ("neither: me@host/x or http://host/a@b", "neither: me@host/x or http://host/a@b"),
    ],
)
def test_no_secret_of_any_url_is_shown(text: str, shown: str) -> None:
    assert RemoteFolder(url="https://host/data")._fault(OSError(text)).reason == f"OSError: {shown}"


@pytest.mark.parametrize(
    "url", ["pipe:curl http://x", "pipe://x", "ftp://host/data", "simplecache::https://host/data", "S4://b", "://x"]
)
def test_other_schemes_are_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="are not read; expected a folder, or one of http, https, s3, gs, hf, file"):
        DBRLoader(url, 5)


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("https://me:passw0rd@[host/data?sig=s3cret", "https://...@[host/data?..."),
        ("https://me:passw0rd@ho\u2100st/data", "https://...@ho\u2100st/data"),  # whose parser quotes the password
        ("file://[host/data", "file://[host/data"),
    ],
)
def test_what_is_no_url_is_refused_without_its_secrets(url: str, shown: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"path: {shown} is not a URL, expected scheme://host/")) as caught:
        DBRLoader(url, 5)
    text = "".join(traceback.format_exception(caught.value))
    assert "s3cret" not in text and "passw0rd" not in text


def test_a_scheme_may_be_in_capitals(dataset: Path) -> None:
    assert keys(DBRLoader(dataset.as_uri().replace("file", "FILE"), 5)) == keys(DBRLoader(dataset, 5))


def test_plain_paths_and_file_urls_are_folders(tmp_path: Path) -> None:
    assert not any(is_url(path) for path in ("data", "/a/b:c", "a:b/c", Path("x"), "file:///a"))
    assert all(is_url(f"{scheme}://host/data") for scheme in ("http", "https", "s3", "gs", "hf", "HTTPS"))
    assert local_path("file:///a%20b/c") == local_path("file://localhost/a%20b/c") == Path("/a b/c")
    with pytest.raises(ConfigError, match="names the machine 'other', expected file:///folder"):
        local_path("file://other/a")
    with pytest.raises(ConfigError, match=r"path: file://\.\.\.@other/a names the machine 'other'"):
        local_path("file://me:s3cret@other/a")


def test_a_file_url_gives_what_the_folder_gives(dataset: Path) -> None:
    assert keys(DBRLoader(dataset.as_uri(), 5)) == keys(DBRLoader(dataset, 5))
    assert keys(DBRLoader(f"{dataset.as_uri()}/dataset.json", 5)) == keys(DBRLoader(dataset, 5))


@pytest.mark.parametrize(
    ("url", "module", "extra"),
    [("http://host/d", "fsspec", "http"), ("http://host/d", "aiohttp", "http"), ("s3://b/d", "s3fs", "s3"),
     ("gs://b/d", "gcsfs", "gs"), ("hf://datasets/a/b", "huggingface_hub", "hf")],
)  # fmt: skip
def test_missing_packages_are_named_with_their_extra(
    url: str, module: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigError, match=rf'not installed \(.*\); pip install "nrrdd\[{extra}\]"$'):
        DBRLoader(url, 5)


@pytest.mark.parametrize("scheme", ["s3", "gs", "hf"])
def test_other_stores_are_read_as_files(scheme: str, dataset: Path, tmp_path: Path) -> None:
    """Stands in for the packages, which need their servers: any fsspec filesystem will do."""
    import fsspec
    from fsspec.implementations.memory import MemoryFileSystem
    from fsspec.registry import _registry

    asked: list[dict[str, Any]] = []

    class Store(MemoryFileSystem):  # type: ignore[misc]
        protocol = scheme

        def __init__(self, **options: Any) -> None:
            asked.append(options)
            super().__init__()

        @classmethod
        def _strip_protocol(cls, path: str) -> str:
            return "/" + path.removeprefix(f"{scheme}://").lstrip("/")

    fsspec.register_implementation(scheme, Store, clobber=True)
    try:
        for file in dataset.iterdir():
            Store().pipe_file(f"/bucket/{scheme}/data/{file.name}", file.read_bytes())
        loader = DBRLoader(f"{scheme}://bucket/{scheme}/data", 5, cache_dir=tmp_path, storage_options={"anon": True})
        assert keys(loader) == keys(DBRLoader(dataset, 5))
        assert [options["anon"] for options in asked if options] == [True]
        Store().rm(f"/bucket/{scheme}/data/shard-00002.tar")
        with pytest.raises(FormatError, match=rf"^{scheme}://bucket/{scheme}/data/shard-00002.tar: .*no such file"):
            list(DBRLoader(f"{scheme}://bucket/{scheme}/data", 5, cache_dir=tmp_path / "other"))
    finally:
        _registry.pop(scheme)


def test_the_cache_lies_in_the_users_cache_folder(
    dataset: Path, server: DatasetServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    list(DBRLoader(server.url, 5))
    identity = open_dataset(dataset).manifest.dataset_id
    assert (tmp_path / "xdg" / "nrrdd" / identity / "shard-00000.tar").is_file()
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_cache_dir() == tmp_path / ".cache" / "nrrdd"


def test_bad_shards_of_a_url_are_skipped_on_demand(
    dataset: Path, server: DatasetServer, loader_of: Callable[..., DBRLoader], tmp_path: Path
) -> None:
    server.faults = {"shard-00001.tar": [alter] * 9, "shard-00003.tar": [status(404)] * 9}
    with pytest.warns(
        UserWarning, match=r"^2 of 4 shards are bad and skipped \(shard-00001.tar, shard-00003.tar\); the"
    ):
        loader = loader_of(on_bad_shard="skip")
    assert sum(len(batch) for batch in loader) == PAIRS // 2
    copy = tmp_path / "copy"
    copy.mkdir()
    for name in ("dataset.json", "shard-00000.tar", "shard-00002.tar"):
        (copy / name).write_bytes((dataset / name).read_bytes())
    with pytest.warns(UserWarning, match="2 of 4 shards"):
        local = DBRLoader(copy, 5, on_bad_shard="skip")
    loader.set_epoch(0)
    assert keys(loader) == keys(local)


def test_another_version_at_the_same_url_is_not_mixed_up(
    server: DatasetServer, loader_of: Callable[..., DBRLoader], tmp_path: Path
) -> None:
    list(loader_of())
    server.folder = make_tiny_dataset(tmp_path / "second", ipc=PAIRS // 3, shards=SHARDS, seed=1)
    assert keys(loader_of()) == keys(DBRLoader(server.folder, 5))


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"timeout": 0}, "timeout: found 0"),
        ({"attempts": 0}, "attempts: found 0"),
        ({"on_bad_shard": "ignore"}, "on_bad_shard: found 'ignore'"),
        ({"cache_limit_bytes": 0}, "cache_limit_bytes: found 0, expected a whole number, 1 or more"),
        ({"cache_limit_bytes": -1}, "cache_limit_bytes: found -1, expected a whole"),
        ({"cache_limit_bytes": 1e9}, r"cache_limit_bytes: found 1000000000\.0, expected a whole"),
        ({"cache_limit_bytes": True}, "cache_limit_bytes: found True, expected a whole"),
        ({"cache_limit_bytes": 5000}, r"cache_limit_bytes: found 5000, expected at least \d+: up to 4 shards"),
    ],
)
def test_options_that_cannot_work_are_refused(
    option: dict[str, Any], message: str, loader_of: Callable[..., DBRLoader]
) -> None:
    with pytest.raises(ConfigError, match=message):
        loader_of(**option)


# The cache by itself.


def test_a_dataset_without_shards_is_refused_under_a_limit_too(tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    tiny_manifest().save(empty / "dataset.json")
    with serving(empty) as server, pytest.raises(ConfigError, match="lists no shards") as caught:
        DBRLoader(f"{server.url}?token=s3cret", 5, cache_dir=tmp_path / "cache", cache_limit_bytes=1000)
    assert "s3cret" not in str(caught.value)


def fetch_all(server: DatasetServer, root: Path, done: Any) -> None:
    """What a process does that shares a cache."""
    shared, entries = shard_cache(server, root)
    shared.hold(entries)
    done.put([shared.path(entry).stat().st_size for entry in entries])


def slowly(handler: Handler, data: bytes) -> None:
    handler.server.stopped.wait(0.2)
    send(handler, data)


def test_two_processes_fetch_each_shard_once(server: DatasetServer, tmp_path: Path) -> None:
    """As two workers, two ranks or two trainings do."""
    _, entries = shard_cache(server, tmp_path)
    server.faults = {entry.name: [slowly] for entry in entries}
    done = FORK.SimpleQueue()
    processes = [FORK.Process(target=fetch_all, args=(server, tmp_path, done)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert [done.get() for _ in processes] == [[entry.bytes for entry in entries]] * 3
    assert server.fetched == dict.fromkeys((entry.name for entry in entries), 1)


def test_a_killed_fetcher_blocks_nobody_and_is_not_believed(server: DatasetServer, tmp_path: Path) -> None:
    shared, entries = shard_cache(server, tmp_path)
    server.faults[entries[0].name] = [stall]
    process = FORK.Process(target=fetch_all, args=(server, tmp_path, FORK.SimpleQueue()))
    process.start()
    while not server.fetched[entries[0].name]:
        time.sleep(0.01)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert names(tmp_path) == {f"{entries[0].name}.part"}
    shared.hold(entries)
    assert names(tmp_path) == {entry.name for entry in entries}
    assert shared.path(entries[0]).read_bytes() == (server.folder / entries[0].name).read_bytes()


def train_in_a_group_of_its_own(server: DatasetServer, root: Path) -> None:
    os.setsid()
    list(DBRLoader(server.url, 5, cache_dir=root, num_workers=2))


def test_an_interrupt_leaves_no_processes_and_a_sound_cache(
    dataset: Path, server: DatasetServer, tmp_path: Path
) -> None:
    server.faults = {f"shard-0000{k}.tar": [stall] for k in range(2)}
    process = FORK.Process(target=train_in_a_group_of_its_own, args=(server, tmp_path))
    process.start()
    while server.fetched["shard-00000.tar"] + server.fetched["shard-00001.tar"] < 2:
        time.sleep(0.01)
    assert process.pid is not None
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    process.join(60)
    assert process.exitcode not in (None, 0)
    for _ in range(500):  # whoever is ending may still be counted
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            break
        time.sleep(0.01)
    else:
        pytest.fail("processes are left")
    assert keys(DBRLoader(server.url, 5, cache_dir=tmp_path)) == keys(DBRLoader(dataset, 5))
    assert names(tmp_path) == {f"shard-0000{k}.tar" for k in range(SHARDS)}


def test_two_trainings_share_a_cache(dataset: Path, server: DatasetServer, tmp_path: Path) -> None:
    done = FORK.SimpleQueue()

    def train() -> None:
        done.put(keys(DBRLoader(server.url, 5, cache_dir=tmp_path, num_workers=1)))

    processes = [FORK.Process(target=train) for _ in range(2)]
    for process in processes:
        process.start()
    expected = keys(DBRLoader(dataset, 5))
    assert [done.get() for _ in processes] == [expected] * 2
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    assert {name: count for name, count in server.fetched.items() if count > 1} == {"dataset.json": 2}


def test_a_fetch_that_is_silent_between_attempts_is_waited_for(server: DatasetServer, tmp_path: Path) -> None:
    """However short the own timeout is: the other process may be about to try again."""
    other, entries = shard_cache(server, tmp_path)
    other.hold(entries)
    other.hold([])
    shared, _ = shard_cache(server, tmp_path, timeout=0.01)
    lock = other._open_lock(other._part(entries[0]))
    assert cache._locked(lock, fcntl.LOCK_EX)
    other.path(entries[0]).rename(tmp_path / "aside")

    def finish() -> None:
        (tmp_path / "aside").rename(other.path(entries[0]))
        os.close(lock)

    Timer(1, finish).start()
    shared.hold(entries)
    assert server.fetched == dict.fromkeys((entry.name for entry in entries), 1)


def test_every_attempt_is_progress_that_others_see(server: DatasetServer, tmp_path: Path) -> None:
    shared, entries = shard_cache(server, tmp_path)
    part, seen = shared._part(entries[0]), []

    def look(handler: Handler, data: bytes) -> None:
        seen.append(part.stat().st_mtime_ns)
        os.utime(part, ns=(0, 0))
        (status(500) if len(seen) < 2 else send)(handler, data)

    server.faults[entries[0].name] = [look, look]
    shared.hold(entries[:1])
    assert len(seen) == 2 and min(seen) > 0


def test_a_holder_that_does_nothing_is_named(
    server: DatasetServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "_LONGEST_WAIT", 0.05)
    shared, entries = shard_cache(server, tmp_path, timeout=0.05)
    lock = shared._open_lock(shared._part(entries[0]))
    assert cache._locked(lock, fcntl.LOCK_EX)
    with pytest.raises(OutputError, match=r"shard-00000\.tar\.part: another process holds this shard .* 0\.5 seconds"):
        shared.hold(entries)
    os.close(lock)
    shared.hold(entries)


def test_a_shard_of_another_size_is_fetched_anew(server: DatasetServer, tmp_path: Path) -> None:
    shared, entries = shard_cache(server, tmp_path)
    shared.hold(entries)
    shared.hold([])
    shared.path(entries[0]).write_bytes(b"cut")
    shared.hold(entries)
    assert shared.path(entries[0]).read_bytes() == (server.folder / entries[0].name).read_bytes()


def test_shards_read_longest_ago_are_removed_when_the_limit_is_reached(server: DatasetServer, tmp_path: Path) -> None:
    _, entries = shard_cache(server, tmp_path)
    limit = sum(entry.bytes for entry in entries) - 1
    shared, _ = shard_cache(server, tmp_path, limit=limit)
    for number, entry in enumerate([*entries[:3], entries[0]]):
        shared.hold([entry])
        os.utime(shared.path(entry), (number, number))  # clocks of files are coarse
    shared.hold([entries[3]])
    assert names(tmp_path) == {entry.name for entry in (entries[0], entries[2], entries[3])}


def test_a_limit_counts_other_datasets_and_what_killed_processes_left(server: DatasetServer, tmp_path: Path) -> None:
    _, entries = shard_cache(server, tmp_path)
    shared, _ = shard_cache(server, tmp_path, limit=entries[0].bytes + 10)
    other = tmp_path / "another dataset"
    other.mkdir()
    (other / "shard-00007.tar").write_bytes(bytes(100))
    (other / "shard-00008.tar.part").write_bytes(bytes(100))
    shared.hold(entries[:1])
    assert names(tmp_path) == {entries[0].name}


def test_a_file_that_goes_while_room_is_made_takes_none(server: DatasetServer, tmp_path: Path) -> None:
    """As a .part does when its fetch fails; a link to nothing stands for it here."""
    _, entries = shard_cache(server, tmp_path)
    shared, _ = shard_cache(server, tmp_path, limit=entries[0].bytes)
    shared.folder.mkdir()
    (shared.folder / "shard-00009.tar.part").symlink_to(tmp_path / "gone")
    shared.hold(entries[:1])
    assert shared.path(entries[0]).is_file()


def test_shards_that_are_read_stay(server: DatasetServer, tmp_path: Path) -> None:
    _, entries = shard_cache(server, tmp_path)
    limit = sum(entry.bytes for entry in entries[:2])
    reader, _ = shard_cache(server, tmp_path, limit=limit)
    reader.hold(entries[:2])
    other, _ = shard_cache(server, tmp_path, limit=limit)
    with pytest.raises(OutputError, match=rf"no room for .*/shard-00002\.tar: {limit} bytes of shards are in use"):
        other.hold([entries[2]])
    reader.hold(entries[:1])
    other.hold([entries[2]])
    assert names(tmp_path) == {entries[0].name, entries[2].name}


def test_an_epoch_under_a_limit_stays_under_it(
    narrow: None, dataset: Path, server: DatasetServer, loader_of: Callable[..., DBRLoader], tmp_path: Path
) -> None:
    sizes = sorted((entry.bytes for entry in Manifest.load(dataset / "dataset.json").shards), reverse=True)
    limit = sum(sizes[:3])  # of four
    loader, local = loader_of(cache_limit_bytes=limit), DBRLoader(dataset, 5)
    for _ in range(2):
        for batch, expected in zip(loader, local, strict=True):
            assert batch.images.equal(expected.images)
            assert sum(file.stat().st_size for file in tmp_path.glob("cache/*/*.tar*")) <= limit
    assert sum(server.fetched.values()) > 1 + SHARDS


def test_prefetching_goes_round_what_others_fetch_and_keeps_its_errors(server: DatasetServer, tmp_path: Path) -> None:
    shared, entries = shard_cache(server, tmp_path)
    lock = shared._open_lock(shared._part(entries[0]))
    assert cache._locked(lock, fcntl.LOCK_EX)
    shared._prefetch(entries[:2])
    assert names(tmp_path) == {entries[1].name}
    os.close(lock)
    server.faults[entries[0].name] = [status(404)]
    shared._prefetch(entries[:1])
    shared.hold(entries)


def test_a_full_disk_is_named(
    server: DatasetServer, loader_of: Callable[..., DBRLoader], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match=r"cannot keep shards here \(No space left on device\); make room or"):
        list(loader_of())
    assert names(tmp_path / "cache") == set()
    assert max(server.fetched.values()) == 1  # a full disk is no reason to fetch again


def test_a_read_only_folder_is_named(loader_of: Callable[..., DBRLoader], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: ShardCache, shard: Path) -> int:  # root may write into any folder, whatever its mode
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(ShardCache, "_open_lock", refuse)
    with pytest.raises(
        OutputError, match=r"cannot keep shards here \(Permission denied\); make room or choose another"
    ):
        list(loader_of())


def test_a_file_in_the_way_is_named(loader_of: Callable[..., DBRLoader], tmp_path: Path) -> None:
    (tmp_path / "cache").write_bytes(b"")
    with pytest.raises(OutputError, match=r"cannot keep shards here \((Not a directory|File exists)\)"):
        list(loader_of())


def test_a_cache_is_pickled_without_what_it_holds(server: DatasetServer, tmp_path: Path) -> None:
    shared, entries = shard_cache(server, tmp_path)
    shared.hold(entries)
    copy = pickle.loads(pickle.dumps(shared))
    assert copy._held == {}
    copy.hold(entries)
    assert max(server.fetched.values()) == 1
    error = pickle.loads(pickle.dumps(RefusedError("no", path="x")))
    assert (type(error), str(error)) == (RefusedError, "x: no")


@pytest.fixture
def fork() -> Iterator[Callable[[], None]]:
    """Forks processes that do nothing, as another loader's workers would be, and live until the test ends."""
    children = []

    def one() -> None:
        children.append(FORK.Process(target=time.sleep, args=(600,), daemon=True))
        children[-1].start()

    yield one
    for child in children:
        child.kill()
        child.join()


def test_what_is_let_go_is_free_whatever_was_forked_meanwhile(
    server: DatasetServer, tmp_path: Path, fork: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, entries = shard_cache(server, tmp_path)
    shared, _ = shard_cache(server, tmp_path, limit=entries[0].bytes)
    shared.hold(entries[:1])
    fork()
    shared.hold(entries[1:2])  # evicts the first
    assert names(tmp_path) == {entries[1].name}
    fetch = ShardCache._fetch

    def forking(self: ShardCache, entry: ShardEntry) -> None:
        fetch(self, entry)
        fork()

    monkeypatch.setattr(ShardCache, "_fetch", forking)
    other, _ = shard_cache(server, tmp_path)
    other._prefetch(entries[2:3])
    monkeypatch.undo()
    for file in (other.path(entries[2]), other._part(entries[2])):
        lock = other._open_lock(file)
        assert cache._locked(lock, fcntl.LOCK_EX)
        os.close(lock)


def test_a_forked_process_unlocks_nothing_of_its_parent(server: DatasetServer, tmp_path: Path) -> None:
    shared, entries = shard_cache(server, tmp_path)
    shared.hold(entries[:1])
    child = FORK.Process(target=shared.hold, args=([],))
    child.start()
    child.join()
    assert child.exitcode == 0
    lock = shared._open_lock(shared.path(entries[0]))
    assert not cache._locked(lock, fcntl.LOCK_EX)
    os.close(lock)


def damage(shard: Path) -> None:
    """Turns over every byte but the first tar header's, at the same size."""
    data = shard.read_bytes()
    shard.write_bytes(data[:512] + bytes(255 - byte for byte in data[512:]))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_shard_damaged_in_the_cache_is_fetched_anew(
    num_workers: int, dataset: Path, server: DatasetServer, loader_of: Callable[..., DBRLoader], tmp_path: Path
) -> None:
    expected = keys(loader_of())
    (cached,) = tmp_path.glob("cache/*/shard-00002.tar")
    damage(cached)
    loader = loader_of(num_workers=num_workers)
    with pytest.raises(FormatError, match=r"shard-00002\.tar.*; it was removed from the cache, and is fetched anew"):
        list(loader)
    loader.set_epoch(0)
    assert keys(loader) == expected
    damage(cached)
    assert keys(loader_of(on_bad_shard="skip")) == expected
    assert server.fetched["shard-00002.tar"] == 3


def test_a_shard_that_others_read_is_fetched_anew(server: DatasetServer, tmp_path: Path) -> None:
    one, entries = shard_cache(server, tmp_path)
    one.hold(entries)
    other, _ = shard_cache(server, tmp_path)
    other.hold(entries)
    entry, path = entries[1], one.path(entries[1])
    sound = path.read_bytes()
    assert not one.discard_damaged(entry)
    damage(path)
    with open(path, "rb") as being_read:
        assert one.discard_damaged(entry)
        assert not other.discard_damaged(entry)  # it is gone
        one.hold(entries)
        assert not other.discard_damaged(entry)  # it is sound again
        assert path.read_bytes() == sound != being_read.read()
    full, _ = shard_cache(server, tmp_path, limit=entry.bytes)
    with pytest.raises(OutputError, match="no room"):
        full._evict(1, entry)
    path.unlink()
    other.hold(entries)
    assert path.read_bytes() == sound
    assert server.fetched == {**dict.fromkeys((entry.name for entry in entries), 1), entry.name: 3}


@pytest.mark.parametrize("num_workers", [0, 2])
def test_damage_that_another_loader_has_mended_is_no_error(
    num_workers: int, dataset: Path, server: DatasetServer, loader_of: Callable[..., DBRLoader], tmp_path: Path
) -> None:
    """The second loader has the damaged file open."""
    local = DBRLoader(dataset, 5)
    loaders = [loader_of(num_workers=number, cache_bytes=0) for number in (0, num_workers)]
    expected = keys(local)
    assert [keys(loader) for loader in loaders] == [expected] * 2
    (cached,) = tmp_path.glob("cache/*/shard-00002.tar")
    damage(cached)
    with pytest.raises(FormatError, match="is fetched anew"):
        list(loaders[0])
    expected = keys(local)
    assert [keys(loader) for loader in loaders] == [expected] * 2
    assert server.fetched["shard-00002.tar"] == 2


def test_a_loader_fetches_what_others_have_removed(
    dataset: Path, server: DatasetServer, loader_of: Callable[..., DBRLoader], tmp_path: Path
) -> None:
    """While it holds the shard, but has not opened it yet."""
    loader = loader_of(timeout=60)  # a busy machine asks again after less
    batches = iter(loader)
    next(batches)
    for file in tmp_path.glob("cache/*/*.tar"):
        file.unlink()
    assert sum(len(batch) for batch in batches) == PAIRS - 5
    assert max(server.fetched.values()) == 2


def test_damage_in_a_cache_that_cannot_be_changed_is_named(
    loader_of: Callable[..., DBRLoader], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    list(loader_of())
    (cached,) = tmp_path.glob("cache/*/shard-00002.tar")
    damage(cached)

    def refuse(self: ShardCache, entry: ShardEntry) -> bool:
        raise OutputError("read-only")

    monkeypatch.setattr(ShardCache, "discard_damaged", refuse)
    with pytest.raises(FormatError, match=r"shard-00002\.tar(?!.*removed)"):
        list(loader_of(num_workers=1))


def test_a_damaged_dataset_in_a_folder_is_left_alone(dataset: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in dataset.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    damage(copy / "shard-00002.tar")
    with pytest.raises(FormatError, match=r"shard-00002\.tar(?!.*removed)"):
        list(DBRLoader(copy, 5))
    assert (copy / "shard-00002.tar").is_file()
