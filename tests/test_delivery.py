"""Shared memory that carries batches from workers to the training loop: used again, and never while it is in use."""

from __future__ import annotations

import gc
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from make_dataset import make_tiny_dataset

from loaders import DBRBatch, DBRLoader
from loaders.delivery import Pixels, Slots, room

SIZE = 4
PIXELS = Pixels(count=2, size=SIZE, dtype=torch.float32)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_dataset(tmp_path_factory.mktemp("delivery") / "tiny", epochs=3)


def slots_of(loader: DBRLoader) -> Slots:
    """Those of a loader whose first iteration has begun, and was given up."""
    next(iter(loader))
    assert loader._slots is not None
    return loader._slots


def same(one: DBRBatch, other: DBRBatch) -> bool:
    return torch.equal(one.images, other.images) and torch.equal(one.distance_aug, other.distance_aug)


@given(data=st.data())
def test_a_slot_is_lent_to_one_batch_at_a_time(data: st.DataObject) -> None:
    slots = Slots(3, PIXELS.nbytes, shared=False)
    asked: list[int | None] = []
    alive: dict[int, torch.Tensor] = {}
    for _ in range(data.draw(st.integers(1, 30))):
        step = data.draw(st.sampled_from(["ask", "receive", "fail", "drop", "forget"]))
        if step == "ask":
            slot = slots.reserve()
            assert (slot is None) == (len(alive) + sum(of is not None for of in asked) == 3)
            assert slot is None or (slot not in alive and slot not in asked)
            asked.append(slot)
        elif step in ("receive", "fail") and asked:
            slot = asked.pop(0)
            if slot is not None:
                room(slots.memory, slot, PIXELS).fill_(slot)
            images = slots.received(PIXELS if step == "receive" else None)
            assert (images is None) == (slot is None or step == "fail")
            if slot is not None and images is not None:
                alive[slot] = images[1:, :, 1:]  # any view keeps the slot
                del images
        elif step == "drop" and alive:
            del alive[data.draw(st.sampled_from(sorted(alive)))]
        elif step == "forget":
            slots.forget()
            asked.clear()
        assert all(bool((images == slot).all()) for slot, images in alive.items())


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_a_slot_holds_images_channels_last(dtype: torch.dtype) -> None:
    pixels = Pixels(count=3, size=SIZE, dtype=dtype)
    slots = Slots(2, pixels.nbytes + 4, shared=True)
    slot = slots.reserve()
    assert slot is not None
    images = room(slots.memory, slot, pixels)
    assert images.shape == (3, 3, SIZE, SIZE)
    assert images.is_contiguous(memory_format=torch.channels_last)
    written = images.copy_(torch.arange(images.numel()).reshape(images.shape)).clone()
    received = slots.received(pixels)
    assert received is not None
    assert torch.equal(received, written)
    assert received.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_batches_lie_in_slots_that_are_used_again(dataset: Path, num_workers: int) -> None:
    loader = DBRLoader(dataset, 3, num_workers=num_workers)
    slots = slots_of(loader)
    count = len(slots.memory)
    for _ in range(3):
        places = {batch.images.data_ptr() for batch in loader}
        assert len(places) <= count
        assert places <= {row.data_ptr() for row in slots.memory}
        gc.collect()
        assert sorted(slots._free) == list(range(count))


def test_batches_that_are_kept_stay_as_they_are(dataset: Path) -> None:
    loader = DBRLoader(dataset, 1, num_workers=1)
    count = len(slots_of(loader).memory)
    kept = list(loader)
    assert len(kept) > count
    assert all(same(one, other) for one, other in zip(kept, DBRLoader(dataset, 1), strict=True))
    copy = pickle.loads(pickle.dumps(kept[0]))
    images = kept[0].images[:, :1]
    del loader, kept
    gc.collect()
    assert torch.equal(images, copy.images[:, :1])


def test_shared_memory_is_taken_once_when_the_first_iteration_begins(
    dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[int] = []
    new_shared: Callable[[int], torch.UntypedStorage] = torch.UntypedStorage._new_shared

    def noted(nbytes: int) -> torch.UntypedStorage:
        taken.append(nbytes)
        return new_shared(nbytes)

    monkeypatch.setattr(torch.UntypedStorage, "_new_shared", noted)
    loader = DBRLoader(dataset, 3, num_workers=1)
    loader.load_state_dict(loader.state_dict())
    iter(loader)
    assert taken == []
    slots = slots_of(loader)
    list(loader)
    assert taken == [slots.memory.nbytes]


def test_without_room_for_slots_batches_travel_in_torchs_way(dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(nbytes: int) -> torch.UntypedStorage:
        raise RuntimeError("unable to allocate shared memory(shm)")

    expected = list(DBRLoader(dataset, 3))
    monkeypatch.setattr(torch.UntypedStorage, "_new_shared", full)
    with pytest.warns(
        UserWarning, match="no room for [0-9,]+ bytes of shared memory .* make /dev/shm larger"
    ) as caught:
        batches = list(DBRLoader(dataset, 3, num_workers=1))
    assert [warning.filename for warning in caught if "no room" in str(warning.message)] == [__file__]
    assert all(same(one, other) for one, other in zip(batches, expected, strict=True))


def test_slots_are_no_larger_than_the_dataset(dataset: Path) -> None:
    loader = DBRLoader(dataset, 10**9)
    assert slots_of(loader).memory.numel() < 10**6


def test_iterations_given_up_early_lose_no_slot(dataset: Path) -> None:
    expected = next(iter(DBRLoader(dataset, 1)))
    loader = DBRLoader(dataset, 1, num_workers=2)
    slots = slots_of(loader)
    for _ in range(2 * len(slots.memory)):
        batch = next(iter(loader))
        assert same(batch, expected)
        assert any(batch.images.data_ptr() == row.data_ptr() for row in slots.memory)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_a_tail_that_joins_the_last_batch_fits_into_a_slot(dataset: Path, world_size: int) -> None:
    for rank in range(world_size):
        for batch_size in range(1, 6):
            alone = DBRLoader(dataset, batch_size, rank=rank, world_size=world_size)
            loader = DBRLoader(dataset, batch_size, rank=rank, world_size=world_size, num_workers=1)
            assert all(same(one, other) for one, other in zip(loader, alone, strict=True))
