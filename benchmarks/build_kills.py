"""Builds that are killed at random moments and resumed with another number of ranks give the same bytes.

`python -m benchmarks.build_kills --kills 100` builds a small dataset without interruption; again under torchrun with
every number of ranks asked for; and then again and again, each time with SIGKILL to one rank or to all of them at a
moment drawn from the seed, going on with another drawn number of ranks, until the dataset is whole. Every dataset must
equal the first byte by byte, a run that lost a rank must end by itself, and what stands under the final name must be
whole at every moment. Exit status: 0 without failures, 1 with.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.build_ranks import BuildRanks
from benchmarks.command import Several, run, whole
from benchmarks.results_io import markdown_table, provenance, write_report
from builders.models import create_model
from builders.progress import Progress
from builders.teacher import save_checkpoint
from nrrdd_format import draws
from nrrdd_format.errors import NrrddError
from nrrdd_format.verify import verify_dataset

MODULE = "benchmarks.build_kills"
NETWORK = "conv2-w8"
STAGES = ("scan", "discovery", "refinement", "encoding", "relabeling", "writing")
START = "start"
POLL_SECONDS = 0.002
LONGEST_DELAY = 0.05
"""Seconds between the file that a kill waits for and the kill, at most: about what the smallest units take."""
HANG_SECONDS = 120.0
MOST_KILLS_IN_A_ROW = 8
"""Kills of one dataset, about, until it is done."""

NOTES = """\
A kill waits until a drawn number of files has appeared, then for a drawn fraction of a second, and hits one drawn rank
or all. *stage*: the first stage that was not complete at that moment. *ended alone*: the other ranks of a run that
lost one, which must end with a message within two minutes, with no launcher to end them.
"""


@dataclass(kw_only=True)
class Tally:
    """What came of all kills.

    Attributes:
        kills: by stage and number of ranks.
        survivors: ranks that were left alone by a killed one, and ended by themselves.
        datasets: how many were finished and equal to the uninterrupted one.
        failures: one line each.
    """

    kills: Counter[tuple[str, int]] = field(default_factory=Counter)
    survivors: int = 0
    datasets: int = 0
    failures: list[str] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Bench:
    """A folder with a teacher and the uninterrupted dataset.

    Attributes:
        reference: the dataset's files.
        units: files that every stage leaves in the work folder.
    """

    folder: Path
    reference: dict[str, bytes]
    units: dict[str, int]

    def arguments(self, name: str) -> list[str]:
        """The options of a build into the folder `name`."""
        return _arguments(self.folder, name)

    def faults(self, name: str) -> Iterator[str]:
        """How the finished dataset differs from the uninterrupted one."""
        found = _content(self.folder / name)
        for file in sorted(found.keys() | self.reference.keys()):
            if found.get(file) != self.reference.get(file):
                yield f"{name}: {file} differs from the uninterrupted build's"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    options = make_parser().parse_args(arguments)
    return run(lambda: report(options.kills, options.seed, ranks=options.ranks, out=options.out))


def make_parser() -> argparse.ArgumentParser:
    """The command's parser."""
    parser = argparse.ArgumentParser(
        prog=f"python -m {MODULE}", description="Kill builds at random moments, and compare what they end with."
    )
    parser.add_argument("--kills", type=whole(1), default=100, metavar="N", help="builds to kill (100)")
    parser.add_argument("--seed", type=whole(0), default=0, metavar="N", help="of every random draw (0)")
    parser.add_argument(
        "--ranks", type=whole(1), action=Several, default=[1, 2, 3, 5], metavar="R", help="ranks (1 2 3 5)"
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="write <date>-build-kills.{json,md} into this folder")
    return parser


