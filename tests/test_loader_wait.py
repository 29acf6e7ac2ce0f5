"""The benchmark of waiting for data, at its smallest."""

from __future__ import annotations

import json
from pathlib import Path
from unittest.mock import Mock

import pytest

from benchmarks import loader_wait
from benchmarks.loader_wait import main

SMALL = ["--network", "conv1", "--resolution", "16", "--images", "40", "--batch-size", "8", "--workers", "1"]


def test_it_compares_steps_fed_by_the_loader_with_steps_on_one_batch(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*SMALL, "--steps", "2", "--repeats", "2", "--device", "cpu", "--out", str(tmp_path)]) == 0
    (result,) = tmp_path.glob("*-loader-wait-cpu.json")
    (row,) = json.loads(result.read_text())["rows"]
    assert len(row["fed"]) == len(row["reused"]) == 2
    assert f"{row['waiting']:.1f}" in capsys.readouterr().out
    assert result.with_suffix(".md").is_file()


def test_batches_prepared_during_the_other_steps_are_not_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    timed = Mock(wraps=loader_wait.seconds)
    monkeypatch.setattr(loader_wait, "seconds", timed)
    assert main([*SMALL, "--steps", "3", "--repeats", "1", "--device", "cpu", "--out", str(tmp_path)]) == 0
    assert [call.args[2] for call in timed.call_args_list] == [2, 3, 3] * 2  # a worker prepares two ahead
    (result,) = tmp_path.glob("*-loader-wait-cpu.json")
    (row,) = json.loads(result.read_text())["rows"]
    assert len(row["fed"]) == len(row["reused"]) == 1
