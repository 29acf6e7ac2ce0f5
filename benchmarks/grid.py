"""Builds datasets, trains students on them and keeps every result: what the accuracy benchmarks and the demo run.

A cell is one student: images per class, kind of images, kind of labels, seed, and what else differs from the defaults.
Its result is a JSON file whose name holds a digest of all that determines it, so an interrupted grid goes on with the
cells that are missing.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, replace
from multiprocessing import active_children, get_context
from pathlib import Path
from typing import Any

import torch

from benchmarks.completion import check_completed, complete
from benchmarks.footprint import Footprint, measure, soft_label_bytes
from benchmarks.results_io import circumstances, refuse_other, write_json
from benchmarks.student import ALPHA_DBR, Labels, StudentConfig, check_student, load_dataset_teacher, train_student
from benchmarks.teacher import TeacherConfig, summary, train_and_save
from builders.compiled import compile_apart
from builders.config import PATCH_OPTIONS, BuildConfig, Confidence, Init, Mask, Precision
from builders.cores import reading_threads
from builders.job import has_bfloat16
from builders.parent import end_with_parent
from builders.pipeline import build
from builders.sources import Source, load_source
from builders.teacher import PREFLIGHT_IMAGES
from nrrdd_format.dataset import open_dataset
from nrrdd_format.errors import ConfigError, counted
from nrrdd_format.files import locked, make_folder
from nrrdd_format.manifest import MANIFEST_NAME, Manifest
from nrrdd_format.shards import file_sha256

Changes = tuple[tuple[str, Any], ...]
"""Options that differ from their defaults: (name, JSON value), sorted by name."""


@dataclass(frozen=True, kw_only=True)
class ImageKind:
    """What a kind of images starts from, and how it is refined; what follows `refined` only matters if it is."""

    init: Init = "cidd"
    confidence: Confidence = BuildConfig.confidence
    refined: bool = False
    mask: Mask = "non-critical"
    label_refinement: bool = False
    views: bool = True
    """Whether label refinement mixes views, not whole images."""


IMAGES = {
    "random-real": ImageKind(init="real"),
    "rded": ImageKind(confidence="highest"),
    "discovery": ImageKind(confidence="lowest"),
    "random-patches": ImageKind(confidence="random"),
    "nrr": ImageKind(refined=True),
    "nrr+lr": ImageKind(refined=True, label_refinement=True),
    "nrr+lr-whole": ImageKind(refined=True, label_refinement=True, views=False),
    "discovery+nrr": ImageKind(confidence="lowest", refined=True),
    "discovery+nrr+lr": ImageKind(confidence="lowest", refined=True, label_refinement=True),
    "random-patches+nrr": ImageKind(confidence="random", refined=True),
    "real+nrr": ImageKind(init="real", refined=True),
    "real+nrr+lr": ImageKind(init="real", refined=True, label_refinement=True),
    "real+all-pixels": ImageKind(init="real", refined=True, mask="all"),
    "noise+all-pixels": ImageKind(init="noise", refined=True, mask="all"),
}
"""Kinds of images by name; the part before `+` is what refinement starts from, where that is not the default.

`rded` keeps the patches of highest confidence (RDED itself: crops and patches of the least cross-entropy to their
class), `discovery` those of the lowest, as the paper does: so `discovery+nrr+lr` is the paper's whole method, `nrr+lr`
this project's. `noise+all-pixels` starts and refines as SRe2L.
"""


@dataclass(frozen=True, kw_only=True)
class LabelKind:
    """How a student is trained on a kind of labels, and what its dataset holds beside two distances a pair."""

    labels: Labels
    soft_temperature: float = 1.0
    priors: int | None = None
    """Classes in each image's prior, at most."""
    further: int | None = None
    """Further classes of each pair, at most."""

    @property
    def completes(self) -> bool:
        """Whether the labels need more than a plain dataset."""
        return self.priors is not None or self.further is not None

    def within(self, classes: int) -> LabelKind:
        """The same for a dataset of so many classes: no more than there are besides an image's or a pair's own."""
        priors, further = min(self.priors or 0, classes - 1), min(self.further or 0, classes - 2)
        return replace(self, priors=priors or None, further=max(0, further) or None)


