"""What the grid takes up again: only what was made with the images and in the precision that are asked for."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from multiprocessing import active_children
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from grid_result import result_of
from make_dataset import make_tiny_dataset
from PIL import Image

from benchmarks import accuracy, teachers
from benchmarks.grid import (
    LABELS,
    Cell,
    Grid,
    Origin,
    build_config,
    cell_path,
    dataset_path,
    labelled_dataset,
    labelled_path,
    loss_text,
    precision,
    read_cells,
    refinement_text,
    run_grid,
    student_config,
)
from benchmarks.results_io import circumstances, circumstances_text, write_json
from benchmarks.teacher import TeacherConfig
from builders.sources import load_source
from loaders import CompletedDBRLoss
from nrrdd_format.errors import ConfigError, DataError
from nrrdd_format.manifest import MANIFEST_NAME, Manifest

ORIGIN = Origin(train="aaaa", test="bbbb")
FACTS = ("train_fingerprint", "test_fingerprint", "precision", "made")


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
        labels=("one-hot", "dbr"),
        seeds=(0,),
        student="conv2-w8",
        epochs=2,
        iterations=1,
    )


def _write(grid: Grid, cell: Cell, **facts: Any) -> Path:
    """A cell's file; without any of `FACTS` that is not given, as older ones."""
    values = {name: value for name, value in asdict(result_of(cell, 0.5)).items() if name not in FACTS} | facts
    write_json(cell_path(grid, cell), values)
    return cell_path(grid, cell)


def test_an_older_cell_without_the_facts_is_taken(grid: Grid) -> None:
    (cell, _) = grid.cells()
    _write(grid, cell)
    assert read_cells(grid, grid.cells(), ORIGIN)[cell].test_fingerprint is None


@pytest.mark.parametrize(
    ("fact", "message"),
    [
        ("train_fingerprint", "made with training images of fingerprint cccc, asked for aaaa"),
        ("test_fingerprint", "made with test images of fingerprint cccc, asked for bbbb"),
    ],
)
def test_a_cell_of_other_images_is_refused_by_name(grid: Grid, fact: str, message: str) -> None:
    (cell, _) = grid.cells()
    path = _write(grid, cell, train_fingerprint="aaaa", test_fingerprint="bbbb")
    assert cell in read_cells(grid, [cell], ORIGIN)
    _write(grid, cell, **{fact: "cccc"})
    with pytest.raises(ConfigError) as caught:
        read_cells(grid, [cell], ORIGIN)
    assert str(path) in str(caught.value) and message in str(caught.value) and "\n" not in str(caught.value)


def test_the_weight_of_the_distances_error_is_of_completed_labels_only(grid: Grid) -> None:
    alone = replace(grid, alpha_dbr=0.0, labels=("dbr", "dbr-further3", "soft"))
    dbr, completed, soft = alone.cells()
    assert student_config(alone, completed).alpha_dbr == 0
    assert cell_path(alone, completed) != cell_path(grid, completed)
    for cell in (dbr, soft):
        assert cell_path(alone, cell) == cell_path(grid, cell)
    assert accuracy.make_parser().parse_args(["--out", "x"]).alpha_dbr == grid.alpha_dbr == CompletedDBRLoss().alpha_dbr
    assert loss_text(alone) == " α_dbr 0 beside the KL of dbr-further3."
    assert loss_text(grid) == ""


def test_how_refinement_runs_tells_refined_images_apart_and_no_others(grid: Grid) -> None:
    """Compiled and in bfloat16 it gives other pixels, but patches that are not refined are the same."""
    fast = replace(grid, precision="bf16", compile=True)
    refined, _ = grid.cells()
    assert build_config(fast, refined).precision == "bf16" and build_config(fast, refined).compile
    assert len({cell_path(other, refined) for other in (grid, fast, replace(grid, compile=True))}) == 3
    assert precision(fast, refined) == "bf16"
    rded = replace(refined, images="rded")
    assert build_config(fast, rded) == build_config(grid, rded)
    assert cell_path(fast, rded) == cell_path(grid, rded)
    texts = [refinement_text(each) for each in (grid, fast)]
    assert texts == ["1 step of refinement", "1 step of refinement (bf16, compiled)"]


def test_precisions_are_not_mixed(grid: Grid) -> None:
    first, second = grid.cells()
    _write(grid, first, precision="bf16")
    assert len(read_cells(grid, grid.cells(), ORIGIN)) == 1
    _write(grid, second, precision="fp32")
    with pytest.raises(ConfigError, match="precision fp32, asked for bf16"):
        read_cells(grid, grid.cells(), ORIGIN)


