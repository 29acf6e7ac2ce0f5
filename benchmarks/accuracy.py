"""Top-1 of students on the same images with different labels, and on different images with the same labels.

`python -m benchmarks.accuracy --dataset digits --seeds 0 1 2 --out DIR` runs a grid of students, each cell once:
started again, it goes on with those that are missing, and `--collect` reports on those that are there. Kinds of images
and labels are those of `benchmarks.grid`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from statistics import mean, stdev
from typing import get_args

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.command import Several, add_alpha_dbr, add_device, add_source, pick_device, run, whole
from benchmarks.grid import (
    IMAGES,
    LABELS,
    Cell,
    Grid,
    Origin,
    Table,
    loss_text,
    read_cells,
    refinement_text,
    require_teacher,
    run_grid,
    stored_epochs,
    teacher_text,
)
from benchmarks.results_io import Picture, circumstances_text, markdown_table, provenance, write_report
from benchmarks.spread import interval, spread
from benchmarks.teacher import TeacherConfig
from builders.config import Precision
from builders.sources import Source, load_source
from nrrdd_format.errors import ConfigError, counted

MODULE = "benchmarks.accuracy"
RESULTS = Path("benchmarks") / "results"
RECOVERED = "Of what soft labels gain over one-hot, these labels recover, in %, over the seeds that have all three:"


@dataclass(frozen=True, kw_only=True)
class Preset:
    """Settings that trade time for closeness to the paper."""

    ipcs: tuple[int, ...]
    epochs: int
    iterations: int
    teacher_epochs: int


PRESETS = {
    "quick": Preset(ipcs=(10,), epochs=100, iterations=200, teacher_epochs=30),
    "full": Preset(ipcs=(1, 10, 50), epochs=300, iterations=2000, teacher_epochs=100),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    options = make_parser().parse_args(arguments)
    return run(lambda: measure_accuracy(options))


def make_parser() -> argparse.ArgumentParser:
    """The command's parser."""
    parser = argparse.ArgumentParser(
        prog=f"python -m {MODULE}",
        description="Measure students' top-1 by kind of images and kind of labels.",
        epilog=f"example:\n  python -m {MODULE} --dataset digits --preset quick --seeds 0 1 2 --out accuracy-digits",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_grid(parser)
    parser.add_argument("--student", metavar="ARCH", help="the students' network (the dataset's default)")
    parser.add_argument("--teacher", metavar="ARCH", help="the network to train as teacher (the dataset's default)")
    parser.add_argument("--teacher-epochs", type=whole(1), metavar="N", help="of its training (preset's)")
    parser.add_argument("--teacher-checkpoint", type=Path, metavar="FILE", help="a trained teacher (OUT/teacher.pt)")
    return parser


def add_grid(parser: argparse.ArgumentParser) -> None:
    """Adds the options of a grid, but those of its networks."""
    add_source(parser, default="digits")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="keeps teacher, datasets and results")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="DIR", help=f"for the report ({RESULTS})")
    parser.add_argument("--name", metavar="NAME", help="of the report's files (the dataset's)")
    parser.add_argument("--preset", choices=tuple(PRESETS), default="quick", help="quick (default) or full")
    parser.add_argument(
        "--seeds", type=whole(0), action=Several, default=[0], metavar="N", help="a build and students for each (0)"
    )
    parser.add_argument("--ipc", type=whole(1), action=Several, metavar="N", help="images per class (preset's)")
    parser.add_argument("--epochs", type=whole(1), metavar="N", help="of training (preset's)")
    parser.add_argument(
        "--stored-epochs", type=whole(1), metavar="N", help="in a dataset; fewer are repeated (--epochs)"
    )
    parser.add_argument("--iterations", type=whole(0), metavar="N", help="of refinement (preset's)")
    add_refinement(parser)
    parser.add_argument(
        "--images",
        action=Several,
        choices=tuple(IMAGES),
        metavar="KIND",
        default=["random-real", "nrr", "nrr+lr"],
        help=f"of {', '.join(IMAGES)} (random-real nrr nrr+lr)",
    )
    parser.add_argument(
        "--labels",
        action=Several,
        choices=tuple(LABELS),
        metavar="KIND",
        default=["one-hot", "compact", "dbr", "soft"],
        help=f"of {', '.join(LABELS)} (one-hot compact dbr soft)",
    )
    add_alpha_dbr(parser)
    parser.add_argument(
        "--processes",
        type=whole(1),
        default=1,
        metavar="N",
        help="datasets at a time, which take turns on a GPU (1)",
    )
    parser.add_argument("--collect", action="store_true", help="run nothing: report on the cells that OUT holds")
    add_device(parser)


