"""Which pairs come when: pure functions of (seed, epoch) and of how many processes share the work.

The pairs of all shards are numbered through: pair t of a shard has the number (pairs of the shards before) + t.

An epoch takes the shards in a new order, in windows of a few shards; the closed cycles of a window's shards are
shuffled among each other. So an epoch begins when the first window's shards are there, and a reader needs the shards
of one window at a time (of two where a batch crosses from one into the next). Bounds that follow, for a window of W
shards with P pairs in all:

- pairs of one cycle stay neighbours; pairs of one shard lie less than P places apart;
- a batch within a window is a uniform sample, without replacement, of the cycles of W shards;
- pairs of different shards may lie anywhere in the epoch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nrrdd_format import draws
from nrrdd_format.errors import ConfigError, counted
from nrrdd_format.pairs import cycle_bounds

WINDOW_PAIRS = 2**14
"""Pairs aimed at in a window: with JPEGs of 18 KB, 300 MB to fetch before the first batch."""
WINDOW_SHARDS = (4, 64)
"""Fewest, so that large shards mix too, and most, so that few files are open."""


@dataclass(frozen=True, kw_only=True)
class ShardPairs:
    """What of a dataset decides the order: the pairs of its shards, their cycles, and which shards take part."""

    pairs_per_shard: tuple[int, ...]
    cycle: int
    skipped: frozenset[int] = frozenset()

    @property
    def used(self) -> list[int]:
        """The shards that take part, ascending."""
        return [shard for shard in range(len(self.pairs_per_shard)) if shard not in self.skipped]

    @property
    def total(self) -> int:
        """N, pairs of an epoch."""
        return sum(self.pairs_per_shard[shard] for shard in self.used)

    @property
    def first_pairs(self) -> NDArray[np.int64]:
        """The number of the first pair of each shard, (shards,)."""
        return np.cumsum([0, *self.pairs_per_shard[:-1]])

    @property
    def window_shards(self) -> int:
        """W, the most shards in a window."""
        fewest, most = WINDOW_SHARDS
        return min(max(WINDOW_PAIRS * len(self.used) // self.total, fewest), most, len(self.used))

    @property
    def windows(self) -> int:
        """Windows of an epoch."""
        return -(-len(self.used) // self.window_shards)

    def most_shards_of(self, pairs: int) -> int:
        """The most shards that so many consecutive pairs of an epoch can come from, with all else of their windows."""
        smallest = sum(sorted(self.pairs_per_shard[s] for s in self.used)[: len(self.used) // self.windows])
        whole, tail = divmod(max(pairs - 1, 0), smallest)
        return min((whole + 1 + (tail > 0)) * self.window_shards, len(self.used))


class EpochOrder:
    """The order of one epoch. Windows are drawn when asked for, so it stays small however long the epoch is."""

    def __init__(self, seed: int, epoch: int, shards: ShardPairs) -> None:
        self._seed, self._epoch, self._shards = seed, epoch, shards
        shuffled = np.array(shards.used)[draws.permutation(seed, "loader-shards", epoch, count=len(shards.used))]
        self.windows = [part.tolist() for part in np.array_split(shuffled, shards.windows)]
        """The shards of each window."""
        pairs = [sum(shards.pairs_per_shard[shard] for shard in window) for window in self.windows]
        self._starts = np.cumsum([0, *pairs])  # the place of each window's first pair, then N

    def windows_of(self, start: int, stop: int) -> range:
        """The windows that hold the places from start to stop, at least one place."""
        first, last = np.searchsorted(self._starts, [start, stop - 1], side="right") - 1
        return range(int(first), int(last) + 1)

    def pairs(self, window: int) -> NDArray[np.int64]:
        """The numbers of a window's pairs in training order: cycles shuffled whole, so batches decode few images."""
        starts, stops = self._cycles(sorted(self.windows[window]))
        shuffled = draws.permutation(self._seed, "loader-order", self._epoch, window, count=len(starts))
        starts, lengths = starts[shuffled], (stops - starts)[shuffled]
        places = np.cumsum(lengths) - lengths
        return np.repeat(starts - places, lengths) + np.arange(lengths.sum())

    def start(self, window: int) -> int:
        """The place of a window's first pair."""
        return int(self._starts[window])

    def _cycles(self, window: Sequence[int]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """First pair of each closed cycle of these shards, and the one after its last."""
        first = self._shards.first_pairs
        bounds = [first[s] + cycle_bounds(self._shards.pairs_per_shard[s], self._shards.cycle) for s in window]
        return np.concatenate([b[:-1] for b in bounds]), np.concatenate([b[1:] for b in bounds])


def stored_epoch(seed: int, epoch: int, stored: int) -> int:
    """The stored epoch that training epoch `epoch` replays.

    The first `stored` training epochs take them in order; every later pass takes all of them in a new order.
    """
    passes, position = divmod(epoch, stored)
    if passes == 0:
        return position
    return int(draws.permutation(seed, "loader-epochs", passes, count=stored)[position])


@dataclass(frozen=True, kw_only=True)
class EpochSteps:
    """The steps of an epoch: each the (start, stop) of the places in the order that all ranks take together.

    All take `stride` places, but the last, which ends at `stop`.
    """

    start: int
    stop: int
    stride: int
    count: int

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[tuple[int, int]]:
        for step in range(self.count):
            first = self.start + step * self.stride
            yield first, self.stop if step == self.count - 1 else first + self.stride


def epoch_steps(pairs: int, *, start: int = 0, world_size: int, batch_size: int, drop_last: bool) -> EpochSteps:
    """Divides what is left of an epoch into steps of world_size * batch_size pairs.

    A shorter tail is the last step, joins the step before where it has less than a pair for each rank, or is left
    out with `drop_last`. Where less than a pair for each rank is left of an epoch that was begun, there is no step.

    Args:
        pairs: N, pairs of the whole epoch.
        start: pairs consumed already; the steps cover the rest.
        world_size: number of processes.
        batch_size: pairs of a process in a step.
        drop_last: leave a tail out.

    Raises:
        ConfigError: the epoch has too few pairs to give each rank one.
    """
    stride = world_size * batch_size
    whole, tail = divmod(pairs - start, stride)
    if not start and not drop_last and pairs < world_size:
        raise ConfigError(
            f"{counted(pairs, 'pair')} in an epoch for {world_size} processes, expected at least one each; "
            f"use fewer processes"
        )
    own_step = tail >= world_size and not drop_last
    stop = pairs - tail if drop_last else pairs
    return EpochSteps(start=start, stop=stop, stride=stride, count=whole + own_step)


def rank_slice(step: tuple[int, int], *, rank: int, world_size: int) -> tuple[int, int]:
    """The part (start, stop) of a step that is `rank`'s; lower ranks get the larger parts, by one pair."""
    start, stop = step
    size, larger = divmod(stop - start, world_size)
    first = start + rank * size + min(rank, larger)
    return first, first + size + (rank < larger)
