"""Times loaders, each run in a process of its own."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.loader_peers import Epoch, Setting

MEGABYTE = 1e6
PRELOADED = ["benchmarks.loader_timing", "matplotlib.figure"]
"""What every measuring process needs; importing it takes longer than measuring."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """A loader on one set of images.

    Attributes:
        open: makes it ready; called in the process that measures.
        warm_up: epochs that are not timed.
        decodes: how often an image is decoded for each pair.
    """

    name: str
    open: Callable[[Setting], Epoch]
    setting: Setting
    warm_up: int = 1
    decodes: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One run of a case."""

    pairs_per_second: float
    peak_rss_mb: float | None


def measure_all(cases: Sequence[Case], repeats: int, seconds: float) -> list[list[Measurement]]:
    """The measurements of each case; every repeat goes through all cases."""
    rounds = [[_in_fresh_process(case, seconds) for case in cases] for _ in range(repeats)]
    return [list(measurements) for measurements in zip(*rounds, strict=True)]


def measure(case: Case, seconds: float) -> Measurement:
    """Opens a loader, warms it up and times whole epochs."""
    epoch = case.open(case.setting)
    for number in range(case.warm_up):
        sum(epoch(number))
    number, pairs, elapsed = case.warm_up, 0, 0.0
    started = time.perf_counter()
    while not pairs or elapsed < seconds:
        pairs += sum(epoch(number))
        number += 1
        if case.setting.device == "cuda":
            torch.cuda.synchronize()
        elapsed = time.perf_counter() - started
    return Measurement(pairs_per_second=pairs / elapsed, peak_rss_mb=peak_memory())


def peak_memory() -> float | None:
    """Sum of the most that this process and each of its children held, in 10^6 bytes; Linux alone tells."""
    processes = ["self", *(str(child.pid) for child in multiprocessing.active_children())]
    try:
        status = [Path("/proc", process, "status").read_text() for process in processes]
    except OSError:
        return None
    peaks = [int(line.split()[1]) for text in status for line in text.splitlines() if line.startswith("VmHWM:")]
    return 1024 * sum(peaks) / MEGABYTE


def _in_fresh_process(case: Case, seconds: float) -> Measurement:
    """Measures in a process of its own, so that no loader inherits another's memory or threads.

    It is forked from one that has done nothing but import. A loader starts its workers in the system's usual way.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    usual = multiprocessing.get_start_method()
    with ProcessPoolExecutor(1, mp_context=context, initializer=_start_processes_by, initargs=(usual,)) as pool:
        return pool.submit(measure, case, seconds).result()


def _start_processes_by(method: str) -> None:
    multiprocessing.set_start_method(method, force=True)
