"""The benchmarks' numeric options: each has a bound, which is told in a line before anything is measured."""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path

import pytest

from benchmarks.command import Several, number, whole

OF_A_BENCHMARK = 'prog=f"python -m {MODULE}"'


def parsers(repository: Path) -> dict[str, argparse.ArgumentParser]:
    """The parser of every benchmark."""
    sources = sorted((repository / "benchmarks").glob("*.py"))
    names = [
        path.stem for path in sources if OF_A_BENCHMARK in path.read_text() and "def make_parser(" in path.read_text()
    ]
    return {name: importlib.import_module(f"benchmarks.{name}").make_parser() for name in names}


def test_every_number_has_a_bound(repository: Path) -> None:
    found = parsers(repository)
    assert {"accuracy", "build_kills", "exact_distances", "loader_wait", "storage_footprint"} <= found.keys()
    for name, parser in found.items():
        unbounded = [action.dest for action in parser._actions if action.type in (int, float)]
        assert not unbounded, (name, unbounded)


@pytest.mark.parametrize(
    ("name", "option", "value"),
    [
        ("accuracy", "--epochs", "0"),
        ("accuracy", "--processes", "0"),
        ("build_kills", "--kills", "-1"),
        ("build_kills", "--ranks", "0"),
        ("builder_throughput", "--batch-size", "1"),
        ("builder_throughput", "--repeats", "0"),
        ("builder_throughput", "--source-images", "5"),
        ("decoders", "--images", "0"),
        ("exact_distances", "--pairs", "0"),
        ("gradient_cosine", "--batch-size", "1"),
        ("accuracy_by_bytes", "--ranks", "0"),
        ("hold_out", "--per-class", "0"),
        ("loader_throughput", "--images", "1"),
        ("loader_throughput", "--resolution", "4"),
        ("loader_throughput", "--seconds", "inf"),
        ("loader_wait", "--steps", "0"),
        ("loader_wait", "--repeats", "0"),
    ],
)
def test_a_number_below_its_bound_is_refused(
    name: str, option: str, value: str, repository: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        parsers(repository)[name].parse_args([option, value])
    assert ended.value.code == 2
    assert f"argument {option}: found '{value}', expected a " in capsys.readouterr().err.splitlines()[-1]


def test_no_list_takes_a_value_twice(repository: Path) -> None:
    for name, parser in parsers(repository).items():
        lists = [action for action in parser._actions if action.option_strings and action.nargs in ("+", "*")]
        assert not [action.dest for action in lists if not isinstance(action, Several)], name


@pytest.mark.parametrize(
    ("name", "options", "told"),
    [
        ("accuracy", "--seeds 0 1 00", "--seeds: found 0 twice"),
        ("accuracy", "--labels dbr dbr", "--labels: found dbr twice"),
        ("accuracy_by_bytes", "--further 1 2 1", "--further: found 1 twice"),
        ("equations", "--choices radius sce radius", "--choices: found radius twice"),
        ("pair_mass", "--alpha-lr 1 1.0", "--alpha-lr: found 1.0 twice"),
        ("teachers", "--teacher-checkpoint a.pt b/../a.pt ./a.pt", "--teacher-checkpoint: found a.pt twice"),
    ],
)
def test_a_value_that_would_count_twice_is_refused(
    name: str, options: str, told: str, repository: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        parsers(repository)[name].parse_args(options.split())
    assert ended.value.code == 2
    assert f"argument {told}, expected different values" in capsys.readouterr().err.splitlines()[-1]


def test_bounds() -> None:
    assert [whole(2)("2"), whole(0)("7")] == [2, 7]
    assert [number(0)("0"), number(0.5)("1e3")] == [0, 1000]
    for text in ("1", "-3", "2.5", "", "two"):
        with pytest.raises(argparse.ArgumentTypeError, match=f"found '{text}', expected a whole number, 2 or more"):
            whole(2)(text)
    for text in ("-0.1", "nan", "inf", "", "two"):
        with pytest.raises(argparse.ArgumentTypeError, match=f"found '{text}', expected a number, 0 or more"):
            number(0)(text)
