"""The loader on a small real dataset: its sequence, its state, its errors, and its processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import warnings
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
import torch
from make_dataset import batch_columns, batch_of, make_tiny_dataset
from numpy.typing import NDArray
from torch import Tensor

from loaders import ClassDistances, DBRBatch, DBRLoader, order, reading
from loaders.order import EpochOrder, ShardPairs, stored_epoch
from nrrdd_format.dataset import open_dataset
from nrrdd_format.decoding import decode_image
from nrrdd_format.errors import ConfigError, FormatError
from nrrdd_format.pairs import PairRecords
from nrrdd_format.replay import plan_batch, replay, stack_images
from nrrdd_format.shards import ShardReader

PAIRS = 12  # of an epoch of the dataset below
EPOCHS = 3


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_dataset(tmp_path_factory.mktemp("loader") / "tiny", epochs=EPOCHS, priors=2, further=1)


def key(batch: DBRBatch) -> tuple[bytes, ...]:
    """A batch as plain bytes, to compare exactly."""
    return tuple(column.numpy().tobytes() for column in batch_columns(batch).values())


def epoch_keys(loader: DBRLoader) -> list[tuple[bytes, ...]]:
    return [key(batch) for batch in loader]


def resumed_at(loader: DBRLoader, change: dict[str, object]) -> DBRLoader:
    """The loader after it has loaded its own state with something changed."""
    loader.load_state_dict({**loader.state_dict(), **change})
    return loader


def fail(*_: object) -> NoReturn:
    raise RuntimeError("no memory for this tensor")


def columns(batches: list[DBRBatch]) -> dict[str, Tensor]:
    rows = [batch_columns(batch) for batch in batches]
    return {name: torch.cat([row[name] for row in rows]) for name in rows[0]}


def expected_epoch(path: Path, epoch: int) -> dict[str, Tensor]:
    """An epoch straight from the shards, pair by pair."""
    rows: list[DBRBatch] = []
    with open_dataset(path) as dataset:
        info = dataset.manifest
        pairs = tuple(entry.pairs_per_epoch for entry in info.shards)
        epoch_order = EpochOrder(0, epoch, ShardPairs(pairs_per_shard=pairs, cycle=info.records.cycle))
        stored = stored_epoch(0, epoch, info.records.epochs)
        for number in [pair for window in range(len(epoch_order.windows)) for pair in epoch_order.pairs(window)]:
            shard, place = divmod(number, dataset.shards[0].images)
            records = dataset.shards[shard].records(stored).take(np.array([place]))
            rows.append(single_pair(path, shard, records))
    return columns(rows)


def single_pair(path: Path, shard: int, records: PairRecords) -> DBRBatch:
    with open_dataset(path) as dataset:
        info, reader = dataset.manifest.images, dataset.shards[shard]
        plan = plan_batch([(shard, records)])
        images = stack_images([decode_image(reader.image_bytes(k), info.size) for k in plan.image.tolist()])
        return DBRBatch(
            images=replay(plan.with_images(images), mean=info.mean, std=info.std),
            label_org=torch.from_numpy(reader.labels[records.index_org]),
            label_aug=torch.from_numpy(reader.labels[records.index_aug]),
            lam=torch.from_numpy(records.lam),
            distance_org=torch.from_numpy(records.distance_org),
            distance_aug=torch.from_numpy(records.distance_aug),
            prior_org=single_prior(reader, records.index_org),
            prior_aug=single_prior(reader, records.index_aug),
            further=single_further(records),
        )


def single_further(records: PairRecords) -> ClassDistances:
    assert records.further_classes is not None and records.further_distances is not None
    classes, distances = records.further_classes, records.further_distances
    return ClassDistances(classes=torch.from_numpy(classes), distances=torch.from_numpy(distances))


def single_prior(reader: ShardReader, image: NDArray[np.int64]) -> ClassDistances:
    assert reader.priors is not None
    priors = reader.priors.take(image)
    distances = torch.from_numpy(priors.distances(reader.layout.levels))
    return ClassDistances(classes=torch.from_numpy(priors.classes), distances=distances)


@pytest.mark.parametrize("epoch", range(EPOCHS))
def test_an_epoch_is_what_the_shards_say(dataset: Path, epoch: int) -> None:
    loader = DBRLoader(dataset, 5)
    loader.set_epoch(epoch)
    expected = expected_epoch(dataset, epoch)
    for name, column in columns(list(loader)).items():
        assert torch.equal(column, expected[name]), name


def test_the_types_and_shapes_of_a_batch(dataset: Path) -> None:
    batch = next(iter(DBRLoader(dataset, 5)))
    assert len(batch) == 5
    assert batch.images.shape == (5, 3, 16, 16)
    assert batch.images.is_contiguous(memory_format=torch.channels_last)
    assert batch.images.dtype == batch.lam.dtype == torch.float32
    assert batch.distance_org.dtype == batch.distance_aug.dtype == torch.float32
    assert batch.label_org.dtype == batch.label_aug.dtype == torch.int64
    for prior in (batch.prior_org, batch.prior_aug):
        assert prior is not None
        assert prior.classes.shape == prior.distances.shape == (5, 2)
        assert (prior.classes.dtype, prior.distances.dtype) == (torch.int64, torch.float32)
    assert batch.further is not None
    assert batch.further.classes.shape == batch.further.distances.shape == (5, 1)
    assert (batch.further.classes.dtype, batch.further.distances.dtype) == (torch.int64, torch.float32)


def test_a_dataset_without_priors_and_further_classes_gives_batches_without(tmp_path: Path) -> None:
    batch = next(iter(DBRLoader(make_tiny_dataset(tmp_path / "plain"), 5)))
    assert batch.prior_org is None and batch.prior_aug is None and batch.further is None


def test_moving_a_batch_keeps_every_field(dataset: Path) -> None:
    batch = next(iter(DBRLoader(dataset, 5)))
    assert key(batch.to("cpu", non_blocking=True)) == key(batch)
    on_meta = batch.to("meta")
    assert all(column.device.type == "meta" for column in batch_columns(on_meta).values())


@pytest.mark.parametrize("num_workers", [1, 2])
def test_workers_do_not_change_the_batches(dataset: Path, num_workers: int) -> None:
    alone, with_workers = DBRLoader(dataset, 5), DBRLoader(dataset, 5, num_workers=num_workers)
    for _ in range(2):
        assert epoch_keys(with_workers) == epoch_keys(alone)


@pytest.mark.parametrize("cache_bytes", [0, 5 * 3 * 16 * 16])
def test_the_cache_does_not_change_the_batches(dataset: Path, cache_bytes: int) -> None:
    loader, reference = DBRLoader(dataset, 5, cache_bytes=cache_bytes), DBRLoader(dataset, 5)
    for _ in range(2):
        assert epoch_keys(loader) == epoch_keys(reference)


@pytest.mark.parametrize(("batch_size", "decoded"), [(3, PAIRS), (12, PAIRS), (4, PAIRS + 4)])
def test_an_image_is_decoded_once_where_batches_align_with_cycles(
    dataset: Path, monkeypatch: pytest.MonkeyPatch, batch_size: int, decoded: int
) -> None:
    """Cycles of 3: batches of 4 cut two of the four cycles, and each part needs the other's images at its ends."""
    calls: list[int] = []

    def counted(data: bytes, size: int) -> Tensor:
        calls.append(size)
        return decode_image(data, size)

    monkeypatch.setattr(reading, "decode_image", counted)
    list(DBRLoader(dataset, batch_size, cache_bytes=0))
    assert len(calls) == decoded
    calls.clear()
    loader = DBRLoader(dataset, batch_size)
    for _ in range(2):
        list(loader)
    assert len(calls) == PAIRS


