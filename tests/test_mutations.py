"""Brute force on a few thousand mutants: no failures; and with a check taken out of the reader, failures."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import pytest

from benchmarks import mutation_check, mutations
from benchmarks.mutation_check import Bench
from benchmarks.mutations import (
    KINDS,
    byte_cases,
    check_cases,
    check_in_processes,
    failures,
    main,
    make_benches,
    make_case,
)
from nrrdd_format import fields, further, json_checks, manifest, records, shard_header, shards, verify
from nrrdd_format.errors import FormatError
from nrrdd_format.manifest import MANIFEST_NAME
from nrrdd_format.pairs import PairRecords
from nrrdd_format.priors import Priors
from nrrdd_format.shards import ShardReader

SEED = 0
CASES = 1500


@pytest.fixture(scope="module")
def benches() -> Iterator[list[Bench]]:
    """The datasets that are mutated."""
    with make_benches() as made:
        yield made


@pytest.fixture(scope="module")
def names_of(benches: list[Bench]) -> Mapping[str, list[str]]:
    """Names of the first cases, by kind."""
    names = defaultdict(list)
    for number in range(4 * CASES):
        names[make_case(benches, SEED, str(number)).kind].append(str(number))
    return names


# ---- the reader as it is


def test_every_drawn_mutant_is_refused_by_name_or_read_right() -> None:
    tally = check_cases(SEED, [str(number) for number in range(CASES)])
    assert tally.failures == []
    assert sum(tally.outcomes.values()) == CASES
    assert {kind for kind, _ in tally.outcomes} == {kind.__name__.replace("_", " ") for kind in KINDS}
    assert {outcome for _, outcome in tally.outcomes} == {"refused", "verify", "identical", "another"}


@pytest.mark.parametrize("kind", ["repeat key", "odd msgpack", "nest deeply", "promise epochs", "odd texts"])
def test_kinds_whose_worst_cases_are_rare(kind: str, names_of: Mapping[str, list[str]]) -> None:
    assert check_cases(SEED, names_of[kind]).failures == []


def test_every_changed_byte_of_a_shard_is_found_even_with_a_right_sha256(benches: list[Bench]) -> None:
    tally = check_cases(SEED, byte_cases(benches, step=61))
    assert tally.failures == []
    assert {kind for kind, _ in tally.outcomes} == {"every byte, right sha256", "every byte, stale sha256"}
    assert {outcome for _, outcome in tally.outcomes} == {"refused", "verify"}


# ---- the cases


def test_byte_cases_change_each_byte_of_each_dataset_twice(benches: list[Bench]) -> None:
    cases = [make_case(benches, SEED, name) for name in byte_cases(benches, step=1000)]
    for bench in benches:
        mine = [case.mutant.files for case in cases if case.bench is bench]
        places = [differences(bench.base.first_shard, files["shard-00000.tar"] or b"") for files in mine]
        assert places == [[at] for at in range(0, len(bench.base.first_shard), 1000) for _ in range(2)]
        assert [MANIFEST_NAME in files for files in mine] == [False, True] * (len(mine) // 2)


def differences(a: bytes, b: bytes) -> list[int]:
    """Where two byte strings of one length differ."""
    return [at for at, (one, other) in enumerate(zip(a, b, strict=True)) if one != other]


def test_a_case_follows_from_seed_and_name_alone(benches: list[Bench]) -> None:
    with make_benches() as others:
        for name in ("7", "byte:7", "123456789"):
            assert make_case(others, 3, name).mutant.files == make_case(benches, 3, name).mutant.files
    assert make_case(benches, 3, "7").mutant.files != make_case(benches, 4, "7").mutant.files


def test_a_mutant_that_must_be_found_differs_from_its_dataset(benches: list[Bench]) -> None:
    for number in range(2000):
        case = make_case(benches, 1, str(number))
        if case.mutant.expectation not in ("harmless", "open"):
            assert any(data != case.bench.base.files[name] for name, data in case.mutant.files.items()), (
                case.mutant.what
            )


# ---- a reader that is broken in one place


def nothing(*_: object, **__: object) -> None:
    """In place of a check: none."""


def no_problems(*_: object) -> Iterator[Any]:
    """In place of a check: it finds nothing."""
    return iter(())


def no_list(*_: object) -> list[str]:
    """In place of a check: it finds nothing."""
    return []


def anything(value: Any, *_: object) -> Any:
    """In place of a check: the value as it is."""
    return value


def crash(*_: object) -> NoReturn:
    """In place of a check: it falls over."""
    raise KeyError("size")


def chatter(*_: object) -> NoReturn:
    """In place of a check: its message has two lines."""
    raise FormatError("damaged:\nfetch it again")


def hang(*_: object) -> NoReturn:
    """In place of a check: it does not end."""
    while True:
        pass


read_records = ShardReader.records


def swapped_distances(self: ShardReader, epoch: int) -> PairRecords:
    """In place of reading: wrong data behind right checks."""
    found = read_records(self, epoch)
    return replace(found, distance_org=found.distance_aug, distance_aug=found.distance_org)


# What is broken and how; the kind of mutation and the fault that shows it.
BROKEN: list[tuple[object, str, Callable[..., Any], str, str]] = [
    (ShardReader, "_check_crc", nothing, "flip bits", "damaged data were read without complaint"),
    (ShardReader, "_check_tar_header", nothing, "lie in tar header", "expected refused"),
    (verify, "unread_faults", no_problems, "dirty padding", "expected refused or verify"),
    (ShardReader, "_check_against", nothing, "lie in manifest", "expected refused"),
    (ShardReader, "records", swapped_distances, "change block content", "do not encode to the blocks"),
    (manifest, "check_version", nothing, "future major version", "expected refused"),
    (shard_header, "check_version", nothing, "future major version", "expected refused"),
    (Priors, "check_labels", nothing, "lie in priors", "expected refused"),
    (shard_header, "bounded", anything, "lie in records head", "expected refused"),
    (json_checks, "_unique", dict, "repeat key", "expected refused"),
    (json_checks, "_no_constant", float, "not finite numbers", "expected refused"),
    (fields, "_check_below", nothing, "leave range", "IndexError instead of a FormatError"),
    (further, "_check", nothing, "lie in further", "expected refused"),
    (shards, "check_labels", nothing, "lie in further", "expected refused"),
    (manifest, "_version_problems", no_list, "past major version", "expected refused"),
    (records, "_check_levels", nothing, "leave range", "IndexError instead of a FormatError"),
    (verify, "_repetition_errors", no_problems, "rename image", "expected refused or verify"),
    (verify, "check_image", nothing, "break image", "expected refused or verify"),
    (verify, "check_image", crash, "change image", "KeyError instead of a FormatError"),
    (verify, "check_image", chatter, "change image", "2 lines"),
    (verify, "check_image", hang, "change image", "Hang instead of a FormatError"),
]


@pytest.mark.parametrize(("place", "attribute", "stand_in", "kind", "fault"), BROKEN)
def test_a_broken_reader_gives_failures(
    names_of: Mapping[str, list[str]],
    monkeypatch: pytest.MonkeyPatch,
    place: object,
    attribute: str,
    stand_in: Callable[..., Any],
    kind: str,
    fault: str,
) -> None:
    monkeypatch.setattr(mutation_check, "HANG_SECONDS", 0.05)
    with make_benches() as benches:
        monkeypatch.setattr(place, attribute, stand_in)
        cases = (make_case(benches, SEED, name) for name in names_of[kind])
        faults = (case.bench.judge(case.mutant).fault or "" for case in cases)
        assert any(fault in found for found in faults)


def test_slow_cases_are_failures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mutation_check, "MAX_SECONDS", -1.0)
    tally = check_cases(SEED, ["1"])
    assert failures(tally) == 1 and "of processor time" in tally.failures[0].fault


def test_cases_that_take_much_memory_are_failures(benches: list[Bench], monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case(benches, SEED, "1")
    peaks = iter([2**40, 2**40 + 2**28, 2**40 + 2**28, 2**40 + 2**28])
    monkeypatch.setattr(mutation_check, "peak_memory", lambda: next(peaks))
    assert "bytes of memory" in (case.bench.judge(case.mutant).fault or "")
    assert case.bench.judge(case.mutant).fault is None  # this one added nothing to it


def test_a_process_that_dies_is_a_failure_and_not_a_hang(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mutations, "_work", die)
    tally = check_in_processes(SEED, ["0", "1"], workers=1)
    assert failures(tally) == 1 and tally.failures[0].case == "0 to 1"


def die(*_: object) -> NoReturn:
    """In place of a worker's task: a crash in compiled code."""
    import os

    os._exit(139)


