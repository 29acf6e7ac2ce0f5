"""What a user can set for a build, and the settings each stage receives from it.

`BuildConfig` holds the options as given; `plan_settings` fills what was left open from the source dataset's conventions
and checks the whole. A stage sees only its own settings, and its results are keyed by exactly those.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from builders.bounds import (
    MAX_IPC,
    MAX_SEED,
    MAX_STEPS,
    MAX_THREADS,
    at_least,
    between,
    manifest_text,
    positive,
)
from builders.image_sets import Place
from nrrdd_format.errors import ConfigError, counted
from nrrdd_format.limits import (
    MAX_CLASSES,
    MAX_DRAWN_IMAGES,
    MAX_EPOCHS,
    MAX_FURTHER,
    MAX_IMAGES,
    MAX_LEVELS,
    MAX_MIXES,
    MAX_SHARDS,
    MAX_VIEWS,
)

if TYPE_CHECKING:  # it imports torch, and options are looked at before that
    from builders.sources import Source

BLOCK_PAIRS = 20_000
"""Pairs that are compressed together, about: fewer cost bytes, more cost time where one epoch is read."""

MAX_UNITS = 10_000_000
"""Epochs of shards: each is a file in the work folder."""

HUB_PREFIX = "hf:"
"""What `--from-images` begins with where it names a dataset of Hugging Face."""

Init = Literal["cidd", "real", "noise"]
Confidence = Literal["highest", "lowest", "random"]
CropScore = Literal["sum", "mean"]
Mask = Literal["non-critical", "binary", "all"]
Schedule = Literal["cosine", "constant"]
LabelRefinement = Literal["soft", "pair"]
Mix = Literal["cutmix", "mixup", "both"]
Precision = Literal["auto", "fp32", "bf16"]
Coding = Literal["explicit", "derived"]
Codec = Literal["jpeg", "png", "webp"]


@dataclass(frozen=True, kw_only=True)
class DiscoverySettings:
    """Critical-based initial data discovery (Stage 1)."""

    ipc: int
    beta: int
    """Patches in one synthetic image; a square number."""
    init: Init
    """`cidd` is the paper's stage; `real` takes whole random training images (the paper's Table 13 and a baseline);
    `noise` is normal in the teacher's normalised space (SRe2L's start)."""
    confidence: Confidence
    """Which patches of the pool are kept: the paper's choice is `lowest`, but see docs/method.md."""
    crop_score: CropScore
    """How the activation inside a crop is judged; `sum` favours large crops, `mean` the smallest."""
    crops: int = 5
    """Random crops of each image."""
    crop_scale: tuple[float, float] = (0.08, 1.0)
    """Share of the image's area that a crop covers."""
    pool_factor: int = 3
    """The pool of a class holds this many times the patches that are kept, or more where an image gives several."""

    @property
    def patches(self) -> int:
        """Patches kept for each class: β·IPC."""
        return self.beta * self.ipc

    @property
    def images_needed(self) -> int:
        """Training images of a class that are looked at, at most."""
        return {"cidd": self.pool_factor * self.patches, "real": self.ipc, "noise": 0}[self.init]

    @property
    def images_required(self) -> int:
        """Fewest usable images of a class with which the stage can run."""
        return {"cidd": math.ceil(self.patches / self.crops), "real": self.ipc, "noise": 0}[self.init]


@dataclass(frozen=True, kw_only=True)
class RefinementSettings:
    """Non-critical region refinement (Stage 2)."""

    iterations: int
    """Steps for each batch; 0 leaves the initial images as they are."""
    learning_rate: float
    schedule: Schedule
    mask: Mask
    """`non-critical`: M = max(0, ε − C), the paper's; `binary`: M = 1 where C < ε, which a mask on the gradient comes
    to under Adam; `all`: M = 1 everywhere (SRe2L)."""
    epsilon: float
    """Threshold of the mask."""
    cam_every: int
    """Steps after which C is computed anew from the images as they are; 0: it stays that of the initial images."""
    alpha_bn: float
    alpha_lr: float
    label_refinement: LabelRefinement
    """`soft` cross-entropy against λ·y_i + (1−λ)·y_j, or `pair`: −log(p_i + p_j)."""
    label_refinement_views: bool
    """Whether label refinement mixes views of the images, as the records do, or whole images."""
    jitter: bool
    """SRe2L's random resized crop, roll and flip (where views may be flipped) before each forward pass."""
    batch_size: int
    mix: Mix
    precision: Literal["fp32", "bf16"] = "fp32"
    """What the teacher computes in; images, statistics and losses are float32 in either."""
    compile: bool = False
    """Whether the steps run through torch.compile, which rounds otherwise."""
    betas: tuple[float, float] = (0.5, 0.9)
    first_bn_factor: float = 10.0


