"""Shards that are bad before an epoch begins, and those found bad later: what one rank meets, all ranks raise."""

from __future__ import annotations

import multiprocessing
import os
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
import torch
import torch.distributed as dist
from faulty_server import serving
from make_dataset import make_tiny_dataset

from loaders import DBRLoader, order
from loaders.order import EpochOrder, ShardPairs
from nrrdd_format.dataset import open_dataset
from nrrdd_format.errors import ConfigError, FormatError, NrrddError

SHARDS = 4
PAIRS = 24
FORK = multiprocessing.get_context("fork")  # a started process would spend seconds on importing torch
Damage = Callable[[Path], object]


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    return make_tiny_dataset(tmp_path / "tiny", ipc=PAIRS // 3, shards=SHARDS)


def remove(shard: Path) -> None:
    shard.unlink()


def truncate(shard: Path) -> None:
    os.truncate(shard, 3000)


def alter(shard: Path) -> None:
    """One bit of an image."""
    data = bytearray(shard.read_bytes())
    data[data.index(b"\x89PNG") + 60] ^= 1
    shard.write_bytes(data)


def distances(loader: DBRLoader) -> list[float]:
    return [float(value) for batch in loader for value in batch.distance_org]


def skipping(path: Path | str, batch_size: int = 5, **options: Any) -> DBRLoader:
    """A loader that skips, its warning left out."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return DBRLoader(path, batch_size, on_bad_shard="skip", **options)


@pytest.mark.parametrize(("damage", "found"), [(remove, "No such file"), (truncate, "3000 bytes"), (alter, "sha256")])
def test_bad_shards_are_skipped_with_one_warning(dataset: Path, damage: Damage, found: str) -> None:
    damage(dataset / "shard-00002.tar")
    with pytest.warns(UserWarning) as caught:
        loader = DBRLoader(dataset, 5, on_bad_shard="skip")
        taken = distances(loader)
    (warning,) = caught
    assert str(warning.message).startswith("1 of 4 shards are bad and skipped (shard-00002.tar); the first: ")
    assert found in str(warning.message)
    assert warning.filename == __file__
    with open_dataset(dataset) as content:
        expected = [content.shards[k].records(0).distance_org for k in (0, 1, 3)]
    assert sorted(taken) == sorted(float(value) for column in expected for value in column)
    assert len(loader) == 4


def test_what_remains_has_the_order_of_the_remaining_shards(dataset: Path) -> None:
    whole = ShardPairs(pairs_per_shard=(6,) * SHARDS, cycle=3)
    places = EpochOrder(0, 0, replace(whole, skipped=frozenset({1}))).pairs(0)
    with open_dataset(dataset) as content:
        columns = torch.cat([torch.from_numpy(shard.records(0).distance_org) for shard in content.shards])
    alter(dataset / "shard-00001.tar")
    assert distances(skipping(dataset)) == columns[torch.from_numpy(places)].tolist()


def test_without_bad_shards_nothing_is_said_or_skipped(dataset: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert distances(DBRLoader(dataset, 5, on_bad_shard="skip")) == distances(DBRLoader(dataset, 5))


def test_a_dataset_of_bad_shards_is_refused(dataset: Path) -> None:
    for shard in dataset.glob("*.tar"):
        truncate(shard)
    with pytest.raises(ConfigError, match=r"on_bad_shard: every shard is bad, the first: .*shard-00000\.tar: "):
        DBRLoader(dataset, 5, on_bad_shard="skip")


def test_a_state_of_other_skipped_shards_is_refused(dataset: Path) -> None:
    before = DBRLoader(dataset, 5).state_dict()
    alter(dataset / "shard-00002.tar")
    loader = skipping(dataset)
    with pytest.raises(ConfigError, match=r"skipped is \[\], expected \['shard-00002.tar'\]"):
        loader.load_state_dict(before)
    loader.load_state_dict(loader.state_dict())


def test_a_shard_that_turns_bad_later_raises(dataset: Path) -> None:
    loader = DBRLoader(dataset, 5, on_bad_shard="skip")
    alter(dataset / "shard-00002.tar")
    with pytest.raises(FormatError, match=r"shard-00002\.tar, member .* the bytes are damaged"):
        list(loader)


# Several ranks: real processes, each with a copy of the dataset.


def run_ranks(folder: Path, train: Callable[[int, Path], object], world_size: int) -> list[Any]:
    """What `train(rank, copy of the dataset)` returns on each rank, or the error it raises; "ended" if it does not."""
    context = FORK.Manager()
    results = context.dict()
    arguments = (folder, train, world_size, results)
    processes = [FORK.Process(target=_one_rank, args=(rank, *arguments)) for rank in range(world_size)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode is not None, "a rank hangs"
    return [results.get(rank, "ended") for rank in range(world_size)]


def _one_rank(rank: int, folder: Path, train: Callable[[int, Path], object], world_size: int, results: Any) -> None:
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world_size)
    try:
        results[rank] = train(rank, folder / str(rank))
    except NrrddError as error:
        results[rank] = f"{type(error).__name__}: {error}"


def step_together(batch: Any) -> float:
    """What a training step does: no rank comes out before all are in."""
    total = batch.distance_org.sum()
    dist.all_reduce(total)
    return float(total)


def copies(dataset: Path, tmp_path: Path, world_size: int) -> None:
    for rank in range(world_size):
        copytree(dataset, tmp_path / str(rank))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_shard_found_bad_on_one_rank_raises_on_all(dataset: Path, tmp_path: Path, num_workers: int) -> None:
    copies(dataset, tmp_path, 3)
    alter(tmp_path / "1" / "shard-00000.tar")

    def train(rank: int, path: Path) -> int:
        return len([step_together(batch) for batch in DBRLoader(path, 1, num_workers=num_workers)])

    own, *others = sorted(run_ranks(tmp_path, train, 3))
    assert own.startswith(f"FormatError: {tmp_path}/1/shard-00000.tar, member ")
    assert others == [f"NrrddError: rank 1 cannot go on: {own.removeprefix('FormatError: ')}"] * 2


def test_skipping_is_agreed_by_all_ranks(dataset: Path, tmp_path: Path) -> None:
    copies(dataset, tmp_path, 2)
    alter(tmp_path / "0" / "shard-00003.tar")
    remove(tmp_path / "1" / "shard-00001.tar")

    def train(rank: int, path: Path) -> object:
        loader = skipping(path, 2)
        steps = [step_together(batch) for batch in loader]
        return loader.state_dict()["skipped"], steps

    first, second = run_ranks(tmp_path, train, 2)
    assert first == second
    assert first[0] == ["shard-00001.tar", "shard-00003.tar"]
    for damaged in ("shard-00001.tar", "shard-00003.tar"):
        truncate(dataset / damaged)
    alone = [float(batch.distance_org.sum()) for batch in skipping(dataset, 4)]
    assert first[1] == pytest.approx(alone)


def test_a_rank_that_cannot_look_for_bad_shards_ends_all(dataset: Path, tmp_path: Path) -> None:
    (tmp_path / "0").write_text("in the way of a cache")

    def train(rank: int, path: Path) -> object:
        skipping(server.url, 2, cache_dir=path, attempts=1)
        return "went on alone"

    with serving(dataset) as server:
        own, other = run_ranks(tmp_path, train, 2)
    assert own.startswith(f"OutputError: {tmp_path}/0/") and "cannot keep shards here" in own
    assert other == f"NrrddError: rank 0 cannot go on: {own.removeprefix('OutputError: ')}"


def test_ranks_that_read_different_things_are_refused(dataset: Path, tmp_path: Path) -> None:
    copies(dataset, tmp_path, 2)

    def train(rank: int, path: Path) -> object:
        return list(DBRLoader(path, 2, seed=rank))

    assert run_ranks(tmp_path, train, 2) == [
        "ConfigError: loader: seed is 0 here, 1 on rank 1; expected the same",
        "ConfigError: loader: seed is 1 here, 0 on rank 0; expected the same",
    ]


def test_ranks_that_load_different_states_later_are_refused(dataset: Path, tmp_path: Path) -> None:
    copies(dataset, tmp_path, 2)

    def train(rank: int, path: Path) -> object:
        loader = DBRLoader(path, 2)
        list(loader)
        loader.load_state_dict({**loader.state_dict(), "epoch": rank, "pairs": 0})
        return list(loader)

    assert run_ranks(tmp_path, train, 2) == [
        "ConfigError: loader: epoch is 0 here, 1 on rank 1; expected the same",
        "ConfigError: loader: epoch is 1 here, 0 on rank 0; expected the same",
    ]


def test_the_end_of_a_rank_ends_the_others(dataset: Path, tmp_path: Path) -> None:
    copies(dataset, tmp_path, 2)

    def train(rank: int, path: Path) -> object:
        for _ in DBRLoader(path, 2):
            if rank == 1:
                os._exit(1)
        return "went on alone"

    first, second = run_ranks(tmp_path, train, 2)
    assert first.startswith("NrrddError: the ranks cannot agree on the next batch (")
    assert second == "ended"


def test_ranks_given_by_hand_need_nobody(dataset: Path, tmp_path: Path) -> None:
    copies(dataset, tmp_path, 2)

    def train(rank: int, path: Path) -> int:
        return sum(len(batch) for batch in DBRLoader(path, 5, rank=0, world_size=1)) if rank == 0 else 0

    assert run_ranks(tmp_path, train, 2) == [PAIRS, 0]


def test_windows_of_the_remaining_shards(dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(order, "WINDOW_SHARDS", (2, 2))
    remove(dataset / "shard-00000.tar")
    assert len(distances(skipping(dataset))) == PAIRS - PAIRS // SHARDS
