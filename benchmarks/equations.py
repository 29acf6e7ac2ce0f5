"""The method's open choices, one at a time: what each alternative changes in a student's top-1.

The paper leaves parts of its equations open (docs/method.md marks them). `python -m benchmarks.equations --dataset
cifar10 --data-dir DIR --teacher-checkpoint FILE --out DIR` trains a student on images of one kind and one for every
value of every choice, all else equal, and compares them seed by seed. Cells are those of `benchmarks.grid`: each is
run once. Settings are chosen on held-out training images (`benchmarks.hold_out`), not on those a report tests on.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from matplotlib.figure import Figure

from benchmarks.accuracy import add_refinement
from benchmarks.command import Several, add_alpha_dbr, add_device, add_source, pick_device, run, whole
from benchmarks.grid import (
    IMAGES,
    LABELS,
    Cell,
    Changes,
    Grid,
    Origin,
    Table,
    cell_path,
    loss_text,
    precision,
    read_cell,
    read_cells,
    refinement_text,
    require_teacher,
    run_grid,
    stored_epochs,
    teacher_text,
)
from benchmarks.results_io import Picture, circumstances_text, markdown_table, provenance, write_report
from benchmarks.spread import gaps, interval, spread
from benchmarks.student import LABELS_OF_OPTION
from benchmarks.teacher import TeacherConfig
from builders.config import PATCH_OPTIONS, idle_options
from builders.sources import Source, load_source
from nrrdd_format.errors import ConfigError

MODULE = "benchmarks.equations"
RESULTS = Path("benchmarks") / "results"


@dataclass(frozen=True, kw_only=True)
class Choice:
    """An option of the build (`BuildConfig`) or of the student (`StudentConfig`), and the values it is tried at."""

    title: str
    of: Literal["build", "student"]
    option: str
    values: tuple[Any, ...]

    def cell(self, base: Cell, value: Any) -> Cell:
        """The base cell with this option at a value."""
        changes: Changes = ((self.option, value),)
        return Cell(
            ipc=base.ipc,
            images=base.images,
            labels=base.labels,
            seed=base.seed,
            build=changes if self.of == "build" else (),
            student=changes if self.of == "student" else (),
        )


CHOICES = {
    choice.option.replace("_", "-"): choice
    for choice in (
        Choice(
            title="patches kept, by confidence", of="build", option="confidence", values=("highest", "random", "lowest")
        ),
        Choice(title="activation in a crop", of="build", option="crop_score", values=("sum", "mean")),
        Choice(title="initial images", of="build", option="init", values=("cidd", "real")),
        Choice(title="mask", of="build", option="mask", values=("non-critical", "binary", "all")),
        Choice(title="ε of the mask", of="build", option="epsilon", values=(0.1, 0.3, 0.4, 0.5, 0.6, 0.7, 0.9)),
        Choice(title="steps between activation maps (0: one map)", of="build", option="cam_every", values=(0, 50)),
        Choice(title="α_bn", of="build", option="alpha_bn", values=(0.0, 0.001, 0.01, 0.1, 1.0)),
        Choice(title="α_lr", of="build", option="alpha_lr", values=(0.0, 0.3, 1.0, 3.0, 10.0)),
        Choice(title="label refinement", of="build", option="label_refinement", values=("soft", "pair")),
        Choice(title="views in label refinement", of="build", option="label_refinement_views", values=(True, False)),
        Choice(title="jitter in refinement", of="build", option="jitter", values=(False, True)),
        Choice(title="steps of refinement", of="build", option="iterations", values=(100, 200, 500, 1000, 2000)),
        Choice(title="learning rate of refinement", of="build", option="learning_rate", values=(0.05, 0.1, 0.25, 0.5)),
        Choice(title="precision of refinement", of="build", option="precision", values=("fp32", "bf16")),
        Choice(title="schedule of refinement", of="build", option="schedule", values=("cosine", "constant")),
        Choice(title="temperature of the distances", of="build", option="temperature", values=(1.0, 2.0, 4.0)),
        Choice(title="smallest area of a view", of="build", option="view_scale", values=(0.08, 0.5, 0.8, 1.0)),
        Choice(
            title="bound of the cross-entropy",
            of="student",
            option="sce",
            values=("sample", "batch", "target", "entropy"),
        ),
        Choice(title="α_sce", of="student", option="alpha_sce", values=(0.0, 0.2, 0.5, 1.0, 3.0)),
        Choice(title="radius r", of="student", option="radius", values=(0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7)),
        Choice(title="error of a distance", of="student", option="distance", values=("l1", "huber", "squared")),
        Choice(
            title="temperature of soft and completed labels",
            of="student",
            option="soft_temperature",
            values=(1.0, 2.0, 4.0, 8.0, 20.0),
        ),
        Choice(title="α_dbr", of="student", option="alpha_dbr", values=(0.0, 0.2, 0.5, 1.0, 3.0)),
        Choice(title="pairs in a batch of the student", of="student", option="batch_size", values=(10, 25, 50, 100)),
        Choice(title="epochs of the student", of="student", option="epochs", values=(100, 300, 1000, 3000)),
    )
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    options = make_parser().parse_args(arguments)
    return run(lambda: measure_equations(options))


def make_parser() -> argparse.ArgumentParser:
    """The command's parser."""
    parser = argparse.ArgumentParser(
        prog=f"python -m {MODULE}",
        description="Measure the method's open choices, one at a time.",
        epilog=f"example:\n  python -m {MODULE} --dataset cifar10 --data-dir data/cifar10-held-out \\\n"
        "      --teacher-checkpoint cifar10-teacher.pt --seeds 0 1 2 --out equations",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--choices",
        action=Several,
        choices=tuple(CHOICES),
        metavar="OPTION",
        help=f"of {', '.join(CHOICES)} (all that matter for the images)",
    )
    parser.add_argument("--labels", choices=tuple(LABELS), default="dbr", metavar="KIND", help="of the students (dbr)")
    add_alpha_dbr(parser)
    add_base(parser)
    return parser


