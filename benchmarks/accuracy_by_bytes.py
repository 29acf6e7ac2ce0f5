"""Accuracy by the byte: what students gain from each byte that completes a DBR label.

`python -m benchmarks.accuracy_by_bytes DATASET... --teacher-checkpoint FILE --out DIR` trains students on the same
images with labels from none to all of the teacher's prediction: completed by images' priors and by x further classes
of each pair (`benchmarks.completion`) or by a code of the whole prediction (`benchmarks.logit_codes`), beside one-hot,
compact and plain DBR labels, FKD's top 5 and soft labels. Give datasets that differ in their seed only. A student that
is done is not trained again.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from matplotlib.figure import Figure

from benchmarks.command import Several, add_alpha_dbr, add_device, local_folder, pick_device, run, whole
from benchmarks.completion import check_completed, complete
from benchmarks.footprint import epoch_pairs, fkd_bytes_per_pair, in_full_batches
from benchmarks.grid import teacher_text
from benchmarks.logit_codes import FIT_PAIRS, CodedBatches, LogitCode, LowRank, ProductCode, coded_bytes, predictions
from benchmarks.results_io import (
    Picture,
    circumstances,
    circumstances_text,
    markdown_table,
    provenance,
    refuse_other,
    write_json,
    write_report,
)
from benchmarks.spread import interval, spread
from benchmarks.student import (
    Labels,
    StudentConfig,
    load_dataset_teacher,
    load_matching_source,
    train_student,
)
from builders.sources import Source
from builders.teacher import Teacher
from nrrdd_format.dataset import DistilledDataset, open_dataset
from nrrdd_format.errors import ConfigError
from nrrdd_format.manifest import Manifest

MODULE = "benchmarks.accuracy_by_bytes"
RESULTS = Path("benchmarks") / "results"
DATASET, TESTED_ON = "the dataset of ID", "test images of fingerprint"
"""What a message calls that which a student was made with."""


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A kind of labels: how they are named, trained on and completed."""

    name: str
    labels: Labels
    priors: bool = False
    further: int = 0
    rank: int = 0
    """Of a low-rank code; 0: none."""
    parts: int = 0
    """Of a product code; 0: none."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A student and the bytes of its labels.

    Attributes:
        dataset: its folder's name.
        dataset_id: see `Manifest.dataset_id`; of the dataset as given, not of a completed copy.
        test_fingerprint: of the images it was tested on.
        made: date, hardware and versions.
        alpha_dbr: weight of the distances' error in the loss on completed labels; None for other labels.

    The last four are None in a file of before they were recorded.
    """

    kind: str
    dataset: str
    seed: int
    bytes_per_pair: float
    top1: float
    dataset_id: str | None = None
    test_fingerprint: str | None = None
    made: dict[str, Any] | None = None
    alpha_dbr: float | None = None


def kinds(further: Sequence[int], ranks: Sequence[int], parts: Sequence[int]) -> list[Kind]:
    """All kinds of labels, from nothing of the teacher's to all of it."""
    completed = [
        Kind(
            name=f"completed, {count} further, {'priors' if priors else 'no priors'}",
            labels="dbr-completed",
            priors=priors,
            further=count,
        )
        for priors in (False, True)
        for count in further
    ]
    return [
        Kind(name="one-hot", labels="one-hot"),
        Kind(name="compact", labels="compact"),
        Kind(name="DBR", labels="dbr"),
        *completed,
        *(Kind(name=f"low-rank code, {rank} components", labels="dbr-completed", rank=rank) for rank in ranks),
        *(Kind(name=f"product code, {count} parts", labels="dbr-completed", parts=count) for count in parts),
        Kind(name="FKD top 5", labels="soft-top5"),
        Kind(name="soft", labels="soft"),
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    options = make_parser().parse_args(arguments)
    return run(lambda: measure(options))


def make_parser() -> argparse.ArgumentParser:
    """The command's parser."""
    parser = argparse.ArgumentParser(
        prog=f"python -m {MODULE}",
        description="Measure students' top-1 by the bytes of a pair's label.",
        epilog=f"example:\n  python -m {MODULE} cifar10-seed0 cifar10-seed1 cifar10-seed2 --data-dir cifar10/train \\\n"
        "      --test-dir cifar10/test --teacher-checkpoint teacher.pt --out by-bytes",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("datasets", type=local_folder, nargs="+", metavar="DATASET", help="built with different seeds")
    parser.add_argument("--dataset", metavar="NAME", help="where the test images come from (the manifest's name)")
    parser.add_argument("--data-dir", type=Path, metavar="DIR", help="where the source images lie")
    parser.add_argument("--test-dir", type=Path, metavar="DIR", help="held-out images")
    parser.add_argument("--teacher-checkpoint", type=Path, metavar="FILE", help="the datasets' teacher")
    parser.add_argument("--student", metavar="ARCH", help="the students' network (the dataset's default)")
    parser.add_argument("--epochs", type=whole(1), default=300, metavar="N", help="of every student (300)")
    parser.add_argument("--priors", type=whole(1), default=9, metavar="K", help="classes in an image's prior (9)")
    parser.add_argument(
        "--further", type=whole(0), action=Several, default=[0, 1, 2, 3, 5, 8], metavar="X", help="0 1 2 3 5 8"
    )
    parser.add_argument(
        "--ranks",
        type=whole(1),
        nargs="*",
        action=Several,
        default=[2, 4, 8],
        metavar="R",
        help="low-rank codes (2 4 8)",
    )
    parser.add_argument(
        "--parts", type=whole(1), nargs="*", action=Several, default=[2, 4], metavar="M", help="product codes (2 4)"
    )
    add_alpha_dbr(parser)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="keeps datasets and finished students")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="DIR", help=f"for the report ({RESULTS})")
    parser.add_argument("--name", metavar="NAME", help="of the report's files (the dataset's)")
    add_device(parser)
    return parser


