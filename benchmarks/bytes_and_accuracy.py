"""Bytes of labels beside the top-1 of students that learned from them, on the same images.

Top-1 comes from a result of `benchmarks.accuracy`. A built dataset is found in it by name, images per class, kind of
images, steps of refinement, teacher and stored epochs. Its bytes are measured, so every kind of label is a point of
bytes and accuracy.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from matplotlib.figure import Figure

from benchmarks.grid import LABELS, LabelKind, image_kind
from benchmarks.results_io import markdown_table
from benchmarks.spread import spread
from builders.assembly import METHOD
from nrrdd_format.errors import ConfigError, counted, shown
from nrrdd_format.manifest import Manifest
from nrrdd_format.pairs import Coding

Cell = dict[str, Any]
"""A student in a result of `benchmarks.accuracy` (`benchmarks.grid.Result` as JSON)."""

CELL_FIELDS = {
    "dataset": str,
    "ipc": int,
    "images": str,
    "labels": str,
    "top1": int | float,
    "bytes_labels": int | float,
}
"""What is read of a cell here, and its kinds."""


@dataclass(frozen=True, kw_only=True)
class Point:
    """A way to store labels: what it takes and what students reach with it.

    Attributes:
        images: dataset, images per class and kind of images.
        labels: the kind of labels and how they are stored.
        bytes: of all labels of the dataset, as they lie on disk.
        top1: in percent, one value a seed.
    """

    images: str
    labels: str
    bytes: float
    top1: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Bytes of the labels of one dataset: as they lie on disk in each coding it can have, and as fp16 soft labels."""

    coded: Mapping[Coding, int]
    soft_labels: float


def read_cells(path: Path) -> list[Cell]:
    """The students of a result of `benchmarks.accuracy`, as its JSON file holds them.

    Raises:
        ConfigError: it is no such result.
    """
    try:
        cells = json.loads(path.read_text())["cells"]
        for cell in cells:
            _check_cell(cell)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path}: not a result of benchmarks.accuracy ({error!r}); give its JSON file") from error
    return list(cells)


def _check_cell(cell: Cell) -> None:
    """Raises KeyError or TypeError where something that is read here is missing or of another kind."""
    for name, kind in CELL_FIELDS.items():
        if not isinstance(cell[name], kind):
            raise TypeError(f"{name} is {shown(cell[name])}")


def points_of(cells: Sequence[Cell], measured: Sequence[tuple[Manifest, Sizes]]) -> list[Point]:
    """The points of every dataset that there are students of."""
    return [point for manifest, sizes in measured for point in _points(cells, manifest, sizes)]


def _points(cells: Sequence[Cell], manifest: Manifest, sizes: Sizes) -> Iterator[Point]:
    key = {"dataset": manifest.dataset.name, "ipc": manifest.images.ipc, "images": built_kind(manifest)}
    here = [cell for cell in cells if all(cell[name] == value for name, value in key.items())]
    build = _build_facts(manifest) if key["images"] else {}
    here = [cell for cell in here if all(cell.get(name, value) == value for name, value in build.items())]
    classes = len(manifest.dataset.class_names)
    stored = [
        ("one-hot", "one-hot: the image's name", 0.0),
        *(("compact", f"compact, {coding}", size) for coding, size in sizes.coded.items()),
        *(("dbr", f"DBR, {coding}", size) for coding, size in sizes.coded.items()),
        *((name, _completed_name(kind.within(classes)), None) for name, kind in LABELS.items() if kind.completes),
        ("soft", "soft labels, fp16", sizes.soft_labels),
    ]
    for labels, name, size in stored:
        of_kind = [cell for cell in here if cell["labels"] == labels]
        if of_kind:  # completed datasets are not those measured here, but their students' cells hold their bytes
            known = mean(cell["bytes_labels"] for cell in of_kind) if size is None else size
            tops = tuple(100 * cell["top1"] for cell in of_kind)
            yield Point(images=title(manifest), labels=name, bytes=known, top1=tops)


def _build_facts(manifest: Manifest) -> Cell:
    """What else a cell says of the build its student learned from; older ones may lack it."""
    return {
        "iterations": manifest.method["refinement"]["iterations"],
        "teacher": manifest.teacher.architecture,
        "teacher_top1": manifest.teacher.top1,
        "stored_epochs": manifest.records.epochs,
        "build": {},  # nothing but what its kind of images is
    }


def _completed_name(kind: LabelKind) -> str:
    further = "" if kind.further is None else f" and {counted(kind.further, 'further class', 'further classes')}"
    return f"DBR, with {kind.priors} priors{further}"


def built_kind(manifest: Manifest) -> str | None:
    """The kind of images; None where no student here has seen such: not built here, or no kind of the grid."""
    return image_kind(manifest.method) if manifest.method.get("name") == METHOD else None


def title(manifest: Manifest) -> str:
    """A dataset's name, images per class and kind of images."""
    kind = built_kind(manifest)
    return f"{manifest.dataset.name} IPC {manifest.images.ipc}" + (f", {kind}" if kind else "")


def accuracy_table(points: Sequence[Point]) -> str:
    """All points as Markdown; empty without any."""
    header = ["images", "labels", "bytes of labels", "student top-1 %"]
    rows = [[point.images, point.labels, f"{point.bytes:,.0f}", spread(point.top1)] for point in points]
    return markdown_table(header, rows) if rows else ""


def plot_points(points: Sequence[Point]) -> Figure:
    """Bytes on a logarithmic axis against top-1, a line for each kind of images."""
    figure = Figure(figsize=(7.5, 4.5), layout="constrained")
    axis = figure.subplots()
    least = min(point.bytes for point in points if point.bytes) / 10  # where labels without bytes are drawn
    for images in dict.fromkeys(point.images for point in points):
        here = sorted((point for point in points if point.images == images), key=lambda point: point.bytes)
        places = [point.bytes or least for point in here]
        means = [mean(point.top1) for point in here]
        errors = [stdev(point.top1) if len(point.top1) > 1 else 0.0 for point in here]
        (line, *_) = axis.errorbar(places, means, yerr=errors, fmt="o", capsize=2, label=images)
        for point, place, top1 in zip(here, places, means, strict=True):
            axis.annotate(
                point.labels,
                (place, top1),
                xytext=(5, 4),
                textcoords="offset points",
                fontsize=7,
                color=line.get_color(),
            )
    axis.margins(x=0.15)
    axis.set(xscale="log", xlabel="bytes of labels (one-hot: none)", ylabel="student top-1, %")
    axis.legend(fontsize=8)
    return figure
