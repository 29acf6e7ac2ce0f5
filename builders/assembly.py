"""The last stage: shards, manifest, card and pictures, in a folder that takes its final name when it is whole."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from builders.card import write_card
from builders.class_names import some
from builders.config import BuildConfig
from builders.job import DISTANCES, FURTHER_CLASSES, FURTHER_DISTANCES, MASSES, Job
from builders.preview import (
    SHOWN_INDICES,
    SHOWN_INITIAL,
    SHOWN_MASK,
    Images,
    Masks,
    preview_dataset,
    shown_images,
)
from builders.refinement import step_mask
from nrrdd_format.dataset import open_dataset
from nrrdd_format.errors import OutputError, shown
from nrrdd_format.files import make_folder
from nrrdd_format.manifest import (
    CODEC_EXTENSIONS,
    MANIFEST_NAME,
    DatasetInfo,
    ImagesInfo,
    Manifest,
    RecordsInfo,
    TeacherInfo,
)
from nrrdd_format.pairs import PairRecords, draw_pairs
from nrrdd_format.priors import Priors, choose_priors
from nrrdd_format.records import encode_shard_records
from nrrdd_format.shards import EncodedImage, ShardEntry, shard_name, write_shard

METHOD = "NRR-DD"
"""Names, in the manifest's `method`, what made a dataset here."""
LABELS_METHOD = "DBR of given images"
"""Names it where the images existed already."""
ENTRY = "shard-{:05d}.json"
SHOWN_DIFFERENCES = 3
"""Differences from a dataset that is in the way that are named."""


def is_built(job: Job) -> bool:
    """Whether the output folder already holds this very dataset.

    Raises:
        OutputError: something else is in the way, or files of it were lost.
    """
    out = job.config.out
    if not _exists(out):
        return False
    found = Manifest.load(out / MANIFEST_NAME) if (out / MANIFEST_NAME).is_file() else None
    if found is not None and found.method.get("build_key") == job.key:
        if len(found.shards) == len(job.shards):
            _refuse_losses(job.config, found)
            return True
        raise OutputError(
            f"{out}: holds {len(found.shards)} of this build's {len(job.shards)} shards (a part, or repaired without "
            f"bad ones); move it away, and the same command builds it anew"
        )
    what = "no dataset" if found is None else _difference(found, job)
    raise OutputError(f"{out}: something else is there already ({what}); move it away or choose another --out")


def _refuse_losses(config: BuildConfig, found: Manifest) -> None:
    """Checks that every shard is there in full length; to hash them would take long, and is `nrrdd verify`'s work."""
    faults = {entry.name: _fault(config.out / entry.name, entry.bytes) for entry in found.shards}
    lost = [f"{name} ({fault})" for name, fault in faults.items() if fault is not None]
    if lost:
        raise OutputError(
            f"{config.out}: built from these settings, but damaged since: {some(lost)}; `nrrdd verify` checks the "
            f"rest, and `nrrdd repair --from` fetches shards from a copy; or delete the folder, and the same command "
            f"builds it anew, quickly where {config.work_path} is left"
        )


def _fault(shard: Path, expected: int) -> str | None:
    try:
        size = os.stat(shard).st_size
    except FileNotFoundError:
        return "missing"
    except OSError as error:
        return str(error.strerror)
    return None if size == expected else f"{size} bytes, expected {expected}"


def _exists(out: Path) -> bool:
    try:
        os.stat(out)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise OutputError(f"{out}: cannot be looked at ({error.strerror}); choose another --out") from error
    return True


def _difference(found: Manifest, job: Job) -> str:
    """How a dataset differs from the one that the job would build, in words."""
    there, here = (_facts(manifest) for manifest in (found, make_manifest(job, [], None)))
    names = [name for name in here | there if there.get(name) != here.get(name)]
    if not names:
        return "a dataset built from other images"
    shown_names = [
        f"{name}: {_fact(there, name)} there, {_fact(here, name)} here" for name in names[:SHOWN_DIFFERENCES]
    ]
    more = len(names) - len(shown_names)
    return "another dataset, " + "; ".join(shown_names) + (f"; and {more} more" if more else "")


