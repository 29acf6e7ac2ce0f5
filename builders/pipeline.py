"""The build from end to end: scan, discover, refine, encode, relabel, find priors, write.

Every stage is a loop over units that the configuration fixes (classes, batches, shards, epochs of a shard). A unit's
result appears in the work folder by rename and is skipped when it is there; ranks take every world_size-th unit (or run
of epochs, since those of a shard have its images in common) and meet after each stage. So the result depends neither on
interruptions nor on the number of ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TypeVar

import msgpack
import numpy as np
import torch
from numpy.typing import NDArray

from builders.assembly import assemble, check_manifest, is_built, make_output_folder
from builders.class_names import some
from builders.config import BuildConfig, RefinementSettings
from builders.cores import reading_threads
from builders.discovery import class_groups, discover_groups
from builders.encoding import encode_image
from builders.given_images import GivenImages, refuse_unusable, stored_bytes
from builders.image_sets import ImageSet, members_by_class
from builders.job import (
    BATCH_ARRAY,
    BATCH_LOSSES,
    CLASS_ARRAY,
    CLASS_JSON,
    DISTANCES,
    FLAT_MAPS,
    FURTHER_CLASSES,
    FURTHER_DISTANCES,
    MASSES,
    PRIOR_EPOCHS,
    SHARD_BYTES,
    Job,
    has_bfloat16,
    prepare,
)
from builders.log import write_build_log
from builders.memory import named_shortage
from builders.passes import Passes
from builders.prefetch import named_deaths, reading_processes
from builders.progress import Progress
from builders.ranks import joined_ranks
from builders.refinement import refine_batch
from builders.relabel import prior_masses, relabel_epoch
from builders.scan import usable_images
from builders.teacher import PREFLIGHT_IMAGES, mixed_up_classes, predict, preflight
from builders.workdir import Stage, claimed
from nrrdd_format import draws
from nrrdd_format.decoding import decode_image
from nrrdd_format.errors import DataError, counted
from nrrdd_format.pairs import PairRecords, draw_pairs
from nrrdd_format.replay import stack_images

Unit = TypeVar("Unit", int, tuple[int, int])

COMPILING_PAYS = 10_000
"""Steps for which compiling is worth a hint on a GPU: five batches of 2000."""


def build(config: BuildConfig) -> Path:
    """Builds the dataset that the configuration describes, or goes on with it; returns its folder.

    Images are read by processes of their own: where those are not forked (on macOS, and from Python 3.14 on), a script
    that builds needs the guard `if __name__ == "__main__":`.

    Raises:
        NrrddError: an option, the source images, the teacher or the output folder cannot be used.
    """
    torch.set_num_threads(reading_threads(config.threads))  # torchrun says one, whatever the machine has
    with joined_ranks() as ranks, named_shortage():
        job = prepare(config, ranks)
        check_manifest(job)
        if is_built(job):
            ranks.say(f"{config.out}: already built from these settings")
            return config.out
        make_output_folder(config.out.parent)
        with ExitStack() as held:
            if ranks.is_first:
                held.enter_context(claimed(config.work_path, ranks.say))
            ranks.meet()  # nobody writes before the folder is this build's
            _go_through(job)
    ranks.say(f"{config.out}: finished")
    return config.out


def _go_through(job: Job) -> None:
    """All stages, from wherever an earlier run has come to."""
    for stage in job.stages:
        stage.make()
    check_given(job, job.ranks.share(range(len(job.shards))))
    top1 = check_teacher(job)
    if job.given is None:
        usable = scan(job)
        discover(job, usable)
        refine(job)
    elif job.ranks.is_first:
        write_build_log(job, [])
    encode(job)
    relabel(job)
    find_priors(job)
    assemble(job, top1)


def check_given(job: Job, shards: Sequence[int]) -> None:
    """Decodes the given images of these shards, as far as they are not encoded yet.

    Raises:
        DataError: some cannot be used. The test of the teacher leaves such out, and encoding would stop at the first.
    """
    if job.given is None:
        return
    waiting = [job.shards[shard] for shard in _open_units(job.encoding, SHARD_BYTES, shards)]
    numbers = np.concatenate([np.empty(0, np.int64), *waiting])
    processes = reading_processes(job.config.threads, len(numbers))
    refuse_unusable(job.given.place, job.given.files, numbers, processes)


def check_teacher(job: Job) -> float | None:
    """The teacher's top-1 share on real images, measured before hours are spent; None where there are none.

    Given images are tested too: their folders may stand in another order than the source's classes.
    """
    for notice in job.inputs.notices:
        job.ranks.say(notice)
    top1 = None if job.inputs.real is None else _test_teacher(job, job.inputs.real, "real images")
    if job.given is not None:
        _test_teacher(job, job.given.files, "the given images")
        _say_mixed_up(job, job.given)
        if top1 is None:
            job.ranks.say("no real images to test the teacher on; name their folder with --data-dir or --test-dir")
    return top1


def _test_teacher(job: Job, images: ImageSet, which: str) -> float:
    """Tests every member of an ensemble too: the others would hide one whose classes stand in another order."""
    for teacher in (*job.teacher.members, job.teacher):
        top1 = preflight(
            teacher,
            images,
            which=which,
            mean=job.mean,
            std=job.std,
            minimum=job.config.min_teacher_top1,
            device=job.device,
        )
        job.ranks.say(f"teacher {teacher.architecture}: top-1 {top1:.1%} on {which}")
    return top1


def _say_mixed_up(job: Job, given: GivenImages) -> None:
    """Names classes whose folders seem to stand in each other's place, which the top-1 over all does not show."""
    seen = predict(job.teacher.model, given.files, job.mean, job.std, device=job.device, limit=PREFLIGHT_IMAGES)
    names = job.source.class_names
    mixed = [f"{names[k]} (shows {names[j]})" for k, j in mixed_up_classes(*seen).items()]
    if mixed:
        job.ranks.say(
            f"to the teacher these classes of the given images seem mixed up, check their order: {some(mixed)}"
        )