LABELS = {
    "one-hot": LabelKind(labels="one-hot"),
    "compact": LabelKind(labels="compact"),
    "dbr": LabelKind(labels="dbr"),
    "dbr-priors": LabelKind(labels="dbr-completed", priors=9),
    "dbr-further1": LabelKind(labels="dbr-completed", priors=9, further=1),
    "dbr-further3": LabelKind(labels="dbr-completed", priors=9, further=3),
    "dbr-priors99": LabelKind(labels="dbr-completed", priors=99),
    "dbr-further1-priors99": LabelKind(labels="dbr-completed", priors=99, further=1),
    "dbr-further3-priors99": LabelKind(labels="dbr-completed", priors=99, further=3),
    "dbr-further8-priors99": LabelKind(labels="dbr-completed", priors=99, further=8),
    "dbr-further3-t4": LabelKind(labels="dbr-completed", priors=9, further=3, soft_temperature=4.0),
    "dbr-further8-t20": LabelKind(labels="dbr-completed", priors=9, further=8, soft_temperature=20.0),
    "soft": LabelKind(labels="soft"),
    "soft-t20": LabelKind(labels="soft", soft_temperature=20.0),
    "fkd-top5": LabelKind(labels="soft-top5"),
}
"""Kinds of labels by name. The `dbr-` ones are completed by images' priors, of nine classes where the name has no other
number, and some by further classes of each pair; `-tN` is the temperature of the student's KL, 20 in RDED's
evaluations; FKD keeps the five highest."""


@dataclass(frozen=True, kw_only=True)
class Grid:
    """What is measured, and how."""

    dataset: str
    data_dir: Path | None = None
    test_dir: Path | None = None
    out: Path
    """Holds the teacher, the datasets, the builds' work folders and the cells' results."""
    teacher_checkpoint: Path
    """Trained with `teacher` first where it is missing."""
    teacher: TeacherConfig
    ipcs: tuple[int, ...]
    images: tuple[str, ...]
    """Names in `IMAGES`."""
    labels: tuple[str, ...]
    """Names in `LABELS`."""
    seeds: tuple[int, ...]
    student: str
    epochs: int
    """Of every student."""
    stored_epochs: int | None = None
    """In every dataset, repeated by the students' further epochs; None: as many as those train."""
    iterations: int
    """Of refinement, for the kinds of images that are refined."""
    precision: Precision = BuildConfig.precision
    """Of refinement."""
    compile: bool = BuildConfig.compile
    """Whether refinement runs through torch.compile."""
    alpha_dbr: float = ALPHA_DBR["dbr-completed"]
    """Of students on completed labels."""
    device: str = "cpu"

    def cells(self) -> Iterator[Cell]:
        """All cells, seed by seed; those that share a dataset follow each other."""
        for ipc in self.ipcs:
            for seed in self.seeds:
                for images in self.images:
                    for labels in self.labels:
                        yield Cell(ipc=ipc, images=images, labels=labels, seed=seed)


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One student of a grid; `build` and `student` hold what its options differ in from its kind's."""

    ipc: int
    images: str
    labels: str
    seed: int
    build: Changes = ()
    student: Changes = ()

    def __str__(self) -> str:
        changes = "".join(f", {name} {value}" for name, value in self.build + self.student)
        return f"IPC {self.ipc}, {self.images} images, {self.labels} labels, seed {self.seed}{changes}"


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a cell came to.

    Attributes:
        build, student_options: what the cell's options differ in from its kind's.
        top1: share of the real test images the student gets right after its last epoch.
        test_images: how many there are.
        bytes_images: the encoded images.
        bytes_labels: what these labels take: nothing for one-hot, the dataset's labels for dbr and compact, a store of
            fp16 soft labels, or of five a pair, for the others.
        bytes_soft_labels: what soft labels of the same pairs take, measured on files.
        clipped_share: see `StudentResult`.
        alpha_dbr: weight of the distances' error in the loss on completed labels; None for other labels.
        train_fingerprint, test_fingerprint: of the images it comes from and was tested on (`ImageSet.fingerprint`).
        precision: that its images were refined in; None where they are not refined.
        made: date, hardware and versions.

    The last five are None in a file of before they were recorded.
    """

    dataset: str
    ipc: int
    teacher: str
    teacher_top1: float | None
    student: str
    images: str
    labels: str
    seed: int
    epochs: int
    stored_epochs: int
    iterations: int
    build: dict[str, Any]
    student_options: dict[str, Any]
    top1: float
    test_images: int
    bytes_images: int
    bytes_labels: float
    bytes_soft_labels: float
    clipped_share: float | None
    seconds: float
    alpha_dbr: float | None = None
    train_fingerprint: str | None = None
    test_fingerprint: str | None = None
    precision: str | None = None
    made: dict[str, Any] | None = None


Table = dict[Cell, Result]


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Fingerprints of the images that students come from and are tested on, which no file's name tells."""

    train: str
    test: str | None

    @staticmethod
    def of(source: Source) -> Origin:
        """A source's."""
        return Origin(train=source.train.fingerprint(), test=None if source.test is None else source.test.fingerprint())