def measure(options: argparse.Namespace) -> int:
    """Trains the students that are missing, prints the report and writes it; returns the exit status."""
    manifests = [open_dataset(path).manifest for path in options.datasets]
    first = manifests[0]
    source = load_matching_source(first, name=options.dataset, data_dir=options.data_dir, test_dir=options.test_dir)
    _check_names(options.datasets)
    _check_alike(options.datasets, manifests)
    _check_counts(options, len(first.dataset.class_names))
    tested_on = None if source.test is None else source.test.fingerprint()
    for path in options.datasets:  # all of them, before any student is trained
        for kind in _kinds(options):
            _finished(options, kind, path, tested_on)
    rows = [row for path in options.datasets for row in _measure_dataset(options, path, source, tested_on)]
    names = [kind.name for kind in _kinds(options)]
    text = f"{circumstances_text([row.made for row in rows])}\n\n{table(rows, names)}"
    print(f"\n{text}")
    settings = {
        "epochs": options.epochs,
        "priors": options.priors,
        "alpha_dbr": options.alpha_dbr,
        "teacher_top1": first.teacher.top1,
    }
    teacher = teacher_text(first.teacher.architecture, (manifest.teacher.top1 for manifest in manifests))
    about = (
        f"Students trained for {options.epochs} epochs; teacher {teacher}. α_dbr {options.alpha_dbr:g} beside the KL "
        "of completed labels; codes train by the KL alone. Bytes a pair are measured: records as stored (views, mixes "
        "and distances), with priors and further classes in them, with codes beside them (without what their fit "
        "takes once); FKD-style stores for soft labels and the top 5."
    )
    write_report(
        options.results,
        f"accuracy-by-bytes-{options.name or first.dataset.name}",
        provenance(MODULE, seeds=sorted({row.seed for row in rows})),
        settings | {"students": [asdict(row) for row in rows]},
        title=f"Accuracy by the byte on {first.dataset.name}, {first.images.ipc} images per class",
        text=f"{about}\n\n{text}",
        pictures=[Picture("top-1", plot(rows, names))],
    )
    return 0


def _kinds(options: argparse.Namespace) -> list[Kind]:
    return kinds(options.further, options.ranks, options.parts)


def _check_names(datasets: Sequence[Path]) -> None:
    """Raises ConfigError for two of one name, which students and copies are kept under."""
    seen: dict[str, Path] = {}
    for path in datasets:
        other = seen.setdefault(path.name, path)
        if other is not path:
            raise ConfigError(f"DATASET: found {other} and {path}, expected folders of different names; rename one")


def _check_alike(datasets: Sequence[Path], manifests: Sequence[Manifest]) -> None:
    """Raises ConfigError for datasets that no mean over seeds can be taken of."""
    first = manifests[0]
    seeds: dict[int, Path] = {}
    for path, manifest in zip(datasets, manifests, strict=True):
        facts = (
            (manifest.images.ipc, first.images.ipc, "{} images per class"),
            (manifest.teacher.sha256, first.teacher.sha256, "a teacher of SHA-256 {:.16}"),
            (manifest.records.epochs, first.records.epochs, "{} stored epochs"),
        )
        for found, expected, text in facts:
            if found != expected:
                raise ConfigError(
                    f"{path}: {text.format(found)}, expected {text.format(expected)} as in {datasets[0]}; give "
                    "datasets that differ in their seed only"
                )
        seed = manifest.records.seed
        if seed in seeds:
            raise ConfigError(f"{path}: seed {seed}, expected another than that of {seeds[seed]}; build it with --seed")
        seeds[seed] = path


