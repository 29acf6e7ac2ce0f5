"""Trains a teacher on real images, one epoch after the other, resumable after each.

SGD with Nesterov momentum on a one-cycle schedule and plain cross-entropy: no label smoothing, no mixing, so that the
teacher's probabilities, which become the stored distances, are not bent by the recipe.

Every random draw follows from the seed and the epoch alone. On a CPU, the same seed and number of threads give the same
weights, interrupted or not.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import OneCycleLR

from builders.bounds import MAX_SEED, MAX_STEPS, MAX_THREADS, between, positive
from builders.image_sets import ImageSet
from builders.models import create_model
from builders.prefetch import named_deaths
from builders.reading import WORKERS, Batch, Skipped, read_batches, read_usable
from builders.sources import Source
from builders.teacher import load_weights_only, measure_top1
from nrrdd_format import draws
from nrrdd_format.errors import ConfigError, DataError, TeacherError, counted
from nrrdd_format.files import atomic_write
from nrrdd_format.limits import MAX_IMAGES
from nrrdd_format.replay import apply_views, normalize

IN_MEMORY_SIDE = 64
"""Images up to this side are read once and kept as uint8."""
MOMENTUM = 0.9
WEIGHT_DECAY = 5e-4
SMALLEST_CROP = 0.25
WARM_UP = 0.2
"""Share of all steps in which the learning rate rises."""


@dataclass(frozen=True, kw_only=True)
class EpochReport:
    """One finished epoch: mean training loss (nats), top-1 share on the augmented training images, seconds."""

    epoch: int
    loss: float
    train_top1: float
    seconds: float


@dataclass(frozen=True, kw_only=True)
class TrainedTeacher:
    """The trained network in eval mode; `top1` is its share of right answers on the test images, if there are any.

    `skipped` are the unusable training images that were met, and `skipped_tests` those of the test.
    """

    model: nn.Module
    top1: float | None
    skipped: Skipped
    skipped_tests: Skipped


def train_teacher(
    source: Source,
    *,
    architecture: str,
    epochs: int,
    batch_size: int,
    learning_rate: float,
    seed: int,
    device: torch.device | str,
    bf16: bool = False,
    state_path: Path | None = None,
    workers: int = 0,
    on_epoch: Callable[[EpochReport], None] = lambda report: None,
) -> TrainedTeacher:
    """Trains a classifier on `source.train` and tests it once, at the end, on `source.test`.

    Args:
        source: the dataset. Images up to 64 px a side are held in memory, larger ones are read anew each epoch.
        architecture: see `builders.models.create_model`.
        epochs: passes over the training images.
        batch_size: images a step, about; an epoch's steps are of equal size.
        learning_rate: the peak of the one-cycle schedule.
        seed: of initial weights, order, augmentation and dropout.
        device: where the network is trained.
        bf16: compute under bfloat16 autocast; weights and loss stay float32.
        state_path: where the state is kept after every epoch. If the file exists, training goes on from it.
        workers: processes that read images too large for memory.
        on_epoch: called after every epoch trained.

    Raises:
        ConfigError: an option cannot work, or the state at `state_path` was made with other options.
        DataError: fewer than two usable training images.
        TeacherError: training diverged; its state is removed.
        OutputError: the state cannot be written.
    """
    check_options(epochs=epochs, batch_size=batch_size, learning_rate=learning_rate, seed=seed, workers=workers)
    run = _Run(
        architecture=architecture,
        epochs=epochs,
        batch_size=batch_size,
        learning_rate=learning_rate,
        seed=seed,
        bf16=bf16,
        class_names=list(source.class_names),
        train_fingerprint=source.train.fingerprint(),
    )
    feed = _Feed(source.train, source.size, workers)
    trainer = _Trainer(run, source, feed, torch.device(device))
    finished = trainer.resume(state_path) if state_path is not None and state_path.exists() else 0
    for epoch in range(finished, epochs):
        report = trainer.train_epoch(epoch)
        fault = trainer.fault(report)
        if fault is not None:
            if state_path is not None:  # the same options would lead here again, and others would not take the state
                state_path.unlink(missing_ok=True)
            raise TeacherError(
                f"{architecture}: training diverged in epoch {epoch + 1} of {epochs} ({fault}); lower --learning-rate, "
                f"which was {learning_rate:g}"
            )
        if state_path is not None:
            trainer.save(state_path, epoch + 1)
        on_epoch(report)
    model = trainer.model.eval()
    top1, skipped = (None, []) if source.test is None else run_test(model, source, source.test, device)
    return TrainedTeacher(model=model, top1=top1, skipped=sorted(feed.skipped.items()), skipped_tests=skipped)


def run_test(model: nn.Module, source: Source, images: ImageSet, device: torch.device | str) -> tuple[float, Skipped]:
    """The top-1 share on test images of the source, and which of them are unusable."""
    skipped: Skipped = []
    top1 = measure_top1(model, images, source.mean, source.std, device=device, on_skipped=skipped.extend)
    return top1, skipped


@dataclass(frozen=True, kw_only=True)
class _Run:
    """What determines the trained weights; a state is only continued by the run it belongs to."""

    architecture: str
    epochs: int
    batch_size: int
    learning_rate: float
    seed: int
    bf16: bool
    class_names: list[str]
    train_fingerprint: str


class _Trainer:
    """Network, optimizer and schedule of one run."""

    def __init__(self, run: _Run, source: Source, feed: _Feed, device: torch.device) -> None:
        self.run, self.source, self.feed, self.device = run, source, feed, device
        with _seeded(run.seed, "teacher-weights"):
            model = create_model(run.architecture, len(run.class_names), source.size)
        self.model = model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.optimizer = torch.optim.SGD(
            self.model.parameters(), lr=run.learning_rate, momentum=MOMENTUM, nesterov=True, weight_decay=WEIGHT_DECAY
        )
        steps = run.epochs * feed.steps(run.batch_size)
        self.schedule = OneCycleLR(
            self.optimizer,
            max_lr=run.learning_rate,
            total_steps=steps,
            pct_start=WARM_UP if steps * WARM_UP != 1 else 2 * WARM_UP,  # torch cannot rise in a single step
            cycle_momentum=False,
        )

    def train_epoch(self, epoch: int) -> EpochReport:
        started = time.perf_counter()
        self.model.train()
        totals = torch.zeros(2, device=self.device, dtype=torch.float64)  # loss, right answers
        seen = 0
        with _seeded(self.run.seed, "teacher-dropout", epoch), named_deaths(WORKERS):
            for step, (images, labels, _) in enumerate(self.feed.batches(self.run, epoch)):
                if len(labels) < 2:  # almost all images of the batch are unusable, and BatchNorm needs two
                    continue
                images, labels = images.to(self.device), labels.to(self.device)
                images = augment(images, flip=self.source.flip, seed=self.run.seed, epoch=epoch, step=step)
                totals += self._step(images, labels)
                seen += len(labels)
        if not seen:
            raise DataError("hardly any training image is usable, so no batch has two; check --data-dir's files")
        loss, right = totals.tolist()
        return EpochReport(
            epoch=epoch, loss=loss / seen, train_top1=right / seen, seconds=time.perf_counter() - started
        )

    def _step(self, images: Tensor, labels: Tensor) -> Tensor:
        """One update; returns the sum of the batch's losses and the number of images it got right."""
        inputs = normalize(images, self.source.mean, self.source.std)
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.run.bf16):
            logits = self.model(inputs.contiguous(memory_format=torch.channels_last))
        loss = F.cross_entropy(logits.float(), labels)
        self.optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        self.optimizer.step()
        self.schedule.step()
        return torch.stack([loss.detach() * len(labels), (logits.argmax(1) == labels).sum()])

    def fault(self, report: EpochReport) -> str | None:
        """What is not finite after an epoch, the loss or one of the network's tensors, in words."""
        if not math.isfinite(report.loss):
            return f"loss {report.loss}"
        tensors = self.model.state_dict().items()
        return next((f"{name} is not finite" for name, tensor in tensors if not bool(tensor.isfinite().all())), None)

    def save(self, path: Path, finished: int) -> None:
        """Writes the state after `finished` epochs; the file is whole at any moment."""
        state = {
            "run": asdict(self.run),
            "finished": finished,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
        }
        with atomic_write(path) as file:
            torch.save(state, file)

    def resume(self, path: Path) -> int:
        """Loads a state and returns how many epochs it has finished."""
        state = load_weights_only(path, remedy="remove it to start the training anew")
        other = _differences(state.get("run"), asdict(self.run))
        if other:
            raise ConfigError(f"{path}: a training state made with another {other}; repeat those options or remove it")
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        return int(state["finished"])