def test_the_precision_is_the_devices_where_images_are_refined(grid: Grid, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    (cell, _) = grid.cells()
    assert precision(grid, cell) == "fp32"
    assert precision(replace(grid, device="cuda"), cell) == "bf16"
    assert precision(grid, replace(cell, images="random-real")) is None


def test_a_report_says_over_which_dates_and_versions_its_students_range() -> None:
    now = circumstances()
    other: dict[str, Any] = now | {"date": "2001-02-03", "versions": now["versions"] | {"torch": "0.1"}}
    text = circumstances_text([now, other, None])
    assert f"2001-02-03 to {now['date']}" in text and f"torch 0.1 and {now['versions']['torch']}" in text
    assert "not recorded for 1 older ones of 3" in text and "\n" not in text
    assert "not recorded" not in circumstances_text([now, now]) and "to 20" not in circumstances_text([now])
    assert "is not recorded" in circumstances_text([None])


def _images(folder: Path, shift: int, count: int) -> Path:
    """Noise in which each of three classes has its own colour."""
    rng = np.random.default_rng(shift)
    for label in range(3):
        (folder / f"class {label}").mkdir(parents=True)
        for number in range(count):
            pixels = rng.integers(0, 100, (16, 16, 3), np.uint8)
            pixels[..., label] += 150
            Image.fromarray(pixels).save(folder / f"class {label}" / f"{number}.png")
    return folder


@pytest.mark.slow
def test_students_and_datasets_of_other_images_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train, held_out, test = (_images(tmp_path / name, shift, 8) for shift, name in enumerate(("train", "held", "test")))
    (tmp_path / "test" / "class 0" / "more.png").write_bytes((tmp_path / "test" / "class 0" / "0.png").read_bytes())

    def status(training: Path, tested: Path, *labels: str, collect: bool = False) -> int:
        command = (
            f"--dataset imagefolder --data-dir {training} --test-dir {tested} --out {tmp_path}/out "
            f"--results {tmp_path}/results --ipc 1 --epochs 2 --iterations 1 --images nrr --student conv2-w8 "
            "--teacher conv2-w8 --teacher-epochs 12 --device cpu --labels"
        )
        return accuracy.main([*command.split(), *labels, *(["--collect"] if collect else [])])

    assert status(train, held_out, "one-hot") == 0
    (cell,) = (tmp_path / "out" / "cells").iterdir()
    stored = json.loads(cell.read_text())
    assert stored["precision"] == "fp32" and stored["made"]["versions"]["torch"]
    assert "Students trained" in next((tmp_path / "results").glob("*.md")).read_text()
    assert status(train, held_out, "one-hot", collect=True) == 0
    for collect in (False, True):
        capsys.readouterr()
        assert status(train, test, "one-hot", collect=collect) == 2
        assert f"error: {cell}: made with test images" in capsys.readouterr().err
    assert status(train, test, "compact") == 0  # the dataset is the same, the student is another
    assert status(train, test, "dbr-further3") == 0  # of three classes: two in a prior, one further
    assert status(train, test, "dbr-further3", "--alpha-dbr", "0") == 0  # nor is this the same student
    stored = [json.loads(path.read_text()) for path in (tmp_path / "out" / "cells").glob("*-dbr-further3-*")]
    assert sorted(result["alpha_dbr"] for result in stored) == [0.0, 0.5]
    assert status(test, held_out, "dbr") == 2
    dataset = min((tmp_path / "out" / "datasets").iterdir())
    assert f"error: {dataset}: made with training images" in capsys.readouterr().err
    assert len(list((tmp_path / "out" / "cells").iterdir())) == 4


def test_labels_are_completed_by_no_more_classes_than_there_are() -> None:
    kind = LABELS["dbr-further3"]
    assert [(kind.within(n).priors, kind.within(n).further) for n in (100, 10, 4, 2)] == [
        (9, 3),
        (9, 3),
        (3, 2),
        (1, None),
    ]


def test_collecting_without_a_teacher_names_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("sklearn")
    assert accuracy.main(["--dataset", "digits", "--out", str(tmp_path / "out"), "--collect"]) == 2
    error = capsys.readouterr().err
    assert f"--teacher-checkpoint: found no file {tmp_path / 'out' / 'teacher.pt'}" in error and error.count("\n") == 1


def test_a_completed_copy_of_another_dataset_is_refused(grid: Grid) -> None:
    cell = Cell(ipc=1, images="nrr+lr", labels="dbr-further1", seed=0)
    built, copy = dataset_path(grid, cell), labelled_path(grid, cell)
    make_tiny_dataset(built)
    manifest = Manifest.load(built / MANIFEST_NAME)
    replace(manifest, method={"refinement": {"iterations": 1}}).save(built / MANIFEST_NAME)
    shutil.copytree(built, copy)
    assert labelled_dataset(grid, cell, ORIGIN) == copy
    shutil.rmtree(built)
    make_tiny_dataset(built, seed=1)
    other = Manifest.load(built / MANIFEST_NAME)
    replace(other, method={"refinement": {"iterations": 1}}).save(built / MANIFEST_NAME)
    with pytest.raises(ConfigError, match="completed from another dataset than") as caught:
        labelled_dataset(grid, cell, ORIGIN)
    assert str(caught.value).startswith(f"{copy}: ")


def test_a_student_that_cannot_be_trained_or_tested_is_refused_before_any_work(grid: Grid, tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    source = load_source("digits", data_dir=None)
    grid = replace(grid, teacher_checkpoint=tmp_path / "none.pt")
    with pytest.raises(ConfigError, match="nosuch"):
        run_grid(replace(grid, student="nosuch"), source)
    with pytest.raises(DataError, match="--test-dir"):
        run_grid(grid, replace(source, test=None))
    assert [path.name for path in tmp_path.iterdir()] == ["teacher.pt"]


def test_a_report_tells_every_top1_of_its_teacher(grid: Grid) -> None:
    """Datasets built beside different test images name different ones."""
    tops = zip(grid.cells(), (0.369, 0.358), strict=True)
    table = {cell: replace(result_of(cell, 0.5), teacher_top1=top) for cell, top in tops}
    assert accuracy.report(grid, table).startswith(
        "Teacher conv2, top-1 35.80% to 36.90% on up to 1,000 real images; student conv2-w8"
    )
    assert teachers.Taught(grid=grid, table=table).top1 == "35.8 to 36.9"
    cell = next(grid.cells())
    for top1, told in ((0.5, "Teacher conv2, top-1 50.00% on"), (None, "Teacher conv2; student")):
        assert accuracy.report(grid, {cell: replace(table[cell], teacher_top1=top1)}).startswith(told)


def test_a_report_on_teachers_says_how_images_are_refined(grid: Grid) -> None:
    table = {cell: result_of(cell, 0.5) for cell in grid.cells()}
    taught = teachers.Taught(grid=replace(grid, precision="fp32", compile=True), table=table)
    assert "; 1 step of refinement (fp32, compiled); 1 seed." in teachers.report([taught])


def test_no_student_is_trained_beside_those_of_another_precision(grid: Grid) -> None:
    pytest.importorskip("sklearn")
    first, second = grid.cells()
    path = _write(grid, first, precision="bf16")
    with pytest.raises(ConfigError, match="precision bf16, asked for fp32") as caught:
        run_grid(grid, load_source("digits", data_dir=None))
    assert str(path) in str(caught.value) and not cell_path(grid, second).exists()


def test_students_that_name_their_precision_are_read_beside_those_that_do_not(grid: Grid) -> None:
    plain, _ = grid.cells()
    named = replace(plain, build=(("precision", "bf16"),))
    _write(grid, plain, precision="fp32")
    _write(grid, named, precision="bf16")
    assert set(read_cells(grid, [plain, named], ORIGIN)) == {plain, named}


@pytest.mark.slow
def test_students_are_trained_in_several_processes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train, test = (_images(tmp_path / name, shift, 8) for shift, name in enumerate(("train", "test")))
    command = (
        f"--dataset imagefolder --data-dir {train} --test-dir {test} --out {tmp_path}/out --results {tmp_path}/results "
        "--ipc 1 --epochs 2 --iterations 1 --images nrr random-real --student conv2-w8 --teacher conv2-w8 "
        "--teacher-epochs 12 --device cpu --labels one-hot dbr"
    ).split()
    assert accuracy.main([*command, "--processes", "2"]) == 0
    assert "[4/4]" in capsys.readouterr().out
    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "cells").iterdir()}
    assert len(made) == 4
    assert accuracy.main(command) == 0  # all are there
    assert made == {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "cells").iterdir()}


def _fails(grid: Grid, cells: list[Cell], origin: Origin) -> list[object]:
    """In the place of `_run_cells`: the first group fails, the others note that they ran."""
    if cells[0].seed == 0:
        raise ConfigError("no such thing")
    time.sleep(2)
    (grid.out / f"ran-{cells[0].seed}").touch()
    return []


def _dies(grid: Grid, cells: list[Cell], origin: Origin) -> list[object]:
    os.kill(os.getpid(), signal.SIGKILL)
    return []


@pytest.mark.slow
@pytest.mark.parametrize(("run", "message"), [(_fails, "no such thing"), (_dies, "has died.*--processes")])
def test_what_is_left_is_not_run_after_an_error(
    grid: Grid, run: Callable[..., Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("sklearn")
    monkeypatch.setattr("benchmarks.grid._run_cells", run)
    many = replace(grid, seeds=tuple(range(8)))
    with pytest.raises(ConfigError, match=message):
        run_grid(many, load_source("digits", data_dir=None), processes=2)
    assert not active_children()
    assert len(list(grid.out.glob("ran-*"))) <= 1
