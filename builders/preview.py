"""Pictures of a build: a contact sheet of its images and a histogram of its distances.

Shapes: k images shown, S the side in pixels; images are uint8 RGB (k, 3, S, S), masks float32 (k, S, S).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image

from nrrdd_format.dataset import DistilledDataset, open_dataset
from nrrdd_format.decoding import decode_image
from nrrdd_format.errors import ConfigError, OutputError
from nrrdd_format.files import atomic_write, make_folder
from nrrdd_format.manifest import Manifest

Images = NDArray[np.uint8]
Masks = NDArray[np.float32]

CONTACT_SHEET = "contact-sheet.png"
HISTOGRAM = "distances.png"
OWNER = "Dataset"
"""Key of the PNGs' text that holds the id of the dataset they show."""
# What a build keeps of the shown images in the work folder of its last stage.
SHOWN_INDICES, SHOWN_INITIAL, SHOWN_MASK = "shown-indices.npy", "shown-initial.npy", "shown-mask.npy"
COLUMNS = 10
MOST_CLASSES = 50
GAP = 2
MOST_DISTANCES = 1_000_000
SMALLEST_DRAWN = 1e-4


@dataclass(frozen=True, kw_only=True)
class ShownImage:
    """An image of the contact sheet: its number in the dataset, its class, its shard and its place there."""

    index: int
    label: int
    shard: int
    position: int


@dataclass(frozen=True, kw_only=True)
class Preview:
    """Where the two pictures of a dataset were written."""

    contact_sheet: Path
    histogram: Path


def write_contact_sheet(
    path: Path,
    *,
    initial: Images | None,
    mask: Masks | None,
    refined: Images,
    class_names: Sequence[str],
    dataset_id: str,
) -> None:
    """Writes a PNG that shows every image as a column: its initial mosaic, its mask and its refined form below.

    Args:
        path: the PNG to write.
        initial: (k, 3, S, S) uint8, or None to leave the row out.
        mask: (k, S, S) float32, M of the paper's Eq. 4 (bright: free to change, black: kept), or None.
        refined: (k, 3, S, S) uint8.
        class_names: the class of each of the k images, its column's title.
        dataset_id: whose images they are; kept in the file.

    Raises:
        OutputError: the file cannot be written.
    """
    titles, rows = _rows(initial, mask, refined)
    bands = [slice(start, start + COLUMNS) for start in range(0, len(refined), COLUMNS)]
    width = min(COLUMNS, len(refined))
    figure = Figure(figsize=(1.1 * width + 1.2, (1.1 * len(rows) + 0.6) * len(bands)), layout="constrained")
    axes = figure.subplots(len(bands), squeeze=False)[:, 0]
    for axis, band in zip(axes, bands, strict=True):
        _draw_band(axis, [row[band] for row in rows], titles, class_names[band], width)
    _save(figure, path, dataset_id)


def write_distance_histogram(
    path: Path, distance_org: NDArray[np.float32], distance_aug: NDArray[np.float32], *, dataset_id: str
) -> None:
    """Writes a PNG that says how often each level of both distances occurs, in nats on a logarithmic axis.

    Args:
        path: the PNG to write.
        distance_org: d_org = −log p[y_i] of any number of pairs, float32, on the dataset's levels.
        distance_aug: d_aug = −log p[y_j], alike.
        dataset_id: whose distances they are; kept in the file.

    Raises:
        OutputError: the file cannot be written.
    """
    figure = Figure(figsize=(7, 4), layout="constrained")
    axis = figure.subplots()
    for name, distances in (("d_org", distance_org), ("d_aug", distance_aug)):
        levels, counts = np.unique(np.maximum(distances, SMALLEST_DRAWN), return_counts=True)
        label = f"{name}, median {np.median(distances):.2f}"
        axis.plot(levels, counts / len(distances), drawstyle="steps-mid", marker=".", label=label)
    axis.set(xscale="log", xlabel="distance −log p, nats", ylabel="share of the pairs")
    axis.legend()
    _save(figure, path, dataset_id)