class _Feed:
    """The training images in batches: small ones from memory, large ones read by worker processes.

    `skipped` holds the unusable ones that were met, by name, with the reason.
    """

    def __init__(self, train: ImageSet, size: int, workers: int) -> None:
        self._train, self._workers = train, workers
        self.skipped: dict[str, str] = {}
        self._memory: Batch | None = None
        self._count = len(train)
        if size <= IN_MEMORY_SIDE:
            self._memory = read_usable(train, range(self._count))
            self._count = len(self._memory[1])
            self.skipped.update(self._memory[2])
        if self._count < 2:
            raise DataError(
                f"{counted(self._count, 'usable training image')}; a teacher needs at least 2, and in earnest thousands"
            )

    def steps(self, batch_size: int) -> int:
        return max(1, math.ceil(self._count / batch_size))

    def batches(self, run: _Run, epoch: int) -> Iterator[Batch]:
        """One epoch in a new order. Batches differ by one image at most: BatchNorm cannot train on a single one."""
        order = draws.permutation(run.seed, "teacher-order", epoch, count=self._count)
        batches = np.array_split(order, self.steps(run.batch_size))
        if self._memory is None:
            yield from map(self._noted, read_batches(self._train, batches, self._workers))
        else:
            yield from ((self._memory[0][batch], self._memory[1][batch], []) for batch in batches)

    def _noted(self, batch: Batch) -> Batch:
        self.skipped.update(batch[2])
        return batch


