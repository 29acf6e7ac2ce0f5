"""A dry run: what a build would do, how long it would take, how much room it needs, and whether it could start.

It writes nothing (sources and weights that must be downloaded go where a build would put them).
"""

from __future__ import annotations

import math
import os
import resource
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from builders import measurements
from builders.assembly import ENTRY, check_manifest, is_built
from builders.config import BuildConfig
from builders.cores import reading_threads
from builders.discovery import class_groups
from builders.job import (
    BATCH_ARRAY,
    CLASS_ARRAY,
    CLASS_JSON,
    DISTANCES,
    MASSES,
    PRIOR_EPOCHS,
    SHARD_BYTES,
    Job,
    prepare,
)
from builders.memory import named_shortage
from builders.pipeline import check_given, check_teacher, refuse_small_classes
from builders.prefetch import reading_processes
from builders.quantities import shown_duration, shown_size
from builders.ranks import joined_ranks
from builders.workdir import Stage
from nrrdd_format import tar
from nrrdd_format.errors import NrrddError, counted

WRITE = "write"
"""The stage whose units lie in the output."""
SHARD_BYTES_BESIDES = 4 * tar.BLOCK + len(tar.END)
"""Bytes of a shard besides images and records, about: tar headers and content of our own members."""
ARRAY_HEADER = 128
"""Bytes of an .npy file besides its values."""


@dataclass(frozen=True, kw_only=True)
class StagePlan:
    """One stage of a build.

    Attributes:
        name, unit: what it is called, and what it counts.
        total, done: units, and those that are finished in the work folder.
        seconds: for one unit, as measured.
        bytes: of one unit in the work folder (of the last stage: in the output).
    """

    name: str
    unit: str
    total: int
    done: int
    seconds: float
    bytes: float

    @property
    def left(self) -> int:
        """Units that are not finished."""
        return self.total - self.done


def plan(config: BuildConfig) -> bool:
    """Prints the plan; returns whether the build could start.

    Raises:
        NrrddError: an option, the source images or the teacher cannot be used, so that there is nothing to plan.
    """
    torch.set_num_threads(reading_threads(config.threads))  # torchrun says one, whatever the machine has
    with joined_ranks() as ranks, named_shortage():
        job = prepare(config, ranks)
        check_manifest(job)
        problems = _caught(job, is_built, _check_all_given, check_teacher, _refuse_few)
        if not problems and config.out.exists():
            ranks.say(f"{config.out}: already built from these settings; the same command would change nothing")
            return True
        stages = plan_stages(job)
        room = _folder_problems(config) + _disk_problems(config, stages)
        problems += room
        if ranks.is_first:
            print(render(job, stages))
            for problem in room:
                ranks.say(f"problem: {problem}")
            print("the build could not start" if problems else "the build could start")
        ranks.meet()
    return not problems


def _caught(job: Job, *checks: Callable[[Job], object]) -> list[str]:
    """The problems that the checks of a build find; each is told at once, since measuring takes a while."""
    found = []
    for check in checks:
        try:
            check(job)
        except NrrddError as error:
            found.append(str(error))
            job.ranks.say(f"problem: {error}")
    return found


def _check_all_given(job: Job) -> None:
    check_given(job, range(len(job.shards)))  # only the first rank tells of problems


def _refuse_few(job: Job) -> None:
    """What a scan would find, as far as it shows without opening the images."""
    if job.given is None:
        refuse_small_classes(job, np.bincount(job.source.train.labels, minlength=job.num_classes).tolist())


def plan_stages(job: Job) -> list[StagePlan]:
    """The stages of a build in order, each with work left measured on a few units."""
    images, read_seconds = measurements.read_sample(job.source.train if job.given is None else job.given.files)
    making = _making(job, images, read_seconds) if job.given is None else []
    return making + _labelling(job, images)