def _check_counts(options: argparse.Namespace, classes: int) -> None:
    """Raises ConfigError for an option that so many classes have no room for."""
    asked = {
        "--priors": ([options.priors], 1, classes - 1),
        "--further": (options.further, 0, classes - 2),
        "--ranks": (options.ranks, 1, classes),
        "--parts": (options.parts, 1, classes),
    }
    for option, (values, low, high) in asked.items():
        for value in values:
            if not low <= value <= high:
                raise ConfigError(f"{option}: found {value}, expected {low} to {high} for {classes} classes")


def _measure_dataset(options: argparse.Namespace, path: Path, source: Source, tested_on: str | None) -> list[Measured]:
    """All kinds of labels on one dataset."""
    device = pick_device(options.device)
    manifest = open_dataset(path).manifest
    teacher = load_dataset_teacher(manifest, options.teacher_checkpoint, device)
    rows = []
    for kind in _kinds(options):
        row = _finished(options, kind, path, tested_on)
        if row is None:
            completed = _completed(options, kind, path, teacher, device)
            trained = _train(options, kind, completed, path.name, source, teacher)
            row = replace(trained, dataset_id=manifest.dataset_id, test_fingerprint=tested_on, made=circumstances())
            write_json(_student_path(options, kind, path), asdict(row))
        rows.append(row)
        print(f"{rows[-1].kind}: seed {rows[-1].seed}, top-1 {rows[-1].top1:.2f} %", flush=True)
    return rows


def _finished(options: argparse.Namespace, kind: Kind, path: Path, tested_on: str | None) -> Measured | None:
    """A student that is done; None: it is not. Raises ConfigError where it knew another dataset or test set."""
    done = _student_path(options, kind, path)
    if not done.exists():
        return None
    row = Measured(**json.loads(done.read_text()))
    asked = {DATASET: open_dataset(path).manifest.dataset_id, TESTED_ON: tested_on}
    refuse_other(done, {DATASET: row.dataset_id, TESTED_ON: row.test_fingerprint}, asked)
    return row


def _student_path(options: argparse.Namespace, kind: Kind, path: Path) -> Path:
    """Where a student is kept: named by the dataset's folder and the options.

    Which dataset and which test images those were is in the file.
    """
    labels = kind.name.replace(", ", "-").replace(" ", "-") + (f"-{options.priors}" if kind.priors else "")
    weight = _alpha_dbr(options, kind)
    loss = "" if weight is None else f"-alpha{weight:g}"
    name = f"{path.name}-{labels}{loss}-{options.student or 'default'}-{options.epochs}.json"
    return Path(options.out, name)


def _alpha_dbr(options: argparse.Namespace, kind: Kind) -> float | None:
    """The weight of the distances' error in the loss on completed labels; None for other labels.

    A code guesses all distances but the pair's own, and the error counts those that are exact: 0.
    """
    if kind.labels != "dbr-completed":
        return None
    return 0.0 if kind.rank or kind.parts else float(options.alpha_dbr)


def _completed(options: argparse.Namespace, kind: Kind, path: Path, teacher: Teacher, device: str) -> Path:
    """The dataset with what completes this kind of labels: itself, or a copy that is made once.

    Raises:
        ConfigError: there is a copy of another dataset.
    """
    priors, further = options.priors if kind.priors else None, kind.further or None
    if priors is None and further is None:
        return path
    copy: Path = options.out / f"{path.name}-priors{priors or 0}-further{kind.further}"
    if not copy.exists():
        return complete(path, teacher, priors=priors, further=further, out=copy, device=device)
    check_completed(copy, path)
    return copy


