"""Runs one build through its command line and measures each of its stages from outside: time, memory, disk.

A stage ends when its last unit appears in the work folder; between two such moments all time and memory is the later
stage's.
"""

from __future__ import annotations

import bisect
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nrrdd_format.errors import NrrddError

STAGES = ("scan", "discovery", "refinement", "encoding", "relabeling", "writing")
START = "start"
"""Everything before the first unit: imports, listing the images, loading and testing the teacher."""
SAMPLE_SECONDS = 0.2


@dataclass(frozen=True, kw_only=True)
class StageCost:
    """What one stage took.

    Attributes:
        seconds: wall time.
        processor_seconds: time of all cores that the build's processes had, sampled.
        peak_rss: the most that the build's processes held at once, in bytes, pages they share counted in each; sampled.
        disk: bytes of its folder when the build was done (for `writing`: those of the dataset as well).
        units: files it left.
    """

    stage: str
    seconds: float
    processor_seconds: float
    peak_rss: int
    disk: int
    units: int


@dataclass(frozen=True, kw_only=True)
class Sample:
    """What the build's processes had taken at one moment: bytes of memory, and seconds of the cores so far."""

    moment: float
    rss: int
    processor: float


def watch_build(arguments: Sequence[str], out: Path, work: Path, *, launcher: Sequence[str] = ()) -> list[StageCost]:
    """Runs `python <launcher> -m builders <arguments>` in a fresh work folder and returns every stage's cost.

    Args:
        arguments: options of `build-distilled`, `--out` and `--work-dir` among them.
        out, work: the folders that these options name; neither may exist.
        launcher: options of the interpreter that come first, such as torchrun's module and its own options.

    Raises:
        NrrddError: a folder is there already, or the build fails; its own words are on standard error.
    """
    for folder in (out, work):
        if folder.exists():
            raise NrrddError(f"{folder}: exists already, but a whole build is to be measured; move it away")
    started = time.time()  # the clock that dates files
    samples = [Sample(moment=started, rss=0, processor=0.0)]
    with subprocess.Popen([sys.executable, *launcher, "-m", "builders", *arguments]) as process:
        while process.poll() is None:
            samples.append(take_sample(process.pid))
            time.sleep(SAMPLE_SECONDS)
    if process.returncode:
        raise NrrddError(f"the build ended with status {process.returncode}; its message stands above")
    return _costs(samples, started, time.time(), out, work)


def take_sample(pid: int) -> Sample:
    """Memory and processor time of a process and all below it; zeros where the system does not tell (Linux does)."""
    rss, processor, waiting = 0, 0.0, [pid]
    while waiting:
        process = Path("/proc", str(waiting.pop()))
        try:
            rss += _resident(process)
            processor += _processor_seconds(process)
            waiting += [int(child) for task in process.glob("task/*/children") for child in task.read_text().split()]
        except (OSError, ValueError):  # it has just ended
            continue
    return Sample(moment=time.time(), rss=rss, processor=processor)


def _resident(process: Path) -> int:
    lines = (process / "status").read_text().splitlines()
    return sum(1024 * int(line.split()[1]) for line in lines if line.startswith("VmRSS:"))


def _processor_seconds(process: Path) -> float:
    """User and system time, with that of children that have ended."""
    fields = (process / "stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")


def _costs(samples: Sequence[Sample], started: float, ended: float, out: Path, work: Path) -> list[StageCost]:
    files = {stage: _files(work, stage) for stage in STAGES}
    moments = [started, min(path.stat().st_mtime for path in files["scan"])]
    moments += [max(path.stat().st_mtime for path in files[stage]) for stage in STAGES[:-1]] + [ended]
    files["writing"] += [path for path in out.rglob("*") if path.is_file()]
    return [
        _cost(stage, samples, first, last, files.get(stage, []))
        for stage, first, last in zip((START, *STAGES), moments, moments[1:], strict=False)
    ]


def _cost(stage: str, samples: Sequence[Sample], first: float, last: float, files: Sequence[Path]) -> StageCost:
    times = [sample.moment for sample in samples]
    since = bisect.bisect_right(times, first) - 1  # the sample before serves a stage shorter than the interval
    until = max(since, bisect.bisect_right(times, last) - 1)
    return StageCost(
        stage=stage,
        seconds=last - first,
        processor_seconds=samples[until].processor - samples[since].processor,
        peak_rss=max(sample.rss for sample in samples[since : until + 1]),
        disk=sum(path.stat().st_size for path in files),
        units=len(files),
    )


def _files(work: Path, stage: str) -> list[Path]:
    return [path for path in work.glob(f"{stage}-*/*") if path.is_file()]