@dataclass(frozen=True, kw_only=True)
class EncodingSettings:
    """How a refined image is stored."""

    codec: Codec
    quality: int | None
    shard_images: int
    """Images aimed at in a shard."""


@dataclass(frozen=True, kw_only=True)
class RecordSettings:
    """Which views and mixes are drawn, and how distances are computed and stored (Stage 3)."""

    epochs: int
    coding: Coding
    mix: Mix
    view_scale: tuple[float, float]
    flip: bool
    temperature: float
    cycle: int
    mix_group: int
    distance_levels: int
    block_epochs: int
    """Stored epochs compressed together."""
    views: int
    mixes: int
    priors: int | None
    """Classes in each image's prior; None: no priors."""
    further: int | None
    """Further classes of each pair; None: none."""


@dataclass(frozen=True, kw_only=True)
class BuildSettings:
    """The settings of all stages."""

    discovery: DiscoverySettings
    refinement: RefinementSettings
    encoding: EncodingSettings
    records: RecordSettings


@dataclass(frozen=True, kw_only=True)
class TeacherChoice:
    """One teacher: its architecture (None: as the checkpoint says), its file (None: pretrained weights), or both."""

    architecture: str | None = None
    checkpoint: Path | None = None


def pair_teachers(architectures: Sequence[str], checkpoints: Sequence[Path]) -> tuple[TeacherChoice, ...]:
    """The teachers that both options name together; one without a name where they name none.

    Raises:
        ConfigError: there are so many of both that it is unclear what belongs together.
    """
    if architectures and checkpoints and len(architectures) != len(checkpoints):
        raise ConfigError(
            f"--teacher: found {counted(len(architectures), 'architecture')} for "
            f"{counted(len(checkpoints), 'checkpoint')}, expected one for each, in the same order, or none where "
            f"the checkpoints say theirs"
        )
    pairs = zip_longest(architectures, checkpoints)
    return tuple(TeacherChoice(architecture=a, checkpoint=c) for a, c in pairs) or (TeacherChoice(),)


REFINING_OPTIONS = (
    *("batch_size", "learning_rate", "schedule", "mask", "epsilon", "cam_every"),
    *("alpha_bn", "alpha_lr", "label_refinement", "label_refinement_views", "jitter", "precision", "compile"),
)
"""Options of refinement besides its steps, which no steps do not go by."""

MAKING_OPTIONS = ("init", "confidence", "crop_score", "beta", "iterations", *REFINING_OPTIONS)
"""Options of discovery and refinement, which given images do not go through."""

PATCH_OPTIONS = ("confidence", "crop_score")
"""Options of the patches that `--init cidd` alone makes images of."""


