"""What a worker process does: one batch of pairs read from the shards."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from loaders.batch import DBRBatch, PlannedBatch
from loaders.cache import ShardCache
from loaders.delivery import PackedDistances, Parcel, Pixels, room
from loaders.order import EpochOrder, ShardPairs, stored_epoch
from nrrdd_format.dataset import DistilledDataset
from nrrdd_format.decoding import decode_image
from nrrdd_format.errors import FormatError, NrrddError, OutputError
from nrrdd_format.pairs import PairRecords
from nrrdd_format.replay import BatchPlan, plan_batch, replay_one_by_one, stack_images
from nrrdd_format.shards import ShardEntry

Assignment: TypeAlias = tuple[int, int, int, "int | None"]
"""Training epoch, the (start, stop) of a batch's places in that epoch's order, and the slot reserved for it."""
Reading: TypeAlias = "Parcel | DBRBatch | PlannedBatch | NrrddError"
"""What comes for an assignment; an opened batch where torch has put it into page-locked memory."""


class BatchReader(Dataset[Reading]):
    """Turns an assignment into a batch.

    An error is returned, not raised: torch would wrap it in the worker's traceback and lose what it says.
    Of the shards, only those of the windows that the last batch came from are open, their headers and records kept.
    """

    def __init__(
        self,
        dataset: DistilledDataset,
        cache: ShardCache | None,
        *,
        shards: ShardPairs,
        seed: int,
        replay_here: bool,
        cache_bytes: int,
        slots: Tensor | None,
    ) -> None:
        self._dataset = dataset
        self._slots = slots  # `Slots.memory`; None: batches travel in torch's way
        self._cache = cache  # where the dataset's files come from; None: they are there
        self._shards = shards
        self._seed = seed
        self._replay_here = replay_here
        self._cache_bytes = cache_bytes
        self._decoded: dict[tuple[int, int], Tensor] = {}
        self._first_pairs = shards.first_pairs
        self._epoch = -1
        self._order = EpochOrder(seed, 0, shards)
        self._windows: dict[int, NDArray[np.int64]] = {}
        self._records: dict[int, PairRecords] = {}

    def __getitem__(self, assignment: Assignment) -> Reading:
        reading = self._batch(assignment)
        if isinstance(reading, FormatError) and self._cache is not None:
            return self._discarded(reading, self._cache) or self._batch(assignment)
        return reading

    def _batch(self, assignment: Assignment) -> Parcel | NrrddError:
        epoch, start, stop, slot = assignment
        try:
            self._turn_to(epoch)
            return self._read(self._pairs(start, stop), slot)
        except NrrddError as error:
            return error

    def _discarded(self, error: FormatError, cache: ShardCache) -> FormatError | None:
        """Removes the cached shard that an error tells of, so that whoever reads it next fetches it anew.

        None: what lies in the cache is not what was read, as another process removed that before; to be read again.
        """
        names = [entry.name for entry in self._dataset.manifest.shards]
        path = Path(error.path or "")
        if path.parent != cache.folder or path.name not in names:
            return error
        self._dataset.shards.close()
        self._windows, self._records = {}, {}
        try:
            if not cache.discard_damaged(self._dataset.manifest.shards[names.index(path.name)]):
                return None
        except OutputError:  # a folder that cannot be written to: the damage is what matters
            return error
        removed = FormatError(
            f"{error.reason}; it was removed from the cache, and is fetched anew when it is wanted again"
        )
        return removed.located(path=error.path, member=error.member, offset=error.offset)

    def _turn_to(self, epoch: int) -> None:
        """Draws the epoch's order, and forgets the windows and records of the epoch before."""
        if epoch != self._epoch:
            self._order = EpochOrder(self._seed, epoch, self._shards)
            self._windows, self._records = {}, {}
            self._epoch = epoch

    def _pairs(self, start: int, stop: int) -> NDArray[np.int64]:
        """The numbers of the pairs at these places of the epoch's order."""
        wanted = self._order.windows_of(start, stop)
        if list(self._windows) != list(wanted):
            self._open(wanted)
        first = self._order.start(wanted[0])
        return np.concatenate(list(self._windows.values()))[start - first : stop - first]

    def _open(self, windows: range) -> None:
        """Turns to these windows: fetches their shards, lets go what only others need, and fetches ahead."""
        shards = {shard for window in windows for shard in self._order.windows[window]}
        self._dataset.shards.close_all_but(shards)
        self._records = {shard: records for shard, records in self._records.items() if shard in shards}
        self._windows = {}  # so that after an error the next batch comes here again
        if self._cache is not None:
            self._cache.hold(self._entries(self._order.windows[windows.start : windows.stop]))
            self._cache.prefetch(self._entries(self._order.windows[windows.stop : windows.stop + 1]))
        self._windows = {window: self._order.pairs(window) for window in windows}

    def _entries(self, windows: Iterable[list[int]]) -> list[ShardEntry]:
        return [self._dataset.manifest.shards[shard] for window in windows for shard in window]

    def _read(self, pairs: NDArray[np.int64], slot: int | None) -> Parcel:
        """Reads the pairs with these numbers, each of their images once."""
        parts = self._parts(pairs)
        plan = plan_batch(parts)
        labels = [self._dataset.shards[shard].labels for shard, _ in parts]
        records = [part for _, part in parts]
        return Parcel(
            plan=plan,
            finished=self._replay_here,
            label_org=np.concatenate([of[part.index_org] for of, part in zip(labels, records, strict=True)]),
            label_aug=np.concatenate([of[part.index_aug] for of, part in zip(labels, records, strict=True)]),
            distance_org=np.concatenate([part.distance_org for part in records]),
            distance_aug=np.concatenate([part.distance_aug for part in records]),
            prior_org=self._priors((shard, part.index_org) for shard, part in parts),
            prior_aug=self._priors((shard, part.index_aug) for shard, part in parts),
            further=_further(records),
            images=self._images(plan, slot),
        )

    def _priors(self, images: Iterable[tuple[int, NDArray[np.int64]]]) -> PackedDistances | None:
        """The priors of images, given as runs in one shard each; None where the dataset stores none."""
        table = self._dataset.manifest.codebooks.distances
        found = [(self._dataset.shards[shard].priors, index) for shard, index in images]
        parts = [priors.take(index) for priors, index in found if priors is not None]
        if not parts:
            return None
        return (
            np.concatenate([part.classes for part in parts]),
            np.concatenate([part.distances(table) for part in parts]),
        )

    def _images(self, plan: BatchPlan, slot: int | None) -> Tensor | Pixels:
        """The plan's images as they leave this process, replayed or not: in the slot if there is one."""
        info = self._dataset.manifest.images
        here = self._replay_here
        count, dtype = (len(plan.lam), torch.float32) if here else (len(plan.image), torch.uint8)
        pixels = Pixels(count=count, size=info.size, dtype=dtype)
        in_slot = None if self._slots is None or slot is None else room(self._slots, slot, pixels)
        out = pixels.new() if in_slot is None else in_slot
        wanted = zip(plan.shard.tolist(), plan.image.tolist(), strict=True)
        images = (self._image(shard, image) for shard, image in wanted)
        if here:
            replay_one_by_one(plan, images, mean=info.mean, std=info.std, out=out)
        else:
            stack_images(images, out=out)
        return out if in_slot is None else pixels

    def _parts(self, pairs: NDArray[np.int64]) -> list[tuple[int, PairRecords]]:
        """The records of the pairs, in the order given, as runs of pairs of one shard."""
        shards = np.searchsorted(self._first_pairs, pairs, side="right") - 1
        places = pairs - self._first_pairs[shards]
        runs = np.split(np.arange(len(pairs)), np.flatnonzero(np.diff(shards)) + 1)
        return [(int(shards[run[0]]), self._records_of(int(shards[run[0]])).take(places[run])) for run in runs]

    def _records_of(self, shard: int) -> PairRecords:
        """The records of a shard for the current epoch, decoded once: a batch holds cycles of many shards."""
        if shard not in self._records:
            reader = self._dataset.shards[shard]
            stored = stored_epoch(self._seed, self._epoch, self._dataset.manifest.records.epochs)
            self._records[shard] = reader.records(stored)
        return self._records[shard]

    def _image(self, shard: int, image: int) -> Tensor:
        """One decoded image, (3, S, S) uint8; the first that fit into the cache are kept."""
        if (shard, image) not in self._decoded:
            decoded = self._decode(shard, image)
            if (len(self._decoded) + 1) * decoded.nbytes > self._cache_bytes:
                return decoded
            self._decoded[shard, image] = decoded
        return self._decoded[shard, image]

    def _decode(self, shard: int, image: int) -> Tensor:
        reader = self._dataset.shards[shard]
        try:
            return decode_image(reader.image_bytes(image), self._dataset.manifest.images.size)
        except FormatError as error:
            raise error.located(path=reader.path, member=reader.header.members[image].name) from error


def _further(records: Sequence[PairRecords]) -> PackedDistances | None:
    """The further classes of all pairs; None where the dataset stores none."""
    classes = [part.further_classes for part in records if part.further_classes is not None]
    distances = [part.further_distances for part in records if part.further_distances is not None]
    return (np.concatenate(classes), np.concatenate(distances)) if classes else None
