"""Resharding: neighbouring shards joined into larger ones, with the same images and the same pairs.

Images and pairs keep their order, so an image's index within its shard grows by the images that came before, and
nothing else of a record changes. Shapes: P pairs an epoch of a shard.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from nrrdd_format.codebooks import Codebooks
from nrrdd_format.copies import new_folder
from nrrdd_format.dataset import open_shard
from nrrdd_format.errors import ConfigError, counted
from nrrdd_format.limits import MAX_DRAWN_IMAGES, MAX_IMAGES
from nrrdd_format.manifest import CODEC_EXTENSIONS, MANIFEST_NAME, Manifest, manifest_path
from nrrdd_format.pairs import PairRecords, cycle_bounds
from nrrdd_format.priors import Priors
from nrrdd_format.records import encode_shard_records
from nrrdd_format.rewriting import load_to_rewrite
from nrrdd_format.shards import ShardEntry, ShardReader, shard_number, write_shard

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Reshard:
    """The manifests before and after."""

    before: Manifest
    after: Manifest


def reshard_dataset(path: str | os.PathLike[str], images: int, out: Path) -> Reshard:
    """Write the dataset into the new folder `out`, neighbouring shards joined to about `images` images each.

    A joined shard takes the number of its first, so parts of a dataset can still be merged afterwards. Derived records
    become explicit ones: they depend on the shard's number and size. Where the shards' sizes are not multiples of cycle
    and mix_group, explicit coding cannot express the joined pairs, and all records are stored verbatim.

    Raises:
        ConfigError: there is one shard only, no two would be joined, or a shard would be larger than the format allows.
        FormatError: the dataset is damaged, or holds what this version does not know.
        OutputError: `out` exists already or cannot be written.
    """
    file = manifest_path(path)
    before = load_to_rewrite(file)
    if not 2 <= images <= MAX_IMAGES:
        raise ConfigError(f"--images: found {images}, expected 2..{MAX_IMAGES}")
    sizes = [entry.images for entry in before.shards]
    if len(sizes) < 2:
        raise ConfigError(
            f"{file.parent}: has {counted(len(sizes), 'shard')}, expected two or more to join; nothing to do"
        )
    groups = join_neighbours(sizes, images)
    if len(groups) == len(sizes):
        least = min(a + b for a, b in pairwise(sizes))
        raise ConfigError(f"--images: {images} joins no two shards, which hold up to {max(sizes)}; ask for {least}")
    recoded = _recoded(before, [before.shards[group.start : group.stop] for group in groups])
    with new_folder(out) as folder:
        entries = tuple(_join(file.parent, before, recoded, group, folder) for group in groups)
        after = replace(recoded, shards=entries)
        after.save(folder / MANIFEST_NAME)
    return Reshard(before=before, after=after)


def join_neighbours(sizes: Sequence[int], target: int) -> list[range]:
    """Ranges of consecutive shards, each as near to `target` images as whole shards allow; the last may be smaller."""
    groups: list[range] = []
    start, total = 0, 0
    for index, size in enumerate(sizes):
        if index > start and abs(total + size - target) > abs(total - target):
            groups.append(range(start, index))
            start, total = index, 0
        total += size
    return [*groups, range(start, len(sizes))] if sizes else groups


def _recoded(manifest: Manifest, groups: Sequence[Sequence[ShardEntry]]) -> Manifest:
    """The manifest with the coding that can express the joined pairs, and blocks of about as many pairs as before.

    A reader decompresses a whole block for the pairs of one epoch.
    """
    pairs = [[entry.pairs_per_epoch for entry in group] for group in groups]
    growth = max(map(sum, pairs)) / max(map(max, pairs))
    records = replace(manifest.records, block_epochs=max(1, round(manifest.records.block_epochs / growth)))
    if records.coding != "verbatim" and all(_expressible(p, records.cycle, records.mix_group) for p in pairs):
        return replace(manifest, records=replace(records, coding="explicit"))
    verbatim = replace(
        records,
        coding="verbatim",
        cycle=_closed_cycle(pairs, records.cycle),
        mix_group=math.gcd(records.mix_group, *(count for p in pairs for count in p[:-1])),
    )
    codebooks = Codebooks(views=None, mixes=None, distances=manifest.codebooks.distances)
    return replace(manifest, records=verbatim, codebooks=codebooks)


def _expressible(pairs: Sequence[int], cycle: int, mix_group: int) -> bool:
    """Whether the pairs of shards with P pairs each, one after the other, have the cycles and groups of one shard."""
    return (
        sum(pairs) <= MAX_DRAWN_IMAGES
        and np.array_equal(cycle_bounds(sum(pairs), cycle), _joined_bounds(pairs, cycle))
        and all(count % mix_group == 0 for count in pairs[:-1])
    )


def _joined_bounds(pairs: Sequence[int], cycle: int) -> NDArray[np.int64]:
    """Bounds of the cycles of several shards, their positions numbered through."""
    starts = np.cumsum([0, *pairs])
    parts = [start + cycle_bounds(count, cycle)[:-1] for start, count in zip(starts, pairs, strict=False)]
    return np.concatenate([*parts, starts[-1:]])


def _closed_cycle(pairs: Sequence[Sequence[int]], cycle: int) -> int:
    """The least g whose cycles cut no cycle of the joined shards in two."""
    joined = [_joined_bounds(p, cycle) for p in pairs]
    candidates = max(joined, key=lambda bounds: int(bounds[-1]))[1:].tolist()
    return int(next(g for g in candidates if all(np.isin(cycle_bounds(b[-1], g), b).all() for b in joined)))


def _join(source: Path, before: Manifest, after: Manifest, group: range, folder: Path) -> ShardEntry:
    """Writes one shard that holds the images and pairs of the shards in `group`."""
    readers = [_closed(open_shard(source, before, index)) for index in group]
    entries = [before.shards[index] for index in group]
    images = [image for reader in readers for image in _closing(reader, reader.encoded_images)]
    layout = after.layout_for(len(images), sum(entry.pairs_per_epoch for entry in entries))
    shard, epochs = shard_number(entries[0].name), before.records.epochs
    return write_shard(
        folder / entries[0].name,
        shard=shard,
        images=images,
        extension=CODEC_EXTENSIONS[before.images.codec],
        blocks=encode_shard_records(_joined_epochs(readers), layout, shard),
        epochs=epochs,
        layout=layout,
        priors=_joined_priors(readers),
    )


def _closed(reader: ShardReader) -> ShardReader:
    """The reader with its file closed until it is read: a group may have more shards than a process may open files."""
    reader.close()
    return reader


def _closing(reader: ShardReader, read: Callable[[], Iterable[T]]) -> Iterator[T]:
    """What is read, the file closed after each."""
    for one in read():
        reader.close()
        yield one


def _joined_priors(readers: Sequence[ShardReader]) -> Priors | None:
    parts = []
    for reader in readers:
        parts.append(reader.priors)
        reader.close()
    return None if None in parts else Priors.concatenate([part for part in parts if part is not None])


def _joined_epochs(readers: Sequence[ShardReader]) -> Iterator[PairRecords]:
    shifts = np.cumsum([0, *(reader.images for reader in readers)])
    for parts in zip(*(_closing(reader, reader.all_records) for reader in readers), strict=True):
        yield PairRecords.concatenate([_shifted(records, shift) for records, shift in zip(parts, shifts, strict=False)])


def _shifted(records: PairRecords, shift: int) -> PairRecords:
    return replace(records, index_org=records.index_org + shift, index_aug=records.index_aug + shift)
