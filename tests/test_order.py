"""The order of pairs and how ranks share it: every pair once, whatever the number of ranks, also after a resume."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loaders import order as order_module
from loaders.order import (
    WINDOW_PAIRS,
    WINDOW_SHARDS,
    EpochOrder,
    ShardPairs,
    epoch_steps,
    rank_slice,
    stored_epoch,
)
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
    if position == 0 and pairs < after:
        with pytest.raises(ConfigError, match=f"{pairs} pairs in an epoch for {after} processes"):
            epoch_steps(pairs, start=position, world_size=after, batch_size=size, drop_last=False)
        return
    by_rank = shares(pairs, start=position, world_size=after, batch_size=size, drop_last=False)
    rest = range(position, pairs) if pairs - position >= after else range(0)  # too few for each rank to get one
    assert sorted(p for batches in by_rank for batch in batches for p in batch) == list(rest)


@given(pairs=PAIRS, world_size=WORLD_SIZES, batch_size=BATCH_SIZES, drop_last=st.booleans())
def test_a_resume_with_the_same_ranks_takes_the_same_steps(
    pairs: int, world_size: int, batch_size: int, drop_last: bool
) -> None:
    steps = list(epoch_steps(pairs, world_size=world_size, batch_size=batch_size, drop_last=drop_last))
    for done, (_, stop) in enumerate(steps, start=1):
        rest = epoch_steps(pairs, start=stop, world_size=world_size, batch_size=batch_size, drop_last=drop_last)
        assert list(rest) == steps[done:]


@given(pairs=PAIRS, world_size=WORLD_SIZES, batch_size=BATCH_SIZES, drop_last=st.booleans())
def test_the_number_of_steps_is_known_beforehand(pairs: int, world_size: int, batch_size: int, drop_last: bool) -> None:
    steps = epoch_steps(pairs, world_size=world_size, batch_size=batch_size, drop_last=drop_last)
    assert len(steps) == len(list(steps))


def test_fewer_pairs_than_ranks_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"3 pairs in an epoch for 4 processes, .*; use fewer processes$"):
        epoch_steps(3, world_size=4, batch_size=2, drop_last=False)


def test_equal_global_batches_take_equal_steps() -> None:
    by_two = epoch_steps(100, world_size=2, batch_size=12, drop_last=False)
    assert by_two == epoch_steps(100, world_size=4, batch_size=6, drop_last=False)


SHARDS = st.builds(
    ShardPairs,
    pairs_per_shard=st.lists(st.integers(2, 30), min_size=1, max_size=12).map(tuple),
    cycle=st.integers(2, 12),
)


@pytest.fixture(autouse=True, scope="module")
def small_windows() -> Iterator[None]:
    """Of two or three shards, so that the epochs drawn here have several."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(order_module, "WINDOW_SHARDS", (2, 3))
        yield


@pytest.fixture
def real_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """As everybody else has them."""
    monkeypatch.setattr(order_module, "WINDOW_SHARDS", WINDOW_SHARDS)


SEEDS = st.integers(0, 2**40)
EPOCHS = st.integers(0, 10**6)


def whole_epoch(seed: int, epoch: int, shards: ShardPairs) -> list[int]:
    order = EpochOrder(seed, epoch, shards)
    return [pair for window in range(len(order.windows)) for pair in order.pairs(window).tolist()]


def cycles_of(shards: ShardPairs) -> dict[int, list[int]]:
    """First pair of each cycle -> its pairs, by the rule of the format, spelt out."""
    found, first = {}, 0
    for pairs in shards.pairs_per_shard:
        numbers = list(range(first, first + pairs))
        while numbers:
            left = len(numbers)
            size = left if left <= shards.cycle or left == shards.cycle + 1 else shards.cycle
            found[numbers[0]], numbers = numbers[:size], numbers[size:]
        first += pairs
    return found


@given(seed=SEEDS, epoch=EPOCHS, shards=SHARDS)
def test_an_epoch_shuffles_cycles_as_wholes(seed: int, epoch: int, shards: ShardPairs) -> None:
    rest = whole_epoch(seed, epoch, shards)
    assert sorted(rest) == list(range(shards.total))
    whole = cycles_of(shards)
    while rest:
        expected = whole.pop(rest[0])
        assert rest[: len(expected)] == expected
        rest = rest[len(expected) :]


@given(seed=SEEDS, epoch=EPOCHS, shards=SHARDS)
def test_the_pairs_of_a_shard_lie_within_one_window(seed: int, epoch: int, shards: ShardPairs) -> None:
    order = EpochOrder(seed, epoch, shards)
    assert sorted(shard for window in order.windows for shard in window) == list(range(len(shards.pairs_per_shard)))
    first = shards.first_pairs.tolist()
    for window, members in enumerate(order.windows):
        numbers = [first[shard] + pair for shard in members for pair in range(shards.pairs_per_shard[shard])]
        assert sorted(order.pairs(window).tolist()) == sorted(numbers)