def add_base(parser: argparse.ArgumentParser) -> None:
    """Adds the options of what is varied: images, their teacher and how students are trained."""
    add_source(parser, default="digits")
    parser.add_argument("--teacher-checkpoint", type=Path, required=True, metavar="FILE", help="a trained teacher")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="keeps datasets and results")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="DIR", help=f"for the report ({RESULTS})")
    parser.add_argument("--name", metavar="NAME", help="of the report's files (the dataset's and the images')")
    parser.add_argument("--images", choices=tuple(IMAGES), default="nrr+lr", metavar="KIND", help="(nrr+lr)")
    parser.add_argument("--ipc", type=whole(1), default=10, metavar="N", help="images per class (10)")
    parser.add_argument("--epochs", type=whole(1), default=300, metavar="N", help="of training (300)")
    parser.add_argument(
        "--stored-epochs", type=whole(1), metavar="N", help="in a dataset; fewer are repeated (--epochs)"
    )
    parser.add_argument("--iterations", type=whole(0), default=500, metavar="N", help="of refinement (500)")
    add_refinement(parser)
    parser.add_argument("--student", metavar="ARCH", help="the students' network (the dataset's default)")
    parser.add_argument("--seeds", type=whole(0), action=Several, default=[0, 1, 2], metavar="N", help="(0 1 2)")
    parser.add_argument("--collect", action="store_true", help="run nothing: report on the cells that OUT holds")
    add_device(parser)


def measure_equations(options: argparse.Namespace) -> int:
    """Runs the students, prints the report and writes it; returns the exit status."""
    require_teacher(options.teacher_checkpoint)
    source = load_source(options.source, data_dir=options.data_dir, test_dir=options.test_dir)
    grid = replace(make_grid(options, source, labels=options.labels), alpha_dbr=options.alpha_dbr)
    choices = (
        choices_for(options.images, options.labels)
        if options.choices is None
        else [CHOICES[name] for name in options.choices]
    )
    cells = all_cells(grid, choices)
    table = read_cells(grid, cells, Origin.of(source)) if options.collect else run_grid(grid, source, cells)
    if not any(cell in table for cell in grid.cells()):
        raise ConfigError(f"--collect: {grid.out} holds no student of the base; run without --collect first")
    rows = [row for choice in choices for row in compare(grid, table, choice) if row.top1]
    text = report(grid, table, rows)
    print(f"\n{text}")
    name = options.name or f"{grid.dataset}-{options.images}"
    write_report(
        options.results,
        f"equations-{name}",
        provenance(MODULE, seeds=grid.seeds),
        {"rows": [asdict(row) for row in rows], "cells": [asdict(result) for result in table.values()]},
        title=f"The method's open choices, on {name}",
        text=text,
        pictures=[Picture("differences", plot(rows))],
    )
    return 0


def make_grid(options: argparse.Namespace, source: Source, *, labels: str) -> Grid:
    """The grid whose cells are varied, with the loss's default weights."""
    return Grid(
        dataset=options.source,
        data_dir=options.data_dir,
        test_dir=options.test_dir,
        out=options.out,
        teacher_checkpoint=options.teacher_checkpoint,
        teacher=TeacherConfig(),
        ipcs=(options.ipc,),
        images=(options.images,),
        labels=(labels,),
        seeds=tuple(options.seeds),
        student=options.student or source.default_model,
        epochs=options.epochs,
        stored_epochs=options.stored_epochs,
        iterations=options.iterations,
        precision=options.precision,
        compile=options.compile,
        device=pick_device(options.device),
    )


