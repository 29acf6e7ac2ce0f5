"""Reading ahead: order, bounds and errors, in threads and in processes."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from builders.cores import usable_cores
from builders.images import UnusableImage
from builders.prefetch import AHEAD, CHUNK, WORTH, in_processes, in_threads, named_deaths, reading_processes
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


def test_an_error_that_is_kept_keeps_no_process() -> None:
    """A notebook keeps the last error's traceback, and that every local variable on its way."""
    before = set(multiprocessing.active_children())
    with pytest.raises(UnusableImage) as caught:
        list(in_processes(_fails_at_20, range(2000), 2))
    assert caught.value.__traceback__ is not None
    assert set(multiprocessing.active_children()) <= before


def _dies_at_40(item: int) -> int:
    if item == 40:
        os.kill(os.getpid(), signal.SIGKILL)
    return item


def test_a_process_that_dies_is_named_and_not_waited_for() -> None:
    with pytest.raises(DataError, match=r"a process that reads images has died.*--threads"):
        list(in_processes(_dies_at_40, range(200), 2))


def test_a_few_images_are_read_in_this_process() -> None:
    assert reading_processes(8, WORTH - 1) == 1
    assert reading_processes(8, WORTH) == min(8, usable_cores())
    assert reading_processes(1, 10**6) == 1


def _large(noted: Path, item: int) -> bytes:
    (noted / str(os.getpid())).touch()
    return bytes(1 << 20)


def _dies_later(item: int) -> int:
    if item == 40:
        time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGKILL)
    return item


def test_a_process_that_dies_while_the_caller_works_is_named() -> None:
    """torch tells of it wherever the caller is at that moment."""
    with pytest.raises(DataError, match="a process that reads images has died"), named_deaths():
        for _ in in_processes(_dies_later, range(64), 2):
            time.sleep(0.1)


def test_other_errors_are_no_deaths() -> None:
    with pytest.raises(RuntimeError, match="out of memory"), named_deaths():
        raise RuntimeError("out of memory")


_READ_AND_BE_KILLED = """
import multiprocessing, os, signal, sys
from functools import partial
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from builders.prefetch import in_processes
from test_prefetch import _large
if __name__ == "__main__":
    multiprocessing.set_start_method(sys.argv[3])
    results = in_processes(partial(_large, Path(sys.argv[2])), range(500), 2)
    for _ in range(40):
        next(results)
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize(
    "method",
    ["fork", pytest.param("forkserver", marks=pytest.mark.slow), pytest.param("spawn", marks=pytest.mark.slow)],
)
def test_no_process_outlives_a_killed_build(tmp_path: Path, method: str) -> None:
    """With results in the pipes that nobody takes any more."""
    script, noted = tmp_path / "read.py", tmp_path / "noted"
    script.write_text(_READ_AND_BE_KILLED)
    noted.mkdir()
    command = [sys.executable, str(script), str(Path(__file__).parent), str(noted), method]
    killed = subprocess.run(command, check=False, cwd=Path(__file__).parent.parent)
    assert killed.returncode == -signal.SIGKILL
    left = {int(process) for process in os.listdir(noted)}
    assert len(left) == 2
    for _ in range(200):
        left = {process for process in left if _lives(process)}
        if not left:
            return
        time.sleep(0.1)
    pytest.fail(f"processes {left} still read")


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    status = Path(f"/proc/{process}/stat")
    return not status.exists() or status.read_text().rpartition(")")[2].split()[0] != "Z"


def test_an_interrupt_while_processes_start_is_not_lost() -> None:
    """Python drops what is raised in its callbacks around a fork, where a signal that came meanwhile is handled."""
    code = """
import multiprocessing, os, signal
from builders.prefetch import in_processes
multiprocessing.set_start_method("fork")
os.register_at_fork(after_in_parent=lambda: signal.raise_signal(signal.SIGINT))
if __name__ == "__main__":
    try:
        print(len(list(in_processes(abs, range(100), 2))))
    except KeyboardInterrupt:
        print("interrupted")
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240, check=False)
    assert (result.stdout.strip(), result.stderr) == ("interrupted", "")


class _Interrupts:
    """A function during whose pickling Ctrl-C comes."""

    def __call__(self, item: int) -> int:
        return item

    def __reduce__(self) -> tuple[type[_Interrupts], tuple[()]]:
        print("pickled", flush=True)
        signal.raise_signal(signal.SIGINT)
        return type(self), ()


def test_an_interrupt_waits_for_no_process_that_it_may_have_ended() -> None:
    """A terminal's Ctrl-C ends one that is starting and not forked; sending it its work then fails, or never ends."""
    code = f"""
import multiprocessing, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from builders.prefetch import in_processes
from test_prefetch import _Interrupts
if __name__ == "__main__":
    multiprocessing.set_start_method("spawn")
    try:
        list(in_processes(_Interrupts(), range(100), 2))
    except KeyboardInterrupt:
        print("interrupted")
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240, check=False)
    assert result.stdout.split() == ["pickled", "interrupted"]
