"""The weights of the DBR loss's two parts, over the paper's grid of five by five (its Table 7).

`python -m benchmarks.scale_factors --dataset cifar10 --data-dir DIR --teacher-checkpoint FILE --out DIR` trains a
student on DBR labels with every pair of weights, all else equal. AdamW divides a factor of the whole loss away, so that
cells of one ratio differ by no more than rounding grown large; they are set side by side, too. Cells are those of
`benchmarks.grid`: each is run once.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import asdict, replace
from itertools import product
from statistics import mean

from matplotlib.figure import Figure

from benchmarks.command import run
from benchmarks.equations import add_base, make_grid, setting_text
from benchmarks.grid import Cell, Grid, Origin, Table, read_cells, require_teacher, run_grid
from benchmarks.results_io import Picture, circumstances_text, markdown_table, provenance, write_report
from benchmarks.spread import interval, spread
from builders.sources import load_source
from nrrdd_format.errors import ConfigError

MODULE = "benchmarks.scale_factors"
FACTORS = (0.2, 0.5, 1.0, 2.0, 5.0)
Weights = tuple[float, float]
"""alpha_sce and alpha_dbr."""
EVERY = tuple(product(FACTORS, FACTORS))


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    options = make_parser().parse_args(arguments)
    return run(lambda: measure_scale_factors(options))


def make_parser() -> argparse.ArgumentParser:
    """The command's parser."""
    parser = argparse.ArgumentParser(
        prog=f"python -m {MODULE}",
        description="Measure the weights of the DBR loss's two parts, alpha_sce and alpha_dbr, over a grid.",
        epilog=f"example:\n  python -m {MODULE} --dataset digits --teacher-checkpoint teacher.pt --out scale-factors",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_base(parser)
    return parser


def measure_scale_factors(options: argparse.Namespace) -> int:
    """Trains the students, prints the report and writes it; returns the exit status."""
    require_teacher(options.teacher_checkpoint)
    source = load_source(options.source, data_dir=options.data_dir, test_dir=options.test_dir)
    grid = make_grid(options, source, labels="dbr")
    cells = [cell for weights in EVERY for cell in cells_at(grid, weights)]
    table = read_cells(grid, cells, Origin.of(source)) if options.collect else run_grid(grid, source, cells)
    if not table:
        raise ConfigError(f"--collect: {grid.out} holds no such student; run without --collect first")
    text = report(grid, table)
    print(f"\n{text}")
    name = options.name or f"{grid.dataset}-{options.images}"
    write_report(
        options.results,
        f"scale-factors-{name}",
        provenance(MODULE, seeds=grid.seeds),
        {"cells": [asdict(result) for result in table.values()]},
        title=f"The weights of the DBR loss, on {name}",
        text=text,
        pictures=[Picture("top-1", plot(top1_by_weights(grid, table)))],
    )
    return 0


def cells_at(grid: Grid, weights: Weights) -> list[Cell]:
    """The grid's cells at these weights, one for each seed."""
    alpha_sce, alpha_dbr = weights
    return [replace(base, student=(("alpha_dbr", alpha_dbr), ("alpha_sce", alpha_sce))) for base in grid.cells()]


def top1_by_weights(grid: Grid, table: Table) -> dict[Weights, dict[int, float]]:
    """Top-1 in percent by seed, of those that are there."""
    return {
        weights: {cell.seed: 100 * table[cell].top1 for cell in cells_at(grid, weights) if cell in table}
        for weights in EVERY
    }


def report(grid: Grid, table: Table) -> str:
    """The tables and what they were made with, as Markdown."""
    tops = top1_by_weights(grid, table)
    return "\n\n".join(
        [
            f"{setting_text(grid, table)} Top-1 in %, mean ± standard deviation over seeds.",
            circumstances_text([result.made for result in table.values()]),
            weights_table(tops),
            "By the ratio of the two, each seed's mean over all cells that have it; against a ratio of 1 paired by "
            "seed, in points, with the 95 % interval of the mean.",
            ratio_table(tops),
        ]
    )


def weights_table(tops: dict[Weights, dict[int, float]]) -> str:
    """Top-1 by alpha_sce (rows) and alpha_dbr (columns)."""
    rows = []
    for alpha_sce in FACTORS:
        cells = [list(tops[alpha_sce, alpha_dbr].values()) for alpha_dbr in FACTORS]
        rows.append([f"α_sce {alpha_sce:g}", *(spread(values) if values else "-" for values in cells)])
    return markdown_table(["", *(f"α_dbr {alpha_dbr:g}" for alpha_dbr in FACTORS)], rows)


def ratio_table(tops: dict[Weights, dict[int, float]]) -> str:
    """Top-1 by alpha_dbr / alpha_sce."""
    found = {weights: of for weights, of in tops.items() if of}
    by_ratio = {ratio: _seed_means(found, ratio) for ratio in sorted({_ratio(weights) for weights in found})}
    even = by_ratio.get(1.0, {})
    rows = []
    for ratio, means in by_ratio.items():
        both = [seed for seed in means if seed in even]
        against = interval([even[seed] for seed in both], [means[seed] for seed in both]) if both else "-"
        cells = sum(_ratio(weights) == ratio for weights in found)
        rows.append([f"{ratio:g}", str(cells), spread(list(means.values())), "" if ratio == 1 else against])
    return markdown_table(["α_dbr / α_sce", "cells", "top-1 %", "against 1"], rows)


def _ratio(weights: Weights) -> float:
    return round(weights[1] / weights[0], 6)  # 0.5 / 0.2 and 5 / 2 are the same


def _seed_means(tops: dict[Weights, dict[int, float]], ratio: float) -> dict[int, float]:
    """By seed, the mean over the cells of one ratio."""
    found = [of for weights, of in tops.items() if _ratio(weights) == ratio]
    seeds = dict.fromkeys(seed for of in found for seed in of)
    return {seed: mean(of[seed] for of in found if seed in of) for seed in seeds}


def _mean(found: dict[int, float]) -> float:
    return mean(found.values()) if found else math.nan


def plot(tops: dict[Weights, dict[int, float]]) -> Figure:
    """The grid of means as a heat map, each in figures, too."""
    means = [[_mean(tops[alpha_sce, alpha_dbr]) for alpha_dbr in FACTORS] for alpha_sce in FACTORS]
    figure = Figure(figsize=(5.2, 4.2), layout="constrained")
    axis = figure.subplots()
    picture = axis.imshow(means, cmap="viridis", origin="lower")
    for row, column in product(range(len(FACTORS)), repeat=2):
        axis.text(column, row, f"{means[row][column]:.1f}", ha="center", va="center", color="white", fontsize=9)
    ticks = [f"{factor:g}" for factor in FACTORS]
    axis.set_xticks(range(len(FACTORS)), ticks)
    axis.set_yticks(range(len(FACTORS)), ticks)
    axis.set(xlabel="α_dbr, of the distances' error", ylabel="α_sce, of the bounded cross-entropy")
    figure.colorbar(picture, label="top-1, %")
    return figure


if __name__ == "__main__":
    raise SystemExit(main())