def choices_for(images: str, labels: str) -> list[Choice]:
    """The choices that matter for images of one kind and students on labels of one kind."""
    kind, learned = IMAGES[images], LABELS[labels].labels
    building: set[str] = set()  # options of the build that are left out
    if kind.init != "cidd":
        building.update(PATCH_OPTIONS)
    if not kind.refined:
        building.add("iterations")  # more than none would make images another kind
    idle = idle_options(iterations=int(kind.refined), mask=kind.mask, alpha_lr=float(kind.label_refinement))
    building.update(*idle.values())
    if learned not in ("dbr", "dbr-completed", "compact"):
        building.add("temperature")  # of distances that such students do not see
    training = {option for option, kinds in LABELS_OF_OPTION.items() if learned not in kinds}
    left_out = {"build": building, "student": training}
    return [choice for choice in CHOICES.values() if choice.option not in left_out[choice.of]]


def cell_of(grid: Grid, choice: Choice, base: Cell, value: Any) -> Cell:
    """The base cell with a choice at a value: itself where it leaves the precision to a device that takes this one."""
    return base if choice.option == "precision" and value == _base_precision(grid, base) else choice.cell(base, value)


def _base_precision(grid: Grid, base: Cell) -> str | None:
    """What the base was refined in, maybe on another device, or will be."""
    result = read_cell(grid, base)
    return result.precision if result else precision(grid, base)


def all_cells(grid: Grid, choices: Sequence[Choice]) -> list[Cell]:
    """The base and every value of every choice, seed by seed; a value that is the base's is not run again."""
    cells: dict[Path, Cell] = {}
    for base in grid.cells():
        for cell in [base, *(cell_of(grid, choice, base, value) for choice in choices for value in choice.values)]:
            cells.setdefault(cell_path(grid, cell), cell)
    return list(cells.values())


@dataclass(frozen=True, kw_only=True)
class Row:
    """A value of a choice: top-1 in percent of the seeds that have both it and the base, and the base's."""

    choice: str
    value: str
    is_base: bool
    top1: tuple[float, ...]
    base_top1: tuple[float, ...]


def compare(grid: Grid, table: Table, choice: Choice) -> list[Row]:
    """A row for every value of a choice."""
    by_path = {cell_path(grid, cell): 100 * result.top1 for cell, result in table.items()}
    rows = []
    for value in choice.values:
        paths = [(cell_path(grid, base), cell_path(grid, cell_of(grid, choice, base, value))) for base in grid.cells()]
        both = [(by_path[base], by_path[cell]) for base, cell in paths if base in by_path and cell in by_path]
        rows.append(
            Row(
                choice=choice.title,
                value=str(value),
                is_base=all(base == cell for base, cell in paths),
                top1=tuple(cell for _, cell in both),
                base_top1=tuple(base for base, _ in both),
            )
        )
    return rows


def report(grid: Grid, table: Table, rows: Sequence[Row]) -> str:
    """What was measured, as Markdown."""
    base = [100 * table[cell].top1 for cell in grid.cells() if cell in table]
    intro = (
        f"{setting_text(grid, table)} One choice at a time differs from the base ({spread(base)}). Top-1 "
        "in %, mean ± standard deviation over seeds; differences from the base are paired by seed, in points, with "
        f"the 95 % interval of their mean.{loss_text(grid)}"
    )
    lines = [
        [
            row.choice,
            row.value + (" (base)" if row.is_base else ""),
            spread(row.top1),
            interval(row.base_top1, row.top1) if not row.is_base else "",
            str(len(row.top1)),
        ]
        for row in rows
    ]
    made = circumstances_text([result.made for result in table.values()])
    return f"{intro}\n\n{made}\n\n{markdown_table(['choice', 'value', 'top-1 %', 'against the base', 'seeds'], lines)}"


def setting_text(grid: Grid, table: Table) -> str:
    """What images, labels and networks the students had, for a report."""
    first = next(iter(table.values()))
    teacher = teacher_text(first.teacher, (result.teacher_top1 for result in table.values()))
    steps = f" with {refinement_text(grid)}" if IMAGES[first.images].refined else ""
    return (
        f"{grid.dataset}, IPC {first.ipc}, {first.images} images{steps}, {first.labels} labels. Teacher {teacher}; "
        f"student {grid.student}; {grid.epochs} epochs of {stored_epochs(grid)} stored ones; tested on "
        f"{first.test_images:,} real images after the last epoch."
    )


def plot(rows: Sequence[Row]) -> Figure:
    """The differences from the base, a line for every other value, a point a seed, and the means."""
    shown = [row for row in rows if not row.is_base]
    figure = Figure(figsize=(7.5, 1.2 + 0.24 * len(shown)), layout="constrained")
    axis = figure.subplots()
    for place, row in enumerate(shown):
        points = gaps(row.base_top1, row.top1)
        axis.plot(points, [place] * len(points), "o", color="0.6", markersize=3)
        axis.plot(float(np.mean(points)), place, "|", color="C0", markersize=12, markeredgewidth=2)
    axis.axvline(0, color="0.3", linewidth=0.8)
    axis.set_yticks(range(len(shown)), [f"{row.choice}: {row.value}" for row in shown], fontsize=7)
    axis.invert_yaxis()
    axis.set_xlabel("points of top-1 against the base")
    return figure


if __name__ == "__main__":
    raise SystemExit(main())
