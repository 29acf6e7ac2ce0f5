"""What the loader's order costs against a full shuffle: students' top-1, and how evenly batches hold classes.

`python -m benchmarks.loader_order DATASET --data-dir DIR --seeds 0 1 2 3 4` trains students on the same pairs in three
orders. A full shuffle draws every pair by itself. The loader shuffles the closed cycles of a window of shards as
wholes, so a batch holds about as many images as pairs, where a full shuffle has up to twice as many. At this size an
epoch fits into one window; `narrow windows` are as few shards as the loader ever mixes, on shards as small as given.

Shapes: B pairs of a batch, K classes.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeAlias
from unittest import mock

import torch
from torch import Tensor

from benchmarks.command import Several, local_folder, run, whole
from benchmarks.results_io import markdown_table, provenance, write_report
from benchmarks.spread import interval, spread
from benchmarks.student import Batches, StudentConfig, load_matching_source, pick_batch_size, train_student
from builders.progress import Progress
from builders.sources import Source
from loaders import DBRBatch, DBRLoader, order
from nrrdd_format import draws
from nrrdd_format.dataset import open_dataset
from nrrdd_format.errors import ConfigError, counted

MODULE = "benchmarks.loader_order"
RESULTS = Path("benchmarks") / "results"
Order: TypeAlias = Literal["full shuffle", "the loader's", "narrow windows"]
ORDERS: tuple[Order, ...] = ("full shuffle", "the loader's", "narrow windows")
BALANCE_EPOCHS = 5


@dataclass(frozen=True, kw_only=True)
class Row:
    """What an order came to.

    Attributes:
        windows: of an epoch; a full shuffle has one.
        top1: each seed's student, in % of the test images.
        imbalance: mean over batches of ½·Σ_k |n_k / 2B − 1/K|, n_k the labels k among a batch's 2B, in %.
    """

    order: Order
    windows: int
    top1: tuple[float, ...]
    imbalance: float


class FullShuffle:
    """The pairs of every epoch of a loader, held in memory, in an order of their own: each pair by itself."""

    def __init__(self, loader: DBRLoader, batch_size: int, seed: int) -> None:
        self._loader, self._batch_size, self._seed = loader, batch_size, seed
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Chooses the epoch that the next iteration goes through."""
        self._epoch = epoch

    def __iter__(self) -> Iterator[DBRBatch]:
        """The batches of that epoch; the last may be smaller."""
        self._loader.set_epoch(self._epoch)
        batches = list(self._loader)
        names = [name for name, value in vars(batches[0]).items() if isinstance(value, Tensor)]  # no priors: DBR labels
        whole: dict[str, Any] = {name: torch.cat([getattr(batch, name) for batch in batches]) for name in names}
        shuffled = draws.permutation(self._seed, "full-shuffle", self._epoch, count=len(whole["lam"]))
        for start in range(0, len(shuffled), self._batch_size):
            places = torch.from_numpy(shuffled[start : start + self._batch_size])
            yield DBRBatch(**{name: column[places] for name, column in whole.items()})


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    options = make_parser().parse_args(arguments)
    return run(lambda: report(options))


def make_parser() -> argparse.ArgumentParser:
    """The command's parser."""
    parser = argparse.ArgumentParser(
        prog=f"python -m {MODULE}",
        description="Compare the loader's order with a full shuffle of all pairs.",
        epilog=f"example:\n  python -m {MODULE} cifar10-ipc50 --data-dir data/cifar10 --seeds 0 1 2 3 4",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "dataset", type=local_folder, metavar="DATASET", help="folder of a distilled dataset, of 5 or more shards"
    )
    parser.add_argument("--data-dir", type=Path, metavar="DIR", help="where the source's test images lie")
    parser.add_argument("--student", metavar="ARCH", help="the students' network (the dataset's default)")
    parser.add_argument(
        "--seeds", type=whole(0), action=Several, default=[0, 1, 2], metavar="N", help="a student for each (0 1 2)"
    )
    parser.add_argument("--epochs", type=whole(1), default=100, metavar="N", help="of every student (100)")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="DIR", help=f"for the report ({RESULTS})")
    return parser