def report(kills: int, seed: int, *, ranks: Sequence[int], out: Path | None) -> int:
    """Runs all builds, prints the tables and writes what was asked for; returns the exit status."""
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="nrrdd-kills-") as folder:
        bench = make_bench(Path(folder))
        unequal = [fault for count in ranks for fault in build_under_torchrun(bench, count)]
        tally = kill_builds(bench, kills, seed, ranks)
    failures = unequal + tally.failures
    text = f"{summary(tally, ranks, unequal, time.perf_counter() - started)}\n\n{table(tally, ranks)}\n"
    print(f"{text}\n{_listed(failures)}{NOTES}")
    if out is not None:
        write_report(
            out,
            "build-kills",
            provenance(MODULE, seeds=[seed]),
            as_json(tally, ranks, failures),
            title="Killed and resumed builds",
            text=f"{text}\n{_listed(failures)}{NOTES}",
        )
    return 1 if failures else 0


# ---- builds


def make_bench(folder: Path) -> Bench:
    """Makes the teacher and builds once, uninterrupted.

    Raises:
        NrrddError: that build fails.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        digits = [str(digit) for digit in range(10)]
        save_checkpoint(folder / "teacher.pt", create_model(NETWORK, len(digits), 32), NETWORK, digits)
    running = BuildRanks(_arguments(folder, "reference"), 1, folder / "logs")
    if running.wait(HANG_SECONDS) != [0]:
        raise NrrddError(f"the uninterrupted build failed: {running.messages()[0][-500:]}")
    if problems := verify_dataset(folder / "reference"):
        raise NrrddError(f"the uninterrupted dataset is not sound: {problems[0]}")
    units = {stage: sum(1 for _ in (folder / "reference.work").glob(f"{stage}-*/[!.]*")) for stage in STAGES}
    return Bench(folder=folder, reference=_content(folder / "reference"), units=units)


def build_under_torchrun(bench: Bench, ranks: int) -> list[str]:
    """Builds with so many ranks through the command line; returns how the dataset differs."""
    name = f"ranks-{ranks}"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    result = subprocess.run(
        [*torchrun, "-m", "builders", *bench.arguments(name)], capture_output=True, text=True, check=False
    )
    if result.returncode:
        return [f"{name}: ended with status {result.returncode}: {result.stderr[-500:]!r}"]
    faults = list(bench.faults(name))
    _remove(bench, name)
    return faults


def kill_builds(bench: Bench, kills: int, seed: int, ranks: Sequence[int]) -> Tally:
    """Kills builds until `kills` kills have hit, finishing each dataset in between."""
    tally = Tally()
    with Progress(kills, "kills", "kill") as progress:
        attempt = 0
        while sum(tally.kills.values()) < kills and not tally.failures:
            before = sum(tally.kills.values())
            kill_and_resume(bench, tally, seed, attempt, ranks)
            progress.advance(sum(tally.kills.values()) - before)
            attempt += 1
        _finish(bench, tally, ranks[0])
    return tally


def kill_and_resume(bench: Bench, tally: Tally, seed: int, attempt: int, ranks: Sequence[int]) -> None:
    """Goes on with the current dataset and kills it; a dataset that is done before the kill is compared and removed."""
    which, later, delay, victim = draws.uniform(seed, "build-kills", attempt, count=4)
    world_size = ranks[int(which * len(ranks))]
    name = _name(tally)
    files = _files(bench, name) + 1 + int(later * 2 * sum(bench.units.values()) / MOST_KILLS_IN_A_ROW)
    running = BuildRanks(bench.arguments(name), world_size, bench.folder / "logs")
    while running.running() and _files(bench, name) < files:
        time.sleep(POLL_SECONDS)
    time.sleep(delay * LONGEST_DELAY)
    stage = _stage(bench, name)
    chosen = int(victim * (world_size + 1))  # the last: all of them
    victims = running.processes if chosen == world_size else [running.processes[chosen]]
    hit = [process for process in victims if process.is_alive()]
    for process in hit:
        process.kill()
    tally.failures += _faults_after(bench, tally, name, running, world_size - len(victims))
    if hit and stage != "done":
        tally.kills[stage, world_size] += 1
    if not hit and (bench.folder / name).is_dir():
        _finish(bench, tally, world_size)


def _faults_after(bench: Bench, tally: Tally, name: str, running: BuildRanks, others: int) -> Iterator[str]:
    """What a killed run did wrong: hung, ended without words, or left half a dataset."""
    statuses = running.wait(HANG_SECONDS)
    if statuses is None:
        yield f"{name}: a rank was still running {HANG_SECONDS:.0f} s after another was killed"
        return
    for rank, (status, text) in enumerate(zip(statuses, running.messages(), strict=True)):
        if status > 0:
            tally.survivors += 1
        if status > 0 and ("another process of this build has ended" not in text or "Traceback" in text):
            yield f"{name}: rank {rank} ended with status {status} and said {text[-300:]!r}"
    if (bench.folder / name).exists() and (problems := verify_dataset(bench.folder / name)):
        yield f"{name}: half a dataset has the final name: {problems[0]}"


def _finish(bench: Bench, tally: Tally, ranks: int) -> None:
    """Lets the current dataset be finished, compares it and clears it away."""
    name = _name(tally)
    running = BuildRanks(bench.arguments(name), ranks, bench.folder / "logs")
    statuses = running.wait(HANG_SECONDS)
    if statuses != [0] * ranks:
        tally.failures.append(f"{name}: resumed, it ended with status {statuses}: {running.messages()!r}")
        return
    faults = list(bench.faults(name))
    tally.failures += faults
    if not faults:
        tally.datasets += 1
        _remove(bench, name)


def _name(tally: Tally) -> str:
    return f"dataset-{tally.datasets}"


def _files(bench: Bench, name: str) -> int:
    """Finished files of the stages so far."""
    return sum(1 for _ in (bench.folder / f"{name}.work").glob("*/[!.]*"))


def _stage(bench: Bench, name: str) -> str:
    """The first stage that is not complete."""
    work = bench.folder / f"{name}.work"
    found = {stage: sum(1 for _ in work.glob(f"{stage}-*/[!.]*")) for stage in STAGES}
    if not any(found.values()):
        return START
    return next((stage for stage in STAGES if found[stage] < bench.units[stage]), "done")


def _remove(bench: Bench, name: str) -> None:
    for folder in (bench.folder / name, bench.folder / f"{name}.work"):
        shutil.rmtree(folder)


def _arguments(folder: Path, name: str) -> list[str]:
    return (
        f"--dataset digits --ipc 2 --iterations 3 --batch-size 5 --epochs 4 --shard-images 5 --cycle 2 --mix-group 2 "
        f"--threads 1 --device cpu --min-teacher-top1 0 --teacher-checkpoint {folder / 'teacher.pt'} "
        f"--out {folder / name}"
    ).split()


def _content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ---- what is reported


def summary(tally: Tally, ranks: Sequence[int], unequal: Sequence[str], seconds: float) -> str:
    """All of it in words."""
    counts = ", ".join(map(str, ranks))
    same = "all equal to" if not unequal else "NOT all equal to"
    return (
        f"Uninterrupted builds under torchrun with {counts} ranks: {same} the one without torchrun, byte by byte. "
        f"{sum(tally.kills.values())} kills; {tally.datasets} datasets finished from what they left, each equal to the "
        f"uninterrupted one; {tally.survivors} ranks left alone ended by themselves; {len(tally.failures)} failures; "
        f"{seconds:,.0f} s."
    )


def table(tally: Tally, ranks: Sequence[int]) -> str:
    """Kills by stage and number of ranks."""
    rows = [
        [stage, *(str(tally.kills[stage, count]) for count in ranks), str(sum(tally.kills[stage, c] for c in ranks))]
        for stage in (START, *STAGES)
    ]
    return markdown_table(["stage", *(f"{count} ranks" for count in ranks), "kills"], rows)


def as_json(tally: Tally, ranks: Sequence[int], failures: Sequence[str]) -> dict[str, Any]:
    """All of it as JSON values."""
    return {
        "ranks": list(ranks),
        "kills": sum(tally.kills.values()),
        "kills_by_stage_and_ranks": {
            stage: {str(count): tally.kills[stage, count] for count in ranks} for stage in (START, *STAGES)
        },
        "datasets": tally.datasets,
        "survivors": tally.survivors,
        "failures": list(failures),
    }


def _listed(failures: Sequence[str]) -> str:
    return "".join(f"- {failure}\n" for failure in failures) + ("\n" if failures else "")


if __name__ == "__main__":
    raise SystemExit(main())
