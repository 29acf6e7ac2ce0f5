"""DBRLoader: batches of mixed pairs of an nrrdd dataset, for a plain PyTorch training loop.

torch's DataLoader supplies processes, prefetching, the batches' order and the detection of dead workers. The
sequence of pairs itself is a function of (seed, epoch) alone (`loaders.order`), so the state of a loader is
two numbers, the epoch and how many of its pairs were given, and what they hold for.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch.utils.data import DataLoader, Sampler

from loaders.bad_shards import find_bad_shards
from loaders.batch import DBRBatch, PlannedBatch
from loaders.delivery import Parcel, Slots, keep_freed_memory
from loaders.opening import open_place, whole
from loaders.order import EpochSteps, ShardPairs, epoch_steps, rank_slice
from loaders.ranks import Agreement, distributed_ranks
from loaders.reading import Assignment, BatchReader, Reading
from nrrdd_format.errors import ConfigError, NrrddError, counted, require
from nrrdd_format.manifest import TeacherInfo

STATE_FORMAT = "nrrdd-loader"
STATE_VERSION = 2
PREFETCHED = 2
"""Batches that each worker prepares ahead."""
_DEATH = "DataLoader worker (pid"  # how torch begins to say that one has ended


@dataclass(frozen=True, kw_only=True)
class TrainingInfo:
    """What a training script needs to know about the dataset."""

    class_names: tuple[str, ...]
    """Label k is class_names[k]."""
    size: int
    """S, the images' side in pixels."""
    mean: tuple[float, float, float]
    """Of a pixel's value / 255: how to normalise the images that the student is tested on."""
    std: tuple[float, float, float]
    temperature: float
    """Softmax temperature of the teacher's distances: `DBRLoss(temperature=...)`."""
    teacher: TeacherInfo


@dataclass(kw_only=True)
class _Position:
    """A place that a loader was sent to, and how far iterations from there have come."""

    epoch: int
    start: int = 0
    """Pairs of the epoch that were given before: every iteration of it begins here."""
    given: int = 0
    """Pairs of the epoch that all ranks together have been given."""
    all_given: bool = False
    """A loop may stop at the last batch without asking for another."""


