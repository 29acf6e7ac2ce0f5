"""Replay against plain references: views, mixes and normalisation, the batched form against the one by one form."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mix_gradients import mix_gradients
from torch import Tensor

from nrrdd_format import replay as module
from nrrdd_format.codebooks import MixTable, mix_codebook, view_codebook
from nrrdd_format.pairs import PairRecords, RecordLayout, draw_pairs
from nrrdd_format.replay import (
    PairTensors,
    apply_views,
    mix,
    normalize,
    plan_batch,
    replay,
    stack_images,
)

MEAN, STD = (0.48, 0.45, 0.4), (0.23, 0.22, 0.25)


def random_images(count: int, size: int, seed: int = 0) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (count, 3, size, size), generator=rng, dtype=torch.uint8)
    return stack_images(list(images))


def random_pairs(size: int, *, images: int = 12, kind: str = "both", seed: int = 0) -> PairTensors:
    plan = plan_batch([(0, drawn_records(size, images=images, kind=kind, seed=seed))])
    return plan.with_images(random_images(images, size, seed))


def drawn_records(size: int, *, images: int = 12, kind: str = "both", seed: int = 0) -> PairRecords:
    layout = RecordLayout(
        images=images,
        pairs=images,
        classes=3,
        size=size,
        cycle=4,
        mix_group=2,
        block_epochs=1,
        flip=True,
        coding="explicit",
        seed=seed,
        views=view_codebook(seed, size, (0.1, 1.0), count=64),
        mixes=MixTable.from_entries(mix_codebook(seed, size, kind, count=32), size),  # type: ignore[arg-type]
        levels=np.array([0.1, 1.0], np.float32),
    )
    return draw_pairs(layout, 0, 0)


def reference_view(image: Tensor, box: list[int], flip: bool) -> Tensor:
    """float64 bilinear sampling, written out pixel by pixel."""
    size = image.shape[-1]
    top, left, height, width = box
    crop = image[:, top : top + height, left : left + width].double()

    def along(length: int) -> tuple[Tensor, Tensor, Tensor]:
        position = ((torch.arange(size).double() + 0.5) * length / size - 0.5).clamp(0, length - 1)
        low = position.floor().long()
        return low, (low + 1).clamp(max=length - 1), position - low

    row, next_row, down = along(height)
    column, next_column, right = along(width)
    down = down[:, None]
    upper = crop[:, row][:, :, column] * (1 - right) + crop[:, row][:, :, next_column] * right
    lower = crop[:, next_row][:, :, column] * (1 - right) + crop[:, next_row][:, :, next_column] * right
    view = upper * (1 - down) + lower * down
    return view.flip(2) if flip else view


@pytest.mark.parametrize("form", [apply_views, module._views_batched])
@pytest.mark.parametrize("size", [2, 7, 32])
def test_views_match_a_float64_reference_within_one_level(form: Callable[..., Tensor], size: int) -> None:
    pairs = random_pairs(size)
    views = form(pairs.images, pairs.boxes, pairs.flips)
    assert views.dtype == torch.uint8
    for view, image, box, flip in zip(views, pairs.images, pairs.boxes.tolist(), pairs.flips.tolist(), strict=True):
        assert (view.double() - reference_view(image, box, flip)).abs().max() <= 1


def test_views_of_floating_point_images_are_not_rounded_and_let_gradients_through() -> None:
    pairs = random_pairs(16)
    images = pairs.images.double().requires_grad_(True)
    views = apply_views(images, pairs.boxes, pairs.flips)
    for view, image, box, flip in zip(views, pairs.images, pairs.boxes.tolist(), pairs.flips.tolist(), strict=True):
        assert (view - reference_view(image, box, flip)).abs().max() < 0.01
    (gradient,) = torch.autograd.grad(views.sum(), images)
    assert (gradient != 0).any(3).any(2).any(1).all()


@given(seed=st.integers(0, 2**20), size=st.integers(2, 40))
def test_batched_views_agree_with_one_by_one_within_one_level(seed: int, size: int) -> None:
    pairs = random_pairs(size, images=4, seed=seed)
    one_by_one = apply_views(pairs.images, pairs.boxes, pairs.flips)
    batched = module._views_batched(pairs.images, pairs.boxes, pairs.flips)
    assert (one_by_one.int() - batched.int()).abs().max() <= 1


@pytest.mark.parametrize("form", [apply_views, module._views_batched])
def test_the_whole_image_is_kept_exactly_and_flips_exactly(form: Callable[..., Tensor]) -> None:
    images = random_images(2, 9)
    boxes = torch.tensor([[0, 0, 9, 9]] * 2)
    views = form(images, boxes, torch.tensor([False, True]))
    assert torch.equal(views[0], images[0])
    assert torch.equal(views[1], images[1].flip(2))


@pytest.mark.parametrize("form", [apply_views, module._views_batched])
def test_a_crop_does_not_see_its_surroundings(form: Callable[..., Tensor]) -> None:
    images = torch.full((1, 3, 8, 8), 255, dtype=torch.uint8)
    images[:, :, 2:5, 3:7] = 10
    assert torch.equal(form(images, torch.tensor([[2, 3, 3, 4]]), torch.tensor([False])), torch.full_like(images, 10))


def test_cutmix_pastes_exactly_the_box() -> None:
    views = random_images(2, 8)
    mixed = mix(
        views,
        torch.tensor([0]),
        torch.tensor([1]),
        torch.tensor([True]),
        torch.tensor([[1, 2, 3, 4]]),
        torch.tensor([1 - 12 / 64]),
    )
    expected = views[0].float()
    expected[:, 1:4, 2:6] = views[1, :, 1:4, 2:6].float()
    assert mixed.dtype == torch.float32
    assert torch.equal(mixed[0], expected)


def test_mixup_is_the_weighted_sum() -> None:
    views = random_images(2, 8)
    zeros = torch.zeros(1, 4, dtype=torch.int64)
    mixed = mix(views, torch.tensor([1]), torch.tensor([0]), torch.tensor([False]), zeros, torch.tensor([0.25]))
    torch.testing.assert_close(mixed[0], 0.25 * views[1].float() + 0.75 * views[0].float())


def test_gradients_flow_through_the_mix_of_floating_point_views() -> None:
    views = torch.rand(2, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    pair = (torch.tensor([0]), torch.tensor([1]))
    box = torch.tensor([[0, 0, 2, 4]])
    mixed = mix(views, *pair, torch.tensor([True]), box, torch.tensor([0.5]))
    assert mixed.dtype == torch.float64
    mixed.sum().backward()  # type: ignore[no-untyped-call]
    assert views.grad is not None
    assert torch.equal(views.grad[:, 0, :, 0], torch.tensor([[0.0, 0, 1, 1], [1, 1, 0, 0]], dtype=torch.float64))


def test_normalize_by_channel() -> None:
    images = random_images(2, 5)
    for layout in (images, images.contiguous()):
        result = normalize(layout, MEAN, STD)
        for channel in range(3):
            expected = (images[:, channel].double() / 255 - MEAN[channel]) / STD[channel]
            torch.testing.assert_close(result[:, channel].double(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["cutmix", "mixup", "both"])
def test_replay_is_view_then_mix_then_normalize(kind: str) -> None:
    pairs = random_pairs(16, kind=kind)
    views = apply_views(pairs.images, pairs.boxes, pairs.flips)
    mixed = mix(views, pairs.org, pairs.aug, pairs.is_cutmix, pairs.mix_box, pairs.lam)
    result = replay(pairs, mean=MEAN, std=STD)
    assert result.shape == (12, 3, 16, 16)
    assert result.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(result, normalize(mixed, MEAN, STD), rtol=0, atol=1e-5)


def test_one_by_one_takes_an_image_when_it_is_needed_and_lets_its_view_go_after_its_last_pair() -> None:
    plan = plan_batch([(0, drawn_records(16, images=40))])
    images = random_images(40, 16)
    alive: list[weakref.ref[np.ndarray]] = []
    most = 0

    def taken() -> Iterator[Tensor]:
        nonlocal most
        for image in images:
            memory = image.permute(1, 2, 0).numpy().copy()
            alive.append(weakref.ref(memory))
            yield torch.from_numpy(memory).permute(2, 0, 1)
            del memory
            most = max(most, sum(one() is not None for one in alive))

    whole = dataclasses.replace(plan, boxes=np.tile([0, 0, 16, 16], (40, 1)), flips=np.zeros(40, bool))
    expected = replay(whole.with_images(images), mean=MEAN, std=STD)
    out = torch.empty_like(expected)
    module.replay_one_by_one(whole, taken(), mean=MEAN, std=STD, out=out)
    assert torch.equal(out, expected)
    assert most <= 6  # a cycle of four, and what is on its way


def test_replay_leaves_its_input_alone() -> None:
    pairs = random_pairs(8)
    before = pairs.images.clone()
    replay(pairs, mean=MEAN, std=STD)
    assert torch.equal(pairs.images, before)


@pytest.mark.gpu
def test_the_gpu_agrees_with_the_cpu() -> None:
    pairs = random_pairs(64)
    on_gpu = replay(pairs.to("cuda"), mean=MEAN, std=STD).cpu()
    on_cpu = replay(pairs, mean=MEAN, std=STD)
    assert (on_gpu - on_cpu).abs().max() <= 1.01 / (255 * min(STD))


def test_a_plan_holds_each_image_once_in_the_order_of_first_use() -> None:
    records = drawn_records(16)
    first, second = records.take(np.arange(5)), records.take(np.arange(5, 12))
    plan = plan_batch([(3, first), (1, second), (3, records.take(np.array([0])))])
    used = np.stack([plan.org, plan.aug], axis=1).reshape(-1)
    assert list(dict.fromkeys(used.tolist())) == list(range(len(plan.image)))  # in the order of first use
    keys = list(zip(plan.shard.tolist(), plan.image.tolist(), strict=True))
    assert len(set(keys)) == len(keys)
    pairs = [(3, first, t) for t in range(5)] + [(1, second, t) for t in range(7)] + [(3, first, 0)]
    for position, (shard, part, t) in enumerate(pairs):
        org, aug = plan.org[position], plan.aug[position]
        assert keys[org] == (shard, part.index_org[t])
        assert keys[aug] == (shard, part.index_aug[t])
        assert plan.boxes[org].tolist() == part.view_org[t].tolist()
        assert plan.boxes[aug].tolist() == part.view_aug[t].tolist()
        assert (plan.flips[org], plan.flips[aug]) == (part.flip_org[t], part.flip_aug[t])
        assert plan.mix_box[position].tolist() == part.mix_box[t].tolist()
        assert (plan.is_cutmix[position], plan.lam[position]) == (part.is_cutmix[t], part.lam[t])


def test_a_pair_looks_the_same_in_every_batch() -> None:
    records = drawn_records(16)
    images = random_images(12, 16)

    def replayed(part: PairRecords) -> Tensor:
        plan = plan_batch([(0, part)])
        return replay(plan.with_images(images[torch.from_numpy(plan.image)]), mean=MEAN, std=STD)

    together = replayed(records)
    alone = torch.cat([replayed(records.take(np.array([t]))) for t in range(12)])
    assert torch.equal(together, alone)


def test_moving_keeps_every_field() -> None:
    pairs = random_pairs(8)
    moved = pairs.to("cpu")
    assert replace(moved, images=pairs.images) is not pairs
    assert all(torch.equal(getattr(moved, name), getattr(pairs, name)) for name in vars(pairs))


def test_the_gradient_of_a_mix_is_the_same_every_time() -> None:
    """With several threads, too, and where an image stands in many pairs: refinement gives the same bytes again."""
    gradients = mix_gradients(mix)
    assert all(torch.equal(gradient, gradients[0]) for gradient in gradients)
