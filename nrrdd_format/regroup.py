"""Splitting a dataset into parts at shard boundaries, and merging parts: shards are copied byte for byte.

A shard is complete in itself, derived records included, as long as it keeps its number. So parts keep their shards'
names, and merging the parts of a dataset gives the same files and the same dataset id.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from enum import Enum
from itertools import pairwise, permutations
from pathlib import Path
from typing import Any

from nrrdd_format.copies import copy_shard, new_folder
from nrrdd_format.dataset import open_shard
from nrrdd_format.errors import ConfigError, FormatError, counted, shown
from nrrdd_format.manifest import MANIFEST_NAME, Manifest, manifest_path
from nrrdd_format.rewriting import load_to_rewrite
from nrrdd_format.shards import ShardEntry

_ROWS = (list, tuple)
_Missing = Enum("_Missing", ["NOWHERE"])
_Located = tuple[Path, ShardEntry]
"""A shard's entry and the folder its file lies in."""


def split_dataset(path: str | os.PathLike[str], outs: Sequence[Path]) -> list[Manifest]:
    """Split a dataset into as many parts as `outs` names new folders; neighbouring shards stay together.

    The parts' numbers of shards differ by one at most. No folder appears before all are whole. Returns their manifests.

    Raises:
        ConfigError: fewer than two parts, or more than the dataset has shards.
        FormatError: the dataset is damaged, or holds what this version does not know.
        OutputError: a folder exists already or cannot be written.
    """
    file = manifest_path(path)
    manifest = load_to_rewrite(file)
    count = len(manifest.shards)
    if len({out.resolve() for out in outs}) != len(outs):
        raise ConfigError("--out: a folder is named twice")
    for out, other in permutations(outs, 2):
        if out.resolve() in other.resolve().parents:
            raise ConfigError(f"--out: {other} lies in {out}, expected folders beside each other")
    if len(outs) < 2:
        raise ConfigError("--out: found one folder, expected two or more: one for each part")
    if count < 2:
        raise ConfigError(
            f"{file.parent}: has {counted(count, 'shard')}, and shards stay whole, so it cannot be split: build it "
            "with a smaller --shard-images"
        )
    if len(outs) > count:
        raise ConfigError(f"--out: {len(outs)} folders for {count} shards, expected 2..{count}: shards stay whole")
    bounds = [count * part // len(outs) for part in range(len(outs) + 1)]
    parts = [manifest.shards[start:stop] for start, stop in pairwise(bounds)]
    with ExitStack() as stack:
        folders = [stack.enter_context(new_folder(out)) for out in outs]
        return [
            _write(manifest, [(file.parent, entry) for entry in part], folder)
            for part, folder in zip(parts, folders, strict=True)
        ]


def merge_datasets(parts: Sequence[str | os.PathLike[str]], out: Path) -> Manifest:
    """Merge datasets that were built alike, such as the parts of a split, into the new folder `out`.

    Returns the manifest of the whole, its shards in the order of their numbers.

    Raises:
        ConfigError: fewer than two parts; manifests that differ in more than their shards; a shard or an image that
            two parts hold.
        FormatError: a part is damaged, or holds what this version does not know.
        OutputError: `out` exists already or cannot be written.
    """
    if len(parts) < 2:
        raise ConfigError("merge: found one dataset, expected two or more")
    files = [manifest_path(part) for part in parts]
    opened = [(file.parent, load_to_rewrite(file)) for file in files]
    for part in opened[1:]:
        _check_alike(opened[0], part)
    shards = [(folder, entry) for folder, manifest in opened for entry in manifest.shards]
    _check_distinct((entry.name, folder) for folder, entry in shards)
    _check_distinct((f"image {number}", folder) for folder, part in opened for number in _image_numbers(folder, part))
    with new_folder(out) as folder:
        return _write(opened[0][1], sorted(shards, key=lambda shard: shard[1].name), folder)


def _write(manifest: Manifest, shards: Sequence[_Located], folder: Path) -> Manifest:
    """Copies these shards into `folder` and writes the manifest that lists them."""
    for home, entry in shards:
        try:
            copy_shard(home / entry.name, entry, folder / entry.name)
        except FormatError as error:
            raise FormatError(f"{error.reason}; see `nrrdd repair`", path=error.path) from None
    entries = tuple(entry for _, entry in shards)
    images = replace(manifest.images, count=sum(entry.images for entry in entries))
    listed = replace(manifest, images=images, shards=entries)
    listed.save(folder / MANIFEST_NAME)
    return listed


def _image_numbers(folder: Path, manifest: Manifest) -> Iterator[int]:
    for index in range(len(manifest.shards)):
        with open_shard(folder, manifest, index) as reader:
            yield from reader.indices.tolist()


def _check_alike(first: tuple[Path, Manifest], other: tuple[Path, Manifest]) -> None:
    difference = _first_difference(_common(first[1]), _common(other[1]), "")
    if difference is not None:
        key, expected, found = difference
        raise ConfigError(
            f"{other[0]}: {key} is {_short(found)}, expected {_short(expected)} as in {first[0]}: parts of one dataset "
            "differ in their shards only"
        )


def _common(manifest: Manifest) -> dict[str, Any]:
    """What all parts of a dataset have in common."""
    return replace(manifest, images=replace(manifest.images, count=0), shards=()).to_json()


def _first_difference(expected: Any, found: Any, key: str) -> tuple[str, Any, Any] | None:
    """JSON path of the first value that differs, and both values; None: there is none."""
    if expected == found:
        return None
    if isinstance(expected, dict) and isinstance(found, dict):
        both = {**expected, **found}
        below = [
            (f"{key}.{name}".lstrip("."), expected.get(name, _Missing.NOWHERE), found.get(name, _Missing.NOWHERE))
            for name in both
        ]
    elif isinstance(expected, _ROWS) and isinstance(found, _ROWS) and len(expected) == len(found):
        below = [(f"{key}[{i}]", *pair) for i, pair in enumerate(zip(expected, found, strict=True))]
    else:
        return key, expected, found
    return next(difference for name, a, b in below if (difference := _first_difference(a, b, name)))


def _check_distinct(things: Iterable[tuple[str, Path]]) -> None:
    """Refuses a thing that two folders hold."""
    homes: dict[str, Path] = {}
    for name, folder in things:
        if name in homes:
            raise ConfigError(
                f"{folder}: {name} is in {homes[name]} as well, expected in one part only; leave one of the two out"
            )
        homes[name] = folder


def _short(value: object) -> str:
    if value is _Missing.NOWHERE:
        return "not there"
    if isinstance(value, _ROWS) and len(value) > 4:
        return f"a list of {len(value)}"
    return shown(value)
