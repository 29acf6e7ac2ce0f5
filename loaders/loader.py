"""DBRLoader: batches of mixed pairs of an nrrdd dataset, for a plain PyTorch training loop.

torch's DataLoader supplies processes, prefetching, the batches' order and the detection of dead workers. The
sequence of pairs itself is a function of (seed, epoch) alone (`loaders.order`), so the state of a loader is
three numbers.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, Sampler

from loaders.batch import DBRBatch, PlannedBatch
from loaders.order import epoch_steps, rank_slice
from loaders.reading import Assignment, BatchReader, Reading
from nrrdd_format.dataset import open_dataset
from nrrdd_format.errors import ConfigError, NrrddError
from nrrdd_format.manifest import TeacherInfo

STATE_FORMAT = "nrrdd-loader"
STATE_VERSION = 1


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


class DBRLoader:
    """Iterates over a dataset's pairs, an epoch at a time.

    Every pair comes once an epoch. Training epoch e replays stored epoch e; past the last one the stored
    epochs are taken again in a new order, with one warning. With R processes each step takes R * batch_size
    pairs, of which every process gets its part; all processes get equally many batches. A tail is split
    evenly, so the last batch may be smaller, or larger by one pair where the tail has less than a pair for
    each process.

    Args:
        path: the dataset's folder or its `dataset.json`.
        batch_size: pairs of this process in a batch.
        seed: of the order of pairs; the same on all ranks.
        num_workers: processes that read, decode and (device "cpu") replay; 0: all in this process.
        device: where images are cropped, mixed and normalised, and where the batches lie.
        drop_last: leave out the pairs that do not fill a step.
        pin_memory: put what the workers deliver into page-locked memory, for faster copies to a GPU.
        cache_bytes: memory that each reading process may fill with decoded images; others are decoded anew each epoch.
        rank, world_size: this process among those that train together; by default as `torch.distributed`
            says, or alone where that is not initialised.

    Raises:
        ConfigError: an argument that cannot work, alone or with this dataset.
        FormatError: the dataset is missing or damaged (also while iterating).
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
        rank: int | None = None,
        world_size: int | None = None,
    ) -> None:
        _require(batch_size >= 1, f"batch_size: found {batch_size}, expected 1 or more")
        _require(seed >= 0, f"seed: found {seed}, expected 0 or more")
        _require(num_workers >= 0, f"num_workers: found {num_workers}, expected 0 or more")
        _require(cache_bytes >= 0, f"cache_bytes: found {cache_bytes}, expected 0 or more")
        self._dataset = open_dataset(path)
        self._manifest = self._dataset.manifest
        self._dataset_id = self._manifest.dataset_id
        self._pairs = sum(entry.pairs_per_epoch for entry in self._manifest.shards)
        _require(self._pairs > 0, f"{path}: the dataset lists no shards, expected at least one; finish its build")
        self._batch_size = batch_size
        self._seed = seed
        self._num_workers = num_workers
        self._device = _usable_device(device)
        self._drop_last = drop_last
        self._pin_memory = pin_memory
        self._cache_bytes = cache_bytes
        self._ranks = _given_ranks(rank, world_size)
        self._epoch = 0
        self._consumed = 0  # pairs of the epoch that all ranks together have been given
        self._resume_at = 0  # where the next iteration starts, if a state was loaded
        self._warned = False
        self._assignments = _Assignments()
        self._torch_loader = self._new_torch_loader()
        _require(
            len(self) > 0,
            f"batch_size: {batch_size} pairs for each process, but the dataset has {self._pairs} pairs, so "
            f"drop_last leaves no batch; choose a smaller batch_size",
        )

    def __len__(self) -> int:
        """Batches of a whole epoch."""
        return len(self._steps(0))

    def __iter__(self) -> Iterator[DBRBatch]:
        """The batches of the current epoch (after `load_state_dict`: its rest); then the epoch advances."""
        epoch = self._epoch
        self._consumed, self._resume_at = self._resume_at, 0
        self._warn_when_repeating(epoch)
        rank, world_size = self._ranks or _distributed_ranks()
        steps = self._steps(self._consumed)
        self._assignments.epoch = [(epoch, *rank_slice(step, rank=rank, world_size=world_size)) for step in steps]
        for (_, stop), reading in zip(steps, self._readings(), strict=True):
            batch = self._finished(reading)
            self._consumed = stop
            yield batch
        self._epoch, self._consumed = epoch + 1, 0

    @property
    def epoch(self) -> int:
        """The epoch that is being iterated, or comes next."""
        return self._epoch

    def set_epoch(self, epoch: int) -> None:
        """Makes `epoch` (from 0) the next to iterate; naming the current one keeps a loaded position."""
        _require(epoch >= 0, f"epoch: found {epoch}, expected 0 or more")
        if epoch != self._epoch:
            self._epoch, self._consumed, self._resume_at = epoch, 0, 0

    def state_dict(self) -> dict[str, object]:
        """Where the training loop stands: after the batch it was given last, whatever workers have prepared since.

        Plain values, the same on all ranks.
        """
        return {
            "format": STATE_FORMAT,
            "version": STATE_VERSION,
            "dataset_id": self._dataset_id,
            "seed": self._seed,
            "epoch": self._epoch,
            "pairs": self._consumed,
        }

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Goes to where `state_dict` was taken; batch size, workers and number of processes may differ.

        Raises:
            ConfigError: the state is of another dataset, seed or kind, or damaged; nothing is changed then.
        """
        _expect(state, "format", STATE_FORMAT)
        _expect(state, "version", STATE_VERSION)
        _expect(state, "dataset_id", self._dataset_id)
        _expect(state, "seed", self._seed)
        epoch = _count(state, "epoch", 2**62)
        consumed = _count(state, "pairs", self._pairs)
        self._epoch, self._consumed, self._resume_at = epoch, consumed, consumed

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

    def _steps(self, start: int) -> list[tuple[int, int]]:
        _, world_size = self._ranks or _distributed_ranks()
        return epoch_steps(
            self._pairs,
            start=start,
            world_size=world_size,
            batch_size=self._batch_size,
            drop_last=self._drop_last,
        )

    def _new_torch_loader(self) -> DataLoader[Reading]:
        reader = BatchReader(
            self._dataset,
            seed=self._seed,
            replay_here=self._device.type == "cpu",
            cache_bytes=self._cache_bytes,
        )
        return DataLoader(
            reader,
            batch_size=None,
            sampler=self._assignments,
            num_workers=self._num_workers,
            pin_memory=self._pin_memory,
            persistent_workers=self._num_workers > 0,
            generator=torch.Generator(),  # else torch draws the workers' seed from the user's random state
        )

    def _readings(self) -> Iterator[Reading]:
        try:
            yield from self._torch_loader
        except (ConnectionError, EOFError, RuntimeError) as error:
            # Usually torch says so itself; a batch that the dead process had sent shows as a broken connection.
            if isinstance(error, RuntimeError) and "DataLoader worker" not in str(error):
                raise
            self._torch_loader = self._new_torch_loader()
            reason = str(error).partition("\n")[0] or type(error).__name__
            raise NrrddError(
                f"a loader process has died ({reason}); if memory ran out, lower num_workers or batch_size"
            ) from error

    def _finished(self, reading: Reading) -> DBRBatch:
        if isinstance(reading, NrrddError):
            raise reading
        if isinstance(reading, PlannedBatch):
            images = self._manifest.images
            moved = reading.to(self._device, non_blocking=True)
            return moved.replayed(mean=images.mean, std=images.std)
        return reading

    def _warn_when_repeating(self, epoch: int) -> None:
        stored = self._manifest.records.epochs
        if epoch >= stored and not self._warned:
            self._warned = True
            warnings.warn(
                f"epoch {epoch}: the dataset stores {stored} epochs, so views, mixes and distances repeat "
                f"from here, in a new order",
                stacklevel=3,
            )


class _Assignments(Sampler[Assignment]):
    """Hands this rank's assignments of an epoch to torch's DataLoader."""

    def __init__(self) -> None:
        self.epoch: list[Assignment] = []

    def __iter__(self) -> Iterator[Assignment]:
        return iter(self.epoch)

    def __len__(self) -> int:
        return len(self.epoch)


def _distributed_ranks() -> tuple[int, int]:
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def _given_ranks(rank: int | None, world_size: int | None) -> tuple[int, int] | None:
    if rank is None and world_size is None:
        return None
    if rank is None or world_size is None or not 0 <= rank < world_size:
        raise ConfigError(f"rank {rank} of world_size {world_size}: expected both, and 0 <= rank < world_size")
    return rank, world_size


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


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)
