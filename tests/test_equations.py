"""The benchmark of the method's open choices."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
from grid_result import result_of

from benchmarks import cli, equations, pair_mass, scale_factors
from benchmarks.equations import CHOICES, all_cells, choices_for, compare
from benchmarks.grid import Cell, Grid, Table, build_config, cell_path, student_config
from benchmarks.results_io import write_json
from benchmarks.student import LABELS_OF_OPTION, StudentConfig
from benchmarks.teacher import TeacherConfig
from builders.config import BuildConfig

RECIPE = ("batch-size", "epochs")
"""Choices of every student."""

DBR_LOSS = ("alpha-sce", "alpha-dbr", "sce", "radius", "distance")


@pytest.fixture
def grid(tmp_path: Path) -> Grid:
    (tmp_path / "teacher.pt").write_bytes(b"weights")
    return Grid(
        dataset="digits",
        out=tmp_path,
        teacher_checkpoint=tmp_path / "teacher.pt",
        teacher=TeacherConfig(),
        ipcs=(1,),
        images=("nrr+lr",),
        labels=("dbr",),
        seeds=(0, 1),
        student="conv2-w8",
        epochs=2,
        iterations=1,
    )


def test_every_value_of_every_choice_is_a_sound_option(grid: Grid) -> None:
    for choice in CHOICES.values():
        kinds = LABELS_OF_OPTION.get(choice.option, ())
        labels = "dbr" if not kinds or "dbr" in kinds else "dbr-further3"
        base = replace(next(grid.cells()), labels=labels)
        for value in choice.values:
            cell = choice.cell(base, value)
            changed: Any = build_config(grid, cell) if choice.of == "build" else student_config(grid, cell)
            assert getattr(changed, choice.option) == value


def test_initial_images_without_patches_are_built_without_options_of_patches(grid: Grid) -> None:
    base = Cell(ipc=1, images="discovery", labels="dbr", seed=0)
    assert build_config(grid, base).confidence == "lowest"
    assert build_config(grid, CHOICES["init"].cell(base, "real")).confidence == BuildConfig.confidence


def test_choices_among_patches_are_left_out_where_images_come_from_none() -> None:
    every = set(CHOICES.values()) - {CHOICES["soft-temperature"]}  # DBR has none
    assert set(choices_for("nrr+lr", "dbr")) == every
    assert CHOICES["soft-temperature"] in choices_for("nrr+lr", "dbr-further3")
    assert every - set(choices_for("real+nrr+lr", "dbr")) == {CHOICES["confidence"], CHOICES["crop-score"]}


@pytest.mark.parametrize(
    ("images", "labels", "expected"),
    [
        ("random-real", "dbr", {"init", "temperature", "view-scale", *DBR_LOSS, *RECIPE}),
        ("random-real", "soft", {"init", "view-scale", "soft-temperature", *RECIPE}),
        ("random-real", "compact", {"init", "temperature", "view-scale", *RECIPE}),
        ("rded", "one-hot", {"confidence", "crop-score", "init", "view-scale", *RECIPE}),
    ],
)
def test_choices_without_effect_are_left_out(images: str, labels: str, expected: set[str]) -> None:
    assert {choice.option.replace("_", "-") for choice in choices_for(images, labels)} == expected


def test_choices_of_a_part_that_is_off_are_left_out() -> None:
    every = {choice.option for choice in CHOICES.values()}
    assert every - {choice.option for choice in choices_for("nrr", "dbr")} == {
        "label_refinement",
        "label_refinement_views",
        "soft_temperature",
    }
    masked = {"epsilon", "cam_every"}
    assert not masked & {choice.option for choice in choices_for("real+all-pixels", "dbr")}


def test_a_choice_without_effect_is_refused_before_anything_is_run(
    grid: Grid, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("sklearn")
    command = f"--teacher-checkpoint {grid.teacher_checkpoint} --out {tmp_path}/out --images real+nrr --ipc 1"
    assert equations.main([*command.split(), "--choices", "epsilon", "confidence"]) == 2
    assert "--confidence: found random with --init real" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_choices_between_named_alternatives_leave_none_out() -> None:
    for choice in CHOICES.values():
        config = BuildConfig if choice.of == "build" else StudentConfig
        named = get_args(get_type_hints(config)[choice.option])
        if named and type(None) not in named:
            # Noise is no start for a masked step; a precision is named to be compared.
            assert set(choice.values) == set(named) - {"noise", "auto"}, choice.option
        assert choice.option in {field.name for field in fields(config)}


def test_a_value_that_is_the_defaults_is_not_run_again(grid: Grid) -> None:
    choices = choices_for("nrr+lr", "dbr")
    cells = all_cells(grid, choices)
    assert len({cell_path(grid, cell) for cell in cells}) == len(cells)
    values = sum(len(choice.values) for choice in choices)
    of_dataset = ("view-scale", "iterations", "epochs", "batch-size")  # these have the default nowhere
    with_default = len(choices) - len(of_dataset)
    assert len(cells) == 2 * (1 + values - with_default)


def test_values_are_compared_with_the_default_of_the_same_seed(grid: Grid) -> None:
    choice = replace(CHOICES["epsilon"], values=(0.1, 0.5, 0.9))
    first, second = grid.cells()
    found = ((first, 0.5), (choice.cell(first, 0.1), 0.25), (second, 0.75), (choice.cell(second, 0.9), 0.5))
    rows = compare(grid, {cell: result_of(cell, top1) for cell, top1 in found}, choice)
    assert [(row.value, row.is_base, row.base_top1, row.top1) for row in rows] == [
        ("0.1", False, (50.0,), (25.0,)),
        ("0.5", True, (50.0, 75.0), (50.0, 75.0)),
        ("0.9", False, (75.0,), (50.0,)),
    ]


@pytest.mark.parametrize("made_in", [None, "fp32", "bf16"])
def test_the_precision_that_the_base_takes_is_the_base(grid: Grid, made_in: str | None) -> None:
    """On a CPU it takes fp32, unless there are students of images that a GPU refined."""
    base, choice = next(grid.cells()), CHOICES["precision"]
    if made_in is not None:
        write_json(cell_path(grid, base), asdict(replace(result_of(base, 0.5), precision=made_in)))
    one_seed = replace(grid, seeds=(0,))
    cells = all_cells(one_seed, [choice])
    assert len(cells) == 2 and cells[0] == base
    rows = compare(one_seed, {cell: result_of(cell, 0.5) for cell in cells}, choice)
    assert [row.value for row in rows if row.is_base] == [made_in or "fp32"]


@pytest.mark.slow
def test_the_benchmark_from_its_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("sklearn")
    teacher, out, results = tmp_path / "teacher.pt", tmp_path / "out", tmp_path / "results"
    assert cli.main(f"teacher --dataset digits --architecture conv2-w8 --epochs 3 --out {teacher}".split()) == 0
    command = (
        f"--teacher-checkpoint {teacher} --out {out} --results {results} --ipc 1 --epochs 2 --iterations 1 --seeds 0 1 "
        "--student conv2-w8 --choices epsilon radius"
    ).split()
    assert equations.main([*command, "--collect"]) == 2
    assert "no student of the base" in capsys.readouterr().err
    assert equations.main(command) == 0
    printed = capsys.readouterr().out
    assert "[26/26]" in printed and "0.5 (base)" in printed and re.search(r"from the base \(\d+\.\d+ ± ", printed)
    (record,) = results.glob("*.json")
    read = json.loads(record.read_text())
    assert len(read["cells"]) == 26 and len(read["rows"]) == 14
    assert {path.suffix for path in results.iterdir()} == {".json", ".md", ".png"}
    assert str(tmp_path) not in record.read_text()
    for cell in out.glob("cells/*.json"):  # what has no student yet is no row
        if json.loads(cell.read_text())["student_options"].get("radius") == 0.7:
            cell.unlink()
    capsys.readouterr()
    assert equations.main([*command, "--collect"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("radius r") == 6 and " 0.7 " not in printed.split("radius r", 1)[1]


@pytest.mark.parametrize("command", [equations.main, pair_mass.main])
def test_a_missing_teacher_is_not_trained_but_named(
    command: Callable[[list[str]], int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    missing = tmp_path / "teacher.pt"
    assert command(["--dataset", "digits", "--teacher-checkpoint", str(missing), "--out", str(tmp_path / "out")]) == 2
    assert f"--teacher-checkpoint: found no file {missing}" in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


def test_scale_factors_of_one_ratio_are_set_side_by_side(grid: Grid) -> None:
    """What AdamW cannot tell apart; missing students are left out of both tables."""
    table: Table = {}
    for weights, tops in {(1.0, 1.0): (40, 50), (5.0, 5.0): (42, 52), (0.2, 1.0): (45, 47), (1.0, 5.0): (45,)}.items():
        cells = scale_factors.cells_at(grid, weights)
        table |= {cell: result_of(cell, top / 100) for cell, top in zip(cells, tops, strict=False)}
    found = scale_factors.top1_by_weights(grid, table)
    lines = [line.replace(" ", "").strip("|").split("|") for line in scale_factors.ratio_table(found).splitlines()[2:]]
    assert lines == [["1", "2", "46.00±7.07"], ["5", "2", "46.00±1.41", "+0.00±50.82"]]
    assert "| α_sce 0.2 |" in scale_factors.weights_table(found)
    assert "45.00" in scale_factors.weights_table(found)


def test_the_default_weights_are_the_base(grid: Grid) -> None:
    paths = {cell_path(grid, cell) for weights in scale_factors.EVERY for cell in scale_factors.cells_at(grid, weights)}
    assert len(paths) == 25 * 2 and {cell_path(grid, base) for base in grid.cells()} < paths


@pytest.mark.slow
def test_scale_factors_from_the_command_line(
    grid: Grid, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("sklearn")
    monkeypatch.setattr(scale_factors, "FACTORS", (0.2, 1.0))
    monkeypatch.setattr(scale_factors, "EVERY", ((1.0, 1.0), (0.2, 0.2), (0.2, 1.0), (1.0, 0.2)))
    made = f"teacher --dataset digits --architecture conv2-w8 --epochs 1 --device cpu --out {tmp_path}/small.pt"
    assert cli.main(made.split()) == 0
    command = (
        f"--dataset digits --teacher-checkpoint {tmp_path}/small.pt --out {tmp_path}/out --results {tmp_path}/results "
        "--ipc 1 --epochs 2 --images random-real --student conv2-w8 --seeds 0 --device cpu"
    ).split()
    assert scale_factors.main([*command, "--collect"]) == 2
    assert "holds no such student" in capsys.readouterr().err
    assert scale_factors.main(command) == 0
    (page,) = (tmp_path / "results").glob("*-scale-factors-digits-random-real.md")
    assert "| α_sce 0.2 |" in page.read_text() and page.with_suffix(".png").stat().st_size > 10_000
    assert len(list((tmp_path / "out" / "cells").iterdir())) == 4