def run_grid(grid: Grid, source: Source, cells: Iterable[Cell] | None = None, *, processes: int = 1) -> Table:
    """Runs those of the cells (None: all of the grid's) that have no result yet, a line for each; returns them all.

    With more `processes`, each takes the cells of one dataset at a time; they share the machine's cores and its GPU,
    which small networks leave idle.

    Raises:
        ConfigError: there is no such network for students, a cell's options do not go together, or results or datasets
            that are there were made with other images or in another precision; no student is trained then.
        DataError: the source has no test images.
    """
    check_student(grid.student, source)
    if grid.compile:
        compile_apart()
    ensure_teacher(grid, source)
    origin = Origin.of(source)
    wanted = list(grid.cells() if cells is None else cells)
    for cell in wanted:
        build_config(grid, cell)
    table = read_cells(grid, wanted, origin)
    missing = [cell for cell in wanted if cell not in table]
    _refuse_mix(grid, table, missing)
    for cell in missing:
        _check_dataset(grid, cell, origin)
    started = time.perf_counter()
    for number, (cell, result) in enumerate(_results(grid, missing, source, origin, processes), start=1):
        table[cell] = result
        left = (time.perf_counter() - started) / number * (len(missing) - number)
        done = len(wanted) - len(missing) + number
        print(f"[{done}/{len(wanted)}] {cell}: top-1 {table[cell].top1:.2%}, {_about(left)} left", flush=True)
    return {cell: table[cell] for cell in wanted}


def _results(
    grid: Grid, cells: Sequence[Cell], source: Source, origin: Origin, processes: int
) -> Iterator[tuple[Cell, Result]]:
    """Runs the cells, and gives each with its result when it is there."""
    if processes == 1:
        yield from ((cell, run_cell(grid, cell, source, origin)) for cell in cells)
        return
    by_dataset: dict[Path, list[Cell]] = {}
    for cell in cells:
        by_dataset.setdefault(dataset_path(grid, cell), []).append(cell)
    logs = grid.out / "logs"
    make_folder(logs)
    pool = ProcessPoolExecutor(
        processes,
        mp_context=get_context("spawn"),  # CUDA does not survive a fork
        initializer=_begin_process,
        initargs=(processes, logs),
    )
    try:
        running = [pool.submit(_run_cells, grid, group, origin) for group in by_dataset.values()]
        for group in as_completed(running):
            yield from group.result()
    except BaseException as error:
        for child in active_children():
            child.terminate()  # or they would go through all that is left
        if isinstance(error, BrokenProcessPool):
            raise ConfigError(
                "a process of the grid has died; if memory ran out, lower --processes; finished students are kept"
            ) from error
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _begin_process(processes: int, logs: Path) -> None:
    """Takes the process's share of the cores, and a file for what it says: several would talk at once."""
    end_with_parent()
    os.environ["LOCAL_WORLD_SIZE"] = str(processes)
    torch.set_num_threads(reading_threads(None))
    sys.stderr = (logs / f"{os.getpid()}.log").open("w", buffering=1)


def _run_cells(grid: Grid, cells: Sequence[Cell], origin: Origin) -> list[tuple[Cell, Result]]:
    """In a process of its own: the cells of one dataset.

    It reads the source itself: what is sent must fit into a pipe, or the sender could wait for a process that has died.
    """
    source = load_source(grid.dataset, data_dir=grid.data_dir, test_dir=grid.test_dir)
    return [(cell, run_cell(grid, cell, source, origin)) for cell in cells]