def report(options: argparse.Namespace) -> int:
    """Measures, prints the table and writes the dated report; returns the exit status."""
    manifest = open_dataset(options.dataset).manifest
    if len(manifest.shards) <= order.WINDOW_SHARDS[0]:
        raise ConfigError(
            f"{options.dataset}: found {len(manifest.shards)} shards, expected more than {order.WINDOW_SHARDS[0]}, the "
            f"fewest that are mixed; build it with a smaller --shard-images"
        )
    source = load_matching_source(manifest, name=None, data_dir=options.data_dir, test_dir=None)
    rows = []
    with Progress(len(ORDERS) * len(options.seeds), "students", "student") as progress:
        for name in ORDERS:
            rows.append(measure(name, options, source, progress))
    shards = [entry.pairs_per_epoch for entry in manifest.shards]
    text = (
        f"{sum(shards)} pairs an epoch in {len(shards)} shards of up to {max(shards)}, cycles of "
        f"{manifest.records.cycle}; {options.epochs} epochs; DBR labels; top-1 in %, mean ± standard deviation over "
        f"{counted(len(options.seeds), 'seed')}; differences with their 95 % interval.\n\n{table(rows)}"
    )
    print(f"\n{text}")
    write_report(
        options.results,
        "loader-order",
        provenance(MODULE, options.seeds),
        {"rows": [asdict(row) for row in rows]},
        title="Order of pairs",
        text=text,
    )
    return 0


def measure(name: Order, options: argparse.Namespace, source: Source, progress: Progress) -> Row:
    """Trains a student for each seed on the pairs in one order, and looks at the batches."""
    manifest = open_dataset(options.dataset).manifest
    batch_size = pick_batch_size(None, manifest)
    shards = order.ShardPairs(
        pairs_per_shard=tuple(entry.pairs_per_epoch for entry in manifest.shards), cycle=manifest.records.cycle
    )
    top1 = []
    with _windows(name):
        for seed in options.seeds:
            config = StudentConfig(
                labels="dbr", architecture=options.student, epochs=options.epochs, seed=seed, device="cpu"
            )
            ordered = partial(_ordered, name, batch_size=batch_size, seed=seed)
            found = train_student(options.dataset, source, config, wrap=ordered)
            top1.append(100 * found.top1)
            progress.advance()
        batches = _ordered(name, DBRLoader(options.dataset, batch_size), batch_size, seed=0)
        return Row(
            order=name,
            windows=1 if name == "full shuffle" else shards.windows,
            top1=tuple(top1),
            imbalance=imbalance(batches, len(source.class_names)),
        )


def imbalance(batches: Batches, classes: int) -> float:
    """Mean over batches of the distance of their labels' shares from even ones: ½·Σ|share − 1/K|, in %."""
    found = []
    for epoch in range(BALANCE_EPOCHS):
        batches.set_epoch(epoch)
        for batch in batches:
            labels = torch.cat([batch.label_org, batch.label_aug])
            shares: Tensor = torch.bincount(labels, minlength=classes) / len(labels)
            found.append(50 * float((shares - 1 / classes).abs().sum()))
    return sum(found) / len(found)


def table(rows: Sequence[Row]) -> str:
    """All orders as a Markdown table, the first as what the others are compared with."""
    header = ["order", "windows an epoch", "top-1", "against the first", "uneven classes in a batch, %"]
    lines = [
        [
            row.order,
            str(row.windows),
            spread(row.top1),
            "" if row is rows[0] else interval(rows[0].top1, row.top1),
            f"{row.imbalance:.1f}",
        ]
        for row in rows
    ]
    return markdown_table(header, lines)


def _ordered(name: Order, loader: DBRLoader, batch_size: int, seed: int) -> Batches:
    return FullShuffle(loader, batch_size, seed) if name == "full shuffle" else loader


def _windows(name: Order) -> AbstractContextManager[object]:
    """Makes windows as narrow as they ever are, in shards; elsewhere they are the loader's."""
    return mock.patch.object(order, "WINDOW_PAIRS", 0) if name == "narrow windows" else nullcontext()


if __name__ == "__main__":
    raise SystemExit(main())
