"""How the cost of every stage grows with classes, images, IPC, resolution, iterations, epochs and ranks.

`python -m benchmarks.build_scaling` runs a small build through the real command line, then the same with one thing
after the other made larger, and prints what each stage took, in processor seconds, beside the first. A stage that
grows as it should shows the factor by which its work grew.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from benchmarks.build_watch import STAGES, START, StageCost
from benchmarks.command import run
from benchmarks.results_io import markdown_table, provenance, write_report
from benchmarks.wide_build import MEGABYTE, SEED, Shape, description, measure
from builders.progress import Progress

MODULE = "benchmarks.build_scaling"
BASE = Shape(
    classes=10,
    per_class=48,
    size=72,
    ipc=4,
    iterations=10,
    batch_size=10,
    epochs=10,
    architecture="resnet18-small-w4",
    device="cpu",
    threads=1,
    ranks=1,
)
LARGER: tuple[tuple[str, int], ...] = (
    ("classes", 4),
    ("per_class", 4),
    ("ipc", 4),
    ("size", 2),
    ("iterations", 4),
    ("batch_size", 4),
    ("epochs", 4),
    ("ranks", 2),
)

NOTES = """\
Each line is one build through the command line, in processor seconds of all its processes (sampled every fifth of a
second). `start` is importing, listing, loading the teacher and testing it on up to 1000 images; with two ranks each
process does that. 48 images of a class are what IPC 4 looks at (3·β·IPC, β = 4); with IPC 16 and 48 images the same are
read, and four crops of each become patches instead of one. Memory is the most held at once; disk is the work folder's
and the dataset's.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog=f"python -m {MODULE}", description="Measure how the stages' costs grow.")
    parser.add_argument("--out", type=Path, metavar="DIR", help="write <date>-build-scaling.{json,md} into this folder")
    options = parser.parse_args(arguments)
    return run(lambda: report(BASE, LARGER, options.out))


def report(base: Shape, larger: Sequence[tuple[str, int]], out: Path | None) -> int:
    """Runs all builds, prints the table and writes what was asked for; returns the exit status."""
    shapes = {"base": base} | {f"{name} ×{factor}": grown(base, name, factor) for name, factor in larger}
    with Progress(len(shapes), "builds", "build") as progress:
        costs = {}
        for name, shape in shapes.items():
            costs[name] = measure_alone(shape)
            progress.advance()
    text = f"base: {description(base)}\n\n{table(costs)}"
    print(f"{text}\n\n{NOTES}")
    if out is not None:
        builds = {
            name: {"shape": asdict(shapes[name]), "stages": [asdict(cost) for cost in costs[name]]} for name in shapes
        }
        write_report(
            out,
            "build-scaling",
            provenance(MODULE, seeds=[SEED]),
            {"builds": builds},
            title="Growth of a build's cost",
            text=f"{text}\n\n{NOTES}",
        )
    return 0


def grown(base: Shape, name: str, factor: int) -> Shape:
    """The base with one field made larger."""
    return replace(base, **{name: factor * getattr(base, name)})


def measure_alone(shape: Shape) -> list[StageCost]:
    """What a build takes in a folder of its own."""
    with tempfile.TemporaryDirectory(prefix="nrrdd-scaling-") as folder:
        return measure(shape, Path(folder))


def table(costs: dict[str, list[StageCost]]) -> str:
    """Builds by stages."""
    rows = [
        [
            name,
            *(f"{cost.processor_seconds:.1f}" for cost in stages),
            f"{max(cost.peak_rss for cost in stages) / MEGABYTE:,.0f}",
            f"{sum(cost.disk for cost in stages) / MEGABYTE:,.1f}",
        ]
        for name, stages in costs.items()
    ]
    return markdown_table(["build", START, *STAGES, "memory, MB", "disk, MB"], rows)


if __name__ == "__main__":
    raise SystemExit(main())