@given(shards=SHARDS, data=st.data())
def test_places_are_found_in_their_windows(shards: ShardPairs, data: st.DataObject) -> None:
    order = EpochOrder(0, 0, shards)
    start = data.draw(st.integers(0, shards.total - 1))
    stop = data.draw(st.integers(start + 1, shards.total))
    windows = order.windows_of(start, stop)
    numbers = [pair for window in windows for pair in order.pairs(window).tolist()]
    first = order.start(windows[0])
    assert numbers[start - first : stop - first] == whole_epoch(0, 0, shards)[start:stop]
    assert len(numbers) - (start - first) >= stop - start
    assert start - first < len(order.pairs(windows[0]))


@given(shards=SHARDS, data=st.data())
def test_no_more_shards_are_needed_than_stated(shards: ShardPairs, data: st.DataObject) -> None:
    order = EpochOrder(0, 0, shards)
    start = data.draw(st.integers(0, shards.total - 1))
    stop = data.draw(st.integers(start + 1, shards.total))
    needed = [shard for window in order.windows_of(start, stop) for shard in order.windows[window]]
    assert len(needed) <= shards.most_shards_of(stop - start)


@given(seed=SEEDS, shards=SHARDS, data=st.data())
def test_skipped_shards_do_not_come(seed: int, shards: ShardPairs, data: st.DataObject) -> None:
    count = len(shards.pairs_per_shard)
    skipped = data.draw(st.sets(st.integers(0, count - 1), max_size=count - 1))
    remaining = ShardPairs(pairs_per_shard=shards.pairs_per_shard, cycle=shards.cycle, skipped=frozenset(skipped))
    bounds = [*shards.first_pairs.tolist(), shards.total]
    expected = [t for shard in range(count) if shard not in skipped for t in range(bounds[shard], bounds[shard + 1])]
    assert sorted(whole_epoch(seed, 0, remaining)) == expected
    assert remaining.total == len(expected)


@pytest.mark.usefixtures("real_windows")
@pytest.mark.parametrize(
    ("shards", "pairs", "expected"),
    [(1, 100, 1), (5, 100_000, 4), (1000, 1000, 16), (1000, 16, 64), (3, 2, 3), (1000, WINDOW_PAIRS // 10, 10)],
)
def test_windows_hold_as_many_shards_as_stated(shards: int, pairs: int, expected: int) -> None:
    many = ShardPairs(pairs_per_shard=(pairs,) * shards, cycle=10)
    assert many.window_shards == expected
    sizes = {len(window) for window in EpochOrder(0, 0, many).windows}
    assert max(sizes) <= min(expected, WINDOW_SHARDS[1])
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.usefixtures("real_windows")
def test_a_batch_mixes_the_shards_of_a_window() -> None:
    order = EpochOrder(0, 0, ShardPairs(pairs_per_shard=(1000,) * 64, cycle=10))
    for window, members in enumerate(order.windows):
        batches = order.pairs(window)[:15_000].reshape(-1, 1000) // 1000
        assert len(members) == 16
        assert all(len(set(batch.tolist())) >= 14 for batch in batches)  # 100 cycles from 16 shards


@pytest.mark.usefixtures("real_windows")
def test_the_order_never_changes() -> None:
    """Known values: another order would break every training that is resumed."""
    two = ShardPairs(pairs_per_shard=(6, 5), cycle=3)
    assert whole_epoch(0, 0, two) == [9, 10, 6, 7, 8, 0, 1, 2, 3, 4, 5]
    assert whole_epoch(7, 3, two) == [0, 1, 2, 3, 4, 5, 9, 10, 6, 7, 8]
    eight = ShardPairs(pairs_per_shard=(2500,) * 8, cycle=1250)
    assert EpochOrder(0, 0, eight).windows == [[6, 4, 0, 3], [1, 5, 7, 2]]
    halves = [pair // 1250 for pair in whole_epoch(0, 0, eight)[::1250]]
    assert halves == [7, 6, 0, 13, 1, 12, 8, 9, 14, 3, 10, 2, 5, 4, 15, 11]
    assert [stored_epoch(0, epoch, 4) for epoch in range(12)] == [0, 1, 2, 3, 1, 3, 0, 2, 1, 2, 0, 3]


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    shards = ShardPairs(pairs_per_shard=(12,) * 5, cycle=2)
    orders = {tuple(whole_epoch(seed, epoch, shards)) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9


@given(seed=st.integers(0, 1000), stored=st.integers(1, 30), passes=st.integers(1, 4))
def test_every_pass_takes_each_stored_epoch_once(seed: int, stored: int, passes: int) -> None:
    taken = [stored_epoch(seed, epoch, stored) for epoch in range(passes * stored, (passes + 1) * stored)]
    assert sorted(taken) == list(range(stored))


def test_later_passes_have_orders_of_their_own() -> None:
    passes = [tuple(stored_epoch(0, p * 20 + i, 20) for i in range(20)) for p in range(4)]
    assert passes[0] == tuple(range(20))
    assert len(set(passes)) == 4
