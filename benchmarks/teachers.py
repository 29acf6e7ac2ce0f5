"""Top-1 of students by the teacher that labels their images, how long it was trained, and both networks.

`python -m benchmarks.teachers --teacher-checkpoint 3.pt 20.pt … --out DIR` runs the grid of `benchmarks.accuracy` once
for each teacher (`nrrdd teacher`), in the same resumable way: the teacher crops, refines, labels and, for soft labels,
is asked by the student. With several `--student` networks it does so for each: a distilled dataset should serve other
networks than its teacher's (the paper's Table 3).
"""

from __future__ import annotations

import argparse
import json
from argparse import Namespace
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from statistics import mean, stdev

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.accuracy import (
    RECOVERED,
    add_grid,
    make_grid,
    paired,
    recovery,
    run_or_collect,
    spread_of,
    top1,
)
from benchmarks.command import Several, run
from benchmarks.grid import Grid, Table, loss_text, refinement_text, require_teacher, stored_epochs, top1_range
from benchmarks.results_io import Picture, circumstances_text, markdown_table, provenance, write_report
from benchmarks.student import check_student
from builders.sources import load_source
from builders.teacher import PREFLIGHT_IMAGES
from nrrdd_format.errors import ConfigError, counted

MODULE = "benchmarks.teachers"


@dataclass(frozen=True, kw_only=True)
class Taught:
    """One teacher, one network, and the students of their grid (at least one)."""

    grid: Grid
    table: Table

    @property
    def name(self) -> str:
        """The teacher's network, and its epochs of training where a log beside the checkpoint tells them."""
        architecture = next(iter(self.table.values())).teacher
        log = self.grid.teacher_checkpoint.with_name(self.grid.teacher_checkpoint.name + ".json")
        if not log.is_file():
            return architecture
        return f"{architecture}, {counted(json.loads(log.read_text())['epochs'], 'epoch')}"

    @property
    def top1(self) -> str:
        """The teacher's, in percent; a dash where it is not known."""
        tops = (result.teacher_top1 for result in self.table.values())
        return top1_range(tops, lambda top: f"{100 * top:.1f}") or "-"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    options = make_parser().parse_args(arguments)
    return run(lambda: measure_teachers(options))