def read_cells(grid: Grid, cells: Iterable[Cell], origin: Origin) -> Table:
    """The results of those cells that have one, in the order given.

    Raises:
        ConfigError: one comes from other images or was tested on others, or they differ in precision.
    """
    table: Table = {}
    for cell in cells:
        if result := read_cell(grid, cell):
            table[cell] = result
            made = {TRAINED_ON: result.train_fingerprint, TESTED_ON: result.test_fingerprint}
            refuse_other(cell_path(grid, cell), made, {TRAINED_ON: origin.train, TESTED_ON: origin.test})
    _refuse_mix(grid, table, ())
    return table


def read_cell(grid: Grid, cell: Cell) -> Result | None:
    """The result of a cell, whatever images it comes from; None: it has none yet."""
    path = cell_path(grid, cell)
    return Result(**json.loads(path.read_text())) if path.is_file() else None


TRAINED_ON, TESTED_ON = "training images of fingerprint", "test images of fingerprint"
"""What a message calls an `Origin`."""


def _refuse_mix(grid: Grid, table: Table, missing: Iterable[Cell]) -> None:
    """Raises ConfigError where results differ in the precision of their refinement, or from what is missing.

    Cells that name their precision are left out: they are there to be compared.
    """
    left_open = {cell: result for cell, result in table.items() if "precision" not in dict(cell.build)}
    wanted = [precision(grid, cell) for cell in missing if "precision" not in dict(cell.build)]
    precisions = (*wanted, *(result.precision for result in left_open.values()))
    expected = next((each for each in precisions if each is not None), None)
    for cell, result in left_open.items():
        refuse_other(cell_path(grid, cell), {"precision": result.precision}, {"precision": expected})


def run_cell(grid: Grid, cell: Cell, source: Source, origin: Origin) -> Result:
    """Builds, trains and tests a cell; writes its result and returns it."""
    dataset = labelled_dataset(grid, cell, origin)
    config = student_config(grid, cell)
    student = train_student(dataset, source, config)
    with open_dataset(dataset) as opened:
        footprint, manifest = measure(opened), opened.manifest
        soft, top5 = soft_label_bytes(opened), soft_label_bytes(opened, "top5")
    result = Result(
        dataset=grid.dataset,
        ipc=cell.ipc,
        teacher=manifest.teacher.architecture,
        teacher_top1=manifest.teacher.top1,
        student=grid.student,
        images=cell.images,
        labels=cell.labels,
        seed=cell.seed,
        epochs=config.epochs,
        stored_epochs=stored_epochs(grid),
        iterations=build_config(grid, cell).iterations,
        build=dict(cell.build),
        student_options=dict(cell.student),
        top1=student.top1,
        test_images=student.test_images,
        bytes_images=footprint.image_data,
        bytes_labels=_label_bytes(cell.labels, footprint, soft, top5),
        bytes_soft_labels=soft,
        clipped_share=student.clipped_share,
        seconds=student.seconds,
        alpha_dbr=config.distances_weight if LABELS[cell.labels].completes else None,
        train_fingerprint=origin.train,
        test_fingerprint=origin.test,
        precision=_refined_in(manifest),
        made=circumstances(),
    )
    write_json(cell_path(grid, cell), asdict(result))
    return result


def built_dataset(grid: Grid, cell: Cell, origin: Origin) -> Path:
    """The dataset of the cell's images, built where it is missing; a folder under its name is whole.

    Raises:
        ConfigError: it is there, built from other images or in another precision.
    """
    path = dataset_path(grid, cell)
    if path.is_dir():
        _check_dataset(grid, cell, origin)
    else:
        write_json(_origin_path(grid, cell), {"train_fingerprint": origin.train})
        config = build_config(grid, cell)
        make_folder(config.work_path.parent)
        with locked(config.work_path.with_suffix(".lock")):  # one build at a time; the next finds what both need
            build(config)
    return path


def _check_dataset(grid: Grid, cell: Cell, origin: Origin) -> None:
    """Raises ConfigError where the cell's dataset is there, built from other images or in another precision."""
    path, noted = dataset_path(grid, cell), _origin_path(grid, cell)
    if not path.is_dir():
        return
    train = json.loads(noted.read_text())["train_fingerprint"] if noted.is_file() else None
    made = {TRAINED_ON: train, "precision": _refined_in(Manifest.load(path / MANIFEST_NAME))}
    refuse_other(path, made, {TRAINED_ON: origin.train, "precision": precision(grid, cell)})