def _train(
    options: argparse.Namespace, kind: Kind, path: Path, name: str, source: Source, teacher: Teacher
) -> Measured:
    weight = _alpha_dbr(options, kind)
    with open_dataset(path) as dataset:
        config = StudentConfig(
            labels=kind.labels,
            architecture=options.student,
            epochs=options.epochs,
            alpha_dbr=weight,
            teacher_checkpoint=options.teacher_checkpoint if StudentConfig.needs_teacher(kind.labels) else None,
            seed=dataset.manifest.records.seed,
            device=pick_device(options.device),
        )
        size = _stored_bytes(kind, dataset)
        if kind.rank or kind.parts:
            code, added = _fit_code(kind, dataset, teacher, config)
            temperature = dataset.manifest.records.temperature
            wrap = partial(CodedBatches, teacher=teacher, code=code, temperature=temperature)
            result = train_student(path, source, config, wrap=wrap)
            size += added
        else:
            result = train_student(path, source, config)
        return Measured(
            kind=kind.name,
            dataset=name,
            seed=config.seed,
            bytes_per_pair=size,
            top1=100 * result.top1,
            alpha_dbr=weight,
        )


def _fit_code(
    kind: Kind, dataset: DistilledDataset, teacher: Teacher, config: StudentConfig
) -> tuple[LogitCode, float]:
    """A code for a dataset's pairs, and the bytes it adds to each."""
    pairs = sum(entry.pairs_per_epoch for entry in dataset.manifest.shards)
    epochs = min(dataset.manifest.records.epochs, -(-FIT_PAIRS // pairs))
    log_p = predictions(dataset.path, teacher, epochs=epochs, device=config.device)
    code = ProductCode.fit(log_p, kind.parts, config.seed) if kind.parts else LowRank.fit(log_p, kind.rank)
    return code, coded_bytes(code, log_p)


def _stored_bytes(kind: Kind, dataset: DistilledDataset) -> float:
    """Bytes a pair."""
    manifest = dataset.manifest
    if kind.name == "one-hot":
        return 0.0
    if kind.labels in ("soft", "soft-top5"):
        pairs, classes = in_full_batches(epoch_pairs(dataset)), len(manifest.dataset.class_names)
        form = "fp16" if kind.labels == "soft" else "top5"
        return fkd_bytes_per_pair(pairs, size=manifest.images.size, num_classes=classes, form=form)  # type: ignore[arg-type]
    pairs_stored = sum(entry.pairs_per_epoch for entry in manifest.shards) * manifest.records.epochs
    return sum(entry.record_bytes for entry in manifest.shards) / pairs_stored


def _of(rows: Sequence[Measured], kind: str) -> list[Measured]:
    return sorted((row for row in rows if row.kind == kind), key=lambda row: row.seed)


def _tops(rows: Sequence[Measured], kind: str) -> list[float]:
    return [row.top1 for row in _of(rows, kind)]


def table(rows: Sequence[Measured], names: Sequence[str]) -> str:
    """Bytes, top-1, the paired difference to plain DBR, and how much of soft labels' gain is recovered."""
    low, high = mean(_tops(rows, "one-hot")), mean(_tops(rows, "soft"))
    lines = []
    for name in names:
        tops = _tops(rows, name)
        share = f"{100 * (mean(tops) - low) / (high - low):.0f}" if high > low else "-"
        size = mean(row.bytes_per_pair for row in _of(rows, name))
        lines.append([name, f"{size:.2f}", spread(tops), interval(_tops(rows, "DBR"), tops), share])
    return markdown_table(["labels", "bytes a pair", "top-1 %", "− DBR, 95 %", "recovered %"], lines)


def plot(rows: Sequence[Measured], names: Sequence[str]) -> Figure:
    """Bytes a pair, logarithmic, against top-1; lines join the numbers of further classes."""
    figure = Figure(figsize=(7.5, 4.5), layout="constrained")
    axis = figure.subplots()
    lines = {
        "completed, no priors": [name for name in names if name.endswith("no priors")],
        "completed, priors": [name for name in names if name.endswith(", priors")],
        "low-rank codes": [name for name in names if name.startswith("low-rank")],
        "product codes": [name for name in names if name.startswith("product")],
    }
    lines = {label: members for label, members in lines.items() if members}
    joined = {name for members in lines.values() for name in members}
    single = [name for name in names if name not in joined and name != "one-hot"]
    for label, members in [*lines.items(), *((name, [name]) for name in single)]:
        places = [mean(row.bytes_per_pair for row in _of(rows, name)) for name in members]
        tops = [_tops(rows, name) for name in members]
        error = [stdev(each) if len(each) > 1 else 0.0 for each in tops]
        axis.errorbar(places, [mean(each) for each in tops], yerr=error, marker="o", capsize=2, label=label)
    axis.axhline(mean(_tops(rows, "one-hot")), color="grey", linestyle=":", label="one-hot")
    axis.set(xscale="log", xlabel="bytes a pair", ylabel="student top-1, %")
    axis.legend(fontsize=8)
    return figure


if __name__ == "__main__":
    raise SystemExit(main())
