"""Builds that are killed, interrupted, short of disk, or share their work among more ranks: the bytes stay the same."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from compiler import needs_compiler

from benchmarks.build_kills import Bench, kill_builds, make_bench, report
from benchmarks.build_ranks import BuildRanks
from builders.cli import main
from builders.workdir import LOCK, Stage, claimed, uninterrupted
from nrrdd_format.errors import OutputError
from nrrdd_format.verify import verify_dataset

TIMEOUT = 240.0
PR_CAPBSET_DROP, CAP_DAC_OVERRIDE = 24, 1


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return make_bench(tmp_path_factory.mktemp("bench"))


def _equal(bench: Bench, name: str) -> bool:
    return list(bench.faults(name)) == []


# ---- ranks and kills


@pytest.mark.parametrize("ranks", [3, 5])
def test_any_number_of_ranks_gives_the_same_bytes(bench: Bench, ranks: int, tmp_path: Path) -> None:
    running = BuildRanks(bench.arguments(f"ranks-{ranks}"), ranks, tmp_path)
    assert running.wait(TIMEOUT) == [0] * ranks, running.messages()
    assert _equal(bench, f"ranks-{ranks}")


def test_killed_at_random_moments_and_resumed_with_other_ranks(bench: Bench) -> None:
    tally = kill_builds(bench, 5, seed=1, ranks=(1, 2, 3))
    assert tally.failures == []
    assert sum(tally.kills.values()) == 5 and tally.datasets >= 1


def test_a_rank_that_loses_another_ends_with_a_message_and_the_next_run_goes_on(bench: Bench, tmp_path: Path) -> None:
    work = bench.folder / "bereft.work"
    running = BuildRanks(bench.arguments("bereft"), 2, tmp_path)
    while not list(work.glob("scan-*/class-*")):
        time.sleep(0.002)
    running.processes[1].kill()
    statuses = running.wait(TIMEOUT)
    assert statuses == [2, -signal.SIGKILL]
    (line,) = [line for line in running.messages()[0].splitlines() if line.startswith("error: ")]
    assert "rank 0 of 2: another process of this build has ended" in line and "the same command goes on" in line
    assert "Traceback" not in running.messages()[0]
    finishing = BuildRanks(bench.arguments("bereft"), 1, tmp_path)
    assert finishing.wait(TIMEOUT) == [0]
    assert _equal(bench, "bereft")


@needs_compiler
def test_killed_while_it_compiles(bench: Bench, tmp_path: Path) -> None:
    """What the compiler had half written is of no concern to the next run, nor to other programs of the user."""
    command = [sys.executable, "-m", "builders", *bench.arguments("compiled"), "--compile"]
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    killed = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    while not list(tmp_path.glob("*/torchinductor_*/**/*.*")):
        assert killed.poll() is None
        time.sleep(0.01)
    killed.kill()
    killed.wait()
    (left,) = tmp_path.iterdir()
    for path in left.rglob("*.*"):
        if path.is_file():
            os.truncate(path, path.stat().st_size // 2)
    subprocess.run(command, env=environment, check=True, timeout=TIMEOUT)
    assert verify_dataset(bench.folder / "compiled") == []
    assert list(tmp_path.iterdir()) == [left]


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_second_build_in_the_same_work_folder_is_refused(
    bench: Bench, tmp_path: Path, capsys: pytest.CaptureFixture[str], ranks: int
) -> None:
    """Until the first has ended, however it ends; one of other settings alike."""
    name = f"twice-{ranks}"
    work = bench.folder / f"{name}.work"
    running = BuildRanks(bench.arguments(name), ranks, tmp_path)
    while not list(work.glob("scan-*/class-*")):
        time.sleep(0.002)
    for process in running.processes:
        assert process.pid is not None
        os.kill(process.pid, signal.SIGSTOP)
    before = _units(work)
    for more in ([], ["--epochs", "5", "--out", f"{bench.folder}/{name}-other", "--work-dir", str(work)]):
        assert main([*bench.arguments(name), *more]) == 2
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert line.startswith(f"error: {work}: another process is building there") and "--work-dir" in line
    assert _units(work) == before
    for process in running.processes:
        process.kill()
    running.wait(TIMEOUT)
    assert main(bench.arguments(name)) == 0
    assert _equal(bench, name)


def test_processes_that_cannot_find_each_other_say_so_in_one_line(bench: Bench) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "builders", *bench.arguments("alone")],
        env={**os.environ, "RANK": "1", "WORLD_SIZE": "2"},  # and no MASTER_ADDR
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        check=False,
    )
    assert result.returncode == 2
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith("error: rank 1 of 2: ") and "torchrun" in line


# ---- Ctrl-C


def test_ctrl_c_ends_with_the_way_to_go_on(bench: Bench, tmp_path: Path) -> None:
    work = bench.folder / "stopped.work"
    running = BuildRanks(bench.arguments("stopped"), 1, tmp_path)
    while not list(work.glob("refinement-*/batch-*")):
        time.sleep(0.002)
    pid = running.processes[0].pid
    assert pid is not None
    os.kill(pid, signal.SIGINT)
    assert running.wait(TIMEOUT) == [130]
    last = running.messages()[0].splitlines()[-1]
    assert last == "interrupted: finished work is kept; the same command goes on from there"
    assert not [path for path in work.rglob(".*") if path.is_file()]
    assert main(bench.arguments("stopped")) == 0
    assert _equal(bench, "stopped")


def test_ctrl_c_lets_the_write_in_hand_finish(tmp_path: Path) -> None:
    reached = []
    with pytest.raises(KeyboardInterrupt), uninterrupted():
        signal.raise_signal(signal.SIGINT)
        reached.append("the end of the write")
    assert reached
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def test_an_ignored_ctrl_c_stays_ignored() -> None:
    usual = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with uninterrupted():
            signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, usual)


# ---- the disk


@contextmanager
def _largest_file(size: int) -> Iterator[None]:
    """No file may become larger: the nearest to a full disk that needs no disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_is_one_line_in_every_stage_and_keeps_earlier_work(
    bench: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same build with ever more room: each run keeps what the one before has written."""
    work = bench.folder / "full.work"
    before: dict[Path, int] = {}
    stages = set()
    for size in (60, 1000, 5000, 8000, 20_000, 40_000, 60_000, 100_000):
        with _largest_file(size):
            status = main(bench.arguments("full"))
        text = capsys.readouterr().err
        if status == 0:
            break
        (line,) = [line for line in text.splitlines() if line.startswith("error: ")]
        assert status == 2 and "cannot write (File too large)" in line and "make room" in line
        stages.add(line.split("full.work/")[-1].split("-")[0] if "full.work/" in line else "dataset")
        after = _units(work)
        assert before.items() <= after.items()
        assert not [path for path in after if path.name.startswith(".")]
        before = after
    else:
        assert main(bench.arguments("full")) == 0
    assert {"scan", "discovery", "refinement", "dataset"} <= stages
    assert _equal(bench, "full")


def test_a_file_system_without_locks_is_said_and_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(descriptor: int, kind: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "lockf", refuse)
    said: list[str] = []
    with claimed(tmp_path / "work", said.append):
        (line,) = said
    assert line.startswith(f"{tmp_path}/work: has no locks (No locks available)")


def test_a_lock_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "work" / LOCK).mkdir(parents=True)
    with (
        pytest.raises(OutputError, match=r"lock: cannot open \(Is a directory\).*--work-dir"),
        claimed(tmp_path / "work", print),
    ):
        pass


def test_arrays_say_why_they_cannot_be_written(tmp_path: Path) -> None:
    """NumPy's own writing would say how many items it wrote, not that the disk is full."""
    stage = Stage(tmp_path, "refinement", {}, "")
    stage.make()
    with _largest_file(1000), pytest.raises(OutputError, match="File too large"):
        stage.save_array("batch.npy", np.zeros(10_000, np.uint8))
    stage.save_array("batch.npy", np.arange(6, dtype=np.uint8).reshape(2, 3).T)
    np.testing.assert_array_equal(stage.load_array("batch.npy"), np.arange(6).reshape(2, 3).T)


def _units(work: Path) -> dict[Path, int]:
    """Files and when they were written, but for a batch's losses and what pictures show: these come anew each time."""
    files = [path for path in work.glob("*/*") if not path.name.startswith(("losses", "shown"))]
    return {path: path.stat().st_mtime_ns for path in files}


def _without_roots_powers() -> None:
    """A child process of root may then write only where the permissions say so; others cannot do more anyway."""
    ctypes.CDLL(None).prctl(PR_CAPBSET_DROP, CAP_DAC_OVERRIDE, 0, 0, 0)


def test_a_read_only_output_is_refused_before_any_work(bench: Bench, tmp_path: Path) -> None:
    """Though the work folder, elsewhere, could be written for hours before the dataset's own is needed."""
    parent = tmp_path / "read-only"
    parent.mkdir(mode=0o555)
    options = [*bench.arguments("x"), "--out", str(parent / "out"), "--work-dir", str(tmp_path / "work")]
    result = subprocess.run(
        [sys.executable, "-m", "builders", *options],
        preexec_fn=_without_roots_powers,
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        check=False,
    )
    assert result.returncode == 2, result.stderr
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith(f"error: {parent}") and "--out" in line
    assert not list(tmp_path.rglob("*.npy"))


def test_output_of_another_configuration_in_the_way_keeps_both(
    bench: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    """Found before any work; the finished dataset and the work folder stay as they were, and both can go on."""
    shutil.copytree(bench.folder / "reference", bench.folder / "taken")
    shutil.copytree(bench.folder / "reference.work", bench.folder / "taken.work")
    before = {path: path.stat().st_mtime_ns for path in (bench.folder / "taken.work").glob("*/*")}
    assert main([*bench.arguments("taken"), "--epochs", "5"]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert "something else is there already" in line and "--out" in line
    assert _equal(bench, "taken")
    assert before == {path: path.stat().st_mtime_ns for path in (bench.folder / "taken.work").glob("*/*")}
    assert main(bench.arguments("taken")) == 0


# ---- the command


def test_the_command_reports_and_writes_results(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert report(1, 0, ranks=(1,), out=tmp_path) == 0
    (record,) = [json.loads(path.read_text()) for path in tmp_path.glob("*-build-kills.json")]
    assert record["failures"] == [] and record["kills"] == 1
    (text,) = [path.read_text() for path in tmp_path.glob("*-build-kills.md")]
    assert "1 kills" in text and "1 kills" in capsys.readouterr().out


def test_a_dataset_that_differs_is_a_failure(bench: Bench) -> None:
    shutil.copytree(bench.folder / "reference", bench.folder / "spoiled")
    (bench.folder / "spoiled" / "README.md").write_text("another")
    (bench.folder / "spoiled" / "shard-00000.tar").unlink()
    assert [fault.split()[1] for fault in bench.faults("spoiled")] == ["README.md", "shard-00000.tar"]
