"""Exports a dataset for programs that do not read it: its images as class folders, and soft labels as an FKD store.

Old trainers take the order of the images from their sampler, so the stored pairs cannot be kept: a store gets new ones,
drawn the way FKD draws them and labelled by the dataset's own teacher.

Shapes: n images, B pairs a batch, K classes, S the side in pixels.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch

from builders.bounds import MAX_SEED, between
from builders.class_names import some
from builders.fkd_layout import SAMPLER_SEED, FkdBatch, batch_path, sampler_orders, write_batch
from builders.image_folder import CLASSES_FILE, Classes, class_folders, classes_text
from builders.progress import Progress
from builders.teacher import Teacher
from nrrdd_format import draws
from nrrdd_format.codebooks import mix_codebook, view_codebook
from nrrdd_format.copies import new_folder
from nrrdd_format.dataset import DistilledDataset
from nrrdd_format.decoding import decode_image
from nrrdd_format.errors import DataError, FormatError, OutputError, TeacherError
from nrrdd_format.files import make_folder
from nrrdd_format.limits import MAX_EPOCHS, MAX_VIEWS
from nrrdd_format.replay import PairTensors, replay, stack_images

ANOTHER_PLACE = "choose another --to"
IMAGES, LABELS = "images", "relabel"
"""Folders of an exported FKD store: the images, and epoch_0, epoch_1, …"""


@dataclass(frozen=True, kw_only=True)
class FkdConfig:
    """How an FKD store is made."""

    epochs: int = 300
    batch_size: int = 100
    sampler_seed: int = SAMPLER_SEED
    view_scale: float = 0.08
    """Smallest share of the image's area that a view shows."""
    seed: int = 0
    """Of views, flips and mixes."""

    def __post_init__(self) -> None:
        between("--epochs", self.epochs, 1, MAX_EPOCHS)
        between("--batch-size", self.batch_size, 1, MAX_VIEWS)
        between("--sampler-seed", self.sampler_seed, 0, MAX_SEED)
        between("--seed", self.seed, 0, MAX_SEED)


@dataclass(frozen=True, kw_only=True)
class ImagePlace:
    """Where an image is and where it goes."""

    shard: int
    image: int
    label: int
    path: str  # below the folder of images


def export_images(dataset: DistilledDataset, out: Path) -> int:
    """Writes the images, bytes as stored, into class folders of the new folder `out`; returns how many.

    torchvision's ImageFolder finds the dataset's labels there; `classes.txt` names the classes.

    Raises:
        DataError: a class has no image, so that ImageFolder would number the classes otherwise.
        FormatError: the dataset is damaged.
        OutputError: `out` exists already or cannot be written.
    """
    places = image_places(dataset)
    with new_folder(out) as folder:
        _write_images(dataset, places, folder)
    return len(places)


def export_fkd(dataset: DistilledDataset, teacher: Teacher, out: Path, config: FkdConfig, *, device: str) -> int:
    """Writes the images and an FKD store for them into the new folder `out`; returns the bytes of the store's files.

    Args:
        dataset: the dataset.
        teacher: the dataset's own teacher, on `device`.
        out: the folder; `images` and `relabel` appear in it.
        config: what is drawn.
        device: where to compute.

    Raises:
        DataError: a class has no image.
        FormatError: the dataset is damaged.
        OutputError: `out` exists already or cannot be written.
        TeacherError: logits that are not finite.
    """
    places = image_places(dataset)
    with new_folder(out) as folder:
        _write_images(dataset, places, folder / IMAGES)
        return _write_store(dataset, places, teacher, folder / LABELS, config, device)