def precision(grid: Grid, cell: Cell) -> str | None:
    """What a build of the cell's images refines them in on the grid's device; None: it does not refine."""
    config = build_config(grid, cell)
    if not config.iterations:
        return None
    on_device = "bf16" if has_bfloat16(torch.device(grid.device)) else "fp32"
    return on_device if config.precision == "auto" else config.precision


def _refined_in(manifest: Manifest) -> str | None:
    """What a built dataset was refined in; None: it was not, or that is not recorded."""
    refinement = manifest.method["refinement"]
    found: str | None = refinement.get("precision") if refinement["iterations"] else None
    return found


def labelled_dataset(grid: Grid, cell: Cell, origin: Origin) -> Path:
    """The same as the cell's student sees it: completed where its labels are.

    Raises as `built_dataset`, and ConfigError where it is there, completed from another dataset.
    """
    built, labelled = built_dataset(grid, cell, origin), labelled_path(grid, cell)
    if not labelled.is_dir():
        manifest = Manifest.load(built / MANIFEST_NAME)
        kind = LABELS[cell.labels].within(len(manifest.dataset.class_names))
        teacher = load_dataset_teacher(manifest, grid.teacher_checkpoint, grid.device)
        complete(built, teacher, priors=kind.priors, further=kind.further, out=labelled, device=grid.device)
    elif labelled != built:
        check_completed(labelled, built)
    return labelled


def _label_bytes(labels: str, footprint: Footprint, soft: float, top5: float) -> float:
    kind = LABELS[labels].labels
    return {"one-hot": 0.0, "soft": soft, "soft-top5": top5}.get(kind, float(footprint.labels))


def ensure_teacher(grid: Grid, source: Source) -> None:
    """Trains the grid's teacher if its checkpoint is not there."""
    if not grid.teacher_checkpoint.is_file():
        log = train_and_save(source, grid.teacher, grid.teacher_checkpoint)
        print(f"teacher: {summary(log)}", flush=True)


def require_teacher(checkpoint: Path) -> None:
    """For commands that train none. Raises ConfigError: there is no such file."""
    if not checkpoint.is_file():
        raise ConfigError(
            f"--teacher-checkpoint: found no file {checkpoint}, expected a trained teacher; make one with nrrdd teacher"
        )


def build_config(grid: Grid, cell: Cell) -> BuildConfig:
    """The build of a cell's images; builds of one seed share the results of the stages they have in common."""
    changes = dict(cell.build)
    if changes.get("init", "cidd") != "cidd":  # then the kind's options of patches mean nothing
        changes = {name: getattr(BuildConfig, name) for name in PATCH_OPTIONS} | changes
    return replace(_kind_config(grid, cell), out=dataset_path(grid, cell), **changes)


def _kind_config(grid: Grid, cell: Cell) -> BuildConfig:
    """The build of the cell's kind of images without the cell's changes, into a folder that is not named yet."""
    kind = IMAGES[cell.images]
    config = BuildConfig(
        dataset=grid.dataset,
        data_dir=grid.data_dir,
        test_dir=grid.test_dir,
        out=grid.out,
        work_dir=grid.out / "work" / f"seed{cell.seed}",
        ipc=cell.ipc,
        teacher_checkpoint=grid.teacher_checkpoint,
        init=kind.init,
        confidence=kind.confidence,
        mask=kind.mask,
        label_refinement_views=kind.views,
        iterations=grid.iterations if kind.refined else 0,
        epochs=stored_epochs(grid),
        seed=cell.seed,
        device=grid.device,
    )
    if kind.refined:
        config = replace(config, precision=grid.precision, compile=grid.compile)
    return config if kind.label_refinement else replace(config, alpha_lr=0.0)


def stored_epochs(grid: Grid) -> int:
    """Epochs stored in every dataset."""
    return grid.epochs if grid.stored_epochs is None else grid.stored_epochs


def student_config(grid: Grid, cell: Cell) -> StudentConfig:
    """How a cell's student is trained."""
    kind = LABELS[cell.labels]
    config = StudentConfig(
        labels=kind.labels,
        soft_temperature=kind.soft_temperature,
        alpha_dbr=grid.alpha_dbr if kind.completes else ALPHA_DBR.get(kind.labels),
        architecture=grid.student,
        epochs=grid.epochs,
        teacher_checkpoint=grid.teacher_checkpoint if StudentConfig.needs_teacher(kind.labels) else None,
        seed=cell.seed,
        device=grid.device,
    )
    return replace(config, **dict(cell.student))


