"""Shards of a source behind URLs: a real HTTP server that fails in every way, a full disk, kills, other stores."""

from __future__ import annotations

import io
import multiprocessing
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from faulty_server import DatasetServer, Handler, cut, hang_up, lengthen, send, serving, stall, status
from PIL import Image

from benchmarks.cli import main as nrrdd
from builders import remote_shards
from builders.models import create_model
from builders.sources import Source, load_source
from builders.teacher import save_checkpoint
from nrrdd_format import remote
from nrrdd_format.errors import ConfigError, DataError, OutputError
from nrrdd_format.remote import RemoteFolder
from nrrdd_format.verify import verify_dataset

SIZE = 16
SHARDS = ("train-000.tar", "train-001.tar", "test-000.tar")
PATTERN = "{train-000,train-001,test-000}.tar"
FORK = multiprocessing.get_context("fork")  # a started process would spend seconds on importing torch


def write_shard(path: Path, numbers: range) -> None:
    with tarfile.open(path, "w") as archive:
        for number in numbers:
            buffer = io.BytesIO()
            pixels = np.random.default_rng(number).integers(0, 256, (SIZE, SIZE, 3), np.uint8)
            Image.fromarray(pixels).save(buffer, "PNG")
            for name, data in ((f"{number}.png", buffer.getvalue()), (f"{number}.cls", b"%d" % (number % 3))):
                header = tarfile.TarInfo(name)
                header.size = len(data)
                archive.addfile(header, io.BytesIO(data))


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("shards")
    for number, name in enumerate(SHARDS):
        write_shard(root / name, range(9 * number, 9 * number + 9))
    return root


@pytest.fixture
def server(shards: Path, tmp_path: Path) -> Iterator[DatasetServer]:
    folder = tmp_path / "served"
    folder.mkdir()
    for path in shards.iterdir():
        (folder / path.name).symlink_to(path)
    with serving(folder) as server:
        yield server


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "_FIRST_WAIT", 0.01)


def load(server: DatasetServer, cache: Path, pattern: str = PATTERN, **options: Any) -> Source:
    return load_source("webdataset", data_dir=f"{server.url}/{pattern}", cache_dir=cache, **options)


def kept(cache: Path) -> set[str]:
    """What lies in the cache's folders of shards."""
    return {path.name for path in cache.glob("sources/*/*") if path.name != "lock"}


def refuse(server: DatasetServer, cache: Path, match: str, kind: type[Exception] = DataError, **options: Any) -> None:
    with pytest.raises(kind, match=match) as caught:
        load(server, cache, **options)
    assert "\n" not in str(caught.value)


def test_urls_give_what_a_folder_gives(server: DatasetServer, shards: Path, tmp_path: Path) -> None:
    found, local = load(server, tmp_path), load_source("webdataset", data_dir=shards, cache_dir=tmp_path)
    assert found.train.fingerprint() == local.train.fingerprint()
    assert found.test is not None and local.test is not None
    assert found.test.fingerprint() == local.test.fingerprint()
    np.testing.assert_array_equal(found.train.read(11), local.train.read(11))
    assert kept(tmp_path) == set(SHARDS)
    for name in SHARDS:
        assert next(tmp_path.glob(f"sources/*/{name}")).read_bytes() == (shards / name).read_bytes()