def test_the_users_random_state_is_left_alone(dataset: Path) -> None:
    before = torch.get_rng_state()
    for num_workers in (0, 1):
        list(DBRLoader(dataset, 5, num_workers=num_workers))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("batch_size", [1, 5, 6, 12])
def test_len_counts_the_batches(dataset: Path, batch_size: int, drop_last: bool) -> None:
    loader = DBRLoader(dataset, batch_size, drop_last=drop_last)
    assert len(loader) == len(list(loader)) == (PAIRS // batch_size if drop_last else -(-PAIRS // batch_size))


def test_ranks_share_an_epoch(dataset: Path) -> None:
    alone = columns(list(DBRLoader(dataset, PAIRS)))
    parts = [list(DBRLoader(dataset, 2, rank=rank, world_size=3)) for rank in range(3)]
    together = columns([batch for step in zip(*parts, strict=True) for batch in step])
    assert all(torch.equal(together[name], alone[name]) for name in alone)


WORLD_SIZES = (1, 2, 3, 4, 8)


@pytest.fixture
def windowed(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A dataset of 5 shards, of which two or one are a window: 100 pairs, so equal global batches leave a tail of 4."""
    monkeypatch.setattr(order, "WINDOW_SHARDS", (2, 2))
    path = tmp_path_factory.getbasetemp() / "windowed"
    return path if path.exists() else make_tiny_dataset(path, classes=4, ipc=25, shards=5, cycle=4)


def global_batches(path: Path, world_size: int, num_workers: int, state: dict[str, object]) -> list[DBRBatch]:
    """The batches of all ranks together, step by step, of what is left of the epoch: 24 pairs in each."""
    parts = []
    for rank in range(world_size):
        loader = DBRLoader(path, 24 // world_size, num_workers=num_workers, rank=rank, world_size=world_size)
        loader.load_state_dict({**loader.state_dict(), **state})
        parts.append(list(loader))
    return [
        batch_of({name: column.contiguous() for name, column in columns(list(step)).items()})
        for step in zip(*parts, strict=True)
    ]


def tail_joined(batches: list[DBRBatch]) -> list[tuple[bytes, ...]]:
    """As keys; where a tail of less than a pair a rank is a batch of its own, joined to the one before."""
    return [*map(key, batches[:3]), key(batch_of(columns(batches[3:])))]


@pytest.mark.parametrize("num_workers", range(5))
def test_global_batches_depend_neither_on_ranks_nor_on_workers(windowed: Path, num_workers: int) -> None:
    expected = tail_joined(global_batches(windowed, 1, 0, {}))
    for world_size in WORLD_SIZES:
        assert tail_joined(global_batches(windowed, world_size, num_workers, {})) == expected


def test_a_state_after_every_batch_is_restored_into_other_world_sizes(windowed: Path) -> None:
    loader = DBRLoader(windowed, 7)
    whole = columns(list(loader))
    loader.set_epoch(0)
    for _ in loader:
        state = json.loads(json.dumps(loader.state_dict()))
        left = slice(state["pairs"], None)
        for world_size in WORLD_SIZES if state["pairs"] <= 100 - 8 else ():
            rest = columns(global_batches(windowed, world_size, 0, state))
            assert all(torch.equal(rest[name], whole[name][left]) for name in whole)


def test_only_the_shards_of_the_windows_at_hand_are_open(windowed: Path) -> None:
    with open_dataset(windowed) as dataset:
        pairs = ShardPairs(pairs_per_shard=(20,) * 5, cycle=4)
        reader = reading.BatchReader(dataset, None, shards=pairs, seed=0, replay_here=True, cache_bytes=0, slots=None)
        windows = EpochOrder(0, 0, pairs).windows
        assert [len(window) for window in windows] == [2, 2, 1]
        for start in range(0, 100, 10):
            first, last = start // 40, (start + 9) // 40
            assert not isinstance(reader[0, start, start + 10, None], Exception)
            needed = {shard for window in windows[first : last + 1] for shard in window}
            assert reader._records.keys() <= needed
            assert dataset.shards._open.keys() <= needed


def test_epochs_advance_by_themselves_and_as_set(dataset: Path) -> None:
    loader = DBRLoader(dataset, 5)
    by_themselves = [epoch_keys(loader) for _ in range(EPOCHS)]
    assert len({tuple(epoch) for epoch in by_themselves}) == EPOCHS
    other = DBRLoader(dataset, 5)
    for epoch in (2, 0, 1, 1):
        other.set_epoch(epoch)
        assert epoch_keys(other) == by_themselves[epoch]
        assert other.epoch == epoch + 1


def test_a_new_iteration_after_a_break_starts_the_epoch_again(dataset: Path) -> None:
    for num_workers in (0, 1):
        loader = DBRLoader(dataset, 5, num_workers=num_workers)
        first = key(next(iter(loader)))
        again = epoch_keys(loader)
        assert again[0] == first
        assert len(again) == len(loader)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_later_iteration_ends_the_one_before(dataset: Path, num_workers: int) -> None:
    whole = epoch_keys(DBRLoader(dataset, 3))
    loader = DBRLoader(dataset, 3, num_workers=num_workers)
    first, second = iter(loader), iter(loader)
    assert [key(next(second)), key(next(first))] == whole[:1] * 2
    with pytest.raises(ConfigError, match="was ended by a later one over the same loader; use a loader for each"):
        next(second)
    assert loader.state_dict()["pairs"] == 3
    assert [key(batch) for batch in first] == whole[1:]
    stale, taken = iter(loader), []
    next(stale)
    for number, batch in enumerate(loader):
        taken.append(key(batch))
        if number == 1:
            with pytest.raises(ConfigError):
                next(stale)
            assert loader.state_dict()["pairs"] == 6
    assert len(taken) == len(whole)
    assert loader.epoch == 2


def test_an_iteration_that_has_given_nothing_ends_no_other(dataset: Path) -> None:
    loader = DBRLoader(dataset, 3)
    running = iter(loader)
    taken = [key(next(running))]
    iter(loader)
    assert taken + [key(batch) for batch in running] == epoch_keys(DBRLoader(dataset, 3))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_place_that_is_named_inside_a_loop_ends_it_and_stays(dataset: Path, num_workers: int) -> None:
    whole = DBRLoader(dataset, 3)
    epochs = [epoch_keys(whole) for _ in range(EPOCHS)]
    loader = DBRLoader(dataset, 3, num_workers=num_workers)
    taken = []
    for batch in loader:
        taken.append(key(batch))
        loader.set_epoch(2 if len(taken) == 2 else loader.epoch)
    assert taken == epochs[0][:2]
    assert (loader.epoch, loader.state_dict()["pairs"]) == (2, 0)
    taken.clear()
    for batch in loader:
        taken.append(key(batch))
        if len(taken) == len(loader):
            resumed_at(loader, {"epoch": 1, "pairs": 6})
    assert taken == epochs[2]
    assert (loader.epoch, loader.state_dict()["pairs"]) == (1, 6)
    assert epoch_keys(loader) == epochs[1][2:]


def test_a_loaded_position_stays_the_epochs_start_until_it_ends(dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = DBRLoader(dataset, 3)
    first, second = epoch_keys(whole), epoch_keys(whole)
    loader = resumed_at(DBRLoader(dataset, 3, cache_bytes=0), {"pairs": 6})
    with monkeypatch.context() as broken:
        broken.setattr(reading, "decode_image", fail)
        with pytest.raises(RuntimeError, match="no memory"):
            next(iter(loader))
    assert loader.state_dict()["pairs"] == 6
    assert key(next(iter(loader))) == first[2]
    assert loader.state_dict()["pairs"] == 9
    assert epoch_keys(loader) == first[2:]
    assert epoch_keys(loader) == second


@pytest.mark.parametrize("drop_last", [False, True])
def test_a_loop_that_stops_at_the_last_batch_has_had_the_epoch(dataset: Path, drop_last: bool) -> None:
    whole = DBRLoader(dataset, 5, drop_last=drop_last)
    epochs = [epoch_keys(whole) for _ in range(EPOCHS)]
    loader = DBRLoader(dataset, 5, drop_last=drop_last)
    for epoch in range(EPOCHS):
        given = [key(batch) for batch in islice(loader, len(loader))]
        assert given == epochs[epoch]
        assert loader.state_dict()["epoch"] == epoch
    loader.set_epoch(EPOCHS - 1)  # the one just had, again
    assert epoch_keys(loader) == epochs[-1]


def test_past_the_stored_epochs_they_repeat_in_a_new_order_with_one_warning(dataset: Path) -> None:
    loader = DBRLoader(dataset, 5, seed=1)
    stored = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3 * EPOCHS):
            stored.append(columns(list(loader)))
    assert [str(w.message) for w in caught if w.category is UserWarning] == [
        "epoch 3: the dataset stores 3 epochs, so views, mixes and distances repeat from here, in a new order"
    ]
    sums = [round(epoch["distance_org"].double().sum().item(), 4) for epoch in stored]
    assert sorted(sums[:3]) == sorted(sums[3:6]) == sorted(sums[6:])
    orders = [tuple(epoch["distance_org"].tolist()) for epoch in stored]
    assert len(set(orders)) == 3 * EPOCHS


@pytest.mark.parametrize("num_workers", [0, 1])
def test_restoring_before_every_batch_gives_all_that_remains(dataset: Path, num_workers: int) -> None:
    loader = DBRLoader(dataset, 5, num_workers=num_workers)
    states, batches = [loader.state_dict()], []
    for _ in range(2):
        for batch in loader:
            batches.append(key(batch))
            states.append(json.loads(json.dumps(loader.state_dict())))
        states[-1] = loader.state_dict()  # after the loop: the same position, named by the next epoch
    restored = DBRLoader(dataset, 5, num_workers=num_workers)
    for position, state in enumerate(states):
        restored.load_state_dict(state)
        rest: list[tuple[bytes, ...]] = []
        while restored.epoch < 2:
            rest += epoch_keys(restored)
        assert rest == batches[position:]


def test_a_state_taken_after_the_last_batch_leaves_nothing_of_the_epoch(dataset: Path) -> None:
    loader = DBRLoader(dataset, 5)
    for _ in loader:
        state = loader.state_dict()
    assert (state["epoch"], state["pairs"]) == (0, PAIRS)
    loader.load_state_dict(state)
    assert list(loader) == []
    assert loader.epoch == 1


def test_a_state_taken_at_the_last_batch_of_a_loop_leads_to_the_next_epoch(dataset: Path) -> None:
    loader = DBRLoader(dataset, 5)
    list(islice(loader, len(loader)))
    resumed = DBRLoader(dataset, 5)
    resumed.load_state_dict(loader.state_dict())
    assert epoch_keys(resumed) == []
    assert epoch_keys(resumed) == epoch_keys(loader)


def test_setting_the_loaded_epoch_keeps_the_position_and_another_drops_it(dataset: Path) -> None:
    loader = DBRLoader(dataset, 5)
    whole = epoch_keys(loader)
    loader.load_state_dict({**loader.state_dict(), "epoch": 0, "pairs": 5})
    loader.set_epoch(0)
    assert epoch_keys(loader) == whole[1:]
    loader.load_state_dict({**loader.state_dict(), "epoch": 1, "pairs": 5})
    loader.set_epoch(0)
    assert epoch_keys(loader) == whole


def test_a_resume_with_other_ranks_and_batch_size_covers_the_rest(dataset: Path) -> None:
    whole = columns(list(DBRLoader(dataset, PAIRS)))
    first = DBRLoader(dataset, 2, rank=0, world_size=2)
    next(batches := iter(first))
    state = first.state_dict()
    batches.close()  # type: ignore[attr-defined]
    assert state["pairs"] == 4
    parts = []
    for rank in range(3):
        loader = DBRLoader(dataset, 1, rank=rank, world_size=3)
        loader.load_state_dict(state)
        parts.append(list(loader))
    rest = columns([batch for step in zip(*parts, strict=True) for batch in step])
    assert all(torch.equal(rest[name], whole[name][4:]) for name in whole)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_rest_too_small_for_each_rank_is_left_out(dataset: Path, num_workers: int) -> None:
    loader = DBRLoader(dataset, 1, rank=3, world_size=4, num_workers=num_workers)
    second = epoch_keys(resumed_at(loader, {"epoch": 1}))
    assert epoch_keys(resumed_at(loader, {"epoch": 0, "pairs": PAIRS - 3})) == []
    assert (loader.epoch, loader.state_dict()["pairs"]) == (1, 0)
    assert epoch_keys(loader) == second


def test_a_state_of_another_dataset_is_refused_with_both_ids(dataset: Path, tmp_path: Path) -> None:
    other = DBRLoader(make_tiny_dataset(tmp_path / "other", seed=1), 5)
    loader = DBRLoader(dataset, 5)
    with pytest.raises(ConfigError) as caught:
        loader.load_state_dict(other.state_dict())
    assert str(other.state_dict()["dataset_id"]) in str(caught.value)
    assert str(loader.state_dict()["dataset_id"]) in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 8}, "seed is 8, expected 0"),
        ({"version": 1}, "version is 1, expected 2"),
        ({"skipped": ["shard-00001.tar"]}, r"skipped is \['shard-00001.tar'\], expected \[\]"),
        ({"format": "other"}, "format is 'other', expected 'nrrdd-loader'"),
        ({"epoch": -1}, "epoch is -1, expected an integer from 0"),
        ({"epoch": True}, "epoch is True"),
        ({"pairs": PAIRS + 1}, "pairs is 13, expected an integer from 0 to 12"),
        ({"pairs": 1.5}, "pairs is 1.5"),
        ({"pairs": None}, "pairs is None"),
    ],
)
def test_a_wrong_state_is_refused_and_changes_nothing(dataset: Path, change: dict[str, object], message: str) -> None:
    loader = DBRLoader(dataset, 5)
    before = loader.state_dict()
    with pytest.raises(ConfigError, match=message):
        loader.load_state_dict({**before, **change})
    assert loader.state_dict() == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size: found 0"),
        ({"seed": -1}, "seed: found -1"),
        ({"num_workers": -1}, "num_workers: found -1"),
        ({"cache_bytes": -1}, "cache_bytes: found -1"),
        ({"batch_size": 2.5}, "batch_size: found 2.5, expected a whole number, 1 or more"),
        ({"batch_size": "4"}, "batch_size: found '4'"),
        ({"seed": 1.5}, "seed: found 1.5"),
        ({"num_workers": 1.5}, "num_workers: found 1.5"),
        ({"timeout": "3"}, "timeout: found '3'"),
        ({"rank": 0.0, "world_size": 1}, "rank 0.0 of world_size 1"),
        ({"rank": 0}, "rank 0 of world_size None: expected both"),
        ({"rank": 2, "world_size": 2}, "rank 2 of world_size 2"),
        ({"rank": 0, "world_size": PAIRS + 1}, "12 pairs in an epoch for 13 processes"),
        ({"batch_size": PAIRS + 1, "drop_last": True}, "drop_last leaves no batch"),
        ({"device": "toaster"}, "device: "),
    ],
)
def test_options_that_cannot_work_are_refused(dataset: Path, options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        DBRLoader(dataset, **{"batch_size": 5, **options})  # type: ignore[arg-type]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_without_a_gpu_is_refused(dataset: Path) -> None:
    with pytest.raises(ConfigError, match="device: found 'cuda', but torch sees no GPU"):
        DBRLoader(dataset, 5, device="cuda")


def test_a_missing_dataset_and_an_empty_one_are_refused(dataset: Path, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"dataset\.json"):
        DBRLoader(tmp_path / "nothing", 5)
    manifest = open_dataset(dataset).manifest
    replace(manifest, shards=(), images=replace(manifest.images, count=0)).save(tmp_path / "dataset.json")
    with pytest.raises(ConfigError, match="lists no shards"):
        DBRLoader(tmp_path, 5)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_damaged_image_is_named(tmp_path: Path, num_workers: int) -> None:
    path = make_tiny_dataset(tmp_path / "damaged")
    shard = path / "shard-00001.tar"
    data = bytearray(shard.read_bytes())
    place = data.index(b"\x89PNG")
    data[place + 60] ^= 1
    shard.write_bytes(bytes(data))
    with pytest.raises(FormatError) as caught:
        list(DBRLoader(path, 5, num_workers=num_workers))
    assert caught.value.path == str(shard)
    assert caught.value.member is not None
    assert caught.value.member.endswith(".png")
    assert "\n" not in str(caught.value)


def test_an_image_of_another_size_is_named(tmp_path: Path) -> None:
    path = make_tiny_dataset(tmp_path / "resized")
    manifest = open_dataset(path).manifest
    replace(manifest, images=replace(manifest.images, size=17)).save(path / "dataset.json")
    with pytest.raises(FormatError, match=r"member '\d+_c\d+\.png': image of 16x16 pixels, expected 17x17"):
        list(DBRLoader(path, 5))


def test_the_dataset_info(dataset: Path) -> None:
    info = DBRLoader(dataset, 5).dataset_info
    assert info.class_names == ("class 0", "class 1", "class 2")
    assert (info.size, info.mean, info.std) == (16, (0.5, 0.4, 0.3), (0.2, 0.25, 0.3))
    assert (info.temperature, info.teacher.architecture) == (1.0, "conv3")


@pytest.mark.gpu
@pytest.mark.parametrize("num_workers", [0, 1])
def test_replay_on_a_gpu_agrees_with_the_cpu(dataset: Path, num_workers: int) -> None:
    on_cpu = columns(list(DBRLoader(dataset, 5)))
    batches = list(DBRLoader(dataset, 5, device="cuda", num_workers=num_workers, pin_memory=True))
    assert all(batch.images.device.type == "cuda" for batch in batches)
    on_gpu = columns([batch.to("cpu") for batch in batches])
    assert (on_gpu.pop("images") - on_cpu["images"]).abs().max() <= 1.01 / (255 * 0.2)
    assert all(torch.equal(column, on_cpu[name]) for name, column in on_gpu.items())


def children(pid: int) -> set[int]:
    """The living children of a process."""
    found = set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = stat.read_text().rpartition(")")[2].split()[:2]
        except OSError:
            continue
        if int(parent) == pid and state != "Z":
            found.add(int(stat.parent.name))
    return found


needs_proc = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds processes through /proc")


SCRIPT_HEAD = f"import sys\nsys.path.insert(0, {str(Path(__file__).resolve().parent.parent)!r})\n"

KILL_SCRIPT = SCRIPT_HEAD + textwrap.dedent("""
    import multiprocessing, os, signal
    from loaders import DBRLoader
    from nrrdd_format.errors import NrrddError
    loader = DBRLoader(sys.argv[1], 1, num_workers=1)
    def iterate(kill):
        loader.set_epoch(0)
        try:
            count = 0
            for _ in loader:
                count += 1
                for worker in multiprocessing.active_children() if kill else []:
                    os.kill(worker.pid, signal.SIGKILL)
            return str(count)
        except (NrrddError, RuntimeError) as error:
            return str(error)
    print(iterate(kill=True))
    print(iterate(kill=False))
    print(iterate(kill=False))
""")


def test_a_killed_worker_gives_an_error_and_the_loader_recovers(dataset: Path) -> None:
    """In a process of its own: torch notices in the loader or, by a signal handler, anywhere in the main program."""
    command = [sys.executable, "-c", KILL_SCRIPT, str(dataset)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=200, check=True)
    killed, *after = result.stdout.splitlines()
    assert "DataLoader worker" in killed or "a loader process has died" in killed
    assert after[-1] == str(PAIRS)  # the first one still fails where the loop's body learned of the death


def test_what_a_worker_raises_is_not_taken_for_its_death(dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "decode_image", fail)
    with pytest.raises(RuntimeError, match="no memory for this tensor"):
        list(DBRLoader(dataset, 5, num_workers=1))


def test_computed_numbers_give_a_plain_state(dataset: Path) -> None:
    """NumPy's integers come from computed sizes."""
    numbers: dict[str, Any] = {name: np.int64(k) for name, k in {"seed": 3, "rank": 0, "world_size": 2}.items()}
    loader, resumed = (DBRLoader(dataset, np.int64(3), **numbers) for _ in range(2))  # type: ignore[arg-type]
    assert len(loader) == PAIRS // 6
    loader.set_epoch(np.int64(1))  # type: ignore[arg-type]
    _, *rest = epoch_keys(loader)
    loader.set_epoch(1)
    next(iter(loader))
    state = loader.state_dict()
    assert {type(value) for value in state.values()} == {str, int, list}
    assert json.loads(json.dumps(state)) == state
    assert epoch_keys(resumed_at(resumed, state)) == rest


@needs_proc
def test_an_interrupt_leaves_no_processes(dataset: Path) -> None:
    script = SCRIPT_HEAD + textwrap.dedent("""
        import time
        from loaders import DBRLoader
        for _ in DBRLoader(sys.argv[1], 1, num_workers=2):
            print("started", flush=True)
            time.sleep(60)
    """)
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(dataset)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "started\n"
    workers = children(process.pid)
    assert len(workers) >= 2
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    _, errors = process.communicate(timeout=60)
    assert "KeyboardInterrupt" in errors
    assert not any(Path(f"/proc/{worker}").exists() for worker in workers)


RANK_SCRIPT = SCRIPT_HEAD + textwrap.dedent("""
    import json
    import torch.distributed as dist
    from loaders import DBRLoader
    path, store, rank = sys.argv[1:]
    dist.init_process_group("gloo", init_method="file://" + store, rank=int(rank), world_size=2)
    taken = []
    def take(batch):
        dist.barrier()
        taken.append([batch.distance_org.tolist(), batch.images.double().sum().item()])
    first = DBRLoader(path, 1)
    for _, batch in zip(range(2), first):
        take(batch)
    states = [None, None]
    dist.all_gather_object(states, first.state_dict())
    assert states[0] == states[1], states
    resumed = DBRLoader(path, 1)
    resumed.load_state_dict(states[0])
    for batch in resumed:
        take(batch)
    print(json.dumps({"len": len(resumed), "taken": taken}))
    dist.destroy_process_group()
""")


def test_two_processes_share_an_epoch_and_resume(dataset: Path, tmp_path: Path) -> None:
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", RANK_SCRIPT, str(dataset), str(tmp_path / "store"), str(rank)],
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    printed = [process.communicate(timeout=200)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    results = [json.loads(text.splitlines()[-1]) for text in printed]
    assert [result["len"] for result in results] == [PAIRS // 2] * 2
    together = [pair for step in zip(*(result["taken"] for result in results), strict=True) for pair in step]
    alone = [[batch.distance_org.tolist(), batch.images.double().sum().item()] for batch in DBRLoader(dataset, 1)]
    assert together == alone
