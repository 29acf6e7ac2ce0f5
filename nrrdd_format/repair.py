"""Repair: fetch damaged shards from another copy of the dataset, or list the dataset anew without them.

No file is ever lost: a damaged one is set aside under a name that ends in `.damaged`, a dataset.json that is written
anew is kept under one that ends in `.before`. A shard is bad if verification
finds any problem in it, so a repaired dataset verifies.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from nrrdd_format.copies import verified_chunks
from nrrdd_format.dataset import open_shard
from nrrdd_format.errors import ConfigError, FormatError, OutputError
from nrrdd_format.files import atomic_write
from nrrdd_format.limits import MAX_MANIFEST_BYTES
from nrrdd_format.manifest import Manifest, manifest_path
from nrrdd_format.rewriting import load_to_rewrite
from nrrdd_format.verify import Problem, shard_problems

KEPT = "before"
"""What the name of a manifest that was replaced by a shorter one ends in."""

THINNED = 0.5
"""A class left with less than this share of its images is named."""


@dataclass(frozen=True, kw_only=True)
class BadShard:
    """A shard with problems. `fault_of_copy`: why the other copy cannot replace it; None: it can, or there is none."""

    index: int  # in the manifest
    name: str
    images: int
    pairs: int  # of all epochs
    problems: tuple[Problem, ...]
    fault_of_copy: str | None = None


@dataclass(frozen=True, kw_only=True)
class ThinnedClass:
    """A class of which only a small part is left. `before` is an estimate where a lost shard's classes are unknown."""

    label: int
    name: str
    images: int
    before: float


@dataclass(frozen=True, kw_only=True)
class Repair:
    """What is wrong with a dataset and what becomes of it."""

    before: Manifest
    """What the dataset was meant to be."""
    manifest: Manifest
    """As it is now; after a dry run, as it would be."""
    manifest_fault: str | None
    """Why the manifest was taken from the other copy; None: it was sound."""
    bad: tuple[BadShard, ...]
    fetched: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()
    set_aside: tuple[str, ...] = ()
    """The damaged files' names now."""
    old_manifest: str | None = None
    """Name of the copy of the manifest that listed the dropped shards."""
    thinned: tuple[ThinnedClass, ...] = ()

    @property
    def left(self) -> tuple[BadShard, ...]:
        """The shards that stay bad."""
        return tuple(one for one in self.bad if one.name not in self.fetched + self.dropped)


def repair_dataset(
    path: str | os.PathLike[str], *, copy: str | os.PathLike[str] | None = None, dry_run: bool = False
) -> Repair:
    """Find the bad shards of a dataset and replace them from `copy`, or without one drop them from the manifest.

    With `copy` nothing is dropped: a shard that is bad there too is left as it is, and so is listed in `Repair.left`. A
    manifest that cannot be read is taken from the copy. A dry run writes nothing.

    Raises:
        FormatError: the manifest is damaged and there is no sound copy of it; or, without `copy`, every shard is bad or
            the manifest holds what this version does not know.
        ConfigError: `copy` is the dataset itself, or a shard may not be read by this user.
        OutputError: a file cannot be written or renamed.
    """
    file = manifest_path(path)
    other = None if copy is None else manifest_path(copy)
    _check_folders(file.parent, None if other is None else other.parent)
    manifest, fault = _load_manifest(file, other)
    bad = _find_bad(file.parent, manifest, None if other is None else other.parent)
    if fault is not None:
        _check_same_dataset(file.parent, manifest, bad)
    found = Repair(before=manifest, manifest=manifest, manifest_fault=fault, bad=bad)
    if other is None:
        return _drop(file, found, dry_run)
    return _fetch(file, other, found, dry_run)


def _check_folders(folder: Path, other: Path | None) -> None:
    if not os.path.isdir(folder):  # which, unlike Path's own, takes any name
        raise ConfigError(f"{folder}: no such folder, expected a dataset's")
    if other is None:
        return
    if not os.path.isdir(other):
        raise ConfigError(f"--from: {other} is no folder, expected another copy of the dataset")
    if other.resolve() == folder.resolve():
        raise ConfigError(f"--from: {other} is the dataset itself, expected another copy of it")


def _load_manifest(file: Path, other: Path | None) -> tuple[Manifest, str | None]:
    """The manifest and, if it is the other copy's, what is wrong with the dataset's own."""
    try:
        return Manifest.load(file), None
    except FormatError as error:
        if other is None:
            raise FormatError(
                f"{error.reason}; without its manifest a dataset cannot be repaired: name another copy with --from",
                path=error.path,
            ) from None
        return Manifest.load(other), str(error)


def _find_bad(folder: Path, manifest: Manifest, other: Path | None) -> tuple[BadShard, ...]:
    owners: dict[int, str] = {}
    bad = []
    for index, entry in enumerate(manifest.shards):
        path = folder / entry.name
        if path.exists() and not os.access(path, os.R_OK):
            raise ConfigError(f"{path}: may not be read by this user, so it cannot be checked; make it readable")
        problems = _problems(folder, manifest, index, owners)
        if not problems:
            continue
        in_copy = [] if other is None else _problems(other, manifest, index, owners)
        bad.append(
            BadShard(
                index=index,
                name=entry.name,
                images=entry.images,
                pairs=entry.pairs_per_epoch * manifest.records.epochs,
                problems=tuple(problems),
                fault_of_copy=str(in_copy[0]) if in_copy else None,
            )
        )
    return tuple(bad)


