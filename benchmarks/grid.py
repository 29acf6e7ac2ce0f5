"""Builds datasets, trains students on them and keeps every result: what the accuracy benchmark and the demo run.

A cell is one student: images per class, kind of images, kind of labels, seed. Its result is a JSON file whose name
holds all that determines it, so an interrupted grid goes on with the cells that are missing.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from benchmarks.footprint import measure, soft_label_bytes
from benchmarks.results_io import write_json
from benchmarks.student import Labels, StudentConfig, train_student
from benchmarks.teacher import TeacherConfig, summary, train_and_save
from builders.config import BuildConfig
from builders.pipeline import build
from builders.sources import Source
from nrrdd_format.dataset import open_dataset
from nrrdd_format.shards import file_sha256

ImageKind = Literal["random-real", "discovery", "rded", "nrr", "nrr+lr"]

KEY_DIGITS = 10


@dataclass(frozen=True, kw_only=True)
class Grid:
    """What is measured, and how."""

    dataset: str
    data_dir: Path | None = None
    test_dir: Path | None = None
    out: Path
    """Holds the teacher, the datasets, the builds' work folders and the cells' results."""
    teacher_checkpoint: Path
    """Trained with `teacher` first where it is missing."""
    teacher: TeacherConfig
    ipcs: tuple[int, ...]
    images: tuple[ImageKind, ...]
    labels: tuple[Labels, ...]
    seeds: tuple[int, ...]
    student: str
    epochs: int
    """Of every student, and stored in every dataset."""
    iterations: int
    """Of refinement, for the kinds of images that are refined."""
    soft_temperature: float = 1.0
    device: str = "cpu"

    def cells(self) -> Iterator[Cell]:
        """All cells; those that share a dataset follow each other."""
        for ipc in self.ipcs:
            for seed in self.seeds:
                for images in self.images:
                    for labels in self.labels:
                        yield Cell(ipc=ipc, images=images, labels=labels, seed=seed)


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One student of a grid."""

    ipc: int
    images: ImageKind
    labels: Labels
    seed: int

    def __str__(self) -> str:
        return f"IPC {self.ipc}, {self.images} images, {self.labels} labels, seed {self.seed}"


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a cell came to.

    Attributes:
        top1: share of the real test images the student gets right after its last epoch.
        bytes_images: the encoded images.
        bytes_labels: what these labels take: nothing for one-hot, the dataset's labels for dbr and compact, a store of
            fp16 soft labels for soft.
        bytes_soft_labels: what soft labels of the same pairs take, measured on files.
        clipped_share: see `StudentResult`.
    """

    dataset: str
    ipc: int
    teacher: str
    teacher_top1: float | None
    student: str
    images: ImageKind
    labels: Labels
    seed: int
    epochs: int
    iterations: int
    top1: float
    bytes_images: int
    bytes_labels: float
    bytes_soft_labels: float
    clipped_share: float | None
    seconds: float


def run_grid(grid: Grid, source: Source) -> list[tuple[Cell, Result]]:
    """Runs every cell that has no result yet, saying each on a line; returns all results in the grid's order."""
    ensure_teacher(grid, source)
    cells = list(grid.cells())
    results = []
    for number, cell in enumerate(cells, start=1):
        result = run_cell(grid, cell, source)
        results.append((cell, result))
        print(f"[{number}/{len(cells)}] {cell}: top-1 {result.top1:.2%}", flush=True)
    return results


def run_cell(grid: Grid, cell: Cell, source: Source) -> Result:
    """The result of a cell: read where it is there, else built, trained, tested and written."""
    path = cell_path(grid, cell)
    if path.is_file():
        return Result(**json.loads(path.read_text()))
    dataset = dataset_path(grid, cell)
    if not dataset.is_dir():  # a folder under its final name is whole
        build(build_config(grid, cell))
    config = StudentConfig(
        labels=cell.labels,
        architecture=grid.student,
        epochs=grid.epochs,
        soft_temperature=grid.soft_temperature,
        teacher_checkpoint=grid.teacher_checkpoint,
        seed=cell.seed,
        device=grid.device,
    )
    student = train_student(dataset, source, config)
    with open_dataset(dataset) as opened:
        footprint, soft, teacher = measure(opened), soft_label_bytes(opened), opened.manifest.teacher
    result = Result(
        dataset=grid.dataset,
        **asdict(cell),
        teacher=teacher.architecture,
        teacher_top1=teacher.top1,
        student=grid.student,
        epochs=grid.epochs,
        iterations=grid.iterations,
        top1=student.top1,
        bytes_images=footprint.image_data,
        bytes_labels={"one-hot": 0.0, "soft": soft}.get(cell.labels, footprint.labels),
        bytes_soft_labels=soft,
        clipped_share=student.clipped_share,
        seconds=student.seconds,
    )
    write_json(path, asdict(result))
    return result


def ensure_teacher(grid: Grid, source: Source) -> None:
    """Trains the grid's teacher if its checkpoint is not there."""
    if not grid.teacher_checkpoint.is_file():
        log = train_and_save(source, grid.teacher, grid.teacher_checkpoint)
        print(f"teacher: {summary(log)}", flush=True)


def build_config(grid: Grid, cell: Cell) -> BuildConfig:
    """The build of a cell's images; builds of one seed share the results of the stages they have in common."""
    base = BuildConfig(
        dataset=grid.dataset,
        data_dir=grid.data_dir,
        test_dir=grid.test_dir,
        out=dataset_path(grid, cell),
        work_dir=grid.out / "work" / f"seed{cell.seed}",
        ipc=cell.ipc,
        teacher_checkpoint=grid.teacher_checkpoint,
        iterations=grid.iterations,
        epochs=grid.epochs,
        seed=cell.seed,
        device=grid.device,
    )
    if cell.images == "random-real":
        return replace(base, init="real", iterations=0)
    if cell.images == "discovery":
        return replace(base, iterations=0)
    if cell.images == "rded":
        return replace(base, confidence="highest", iterations=0)
    return replace(base, alpha_lr=0.0) if cell.images == "nrr" else base


def image_kind(method: dict[str, Any]) -> ImageKind:
    """The kind of images that a build with these settings (the manifest's `method`) makes: `build_config`'s inverse."""
    if method["refinement"]["iterations"]:
        return "nrr+lr" if method["refinement"]["alpha_lr"] else "nrr"
    if method["discovery"]["init"] == "real":
        return "random-real"
    return "rded" if method["discovery"]["confidence"] == "highest" else "discovery"


def dataset_path(grid: Grid, cell: Cell) -> Path:
    """The folder of a cell's dataset."""
    key = _key(grid.dataset, file_sha256(grid.teacher_checkpoint), grid.iterations, grid.epochs)
    return grid.out / "datasets" / f"ipc{cell.ipc}-{cell.images}-seed{cell.seed}-{key}"


def cell_path(grid: Grid, cell: Cell) -> Path:
    """The file of a cell's result."""
    key = _key(dataset_path(grid, cell).name, grid.student, grid.soft_temperature if cell.labels == "soft" else None)
    return grid.out / "cells" / f"ipc{cell.ipc}-{cell.images}-{cell.labels}-seed{cell.seed}-{key}.json"


def _key(*values: str | float | None) -> str:
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:KEY_DIGITS]