def scan(job: Job) -> list[NDArray[np.int64]]:
    """Finds the usable training images of every class, in the order discovery takes them.

    Raises:
        DataError: a class has too few; all such classes are named, with their counts.
    """
    needed, members = job.settings.discovery.images_needed, members_by_class(job.source.train.labels, job.num_classes)
    mine = _open_units(job.scan, CLASS_JSON, job.ranks.share(range(job.num_classes)))
    orders = [draws.permutation(job.config.seed, "discovery-order", label, count=len(members[label])) for label in mine]
    candidates = [members[label][order] for label, order in zip(mine, orders, strict=True)]
    processes = reading_processes(job.config.threads, sum(min(needed, len(each)) for each in candidates))
    found_by_class = usable_images(job.source.train, candidates, needed=needed, processes=processes)
    with Progress(len(mine), "scan", "class") as progress, named_deaths():
        for label, found in zip(mine, found_by_class, strict=True):
            job.scan.save_json(CLASS_JSON.format(label), {"indices": found.indices, "bad": found.bad})
            progress.advance()
    job.ranks.meet()
    usable, bad = [], []
    for label in range(job.num_classes):
        entry = job.scan.load_json(CLASS_JSON.format(label))
        usable.append(np.array(entry["indices"], np.int64))  # a list would take five times the memory
        bad += entry["bad"]
    if job.ranks.is_first:
        write_build_log(job, bad)
    refuse_small_classes(job, [len(indices) for indices in usable])
    return usable


def refuse_small_classes(job: Job, counts: Sequence[int]) -> None:
    """Raises DataError if classes have fewer usable images than discovery needs; `counts` are those of every class."""
    required = job.settings.discovery.images_required
    small = [(job.source.class_names[label], count) for label, count in enumerate(counts) if count < required]
    if small:
        named = ", ".join(f"{name} ({count})" for name, count in small[:10]) + (", …" if len(small) > 10 else "")
        raise DataError(
            f"too few usable images in {len(small)} of {job.num_classes} classes: {named}; "
            f"--ipc {job.config.ipc} needs {required} or more in each; lower --ipc or add images"
        )


