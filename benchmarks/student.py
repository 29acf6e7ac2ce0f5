"""Trains a student on a distilled dataset and measures it on real test images.

The recipe is the paper's and RDED's: AdamW at 1e-3 with weight decay 0.01 (none on BatchNorm and biases), 300 epochs,
a cosine that ends at half of its start. The reported top-1 is that of the last epoch; no epoch is chosen by its result.

Shapes: B pairs, K classes, S the side in pixels.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from builders.bounds import at_least, positive
from builders.config import pair_teachers
from builders.ensemble import JOINT, load_teachers
from builders.image_sets import PLAIN, Columns, ImageSet, Place
from builders.import_fkd import UNKNOWN_SHA256, UNKNOWN_TEACHER
from builders.models import create_model
from builders.progress import Progress
from builders.reading import Skipped, named
from builders.sources import OPEN_SIZES, Source, load_source
from builders.teacher import Teacher, predict
from loaders import CompactLoss, CompletedDBRLoss, DBRBatch, DBRLoader, DBRLoss, OneHotLoss, SoftLoss
from nrrdd_format import draws
from nrrdd_format.dataset import open_dataset
from nrrdd_format.errors import ConfigError, DataError, TeacherError, counted
from nrrdd_format.manifest import Manifest

Labels = Literal["dbr", "dbr-completed", "soft", "soft-top5", "compact", "one-hot"]
Sce = Literal["sample", "batch", "target", "entropy"]
Distance = Literal["l1", "huber", "squared"]

TOP = 5
"""Probabilities that top-5 labels keep."""

IMAGENET_CLASSES = 1000
"""The classes that torchvision's pretrained networks know."""

BatchTerms = Callable[[Tensor, DBRBatch], dict[str, Tensor]]
"""From the student's logits (B, K) and the batch to scalars: `loss`, and what else is worth reporting."""

_OWN_TEACHER = "name the dataset's own teacher with --teacher-checkpoint"

LABELS_OF_OPTION: dict[str, tuple[Labels, ...]] = {
    **dict.fromkeys(("alpha_sce", "radius", "sce", "distance"), ("dbr",)),
    "soft_temperature": ("soft", "soft-top5", "dbr-completed"),
    "alpha_dbr": ("dbr", "dbr-completed"),
    "teacher_checkpoint": ("soft", "soft-top5"),
}
"""Options that only some kinds of labels have a use for."""

ALPHA_DBR: dict[Labels, float] = {"dbr": 1.0, "dbr-completed": 0.5}
"""Weights of the distances' error unless another is asked for."""


@dataclass(frozen=True, kw_only=True)
class StudentConfig:
    """How a student is trained. `None` means: what suits the dataset."""

    labels: Labels
    architecture: str | None = None
    epochs: int = 300
    batch_size: int | None = None
    """Pairs a step; by default 10, 50 or 100 for up to 1, up to 10, or more images per class."""
    learning_rate: float = 1e-3
    weight_decay: float = 0.01
    alpha_sce: float = 1.0
    """Of the DBR loss: weight of the bounded cross-entropy. AdamW divides a factor of both weights away."""
    radius: float = 0.4
    """Of the DBR loss: cross-entropy below it costs nothing."""
    sce: Sce = "sample"
    distance: Distance = "l1"
    soft_temperature: float = 1.0
    """Of both softmaxes of the KL to soft or completed labels; RDED uses 20."""
    alpha_dbr: float | None = None
    """Weight of the distances' error, in the DBR loss or beside the KL of completed labels; None: `ALPHA_DBR`."""
    teacher_checkpoint: Path | tuple[Path, ...] | None = None
    """The dataset's teacher, for soft labels; one file for each member of an ensemble, in the manifest's order."""
    seed: int = 0
    device: str = "cpu"

    def __post_init__(self) -> None:
        positive("--epochs", self.epochs)
        positive("--learning-rate", self.learning_rate)
        positive("--soft-temperature", self.soft_temperature)
        at_least("--alpha-sce", self.alpha_sce, 0)
        if self.alpha_dbr is not None:
            at_least("--alpha-dbr", self.alpha_dbr, 0)
        if self.batch_size is not None:
            positive("--batch-size", self.batch_size)
        for name, labels in LABELS_OF_OPTION.items():
            if self.labels not in labels and getattr(self, name) != getattr(StudentConfig, name):
                raise ConfigError(
                    f"--{name.replace('_', '-')}: found with --labels {self.labels}, expected with "
                    f"{' or '.join(labels)} only; leave the option out"
                )

    @property
    def distances_weight(self) -> float:
        """alpha_dbr as resolved; 0 for labels that tell no distances."""
        return ALPHA_DBR.get(self.labels, 0.0) if self.alpha_dbr is None else self.alpha_dbr

    @staticmethod
    def needs_teacher(labels: Labels) -> bool:
        """Whether students on such labels ask the teacher while they train."""
        return labels in LABELS_OF_OPTION["teacher_checkpoint"]


