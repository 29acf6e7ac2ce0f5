"""From nothing to a student in minutes, on any machine: `make demo`.

Trains a teacher on scikit-learn's digits, distils ten images per class, trains a student on one-hot labels, on the
stored distances and on soft labels, and prints what each reaches and takes. Everything lies in `demo-output/`; a second
run goes on from there.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from benchmarks.command import add_device, pick_device, run
from benchmarks.grid import Grid, Result, dataset_path, run_grid
from benchmarks.results_io import markdown_table
from benchmarks.teacher import TeacherConfig
from builders.preview import CONTACT_SHEET
from builders.sources import load_source

OUT = Path("demo-output")
NETWORK = "conv3-w32"
IPC = 10
EPOCHS = 300
ITERATIONS = 300
TEACHER_EPOCHS = 8


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    options = make_parser().parse_args(arguments)
    return run(lambda: demonstrate(options.out, pick_device(options.device)))


def make_parser() -> argparse.ArgumentParser:
    """The command's parser."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.demo", description="Distil scikit-learn's digits and train students on the result."
    )
    parser.add_argument("--out", type=Path, default=OUT, metavar="DIR", help=f"holds everything ({OUT})")
    add_device(parser)
    return parser


def demonstrate(out: Path, device: str) -> int:
    """Runs the demo; returns the exit status."""
    grid = make_grid(out, device)
    print(
        f"digits, {IPC} images per class; smaller than the paper's setting: network {NETWORK} instead of conv3, "
        f"{ITERATIONS} steps of refinement instead of 2000, one seed; {EPOCHS} epochs as in the paper",
        flush=True,
    )
    results = run_grid(grid, load_source(grid.dataset, data_dir=None))
    folder = dataset_path(grid, next(iter(results)))
    print(f"\n{result_table(list(results.values()))}\n\nimages: {folder / CONTACT_SHEET}")
    return 0


def make_grid(out: Path, device: str) -> Grid:
    """The demo as a grid of three cells on one dataset."""
    return Grid(
        dataset="digits",
        out=out,
        teacher_checkpoint=out / "teacher.pt",
        teacher=TeacherConfig(architecture=NETWORK, epochs=TEACHER_EPOCHS, device=device),
        ipcs=(IPC,),
        images=("nrr+lr",),
        labels=("one-hot", "dbr", "soft"),
        seeds=(0,),
        student=NETWORK,
        epochs=EPOCHS,
        iterations=ITERATIONS,
        device=device,
    )


def result_table(results: Sequence[Result]) -> str:
    """Top-1, bytes of images, bytes of labels, and how many times smaller these are than soft labels."""
    header = ["labels", "top-1 %", "image bytes", "label bytes", "times smaller than soft labels"]
    rows = [
        [
            result.labels,
            f"{100 * result.top1:.2f}",
            f"{result.bytes_images:,}",
            f"{result.bytes_labels:,.0f}",
            f"{result.bytes_soft_labels / result.bytes_labels:.1f}" if result.bytes_labels else "-",
        ]
        for result in results
    ]
    return markdown_table(header, rows)


if __name__ == "__main__":
    raise SystemExit(main())
