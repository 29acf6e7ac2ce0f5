"""Holding out part of a training split."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks import hold_out
from builders.sources import load_source


@pytest.fixture
def data(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    for label in ("cat", "dog"):
        for number in range(6):
            path = tmp_path / "data" / "train" / label / f"{number % 2}" / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8)).save(path)
    return tmp_path / "data"


def _command(data: Path, out: Path, per_class: int = 2, seed: int = 0) -> int:
    return hold_out.main(f"--data-dir {data} --out {out} --per-class {per_class} --seed {seed}".split())


def _names(split: Path) -> set[str]:
    return {path.relative_to(split).as_posix() for path in split.rglob("*.png")}


def test_every_image_is_in_one_split_and_every_class_in_both(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "held"
    assert _command(data, out) == 0
    train, test = _names(out / "train"), _names(out / "test")
    assert train | test == _names(data / "train") and not train & test
    assert [sum(name.startswith(label) for name in test) for label in ("cat", "dog")] == [2, 2]
    source = load_source("imagefolder", data_dir=out)
    assert source.test is not None and (len(source.train), len(source.test)) == (8, 4)


def test_the_choice_is_the_seeds(data: Path, tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        assert _command(data, tmp_path / name, seed=seed) == 0
    first, again, other = (_names(tmp_path / name / "test") for name in "abc")
    assert first == again != other


def test_a_class_without_images_left_is_refused_and_nothing_is_written(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _command(data, tmp_path / "held", 6) == 2
    assert "6 images, of which --per-class" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"data"}


def test_a_folder_that_is_there_is_left_alone(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _command(data, data) == 2
    assert "is there already" in capsys.readouterr().err