@dataclass(frozen=True, kw_only=True)
class BuildConfig:
    """The options of `build-distilled`. `None` means: what suits the dataset (see `plan_settings`)."""

    dataset: str
    out: Path
    ipc: int
    """Images per class; 0 with `from_images`: as many as there are."""
    from_images: Path | None = None
    """Distilled images that exist already: they are labelled and stored as they are. A folder with one folder per
    class, or `hf:` and the folder or name of a dataset of Hugging Face."""
    images_method: str | None = None
    """What made them, for the manifest."""
    data_dir: Place | None = None
    test_dir: Place | None = None
    classes: tuple[str, ...] | None = None
    size: int | None = None
    image_column: str | None = None
    label_column: str | None = None
    """Where images and labels stand in a dataset of Hugging Face (of the given images, too), or in the samples of a
    WebDataset."""
    cache_dir: Path | None = None
    """Keeps a WebDataset's shards behind URLs, and its index; `nrrdd` in the user's cache folder by default."""
    work_dir: Path | None = None
    """Holds every stage's results; `<out>.work` by default."""
    teacher: str | None = None
    teacher_checkpoint: Path | None = None
    more_teachers: tuple[TeacherChoice, ...] = ()
    """With the first they label the pairs as an ensemble; images are made with the first alone."""
    min_teacher_top1: float | None = None
    init: Init = "cidd"
    confidence: Confidence = "highest"
    crop_score: CropScore = "sum"
    beta: int | None = None
    mask: Mask = "non-critical"
    epsilon: float = 0.5
    cam_every: int = 0
    iterations: int = 2000
    learning_rate: float = 0.05
    schedule: Schedule = "cosine"
    alpha_bn: float = 0.01
    alpha_lr: float = 1.0
    label_refinement: LabelRefinement = "soft"
    label_refinement_views: bool = True
    """Whether label refinement mixes views of the images, as the records do, or whole images."""
    jitter: bool = False
    batch_size: int = 100
    precision: Precision = "auto"
    """The teacher's in refinement; `auto` is bf16 on a GPU that computes in it, else fp32."""
    compile: bool = False
    """Whether refinement runs through torch.compile."""
    epochs: int = 300
    records: Coding = "explicit"
    mix: Mix = "cutmix"
    view_scale: float | None = None
    """Smallest share of the image's area that a view shows."""
    temperature: float = 1.0
    cycle: int = 10
    mix_group: int = 10
    distance_levels: int = 16
    views: int = 512
    """Crops in the codebook that views are drawn from."""
    mixes: int = 1024
    """Mixes in the codebook that pairs' mixes are drawn from."""
    priors: int = 0
    """Classes in each image's prior, at most; 0: no priors."""
    further: int = 0
    """Further classes of each pair, at most."""
    image_codec: Codec | None = None
    image_quality: int | None = None
    shard_images: int = 1000
    source_license: str | None = None
    seed: int = 0
    device: str = "auto"
    threads: int | None = None

    def __post_init__(self) -> None:
        between("--ipc", self.ipc, 1 if self.from_images is None else 0, MAX_IPC)
        self._check_given()
        between("--iterations", self.iterations, 0, MAX_STEPS)
        between("--batch-size", self.batch_size, 2, MAX_IMAGES)
        between("--epochs", self.epochs, 1, MAX_EPOCHS)
        between("--cycle", self.cycle, 2, MAX_IMAGES)
        between("--mix-group", self.mix_group, 1, MAX_IMAGES)
        between("--shard-images", self.shard_images, 2, MAX_DRAWN_IMAGES)
        between("--seed", self.seed, 0, MAX_SEED)
        between("--distance-levels", self.distance_levels, 2, MAX_LEVELS)
        between("--views", self.views, 1, MAX_VIEWS)
        between("--mixes", self.mixes, 1, MAX_MIXES)
        between("--priors", self.priors, 0, MAX_CLASSES - 1)
        between("--further", self.further, 0, MAX_FURTHER)
        between("--epsilon", self.epsilon, 0, 1)
        between("--cam-every", self.cam_every, 0, MAX_STEPS)
        positive("--learning-rate", self.learning_rate)
        between("--temperature", self.temperature, 1e-3, 1e3)
        at_least("--alpha-bn", self.alpha_bn, 0)
        at_least("--alpha-lr", self.alpha_lr, 0)
        if self.threads is not None:
            between("--threads", self.threads, 1, MAX_THREADS)
        if self.min_teacher_top1 is not None:
            between("--min-teacher-top1", self.min_teacher_top1, 0, 1)
        if self.view_scale is not None:
            positive("--view-scale", self.view_scale)
            between("--view-scale", self.view_scale, 0, 1)
        if self.image_quality is not None:
            between("--image-quality", self.image_quality, 1, 100)
        manifest_text("--source-license", self.source_license)
        manifest_text("--images-method", self.images_method)

    def _check_given(self) -> None:
        """Refuses options that would have no effect."""
        if self.from_images is None:
            if self.images_method is not None:
                raise ConfigError("--images-method: found without --from-images, expected with it")
            self._check_patches()
            return
        if str(self.from_images) == HUB_PREFIX:
            raise ConfigError("--from-images: found hf: alone, expected hf:FOLDER or hf:NAME")
        for name in MAKING_OPTIONS:
            if getattr(self, name) != getattr(BuildConfig, name):
                raise ConfigError(
                    f"--{name.replace('_', '-')}: found with --from-images, whose images are neither discovered nor "
                    f"refined; leave the option out"
                )

    def _check_patches(self) -> None:
        for name in PATCH_OPTIONS:
            found = getattr(self, name)
            if self.init != "cidd" and found != getattr(BuildConfig, name):
                raise ConfigError(
                    f"--{name.replace('_', '-')}: found {found} with --init {self.init}, which chooses no patches; "
                    f"leave one of the options out"
                )

    @property
    def given_table(self) -> Path | None:
        """The dataset of Hugging Face that holds the given images; None: they lie in folders, or there are none."""
        text = str(self.from_images)
        return Path(text.removeprefix(HUB_PREFIX)) if text.startswith(HUB_PREFIX) else None

    @property
    def teachers(self) -> tuple[TeacherChoice, ...]:
        """All teachers, the first first."""
        return TeacherChoice(architecture=self.teacher, checkpoint=self.teacher_checkpoint), *self.more_teachers

    @property
    def work_path(self) -> Path:
        """The folder that holds the stages' results."""
        return self.work_dir if self.work_dir is not None else self.out.with_name(self.out.name + ".work")