def preview_dataset(
    dataset_path: Path,
    out: Path,
    *,
    initial: Mapping[int, Images] | None = None,
    mask: Mapping[int, Masks] | None = None,
) -> Preview:
    """Writes `contact-sheet.png` (the first image of every class, at most 50) and `distances.png` into `out`.

    Args:
        dataset_path: the dataset's folder.
        out: the folder to write to, made when missing.
        initial: the initial mosaic (3, S, S) uint8 of every image of `shown_images`, by `index`; None: no such row.
        mask: the mask (S, S) float32 of each of them, alike.

    Raises:
        FormatError: the dataset is damaged.
        OutputError: a picture cannot be written.
    """
    make_folder(out, "choose a writable --out")
    with open_dataset(dataset_path) as dataset:
        shown = shown_images(dataset)
        names, dataset_id = dataset.manifest.dataset.class_names, dataset.manifest.dataset_id
        write_contact_sheet(
            out / CONTACT_SHEET,
            initial=None if initial is None else np.stack([initial[image.index] for image in shown]),
            mask=None if mask is None else np.stack([mask[image.index] for image in shown]),
            refined=np.stack([_decode(dataset, image) for image in shown]),
            class_names=[names[image.label] for image in shown],
            dataset_id=dataset_id,
        )
        write_distance_histogram(out / HISTOGRAM, *_distances(dataset), dataset_id=dataset_id)
    return Preview(contact_sheet=out / CONTACT_SHEET, histogram=out / HISTOGRAM)


def redraw(dataset_path: Path, out: Path | None = None, *, work: Path | None = None) -> Preview:
    """Writes both pictures anew, with initial images and masks if the build's work folder still holds them.

    Args:
        dataset_path: the dataset's folder.
        out: the folder to write to, made when missing; None: `DATASET.preview`, whatever was drawn there before.
        work: the work folder of the build; None: `DATASET.work`, which may be gone.

    Raises:
        ConfigError: `work` holds nothing of this dataset's build.
        FormatError: the dataset is damaged.
        OutputError: a picture cannot be written, or one of another dataset is in its place.
    """
    with open_dataset(dataset_path) as dataset:
        folder, manifest = dataset.path.resolve(), dataset.manifest
    if out is None:
        out = folder.with_name(f"{folder.name}.preview")
    else:
        _refuse_other_pictures(out, manifest.dataset_id)
    kept = (work or folder.with_name(f"{folder.name}.work")) / f"writing-{manifest.method.get('build_key')}"
    if not all((kept / name).is_file() for name in (SHOWN_INDICES, SHOWN_INITIAL, SHOWN_MASK)):
        if work is not None:
            raise ConfigError(_no_work(work))
        return preview_dataset(dataset_path, out)
    indices, initial, mask = (
        np.load(kept / name, allow_pickle=False) for name in (SHOWN_INDICES, SHOWN_INITIAL, SHOWN_MASK)
    )
    numbers = indices.tolist()
    return preview_dataset(
        dataset_path,
        out,
        initial=dict(zip(numbers, initial, strict=True)),
        mask=dict(zip(numbers, mask, strict=True)),
    )


def _refuse_other_pictures(out: Path, dataset_id: str) -> None:
    """Pictures are drawn over those of the same dataset only."""
    for path in (out / CONTACT_SHEET, out / HISTOGRAM):
        if path.exists() and (found := _owner(path)) != dataset_id:
            whose = "is no preview of a known dataset" if found is None else f"shows another dataset, of id {found}"
            raise OutputError(f"{path}: {whose}, expected {dataset_id}; move it away or choose another --out")


def _owner(path: Path) -> str | None:
    """The id of the dataset that a picture shows; None: it does not say, or is no picture."""
    try:
        with Image.open(path) as picture:
            owner = picture.info.get(OWNER)
    except (OSError, ValueError, SyntaxError):  # what Pillow raises for damaged files
        return None
    return owner if isinstance(owner, str) else None


def _no_work(work: Path) -> str:
    found = "holds no initial images of this dataset's build" if work.is_dir() else "no such folder"
    return f"--work-dir: {work}: {found}, expected the build's work folder; without the option they are left out"


