"""The manifest: `dataset.json`, the one file of a dataset that is read first (SPEC.md section 3)."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, cast, get_args

import numpy as np

from nrrdd_format.codebooks import LAM_STEPS, Codebooks, MixEntry, MixKind
from nrrdd_format.errors import FormatError, shown
from nrrdd_format.files import atomic_write
from nrrdd_format.json_checks import Fields, is_number, parse_json
from nrrdd_format.limits import (
    MAX_CLASSES,
    MAX_DRAWN_IMAGES,
    MAX_EPOCHS,
    MAX_FURTHER,
    MAX_IMAGE_SIDE,
    MAX_IMAGES,
    MAX_INDEX,
    MAX_LEVELS,
    MAX_MANIFEST_BYTES,
    MAX_MEMBER_BYTES,
    MAX_MIXES,
    MAX_PRIORS,
    MAX_SHARD_BYTES,
    MAX_SHARDS,
    MAX_VIEWS,
)
from nrrdd_format.pairs import Coding, RecordLayout
from nrrdd_format.shards import ShardEntry, shard_number
from nrrdd_format.versions import Version, check_version, needed_version, version_text

MANIFEST_NAME = "dataset.json"
FORMAT = "nrrdd"
NORMAL_VERSION = [1, 0]
"""Stands in the dataset id, whatever version the manifest states."""
CODEC_EXTENSIONS = {"jpeg": "jpg", "png": "png", "webp": "webp"}
Codec = Literal["jpeg", "png", "webp"]
_SHOWN_PROBLEMS = 10


@dataclass(frozen=True, kw_only=True)
class DatasetInfo:
    """What the dataset is."""

    name: str
    class_names: tuple[str, ...]  # label k is class_names[k]
    wnids: tuple[str, ...] | None = None  # WordNet ids of the classes
    source_license: str | None = None


@dataclass(frozen=True, kw_only=True)
class ImagesInfo:
    """The images and how a student must see them."""

    count: int
    ipc: int  # images per class
    size: int  # pixels a side
    codec: Codec
    quality: int | None  # encoder setting 1..100, None for lossless
    mean: tuple[float, float, float]  # of x / 255, per channel RGB
    std: tuple[float, float, float]
    flip: bool  # whether views may be flipped


@dataclass(frozen=True, kw_only=True)
class RecordsInfo:
    """How pair records were drawn and are stored."""

    coding: Coding
    epochs: int
    cycle: int = 10
    mix_group: int = 10
    block_epochs: int = 20
    seed: int
    mix: MixKind = "cutmix"
    temperature: float = 1.0  # of the softmax behind the distances
    priors: int | None = None  # classes in each image's prior; None: there are none
    further: int | None = None  # further classes of each pair; None: there are none


@dataclass(frozen=True, kw_only=True)
class TeacherInfo:
    """The network that labelled the pairs."""

    architecture: str
    sha256: str  # of its state dict
    top1: float | None  # measured on real images, in [0, 1]


@dataclass(frozen=True, kw_only=True, eq=False)
class Manifest:
    """Everything about a dataset except its images and records."""

    dataset: DatasetInfo
    images: ImagesInfo
    records: RecordsInfo
    codebooks: Codebooks
    teacher: TeacherInfo
    method: dict[str, Any] = field(default_factory=dict)  # resolved settings of the build, plain JSON values
    shards: tuple[ShardEntry, ...] = ()

    def layout(self, shard: int) -> RecordLayout:
        """How to read the records of `shards[shard]`."""
        return self.layout_for(self.shards[shard].images, self.shards[shard].pairs_per_epoch)

    def layout_for(self, images: int, pairs: int | None = None) -> RecordLayout:
        """How to read (or draw) the records of a shard with so many images and pairs an epoch (None: as many)."""
        return RecordLayout(
            images=images,
            pairs=images if pairs is None else pairs,
            classes=len(self.dataset.class_names),
            size=self.images.size,
            cycle=self.records.cycle,
            mix_group=self.records.mix_group,
            block_epochs=self.records.block_epochs,
            flip=self.images.flip,
            coding=self.records.coding,
            seed=self.records.seed,
            views=self.codebooks.views,
            mixes=self.codebooks.mix_table(self.images.size),
            levels=self.codebooks.distances,
            priors=self.records.priors,
            further=self.records.further,
        )

    @property
    def version(self) -> Version:
        """The format version that a reader has to know to read this dataset."""
        return needed_version(priors=self.records.priors, further=self.records.further)

    @property
    def dataset_id(self) -> str:
        """SHA-256 in hex of the canonical JSON: equal for equal content, whatever the file's layout."""
        content = {**self.to_json(), "version": NORMAL_VERSION}
        text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
        return hashlib.sha256(text.encode("ascii")).hexdigest()

    def to_json(self) -> dict[str, Any]:
        """The manifest as plain JSON values, keys in file order."""
        return {
            "format": FORMAT,
            "version": list(self.version),
            "dataset": asdict(self.dataset),
            "images": asdict(self.images),
            "records": _without_absent(asdict(self.records)),
            "codebooks": {
                "views": None if self.codebooks.views is None else self.codebooks.views.tolist(),
                "mixes": None if self.codebooks.mixes is None else list(self.codebooks.mixes),
                "distances": [float(str(d)) for d in self.codebooks.distances],  # the shortest float32 text
            },
            "teacher": asdict(self.teacher),
            "method": self.method,
            "shards": [asdict(s) for s in self.shards],
        }

    def encode(self) -> bytes:
        """The bytes of `dataset.json`, one top-level key a line. Raises FormatError for unusable content."""
        try:
            rows = [f"{json.dumps(key)}: {_line(value)}" for key, value in self.to_json().items()]
        except ValueError as error:  # NaN and infinities
            raise FormatError(f"{error}, expected finite numbers") from None
        data = ("{\n" + ",\n".join(rows) + "\n}\n").encode("ascii")
        Manifest.decode(data)  # a manifest that no reader would accept is never written
        return data

    @classmethod
    def decode(cls, data: bytes) -> Manifest:
        """Read the bytes of `dataset.json`. Raises FormatError listing every problem with its JSON path."""
        if len(data) > MAX_MANIFEST_BYTES:
            raise FormatError(f"{len(data)} bytes, expected at most {MAX_MANIFEST_BYTES}")
        content = parse_json(data)
        _check_format(content)
        problems: list[str] = []
        manifest = _read(Fields(content, "", problems))
        if not problems:
            problems = _version_problems(content["version"], manifest) + _cross_checks(manifest)
        if problems:
            raise FormatError(_summary(problems))
        return manifest

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write `dataset.json` atomically."""
        data = self.encode()
        with atomic_write(Path(path)) as file:
            file.write(data)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Manifest:
        """Read and check `dataset.json`. Raises FormatError naming the file."""
        try:
            with open(path, "rb") as file:
                data = file.read(MAX_MANIFEST_BYTES + 1)
        except OSError as error:
            raise FormatError(f"cannot be read: {error.strerror}: is this a dataset folder?", path=path) from None
        try:
            return cls.decode(data)
        except FormatError as error:
            raise error.located(path=path) from None


def manifest_path(dataset: str | os.PathLike[str]) -> Path:
    """The manifest of a dataset given by its folder or by the manifest itself."""
    path = Path(dataset)
    return path if path.name == MANIFEST_NAME else path / MANIFEST_NAME


def _without_absent(records: dict[str, Any]) -> dict[str, Any]:
    """Leaves out what versions after 1.0 brought where a dataset has none of it, so that it is written as before."""
    return {key: value for key, value in records.items() if key not in ("priors", "further") or value is not None}


def _line(value: object) -> str:
    return json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))


def _summary(problems: Sequence[str]) -> str:
    more = [f"and {len(problems) - _SHOWN_PROBLEMS} more"] if len(problems) > _SHOWN_PROBLEMS else []
    return "; ".join([*problems[:_SHOWN_PROBLEMS], *more])


def _check_format(content: dict[str, Any]) -> None:
    """Refuse other formats and major versions before looking at anything else, since the rest may differ."""
    if content.get("format") != FORMAT:
        raise FormatError(f"format is {shown(content.get('format'))}, expected {FORMAT!r}")
    check_version(content.get("version"))


def _read(top: Fields) -> Manifest:
    images = _images(top.section("images"))
    # Where the image size itself is in doubt, boxes are not reported for lying outside it.
    size = MAX_IMAGE_SIDE if top.problems else images.size
    return Manifest(
        dataset=_dataset(top.section("dataset")),
        images=images,
        records=_records(top.section("records")),
        codebooks=_codebooks(top.section("codebooks"), size),
        teacher=_teacher(top.section("teacher")),
        method=top.mapping("method"),
        shards=tuple(map(_shard, top.sections("shards", MAX_SHARDS))),
    )


def _dataset(f: Fields) -> DatasetInfo:
    return DatasetInfo(
        name=f.text("name"),
        class_names=f.texts("class_names", 1, MAX_CLASSES),
        wnids=f.optional("wnids", lambda key: f.texts(key, 1, MAX_CLASSES)),
        source_license=f.optional("source_license", f.text),
    )


def _images(f: Fields) -> ImagesInfo:
    return ImagesInfo(
        count=f.integer("count", 0, MAX_INDEX),
        ipc=f.integer("ipc", 1, MAX_INDEX),
        size=f.integer("size", 2, MAX_IMAGE_SIDE),
        codec=cast(Codec, f.choice("codec", tuple(CODEC_EXTENSIONS))),
        quality=f.optional("quality", lambda key: f.integer(key, 1, 100)),
        mean=cast(tuple[float, float, float], f.numbers("mean", 3, -10, 10)),
        std=cast(tuple[float, float, float], f.numbers("std", 3, 1e-6, 10)),
        flip=f.flag("flip"),
    )


def _records(f: Fields) -> RecordsInfo:
    return RecordsInfo(
        coding=cast(Coding, f.choice("coding", get_args(Coding))),
        epochs=f.integer("epochs", 1, MAX_EPOCHS),
        cycle=f.integer("cycle", 2, MAX_IMAGES),
        mix_group=f.integer("mix_group", 1, MAX_IMAGES),
        block_epochs=f.integer("block_epochs", 1, MAX_EPOCHS),
        seed=f.integer("seed", 0, 2**63 - 1),
        mix=cast(MixKind, f.choice("mix", ("cutmix", "mixup", "both"))),
        temperature=f.number("temperature", 1e-3, 1e3),
        priors=f.optional("priors", lambda key: f.integer(key, 1, MAX_CLASSES - 1)),
        further=f.optional("further", lambda key: f.integer(key, 1, MAX_FURTHER)),
    )


def _codebooks(f: Fields, size: int) -> Codebooks:
    box, mix = f"a box inside {size}x{size}", _MIX_EXPECTED.format(size=size)
    views = f.optional("views", lambda key: f.entries(key, 1, MAX_VIEWS, lambda v: _is_box(v, size), box))
    mixes = f.optional("mixes", lambda key: f.entries(key, 1, MAX_MIXES, lambda v: _is_mix(v, size), mix))
    levels = f.entries("distances", 2, MAX_LEVELS, lambda v: is_number(v, 0, 1e6), "a number in 0..1e6")
    return Codebooks(
        views=None if views is None else np.array(views, np.int16).reshape(-1, 4),
        mixes=None if mixes is None else tuple(_mix(m) for m in mixes),
        distances=np.array(levels, np.float32),
    )


_MIX_EXPECTED = "a box inside {size}x{size} that leaves some of it free, or a multiple of 1/256 in (0, 1)"


def _is_box(value: Any, size: int) -> bool:
    if not isinstance(value, list) or len(value) != 4 or not all(type(v) is int for v in value):
        return False
    top, left, height, width = map(int, value)
    return min(top, left) >= 0 and 1 <= height <= size - top and 1 <= width <= size - left


def _is_mix(value: Any, size: int) -> bool:
    if isinstance(value, list):
        return _is_box(value, size) and value[2] * value[3] < size * size
    return isinstance(value, float) and 0 < value < 1 and (value * LAM_STEPS).is_integer()


def _mix(value: list[int] | float) -> MixEntry:
    return value if isinstance(value, float) else (value[0], value[1], value[2], value[3])


def _teacher(f: Fields) -> TeacherInfo:
    return TeacherInfo(
        architecture=f.text("architecture"),
        sha256=f.sha256("sha256"),
        top1=f.optional("top1", lambda key: f.number(key, 0, 1)),
    )


def _shard(f: Fields) -> ShardEntry:
    return ShardEntry(
        name=f.text("name"),
        sha256=f.sha256("sha256"),
        bytes=f.integer("bytes", 1, MAX_SHARD_BYTES),
        images=f.integer("images", 2, MAX_IMAGES),
        pairs_per_epoch=f.integer("pairs_per_epoch", 2, MAX_IMAGES),
        record_bytes=f.integer("record_bytes", 1, MAX_MEMBER_BYTES),
    )


def _cross_checks(manifest: Manifest) -> list[str]:
    """Rules that join several values; run only when each value is well-formed by itself."""
    problems = _shard_problems(manifest) + _codebook_problems(manifest)
    problems += _prior_problems(manifest) + _further_problems(manifest)
    total = sum(s.images for s in manifest.shards)
    if manifest.images.count != total:
        problems.append(f"images.count is {manifest.images.count}, the shards hold {total}")
    wnids, names = manifest.dataset.wnids, manifest.dataset.class_names
    if wnids is not None and len(wnids) != len(names):
        problems.append(f"dataset.wnids has {len(wnids)} entries, expected {len(names)} as dataset.class_names")
    if np.any(np.diff(manifest.codebooks.distances) <= 0):
        problems.append("codebooks.distances is not strictly ascending")
    return problems


def _codebook_problems(manifest: Manifest) -> list[str]:
    """Codebooks are there if and only if the coding uses them."""
    verbatim = manifest.records.coding == "verbatim"
    tables = {"views": manifest.codebooks.views, "mixes": manifest.codebooks.mixes}
    return [
        f"codebooks.{name} is {'null' if table is None else 'given'}, expected {'null' if verbatim else 'a list'} with "
        f"{manifest.records.coding} coding"
        for name, table in tables.items()
        if (table is None) != verbatim
    ]


def _prior_problems(manifest: Manifest) -> list[str]:
    """A prior names other classes than its image's, and those of a shard are bounded."""
    count, classes = manifest.records.priors, len(manifest.dataset.class_names)
    if count is None:
        return []
    if count >= classes:
        return [f"records.priors is {count}, expected less than {classes}, the number of classes"]
    return [
        f"shards[{i}].images is {shard.images}, expected at most {MAX_PRIORS // count} with records.priors {count}"
        for i, shard in enumerate(manifest.shards)
        if shard.images * count > MAX_PRIORS
    ]