def check_places(config: BuildConfig) -> None:
    """Checks that the output has a name, and that no folder of the options gets in another's way.

    Raises:
        ConfigError: the output is named by its place alone, or the stages' results would lie in the dataset's folder,
            or among the images.
    """
    if config.out.name in ("", ".."):
        raise ConfigError(
            f"--out: found {config.out}, expected a folder with a name of its own, which the work folder and the "
            f"unfinished dataset beside it are named after"
        )
    work, out = config.work_path.resolve(), config.out.resolve()
    if out in (work, *work.parents):
        raise ConfigError(
            f"--work-dir: found {config.work_path}, which is --out or lies in it, expected a folder outside of "
            f"{config.out}, which takes its name only when the dataset is whole"
        )
    images = {"--data-dir": config.data_dir, "--test-dir": config.test_dir, "--from-images": config.from_images}
    for option, place in images.items():
        if isinstance(place, Path) and place.resolve() == work:
            raise ConfigError(
                f"--work-dir: found {config.work_path}, which is {option}, expected a folder of its own, away from "
                f"the images"
            )


def check_effects(config: BuildConfig) -> None:
    """Checks that no option of refinement is idle beside another; for commands, since a benchmark may vary either.

    Raises:
        ConfigError: an option is not at its default, and would have no effect.
    """
    idle = idle_options(iterations=config.iterations, mask=config.mask, alpha_lr=config.alpha_lr)
    for reason, names in idle.items():
        for name in names:
            if getattr(config, name) != getattr(BuildConfig, name):
                raise ConfigError(
                    f"--{name.replace('_', '-')}: found with {reason}, where it has no effect; leave one of them out"
                )
    if 0 < config.iterations <= config.cam_every:
        raise ConfigError(
            f"--cam-every: found {config.cam_every} with --iterations {config.iterations}, where it has no effect; "
            "take fewer steps between two activation maps, or leave it out"
        )


def idle_options(*, iterations: int, mask: Mask, alpha_lr: float) -> dict[str, tuple[str, ...]]:
    """The options of refinement that have no effect beside these, by the one that leaves them without."""
    return {
        f"--iterations {iterations}": REFINING_OPTIONS if iterations == 0 else (),
        f"--mask {mask}": ("epsilon", "cam_every") if mask == "all" else (),
        f"--alpha-lr {alpha_lr:g}": ("label_refinement", "label_refinement_views") if alpha_lr == 0 else (),
    }