def augment(images: Tensor, *, flip: bool, seed: int, epoch: int, step: int) -> Tensor:
    """Draws a new view of every image of a batch: (B, 3, S, S) uint8 in and out.

    Small images are shifted by up to S/8 over black borders, as is usual for CIFAR; of larger ones a square crop of
    25 to 100 % of the area is resized to full size. `flip` allows left and right to be exchanged.
    """
    count, size = len(images), images.shape[-1]
    down, right, area, mirror = draws.uniform(seed, "teacher-views", epoch, step, count=4 * count).reshape(4, count)
    flips = torch.from_numpy(flip & (mirror < 0.5)).to(images.device)
    if size > IN_MEMORY_SIDE:
        return apply_views(images, _crops(size, area, down, right).to(images.device), flips)
    border = size // 8
    top, left = (
        torch.from_numpy((share * (2 * border + 1)).astype(np.int64)).to(images.device) for share in (down, right)
    )
    windows = F.pad(images, [border] * 4).unfold(2, size, 1).unfold(3, size, 1)  # (B, 3, 2·border+1, 2·border+1, S, S)
    shifted = windows[torch.arange(count, device=images.device), :, top, left]
    return torch.where(flips[:, None, None, None], shifted.flip(3), shifted)


def _crops(size: int, area: NDArray[np.float64], down: NDArray[np.float64], right: NDArray[np.float64]) -> Tensor:
    """Square crop boxes (B, 4) int64 from uniform draws in [0, 1)."""
    side = np.clip(np.rint(size * np.sqrt(SMALLEST_CROP + (1 - SMALLEST_CROP) * area)), 1, size)
    top, left = np.floor(down * (size - side + 1)), np.floor(right * (size - side + 1))
    return torch.from_numpy(np.stack([top, left, side, side], axis=1).astype(np.int64))


@contextmanager
def _seeded(seed: int, purpose: str, *index: int) -> Iterator[None]:
    """Seeds torch's global generators, which initialisation and dropout draw from, and restores them afterwards."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(draws.torch_seed(seed, purpose, *index))
        yield


def _differences(found: Any, expected: dict[str, Any]) -> str:
    """Names of the settings that differ, comma-separated."""
    if not isinstance(found, dict):
        return "kind of content"
    return ", ".join(name for name in expected if found.get(name) != expected[name])


def check_options(*, epochs: int, batch_size: int, learning_rate: float, seed: int, workers: int) -> None:
    """Raises ConfigError for an option of `train_teacher` that cannot work."""
    between("--epochs", epochs, 1, MAX_STEPS)
    between("--batch-size", batch_size, 2, MAX_IMAGES)
    positive("--learning-rate", learning_rate)
    between("--seed", seed, 0, MAX_SEED)
    between("--workers", workers, 0, MAX_THREADS)