def _problems(folder: Path, manifest: Manifest, index: int, owners: dict[int, str]) -> list[Problem]:
    """A shard's problems; the images of a bad shard do not count as taken."""
    problems = list(shard_problems(folder, manifest, index, owners))
    if problems:
        name = manifest.shards[index].name
        for number in [number for number, owner in owners.items() if owner == name]:
            del owners[number]
    return problems


def _check_same_dataset(folder: Path, manifest: Manifest, bad: Sequence[BadShard]) -> None:
    """Refuses a manifest from elsewhere if none of the shards here is one that it lists."""
    here = [entry.name for entry in manifest.shards if (folder / entry.name).exists()]
    if here and {one.name for one in bad}.issuperset(here):
        raise FormatError(
            "no shard here is as the manifest of --from says: is that a copy of this dataset?", path=folder
        )


def _drop(file: Path, found: Repair, dry_run: bool) -> Repair:
    """Lists the dataset anew without its bad shards and sets their files aside."""
    if not found.bad:
        return found
    load_to_rewrite(file)
    names = tuple(one.name for one in found.bad)
    kept = tuple(entry for entry in found.manifest.shards if entry.name not in names)
    if not kept:
        raise FormatError("every shard is bad, nothing would be left: name another copy with --from", path=file.parent)
    images = replace(found.manifest.images, count=sum(entry.images for entry in kept))
    thinned = _thinned_classes(file.parent, found.manifest, found.bad)
    listed = replace(found.manifest, images=images, shards=kept)
    aside, old = [], None
    if not dry_run:
        old = _keep_copy(file)
        listed.save(file)  # first, so that the manifest never lists a file that was set aside
        aside = [_set_aside(file.parent / name) for name in names if (file.parent / name).exists()]
    return replace(found, manifest=listed, dropped=names, set_aside=tuple(aside), old_manifest=old, thinned=thinned)


def _fetch(file: Path, other: Path, found: Repair, dry_run: bool) -> Repair:
    """Replaces the manifest, if it is damaged, and the bad shards that are sound in the other copy."""
    wanted = [one for one in found.bad if one.fault_of_copy is None]
    aside: list[str] = []
    if not dry_run:
        if found.manifest_fault is not None:
            aside += _replace_manifest(file, other)
        for one in wanted:
            aside += _replace_shard(file.parent, other.parent, found.manifest, one.index)
    return replace(found, fetched=tuple(one.name for one in wanted), set_aside=tuple(aside))


def _replace_manifest(file: Path, other: Path) -> list[str]:
    with open(other, "rb") as source:
        data = source.read(MAX_MANIFEST_BYTES)
    with atomic_write(file) as target:
        target.write(data)
        return _set_aside_if_there(file)


def _replace_shard(folder: Path, other: Path, manifest: Manifest, index: int) -> list[str]:
    """Copies a shard; only when the copy is known to be sound does the damaged file give up its name."""
    entry = manifest.shards[index]
    with atomic_write(folder / entry.name) as target:
        for chunk in verified_chunks(other / entry.name, entry):
            target.write(chunk)
        return _set_aside_if_there(folder / entry.name)


def _set_aside_if_there(path: Path) -> list[str]:
    return [_set_aside(path)] if path.exists() else []


def _set_aside(path: Path) -> str:
    """Renames a damaged file and returns its new name, which no file had."""
    free = _free_name(path, "damaged")
    try:
        path.rename(path.with_name(free))
    except OSError as error:
        raise OutputError(f"{path}: cannot be renamed to {free} ({error.strerror}); make it writable") from error
    return free


def _keep_copy(path: Path) -> str:
    """Copies a file that will be written anew and returns the copy's name, which no file had."""
    name = _free_name(path, KEPT)
    with atomic_write(path.with_name(name)) as file:
        file.write(path.read_bytes())
    return name


def earlier_manifests(file: Path) -> list[Manifest]:
    """Those that repairs have kept beside a manifest, so far as they can be read."""
    found = []
    for path in sorted(file.parent.glob(f"{file.name}.{KEPT}*")):
        with suppress(FormatError):
            found.append(Manifest.load(path))
    return found


def _free_name(path: Path, ending: str) -> str:
    names = [f"{path.name}.{ending}", *(f"{path.name}.{ending}-{number}" for number in range(2, 1000))]
    free = next((name for name in names if not path.with_name(name).exists()), None)
    if free is None:
        raise OutputError(f"{path}: cannot be set aside: {names[-1]} and all before it exist; remove old ones")
    return free


def _thinned_classes(folder: Path, manifest: Manifest, bad: Sequence[BadShard]) -> tuple[ThinnedClass, ...]:
    """The classes that lose most of their images with the bad shards.

    Where a bad shard's header cannot be read, its images count for all classes alike, as shards are built.
    """
    lost = {one.index for one in bad}
    names = manifest.dataset.class_names
    after, before = np.zeros(len(names)), np.zeros(len(names))
    for index in range(len(manifest.shards)):
        counts = _class_counts(folder, manifest, index)
        before += counts
        if index not in lost:
            after += counts
    few = np.flatnonzero(after < THINNED * before).tolist()
    return tuple(ThinnedClass(label=k, name=names[k], images=int(after[k]), before=float(before[k])) for k in few)


def _class_counts(folder: Path, manifest: Manifest, index: int) -> NDArray[np.float64]:
    classes = len(manifest.dataset.class_names)
    try:
        with open_shard(folder, manifest, index) as reader:
            return np.bincount(reader.labels, minlength=classes).astype(np.float64)
    except FormatError:
        return np.full(classes, manifest.shards[index].images / classes)
