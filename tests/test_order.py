"""The order of pairs and how ranks share it: every pair once, whatever the number of ranks, also after a resume."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loaders.order import all_cycles, epoch_order, epoch_steps, rank_slice, stored_epoch
from nrrdd_format.errors import ConfigError

WORLD_SIZES = st.sampled_from([1, 2, 3, 4, 8])
BATCH_SIZES = st.integers(1, 60)
PAIRS = st.integers(8, 200)


def shares(pairs: int, *, start: int = 0, world_size: int, batch_size: int, drop_last: bool) -> list[list[range]]:
    """By rank, the places of each of its batches."""
    steps = epoch_steps(pairs, start=start, world_size=world_size, batch_size=batch_size, drop_last=drop_last)
    return [
        [range(*rank_slice(step, rank=rank, world_size=world_size)) for step in steps] for rank in range(world_size)
    ]


@given(pairs=PAIRS, world_size=WORLD_SIZES, batch_size=BATCH_SIZES)
def test_every_pair_comes_once(pairs: int, world_size: int, batch_size: int) -> None:
    by_rank = shares(pairs, world_size=world_size, batch_size=batch_size, drop_last=False)
    taken = [place for batches in by_rank for batch in batches for place in batch]
    assert sorted(taken) == list(range(pairs))


@given(pairs=PAIRS, world_size=WORLD_SIZES, batch_size=BATCH_SIZES, drop_last=st.booleans())
def test_ranks_get_equally_many_batches_and_none_is_empty(
    pairs: int, world_size: int, batch_size: int, drop_last: bool
) -> None:
    by_rank = shares(pairs, world_size=world_size, batch_size=batch_size, drop_last=drop_last)
    assert len({len(batches) for batches in by_rank}) == 1
    assert all(len(batch) > 0 for batches in by_rank for batch in batches)


@given(pairs=PAIRS, world_size=WORLD_SIZES, batch_size=BATCH_SIZES)
def test_a_step_is_the_next_pairs_in_rank_order(pairs: int, world_size: int, batch_size: int) -> None:
    by_rank = shares(pairs, world_size=world_size, batch_size=batch_size, drop_last=False)
    together = [place for step in zip(*by_rank, strict=True) for batch in step for place in batch]
    assert together == list(range(pairs))


@given(pairs=PAIRS, world_size=WORLD_SIZES, batch_size=BATCH_SIZES)
def test_the_tail_rule(pairs: int, world_size: int, batch_size: int) -> None:
    by_rank = shares(pairs, world_size=world_size, batch_size=batch_size, drop_last=False)
    assert all(len(batch) == batch_size for batches in by_rank for batch in batches[:-1])
    last = [len(batches[-1]) for batches in by_rank]
    assert max(last) - min(last) <= 1
    assert last == sorted(last, reverse=True)
    tail = pairs % (world_size * batch_size)
    joins = 0 < tail < world_size
    assert sum(last) == (tail + world_size * batch_size if joins else tail or world_size * batch_size)


@given(pairs=PAIRS, world_size=WORLD_SIZES, batch_size=BATCH_SIZES)
def test_drop_last_leaves_only_full_batches(pairs: int, world_size: int, batch_size: int) -> None:
    by_rank = shares(pairs, world_size=world_size, batch_size=batch_size, drop_last=True)
    assert all(len(batch) == batch_size for batches in by_rank for batch in batches)
    assert sum(map(len, by_rank)) == pairs // (world_size * batch_size) * world_size


@given(data=st.data(), pairs=PAIRS, before=WORLD_SIZES, after=WORLD_SIZES, batch_size=BATCH_SIZES)
def test_a_resume_with_other_ranks_covers_the_rest_once(
    data: st.DataObject, pairs: int, before: int, after: int, batch_size: int
) -> None:
    steps = epoch_steps(pairs, world_size=before, batch_size=batch_size, drop_last=False)
    position = data.draw(st.sampled_from([0, *(stop for _, stop in steps)]))
    size = data.draw(BATCH_SIZES)
    if 0 < pairs - position < after:
        with pytest.raises(ConfigError, match=f"{pairs - position} pairs left in the epoch for {after} processes"):
            epoch_steps(pairs, start=position, world_size=after, batch_size=size, drop_last=False)
        return
    by_rank = shares(pairs, start=position, world_size=after, batch_size=size, drop_last=False)
    assert sorted(p for batches in by_rank for batch in batches for p in batch) == list(range(position, pairs))


@given(pairs=PAIRS, world_size=WORLD_SIZES, batch_size=BATCH_SIZES, drop_last=st.booleans())
def test_a_resume_with_the_same_ranks_takes_the_same_steps(
    pairs: int, world_size: int, batch_size: int, drop_last: bool
) -> None:
    steps = epoch_steps(pairs, world_size=world_size, batch_size=batch_size, drop_last=drop_last)
    for done, (_, stop) in enumerate(steps, start=1):
        rest = epoch_steps(pairs, start=stop, world_size=world_size, batch_size=batch_size, drop_last=drop_last)
        assert rest == steps[done:]


def test_fewer_pairs_than_ranks_are_refused() -> None:
    with pytest.raises(ConfigError, match="3 pairs left in the epoch for 4 processes"):
        epoch_steps(3, world_size=4, batch_size=2, drop_last=False)


def test_equal_global_batches_take_equal_steps() -> None:
    by_two = epoch_steps(100, world_size=2, batch_size=12, drop_last=False)
    assert by_two == epoch_steps(100, world_size=4, batch_size=6, drop_last=False)


@given(shard_pairs=st.lists(st.integers(2, 40), min_size=1, max_size=5), cycle=st.integers(2, 12))
def test_cycles_cover_all_pairs_and_stay_within_shards(shard_pairs: list[int], cycle: int) -> None:
    cycles = all_cycles(shard_pairs, cycle)
    assert [t for start, stop in cycles for t in range(start, stop)] == list(range(sum(shard_pairs)))
    ends = set(np.cumsum(shard_pairs).tolist())
    assert ends <= set(cycles[:, 1].tolist())


@given(
    seed=st.integers(0, 2**40),
    epoch=st.integers(0, 10**6),
    shard_pairs=st.lists(st.integers(2, 30), min_size=1, max_size=4),
)
def test_an_epoch_shuffles_cycles_as_wholes(seed: int, epoch: int, shard_pairs: list[int]) -> None:
    cycles = all_cycles(shard_pairs, 4)
    order = epoch_order(seed, epoch, cycles)
    assert sorted(order.tolist()) == list(range(sum(shard_pairs)))
    whole = {start: list(range(start, stop)) for start, stop in cycles.tolist()}
    rest = order.tolist()
    while rest:
        expected = whole.pop(rest[0])
        assert rest[: len(expected)] == expected
        rest = rest[len(expected) :]


def test_the_order_never_changes() -> None:
    """Known values: another order would break every training that is resumed."""
    assert epoch_order(0, 0, all_cycles([6, 5], 3)).tolist() == [3, 4, 5, 0, 1, 2, 6, 7, 8, 9, 10]
    assert epoch_order(7, 3, all_cycles([6, 5], 3)).tolist() == [0, 1, 2, 9, 10, 3, 4, 5, 6, 7, 8]
    assert [stored_epoch(0, epoch, 4) for epoch in range(12)] == [0, 1, 2, 3, 1, 3, 0, 2, 1, 2, 0, 3]


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    cycles = all_cycles([60], 2)
    orders = {tuple(epoch_order(seed, epoch, cycles)) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9


@given(seed=st.integers(0, 1000), stored=st.integers(1, 30), passes=st.integers(1, 4))
def test_every_pass_takes_each_stored_epoch_once(seed: int, stored: int, passes: int) -> None:
    taken = [stored_epoch(seed, epoch, stored) for epoch in range(passes * stored, (passes + 1) * stored)]
    assert sorted(taken) == list(range(stored))


def test_later_passes_have_orders_of_their_own() -> None:
    passes = [tuple(stored_epoch(0, p * 20 + i, 20) for i in range(20)) for p in range(4)]
    assert passes[0] == tuple(range(20))
    assert len(set(passes)) == 4