def add_refinement(parser: argparse.ArgumentParser) -> None:
    """Adds the options of how refinement runs."""
    parser.add_argument(
        "--precision", choices=get_args(Precision), default="auto", help="of refinement, as in build-distilled (auto)"
    )
    parser.add_argument("--compile", action="store_true", help="refine through torch.compile, as in build-distilled")


def measure_accuracy(options: argparse.Namespace) -> int:
    """Runs the grid, prints the report and writes it; returns the exit status."""
    source = load_source(options.source, data_dir=options.data_dir, test_dir=options.test_dir)
    grid = make_grid(options, source)
    table = run_or_collect(grid, source, options)
    if not table:
        raise ConfigError(f"--collect: {grid.out} holds no cell of this grid; run it without --collect first")
    text = report(grid, table)
    print(f"\n{text}")
    name = options.name or grid.dataset
    write_report(
        options.results,
        f"accuracy-{name}",
        provenance(MODULE, seeds=grid.seeds),
        {"cells": [asdict(result) for result in table.values()]},
        title=f"Accuracy on {name}",
        text=text,
        pictures=[Picture("top-1", plot(grid, table))],
    )
    return 0


def run_or_collect(grid: Grid, source: Source, options: argparse.Namespace) -> Table:
    """The grid's results: of all its cells, or with --collect of those that are there."""
    if options.collect:
        require_teacher(grid.teacher_checkpoint)
        return read_cells(grid, grid.cells(), Origin.of(source))
    return run_grid(grid, source, processes=options.processes)


def make_grid(options: argparse.Namespace, source: Source) -> Grid:
    """The grid that the options describe."""
    preset = PRESETS[options.preset]
    device = pick_device(options.device)
    return Grid(
        dataset=options.source,
        data_dir=options.data_dir,
        test_dir=options.test_dir,
        out=options.out,
        teacher_checkpoint=options.teacher_checkpoint or options.out / "teacher.pt",
        teacher=TeacherConfig(
            architecture=options.teacher, epochs=options.teacher_epochs or preset.teacher_epochs, device=device
        ),
        ipcs=tuple(options.ipc or preset.ipcs),
        images=tuple(options.images),
        labels=tuple(options.labels),
        seeds=tuple(options.seeds),
        student=options.student or source.default_model,
        epochs=options.epochs or preset.epochs,
        stored_epochs=options.stored_epochs,
        iterations=preset.iterations if options.iterations is None else options.iterations,
        precision=options.precision,
        compile=options.compile,
        alpha_dbr=options.alpha_dbr,
        device=device,
    )


def report(grid: Grid, table: Table) -> str:
    """The report's tables and what they were made with, as Markdown."""
    first = next(iter(table.values()))
    teacher = teacher_text(first.teacher, (result.teacher_top1 for result in table.values()))
    return "\n\n".join(
        [
            f"Teacher {teacher}; student {grid.student}; {grid.epochs} epochs of {stored_epochs(grid)} stored ones; "
            f"{refinement_text(grid)}; {counted(len(grid.seeds), 'seed')}. Top-1 in % on {first.test_images:,} real "
            f"test images after the last epoch, mean ± standard deviation over seeds.{loss_text(grid)}"
            f"{_gaps(grid, table)}",
            circumstances_text([result.made for result in table.values()]),
            accuracy_table(grid, table),
            *(_recovery_section(grid, table) if {"one-hot", "soft"} < set(grid.labels) else ()),
            "Differences between cells of the same seed, in points of top-1: mean and its 95 % interval over the seeds "
            "that have both.",
            difference_table(grid, table),
            "Bytes on disk, first seed:",
            bytes_table(grid, table),
        ]
    )


def accuracy_table(grid: Grid, table: Table) -> str:
    """Top-1 by images (rows) and labels (columns)."""
    rows = []
    for ipc in grid.ipcs:
        for images in grid.images:
            tops = [top1(grid, table, ipc, images, labels) for labels in grid.labels]
            rows.append([f"IPC {ipc}, {images}", *(spread_of(each, len(grid.seeds)) for each in tops)])
    return markdown_table(["images", *grid.labels], rows)


def recovery_table(grid: Grid, table: Table) -> str:
    """By images (rows) and labels (columns): how much of what soft labels gain over one-hot the labels gain."""
    between = [labels for labels in grid.labels if labels not in ("one-hot", "soft")]
    rows = []
    for ipc in grid.ipcs:
        for images in grid.images:
            tops = {labels: top1(grid, table, ipc, images, labels) for labels in grid.labels}
            low, high = tops["one-hot"], tops["soft"]
            rows.append([f"IPC {ipc}, {images}", *(recovery(low, tops[labels], high) for labels in between)])
    return markdown_table(["images", *between], rows)