def _facts(manifest: Manifest) -> dict[str, Any]:
    """What a manifest says that a user decides, each by its name: `refinement.iterations`."""
    content = json.loads(json.dumps(manifest.to_json()))  # tuples become lists, as in a manifest that was read
    dataset = content["dataset"]
    facts: dict[str, Any] = {"dataset": dataset["name"], "size": content["images"]["size"]}
    facts |= {name: dataset[name] for name in ("class_names", "source_license")}
    facts |= {"teacher": content["teacher"]["sha256"]}
    for name, value in content["method"].items():
        facts |= {f"{name}.{key}": one for key, one in value.items()} if isinstance(value, dict) else {name: value}
    return {name: value for name, value in facts.items() if name != "build_key"}


def _fact(facts: dict[str, Any], name: str) -> str:
    return shown(facts[name]) if name in facts else "nothing"


def assemble(job: Job, teacher_top1: float | None) -> None:
    """Writes the dataset folder and gives it its final name.

    Raises:
        OutputError: a file cannot be written, or the name has been taken meanwhile; what is written is kept.
    """
    out = job.config.out
    partial = out.with_name(f"{out.name}.partial-{job.key}")
    make_output_folder(partial)
    for shard in job.ranks.share(range(len(job.shards))):
        if not (job.writing.has(ENTRY.format(shard)) and (partial / shard_name(shard)).is_file()):
            job.writing.save_json(ENTRY.format(shard), asdict(_write(job, shard, partial)))
    job.ranks.meet()
    if job.ranks.is_first:
        _finish(job, partial, teacher_top1)
        _publish(partial, out)
    job.ranks.meet()


def _publish(partial: Path, out: Path) -> None:
    """Gives the whole dataset its final name."""
    try:
        os.rename(partial, out)
    except OSError as error:
        raise OutputError(
            f"{out}: cannot take the dataset's folder ({error.strerror}), which is whole in {partial}; move away what "
            f"is in the way, and the same command goes on"
        ) from error


def _write(job: Job, shard: int, folder: Path) -> ShardEntry:
    """Writes one shard from the encoded images and the distances of its epochs."""
    layout = job.layout(shard)
    indices = job.shards[shard].tolist()
    images = [
        EncodedImage(index=index, label=index % job.num_classes, data=data)
        for index, data in zip(indices, job.encoded_images(shard), strict=True)
    ]
    return write_shard(
        folder / shard_name(shard),
        shard=shard,
        images=images,
        extension=CODEC_EXTENSIONS[job.settings.encoding.codec],
        blocks=encode_shard_records(_labelled_epochs(job, shard), layout, shard),
        epochs=job.settings.records.epochs,
        layout=layout,
        priors=_priors(job, shard),
    )


def _priors(job: Job, shard: int) -> Priors | None:
    """The priors of a shard's images, as they are stored."""
    count = job.settings.records.priors
    if count is None:
        return None
    masses = job.priors.load_array(MASSES.format(shard))
    return choose_priors(masses, job.labels[job.shards[shard]], count, job.codebooks.distances)


def _labelled_epochs(job: Job, shard: int) -> Iterator[PairRecords]:
    """The pairs of every stored epoch of a shard with what the teacher says of them."""
    layout = job.layout(shard)
    for epoch in range(job.settings.records.epochs):
        org, aug = job.relabeling.load_array(DISTANCES.format(shard, epoch))
        labelled = replace(draw_pairs(layout, shard, epoch), distance_org=org, distance_aug=aug)
        yield labelled if layout.further is None else _with_further(job, shard, epoch, labelled)


def _with_further(job: Job, shard: int, epoch: int, labelled: PairRecords) -> PairRecords:
    classes, distances = (
        job.relabeling.load_array(name.format(shard, epoch)) for name in (FURTHER_CLASSES, FURTHER_DISTANCES)
    )
    return replace(labelled, further_classes=classes.astype(np.int64), further_distances=distances)


