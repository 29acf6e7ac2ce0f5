"""The job: what one build works on, how its images are numbered, and where each stage keeps its results.

Images are numbered class-interleaved: image i is the (i // C)-th of class i % C, C classes in all. Any run of
consecutive images is therefore class-balanced: refinement batches and shards are such runs.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any, Literal

import msgpack
import numpy as np
import torch
from numpy.typing import NDArray

from builders.cam import ClassActivation
from builders.config import BuildConfig, BuildSettings, check_places, plan_settings
from builders.conventions import Colour
from builders.discovery import Eyes
from builders.ensemble import common_normalisation, load_teachers
from builders.given_images import GivenImages
from builders.inputs import Inputs, load_inputs
from builders.label_refinement import PairTables
from builders.ranks import Ranks
from builders.sources import Source
from builders.teacher import Teacher
from builders.workdir import Stage
from nrrdd_format.codebooks import Codebooks, distance_levels, mix_codebook, view_codebook
from nrrdd_format.pairs import RecordLayout

# File names of finished units in the stages' folders.
CLASS_JSON = "class-{:05d}.json"
CLASS_ARRAY = "class-{:05d}.npy"
FLAT_MAPS = "flat-{:05d}.json"
BATCH_ARRAY = "batch-{:05d}.npy"
BATCH_LOSSES = "losses-{:05d}.json"
SHARD_BYTES = "shard-{:05d}.msgpack"
DISTANCES = "shard-{:05d}-epoch-{:05d}.npy"
FURTHER_CLASSES = "classes-{:05d}-{:05d}.npy"
FURTHER_DISTANCES = "further-{:05d}-{:05d}.npy"
MASSES = "shard-{:05d}.npy"

STORED_ONLY = ("epochs", "coding", "distance_levels", "block_epochs", "priors", "further")
"""Record settings that decide what is stored of the teacher's answers, not what they are."""
PRIOR_EPOCHS = 16
"""Drawn epochs over which an image's prior is averaged, however many are stored."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """All that the stages share, and where each keeps its results."""

    config: BuildConfig
    inputs: Inputs
    settings: BuildSettings
    teacher: Teacher
    activation: ClassActivation | None
    """None where images are given: only making them asks for maps of the teacher."""
    mean: Colour
    std: Colour
    device: torch.device
    ranks: Ranks
    codebooks: Codebooks
    scan: Stage
    discovery: Stage
    refinement: Stage
    encoding: Stage
    relabeling: Stage
    priors: Stage
    writing: Stage

    @property
    def key(self) -> str:
        """Digest of all that determines the dataset's content."""
        return self.writing.key

    @property
    def source(self) -> Source:
        """The source dataset."""
        return self.inputs.source

    @property
    def given(self) -> GivenImages | None:
        """The distilled images that exist already; None: the build makes them."""
        return self.inputs.given

    @property
    def eyes(self) -> Eyes:
        """The teacher as discovery and refinement use it."""
        assert self.activation is not None, "given images are neither discovered nor refined"
        return Eyes(activation=self.activation, mean=self.mean, std=self.std, device=self.device)

    @property
    def stages(self) -> tuple[Stage, ...]:
        """The stages this build goes through."""
        priors = () if self.settings.records.priors is None else (self.priors,)
        labelling = (self.encoding, self.relabeling, *priors, self.writing)
        return labelling if self.given is not None else (self.scan, self.discovery, self.refinement, *labelling)

    @property
    def used_settings(self) -> dict[str, Any]:
        """The settings of those stages, as JSON values."""
        left_out = () if self.given is None else ("discovery", "refinement")
        return {name: value for name, value in asdict(self.settings).items() if name not in left_out}

    @property
    def ipc(self) -> int:
        """Images per class."""
        return self.config.ipc if self.given is None else self.given.ipc

    @property
    def num_classes(self) -> int:
        """C."""
        return len(self.source.class_names)

    @cached_property
    def labels(self) -> NDArray[np.int64]:
        """Class of every distilled image, (N,)."""
        return np.arange(self.num_classes * self.ipc) % self.num_classes

    @cached_property
    def batches(self) -> list[NDArray[np.int64]]:
        """Images of every refinement batch; all of nearly one size, at least two images each."""
        count = len(self.labels)
        size = self.settings.refinement.batch_size
        return np.array_split(np.arange(count), min(-(-count // size), count // 2))

    @cached_property
    def shards(self) -> list[NDArray[np.int64]]:
        """Images of every shard; all of nearly one size, at least two images each."""
        count = len(self.labels)
        wanted = max(1, round(count / self.settings.encoding.shard_images))
        return np.array_split(np.arange(count), min(wanted, count // 2))

    def initial_images(self, indices: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Discovery's images with these numbers, (B, 3, S, S) uint8."""
        rows = []
        for index in indices.tolist():
            of_class = self.discovery.load_array(CLASS_ARRAY.format(index % self.num_classes))
            rows.append(of_class[index // self.num_classes])
        return np.stack(rows)

    def encoded_images(self, shard: int) -> list[bytes]:
        """The stored bytes of a shard's images."""
        data: list[bytes] = msgpack.unpackb((self.encoding.path / SHARD_BYTES.format(shard)).read_bytes())
        return data

    @property
    def pair_tables(self) -> PairTables:
        """What label refinement draws views and mixes from: the codebooks of the pairs."""
        mixes = self.codebooks.mix_table(self.source.size)
        assert mixes is not None, "a build draws its pairs"
        views = self.codebooks.views if self.settings.refinement.label_refinement_views else None
        return PairTables(views=views, flip=self.settings.records.flip, mixes=mixes)

    def layout(self, shard: int) -> RecordLayout:
        """How the pair records of one shard are drawn and stored."""
        records, images = self.settings.records, len(self.shards[shard])
        return RecordLayout(
            images=images,
            pairs=images,
            classes=self.num_classes,
            size=self.source.size,
            cycle=records.cycle,
            mix_group=records.mix_group,
            block_epochs=records.block_epochs,
            flip=records.flip,
            coding=records.coding,
            seed=self.config.seed,
            views=self.codebooks.views,
            mixes=self.codebooks.mix_table(self.source.size),
            levels=self.codebooks.distances,
            priors=records.priors,
            further=records.further,
        )


def prepare(config: BuildConfig, ranks: Ranks) -> Job:
    """Loads source and teacher, resolves the settings and names every stage's folder."""
    check_places(config)
    inputs = _load_inputs(config, ranks)
    source, given = inputs.source, inputs.given
    if given is None:
        settings = plan_settings(config, source)
    else:
        settings = plan_settings(replace(config, ipc=given.ipc), source, given.codec)
    device = ranks.device(config.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)  # else every rank would take memory of the first GPU, too
    settings = _with_precision(settings, config, device)
    teacher = load_teachers(
        config.teachers,
        num_classes=len(source.class_names),
        image_size=source.size,
        device=device,
        class_names=source.class_names,
    )
    mean, std = common_normalisation(teacher, (source.mean, source.std))
    origin = None if config.teacher_checkpoint is None else str(config.teacher_checkpoint)
    return Job(
        config=config,
        inputs=inputs,
        settings=settings,
        teacher=teacher,
        activation=ClassActivation(teacher.first.model, source.size, origin) if given is None else None,
        mean=mean,
        std=std,
        device=device,
        ranks=ranks,
        codebooks=_codebooks(config, settings, source.size),
        **_stages(config, settings, inputs, teacher, {"mean": list(mean), "std": list(std)}),
    )


def has_bfloat16(device: torch.device) -> bool:
    """Whether it is the current GPU and computes in bfloat16; those before Ampere emulate it, slower than float32."""
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def _with_precision(settings: BuildSettings, config: BuildConfig, device: torch.device) -> BuildSettings:
    """Settles what `auto` means on this device; it changes the images a little, so it belongs to the stage's key."""
    auto: Literal["fp32", "bf16"] = "bf16" if has_bfloat16(device) else "fp32"
    precision = auto if config.precision == "auto" else config.precision
    return replace(settings, refinement=replace(settings.refinement, precision=precision))


def _load_inputs(config: BuildConfig, ranks: Ranks) -> Inputs:
    """The first rank goes ahead: where the images have to be downloaded, one process does it."""
    if not ranks.is_first:
        ranks.meet()
    inputs = load_inputs(config)
    if ranks.is_first:
        ranks.meet()
    return inputs


def _codebooks(config: BuildConfig, settings: BuildSettings, size: int) -> Codebooks:
    records = settings.records
    return Codebooks(
        views=view_codebook(config.seed, size, records.view_scale, count=records.views),
        mixes=tuple(mix_codebook(config.seed, size, records.mix, count=records.mixes)),
        distances=distance_levels(records.distance_levels),
    )


def _stages(
    config: BuildConfig, settings: BuildSettings, inputs: Inputs, teacher: Teacher, normalised: dict[str, Any]
) -> dict[str, Stage]:
    """The stages' folders, each keyed by its own settings and the stage before."""
    makes, labels = ({"teacher": digest} | normalised for digest in (teacher.first.sha256, teacher.sha256))
    work, seed, source, given = config.work_path, {"seed": config.seed}, inputs.source, inputs.given
    wanted = {"init": settings.discovery.init, "needed": settings.discovery.images_needed}
    drawn = {name: value for name, value in asdict(settings.records).items() if name not in STORED_ONLY}
    scan_stage = Stage(work, "scan", wanted | seed, source.train.fingerprint() if given is None else given.sha256)
    discovery = Stage(work, "discovery", asdict(settings.discovery) | makes | seed, scan_stage.key)
    # Label refinement draws from the dataset's codebooks.
    tables = {name: getattr(settings.records, name) for name in ("mixes", "views", "view_scale", "flip")}
    refinement = Stage(work, "refinement", {"settings": asdict(settings.refinement)} | tables | seed, discovery.key)
    images = refinement.key if given is None else f"{given.sha256} {source.size} {config.image_quality}"
    encoding = Stage(work, "encoding", asdict(settings.encoding), images)
    asked = {"further": settings.records.further}
    relabeling = Stage(work, "relabeling", drawn | labels | seed | asked, encoding.key)
    priors = Stage(work, "priors", drawn | labels | seed | {"epochs": PRIOR_EPOCHS}, encoding.key)
    stored = {
        "records": asdict(settings.records),
        "dataset": source.name,
        "class_names": list(source.class_names),
        "wnids": source.wnids,
        "license": config.source_license,
        "images_method": config.images_method,
    }
    return {
        "scan": scan_stage,
        "discovery": discovery,
        "refinement": refinement,
        "encoding": encoding,
        "relabeling": relabeling,
        "priors": priors,
        "writing": Stage(work, "writing", stored, relabeling.key),
    }
