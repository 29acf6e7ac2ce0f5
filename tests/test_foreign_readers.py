"""Stock readers of tar shards yield every image once, and nothing of ours."""

from __future__ import annotations

import subprocess
import tarfile
from pathlib import Path

import pytest
from tiny_dataset import tiny_images, write_tiny

EXPECTED = {f"{i.index:07d}_c{i.label:05d}": i.data for i in tiny_images(0, 14)}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two shards of 7 images each."""
    folder = write_tiny(tmp_path_factory.mktemp("foreign") / "tiny")
    return sorted(map(str, folder.glob("*.tar")))


def test_webdataset(shards: list[str]) -> None:
    import webdataset

    samples = list(webdataset.WebDataset(shards, shardshuffle=False, empty_check=False))
    assert {s["__key__"]: s["png"] for s in samples} == EXPECTED
    assert len(samples) == len(EXPECTED)
    assert all({k for k in s if not k.startswith("__")} == {"png"} for s in samples)


def test_huggingface_datasets(shards: list[str], tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    loaded = datasets.load_dataset(
        "webdataset", data_files={"train": shards}, split="train", cache_dir=str(tmp_path), streaming=False
    )
    rows = loaded.cast_column("png", datasets.Image(decode=False))
    assert {row["__key__"]: row["png"]["bytes"] for row in rows} == EXPECTED
    assert len(rows) == len(EXPECTED)
    assert set(loaded.column_names) == {"__key__", "__url__", "png"}


def test_tarfile_and_gnu_tar(shards: list[str], tmp_path: Path) -> None:
    with tarfile.open(shards[0]) as archive:
        assert len(archive.getmembers()) == 9
    done = subprocess.run(["tar", "-xf", shards[0], "-C", str(tmp_path)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "0000003_c00000.png").read_bytes() == EXPECTED["0000003_c00000"]