def _finish(job: Job, folder: Path, teacher_top1: float | None) -> None:
    """Manifest, card and pictures; removes what killed writes left."""
    entries = [ShardEntry(**job.writing.load_json(ENTRY.format(shard))) for shard in range(len(job.shards))]
    manifest = make_manifest(job, entries, teacher_top1)
    manifest.save(folder / MANIFEST_NAME)
    write_card(folder, manifest)
    _draw_pictures(job, folder)
    for leftover in folder.glob(".*"):
        leftover.unlink()


def check_manifest(job: Job) -> None:
    """Makes the manifest with stand-ins for what is not known yet, so that no option fails only after hours.

    Raises:
        FormatError: an option that no manifest can hold.
    """
    entries = [
        ShardEntry(
            name=shard_name(shard), sha256="0" * 64, bytes=1, images=len(i), pairs_per_epoch=len(i), record_bytes=1
        )
        for shard, i in enumerate(job.shards)
    ]
    make_manifest(job, entries, 0.0).encode()


def make_manifest(job: Job, entries: list[ShardEntry], teacher_top1: float | None) -> Manifest:
    """The manifest; it names no local path and no time, so that the same build gives the same bytes."""
    source, settings, records = job.source, job.settings, job.settings.records
    return Manifest(
        dataset=DatasetInfo(
            name=source.name,
            class_names=tuple(source.class_names),
            wnids=None if source.wnids is None else tuple(source.wnids),
            source_license=job.config.source_license,
        ),
        images=ImagesInfo(
            count=len(job.labels),
            ipc=job.ipc,
            size=source.size,
            codec=settings.encoding.codec,
            quality=settings.encoding.quality if job.given is None else job.config.image_quality,
            mean=job.mean,
            std=job.std,
            flip=records.flip,
        ),
        records=RecordsInfo(
            coding=records.coding,
            epochs=records.epochs,
            cycle=records.cycle,
            mix_group=records.mix_group,
            block_epochs=records.block_epochs,
            seed=job.config.seed,
            mix=records.mix,
            temperature=records.temperature,
            priors=records.priors,
            further=records.further,
        ),
        codebooks=job.codebooks,
        teacher=TeacherInfo(
            architecture=job.teacher.architecture,
            sha256=job.teacher.sha256,
            top1=None if teacher_top1 is None else round(teacher_top1, 4),
        ),
        method=_method(job),
        shards=tuple(entries),
    )


def _method(job: Job) -> dict[str, Any]:
    """What made the dataset."""
    facts = {"build_key": job.key, "seed": job.config.seed, **job.used_settings}
    if job.teacher.members:
        facts["teachers"] = [{"architecture": t.architecture, "sha256": t.sha256} for t in job.teacher.members]
    if job.given is None:
        return {"name": METHOD, **facts}
    images = {"method": job.config.images_method or "not stated", "sha256": job.given.sha256}
    return {"name": LABELS_METHOD, "given_images": images, **facts}


def _draw_pictures(job: Job, folder: Path) -> None:
    """The contact sheet and the histogram; what only the build knows of images it made is kept for `nrrdd preview`."""
    if job.given is not None:
        preview_dataset(folder, folder)
        return
    with open_dataset(folder) as dataset:
        indices = np.array([image.index for image in shown_images(dataset)])
    initial = job.initial_images(indices)
    mask = _masks(job, initial, job.labels[indices])
    job.writing.save_array(SHOWN_INDICES, indices)
    job.writing.save_array(SHOWN_INITIAL, initial)
    job.writing.save_array(SHOWN_MASK, mask)
    numbers = indices.tolist()
    preview_dataset(
        folder,
        folder,
        initial=dict(zip(numbers, initial, strict=True)),
        mask=dict(zip(numbers, mask, strict=True)),
    )


def _masks(job: Job, initial: Images, labels: NDArray[np.int64]) -> Masks:
    targets = torch.from_numpy(labels).to(job.device)
    mask: Masks = step_mask(job.eyes, job.eyes.see(initial), targets, job.settings.refinement)[:, 0].cpu().numpy()
    return mask


def make_output_folder(path: Path) -> None:
    """Makes a folder of the output; raises OutputError if it cannot, or nothing can be written there."""
    make_folder(path, "choose another --out")
    if not os.access(path, os.W_OK):
        raise OutputError(f"{path}: the folder is not writable; choose another --out")