def refinement_text(grid: Grid) -> str:
    """How images are refined, for a report."""
    ways = ([] if grid.precision == "auto" else [grid.precision]) + (["compiled"] if grid.compile else [])
    return f"{counted(grid.iterations, 'step')} of refinement" + (f" ({', '.join(ways)})" if ways else "")


def loss_text(grid: Grid) -> str:
    """A sentence on the loss on completed labels, if there are any, for a report."""
    completed = [labels for labels in grid.labels if LABELS[labels].completes]
    return f" α_dbr {grid.alpha_dbr:g} beside the KL of {', '.join(completed)}." if completed else ""


def teacher_text(architecture: str, tops: Iterable[float | None]) -> str:
    """A teacher and its top-1, for a report: datasets that were built beside different test images state several."""
    found = top1_range(tops)
    return f"{architecture}, top-1 {found} on up to {PREFLIGHT_IMAGES:,} real images" if found else architecture


def top1_range(tops: Iterable[float | None], form: Callable[[float], str] = "{:.2%}".format) -> str:
    """The lowest and the highest top-1 of those that are known, once where all are the same; empty without any."""
    known = sorted(top for top in tops if top is not None)
    return " to ".join(dict.fromkeys(map(form, known[:1] + known[-1:])))


def image_kind(method: dict[str, Any]) -> str | None:
    """The name of the kind that a build with these settings (the manifest's `method`) is of; None if it is of none."""
    discovery, refinement = method["discovery"], method["refinement"]
    refined = bool(refinement["iterations"])
    label_refinement = refined and refinement["alpha_lr"] > 0
    kind = ImageKind(
        init=discovery["init"],
        confidence=discovery["confidence"] if discovery["init"] == "cidd" else ImageKind.confidence,
        refined=refined,
        mask=refinement.get("mask", ImageKind.mask) if refined else ImageKind.mask,
        label_refinement=label_refinement,
        views=refinement.get("label_refinement_views", False) if label_refinement else ImageKind.views,
    )
    return next((name for name, known in IMAGES.items() if known == kind), None)


def dataset_path(grid: Grid, cell: Cell) -> Path:
    """The folder of a cell's dataset."""
    options = asdict(_kind_config(grid, cell)) | dict(cell.build)
    decisive = {name: value for name, value in options.items() if name not in PLACES}
    key = _key(decisive, file_sha256(grid.teacher_checkpoint))
    return grid.out / "datasets" / f"ipc{cell.ipc}-{cell.images}-seed{cell.seed}-{key}"


def _origin_path(grid: Grid, cell: Cell) -> Path:
    """Beside the datasets: what their manifests do not tell of where they come from."""
    return grid.out / "origins" / f"{dataset_path(grid, cell).name}.json"


def labelled_path(grid: Grid, cell: Cell) -> Path:
    """The folder of the dataset that the cell's student trains on."""
    built, kind = dataset_path(grid, cell), LABELS[cell.labels]
    return built.with_name(f"{built.name}-priors{kind.priors}-further{kind.further}") if kind.completes else built


def cell_path(grid: Grid, cell: Cell) -> Path:
    """The file of a cell's result."""
    options = asdict(student_config(grid, cell))
    decisive = {name: value for name, value in options.items() if name not in PLACES}
    key = _key(labelled_path(grid, cell).name, decisive)
    return grid.out / "cells" / f"ipc{cell.ipc}-{cell.images}-{cell.labels}-seed{cell.seed}-{key}.json"


PLACES = ("data_dir", "test_dir", "cache_dir", "out", "work_dir", "teacher_checkpoint", "device", "threads")
"""Options that no name tells: where things lie and run. Of the teacher its bytes count; images and precision, which
do decide what comes out, are noted in what was made and compared (`Origin`, `precision`)."""

KEY_DIGITS = 10


def _key(*values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:KEY_DIGITS]


def _about(seconds: float) -> str:
    return f"about {seconds / 60:.0f} min" if seconds >= 60 else f"about {seconds:.0f} s"