def _further_problems(manifest: Manifest) -> list[str]:
    """The further classes of a pair are others than its two."""
    count, classes = manifest.records.further, len(manifest.dataset.class_names)
    if count is None or count <= classes - 2:
        return []
    return [f"records.further is {count}, expected at most {classes - 2} of {classes} classes: not a pair's own two"]


def _version_problems(stated: list[int], manifest: Manifest) -> list[str]:
    """A reader of an older major version would take the dataset for one that it can read."""
    if stated[0] >= manifest.version[0]:
        return []
    needed = version_text(manifest.version)
    return [f"version is {stated[0]}.{stated[1]}, expected {needed} or higher with records.further"]


def _shard_problems(manifest: Manifest) -> list[str]:
    problems = []
    last = -1
    verbatim = manifest.records.coding == "verbatim"
    for i, shard in enumerate(manifest.shards):
        try:
            number = shard_number(shard.name)
        except FormatError as error:
            problems.append(f"shards[{i}].name: {error.reason}")
            continue
        if number <= last:
            problems.append(f"shards[{i}].name is {shard.name}, expected a higher number than the shard before")
        if shard.pairs_per_epoch > shard.images or (shard.pairs_per_epoch < shard.images and not verbatim):
            problems.append(f"shards[{i}].pairs_per_epoch is {shard.pairs_per_epoch}, expected {shard.images}")
        if shard.images > MAX_DRAWN_IMAGES and not verbatim:
            problems.append(f"shards[{i}].images is {shard.images}, expected at most {MAX_DRAWN_IMAGES}")
        last = number
    return problems
