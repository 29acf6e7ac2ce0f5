"""Trains a teacher on a source dataset and writes its checkpoint with a log beside it."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.results_io import hardware, write_json
from builders.class_names import some
from builders.progress import Progress
from builders.reading import Skipped, named
from builders.sources import Source
from builders.teacher import load_teacher, save_checkpoint
from builders.train_teacher import TrainedTeacher, check_options, run_test, train_teacher
from nrrdd_format.errors import OutputError, counted, shown
from nrrdd_format.files import make_folder

WITHOUT_EFFECT = ("workers", "device")
"""Settings that do not decide which teacher comes out."""


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

    def __post_init__(self) -> None:
        check_options(
            epochs=self.epochs,
            batch_size=self.batch_size,
            learning_rate=self.learning_rate,
            seed=self.seed,
            workers=self.workers,
        )


def train_and_save(source: Source, config: TeacherConfig, out: Path) -> dict[str, Any]:
    """Trains a teacher, writes it to `out` and its log to `<out>.json`; returns the log.

    An interrupted training goes on from `<out>.state`, which is removed once the checkpoint is there. Where that is
    there already, trained with the same settings, it is at most tested anew: on test images that the log does not name.
    Unusable images are named in the log.

    Raises:
        ConfigError: an option that cannot work.
        DataError: too few training images.
        TeacherError: training diverged; nothing is written.
        OutputError: a file cannot be written, or another teacher's checkpoint is there.
    """
    make_folder(out.parent)
    architecture = config.architecture or source.default_model
    settings = asdict(config) | {
        "architecture": architecture,
        "dataset": source.name,
        "class_names": list(source.class_names),
        "image_size": source.size,
        "train_fingerprint": source.train.fingerprint(),
    }
    state = out.with_name(out.name + ".state")
    if out.exists():
        log = _with_test(_finished_log(out, settings), source, config.device, out)
    else:
        trained = _train(source, config, architecture, state)
        log = settings | _tested(source, trained.top1, trained.skipped_tests) | {"hardware": hardware()}
        log["skipped_images"] = named(trained.skipped)
        write_json(log_path(out), log)  # before the checkpoint, so that no checkpoint is without one
        _say_skipped(out, [*trained.skipped, *trained.skipped_tests])
        save_checkpoint(out, trained.model, architecture, source.class_names, (source.mean, source.std))
    state.unlink(missing_ok=True)
    return log


def _finished_log(out: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """The log of the checkpoint at `out`, which these settings gave.

    Raises:
        OutputError: others did, or no log says which; datasets may have been labelled with it.
    """
    remedy = "choose another --out, or remove the file"
    try:
        log = json.loads(log_path(out).read_bytes())
    except (OSError, ValueError):
        log = None
    if not isinstance(log, dict):
        raise OutputError(f"{out}: is there already, and no {log_path(out).name} says how it was trained; {remedy}")
    for name, wanted in settings.items():
        # A log from before the images were noted says nothing of them.
        if name not in WITHOUT_EFFECT and name in log and log[name] != wanted:
            raise OutputError(
                f"{out}: a teacher trained with other settings is there already ({name}: {shown(log[name])} there, "
                f"{shown(wanted)} here); {remedy}"
            )
    return log


def _with_test(log: dict[str, Any], source: Source, device: str, out: Path) -> dict[str, Any]:
    """The log of a finished teacher; where the test images are others than those it names, with a new test on these."""
    done = f"{out}: trained already with these settings"
    if source.test is None or log.get("test_fingerprint") == source.test.fingerprint():
        print(done, file=sys.stderr)
        return log
    teacher = load_teacher(
        None,
        out,
        num_classes=len(source.class_names),
        image_size=source.size,
        device=device,
        class_names=source.class_names,
    )
    top1, skipped = run_test(teacher.model, source, source.test, device)
    print(f"{done}; tested anew, on test images that its log did not name", file=sys.stderr)
    _say_skipped(out, skipped)
    log = log | _tested(source, top1, skipped)
    write_json(log_path(out), log)
    return log


def _tested(source: Source, top1: float | None, skipped: Skipped) -> dict[str, Any]:
    """What a log says of the test."""
    fingerprint = None if source.test is None else source.test.fingerprint()
    return {"test_top1": top1, "test_fingerprint": fingerprint, "skipped_test_images": named(skipped)}


def _say_skipped(out: Path, skipped: Skipped) -> None:
    if skipped:
        count = counted(len(skipped), "unusable source image")
        print(f"{count} skipped, named in {log_path(out)}: {some([name for name, _ in skipped])}", file=sys.stderr)


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
