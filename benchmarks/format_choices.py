"""What the format's choices cost in accuracy: levels of a distance, the grids of views and mixes, the images' codec.

`python -m benchmarks.format_choices --study distances --dataset cifar10 --teacher-checkpoint FILE --out DIR` trains a
DBR student for every variant and seed, all else equal, and compares each with the study's first variant, seed by seed.
Images are whole random training images, so that nothing but the choice in question differs. A cell whose result is in
DIR, with the same settings behind its name, is not trained again: several processes may share the seeds between them,
and a last call reports on them all.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure

from benchmarks.command import Several, add_device, add_source, pick_device, run, whole
from benchmarks.exact_distances import Distances, exact_distances
from benchmarks.footprint import measure
from benchmarks.grid import KEY_DIGITS, PLACES, Origin
from benchmarks.results_io import Picture, markdown_table, provenance, write_json, write_report
from benchmarks.spread import interval, spread
from benchmarks.student import StudentConfig, train_student
from builders.config import BuildConfig
from builders.pipeline import build
from builders.sources import Source, load_source
from loaders import DBRBatch, DBRLoader
from loaders.order import EpochOrder, ShardPairs, stored_epoch
from nrrdd_format.codebooks import distance_levels, quantize
from nrrdd_format.dataset import open_dataset
from nrrdd_format.errors import ConfigError, counted
from nrrdd_format.files import atomic_write
from nrrdd_format.manifest import Manifest
from nrrdd_format.shards import file_sha256

MODULE = "benchmarks.format_choices"
RESULTS = Path("benchmarks") / "results"


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One way to choose: what it changes of a build, or how it rounds the teacher's exact distances."""

    name: str
    build: dict[str, Any]
    rounding: Callable[[Distances], Distances] | None = None


def _rounded(bits: int) -> Callable[[Distances], Distances]:
    levels = distance_levels(2**bits)
    return lambda distances: levels[quantize(distances, levels)]


def _half(distances: Distances) -> Distances:
    return distances.astype(np.float16).astype(np.float32)


STUDIES: dict[str, list[Variant]] = {
    "distances": [
        Variant(name="fp32", build={}, rounding=lambda distances: distances),
        Variant(name="fp16", build={}, rounding=_half),
        *(Variant(name=f"{bits} bits", build={}, rounding=_rounded(bits)) for bits in (8, 7, 6, 5, 4, 3, 2)),
    ],
    "views": [Variant(name=f"{count} views", build={"views": count}) for count in (4096, 512, 256, 128, 32)],
    "mixes": [
        Variant(name="1024 mixes, one a pair", build={"mix_group": 1}),
        Variant(name="1024 mixes, one for 10 pairs", build={}),
        Variant(name="1024 mixes, one for 50 pairs", build={"mix_group": 50}),
        Variant(name="64 mixes, one for 10 pairs", build={"mixes": 64}),
    ],
    "codecs": [
        Variant(name="png", build={"image_codec": "png"}),
        *(
            Variant(name=f"{codec} {quality}", build={"image_codec": codec, "image_quality": quality})
            for codec in ("jpeg", "webp")
            for quality in (95, 90, 75, 50)
        ),
    ],
}


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What all cells of a run have in common."""

    study: str
    variants: tuple[Variant, ...]
    dataset: str
    data_dir: Path | None
    test_dir: Path | None
    classes: tuple[str, ...] | None
    size: int | None
    teacher_checkpoint: Path
    out: Path
    ipc: int
    epochs: int
    student: str
    seeds: tuple[int, ...]
    device: str
    origin: Origin
    """Part of every name: the same folder may hold other images another time."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """A cell: one student. Bytes are those of the dataset it learned from; rounded distances are never written."""

    study: str
    variant: str
    seed: int
    top1: float
    bytes_images: int
    bytes_labels: int
    images: int
    pairs: int
    seconds: float


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    options = make_parser().parse_args(arguments)
    return run(lambda: measure_choices(options))


def make_parser() -> argparse.ArgumentParser:
    """The command's parser."""
    parser = argparse.ArgumentParser(
        prog=f"python -m {MODULE}",
        description="Measure what the format's choices cost a student's top-1.",
        epilog=f"example:\n  python -m {MODULE} --study distances --dataset cifar10 --data-dir data/cifar10 \\\n"
        "      --teacher-checkpoint cifar10-teacher.pt --seeds 0 1 2 3 4 --out choices",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--study", choices=tuple(STUDIES), required=True, help="what is chosen")
    parser.add_argument(
        "--variants", action=Several, metavar="NAME", help="only these, the first to compare with (all)"
    )
    add_source(parser, default="cifar10")
    parser.add_argument("--classes", action=Several, metavar="CLASS", help="only these classes (names or WNIDs)")
    parser.add_argument("--size", type=whole(8), metavar="PX", help="side of the images; imagefolder only")
    parser.add_argument("--teacher-checkpoint", type=Path, required=True, metavar="FILE", help="a trained teacher")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="keeps datasets and results")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="DIR", help=f"for the report ({RESULTS})")
    parser.add_argument("--ipc", type=whole(1), default=10, metavar="N", help="images per class (10)")
    parser.add_argument("--epochs", type=whole(1), default=300, metavar="N", help="stored and trained (300)")
    parser.add_argument("--student", metavar="ARCH", help="the students' network (the dataset's default)")
    parser.add_argument("--seeds", type=whole(0), action=Several, default=[0, 1, 2], metavar="N", help="(0 1 2)")
    add_device(parser)
    return parser


