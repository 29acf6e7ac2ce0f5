"""The written log of a build: what was resolved from the options, and which source images were skipped."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from builders.job import Job
from builders.reading import named
from nrrdd_format.files import atomic_write


def log_path(job: Job) -> Path:
    """Where the log lies: in the work folder, since it names local paths that a dataset must not carry."""
    return job.config.work_path / f"build-{job.key}.json"


def write_build_log(job: Job, skipped: Sequence[tuple[str, str]]) -> None:
    """Writes the log as JSON; `skipped` holds the name and reason of every unusable source image."""
    log = {
        "options": asdict(job.config),
        "settings": job.used_settings,
        "teacher": {"architecture": job.teacher.architecture, "sha256": job.teacher.sha256},
        "classes": list(job.source.class_names),
        "skipped_images": named(skipped),
        "torch": torch.__version__,
        "device": str(job.device),
        "ranks": job.ranks.world_size,
    }
    with atomic_write(log_path(job)) as file:
        file.write(json.dumps(log, indent=1, default=str).encode() + b"\n")
    if skipped:
        job.ranks.say(f"{len(skipped)} unusable source images skipped")
    job.ranks.say(f"resolved settings and skipped images: {log_path(job)}")
