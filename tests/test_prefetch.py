"""Reading ahead: order, bounds and errors, in threads and in processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from builders.images import UnusableImage
from builders.prefetch import AHEAD, CHUNK, WORTH, in_processes, in_threads, reading_processes
from nrrdd_format.errors import DataError


def test_threads_keep_the_order_and_their_bound() -> None:
    started: list[int] = []

    def ask(item: int) -> int:
        started.append(item)
        return item * item

    results = in_threads(ask, range(1000), 3)
    for item in range(50):
        assert next(results) == item * item
        assert len(started) <= item + 3 * AHEAD
    results.close()
    assert len(started) < 1000


def test_an_error_of_a_thread_comes_where_its_result_would_have_come() -> None:
    results = in_threads(lambda item: 1 // (3 - item), range(6), 2)
    assert [next(results) for _ in range(3)] == [0, 0, 1]
    with pytest.raises(ZeroDivisionError):
        next(results)


def _square(noted: Path | None, item: int) -> int:
    if noted is not None:
        (noted / f"{item}-{os.getpid()}").touch()
    return item * item


@pytest.mark.parametrize("processes", [1, 2])
def test_processes_keep_the_order_and_their_bound(tmp_path: Path, processes: int) -> None:
    results = in_processes(partial(_square, tmp_path), range(2000), processes)
    assert [next(results) for _ in range(50)] == [item * item for item in range(50)]
    results.close()
    started = [name.split("-") for name in os.listdir(tmp_path)]
    assert len(started) <= (50 if processes == 1 else 64 + 2 * 2 * CHUNK)
    assert (str(os.getpid()) in {process for _, process in started}) == (processes == 1)


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("count", [0, 1, CHUNK - 1, CHUNK, 3 * CHUNK + 1])
def test_every_item_has_its_result(processes: int, count: int) -> None:
    assert list(in_processes(partial(_square, None), np.arange(count), processes)) == [k * k for k in range(count)]


def _fails_at_20(item: int) -> int:
    if item == 20:
        raise UnusableImage("is empty (0 bytes)", "ant/20.png")
    return item


@pytest.mark.parametrize("processes", [1, 2])
def test_an_error_of_a_process_comes_where_its_result_would_have_come(processes: int) -> None:
    results = in_processes(_fails_at_20, range(100), processes)
    assert [next(results) for _ in range(20)] == list(range(20))
    with pytest.raises(UnusableImage, match=r"^ant/20\.png: is empty") as caught:
        next(results)
    assert caught.value.path == "ant/20.png"


def _dies_at_40(item: int) -> int:
    if item == 40:
        os.kill(os.getpid(), signal.SIGKILL)
    return item


def test_a_process_that_dies_is_named_and_not_waited_for() -> None:
    with pytest.raises(DataError, match=r"a process that reads images has died.*--threads"):
        list(in_processes(_dies_at_40, range(200), 2))


def test_a_few_images_are_read_in_this_process() -> None:
    assert reading_processes(8, WORTH - 1) == 1
    assert reading_processes(8, WORTH) == 8
    assert reading_processes(1, 10**6) == 1


def _large(noted: Path, item: int) -> bytes:
    (noted / str(os.getpid())).touch()
    return bytes(1 << 20)


_READ_AND_BE_KILLED = """
import os, signal, sys
from functools import partial
from pathlib import Path
sys.path.insert(0, str(Path(sys.argv[1])))
from builders.prefetch import in_processes
from test_prefetch import _large
results = in_processes(partial(_large, Path(sys.argv[2])), range(500), 2)
for _ in range(40):
    next(results)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_no_process_outlives_a_killed_build(tmp_path: Path) -> None:
    """With results in the pipes that nobody takes any more."""
    here = Path(__file__).parent
    killed = subprocess.run([sys.executable, "-c", _READ_AND_BE_KILLED, str(here), str(tmp_path)], check=False)
    assert killed.returncode == -signal.SIGKILL
    left = {int(process) for process in os.listdir(tmp_path)}
    assert len(left) == 2
    for _ in range(200):
        left = {process for process in left if Path(f"/proc/{process}").exists()}
        if not left:
            return
        time.sleep(0.1)
    pytest.fail(f"processes {left} still read")
