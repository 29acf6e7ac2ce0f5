"""How long the units of a build take here and how large its parts get, measured on a few of them.

Every measurement runs a stage's own code on real images, on the device of the build, and keeps nothing. The first run
of each warms up (caches, compilation) and does not count where a second is affordable; on a GPU it never does, since it
finds kernels and records graphs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import islice
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from builders.discovery import discover_groups
from builders.encoding import encode_image
from builders.given_images import GivenImages, stored_bytes
from builders.image_sets import ArrayImages, ImageSet
from builders.job import BATCH_ARRAY, Job
from builders.passes import Passes
from builders.reading import read_usable
from builders.refinement import RefinedBatch, refine_batch
from builders.relabel import pairs_at_once, relabel_epoch
from nrrdd_format import draws
from nrrdd_format.errors import DataError
from nrrdd_format.pairs import PairRecords, draw_pairs
from nrrdd_format.records import encode_shard_records

Result = TypeVar("Result")
SAMPLE = 8
"""Images that are read and encoded."""
DISCOVERED = 24
"""Training images that discovery is tried on, about."""
FEW_STEPS, MANY_STEPS = 3, 13
"""Refinement steps that are tried: two numbers, since a batch has costs besides its steps."""
AFFORDABLE = 10.0
"""Seconds up to which a measurement is made a second time, warm."""


@dataclass(frozen=True, kw_only=True)
class Labels:
    """What labelling comes to: seconds and stored bytes of a pair."""

    seconds: float
    write_seconds: float
    bytes: float


def read_sample(images: ImageSet) -> tuple[NDArray[np.uint8], float]:
    """A few usable images (k, 3, S, S) of the whole set, and the seconds that reading one takes.

    Raises:
        DataError: none of them is usable.
    """
    order = draws.permutation(0, "plan-images", count=len(images))[:SAMPLE]
    (pixels, *_), seconds = _timed(lambda: read_usable(images, order.tolist()))
    if not len(pixels):
        raise DataError(f"none of {len(order)} images is usable, the first being {images.name(int(order[0]))}")
    return pixels.numpy(), seconds / len(order)


def discovery_seconds(job: Job, read_seconds: float, processes: int) -> float:
    """Seconds for each image that discovery looks at: training images, or those it makes of noise.

    Args:
        job: the build.
        read_seconds: that reading one image takes one process.
        processes: how many read, beside the teacher if that runs on a GPU.

    Raises:
        DataError: too few images of the first class are usable to try it.
    """
    settings, train = job.settings.discovery, job.source.train
    ipc = min(settings.ipc, max(1, DISCOVERED // max(1, settings.images_needed // settings.ipc)))
    small = replace(settings, ipc=ipc)
    members = np.flatnonzero(train.labels == 0)[: 2 * small.images_needed].tolist()
    pixels, labels = (part[: small.images_needed].numpy() for part in read_usable(train, members)[:2])
    if len(labels) < small.images_required:
        name = job.source.class_names[0]
        raise DataError(f"class {name}: {len(labels)} of the first {len(members)} training images are usable")
    numbers = np.arange(len(labels))
    read = ArrayImages(
        pixels=pixels.transpose(0, 2, 3, 1), labels=labels, numbers=numbers, prefix="read", size=job.source.size
    )
    seconds = _warm(lambda: list(discover_groups(read, [[0]], [numbers], job.eyes, small, job.config.seed)), job)
    looking = seconds / (len(labels) or small.ipc)
    reading = read_seconds / processes if len(labels) else 0.0
    return max(looking, reading) if job.device.type == "cuda" else looking + reading


def refinement_seconds(job: Job, images: NDArray[np.uint8]) -> float:
    """Seconds of a full batch with all its steps, once it is compiled where that is wanted.

    Where the few steps take long, what a batch costs besides (its activation maps: a quarter of a step) is spread over
    them, and many are not tried.
    """
    batch, settings = job.batches[0], job.settings.refinement
    initial = images[np.arange(len(batch)) % len(images)]
    passes = Passes(job.eyes, settings)

    def run() -> RefinedBatch:
        return refine_batch(
            initial,
            job.labels[batch],
            passes,
            tables=job.pair_tables,
            seed=job.config.seed,
            batch=0,
            on_steps=lambda steps, terms: None,
        )

    def seconds(steps: int) -> float:
        passes.settings = replace(settings, iterations=steps)
        if settings.compile:
            run()
        return _warm(run, job)

    few = seconds(FEW_STEPS)
    is_slow = few > AFFORDABLE
    step = few / FEW_STEPS if is_slow else (seconds(MANY_STEPS) - few) / (MANY_STEPS - FEW_STEPS)
    passes.forget_graphs()
    more = max(0.0, step) * max(0, settings.iterations - FEW_STEPS)  # other work on the machine may turn the sign
    return few * min(1.0, settings.iterations / FEW_STEPS) + more


def encoding(job: Job, images: NDArray[np.uint8]) -> tuple[float, float]:
    """Seconds and bytes of one stored image: of given ones, of refined ones if there are some, or else of `images`."""
    settings, given = job.settings.encoding, job.given
    done = BATCH_ARRAY.format(0)
    if given is not None:
        data, seconds = _timed(lambda: list(islice(_stored(job, given), SAMPLE)))
    else:
        made = job.refinement.load_array(done)[:SAMPLE] if job.refinement.has(done) else images
        data, seconds = _timed(lambda: [encode_image(image, settings) for image in made])
    return seconds / len(data), float(np.mean([len(file) for file in data]))


def _stored(job: Job, given: GivenImages) -> Iterator[bytes]:
    """Stored bytes of the given images that can be used; the plan has named the others."""
    for number in range(len(given.files)):
        with suppress(DataError):
            yield stored_bytes(given, number, job.settings.encoding, keep=job.config.image_quality is None)


def labels(job: Job, images: NDArray[np.uint8]) -> Labels:
    """Labels some pairs of the first shard, and writes a block of records with distances like theirs."""
    layout, members = job.layout(0), job.shards[0]
    shard = torch.from_numpy(images[np.arange(len(members)) % len(images)]).to(job.device)
    pairs = draw_pairs(layout, 0, 0).take(np.arange(min(pairs_at_once(job.source.size), len(members))))

    def label() -> PairRecords:
        return relabel_epoch(
            shard,
            job.labels[members],
            pairs,
            model=job.teacher.model,
            temperature=job.settings.records.temperature,
            mean=job.mean,
            std=job.std,
            further=job.settings.records.further,
        )

    labelled, first = _timed(label)
    seconds = _second(label, first, job)
    epochs = list(_epochs(job, labelled))
    blocks, write_seconds = _timed(lambda: encode_shard_records(epochs, layout, 0))
    written = len(epochs) * layout.pairs
    return Labels(
        seconds=seconds / len(pairs),
        write_seconds=write_seconds / written,
        bytes=sum(map(len, blocks)) / written,
    )


def _epochs(job: Job, labelled: PairRecords) -> Iterator[PairRecords]:
    """A block's epochs of the first shard, their labels drawn from those given."""
    layout = job.layout(0)
    for epoch in range(min(layout.block_epochs, job.settings.records.epochs)):
        chosen = draws.integers(0, "plan-distances", epoch, count=layout.pairs, high=len(labelled))
        labels = labelled.take(chosen)
        yield replace(
            draw_pairs(layout, 0, epoch),
            distance_org=labels.distance_org,
            distance_aug=labels.distance_aug,
            further_classes=labels.further_classes,
            further_distances=labels.further_distances,
        )


def _warm(call: Callable[[], object], job: Job) -> float:
    """Seconds of a call."""
    return _second(call, _timed(call)[1], job)


def _second(call: Callable[[], object], first: float, job: Job) -> float:
    """Seconds of a call whose first run took so many: of a second one if the first was short, or warmed a GPU up."""
    return first if first > AFFORDABLE and job.device.type != "cuda" else _timed(call)[1]


def _timed(call: Callable[[], Result]) -> tuple[Result, float]:
    started = time.perf_counter()
    result = call()
    return result, time.perf_counter() - started
