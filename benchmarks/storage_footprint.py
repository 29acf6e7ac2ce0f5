"""How much room labels take: built datasets against soft labels of the same pairs, both as real files.

`python -m benchmarks.storage_footprint DATASET…` measures every dataset with explicit and with derived records, writes
pairs of it the way FKD and SRe2L store soft labels, and carries both on to ImageNet-1k: 1000 classes, 10, 50 and 200
images per class, 300 epochs.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

from matplotlib.figure import Figure

from benchmarks.command import run
from benchmarks.fkd_store import Form
from benchmarks.footprint import (
    Footprint,
    epoch_pairs,
    fkd_bytes_per_pair,
    in_full_batches,
    measure_as,
    soft_label_bytes,
)
from benchmarks.results_io import make_folder, markdown_table, provenance, provenance_text, write_json, write_text
from builders.models import create_model
from builders.teacher import save_checkpoint
from nrrdd_format.dataset import DistilledDataset, open_dataset
from nrrdd_format.files import atomic_write
from nrrdd_format.pairs import Coding

MODULE = "benchmarks.storage_footprint"
IMAGENET_CLASSES, IMAGENET_SIZE = 1000, 224
IPCS = (10, 50, 200)
EPOCHS = 300
CODINGS: tuple[Coding, ...] = ("explicit", "derived")
LPLD_PRUNING = 40
GIGABYTE = 1e9

NOTES = """\
The upper table is ImageNet-1k, 300 epochs, in gigabytes of 10^9 bytes. Rows of a dataset are carried on from its
measured files: records by the pair, shard headers by the image, the manifest once. Rows of soft labels come from files
with 1000 classes in full batches of 100 pairs. Their logits are random numbers of the real shape, since the file's
length does not depend on the values. Pruned: one batch in 40 is kept and reused (LPLD), reckoned from the fp16 row.
The teacher is one file for any number of images, and costs a forward pass in every training step.
The lower table is each dataset as it lies on disk, everything counted but its images, against soft labels for its own
classes in batches of at most 100 pairs.
"""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One way to keep the labels of ImageNet-1k.

    Attributes:
        bytes_per_pair: at 10 images per class, fixed costs included.
        gigabytes: by images per class.
    """

    name: str
    bytes_per_pair: float
    gigabytes: dict[int, float]

    def as_json(self, fkd_fp16: Row) -> dict[str, Any]:
        """JSON values; the ratio is how many times smaller than fp16 soft labels, at 10 images per class."""
        return {
            "name": self.name,
            "bytes_per_pair": self.bytes_per_pair,
            "ratio_to_fkd_fp16": fkd_fp16.bytes_per_pair / self.bytes_per_pair,
            "gigabytes": {str(ipc): size for ipc, size in self.gigabytes.items()},
        }


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One dataset in one coding, as it lies on disk, and the bytes of soft labels for the same pairs."""

    name: str
    classes: int
    images_per_shard: int
    footprint: Footprint
    soft_label_bytes: float


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    options = make_parser().parse_args(arguments)
    return run(lambda: report(options.datasets, json_path=options.json, out=options.out))


def make_parser() -> argparse.ArgumentParser:
    """The command's parser."""
    parser = argparse.ArgumentParser(
        prog=f"python -m {MODULE}",
        description="Measure what labels take on disk, against soft labels of the same pairs.",
        epilog=f"example:\n  python -m {MODULE} digits-ipc10 cifar10-ipc10 --out benchmarks/results",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("datasets", type=Path, nargs="+", metavar="DATASET", help="a built dataset's folder")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to this file")
    parser.add_argument("--out", type=Path, metavar="DIR", help="write <date>-storage.{json,md,png} into this folder")
    return parser


def report(paths: Sequence[Path], *, json_path: Path | None, out: Path | None) -> int:
    """Measures, prints both tables and writes what was asked for; returns the exit status."""
    datasets = [open_dataset(path) for path in paths]
    measured = [measure_coded(dataset, coding) for dataset in datasets for coding in CODINGS]
    rows = [*soft_label_rows(datasets[0]), teacher_row(), *(dataset_row(each) for each in measured)]
    tables = f"{imagenet_table(rows)}\n\n{disk_table(measured)}\n"
    print(f"{tables}\n{NOTES}")
    facts = provenance(MODULE, seeds=[0])
    record = facts | {"rows": [row.as_json(rows[0]) for row in rows], "measured": [asdict(each) for each in measured]}
    if json_path is not None:
        write_json(json_path, record)
    if out is not None:
        _write_results(out / f"{facts['date']}-storage", record, tables, rows)
    return 0


def dataset_row(measured: Measured) -> Row:
    """A dataset's labels carried on to ImageNet-1k."""
    sizes = {ipc: measured.footprint.labels_at(ipc * IMAGENET_CLASSES, EPOCHS) for ipc in IPCS}
    return _row(measured.name, sizes)


def soft_label_rows(dataset: DistilledDataset) -> list[Row]:
    """Soft labels of ImageNet-1k; fp16 comes first, all are compared with it."""
    pairs = in_full_batches(epoch_pairs(dataset))
    size = dataset.manifest.images.size
    each = {
        form: fkd_bytes_per_pair(pairs, size=size, num_classes=IMAGENET_CLASSES, form=form) for form in get_args(Form)
    }
    rows = [_row_per_pair(f"soft labels, {form}", bytes_per_pair) for form, bytes_per_pair in each.items()]
    pruned = _row_per_pair(f"soft labels, fp16, pruned {LPLD_PRUNING}x", each["fp16"] / LPLD_PRUNING)
    return [*rows, pruned]


def teacher_row() -> Row:
    """A ResNet-18 checkpoint instead of labels."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "teacher.pt"
        model = create_model("resnet18", IMAGENET_CLASSES, IMAGENET_SIZE)
        save_checkpoint(path, model, "resnet18", [str(number) for number in range(IMAGENET_CLASSES)])
        size = path.stat().st_size
    return _row("the teacher itself (ResNet-18)", dict.fromkeys(IPCS, float(size)))


def measure_coded(dataset: DistilledDataset, coding: Coding) -> Measured:
    """Measures a dataset in one coding, and soft labels for all of its pairs at its own number of classes."""
    manifest = dataset.manifest
    return Measured(
        name=f"{manifest.dataset.name} IPC {manifest.images.ipc}, {coding}",
        classes=len(manifest.dataset.class_names),
        images_per_shard=manifest.shards[0].images,
        footprint=measure_as(dataset, coding),
        soft_label_bytes=soft_label_bytes(dataset),
    )


def imagenet_table(rows: Sequence[Row]) -> str:
    """The table of ImageNet-1k, every row against the first."""
    header = ["ImageNet-1k, 300 epochs", "bytes a pair", "times smaller", *(f"GB at IPC {ipc}" for ipc in IPCS)]
    lines = [
        [
            row.name,
            f"{row.bytes_per_pair:.2f}",
            f"{rows[0].bytes_per_pair / row.bytes_per_pair:.1f}",
            *(f"{row.gigabytes[ipc]:.4g}" for ipc in IPCS),
        ]
        for row in rows
    ]
    return markdown_table(header, lines)


def disk_table(measured: Sequence[Measured]) -> str:
    """The table of the datasets as they lie on disk."""
    header = [
        "on disk",
        "classes",
        "images a shard",
        "pairs",
        "label bytes",
        "bytes a pair",
        "soft labels",
        "times smaller",
    ]
    lines = [
        [
            each.name,
            str(each.classes),
            str(each.images_per_shard),
            f"{each.footprint.pairs:,}",
            f"{each.footprint.labels:,}",
            f"{each.footprint.labels / each.footprint.pairs:.2f}",
            f"{each.soft_label_bytes:,.0f}",
            f"{each.soft_label_bytes / each.footprint.labels:.1f}",
        ]
        for each in measured
    ]
    return markdown_table(header, lines)


def plot(path: Path, rows: Sequence[Row]) -> None:
    """Writes a PNG: gigabytes of every row at every IPC, on a logarithmic axis."""
    figure = Figure(figsize=(8, 0.45 * len(rows) + 1.5), layout="constrained")
    axis = figure.subplots()
    height = 0.8 / len(IPCS)
    for number, ipc in enumerate(IPCS):
        places = [row + (number - 1) * height for row in range(len(rows))]
        axis.barh(places, [row.gigabytes[ipc] for row in rows], height, label=f"{ipc} images per class")
    axis.set_yticks(range(len(rows)), [row.name for row in rows])
    axis.invert_yaxis()
    axis.set(xscale="log", xlabel="labels of ImageNet-1k, 300 epochs, GB")
    axis.legend()
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=150)


def _row(name: str, sizes: dict[int, float]) -> Row:
    """A row from bytes by images per class."""
    pairs = IPCS[0] * IMAGENET_CLASSES * EPOCHS
    return Row(
        name=name,
        bytes_per_pair=sizes[IPCS[0]] / pairs,
        gigabytes={ipc: size / GIGABYTE for ipc, size in sizes.items()},
    )


def _row_per_pair(name: str, bytes_per_pair: float) -> Row:
    return _row(name, {ipc: bytes_per_pair * ipc * IMAGENET_CLASSES * EPOCHS for ipc in IPCS})


def _write_results(stem: Path, record: dict[str, Any], tables: str, rows: Sequence[Row]) -> None:
    make_folder(stem.parent)
    write_json(stem.with_name(stem.name + ".json"), record)
    write_text(stem.with_name(stem.name + ".md"), f"# Label storage\n\n{provenance_text(record)}\n{tables}\n{NOTES}")
    plot(stem.with_name(stem.name + ".png"), rows)


if __name__ == "__main__":
    raise SystemExit(main())