def plan_settings(config: BuildConfig, source: Source, given_codec: Codec | None = None) -> BuildSettings:
    """Fills the open options from the dataset's conventions and checks them against it.

    `given_codec` is the codec that given images have, which a shard then keeps.

    Raises:
        ConfigError: an option does not fit the dataset (β no square or no divisor of the side, too few images or
            classes, or too many).
    """
    beta = source.beta if config.beta is None else config.beta
    _check_beta(beta, source.size)
    _check_others(config, len(source.class_names))
    _check_amount(config, config.ipc * len(source.class_names))
    codec: Codec = config.image_codec or given_codec or ("png" if source.size <= 64 else "jpeg")
    if config.image_quality is not None and codec == "png":
        raise ConfigError("--image-quality: PNG is lossless and has no quality; leave the option out or name a codec")
    shard_images = min(config.shard_images, config.ipc * len(source.class_names))
    return BuildSettings(
        discovery=DiscoverySettings(
            ipc=config.ipc,
            beta=beta,
            init=config.init,
            confidence=config.confidence,
            crop_score=config.crop_score,
        ),
        refinement=RefinementSettings(
            iterations=config.iterations,
            learning_rate=config.learning_rate,
            schedule=config.schedule,
            mask=config.mask,
            epsilon=config.epsilon,
            cam_every=config.cam_every,
            alpha_bn=config.alpha_bn,
            alpha_lr=config.alpha_lr,
            label_refinement=config.label_refinement,
            label_refinement_views=config.label_refinement_views,
            jitter=config.jitter,
            batch_size=config.batch_size,
            mix=config.mix,
            compile=config.compile,
        ),
        encoding=EncodingSettings(
            codec=codec,
            quality=None if codec == "png" else (config.image_quality or 90),
            shard_images=config.shard_images,
        ),
        records=RecordSettings(
            epochs=config.epochs,
            coding=config.records,
            mix=config.mix,
            view_scale=(_smallest_view(config, beta), 1.0),
            flip=source.flip,
            temperature=config.temperature,
            cycle=config.cycle,
            mix_group=config.mix_group,
            distance_levels=config.distance_levels,
            block_epochs=max(1, min(config.epochs, BLOCK_PAIRS // shard_images)),
            views=config.views,
            mixes=config.mixes,
            priors=config.priors or None,
            further=config.further or None,
        ),
    )


def _smallest_view(config: BuildConfig, beta: int) -> float:
    """RDED's 1/√β; for β = 1 that would be no crop at all, so 0.3 there."""
    if config.view_scale is not None:
        return config.view_scale
    return 0.3 if beta == 1 else 1 / math.sqrt(beta)


def _check_amount(config: BuildConfig, images: int) -> None:
    """There must be a pair, and no more shards than a dataset may have, nor files than a work folder should hold."""
    if images < 2:
        raise ConfigError(
            "--ipc: one image in all leaves nothing to pair; a dataset needs at least 2 images, so raise --ipc"
        )
    shards = max(1, round(images / config.shard_images))
    if shards > MAX_SHARDS:
        raise ConfigError(
            f"--ipc: {images} images take {shards} shards of --shard-images {config.shard_images}, expected at most "
            f"{MAX_SHARDS}; raise --shard-images or lower --ipc"
        )
    if shards * config.epochs > MAX_UNITS:
        raise ConfigError(
            f"--epochs: {config.epochs} epochs of {shards} shards are {shards * config.epochs} units of work, expected "
            f"at most {MAX_UNITS}; raise --shard-images or lower --epochs"
        )


def _check_others(config: BuildConfig, classes: int) -> None:
    """An image has all classes but its own beside it, a pair all but its two."""
    for option, found, high in (("--priors", config.priors, classes - 1), ("--further", config.further, classes - 2)):
        if found > max(0, high):
            there = counted(classes, "class", "classes")
            raise ConfigError(f"{option}: found {found}, expected at most {max(0, high)}: there are {there} in all")


def _check_beta(beta: int, size: int) -> None:
    side = math.isqrt(beta) if beta > 0 else 0
    if side * side != beta or beta < 1:
        raise ConfigError(f"--beta: found {beta}, expected a square number (1, 4, 9, …): β patches tile a square image")
    if size % side:
        raise ConfigError(
            f"--beta: {beta} patches do not tile an image of {size} px evenly; choose --beta or --size so that "
            f"√β divides the side"
        )