# ---- the command


def test_the_command_writes_its_table(tmp_path: Path, repository: Path) -> None:
    options = ["--count", "60", "--step", "2000", "--workers", "2", "--out", tmp_path, "--json", tmp_path / "x.json"]
    command = [sys.executable, "-m", "benchmarks.mutations", *map(str, options)]
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    (record_path,) = tmp_path.glob("*-mutations.json")
    record = json.loads(record_path.read_text())
    assert record == json.loads((tmp_path / "x.json").read_text())
    assert (record["failures"], record["failed_cases"]) == (0, [])
    assert record["cases"] == sum(sum(counts.values()) for counts in record["outcomes"].values()) > 60
    text = record_path.with_suffix(".md").read_text()
    assert "| every byte, right sha256 |" in text and "0 failures" not in text and "Slowest: " in text


def test_one_case_is_repeated(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(["--only", "byte:3"]) == 0
    assert "mutation  byte 0 of shard-00000.tar changed" in capsys.readouterr().out
    monkeypatch.setattr(verify, "check_image", crash)
    with pytest.raises(SystemExit):
        main(["--only", "word:3"])
    assert "expected N or byte:N" in capsys.readouterr().err


def test_failures_are_told_and_end_with_status_1(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mutations, "check_in_processes", lambda seed, names, workers: check_cases(seed, names[:30]))
    monkeypatch.setattr(mutation_check, "MAX_SECONDS", -1.0)
    assert main(["--count", "30", "--step", "100000"]) == 1
    out = capsys.readouterr().out
    assert "30 failures" in out and "- case 0 (" in out and "of processor time" in out