@dataclass(frozen=True, kw_only=True)
class StudentResult:
    """What a training came to.

    Attributes:
        top1: share of the test images classified correctly after the last epoch.
        test_images: how many there were; unusable ones are not counted.
        skipped_test_images: those, each with the reason.
        loss: mean training loss of the last epoch.
        clipped_share: share of the last epoch's pairs whose cross-entropy the DBR loss clipped; None for other labels.
        seconds: wall time of the training, without the test.
        settings: every setting as resolved, JSON values.
    """

    top1: float
    test_images: int
    skipped_test_images: list[dict[str, str]]
    loss: float
    clipped_share: float | None
    seconds: float
    settings: dict[str, Any]


class Batches(Protocol):
    """What a student trains on: a `DBRLoader`, or something that changes its batches."""

    def set_epoch(self, epoch: int) -> None:
        """Chooses the epoch that the next iteration goes through."""

    def __iter__(self) -> Iterator[DBRBatch]:
        """The batches of that epoch."""
        ...


def train_student(
    dataset: Path,
    source: Source,
    config: StudentConfig,
    *,
    wrap: Callable[[DBRLoader], Batches] = lambda loader: loader,
) -> StudentResult:
    """Trains a student on the distilled dataset at `dataset` and tests it on `source.test`.

    `wrap` may put something between the loader and the student, to study what other labels would do.

    Raises:
        DataError: the source has other classes than the dataset, or no test images.
        TeacherError: soft labels without the dataset's own teacher.
        ConfigError: an option that cannot work.
        FormatError: the dataset is damaged.
    """
    manifest = open_dataset(dataset).manifest
    check_source(manifest, source)
    test = require_test(source)
    architecture = config.architecture or source.default_model
    batch_size = pick_batch_size(config.batch_size, manifest)
    terms = make_terms(config, manifest)
    loader = DBRLoader(dataset, batch_size, seed=config.seed, device=config.device)
    with _seeded(config.seed):
        model = create_model(architecture, len(source.class_names), manifest.images.size).to(config.device)
        started = time.perf_counter()
        means = _train(model, wrap(loader), terms, config)
        seconds = time.perf_counter() - started
        mean, std = manifest.images.mean, manifest.images.std
        skipped: Skipped = []
        known, predicted = predict(model, test, mean, std, device=config.device, on_skipped=skipped.extend)
    return StudentResult(
        top1=float((known == predicted).mean()),
        test_images=len(known),
        skipped_test_images=named(skipped),
        loss=means["loss"],
        clipped_share=means.get("clipped_share"),
        seconds=seconds,
        settings=_settings(config, architecture, batch_size),
    )


def require_test(source: Source) -> ImageSet:
    """The source's test images. Raises DataError: it has none."""
    if source.test is None:
        raise DataError(f"{source.name}: no test images beside the training images; name their folder with --test-dir")
    return source.test


def check_student(architecture: str, source: Source) -> None:
    """Refuses what `train_student` would refuse only after the build of a dataset from that source; raises as it."""
    require_test(source)
    with _seeded(0):
        create_model(architecture, len(source.class_names), source.size)