def measure_choices(options: argparse.Namespace) -> int:
    """Runs the study's cells, prints the table and writes the report; returns the exit status."""
    source = load_source(
        options.source, data_dir=options.data_dir, test_dir=options.test_dir, classes=options.classes, size=options.size
    )
    setup = Setup(
        study=options.study,
        variants=chosen_variants(options.study, options.variants),
        dataset=options.source,
        data_dir=options.data_dir,
        test_dir=options.test_dir,
        classes=None if options.classes is None else tuple(options.classes),
        size=options.size,
        teacher_checkpoint=options.teacher_checkpoint,
        out=options.out,
        ipc=options.ipc,
        epochs=options.epochs,
        student=options.student or source.default_model,
        seeds=tuple(options.seeds),
        device=pick_device(options.device),
        origin=Origin.of(source),
    )
    results = list(run_cells(setup, source))
    text = report(setup, results)
    print(f"\n{text}")
    classes, draw = len(source.class_names), plot_bytes if setup.study == "codecs" else plot
    write_report(
        options.results,
        f"choice-of-{setup.study}-{setup.dataset}-{classes}",
        provenance(MODULE, seeds=setup.seeds),
        {"cells": [asdict(result) for result in results]},
        title=f"The choice of {setup.study}, on {classes} classes of {setup.dataset}",
        text=text,
        pictures=[Picture("top-1", draw(setup, results))],
    )
    return 0


def chosen_variants(study: str, names: Sequence[str] | None) -> tuple[Variant, ...]:
    """The study's variants of these names (None: all), in the order given. Raises ConfigError for an unknown name."""
    known = {variant.name: variant for variant in STUDIES[study]}
    unknown = [name for name in names or () if name not in known]
    if unknown:
        raise ConfigError(f"--variants: found {unknown[0]!r}, expected some of {', '.join(map(repr, known))}")
    return tuple(known[name] for name in names or known)


def run_cells(setup: Setup, source: Source) -> Iterator[Result]:
    """All cells, seed by seed, each read where it is there already."""
    for seed in setup.seeds:
        for variant in setup.variants:
            result = run_cell(setup, source, variant, seed)
            print(f"seed {seed}, {variant.name}: top-1 {result.top1:.2%}", flush=True)
            yield result