def discover(job: Job, usable: list[NDArray[np.int64]]) -> None:
    """Stage 1 for every class; a unit is a group of classes, whose images share batches."""
    settings = job.settings.discovery
    groups = class_groups(job.num_classes, settings)
    mine = [group for group in job.ranks.share(groups) if not job.discovery.has(FLAT_MAPS.format(group[0]))]
    read = sum(min(settings.images_needed, len(usable[label])) for group in mine for label in group)
    processes = reading_processes(job.config.threads, read)
    with Progress(sum(map(len, mine)), "discover", "class") as progress, named_deaths():
        for found in discover_groups(job.source.train, mine, usable, job.eyes, settings, job.config.seed, processes):
            for one in found.classes:
                job.discovery.save_array(CLASS_ARRAY.format(one.label), one.images)
            # The count comes last: where it is, the group is finished.
            job.discovery.save_json(FLAT_MAPS.format(found.classes[0].label), found.flat_maps)
            progress.advance(len(found.classes))
    job.ranks.meet()
    if job.ranks.is_first and (flat := sum(job.discovery.load_json(FLAT_MAPS.format(group[0])) for group in groups)):
        images = counted(flat, "image has", "images have")
        job.ranks.say(f"{images} a flat activation map: the teacher sees nothing of the class there")


def refine(job: Job) -> None:
    """Stage 2 for every batch."""
    settings, batches = job.settings.refinement, job.batches
    mine = _open_units(job.refinement, BATCH_ARRAY, job.ranks.share(range(len(batches))))
    passes = Passes(job.eyes, settings)
    steps = len(mine) * settings.iterations
    for notice in (precision_notice(settings, job.device, steps), compile_notice(settings, job.device, steps)):
        if notice is not None:
            job.ranks.say(notice)
    with Progress(steps, "refine", "step") as progress:
        for batch in mine:
            result = refine_batch(
                job.initial_images(batches[batch]),
                job.labels[batches[batch]],
                passes,
                tables=job.pair_tables,
                seed=job.config.seed,
                batch=batch,
                on_steps=lambda steps, terms: progress.advance(steps, **terms),
            )
            job.refinement.save_json(BATCH_LOSSES.format(batch), result.losses)
            job.refinement.save_array(BATCH_ARRAY.format(batch), result.images)
    passes.forget_graphs()
    job.ranks.meet()


def precision_notice(settings: RefinementSettings, device: torch.device, steps: int) -> str | None:
    """What the user should know of the precision before so many steps."""
    if steps and settings.precision == "bf16" and device.type == "cuda" and not has_bfloat16(device):
        return "refine: this GPU emulates bfloat16 (--precision bf16), which is slower than float32 (--precision fp32)"
    return None


def compile_notice(settings: RefinementSettings, device: torch.device, steps: int) -> str | None:
    """What the user should know of compiling before so many steps."""
    if settings.compile:
        return "refine: the first step compiles the teacher's passes, which takes up to a minute" if steps else None
    if device.type == "cuda" and steps >= COMPILING_PAYS:
        return "refine: compiling (--compile) takes a minute and halved the time of a step at 224 px on an H200"
    return None


def encode(job: Job) -> None:
    """Every shard's images as the bytes that will be stored: one msgpack list of byte strings a shard."""
    mine = job.ranks.share(range(len(job.shards)))
    for shard in _units(job.encoding, SHARD_BYTES, mine, "encode", "shard"):
        make = _refined_bytes if job.given is None else _given_bytes
        job.encoding.save_bytes(SHARD_BYTES.format(shard), msgpack.packb(make(job, job.shards[shard].tolist())))
    job.ranks.meet()


