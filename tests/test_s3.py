"""A dataset in an S3 bucket, read with s3fs from a real server that speaks S3 (moto, a process of its own)."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from make_dataset import batch_columns, make_tiny_dataset

from loaders import DBRLoader
from nrrdd_format.errors import FormatError

WHY = "needs the extra 'stores'"
s3fs = pytest.importorskip("s3fs", reason=WHY)
pytest.importorskip("moto", reason=WHY)
SERVE = "from moto.server import ThreadedMotoServer; server = ThreadedMotoServer('127.0.0.1', 0)\n" + (
    "server.start(); print('port', server.get_host_and_port()[1], flush=True); server._thread.join()"
)


@pytest.fixture(scope="module")
def options() -> Iterator[dict[str, Any]]:
    """Arguments of the filesystem: the server's address, and credentials it takes."""
    with subprocess.Popen([sys.executable, "-c", SERVE], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        port = next(line.split()[1] for line in process.stdout if line.startswith("port "))
        yield {"key": "k", "secret": "s", "endpoint_url": f"http://127.0.0.1:{port}"}
        process.kill()


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory, options: dict[str, Any]) -> Path:
    path = make_tiny_dataset(tmp_path_factory.mktemp("s3") / "tiny", epochs=2)
    store = s3fs.S3FileSystem(**options)
    store.mkdir("bucket")
    for file in path.iterdir():
        store.pipe_file(f"bucket/data/{file.name}", file.read_bytes())
    return path


def keys(loader: DBRLoader) -> list[tuple[bytes, ...]]:
    return [tuple(column.numpy().tobytes() for column in batch_columns(batch).values()) for batch in loader]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_bucket_gives_what_the_folder_gives(
    dataset: Path, options: dict[str, Any], tmp_path: Path, num_workers: int
) -> None:
    loader = DBRLoader("s3://bucket/data", 5, cache_dir=tmp_path, storage_options=options, num_workers=num_workers)
    assert keys(loader) == keys(DBRLoader(dataset, 5))


def test_an_altered_shard_is_named(dataset: Path, options: dict[str, Any], tmp_path: Path) -> None:
    store = s3fs.S3FileSystem(**options)
    for file in dataset.iterdir():
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= file.suffix == ".tar"
        store.pipe_file(f"bucket/altered/{file.name}", bytes(data))
    loader = DBRLoader("s3://bucket/altered", 5, cache_dir=tmp_path, storage_options=options, attempts=1)
    with pytest.raises(FormatError, match=r"^s3://bucket/altered/shard-0000\d.tar: .*sha256 is [0-9a-f]+, expected"):
        list(loader)


@pytest.mark.parametrize("folder", ["bucket/nothing", "no-bucket/data"])
def test_what_is_not_there_is_named_at_once(options: dict[str, Any], tmp_path: Path, folder: str) -> None:
    with pytest.raises(FormatError, match=rf"^s3://{folder}/dataset.json: cannot be fetched: there is no such file"):
        DBRLoader(f"s3://{folder}", 5, cache_dir=tmp_path, storage_options=options)


def test_no_server_is_named(tmp_path: Path) -> None:
    options = {"key": "k", "secret": "s", "endpoint_url": "http://127.0.0.1:9", "config_kwargs": {"retries": {}}}
    with pytest.raises(FormatError, match=r"^s3://bucket/data/dataset.json: cannot be fetched: "):
        DBRLoader("s3://bucket/data", 5, cache_dir=tmp_path, storage_options=options, attempts=1)