def difference_table(grid: Grid, table: Table) -> str:
    """Differences seed by seed: labels on the same images, and images with the same labels."""
    rows = []
    for ipc in grid.ipcs:
        for images in grid.images:
            for before, after in combinations(grid.labels, 2):
                pair = paired(top1(grid, table, ipc, images, before), top1(grid, table, ipc, images, after))
                rows.append([f"IPC {ipc}, {images}: {after} − {before}", pair])
        for labels in grid.labels:
            for start, end in combinations(grid.images, 2):
                pair = paired(top1(grid, table, ipc, start, labels), top1(grid, table, ipc, end, labels))
                rows.append([f"IPC {ipc}, {labels}: {end} − {start}", pair])
    return markdown_table(["compared", "points"], rows)


def bytes_table(grid: Grid, table: Table) -> str:
    """Bytes of images and of each kind of labels."""
    rows = []
    for ipc in grid.ipcs:
        for images in grid.images:
            cells = [Cell(ipc=ipc, images=images, labels=labels, seed=grid.seeds[0]) for labels in grid.labels]
            labels = [f"{table[cell].bytes_labels:,.0f}" if cell in table else "-" for cell in cells]
            image_bytes = next((f"{table[cell].bytes_images:,}" for cell in cells if cell in table), "-")
            rows.append([f"IPC {ipc}, {images}", image_bytes, *labels])
    return markdown_table(["images", "image bytes", *(f"{labels} bytes" for labels in grid.labels)], rows)


def top1(grid: Grid, table: Table, ipc: int, images: str, labels: str) -> dict[int, float]:
    """Top-1 in percent by seed, of the seeds whose cell is there."""
    cells = {seed: Cell(ipc=ipc, images=images, labels=labels, seed=seed) for seed in grid.seeds}
    return {seed: 100 * table[cell].top1 for seed, cell in cells.items() if cell in table}


def paired(before: dict[int, float], after: dict[int, float]) -> str:
    """What the seeds gained that both have, with the 95 % interval of its mean; a dash without any."""
    seeds = [seed for seed in before if seed in after]
    return interval([before[seed] for seed in seeds], [after[seed] for seed in seeds]) if seeds else "-"


def recovery(one_hot: dict[int, float], labels: dict[int, float], soft: dict[int, float]) -> str:
    """(labels − one-hot) / (soft − one-hot) of the means over the seeds that have all three, in percent.

    A dash where no seed has, or soft labels bring nothing.
    """
    seeds = one_hot.keys() & labels.keys() & soft.keys()
    if not seeds:
        return "-"
    low, reached, high = (mean(tops[seed] for seed in seeds) for tops in (one_hot, labels, soft))
    return f"{100 * (reached - low) / (high - low):.0f}" if high > low else "-"


def spread_of(tops: dict[int, float], seeds: int) -> str:
    """Mean and spread, and how many seeds those are where some are missing."""
    if not tops:
        return "-"
    return spread(list(tops.values())) + (f" (of {len(tops)})" if len(tops) < seeds else "")


def _recovery_section(grid: Grid, table: Table) -> tuple[str, str]:
    return RECOVERED, recovery_table(grid, table)


def _gaps(grid: Grid, table: Table) -> str:
    count = sum(1 for _ in grid.cells())
    return "" if len(table) == count else f" Incomplete: {len(table)} of {count} students; (of n): over n seeds."


def plot(grid: Grid, table: Table) -> Figure:
    """One panel for each number of images per class, a group of bars for each kind of images."""
    width = max(4.5, 1.3 * len(grid.images))
    figure = Figure(figsize=(width * len(grid.ipcs) + 1, 3.6), layout="constrained")
    panels = figure.subplots(1, len(grid.ipcs), squeeze=False, sharey=True)[0]
    for axis, ipc in zip(panels, grid.ipcs, strict=True):
        _draw_panel(axis, grid, table, ipc)
    panels[0].set_ylabel("top-1, %")
    panels[-1].legend()
    return figure


def _draw_panel(axis: Axes, grid: Grid, table: Table, ipc: int) -> None:
    width = 0.8 / len(grid.labels)
    for number, labels in enumerate(grid.labels):
        values = [list(top1(grid, table, ipc, images, labels).values()) for images in grid.images]
        places = [group + (number - (len(grid.labels) - 1) / 2) * width for group in range(len(grid.images))]
        error = [stdev(each) if len(each) > 1 else 0.0 for each in values]
        axis.bar(places, [mean(each) if each else 0.0 for each in values], width, yerr=error, capsize=2, label=labels)
    axis.set_xticks(range(len(grid.images)), grid.images, rotation=20 if len(grid.images) > 4 else 0, ha="center")
    axis.set_title(f"{grid.dataset}, IPC {ipc}")


if __name__ == "__main__":
    raise SystemExit(main())
