"""Trains a teacher on a source dataset and writes its checkpoint with a log beside it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.results_io import hardware, make_folder, write_json
from builders.progress import Progress
from builders.sources import Source
from builders.teacher import save_checkpoint
from builders.train_teacher import TrainedTeacher, train_teacher


@dataclass(frozen=True, kw_only=True)
class TeacherConfig:
    """How a teacher is trained. `architecture` None means the dataset's default network."""

    architecture: str | None = None
    epochs: int = 100
    batch_size: int = 128
    learning_rate: float = 0.1
    seed: int = 0
    workers: int = 0
    """Processes that read images too large to be kept in memory."""
    device: str = "cpu"
    bf16: bool = False
    """Compute under bfloat16 autocast."""


def train_and_save(source: Source, config: TeacherConfig, out: Path) -> dict[str, Any]:
    """Trains a teacher, writes it to `out` and its log to `<out>.json`; returns the log.

    An interrupted training goes on from `<out>.state`, which is removed once the checkpoint is there.

    Raises:
        ConfigError: an option that cannot work.
        DataError: too few training images.
        TeacherError: training diverged; nothing is written.
        OutputError: a file cannot be written.
    """
    make_folder(out.parent)
    architecture = config.architecture or source.default_model
    state = out.with_name(out.name + ".state")
    trained = _train(source, config, architecture, state)
    save_checkpoint(out, trained.model, architecture, source.class_names, (source.mean, source.std))
    log = asdict(config) | {
        "architecture": architecture,
        "dataset": source.name,
        "class_names": source.class_names,
        "image_size": source.size,
        "test_top1": trained.top1,
        "hardware": hardware(),
    }
    write_json(log_path(out), log)
    state.unlink(missing_ok=True)
    return log


def log_path(checkpoint: Path) -> Path:
    """Where the log of a checkpoint lies."""
    return checkpoint.with_name(checkpoint.name + ".json")


def summary(log: dict[str, Any]) -> str:
    """The trained network and how well it does, for people."""
    top1 = "not tested: there are no test images" if log["test_top1"] is None else f"test top-1 {log['test_top1']:.2%}"
    return f"{log['architecture']}, {top1}"


def _train(source: Source, config: TeacherConfig, architecture: str, state: Path) -> TrainedTeacher:
    with Progress(config.epochs, "teacher", "epoch") as progress:
        return train_teacher(
            source,
            architecture=architecture,
            epochs=config.epochs,
            batch_size=config.batch_size,
            learning_rate=config.learning_rate,
            seed=config.seed,
            device=config.device,
            bf16=config.bf16,
            state_path=state,
            workers=config.workers,
            on_epoch=lambda report: progress.advance(loss=report.loss, top1=report.train_top1),
        )
