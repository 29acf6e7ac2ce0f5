"""How much room labels take: built datasets against soft labels of the same pairs, both as real files.

`python -m benchmarks.storage_footprint DATASET…` measures every dataset with explicit and with derived records, writes
pairs of it the way FKD and SRe2L store soft labels, and carries both on to ImageNet-1k: 1000 classes, 10, 50 and 200
images per class, 300 epochs. `--preset imagenet1k-ipc200` writes and measures a full shard of 1000 classes itself.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any, get_args

import numpy as np
from matplotlib.figure import Figure

from benchmarks.bytes_and_accuracy import Sizes, accuracy_table, plot_points, points_of, read_cells, title
from benchmarks.command import local_folder, run
from benchmarks.exact_distances import joint_entropy, load_sample
from benchmarks.fkd_store import Form
from benchmarks.footprint import (
    CODINGS,
    Footprint,
    codings_of,
    epoch_pairs,
    fkd_bytes_per_pair,
    in_full_batches,
    measure,
    recoded,
    soft_label_bytes,
)
from benchmarks.level_spacings import measure_spacings, spacing_table
from benchmarks.model_shard import block_bytes_per_pair, write_model_shard
from benchmarks.model_store import measure_import
from benchmarks.results_io import Picture, markdown_table, provenance, write_json, write_report
from builders.import_fkd import ImportFacts
from builders.models import create_model
from builders.teacher import save_checkpoint
from nrrdd_format.codebooks import distance_levels
from nrrdd_format.dataset import DistilledDataset, open_dataset
from nrrdd_format.errors import ConfigError
from nrrdd_format.pairs import Coding
from nrrdd_format.shards import ShardReader

MODULE = "benchmarks.storage_footprint"
PRESET = "imagenet1k-ipc200"
DISTANCES = Path(__file__).parent / "distances"
SAMPLE = "tiny-imagenet-100"
IMAGENET_CLASSES, IMAGENET_SIZE = 1000, 224
IPCS = (10, 50, 200)
PER_PAIR_IPC = 200
"""The number of images per class at which fixed costs are spread over the pairs."""
EPOCHS = 300
LPLD_PRUNING = 40
TIMED_EPOCHS = 100
BLOCK_EPOCHS = (1, 5, 10, 20, 60)
BLOCK_STUDY_EPOCHS = 60
GIGABYTE = 1e9

NOTES = """\
The first table is ImageNet-1k, 300 epochs, in gigabytes of 10^9 bytes; bytes a pair are those at 200 images per class.
Nothing but image members is left out of our rows: records are carried on by the pair, shard headers by the image, the
manifest by the shard. Rows of soft labels come from files with 1000 classes in full batches of 100 pairs. Their logits
are random numbers of the real shape, since the file's length does not depend on the values. Pruned: one batch in 40 is
kept and reused (LPLD), reckoned from the fp16 row. The teacher is one file for any number of images, and costs a
forward pass in every training step.
The second table is each dataset as it lies on disk, everything counted but its images, against soft labels for its own
classes in batches of at most 100 pairs; records are the records' tar members alone, with their headers and padding.
"""
PRESET_NOTE = """\
{preset}: one full shard of 1000 generated images at 224 px and 300 epochs. Its distances are not those of an ImageNet
teacher: both of a pair are drawn together from {pairs:,} pairs of the sample {name}, {classes} classes, as its teacher
({teacher}, top-1 {top1:.1%}) sees them.
"""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One way to keep the labels of ImageNet-1k.

    Attributes:
        bytes_per_pair: at 200 images per class, fixed costs included.
        gigabytes: by images per class.
    """

    name: str
    bytes_per_pair: float
    gigabytes: dict[int, float]

    def as_json(self, fkd_fp16: Row) -> dict[str, Any]:
        """JSON values; the ratio is how many times smaller than fp16 soft labels, null where there are no bytes."""
        return {
            "name": self.name,
            "bytes_per_pair": self.bytes_per_pair,
            "ratio_to_fkd_fp16": fkd_fp16.bytes_per_pair / self.bytes_per_pair if self.bytes_per_pair else None,
            "gigabytes": {str(ipc): size for ipc, size in self.gigabytes.items()},
        }


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One dataset in one coding, as it lies on disk, and the bytes of soft labels for the same pairs.

    Attributes:
        decode_milliseconds: median time to read the pairs of one epoch of the first shard.
    """

    name: str
    classes: int
    images_per_shard: int
    footprint: Footprint
    soft_label_bytes: float
    decode_milliseconds: float


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    options = make_parser().parse_args(arguments)
    return run(lambda: report(options))


def make_parser() -> argparse.ArgumentParser:
    """The command's parser."""
    parser = argparse.ArgumentParser(
        prog=f"python -m {MODULE}",
        description="Measure what labels take on disk, against soft labels of the same pairs.",
        epilog=f"examples:\n  python -m {MODULE} digits-ipc10 cifar10-ipc10 --out benchmarks/results\n"
        f"  python -m {MODULE} --preset {PRESET}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("datasets", type=local_folder, nargs="*", metavar="DATASET", help="a built dataset's folder")
    parser.add_argument("--preset", choices=[PRESET], help="measure a full shard of 1000 classes, made for the purpose")
    parser.add_argument(
        "--distances",
        type=Path,
        default=DISTANCES / f"{SAMPLE}.npy",
        metavar="FILE",
        help=f"the sample of distances it is filled with ({SAMPLE}.npy; see benchmarks.exact_distances)",
    )
    parser.add_argument(
        "--accuracy",
        type=Path,
        metavar="FILE",
        help="a result of benchmarks.accuracy: adds top-1 to the datasets it was measured on, and a plot of both",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to this file")
    parser.add_argument("--out", type=Path, metavar="DIR", help="write <date>-storage.{json,md,png} into this folder")
    return parser


def report(options: argparse.Namespace) -> int:
    """Measures, prints the tables and writes what was asked for; returns the exit status."""
    if not options.datasets and options.preset is None:
        raise ConfigError(f"nothing to measure: name a dataset's folder, or say --preset {PRESET}")
    cells = [] if options.accuracy is None else read_cells(options.accuracy)
    datasets = [open_with_shards(path) for path in options.datasets]
    coded = [{coding: measure_coded(dataset, coding) for coding in codings_of(dataset)} for dataset in datasets]
    measured = [each for codings in coded for each in codings.values()]
    sizes = [(dataset.manifest, _sizes(codings)) for dataset, codings in zip(datasets, coded, strict=True)]
    points = points_of(cells, sizes)
    samples = distance_samples()
    notes = NOTES
    if options.preset is not None:
        measured = [*measure_preset(options.distances), *measured]
        notes += preset_note(options.distances, samples)
    with one_of(datasets) as any_dataset:
        rows = [*label_rows(any_dataset), *(dataset_row(each) for each in measured)]
    fits = measure_spacings(sorted(DISTANCES.glob("*.npy")))
    blocks = {} if options.preset is None else block_sizes(options.distances)
    imported = None if options.preset is None else measure_import(load_sample(options.distances))
    tables = [
        imagenet_table(rows),
        disk_table(measured),
        entropy_table(samples),
        spacing_table(fits),
        block_table(blocks),
        import_table(imported),
        accuracy_table(points),
    ]
    text = "\n\n".join(table for table in tables if table)
    print(f"{text}\n\n{notes}")
    facts = provenance(MODULE, seeds=[0])
    data = {
        "rows": [row.as_json(rows[0]) for row in rows],
        "measured": [asdict(each) for each in measured],
        "distances": samples,
        "spacings": [asdict(fit) for fit in fits],
        "derived_bytes_per_pair_by_block_epochs": blocks,
        "imported_store": None if imported is None else asdict(imported),
        "points": [asdict(point) for point in points],
    }
    if options.json is not None:
        write_json(options.json, facts | data)
    if options.out is not None:
        pictures = [Picture("gigabytes", plot(rows))]
        if points:
            pictures.append(Picture("bytes against accuracy", plot_points(points), "-accuracy"))
        write_report(
            options.out, "storage", facts, data, title="Label storage", text=f"{text}\n\n{notes}", pictures=pictures
        )
    return 0


def _sizes(codings: Mapping[Coding, Measured]) -> Sizes:
    return Sizes(
        coded={coding: measured.footprint.labels for coding, measured in codings.items()},
        soft_labels=next(iter(codings.values())).soft_label_bytes,
    )


def open_with_shards(path: Path) -> DistilledDataset:
    """Opens a dataset. Raises ConfigError for one without shards."""
    dataset = open_dataset(path)
    if not dataset.manifest.shards:
        raise ConfigError(f"{path}: lists no shards, so there is nothing to measure")
    return dataset


def measure_preset(sample: Path) -> Iterator[Measured]:
    """The full shard of 1000 classes, in both codings."""
    distances = load_sample(sample)
    for coding in CODINGS:
        with (
            tempfile.TemporaryDirectory() as folder,
            open_dataset(write_model_shard(Path(folder), coding, distances)) as dataset,
        ):
            yield replace(measure_coded(dataset, coding), name=f"{PRESET}, {coding}")


@contextmanager
def one_of(datasets: Sequence[DistilledDataset]) -> Iterator[DistilledDataset]:
    """A dataset whose pairs soft labels are written for: any, since their files' length does not depend on them."""
    if datasets:
        yield datasets[0]
        return
    with tempfile.TemporaryDirectory() as folder:
        nothing = np.ones((2, 1), np.float32)
        with open_dataset(write_model_shard(Path(folder), "derived", nothing, epochs=1)) as dataset:
            yield dataset


def distance_samples() -> list[dict[str, Any]]:
    """What is known of every kept sample of distances, with the entropy of its pairs' levels."""
    levels = distance_levels()
    return [
        json.loads(path.with_suffix(".json").read_text())
        | {"name": path.stem, "joint_entropy_bits": joint_entropy(load_sample(path), levels)}
        for path in sorted(DISTANCES.glob("*.npy"))
    ]


def preset_note(sample: Path, samples: Sequence[dict[str, Any]]) -> str:
    """Where the preset's distances come from."""
    known = next((facts for facts in samples if facts["name"] == sample.stem), None)
    if known is None:
        return f"{PRESET}: distances drawn from {sample.name}.\n"
    return PRESET_NOTE.format(preset=PRESET, top1=known["teacher_top1"], **known)


def label_rows(dataset: DistilledDataset) -> list[Row]:
    """What others store; fp16 soft labels come first, all are compared with them."""
    return [*soft_label_rows(dataset), teacher_row(), _row_per_pair("one-hot: the class in the image's name", 0.0)]


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
    with recoded(dataset, coding) as coded:
        return Measured(
            name=f"{title(manifest)}, {coding}",
            classes=len(manifest.dataset.class_names),
            images_per_shard=manifest.shards[0].images,
            footprint=measure(coded),
            soft_label_bytes=soft_label_bytes(dataset),
            decode_milliseconds=decode_time(coded.shards[0]),
        )


def decode_time(shard: ShardReader) -> float:
    """Median of the milliseconds that reading one epoch's pairs takes, the file being in memory."""
    times = []
    for epoch in range(min(shard.epochs, TIMED_EPOCHS)):
        started = time.perf_counter()
        shard.records(epoch)
        times.append(1e3 * (time.perf_counter() - started))
    return median(times)


def imagenet_table(rows: Sequence[Row]) -> str:
    """The table of ImageNet-1k, every row against the first."""
    header = ["ImageNet-1k, 300 epochs", "bytes a pair", "times smaller", *(f"GB at IPC {ipc}" for ipc in IPCS)]
    lines = [
        [
            row.name,
            f"{row.bytes_per_pair:.2f}",
            f"{rows[0].bytes_per_pair / row.bytes_per_pair:.1f}" if row.bytes_per_pair else "",
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
        "records a pair",
        "images and their tar headers",
        "soft labels",
        "times smaller",
        "ms to read an epoch of a shard",
    ]
    lines = [
        [
            each.name,
            str(each.classes),
            str(each.images_per_shard),
            f"{each.footprint.pairs:,}",
            f"{each.footprint.labels:,}",
            f"{each.footprint.labels / each.footprint.pairs:.3f}",
            f"{each.footprint.records / each.footprint.pairs:.3f}",
            f"{each.footprint.image_share:.1%}",
            f"{each.soft_label_bytes:,.0f}",
            f"{each.soft_label_bytes / each.footprint.labels:.1f}",
            f"{each.decode_milliseconds:.2f}",
        ]
        for each in measured
    ]
    return markdown_table(header, lines)


def entropy_table(samples: Sequence[dict[str, Any]]) -> str:
    """How many bits the levels of a pair carry, by the teacher's number of classes."""
    header = ["distances of", "classes", "teacher top-1", "pairs", "p_i + p_j", "bits of both levels"]
    lines = [
        [
            facts["name"],
            str(facts["classes"]),
            f"{facts['teacher_top1']:.1%}",
            f"{facts['pairs']:,}",
            f"{facts['mean_mass_of_both_classes']:.2f}",
            f"{facts['joint_entropy_bits']:.2f}",
        ]
        for facts in samples
    ]
    return markdown_table(header, lines) if lines else ""


def block_sizes(sample: Path) -> dict[int, float]:
    """Bytes a pair of derived record blocks by the number of epochs they hold."""
    distances = load_sample(sample)
    return {
        count: block_bytes_per_pair("derived", distances, count, epochs=BLOCK_STUDY_EPOCHS) for count in BLOCK_EPOCHS
    }


def block_table(sizes: dict[int, float]) -> str:
    """The same as a table; empty without any."""
    header = ["epochs in a block", *map(str, sizes)]
    return (
        markdown_table(header, [["derived, bytes a pair", *(f"{size:.3f}" for size in sizes.values())]])
        if sizes
        else ""
    )


def import_table(facts: ImportFacts | None) -> str:
    """What `nrrdd import-fkd` makes of a store of soft labels; empty without one."""
    if facts is None:
        return ""
    header = [
        "an FKD store imported",
        "images",
        "epochs",
        "store, bytes a pair",
        "labels, bytes a pair",
        "times smaller",
    ]
    row = [
        "1000 classes, fp16",
        f"{facts.images:,}",
        str(facts.epochs),
        f"{facts.store_bytes / facts.pairs:.1f}",
        f"{facts.label_bytes / facts.pairs:.2f}",
        f"{facts.ratio:.0f}",
    ]
    return markdown_table(header, [row])


def plot(rows: Sequence[Row]) -> Figure:
    """Gigabytes of every row at every IPC, on a logarithmic axis."""
    shown = [row for row in rows if row.bytes_per_pair]
    figure = Figure(figsize=(8, 0.45 * len(shown) + 1.5), layout="constrained")
    axis = figure.subplots()
    height = 0.8 / len(IPCS)
    for number, ipc in enumerate(IPCS):
        places = [row + (number - 1) * height for row in range(len(shown))]
        axis.barh(places, [row.gigabytes[ipc] for row in shown], height, label=f"{ipc} images per class")
    axis.set_yticks(range(len(shown)), [row.name for row in shown])
    axis.invert_yaxis()
    axis.set(xscale="log", xlabel="labels of ImageNet-1k, 300 epochs, GB")
    axis.legend()
    return figure


def _row(name: str, sizes: dict[int, float]) -> Row:
    """A row from bytes by images per class."""
    pairs = PER_PAIR_IPC * IMAGENET_CLASSES * EPOCHS
    return Row(
        name=name,
        bytes_per_pair=sizes[PER_PAIR_IPC] / pairs,
        gigabytes={ipc: size / GIGABYTE for ipc, size in sizes.items()},
    )


def _row_per_pair(name: str, bytes_per_pair: float) -> Row:
    return _row(name, {ipc: bytes_per_pair * ipc * IMAGENET_CLASSES * EPOCHS for ipc in IPCS})


if __name__ == "__main__":
    raise SystemExit(main())