def test_what_is_there_is_not_asked_for(
    server: DatasetServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    load(server, tmp_path, "train-000.tar")
    assert "fetching 1 shard of 30.7 KB in all from" in capsys.readouterr().err
    load(server, tmp_path)
    assert "fetching 2 shards of 61.4 KB in all from" in capsys.readouterr().err
    assert {name: server.fetched[name] for name in SHARDS} == dict.fromkeys(SHARDS, 1)
    before = len(server.requests)
    load(server, tmp_path)
    assert len(server.requests) == before
    assert "fetching" not in capsys.readouterr().err


def test_a_test_split_of_its_own(server: DatasetServer, tmp_path: Path) -> None:
    source = load(server, tmp_path, "train-{000..001}.tar", test_dir=f"{server.url}/test-000.tar")
    assert source.test is not None
    assert (len(source.train), len(source.test)) == (18, 9)


def test_class_names_lie_beside_the_shards_or_above(server: DatasetServer, tmp_path: Path) -> None:
    assert load(server, tmp_path / "none").class_names == ["0", "1", "2"]
    assert server.fetched["classnames.txt"] == 2
    (server.folder / "classnames.txt").write_text("ape\nbee\ncat\n")
    assert load(server, tmp_path / "cache").class_names == ["ape", "bee", "cat"]
    assert kept(tmp_path / "cache") == {*SHARDS, "classnames.txt"}


def test_a_token_travels_is_not_shown_and_does_not_count(
    server: DatasetServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    load(server, tmp_path, f"{PATTERN}?token=s3cret")
    assert {query for _, query in server.requests} == {"token=s3cret"}
    before = len(server.requests)
    load(server, tmp_path, f"{PATTERN}?token=another")
    assert len(server.requests) == before
    server.faults["train-000.tar"] = [status(403)]
    found = r"train-000\.tar: cannot be fetched: the server answers 403 Forbidden$"
    refuse(server, tmp_path / "new", found, pattern=f"{PATTERN}?token=s3cret")
    assert "s3cret" not in capsys.readouterr().err
    assert not [path for path in tmp_path.rglob("*") if "s3cret" in path.name]


# Faults


@pytest.mark.parametrize("fault", [cut, hang_up, status(500), lengthen])
def test_a_passing_fault_is_retried(fault: Any, server: DatasetServer, tmp_path: Path) -> None:
    server.faults["train-001.tar"] = [fault, fault]
    server.stated["train-001.tar"] = (server.folder / "train-001.tar").stat().st_size
    assert len(load(server, tmp_path).train) == 18
    assert server.fetched["train-001.tar"] == 3


def test_a_stall_is_retried(server: DatasetServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_shards, "RemoteFolder", lambda url: RemoteFolder(url=url, timeout=0.3))
    server.faults["train-001.tar"] = [stall]
    assert len(load(server, tmp_path).train) == 18


@pytest.mark.parametrize(
    ("fault", "found"),
    [
        (cut, r"cannot be fetched \(5 attempts\): ClientPayloadError"),
        (lengthen, r"cannot be fetched \(5 attempts\): more bytes came, expected 30720 as the server said"),
        (status(500), r"cannot be fetched \(5 attempts\): the server answers 500"),
        (status(404), r"cannot be fetched: there is no such file"),
    ],
)
def test_a_lasting_fault_is_named_and_its_shard_never_kept(
    fault: Any, found: str, server: DatasetServer, tmp_path: Path
) -> None:
    server.faults["train-001.tar"] = [fault] * 9
    refuse(server, tmp_path, rf"^--data-dir: {server.url}/train-001\.tar: {found}")
    whole = kept(tmp_path)  # of those that came beside it, which may be none
    assert whole <= {"train-000.tar", "test-000.tar"}
    before = server.fetched
    server.faults.clear()
    load(server, tmp_path)
    assert [server.fetched[name] - before[name] for name in SHARDS] == [int(name not in whole) for name in SHARDS]


def test_a_missing_shard_is_named_before_any_is_fetched(server: DatasetServer, tmp_path: Path) -> None:
    found = r"train-002\.tar: cannot be fetched: the server answers 404 Not Found"
    refuse(server, tmp_path, found, pattern="train-{000..002}.tar")
    assert not server.fetched.keys() & set(SHARDS)


def test_what_is_no_whole_tar_does_not_get_its_name(server: DatasetServer, tmp_path: Path) -> None:
    """A page for people, or a shard that is cut off where it lies."""
    data = (server.folder / "train-001.tar").read_bytes()
    (server.folder / "train-001.tar").unlink()
    for content in (b"<html>please log in</html>" * 100, data[:5000]):
        (server.folder / "train-001.tar").write_bytes(content)
        refuse(server, tmp_path, rf"^{server.url}/train-001\.tar: is (no whole tar file|damaged or cut off at byte)")
        assert kept(tmp_path) <= {"train-000.tar", "test-000.tar"}


def test_a_server_that_says_no_sizes(
    server: DatasetServer, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RemoteFolder, "size", lambda self, name: None)
    assert len(load(server, tmp_path).train) == 18
    assert "fetching 3 shards of unknown size from" in capsys.readouterr().err


# The disk


def test_no_room_is_said_before_any_is_fetched(
    server: DatasetServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=50_000))
    found = r"50 KB free on its disk, expected 92\.2 KB for 3 shards of http.*; make room or choose another --cache-dir"
    refuse(server, tmp_path, found, OutputError)
    assert not server.fetched.keys() & set(SHARDS)


def test_a_cache_that_cannot_be_made(server: DatasetServer, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("in the way")
    refuse(server, tmp_path / "cache", "cannot keep shards here .* choose another --cache-dir", OutputError)


# Processes


def test_processes_fetch_once(server: DatasetServer, tmp_path: Path) -> None:
    server.faults = {name: [slowly] for name in SHARDS}
    processes = [FORK.Process(target=load, args=(server, tmp_path)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert {name: server.fetched[name] for name in SHARDS} == dict.fromkeys(SHARDS, 1)


def slowly(handler: Handler, data: bytes) -> None:
    handler.server.stopped.wait(0.1)
    send(handler, data)


def test_a_killed_fetch_keeps_what_is_whole_and_leaves_nothing_else(server: DatasetServer, tmp_path: Path) -> None:
    """Two shards come while the one between them hangs."""
    server.faults["train-001.tar"] = [stall]
    process = FORK.Process(target=load, args=(server, tmp_path))
    process.start()
    whole = {"train-000.tar", "test-000.tar"}
    while not (whole <= kept(tmp_path) and list(tmp_path.glob("sources/*/.train-001.tar.tmp-*"))):
        time.sleep(0.002)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert {name for name in kept(tmp_path) if not name.startswith(".")} == whole
    load(server, tmp_path)
    assert kept(tmp_path) == set(SHARDS)
    assert server.fetched["train-000.tar"] == 1


def test_a_fault_ends_the_shards_that_are_on_their_way(
    server: DatasetServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second would come whole in half a minute; nothing of it stays."""

    def trickle(handler: Handler, data: bytes) -> None:
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(data)))
        handler.end_headers()
        for start in range(0, len(data), 100):
            handler.wfile.write(data[start : start + 100])
            handler.server.stopped.wait(0.1)

    monkeypatch.setattr(remote, "_CHUNK", 1000)
    server.faults["train-000.tar"] = [cut] * 5
    server.faults["train-001.tar"] = [trickle]
    refuse(server, tmp_path, r"train-000\.tar: cannot be fetched \(5 attempts\)")
    assert server.fetched["train-001.tar"] == 1
    assert kept(tmp_path) <= {"test-000.tar"}


# URLs


def test_urls_that_name_no_shards(server: DatasetServer, tmp_path: Path) -> None:
    found = r"--data-dir: http://127\.0\.0\.1.* names no \.tar file; expected a pattern"
    for pattern in ("", "data", "train-000.tar.gz", ".tar", "x.tar/"):
        refuse(server, tmp_path, found, pattern=pattern)
    for name in ("imagefolder", "hf", "cifar10", "digits"):
        with pytest.raises(ConfigError, match=rf"--data-dir: {name} is read from a folder, not from a URL"):
            load_source(name, data_dir=f"{server.url}/0.tar")
    with pytest.raises(ConfigError, match="--test-dir: URLs that begin with 'pipe' are not read"):
        load(server, tmp_path, test_dir="pipe:cat x.tar")
    with pytest.raises(ConfigError, match=r"--test-dir: http://\[x/0\.tar is not a URL"):
        load(server, tmp_path, test_dir="http://[x/0.tar")


def test_a_file_url_is_a_folder(shards: Path, tmp_path: Path) -> None:
    for place in (shards.as_uri(), f"{shards.as_uri()}/train-{{000..001}}.tar"):
        assert len(load_source("webdataset", data_dir=place, cache_dir=tmp_path).train) == 18
    assert not (tmp_path / "sources").exists()


@pytest.mark.parametrize("scheme", ["s3", "gs", "hf"])
def test_other_stores(scheme: str, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stands in for the packages, which need their servers: any fsspec filesystem will do."""
    import fsspec
    from fsspec.implementations.memory import MemoryFileSystem

    class Store(MemoryFileSystem):  # type: ignore[misc]
        @classmethod
        def _strip_protocol(cls, path: str) -> str:
            return "/" + path.removeprefix(f"{scheme}://").lstrip("/")

    monkeypatch.setattr(fsspec, "filesystem", lambda *args, **options: Store())
    for path in shards.iterdir():
        Store().pipe_file(f"{scheme}://bucket/{path.name}", path.read_bytes())
    source = load_source("webdataset", data_dir=f"{scheme}://bucket/{PATTERN}", cache_dir=tmp_path)
    assert len(source.train) == 18
    with pytest.raises(DataError, match=rf"{scheme}://bucket/none\.tar: cannot be fetched: there is no such file"):
        load_source("webdataset", data_dir=f"{scheme}://bucket/none.tar", cache_dir=tmp_path)


def test_without_the_package_the_extra_is_named(
    server: DatasetServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "fsspec", None)
    refuse(server, tmp_path, r'not installed \(.*\); pip install "nrrdd\[http\]"$', ConfigError)


def test_a_build_of_two_ranks_fetches_once(server: DatasetServer, tmp_path: Path) -> None:
    torch.manual_seed(0)
    save_checkpoint(tmp_path / "teacher.pt", create_model("conv2-w8", 3, SIZE), "conv2-w8", ["0", "1", "2"])
    command = (
        f"--dataset webdataset --data-dir {server.url}/{PATTERN} --cache-dir {tmp_path}/cache --size {SIZE} --ipc 2 "
        f"--out {tmp_path}/out --epochs 1 --iterations 1 --device cpu --teacher-checkpoint {tmp_path}/teacher.pt "
        f"--min-teacher-top1 0"
    ).split()
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "builders"]
    done = subprocess.run(
        [sys.executable, *torchrun, *command], capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "fetching 3 shards" in done.stderr
    assert verify_dataset(tmp_path / "out") == []
    assert {name: server.fetched[name] for name in SHARDS} == dict.fromkeys(SHARDS, 1)
    before = len(server.requests)
    teach = (
        f"teacher --dataset webdataset --data-dir {server.url}/{PATTERN} --cache-dir {tmp_path}/cache --size {SIZE} "
        f"--architecture conv2-w8 --epochs 1 --device cpu --out {tmp_path}/taught.pt"
    )
    assert nrrdd(teach.split()) == 0
    assert len(server.requests) == before
