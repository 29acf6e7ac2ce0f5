"""The benchmark of waiting for data, at its smallest."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.loader_wait import main


def test_it_compares_steps_fed_by_the_loader_with_steps_on_one_batch(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = ["--network", "conv1", "--resolution", "16", "--images", "40", "--batch-size", "8", "--workers", "1"]
    assert main([*small, "--steps", "2", "--repeats", "2", "--device", "cpu", "--out", str(tmp_path)]) == 0
    (result,) = tmp_path.glob("*-loader-wait-cpu.json")
    (row,) = json.loads(result.read_text())["rows"]
    assert len(row["fed"]) == len(row["reused"]) == 2
    assert f"{row['waiting']:.1f}" in capsys.readouterr().out
    assert result.with_suffix(".md").is_file()