def _write_store(
    dataset: DistilledDataset, places: list[ImagePlace], teacher: Teacher, store: Path, config: FkdConfig, device: str
) -> int:
    """Writes all epochs; returns the bytes of the files."""
    batches, written = -(-len(places) // config.batch_size), 0
    orders = sampler_orders(len(places), config.sampler_seed)
    with Progress(config.epochs * batches, "export", "batch") as progress:
        for epoch, order in enumerate(islice(orders, config.epochs)):
            make_folder(batch_path(store, epoch, 0).parent, ANOTHER_PLACE)
            for number in range(batches):
                shown = [places[image] for image in order[number * config.batch_size :][: config.batch_size]]
                batch = _label(dataset, shown, teacher, config, (epoch, number), device)
                written += write_batch(batch_path(store, epoch, number), batch, dataset.manifest.images.size)
                progress.advance()
    return written


def image_places(dataset: DistilledDataset) -> list[ImagePlace]:
    """All images in ImageFolder's order: by label, then by number. Raises DataError for a class without images."""
    info = dataset.manifest.dataset
    folders = class_folders(Classes(names=info.class_names, wnids=info.wnids))
    rows = [
        (label, index, number, image)
        for number, shard in enumerate(dataset.shards)
        for image, (index, label) in enumerate(zip(shard.indices.tolist(), shard.labels.tolist(), strict=True))
    ]
    empty = sorted(set(range(len(folders))) - {label for label, *_ in rows})
    if empty:
        raise DataError(
            f"{dataset.path}: no image of {some([info.class_names[label] for label in empty])}; class folders cannot "
            "tell that a class is missing: complete the dataset"
        )
    digits = max(7, *(len(str(index)) for _, index, *_ in rows))
    return [
        ImagePlace(shard=number, image=image, label=label, path=f"{folders[label]}/{index:0{digits}}.{extension}")
        for label, index, number, image in sorted(rows)
        for extension in [dataset.shards[number].header.members[image].name.rpartition(".")[2]]
    ]


def _write_images(dataset: DistilledDataset, places: list[ImagePlace], folder: Path) -> None:
    info = dataset.manifest.dataset
    for name in dict.fromkeys(place.path.rpartition("/")[0] for place in places):
        make_folder(folder / name, ANOTHER_PLACE)
    text = classes_text(Classes(names=info.class_names, wnids=info.wnids))
    _write(folder / CLASSES_FILE, text.encode(errors="replace"))
    with Progress(len(places), "images", "image") as progress:
        for place in places:
            _write(folder / place.path, dataset.shards[place.shard].image_bytes(place.image))
            progress.advance()


def _label(
    dataset: DistilledDataset,
    shown: list[ImagePlace],
    teacher: Teacher,
    config: FkdConfig,
    at: tuple[int, int],
    device: str,
) -> FkdBatch:
    """Draws the views and the mix of one batch (epoch and number `at`), and asks the teacher."""
    info, count = dataset.manifest.images, len(shown)
    views = view_codebook(
        draws.torch_seed(config.seed, "fkd-views", *at), info.size, (config.view_scale, 1.0), count=count
    )
    views = np.resize(views, (count, 4))  # one box for all where the scale allows no other
    flip = draws.integers(config.seed, "fkd-flip", *at, count=count, high=2).astype(bool) & info.flip
    mix_index = draws.permutation(config.seed, "fkd-mix-index", *at, count=count)
    (box,) = mix_codebook(draws.torch_seed(config.seed, "fkd-mix", *at), info.size, "cutmix", count=1)
    assert isinstance(box, tuple)
    lam = 1 - box[2] * box[3] / info.size**2
    pairs = PairTensors(
        images=stack_images([_decoded(dataset, place) for place in shown]),
        boxes=torch.from_numpy(views.astype(np.int64)),
        flips=torch.from_numpy(flip),
        org=torch.arange(count),
        aug=torch.from_numpy(mix_index),
        is_cutmix=torch.ones(count, dtype=torch.bool),
        mix_box=torch.tensor([box]).expand(count, 4),
        lam=torch.full((count,), lam),
    )
    logits = _logits(teacher, pairs.to(device), dataset)
    return FkdBatch(views=views, flip=flip, mix_index=mix_index, mix_box=box, lam=lam, logits=logits)


@torch.no_grad()
def _logits(teacher: Teacher, pairs: PairTensors, dataset: DistilledDataset) -> torch.Tensor:
    """The teacher's logits (B, K) in half precision, on the CPU. Raises TeacherError where one is not finite."""
    info = dataset.manifest.images
    logits: torch.Tensor = teacher.model(replay(pairs, mean=info.mean, std=info.std)).half().cpu()
    if not bool(logits.isfinite().all()):
        raise TeacherError(f"teacher {teacher.architecture}: a logit is not finite in half precision")
    return logits


def _decoded(dataset: DistilledDataset, place: ImagePlace) -> torch.Tensor:
    shard = dataset.shards[place.shard]
    try:
        return decode_image(shard.image_bytes(place.image), dataset.manifest.images.size)
    except FormatError as error:
        raise error.located(path=shard.path, member=shard.header.members[place.image].name) from error


def _write(path: Path, data: bytes) -> None:
    try:
        with open(path, "xb") as file:
            file.write(data)
    except OSError as error:
        raise OutputError(f"{path}: cannot write ({error.strerror}); make room or {ANOTHER_PLACE}") from error