def make_parser() -> argparse.ArgumentParser:
    """The command's parser."""
    parser = argparse.ArgumentParser(
        prog=f"python -m {MODULE}",
        description="Measure students' top-1 by teacher, by their own network, and by kinds of images and labels.",
        epilog=f"examples:\n  python -m {MODULE} --dataset digits --teacher-checkpoint short.pt long.pt --out out\n"
        f"  python -m {MODULE} --dataset digits --teacher-checkpoint conv2.pt resnet18.pt \\\n"
        "      --student conv2 resnet18-small mobilenet_v2 --images nrr+lr --out architectures",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_grid(parser)
    parser.add_argument(
        "--teacher-checkpoint", type=Path, action=Several, required=True, metavar="FILE", help="trained teachers"
    )
    parser.add_argument("--student", action=Several, metavar="ARCH", help="students' networks (the dataset's default)")
    return parser


def measure_teachers(options: Namespace) -> int:
    """Runs a grid for every network and teacher, prints the report and writes it; returns the exit status."""
    source = load_source(options.source, data_dir=options.data_dir, test_dir=options.test_dir)
    students = options.student or [source.default_model]
    for checkpoint in options.teacher_checkpoint:  # all, before hours are spent with the first
        require_teacher(checkpoint)
    for student in students:
        check_student(student, source)
    taught = []
    for student, checkpoint in product(students, options.teacher_checkpoint):
        alone = {"student": student, "teacher_checkpoint": checkpoint, "teacher": None, "teacher_epochs": None}
        grid = make_grid(Namespace(**vars(options) | alone), source)
        if table := run_or_collect(grid, source, options):
            taught.append(Taught(grid=grid, table=table))
    if not taught:
        raise ConfigError(f"--collect: {options.out} holds no cell of these grids; run it without --collect first")
    text = report(taught)
    print(f"\n{text}")
    name = options.name or taught[0].grid.dataset
    write_report(
        options.results,
        f"teachers-{name}",
        provenance(MODULE, seeds=taught[0].grid.seeds),
        {"cells": [asdict(result) for each in taught for result in each.table.values()]},
        title=f"Teachers and students on {name}",
        text=text,
        pictures=[Picture("top-1", plot(taught))],
    )
    return 0


def report(taught: Sequence[Taught]) -> str:
    """The tables and what they were made with, as Markdown."""
    grid = taught[0].grid
    results = [result for each in taught for result in each.table.values()]
    parts = [
        f"Students of {grid.epochs} epochs of {stored_epochs(grid)} stored ones; {refinement_text(grid)}; "
        f"{counted(len(grid.seeds), 'seed')}. Top-1 in % on {results[0].test_images:,} real test images after "
        "the last epoch, mean ± standard deviation over seeds; (of n): over n of them; a teacher's on up "
        f"to {PREFLIGHT_IMAGES:,}.{loss_text(grid)}",
        circumstances_text([result.made for result in results]),
        accuracy_table(taught),
    ]
    if any(each.grid.teacher_checkpoint != grid.teacher_checkpoint for each in taught):
        parts += [
            f"Against the first teacher ({taught[0].name}), seed by seed, in points: mean and its 95 % interval.",
            difference_table(taught),
        ]
    if {"one-hot", "soft"} < set(grid.labels):
        parts += [RECOVERED, recovery_table(taught)]
    return "\n\n".join(parts)


def accuracy_table(taught: Sequence[Taught]) -> str:
    """Top-1 by images, student and teacher (rows) and labels (columns)."""
    grid = taught[0].grid
    rows = [
        [*start, *(spread_of(tops[labels], len(grid.seeds)) for labels in grid.labels)]
        for _, start, tops in _rows(taught)
    ]
    return markdown_table([*START, *grid.labels], rows)


def difference_table(taught: Sequence[Taught]) -> str:
    """What each teacher but the first changes, by images, student and teacher (rows) and labels (columns)."""
    grid = taught[0].grid
    first: dict[tuple[str, str], dict[str, dict[int, float]]] = {}  # top-1 by the first teacher: images and student
    rows = []
    for each, start, tops in _rows(taught):
        of = start[0], each.grid.student
        if each.grid.teacher_checkpoint == grid.teacher_checkpoint:
            first[of] = tops
        elif of in first:
            rows.append([*start, *(paired(first[of][labels], tops[labels]) for labels in grid.labels)])
    return markdown_table([*START, *grid.labels], rows)


def recovery_table(taught: Sequence[Taught]) -> str:
    """The share of soft labels' gain over one-hot: images, student and teacher (rows), labels (columns)."""
    between = [labels for labels in taught[0].grid.labels if labels not in ("one-hot", "soft")]
    rows = [
        [*start, *(recovery(tops["one-hot"], tops[labels], tops["soft"]) for labels in between)]
        for _, start, tops in _rows(taught)
    ]
    return markdown_table([*START, *between], rows)


START = ("images", "student", "teacher", "its top-1")


def _rows(taught: Sequence[Taught]) -> Iterator[tuple[Taught, list[str], dict[str, dict[int, float]]]]:
    """For each kind of images and each grid: what begins the line, and by labels and seed the top-1 in percent."""
    grid = taught[0].grid
    for ipc in grid.ipcs:
        for images in grid.images:
            for each in taught:
                tops = {labels: top1(each.grid, each.table, ipc, images, labels) for labels in grid.labels}
                yield each, [f"IPC {ipc}, {images}", each.grid.student, each.name, each.top1], tops


def plot(taught: Sequence[Taught]) -> Figure:
    """A panel for each kind of images, a group of bars for each student's network and teacher."""
    grid = taught[0].grid
    panels = [(ipc, images) for ipc in grid.ipcs for images in grid.images]
    width = max(4.0, 1.6 * len(taught))
    figure = Figure(figsize=(width * len(panels) + 1, 3.8), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    for axis, (ipc, images) in zip(axes, panels, strict=True):
        _draw_panel(axis, taught, ipc, images)
    axes[0].set_ylabel("top-1 of the student, %")
    axes[-1].legend(fontsize=7)
    return figure


def _draw_panel(axis: Axes, taught: Sequence[Taught], ipc: int, images: str) -> None:
    labels_of = taught[0].grid.labels
    width = 0.8 / len(labels_of)
    for number, labels in enumerate(labels_of):
        values = [list(top1(each.grid, each.table, ipc, images, labels).values()) for each in taught]
        places = [group + (number - (len(labels_of) - 1) / 2) * width for group in range(len(taught))]
        error = [stdev(each) if len(each) > 1 else 0.0 for each in values]
        axis.bar(places, [mean(each) if each else 0.0 for each in values], width, yerr=error, capsize=2, label=labels)
    names = [f"{each.name}\n{each.top1} %\n→ {each.grid.student}" for each in taught]
    axis.set_xticks(range(len(taught)), names, fontsize=7)
    axis.set_title(f"IPC {ipc}, {images} images")


if __name__ == "__main__":
    raise SystemExit(main())