class DBRLoader:
    """Iterates over a dataset's pairs, an epoch at a time.

    Every pair comes once an epoch. Training epoch e replays stored epoch e; past the last one the stored
    epochs are taken again in a new order, with one warning. With R processes each step takes R * batch_size
    pairs, of which every process gets its part; all processes get equally many batches. A tail is split
    evenly, so the last batch may be smaller, or larger by one pair where the tail has less than a pair for
    each process. One iteration runs at a time: the first batch of another ends those begun before, which raise
    ConfigError when they are asked for more.

    The shards of an epoch are taken in a new order, in windows of about 16,384 pairs (4 to 64 shards), and mixed
    within a window (`loaders.order`).

    Memory, beside what torch takes in every process, depends on none of the dataset's size: in each reading process
    (the workers, or this one) `cache_bytes`; for the pairs of two windows 64 bytes each (and 12 for each further
    class), and for their images 500 bytes each (and 9 for each class of a prior); and the batch that is being read,
    3 * S^2 bytes for each of its images and, with device "cpu", 12 * S^2 for each pair. Two finished batches a worker
    wait for the training loop, in (shared) memory that is used again and again: with W workers 2 * W + 2 batches in
    all, and more only if the loop keeps more. At most two windows of shards are open.

    Where torch.distributed is initialised, the ranks agree on every batch before they hand it out (one number
    goes round on the CPU), so a rank that cannot go on raises on all of them. All have to iterate alike.

    Args:
        path: the dataset's folder or its `dataset.json`, or a URL of either: http, https, s3, gs, hf (each an extra
            of the package) or file.
        batch_size: pairs of this process in a batch.
        seed: of the order of pairs; the same on all ranks.
        num_workers: processes that read, decode and (device "cpu") replay; 0: all in this process.
        device: where images are cropped, mixed and normalised, and where the batches lie.
        drop_last: leave out the pairs that do not fill a step.
        pin_memory: put what the workers deliver into page-locked memory, for faster copies to a GPU.
        cache_bytes: memory that each reading process may fill with decoded images; others are decoded anew each epoch.
        on_bad_shard: "raise": an error while iterating. "skip": all shards are read (fetched, if remote) and
            compared with the manifest here, and those that are bad on any rank are left out on all, with one warning;
            a shard that turns bad later raises.
        cache_dir: folder for the shards of a URL, which any number of processes may share; by default `nrrdd` in the
            user's cache folder.
        cache_limit_bytes: the most that all shards in cache_dir may take; those read longest ago are removed.
        timeout: seconds without a byte from a URL after which an attempt has failed.
        attempts: how often to try to fetch a file of a URL, after waits from 0.5 to 30 seconds.
        storage_options: arguments of the fsspec filesystem that reads a URL, such as credentials.
        rank, world_size: this process among those that train together; by default as `torch.distributed`
            says, or alone where that is not initialised. With these given the ranks do not agree on batches.

    Raises:
        ConfigError: an argument that cannot work, alone or with this dataset.
        FormatError: the dataset is missing or damaged (also while iterating).
        OutputError: shards of a URL cannot be kept in cache_dir (also while iterating).
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        batch_size: int,
        *,
        seed: int = 0,
        num_workers: int = 0,
        device: str | torch.device = "cpu",
        drop_last: bool = False,
        pin_memory: bool = False,
        cache_bytes: int = 2**28,
        on_bad_shard: Literal["raise", "skip"] = "raise",
        cache_dir: str | os.PathLike[str] | None = None,
        cache_limit_bytes: int | None = None,
        timeout: float = 30.0,
        attempts: int = 5,
        storage_options: Mapping[str, Any] | None = None,
        rank: int | None = None,
        world_size: int | None = None,
    ) -> None:
        batch_size = whole("batch_size", batch_size, 1)
        seed = whole("seed", seed, 0)
        num_workers = whole("num_workers", num_workers, 0)
        cache_bytes = whole("cache_bytes", cache_bytes, 0)
        require(on_bad_shard in ("raise", "skip"), f"on_bad_shard: found {on_bad_shard!r}, expected 'raise' or 'skip'")
        opened = open_place(
            path,
            cache_dir=cache_dir,
            cache_limit_bytes=cache_limit_bytes,
            timeout=timeout,
            attempts=attempts,
            storage_options=storage_options or {},
        )
        self._dataset, self._cache = opened.dataset, opened.cache
        self._manifest = self._dataset.manifest
        self._dataset_id = self._manifest.dataset_id
        self._shards = ShardPairs(
            pairs_per_shard=tuple(entry.pairs_per_epoch for entry in self._manifest.shards),
            cycle=self._manifest.records.cycle,
        )
        require(
            self._shards.total > 0,
            f"{opened.shown}: the dataset lists no shards, expected at least one; finish its build",
        )
        self._ranks = _given_ranks(rank, world_size)
        self._agreement = Agreement() if self._ranks is None else None
        if self._cache is not None and self._cache.limit_bytes is not None:
            self._require_room(self._cache.limit_bytes, batch_size, num_workers)
        if on_bad_shard == "skip":
            self._skip_bad_shards()
        self._pairs = self._shards.total
        self._batch_size = batch_size
        self._seed = seed
        self._num_workers = num_workers
        self._device = _usable_device(device)
        self._drop_last = drop_last
        self._pin_memory = pin_memory
        self._cache_bytes = cache_bytes
        self._position = _Position(epoch=0)
        self._iterations = 0  # begun so far: the last one alone may take batches from the workers
        self._warned = False
        self._torch_loader: DataLoader[Reading] | None = None  # the first iteration makes it: it takes shared memory
        require(
            len(self) > 0,
            f"batch_size: {batch_size} pairs for each process, but the dataset has {self._pairs} pairs, so "
            f"drop_last leaves no batch; choose a smaller batch_size",
        )

    def __len__(self) -> int:
        """Batches of a whole epoch."""
        return len(self._steps(0))

    def __iter__(self) -> Iterator[DBRBatch]:
        """The batches of the current epoch (after `load_state_dict`: its rest); then the epoch advances.

        Begun anew, whether a loop was left or an error ended it, the same epoch starts where it started before.
        """
        if self._position.all_given:
            self._turn_to(self.epoch + 1)
        position = self._position
        position.given = position.start
        self._iterations = iteration = self._iterations + 1
        self._warn_when_repeating(position.epoch)
        self._compare_ranks()
        steps = self._steps(position.start)
        readings = self._readings(self._assigned(position.epoch, steps))
        for (_, stop), batch in zip(steps, map(self._finished, readings), strict=True):
            position.given, position.all_given = stop, stop == steps.stop
            yield batch
            require(
                iteration == self._iterations,
                "loader: this iteration was ended by a later one over the same loader; use a loader for each",
            )
            if position is not self._position:
                return
        self._turn_to(position.epoch + 1)

    @property
    def epoch(self) -> int:
        """The epoch that is being iterated, or comes next."""
        return self._position.epoch

    def set_epoch(self, epoch: int) -> None:
        """Makes `epoch` (from 0) the next to iterate; naming the current one keeps a loaded position.

        A running loop gets no more batches of the epoch that is left: it ends as if there were none.
        """
        epoch = whole("epoch", epoch, 0)
        if epoch != self.epoch or self._position.all_given:
            self._turn_to(epoch)

    def state_dict(self) -> dict[str, object]:
        """Where the training loop stands: after the batch it was given last, whatever workers have prepared since.

        Plain values, the same on all ranks.
        """
        return {
            "format": STATE_FORMAT,
            "version": STATE_VERSION,
            "dataset_id": self._dataset_id,
            "seed": self._seed,
            "skipped": self._skipped_names(),
            "epoch": self._position.epoch,
            "pairs": self._position.given,
        }

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Goes to where `state_dict` was taken; batch size, workers and number of processes may differ.

        The epoch starts there until it ends or another is set. A running loop ends as if there were no more batches.
        Where more processes than pairs are left of the epoch, these are left out.

        Raises:
            ConfigError: the state is of another dataset, seed or kind, with other shards skipped, or damaged;
                nothing is changed then.
        """
        _expect(state, "format", STATE_FORMAT)
        _expect(state, "version", STATE_VERSION)
        _expect(state, "dataset_id", self._dataset_id)
        _expect(state, "seed", self._seed)
        _expect(state, "skipped", self._skipped_names())
        epoch = _count(state, "epoch", 2**62)
        self._turn_to(epoch, _count(state, "pairs", self._pairs))

    @property
    def dataset_info(self) -> TrainingInfo:
        """Class names, normalisation and teacher of the dataset."""
        manifest = self._manifest
        return TrainingInfo(
            class_names=manifest.dataset.class_names,
            size=manifest.images.size,
            mean=manifest.images.mean,
            std=manifest.images.std,
            temperature=manifest.records.temperature,
            teacher=manifest.teacher,
        )

    def _turn_to(self, epoch: int, start: int = 0) -> None:
        """A new object, so that an iteration of another place notices, and writes to its own."""
        self._position = _Position(epoch=epoch, start=start, given=start)

    def _steps(self, start: int) -> EpochSteps:
        _, world_size = self._ranks or distributed_ranks()
        return epoch_steps(
            self._pairs,
            start=start,
            world_size=world_size,
            batch_size=self._batch_size,
            drop_last=self._drop_last,
        )

    def _require_room(self, limit: int, batch_size: int, num_workers: int) -> None:
        """Readers hold the windows of the batches under way, so the cache must have room for the largest of these."""
        sizes = sorted((entry.bytes for entry in self._manifest.shards), reverse=True)
        _, world_size = self._ranks or distributed_ranks()
        steps = 1 + (1 + PREFETCHED) * num_workers  # asked for, and the last one that each worker has done
        held = self._shards.most_shards_of((steps * batch_size + 1) * world_size)  # a tail may have joined
        require(
            limit >= sum(sizes[:held]),
            f"cache_limit_bytes: found {limit}, expected at least {sum(sizes[:held])}: up to {held} shards of this "
            f"dataset are read at a time",
        )

    def _skip_bad_shards(self) -> None:
        """Leaves out the shards that are bad on any rank, with one warning. All ranks come here."""
        bad = self._bad_shards()
        found = [bad] if self._agreement is None else self._agreement.gathered(bad)
        reasons = {shard: reason for of_rank in reversed(found) for shard, reason in of_rank.items()}
        if not reasons:
            return
        self._shards = replace(self._shards, skipped=frozenset(reasons))
        first = reasons[min(reasons)]
        require(bool(self._shards.used), f"on_bad_shard: every shard is bad, the first: {first}")
        warnings.warn(
            f"{len(reasons)} of {len(self._manifest.shards)} shards are bad and skipped "
            f"({', '.join(self._skipped_names())}); the first: {first}",
            stacklevel=3,
        )

    def _bad_shards(self) -> dict[int, str]:
        """Those of this rank. What keeps one rank from looking is raised on all: the others would wait for it."""
        bad: dict[int, str] = {}
        failure: NrrddError | None = None
        try:
            bad = find_bad_shards(self._dataset, self._cache)
        except NrrddError as error:
            failure = error
        if self._agreement is not None:
            failure = self._agreement.any_error(failure)
        if failure is not None:
            try:
                raise failure
            finally:
                del failure  # or error and traceback would keep each other, and what the cache holds, alive
        return bad

    def _skipped_names(self) -> list[str]:
        return [self._manifest.shards[shard].name for shard in sorted(self._shards.skipped)]

    def _compare_ranks(self) -> None:
        """Before an epoch's first batch: ranks that read different things would train on other pairs than they say."""
        if self._agreement is not None:
            state = {**self.state_dict(), "batch_size": self._batch_size, "drop_last": self._drop_last}
            self._agreement.require_same("loader", state)

    def _assigned(self, epoch: int, steps: EpochSteps) -> DataLoader[Reading]:
        """torch's loader, whose next iteration reads this rank's part of these steps."""
        rank, world_size = self._ranks or distributed_ranks()
        if self._torch_loader is None:
            self._torch_loader = self._new_torch_loader()
        self._assignments.set(epoch, steps, rank=rank, world_size=world_size)
        return self._torch_loader

    def _new_torch_loader(self) -> DataLoader[Reading]:
        self._slots = self._new_slots()
        self._assignments = _Assignments(self._slots)
        reader = BatchReader(
            self._dataset,
            self._cache,
            shards=self._shards,
            seed=self._seed,
            replay_here=self._device.type == "cpu",
            cache_bytes=self._cache_bytes,
            slots=None if self._slots is None else self._slots.memory,
        )
        return DataLoader(
            reader,
            batch_size=None,
            sampler=self._assignments,
            num_workers=self._num_workers,
            pin_memory=self._pin_memory,
            prefetch_factor=PREFETCHED if self._num_workers else None,
            persistent_workers=self._num_workers > 0,
            worker_init_fn=keep_freed_memory,
            generator=torch.Generator(),  # else torch draws the workers' seed from the user's random state
        )

    def _new_slots(self) -> Slots | None:
        """For all batches under way, the one the training loop has, and the one it is given next."""
        if self._pin_memory:  # torch pins in a thread that knows nothing of slots
            return None
        # A tail may add a pair; a batch not replayed yet holds at most two images a pair, a byte a value.
        on_cpu = self._device.type == "cpu"
        images = (min(self._batch_size, self._pairs) + 1) * (1 if on_cpu else 2)
        nbytes = images * 3 * self._manifest.images.size**2 * (4 if on_cpu else 1)
        count = PREFETCHED * self._num_workers + 2
        try:
            return Slots(count, nbytes, shared=self._num_workers > 0)
        except RuntimeError:
            warnings.warn(
                f"no room for {count * nbytes:,} bytes of {'shared ' if self._num_workers else ''}memory ({count} "
                f"batches), so every batch takes new memory, which is slower; "
                f"{'make /dev/shm larger, or lower num_workers or' if self._num_workers else 'lower'} batch_size",
                stacklevel=5,
            )
            return None

    def _readings(self, torch_loader: DataLoader[Reading]) -> Iterator[DBRBatch | PlannedBatch | NrrddError]:
        try:
            yield from map(self._opened, torch_loader)
        except (ConnectionError, EOFError, RuntimeError) as error:
            # Usually torch says so itself; a batch that the dead process had sent shows as a broken connection.
            # What a living worker raised ("Caught RuntimeError in DataLoader worker process 0.") is no death.
            if str(error).startswith("Caught ") or (isinstance(error, RuntimeError) and _DEATH not in str(error)):
                raise
            self._torch_loader = None
            reason = str(error).partition("\n")[0] or type(error).__name__
        else:
            return
        yield NrrddError(f"a loader process has died ({reason}); if memory ran out, lower num_workers or batch_size")

    def _opened(self, reading: Reading) -> DBRBatch | PlannedBatch | NrrddError:
        in_slot = None
        if self._slots is not None:
            in_slot = self._slots.received(reading.images if isinstance(reading, Parcel) else None)
        return reading.opened(in_slot) if isinstance(reading, Parcel) else reading

    def _finished(self, reading: DBRBatch | PlannedBatch | NrrddError) -> DBRBatch:
        error = reading if isinstance(reading, NrrddError) else None
        if self._agreement is not None:
            error = self._agreement.any_error(error)
        if error is not None:
            try:
                raise error
            finally:
                del error, reading  # or error and traceback would keep each other, and the workers, alive
        if isinstance(reading, PlannedBatch):
            images = self._manifest.images
            # Memory that is not pinned may be written anew once the batch is gone: such a copy has to be waited for.
            moved = reading.to(self._device, non_blocking=self._pin_memory)
            return moved.replayed(mean=images.mean, std=images.std)
        assert isinstance(reading, DBRBatch)
        return reading

    def _warn_when_repeating(self, epoch: int) -> None:
        stored = self._manifest.records.epochs
        if epoch >= stored and not self._warned:
            self._warned = True
            warnings.warn(
                f"epoch {epoch}: the dataset stores {counted(stored, 'epoch')}, so views, mixes and distances repeat "
                f"from here, in a new order",
                stacklevel=3,
            )


