"""What a loader holds is bounded by its options, not by the dataset: images, records, open files, resident memory."""

from __future__ import annotations

import multiprocessing
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from make_dataset import make_tiny_dataset

from loaders import DBRLoader, order
from loaders.order import ShardPairs
from loaders.reading import BatchReader
from nrrdd_format.dataset import open_dataset

SHARDS = 32
IMAGES = 1920
IMAGE_BYTES = 3 * 96 * 96  # decoded: 53 MB in all
SPAWN = multiprocessing.get_context("spawn")  # a forked process would begin with what this one has used
on_linux = pytest.mark.skipif(sys.platform != "linux", reason="looks at /proc; resident memory is counted otherwise")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("memory") / "tiny"
    return make_tiny_dataset(
        folder, classes=10, ipc=IMAGES // 10, size=96, epochs=1, shards=SHARDS, cycle=10, codec="jpeg"
    )


@pytest.fixture(autouse=True)
def two_shards_a_window(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(order, "WINDOW_SHARDS", (2, 2))


def peak_growth(path: Path, num_workers: int, cache_bytes: int) -> int:
    """Bytes by which the memory of the process that reads grows in an epoch beyond what ten batches take."""
    queue = SPAWN.SimpleQueue()
    process = SPAWN.Process(target=_read, args=(path, num_workers, cache_bytes, queue))
    process.start()
    process.join()
    assert process.exitcode == 0
    grown: int = queue.get()
    return grown


def _read(path: Path, num_workers: int, cache_bytes: int, queue: Any) -> None:
    order.WINDOW_SHARDS = (2, 2)
    loader = DBRLoader(path, 20, num_workers=num_workers, cache_bytes=cache_bytes)
    used = [_anonymous(workers=num_workers > 0) for _ in loader]
    queue.put(max(used) - max(used[:10]))


def _anonymous(*, workers: bool) -> int:
    """Bytes of memory that this process, or its workers, have filled; the pages of files come and go as Linux likes."""
    pids = Path("/proc/self/task", str(os.getpid()), "children").read_text().split() if workers else ["self"]
    lines = [line for pid in pids for line in Path("/proc", pid, "status").read_text().splitlines()]
    return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


@on_linux
@pytest.mark.parametrize("num_workers", [0, 1])
def test_peak_memory_does_not_grow_with_the_dataset(dataset: Path, num_workers: int) -> None:
    decoded = IMAGES * IMAGE_BYTES
    assert peak_growth(dataset, num_workers, decoded // 20) < decoded * 0.3
    # The measurement sees what it should: without the limit all images are kept.
    assert peak_growth(dataset, num_workers, 2 * decoded) > decoded * 0.7


@pytest.mark.parametrize("cache_bytes", [0, 10 * IMAGE_BYTES + 5])
def test_decoded_images_stay_under_the_limit(dataset: Path, cache_bytes: int) -> None:
    with open_dataset(dataset) as content:
        shards = ShardPairs(pairs_per_shard=(IMAGES // SHARDS,) * SHARDS, cycle=10)
        reader = BatchReader(
            content, None, shards=shards, seed=0, replay_here=True, cache_bytes=cache_bytes, slots=None
        )
        for start in range(0, 400, 40):
            assert not isinstance(reader[0, start, start + 40, None], Exception)
            held = sum(image.nbytes for image in reader._decoded.values())
            assert held <= cache_bytes
        assert held > cache_bytes - IMAGE_BYTES


@on_linux
def test_open_files_are_those_of_two_windows(dataset: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    loader = DBRLoader(dataset, 20)
    counts = [len(os.listdir("/proc/self/fd")) - before for _ in loader]
    assert max(counts) <= 4 + 1  # the folder that is being listed
    assert min(counts) >= 1
