"""The studies of the format's choices: cells that are kept, distances put in place of the stored ones, reports."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from make_dataset import make_tiny_dataset

from benchmarks import format_choices
from benchmarks.format_choices import (
    STUDIES,
    ReplacedDistances,
    Result,
    Setup,
    cell_path,
    chosen_variants,
    dataset_path,
)
from benchmarks.grid import Origin
from benchmarks.teacher import TeacherConfig, train_and_save
from builders.config import BuildConfig
from builders.sources import load_source
from loaders import DBRLoader
from nrrdd_format.dataset import open_dataset


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("teacher") / "teacher.pt"
    source = load_source("digits", data_dir=None)
    train_and_save(source, TeacherConfig(architecture="conv2-w8", epochs=3), path)
    return path


def test_replaced_distances_are_those_of_the_batch_s_own_pairs(tmp_path: Path) -> None:
    """Given the stored distances themselves, every batch stays as it is, also in epochs that repeat."""
    path = make_tiny_dataset(tmp_path / "data", shards=1, epochs=3)
    with open_dataset(path) as dataset:
        records = [dataset.shards[0].records(epoch) for epoch in range(3)]
        manifest = dataset.manifest
    stored = np.stack([np.stack([r.distance_org, r.distance_aug]) for r in records])
    replaced = ReplacedDistances(DBRLoader(path, 5, seed=4), stored, 4, manifest)
    moved = ReplacedDistances(DBRLoader(path, 5, seed=4), stored + 1, 4, manifest)
    for epoch in (0, 2, 4):
        loader = DBRLoader(path, 5, seed=4)
        for each in (loader, replaced, moved):
            each.set_epoch(epoch)
        for batch, same, other in zip(loader, replaced, moved, strict=True):
            assert torch.equal(batch.distance_org, same.distance_org)
            assert torch.equal(batch.distance_aug, same.distance_aug)
            assert torch.equal(batch.distance_org + 1, other.distance_org)
            assert torch.equal(batch.images, same.images)


@pytest.mark.parametrize("study", ["distances", "mixes", "codecs"])
def test_a_study_from_the_command_line(
    study: str, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(STUDIES, study, STUDIES[study][:3])
    arguments = (
        f"--study {study} --dataset digits --teacher-checkpoint {teacher} --ipc 1 --epochs 2 --student conv2-w8 "
        f"--seeds 0 1 --out {tmp_path / 'out'} --results {tmp_path / 'results'} --device cpu"
    ).split()
    assert format_choices.main(arguments) == 0
    (path,) = (tmp_path / "results").glob(f"*-choice-of-{study}-digits-10.json")
    record = json.loads(path.read_text())
    assert len(record["cells"]) == 6 and record["seeds"] == [0, 1]
    assert all(cell["images"] == 10 and cell["pairs"] == 20 and cell["bytes_labels"] > 0 for cell in record["cells"])
    table = path.with_suffix(".md").read_text()
    assert all(variant.name in table for variant in STUDIES[study])
    assert path.with_suffix(".png").stat().st_size > 0
    monkeypatch.setattr(format_choices, "train_student", None)  # every cell is kept
    assert format_choices.main(arguments) == 0


def test_variants_are_chosen_by_name(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert [variant.name for variant in chosen_variants("distances", ["3 bits", "fp32"])] == ["3 bits", "fp32"]
    arguments = f"--study distances --dataset digits --teacher-checkpoint t.pt --out {tmp_path} --variants fp32".split()
    assert format_choices.main([*arguments, "9 bits"]) == 2
    assert "--variants: found '9 bits', expected some of 'fp32'" in capsys.readouterr().err


def test_rounding_loses_more_with_fewer_bits() -> None:
    exact = np.geomspace(1e-3, 15, 200, dtype=np.float32)
    errors = [np.abs(v.rounding(exact) - exact).mean() for v in STUDIES["distances"] if v.rounding is not None]
    assert errors[0] == 0
    assert errors == sorted(errors)


SETUP = Setup(
    study="mixes",
    variants=chosen_variants("mixes", None),
    dataset="digits",
    data_dir=None,
    test_dir=None,
    classes=None,
    size=None,
    teacher_checkpoint=Path("t"),
    out=Path("o"),
    ipc=1,
    epochs=1,
    student="conv2",
    seeds=(0, 1),
    device="cpu",
    origin=Origin(train="a", test="b"),
)


def test_a_cell_is_kept_for_the_settings_it_stands_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not for its name: a default may change behind it."""
    (tmp_path / "t").write_bytes(b"teacher")
    setup = replace(SETUP, teacher_checkpoint=tmp_path / "t")
    half, plain = STUDIES["distances"][1], replace(STUDIES["mixes"][1], name="x")

    def paths() -> list[Path]:
        return [cell_path(setup, variant, seed=0) for variant in (half, plain)]

    before = paths()
    assert before[0].name != before[1].name
    setup = replace(setup, out=tmp_path / "elsewhere", device="cuda")
    assert [path.name for path in paths()] == [path.name for path in before]
    half = replace(half, rounding=lambda distances: distances)
    assert [path.name == old.name for path, old in zip(paths(), before, strict=True)] == [False, True]
    monkeypatch.setattr(format_choices, "BuildConfig", partial(BuildConfig, mix_group=7))
    assert paths()[1].name != before[1].name
    monkeypatch.undo()
    (tmp_path / "t").write_bytes(b"another teacher")
    assert paths()[1].name != before[1].name


def test_a_cell_is_kept_for_the_images_it_was_made_of_and_tested_on(tmp_path: Path) -> None:
    """Other images may lie in the same folder the next time; a dataset knows only what it was made of."""
    (tmp_path / "t").write_bytes(b"teacher")
    setups = [
        replace(SETUP, teacher_checkpoint=tmp_path / "t", origin=Origin(train=train, test=test))
        for train, test in (("a", "b"), ("a", "c"), ("c", "b"))
    ]
    variant = STUDIES["mixes"][1]
    assert len({cell_path(setup, variant, seed=0) for setup in setups}) == 3
    datasets = [dataset_path(setup, variant, seed=0) for setup in setups]
    assert datasets[0] == datasets[1] != datasets[2]


def test_each_variant_stands_beside_the_first_of_its_seed() -> None:
    tops = {variant.name: (0.5 + number / 100, 0.6 + number / 100) for number, variant in enumerate(STUDIES["mixes"])}
    results = [
        Result(
            study="mixes",
            variant=name,
            seed=seed,
            top1=top,
            bytes_images=100,
            bytes_labels=40,
            images=10,
            pairs=10,
            seconds=0,
        )
        for name, both in tops.items()
        for seed, top in enumerate(both)
    ]
    lines = format_choices.report(SETUP, results).splitlines()
    cells = [cell.strip() for cell in lines[-1].split("|")[1:-1]]
    assert cells == ["64 mixes, one for 10 pairs", "58.00 ± 7.07", "+3.00 ± 0.00", "10", "4.00"]