class _Assignments(Sampler[Assignment]):
    """Hands this rank's assignments of an epoch to torch's DataLoader."""

    def __init__(self, slots: Slots | None) -> None:
        self._slots = slots
        self.set(0, EpochSteps(start=0, stop=0, stride=1, count=0), rank=0, world_size=1)

    def set(self, epoch: int, steps: EpochSteps, *, rank: int, world_size: int) -> None:
        """What the next iteration hands out."""
        self._epoch, self._steps, self._rank, self._world_size = epoch, steps, rank, world_size

    def __iter__(self) -> Iterator[Assignment]:
        # A generator would read the attributes of a later iteration.
        return _assignments(self._epoch, self._steps, self._rank, self._world_size, self._slots)

    def __len__(self) -> int:
        return len(self._steps)


def _assignments(
    epoch: int, steps: EpochSteps, rank: int, world_size: int, slots: Slots | None
) -> Iterator[Assignment]:
    if slots is not None:
        slots.forget()  # torch asks for the first batch when its workers have done with those of the epoch before
    for step in steps:
        start, stop = rank_slice(step, rank=rank, world_size=world_size)
        yield epoch, start, stop, None if slots is None else slots.reserve()


def _given_ranks(rank: int | None, world_size: int | None) -> tuple[int, int] | None:
    if rank is None and world_size is None:
        return None
    whole = isinstance(rank, int | np.integer) and isinstance(world_size, int | np.integer)
    if rank is None or world_size is None or not whole or not 0 <= rank < world_size:
        raise ConfigError(f"rank {rank} of world_size {world_size}: expected both, and 0 <= rank < world_size")
    return int(rank), int(world_size)


def _usable_device(name: str | torch.device) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"device: {str(error).partition(chr(10))[0]}") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device: found {str(device)!r}, but torch sees no GPU; use device='cpu'")
    return device


def _expect(state: Mapping[str, object], key: str, expected: object) -> None:
    found = state.get(key)
    if found != expected:
        raise ConfigError(f"loader state: {key} is {found!r}, expected {expected!r}; load it where it was taken")


def _count(state: Mapping[str, object], key: str, most: int) -> int:
    found = state.get(key)
    if type(found) is not int or not 0 <= found <= most:
        raise ConfigError(f"loader state: {key} is {found!r}, expected an integer from 0 to {most}")
    return found