def _refined_bytes(job: Job, indices: list[int]) -> list[bytes]:
    firsts = np.array([batch[0] for batch in job.batches])
    data = []
    for index in indices:
        batch = int(np.searchsorted(firsts, index, side="right")) - 1
        image = job.refinement.load_array(BATCH_ARRAY.format(batch))[index - firsts[batch]]
        data.append(encode_image(image, job.settings.encoding))
    return data


def _given_bytes(job: Job, indices: list[int]) -> list[bytes]:
    assert job.given is not None
    keep = job.config.image_quality is None
    return [stored_bytes(job.given, index, job.settings.encoding, keep=keep) for index in indices]


def relabel(job: Job) -> None:
    """Stage 3: the distances and further classes of every epoch of every shard, whose images are decoded once a run."""
    units = [(shard, epoch) for shard in range(len(job.shards)) for epoch in range(job.settings.records.epochs)]
    decoded: tuple[int, torch.Tensor] | None = None
    for shard, epoch in _units(job.relabeling, DISTANCES, job.ranks.share_runs(units), "relabel", "epoch"):
        if decoded is None or decoded[0] != shard:
            decoded = (shard, _decode(job, shard))
        labelled = relabel_epoch(
            decoded[1],
            job.labels[job.shards[shard]],
            draw_pairs(job.layout(shard), shard, epoch),
            model=job.teacher.model,
            temperature=job.settings.records.temperature,
            mean=job.mean,
            std=job.std,
            further=job.settings.records.further,
        )
        _save_labels(job, shard, epoch, labelled)
    job.ranks.meet()


def _save_labels(job: Job, shard: int, epoch: int, labelled: PairRecords) -> None:
    """The distances come last: where they are, the epoch is finished."""
    classes, others = labelled.further_classes, labelled.further_distances
    if classes is not None and others is not None:
        job.relabeling.save_array(FURTHER_CLASSES.format(shard, epoch), classes.astype(np.int32))
        job.relabeling.save_array(FURTHER_DISTANCES.format(shard, epoch), others)
    distances = np.stack([labelled.distance_org, labelled.distance_aug])
    job.relabeling.save_array(DISTANCES.format(shard, epoch), distances)


def find_priors(job: Job) -> None:
    """What the teacher sees in every image of every shard beside the image's class."""
    if job.settings.records.priors is None:
        return
    mine = job.ranks.share(range(len(job.shards)))
    for shard in _units(job.priors, MASSES, mine, "priors", "shard"):
        layout = job.layout(shard)
        masses = prior_masses(
            _decode(job, shard),
            job.labels[job.shards[shard]],
            [draw_pairs(layout, shard, epoch) for epoch in range(PRIOR_EPOCHS)],
            model=job.teacher.model,
            temperature=job.settings.records.temperature,
            mean=job.mean,
            std=job.std,
        )
        job.priors.save_array(MASSES.format(shard), masses)
    job.ranks.meet()


def _decode(job: Job, shard: int) -> torch.Tensor:
    """A shard's images as every reader will see them: (n, 3, S, S) uint8 on the teacher's device."""
    images = [decode_image(data, job.source.size) for data in job.encoded_images(shard)]
    return stack_images(images).to(job.device)


def _open_units(stage: Stage, name: str, units: Sequence[Unit]) -> list[Unit]:
    """The units of a rank that are not finished; `name` is the pattern of a finished unit's file."""
    return [unit for unit in units if not stage.has(_unit_name(name, unit))]


def _units(stage: Stage, name: str, units: Sequence[Unit], description: str, unit_word: str) -> Iterator[Unit]:
    """Goes through a rank's open units under a progress bar."""
    mine = _open_units(stage, name, units)
    with Progress(len(mine), description, unit_word) as progress:
        for unit in mine:
            yield unit
            progress.advance()


def _unit_name(name: str, unit: int | tuple[int, int]) -> str:
    return name.format(*unit) if isinstance(unit, tuple) else name.format(unit)