def shown_images(dataset: DistilledDataset) -> list[ShownImage]:
    """The images of the contact sheet: the first of every class, in the order of the classes, at most 50.

    It leaves no shard open: there may be more of them than a process may open files.
    """
    wanted = set(range(min(MOST_CLASSES, len(dataset.manifest.dataset.class_names))))
    first: dict[int, ShownImage] = {}
    for number, shard in enumerate(dataset.shards):
        for position, (label, index) in enumerate(zip(shard.labels.tolist(), shard.indices.tolist(), strict=True)):
            first.setdefault(label, ShownImage(index=index, label=label, shard=number, position=position))
        dataset.shards.close()
        if wanted <= first.keys():
            break
    return [first[label] for label in sorted(first)[:MOST_CLASSES]]


def _decode(dataset: DistilledDataset, image: ShownImage) -> Images:
    """One image, (3, S, S) uint8."""
    data = dataset.shards[image.shard].image_bytes(image.position)
    dataset.shards.close_all_but((image.shard,))  # the next image may lie in the same one
    pixels: Images = decode_image(data, dataset.manifest.images.size).numpy()
    return pixels


def _distances(dataset: DistilledDataset) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Both distances of the first epochs, of about a million pairs at most; leaves no shard open."""
    org, aug = [], []
    for number, epochs in enumerate(_drawn_epochs(dataset.manifest)):
        for epoch in range(epochs):
            records = dataset.shards[number].records(epoch)
            org.append(records.distance_org)
            aug.append(records.distance_aug)
        dataset.shards.close()
    return np.concatenate(org), np.concatenate(aug)


def _drawn_epochs(manifest: Manifest) -> list[int]:
    """How many epochs of each shard are drawn: taken epoch by epoch, those before the first that is not needed."""
    pairs, epochs = [shard.pairs_per_epoch for shard in manifest.shards], manifest.records.epochs
    left = (MOST_DISTANCES - end + count for count, end in zip(pairs, accumulate(pairs), strict=True))
    return [min(max(0, math.ceil(count / sum(pairs))), epochs) for count in left]


def _rows(initial: Images | None, mask: Masks | None, refined: Images) -> tuple[list[str], list[Images]]:
    """Titles of the rows and their images, (k, S, S, 3) uint8 each."""
    titles, rows = [], []
    if initial is not None:
        titles.append("initial")
        rows.append(initial.transpose(0, 2, 3, 1))
    if mask is not None:
        titles.append("mask")
        rows.append(_grey(mask))
    return [*titles, "refined"], [*rows, refined.transpose(0, 2, 3, 1)]


def _grey(mask: Masks) -> Images:
    """Masks as grey images (k, S, S, 3) uint8, the largest value of all as white."""
    top = float(mask.max())
    levels = np.rint(mask * (255 / top if top > 0 else 0)).astype(np.uint8)
    return np.repeat(levels[..., None], 3, axis=3)


def _draw_band(axis: Axes, rows: list[Images], titles: list[str], names: Sequence[str], width: int) -> None:
    """Draws up to `width` columns as one picture; tick labels name the columns and rows."""
    cell = rows[0].shape[1] + GAP
    picture = _montage(rows, width)
    axis.imshow(picture, interpolation="nearest")
    centres = [cell * column + cell / 2 for column in range(max(width, len(titles)))]
    axis.set_xticks(centres[: len(names)], [_short(name) for name in names], fontsize=8, parse_math=False)
    axis.set_yticks(centres[: len(titles)], titles, fontsize=8)
    axis.tick_params(length=0, labeltop=True, labelbottom=False)
    axis.spines[:].set_visible(False)


def _montage(rows: list[Images], width: int) -> Images:
    """Lays rows of images (k, S, S, 3) out on white, `width` columns wide: (rows·(S+gap), width·(S+gap), 3) uint8."""
    size = rows[0].shape[1]
    cell = size + GAP
    sheet = np.full((len(rows) * cell, width * cell, 3), 255, dtype=np.uint8)
    for row, images in enumerate(rows):
        for column, image in enumerate(images):
            top, left = row * cell, column * cell
            sheet[top : top + size, left : left + size] = image
    return sheet


def _short(name: str, limit: int = 14) -> str:
    return name if len(name) <= limit else name[: limit - 1] + "…"


def _save(figure: Figure, path: Path, dataset_id: str) -> None:
    with warnings.catch_warnings(), atomic_write(path) as file:
        warnings.filterwarnings("ignore", message="Glyph ")  # of a name whose letters the font lacks: drawn as boxes
        figure.savefig(file, format="png", dpi=150, metadata={OWNER: dataset_id})
