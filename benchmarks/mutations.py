"""Integrity by brute force: very many mutated datasets, each read whole; every one refused by name, or read right.

`python -m benchmarks.mutations --count 1000000` makes so many mutants of small datasets (all codings, two shards each),
among them lies about lengths and counts under right checksums, and reads and verifies each. Then it changes every byte
of a shard of each coding, once with the manifest's sha256 as it was and once with the right one. What must come of a
mutant, and what counts as right, is in `benchmarks.mutation_check`; the kinds are in the modules `mutate_*`.

Exit status: 0 without failures, 1 with. A failure names the case, and `--only CASE` repeats it.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import mutate_files, mutate_frames, mutate_manifest, mutate_members
from benchmarks.command import run, whole
from benchmarks.mutants import Mutant
from benchmarks.mutation_check import MAX_MEMORY, MAX_SECONDS, Bench, Verdict, limit_memory, peak_memory
from benchmarks.mutation_parts import Draw, make_bases
from benchmarks.results_io import markdown_table, provenance, write_json, write_report
from builders.cores import usable_cores
from builders.progress import Progress

MODULE = "benchmarks.mutations"
KINDS = (*mutate_files.KINDS, *mutate_frames.KINDS, *mutate_members.KINDS, *mutate_manifest.KINDS)
CHUNK = 1000  # cases that a worker takes at a time
SHOWN_FAILURES = 20  # of a kind; all are counted
_MEMORY_FILES = Path("/dev/shm")

NOTES = f"""\
*Refused*: opening or reading raises the format's own error, and `verify` finds a problem. *By verify only*: what
ordinary reads leave out (SPEC.md section 10): sha256 of the file, padding, the checksum of the whole records member,
pictures that do not decode, image numbers that two shards share. *Identical*: nothing with a meaning was hit.
*Another dataset*: a mutant with right checksums that keeps every rule; it was read as exactly what it says, and its
dataset id differs. *Failures*: anything else: other data, another exception, a message of more than one line, more than
{MAX_SECONDS:.0f} s of processor time or more than {MAX_MEMORY >> 20} MiB above the baseline.
"""


@dataclass(frozen=True, kw_only=True)
class Failure:
    """One case that did not come out as it must."""

    case: str
    kind: str
    coding: str
    mutation: str
    fault: str
    message: str


@dataclass(kw_only=True)
class Tally:
    """What came of some cases."""

    outcomes: Counter[tuple[str, str]] = field(default_factory=Counter)  # by kind and outcome
    failures: list[Failure] = field(default_factory=list)
    slowest: tuple[float, str] = (0.0, "none")  # seconds and the case
    memory: int = 0  # bytes above what a worker had before its first case
    processor: float = 0.0  # seconds, the making of the mutants included

    def add(self, case: Case, verdict: Verdict) -> None:
        """Counts one case."""
        self.outcomes[case.kind, "failure" if verdict.fault else verdict.outcome or "failure"] += 1
        self.slowest = max(self.slowest, (verdict.seconds, f"{case.name} ({case.kind})"))
        if verdict.fault and self.outcomes[case.kind, "failure"] <= SHOWN_FAILURES:
            self.failures.append(
                Failure(
                    case=case.name,
                    kind=case.kind,
                    coding=case.bench.base.coding,
                    mutation=case.mutant.what,
                    fault=verdict.fault,
                    message=verdict.message,
                )
            )

    def merge(self, other: Tally) -> None:
        """Counts the cases of `other` as well."""
        self.outcomes.update(other.outcomes)
        self.failures += other.failures
        self.slowest = max(self.slowest, other.slowest)
        self.memory = max(self.memory, other.memory)
        self.processor += other.processor


@dataclass(frozen=True, kw_only=True)
class Case:
    """One mutant, and where it is read."""

    name: str
    kind: str
    bench: Bench
    mutant: Mutant


# ---- cases: `N` is a mutation drawn from (seed, N), `byte:N` a change of one byte


def make_case(benches: Sequence[Bench], seed: int, name: str) -> Case:
    """The case of this name; whatever it draws follows from (seed, name)."""
    sweep, _, number = name.rpartition(":")
    return _byte_case(benches, seed, int(number)) if sweep else _drawn_case(benches, seed, int(number))


def _drawn_case(benches: Sequence[Bench], seed: int, number: int) -> Case:
    draw = Draw(seed, number)
    bench, kind = draw.one(benches), draw.one(KINDS)
    mutant = kind(bench.base, draw)
    return Case(name=str(number), kind=kind.__name__.replace("_", " "), bench=bench, mutant=mutant)


def _byte_case(benches: Sequence[Bench], seed: int, number: int) -> Case:
    at, which = divmod(number, 2 * len(benches))
    bench, sealed = benches[which // 2], bool(which % 2)
    kind = f"every byte, {'right' if sealed else 'stale'} sha256"
    mutant = mutate_files.change_byte(bench.base, Draw(seed, number), at, sealed=sealed)
    return Case(name=f"byte:{number}", kind=kind, bench=bench, mutant=mutant)


def byte_cases(benches: Sequence[Bench], step: int = 1) -> list[str]:
    """Names of the cases that change each `step`-th byte of every first shard, with and without the right sha256."""
    a_byte = 2 * len(benches)
    length = max(len(bench.base.first_shard) for bench in benches)
    return [f"byte:{at * a_byte + which}" for at in range(0, length, step) for which in range(a_byte)]


@contextmanager
def make_benches() -> Iterator[list[Bench]]:
    """The datasets to be mutated, in memory where there is a folder for that."""
    with tempfile.TemporaryDirectory(dir=_MEMORY_FILES if _MEMORY_FILES.is_dir() else None) as folder:
        whole = Path(folder) / "whole"
        whole.mkdir()
        yield [Bench(base, Path(folder) / base.coding) for base in make_bases(whole)]


def check_cases(seed: int, names: Sequence[str]) -> Tally:
    """Judges the cases of these names."""
    tally = Tally()
    with make_benches() as benches:
        before, start = peak_memory(), time.process_time()
        for name in names:
            case = make_case(benches, seed, name)
            tally.add(case, case.bench.judge(case.mutant))
        tally.memory, tally.processor = peak_memory() - before, time.process_time() - start
    return tally


def _work(seed: int, names: Sequence[str]) -> Tally:
    """`check_cases` in a process of its own, which cannot reserve much memory."""
    limit_memory()
    return check_cases(seed, names)


# ---- the command


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    options = make_parser().parse_args(arguments)
    if options.only is not None:
        return run(lambda: show(options.seed, options.only))
    return run(
        lambda: report(
            options.count,
            options.seed,
            step=options.step,
            workers=options.workers,
            json_path=options.json,
            out=options.out,
        )
    )


def make_parser() -> argparse.ArgumentParser:
    """The command's parser."""
    parser = argparse.ArgumentParser(
        prog=f"python -m {MODULE}",
        description="Mutate small datasets in every way, and check that each mutant is refused by name or read right.",
        epilog=f"examples:\n  python -m {MODULE} --count 1000000 --out benchmarks/results\n"
        f"  python -m {MODULE} --only 4711    what case 4711 does, and what comes of it",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--count", type=whole(1), default=50_000, metavar="N", help="mutations to draw (50000)")
    parser.add_argument("--seed", type=whole(0), default=0, metavar="N", help="of every random draw (0)")
    parser.add_argument("--step", type=whole(1), default=1, metavar="N", help="change each N-th byte of a shard (1)")
    parser.add_argument("--workers", type=whole(1), default=usable_cores(), metavar="N", help="processes (one a core)")
    parser.add_argument("--only", type=_case_name, metavar="CASE", help="repeat this case and say what comes of it")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures and failures to this file")
    parser.add_argument("--out", type=Path, metavar="DIR", help="write <date>-mutations.{json,md} into this folder")
    return parser


def report(count: int, seed: int, *, step: int, workers: int, json_path: Path | None, out: Path | None) -> int:
    """Judges all cases, prints the table and writes what was asked for; returns the exit status."""
    start = time.perf_counter()
    with make_benches() as benches:
        names = [*map(str, range(count)), *byte_cases(benches, step)]
    tally = check_in_processes(seed, names, workers)
    seconds = time.perf_counter() - start
    text = f"{table(tally)}\n\n{summary(tally, seconds, workers)}\n"
    print(f"{text}\n{failure_text(tally)}{NOTES}")
    facts = provenance(MODULE, seeds=[seed])
    data = as_json(tally, seconds, workers)
    if json_path is not None:
        write_json(json_path, facts | data)
    if out is not None:
        write_report(
            out, "mutations", facts, data, title="Mutated datasets", text=f"{text}\n{failure_text(tally)}{NOTES}"
        )
    return 1 if failures(tally) else 0


def show(seed: int, name: str) -> int:
    """Says what one case does and what comes of it; the exit status is 1 if that is a failure."""
    with make_benches() as benches:
        case = make_case(benches, seed, name)
        verdict = case.bench.judge(case.mutant)
    print(f"case      {case.name}, seed {seed}: {case.kind}, {case.bench.base.coding} coding")
    print(f"mutation  {case.mutant.what}")
    print(f"expected  {case.mutant.expectation}")
    print(f"outcome   {verdict.outcome or 'none'}, {1000 * verdict.seconds:.1f} ms")
    print(f"message   {verdict.message or '-'}")
    print(f"fault     {verdict.fault or '-'}")
    return 1 if verdict.fault else 0


def check_in_processes(seed: int, names: Sequence[str], workers: int) -> Tally:
    """Judges the cases in processes. One that dies is a failure of its own, without the cases it had left."""
    tally = Tally()
    chunks = [names[first : first + CHUNK] for first in range(0, len(names), CHUNK)]
    pool = ProcessPoolExecutor(workers)
    try:
        waiting = {pool.submit(_work, seed, chunk): chunk for chunk in chunks}
        with Progress(len(names), "mutations", "case") as progress:
            for done in as_completed(waiting):
                tally.merge(done.result())
                progress.advance(len(waiting.pop(done)), failures=failures(tally))
    except BrokenProcessPool:
        unfinished = [f"{chunk[0]} to {chunk[-1]}" for chunk in waiting.values()][: 2 * workers]
        tally.outcomes["a process died", "failure"] += 1
        tally.failures.append(
            Failure(
                case=", ".join(unfinished),
                kind="a process died",
                coding="-",
                mutation="the cases of one process, most likely one of the first named",
                fault="killed, or crashed in compiled code",
                message="",
            )
        )
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
    return tally


# ---- what is reported


def failures(tally: Tally) -> int:
    """Number of failures."""
    return sum(count for (_, outcome), count in tally.outcomes.items() if outcome == "failure")


_COLUMNS = {
    "refused": "refused",
    "verify": "by verify only",
    "identical": "identical",
    "another": "another dataset",
    "failure": "failures",
}


def table(tally: Tally) -> str:
    """Kinds by outcomes, and their sum."""
    kinds = list(dict.fromkeys(kind for kind, _ in sorted(tally.outcomes)))
    rows = [(kind, [tally.outcomes[kind, outcome] for outcome in _COLUMNS]) for kind in kinds]
    rows.append(("all", [sum(column) for column in zip(*(counts for _, counts in rows), strict=True)]))
    lines = [[name, *(f"{value:,}" for value in (sum(counts), *counts))] for name, counts in rows]
    return markdown_table(["mutation", "cases", *_COLUMNS.values()], lines)


def summary(tally: Tally, seconds: float, workers: int) -> str:
    """Time and memory in words."""
    cases = sum(tally.outcomes.values())
    return (
        f"{cases:,} cases in {seconds:,.0f} s, {cases / seconds:,.0f} a second with {workers} processes; "
        f"{1000 * tally.processor / cases:.1f} ms of processor time each. "
        f"Slowest: {1000 * tally.slowest[0]:.0f} ms, case {tally.slowest[1]}. "
        f"Most memory: {tally.memory / 2**20:.1f} MiB above the baseline."
    )


def failure_text(tally: Tally) -> str:
    """The failures kept, one a line; nothing without any."""
    if not tally.failures:
        return ""
    lines = [f"- case {f.case} ({f.kind}, {f.coding}): {f.mutation}: {f.fault}" for f in tally.failures]
    return "\n".join([f"{failures(tally):,} failures, at most {SHOWN_FAILURES} of a kind and chunk:", *lines, "", ""])


def as_json(tally: Tally, seconds: float, workers: int) -> dict[str, Any]:
    """All of it as JSON values."""
    kinds = sorted({kind for kind, _ in tally.outcomes})
    return {
        "cases": sum(tally.outcomes.values()),
        "failures": failures(tally),
        "seconds": seconds,
        "workers": workers,
        "processor_seconds": tally.processor,
        "slowest": {"seconds": tally.slowest[0], "case": tally.slowest[1]},
        "memory_above_baseline": tally.memory,
        "outcomes": {kind: {outcome: tally.outcomes[kind, outcome] for outcome in _COLUMNS} for kind in kinds},
        "failed_cases": [asdict(failure) for failure in tally.failures],
    }


def _case_name(text: str) -> str:
    sweep, _, number = text.rpartition(":")
    if sweep not in ("", "byte") or not number.isdigit():
        raise argparse.ArgumentTypeError(f"found {text!r}, expected N or byte:N")
    return text


if __name__ == "__main__":
    raise SystemExit(main())