def run_cell(setup: Setup, source: Source, variant: Variant, seed: int) -> Result:
    """The result of one cell: read where it is there, else built, trained, tested and written."""
    cell, dataset = cell_path(setup, variant, seed), dataset_path(setup, variant, seed)
    if cell.is_file():
        return Result(**json.loads(cell.read_text()))
    if not dataset.is_dir():
        build(replace(_build_config(setup, variant, seed), out=dataset))
    config = _student_config(setup, seed)
    if variant.rounding is None:
        student = train_student(dataset, source, config)
    else:
        rounded = variant.rounding(_kept_distances(dataset, setup))
        manifest = open_dataset(dataset).manifest
        student = train_student(
            dataset, source, config, wrap=lambda loader: ReplacedDistances(loader, rounded, seed, manifest)
        )
    with open_dataset(dataset) as opened:
        footprint = measure(opened)
    result = Result(
        study=setup.study,
        variant=variant.name,
        seed=seed,
        top1=student.top1,
        bytes_images=footprint.image_data,
        bytes_labels=footprint.labels,
        images=footprint.images,
        pairs=footprint.pairs,
        seconds=student.seconds,
    )
    write_json(cell, asdict(result))
    return result


def dataset_path(setup: Setup, variant: Variant, seed: int) -> Path:
    """The folder of a cell's dataset, which those that are built alike share."""
    made_of = (file_sha256(setup.teacher_checkpoint), setup.origin.train)
    key = _key(_decisive(_build_config(setup, variant, seed)), *made_of)
    return setup.out / "datasets" / f"{setup.dataset}-ipc{setup.ipc}-seed{seed}-{key}"


def cell_path(setup: Setup, variant: Variant, seed: int) -> Path:
    """The file of a cell's result."""
    dataset = dataset_path(setup, variant, seed).name
    rounded = None if variant.rounding is None else variant.rounding(_PROBES).tolist()
    key = _key(dataset, _decisive(_student_config(setup, seed)), rounded, setup.origin.test)
    return setup.out / "cells" / f"{dataset}-{setup.study}-{variant.name.replace(' ', '-')}-{key}.json"


_PROBES = np.geomspace(1e-4, 20, 1000, dtype=np.float32)
"""Distances whose rounded values tell one rounding from another."""


def _decisive(config: BuildConfig | StudentConfig) -> dict[str, Any]:
    return {name: value for name, value in asdict(config).items() if name not in PLACES}


def _key(*values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:KEY_DIGITS]


def _student_config(setup: Setup, seed: int) -> StudentConfig:
    return StudentConfig(labels="dbr", architecture=setup.student, epochs=setup.epochs, seed=seed, device=setup.device)


def _build_config(setup: Setup, variant: Variant, seed: int) -> BuildConfig:
    """The build, into a folder that is not named yet."""
    base = BuildConfig(
        dataset=setup.dataset,
        data_dir=setup.data_dir,
        test_dir=setup.test_dir,
        classes=setup.classes,
        size=setup.size,
        out=setup.out,
        work_dir=setup.out / "work" / f"seed{seed}",
        ipc=setup.ipc,
        teacher_checkpoint=setup.teacher_checkpoint,
        init="real",
        iterations=0,
        epochs=setup.epochs,
        seed=seed,
        device=setup.device,
    )
    return replace(base, **variant.build)


def _kept_distances(dataset: Path, setup: Setup) -> Distances:
    """The teacher's distances of all pairs, unrounded: (E, 2, P); a file keeps them for the next cell."""
    kept = dataset.with_name(f"{dataset.name}.distances.npy")
    if not kept.is_file():
        distances = exact_distances(dataset, setup.teacher_checkpoint, setup.device)
        with atomic_write(kept) as file:
            np.save(file, distances)
    found: Distances = np.load(kept, allow_pickle=False)
    return found