def load_matching_source(
    manifest: Manifest,
    *,
    name: str | None,
    data_dir: Place | None,
    test_dir: Place | None,
    columns: Columns = PLAIN,
    cache_dir: Path | None = None,
) -> Source:
    """Loads the source that a dataset was built from; where it has more classes, the dataset's only.

    Args:
        manifest: the dataset's.
        name: the source's name; None takes the manifest's.
        data_dir, test_dir: where its images lie.
        columns: where they stand in a table.
        cache_dir: keeps a WebDataset's shards behind URLs.

    Raises:
        ConfigError: an unknown name, or an option that this source does not take.
        DataError: its images are missing.
    """
    classes, size = manifest.dataset.class_names, manifest.images.size
    chosen = name or manifest.dataset.name
    load = partial(
        load_source,
        chosen,
        data_dir=data_dir,
        test_dir=test_dir,
        size=size if chosen in OPEN_SIZES else None,
        columns=columns,
        cache_dir=cache_dir,
    )
    source = load()
    if set(classes) < set(source.class_names):
        source = load(classes=manifest.dataset.wnids or classes)
    return source


def check_source(manifest: Manifest, source: Source) -> None:
    """Refuses a source whose classes or image size are not the dataset's.

    Raises:
        DataError: naming the first difference.
    """
    check_classes(manifest.dataset.class_names, source.class_names)
    if source.size != manifest.images.size:
        raise DataError(
            f"the source's images are read at {source.size} px, expected {manifest.images.size} as in the dataset's "
            "manifest; give the source that the dataset was built from (--dataset, --data-dir)"
        )


def check_classes(expected: Sequence[str], found: Sequence[str]) -> None:
    """Refuses other classes than those expected, in the same order; DataError names the first difference."""
    for number, (theirs, ours) in enumerate(zip(found, expected, strict=False)):
        if theirs != ours:
            raise DataError(
                f"class {number} of the source is {theirs!r}, expected {ours!r} as in the dataset's manifest; "
                "give the source that the dataset was built from (--dataset, --data-dir)"
            )
    if len(found) != len(expected):
        raise DataError(
            f"the source has {len(found)} classes, expected {len(expected)} as in the dataset's manifest; "
            "give the source that the dataset was built from (--dataset, --data-dir)"
        )


def pick_batch_size(asked: int | None, manifest: Manifest) -> int:
    """Pairs a step: as asked for, else the recipe's size for the images per class; never more than the images."""
    images = manifest.images
    recipe = 10 if images.ipc <= 1 else 50 if images.ipc <= 10 else 100
    return min(asked or recipe, images.count)


def make_terms(config: StudentConfig, manifest: Manifest) -> BatchTerms:
    """The loss for the labels asked for."""
    temperature = manifest.records.temperature
    if config.labels == "dbr":
        return DBRLoss(
            alpha_sce=config.alpha_sce,
            alpha_dbr=config.distances_weight,
            radius=config.radius,
            sce=config.sce,
            distance=config.distance,
            temperature=temperature,
        ).terms
    if config.labels in ("soft", "soft-top5"):
        return _soft_terms(load_dataset_teacher(manifest, config.teacher_checkpoint, config.device), config)
    losses = {
        "compact": CompactLoss(temperature=temperature),
        "dbr-completed": CompletedDBRLoss(
            temperature=temperature, soft_temperature=config.soft_temperature, alpha_dbr=config.distances_weight
        ),
        "one-hot": OneHotLoss(),
    }
    loss = losses[config.labels]
    return lambda logits, batch: {"loss": loss(logits, batch)}


