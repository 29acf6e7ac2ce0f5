"""Which pairs come when: pure functions of (seed, epoch) and of how many processes share the work.

The pairs of all shards are numbered through: pair t of a shard has the number (pairs of the shards before) + t.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from nrrdd_format import draws
from nrrdd_format.errors import ConfigError
from nrrdd_format.pairs import cycle_bounds


def all_cycles(pairs_per_shard: Sequence[int], cycle: int) -> NDArray[np.int64]:
    """The closed cycles of all shards: (k, 2) first pair and the one after the last, numbered through."""
    bounds = [cycle_bounds(pairs, cycle) for pairs in pairs_per_shard]
    shard_starts = np.cumsum([0, *pairs_per_shard])
    starts = np.concatenate([bound[:-1] + first for bound, first in zip(bounds, shard_starts, strict=False)])
    stops = np.concatenate([bound[1:] + first for bound, first in zip(bounds, shard_starts, strict=False)])
    return np.stack([starts, stops], axis=1)


def stored_epoch(seed: int, epoch: int, stored: int) -> int:
    """The stored epoch that training epoch `epoch` replays.

    The first `stored` training epochs take them in order; every later pass takes all of them in a new order.
    """
    passes, position = divmod(epoch, stored)
    if passes == 0:
        return position
    return int(draws.permutation(seed, "loader-epochs", passes, count=stored)[position])


def epoch_order(seed: int, epoch: int, cycles: NDArray[np.int64]) -> NDArray[np.int64]:
    """The pairs of an epoch in training order, (N,): cycles shuffled whole, so batches decode few images."""
    starts, stops = cycles[draws.permutation(seed, "loader-order", epoch, count=len(cycles))].T
    lengths = stops - starts
    places = np.cumsum(lengths) - lengths
    return np.repeat(starts - places, lengths) + np.arange(lengths.sum())


def epoch_steps(
    pairs: int, *, start: int = 0, world_size: int, batch_size: int, drop_last: bool
) -> list[tuple[int, int]]:
    """The steps of an epoch: each the (start, stop) of the places in the order that all ranks take together.

    A step takes world_size * batch_size pairs. A shorter tail is the last step, joins the step before where
    it has less than a pair for each rank, or is left out with `drop_last`.

    Args:
        pairs: N, pairs of the whole epoch.
        start: pairs consumed already; the steps cover the rest.
        world_size: number of processes.
        batch_size: pairs of a process in a step.
        drop_last: leave a tail out.

    Raises:
        ConfigError: the pairs left are too few to give each rank one.
    """
    stride = world_size * batch_size
    bounds = list(range(start, pairs + 1, stride))
    tail = pairs - bounds[-1]
    if tail and not drop_last:
        if tail >= world_size:
            bounds.append(pairs)
        elif len(bounds) > 1:
            bounds[-1] = pairs
        else:
            raise ConfigError(
                f"{tail} pairs left in the epoch for {world_size} processes, expected at least one each; "
                f"use fewer processes or drop_last=True"
            )
    return list(pairwise(bounds))


def rank_slice(step: tuple[int, int], *, rank: int, world_size: int) -> tuple[int, int]:
    """The part (start, stop) of a step that is `rank`'s; lower ranks get the larger parts, by one pair."""
    start, stop = step
    size, larger = divmod(stop - start, world_size)
    first = start + rank * size + min(rank, larger)
    return first, first + size + (rank < larger)