class ReplacedDistances:
    """A loader's batches with other distances than those stored: (E, 2, P), of a dataset of one shard."""

    def __init__(self, loader: DBRLoader, distances: Distances, seed: int, manifest: Manifest) -> None:
        self._loader, self._distances, self._seed = loader, distances, seed
        pairs = tuple(entry.pairs_per_epoch for entry in manifest.shards)
        self._shards = ShardPairs(pairs_per_shard=pairs, cycle=manifest.records.cycle)

    def set_epoch(self, epoch: int) -> None:
        """As of the loader."""
        self._loader.set_epoch(epoch)

    def __iter__(self) -> Iterator[DBRBatch]:
        """The epoch's batches."""
        epoch = self._loader.epoch
        order = EpochOrder(self._seed, epoch, self._shards).pairs(0)  # the pairs of a single shard are one window
        stored = self._distances[stored_epoch(self._seed, epoch, len(self._distances))]
        start = 0
        for batch in self._loader:
            pairs = order[start : start + len(batch)]
            start += len(batch)
            org, aug = (torch.from_numpy(column[pairs]).to(batch.images.device) for column in stored)
            yield replace(batch, distance_org=org, distance_aug=aug)


def report(setup: Setup, results: Sequence[Result]) -> str:
    """What was measured, as Markdown: every variant against the first."""
    rows = [_row(variant, setup.variants[0], results) for variant in setup.variants]
    header = ["variant", "top-1 %", "against the first", "bytes an image", "label bytes a pair"]
    intro = (
        f"{setup.ipc} whole random real images per class of {setup.dataset}, student {setup.student} on DBR labels, "
        f"{setup.epochs} epochs, {counted(len(setup.seeds), 'seed')}. Mean ± standard deviation; differences are "
        "paired by seed, in points, with the 95 % interval of their mean."
    )
    return f"{intro}\n\n{markdown_table(header, rows)}"


def _row(variant: Variant, first: Variant, results: Sequence[Result]) -> list[str]:
    cells, tops = _of(results, variant), _tops(results, variant)
    return [
        variant.name,
        spread(tops),
        "" if variant is first else interval(_tops(results, first), tops),
        f"{median(cell.bytes_images / cell.images for cell in cells):,.0f}",
        "" if variant.rounding else f"{median(cell.bytes_labels / cell.pairs for cell in cells):.2f}",
    ]


def plot(setup: Setup, results: Sequence[Result]) -> Figure:
    """Top-1 of every variant, one point a seed, and the means."""
    variants = setup.variants
    figure = Figure(figsize=(7, 0.4 * len(variants) + 1.2), layout="constrained")
    axis = figure.subplots()
    for row, variant in enumerate(variants):
        tops = _tops(results, variant)
        axis.plot(tops, [row] * len(tops), "o", color="tab:blue", alpha=0.4)
        axis.plot(mean(tops), row, "|", color="black", markersize=14)
    axis.set_yticks(range(len(variants)), [variant.name for variant in variants])
    axis.invert_yaxis()
    axis.set_xlabel(f"top-1 of a DBR student on {setup.dataset}, % (points: seeds; bars: means)")
    return figure


def plot_bytes(setup: Setup, results: Sequence[Result]) -> Figure:
    """Bytes an image against top-1, mean and standard deviation over seeds, a line for each codec."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axis = figure.subplots()
    variants = setup.variants
    for codec in dict.fromkeys(variant.build["image_codec"] for variant in variants):
        here = [variant for variant in variants if variant.build["image_codec"] == codec]
        sizes = [median(cell.bytes_images / cell.images for cell in _of(results, variant)) for variant in here]
        tops = [_tops(results, variant) for variant in here]
        errors = [stdev(each) if len(each) > 1 else 0.0 for each in tops]
        axis.errorbar(sizes, [mean(each) for each in tops], yerr=errors, fmt="o-", capsize=2, label=codec)
        for variant, size, each in zip(here, sizes, tops, strict=True):
            text = str(variant.build.get("image_quality", "lossless"))
            axis.annotate(text, (size, mean(each)), xytext=(4, 4), textcoords="offset points", fontsize=8)
    axis.set(xlabel="bytes an image", ylabel=f"top-1 of a DBR student on {setup.dataset}, %")
    axis.legend()
    return figure


def _of(results: Sequence[Result], variant: Variant) -> list[Result]:
    return [result for result in results if result.variant == variant.name]


def _tops(results: Sequence[Result], variant: Variant) -> list[float]:
    """Top-1 in percent, one value a seed."""
    return [100 * result.top1 for result in _of(results, variant)]


if __name__ == "__main__":
    raise SystemExit(main())