def load_dataset_teacher(manifest: Manifest, checkpoint: Path | Sequence[Path] | None, device: str) -> Teacher:
    """Loads the teacher a dataset was labelled by; without a checkpoint, pretrained weights.

    Args:
        manifest: the dataset's.
        checkpoint: the teacher's file; of an ensemble, one for each member in the manifest's order.
        device: where the teacher will run.

    Raises:
        TeacherError: there are no such weights, or they are not those named in the manifest.
    """
    files = [checkpoint] if isinstance(checkpoint, Path) else list(checkpoint or ())
    if manifest.teacher.architecture == UNKNOWN_TEACHER:
        raise TeacherError(
            "the dataset's manifest does not say which network made its labels, so no checkpoint can be known as its "
            "teacher; import its store anew with --teacher and --teacher-sha256"
        )
    if not files and len(manifest.dataset.class_names) != IMAGENET_CLASSES:
        raise TeacherError("soft labels need the dataset's own teacher; name its checkpoint with --teacher-checkpoint")
    architectures = manifest.teacher.architecture.split(JOINT)
    if files and len(files) != len(architectures):
        raise TeacherError(
            f"found {counted(len(files), 'checkpoint')}, expected {len(architectures)}: the dataset was labelled by "
            f"{manifest.teacher.architecture}; name the checkpoint of each, in this order, with --teacher-checkpoint"
        )
    teacher = load_teachers(
        pair_teachers(architectures, files),
        num_classes=len(manifest.dataset.class_names),
        image_size=manifest.images.size,
        device=device,
        class_names=manifest.dataset.class_names,
        remedy=_OWN_TEACHER,
    )
    _check_weights(teacher, manifest.teacher.sha256, ", ".join(map(str, files)) or teacher.architecture)
    return teacher


def _check_weights(teacher: Teacher, expected: str, named: str) -> None:
    found = f"teacher {named}: weights have SHA-256 {teacher.sha256}"
    if expected == UNKNOWN_SHA256:
        raise TeacherError(
            f"{found}, but the dataset's manifest does not state those of its teacher; if these made its labels, "
            "import its store anew with --teacher-sha256"
        )
    if teacher.sha256 != expected:
        raise TeacherError(f"{found}, expected {expected} as in the manifest; {_OWN_TEACHER}")


def _soft_terms(teacher: Teacher, config: StudentConfig) -> BatchTerms:
    loss = SoftLoss(config.soft_temperature, top=TOP if config.labels == "soft-top5" else None)

    def soft(logits: Tensor, batch: DBRBatch) -> dict[str, Tensor]:
        with torch.no_grad():
            teacher_logits = teacher.model(batch.images)
        return {"loss": loss(logits, batch, teacher_logits)}

    return soft


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seeds torch's global generators, which initial weights and dropout draw from, and restores them afterwards."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(draws.torch_seed(seed, "student"))
        yield


def _train(model: nn.Module, loader: Batches, terms: BatchTerms, config: StudentConfig) -> dict[str, float]:
    """Trains for all epochs; returns the means of the last one."""
    optimizer = make_optimizer(model, config)
    model.train()
    with Progress(config.epochs, f"student, {config.labels}", "epoch") as progress:
        for epoch in range(config.epochs):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(epoch, config)
            loader.set_epoch(epoch)
            means = _train_epoch(model, loader, terms, optimizer)
            progress.advance(loss=means["loss"])
    return means


def learning_rate(epoch: int, config: StudentConfig) -> float:
    """lr·½(1 + cos(π·e/2E)): RDED's "smoothing", which ends at half of its start."""
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * epoch / (2 * config.epochs)))


def make_optimizer(model: nn.Module, config: StudentConfig) -> torch.optim.AdamW:
    """AdamW with weight decay on weight matrices and kernels only; BatchNorm's parameters and biases are vectors."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.999))


def _train_epoch(
    model: nn.Module, loader: Batches, terms: BatchTerms, optimizer: torch.optim.Optimizer
) -> dict[str, float]:
    """One pass over the pairs; returns the mean of every term."""
    totals: dict[str, Tensor] = {}
    pairs = 0
    for batch in loader:
        values = terms(model(batch.images), batch)
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(values["loss"])
        optimizer.step()
        for name, value in values.items():
            totals[name] = totals.get(name, torch.zeros_like(value)) + len(batch) * value.detach()
        pairs += len(batch)
    return {name: total.item() / pairs for name, total in totals.items()}


def _settings(config: StudentConfig, architecture: str, batch_size: int) -> dict[str, Any]:
    resolved = asdict(config) | {"architecture": architecture, "batch_size": batch_size}
    resolved["alpha_dbr"] = config.distances_weight
    files = config.teacher_checkpoint
    resolved["teacher_checkpoint"] = [str(file) for file in files] if isinstance(files, tuple) else files and str(files)
    return resolved