def _making(job: Job, images: NDArray[np.uint8], read_seconds: float) -> list[StagePlan]:
    """The stages that make images."""
    settings, classes, batches = job.settings.discovery, range(job.num_classes), job.batches
    pixels, steps = 3 * job.source.size**2, job.settings.refinement.iterations
    looked_at = min(settings.images_needed, len(job.source.train) // len(classes))
    processes = reading_processes(job.config.threads, looked_at * len(classes))
    discovered = looked_at or settings.ipc  # noise is made of no images
    return [
        _stage(
            job.scan,
            "scan",
            "class",
            map(CLASS_JSON.format, classes),
            lambda: looked_at * read_seconds / processes,
            8 * looked_at,
        ),
        _stage(
            job.discovery,
            "discover",
            "class",
            map(CLASS_ARRAY.format, classes),
            lambda: discovered * measurements.discovery_seconds(job, read_seconds, processes),
            settings.ipc * pixels + ARRAY_HEADER,
        ),
        _stage(
            job.refinement,
            "refine",
            "batch",
            map(BATCH_ARRAY.format, range(len(batches))),
            lambda: measurements.refinement_seconds(job, images) if steps else 0.0,
            len(batches[0]) * pixels + ARRAY_HEADER,
        ),
    ]


def _labelling(job: Job, images: NDArray[np.uint8]) -> list[StagePlan]:
    """The stages that store and label images."""
    shards, epochs = range(len(job.shards)), job.settings.records.epochs
    count = len(job.labels) / len(shards)
    encode_seconds, image_bytes = measurements.encoding(job, images)
    labels = measurements.labels(job, images)
    distances = [DISTANCES.format(shard, epoch) for shard in shards for epoch in range(epochs)]
    stored = SHARD_BYTES_BESIDES + count * (tar.BLOCK + tar.padded(math.ceil(image_bytes)) + epochs * labels.bytes)
    return [
        _stage(
            job.encoding,
            "encode",
            "shard",
            map(SHARD_BYTES.format, shards),
            lambda: count * encode_seconds,
            count * image_bytes,
        ),
        _stage(job.relabeling, "relabel", "epoch", distances, lambda: count * labels.seconds, _label_bytes(job, count)),
        *_priors(job, count, labels.seconds),
        _stage(
            job.writing,
            WRITE,
            "shard",
            map(ENTRY.format, shards),
            lambda: count * epochs * labels.write_seconds,
            stored,
        ),
    ]


def _priors(job: Job, count: float, seconds: float) -> list[StagePlan]:
    """The stage that finds the priors of shards with so many images, where the build has it; `seconds` label a pair."""
    if job.settings.records.priors is None:
        return []
    files = map(MASSES.format, range(len(job.shards)))
    size = 4 * count * job.num_classes + ARRAY_HEADER
    return [_stage(job.priors, "priors", "shard", files, lambda: PRIOR_EPOCHS * count * seconds, size)]


def _label_bytes(job: Job, count: float) -> float:
    """Of one epoch of a shard with so many images: two distances a pair, and classes and distances of further ones."""
    further = job.settings.records.further
    return 8 * count + ARRAY_HEADER + (0 if further is None else 8 * further * count + 2 * ARRAY_HEADER)


def _stage(
    stage: Stage, name: str, unit: str, files: Iterable[str], seconds: Callable[[], float], size: float
) -> StagePlan:
    """The plan of a stage whose finished units have these files; `seconds` measures one if there is work left."""
    wanted = set(files)
    done = len(wanted & set(os.listdir(stage.path))) if os.path.isdir(stage.path) else 0
    left = len(wanted) - done
    return StagePlan(name=name, unit=unit, total=len(wanted), done=done, seconds=seconds() if left else 0.0, bytes=size)


def memory_bytes(job: Job) -> float:
    """Peak of the measurements in this process, and the largest array that they leave out."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    pixels = 3 * job.source.size**2
    settings = job.settings.discovery
    group = settings.ipc * len(class_groups(job.num_classes, settings)[0]) if job.given is None else 0
    return float(peak + 2 * pixels * max(group, len(job.shards[0])))


def _folder_problems(config: BuildConfig) -> list[str]:
    """Folders that cannot be made or written to."""
    problems = []
    for option, path in (("--out", config.out.parent), ("--work-dir", config.work_path)):
        there = _existing(path)
        if not there.is_dir():
            problems.append(f"{option}: {there} is no folder; choose another")
        elif not os.access(there, os.W_OK | os.X_OK):
            problems.append(f"{option}: {there} cannot be written to; choose another")
    return problems


def _disk_problems(config: BuildConfig, stages: Sequence[StagePlan]) -> list[str]:
    """File systems without room for what is left."""
    needed: Counter[int] = Counter()
    places: dict[int, Path] = {}
    for stage in stages:
        place = _existing(config.out.parent if stage.name == WRITE else config.work_path)
        device = place.stat().st_dev
        places.setdefault(device, place)
        needed[device] += math.ceil(stage.left * stage.bytes)
    free = {device: shutil.disk_usage(place).free for device, place in places.items()}
    return [
        f"{places[device]}: {shown_size(free[device])} free on its disk, expected about {shown_size(count)} for what "
        f"is left; make room or choose another --work-dir or --out"
        for device, count in needed.items()
        if count > free[device]
    ]


def _existing(path: Path) -> Path:
    """The path itself, or the nearest above it that exists and is not hidden in a closed folder."""
    return next(place for place in (path, *path.resolve().parents) if os.path.exists(place))


def render(job: Job, stages: Sequence[StagePlan]) -> str:
    """The plan as text."""
    ranks = job.ranks.world_size
    header = f"{'stage':10}{'units':>16}{'done':>9}{'left':>9}{'a unit':>12}{'time left':>12}{'disk':>12}"
    rows = [
        f"{stage.name:10}{f'{stage.total:,} {stage.unit}':>16}{stage.done:>9,}{stage.left:>9,}"
        f"{shown_duration(stage.seconds) if stage.left else '-':>12}"
        f"{shown_duration(stage.left * stage.seconds / ranks):>12}"
        f"{shown_size(stage.total * stage.bytes):>12}"
        for stage in stages
    ]
    work, out = (
        sum(stage.total * stage.bytes for stage in stages if (stage.name == WRITE) == is_out)
        for is_out in (False, True)
    )
    total = sum(stage.left * stage.seconds for stage in stages) / ranks
    facts = [
        f"{len(job.labels):,} images of {job.num_classes} classes, {job.source.size} px, in "
        f"{counted(len(job.shards), 'shard')}",
        *[header, *rows],
        f"time left: about {shown_duration(total)} on {job.device} in {ranks} process{'es' if ranks > 1 else ''}",
        f"disk: about {shown_size(work)} in {job.config.work_path}, {shown_size(out)} in {job.config.out}",
        f"memory: about {shown_size(memory_bytes(job))} in each process{_device_memory(job)}",
    ]
    return "\n".join(facts)


def _device_memory(job: Job) -> str:
    if job.device.type != "cuda":
        return ""
    return f", {shown_size(torch.cuda.max_memory_reserved(job.device))} on {job.device}"
