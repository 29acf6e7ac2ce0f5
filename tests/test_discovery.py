"""Critical-based initial data discovery: crops, their scores, which patches are kept, tiling."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from builders import discovery
from builders.cam import ClassActivation, teacher_batch
from builders.config import Confidence, CropScore, DiscoverySettings, Init
from builders.discovery import Eyes, Pool, class_groups, discover_groups, random_crops, shrink, tile, top_crops
from builders.folders import list_classes
from builders.image_sets import ArrayImages, ImageSet
from builders.models import create_model
from builders.relabel import pairs_at_once
from nrrdd_format import draws
from nrrdd_format.errors import DataError
from nrrdd_format.replay import apply_views

SETTINGS = DiscoverySettings(ipc=2, beta=1, init="cidd", confidence="lowest", crop_score="mean")


def _discover(
    train: ImageSet, usable: list[list[int]], eyes: Eyes, settings: DiscoverySettings, seed: int = 0
) -> list[NDArray[np.uint8]]:
    groups = class_groups(len(usable), settings)
    found = [one for group in discover_groups(train, groups, usable, eyes, settings, seed) for one in group.classes]
    assert [one.label for one in found] == list(range(len(usable)))
    return [one.images for one in found]


def _images(count: int, size: int = 16) -> ArrayImages:
    pixels = np.random.default_rng(0).integers(0, 256, (count, size, size, 3), np.uint8)
    numbers = np.arange(count)
    return ArrayImages(pixels=pixels, labels=np.zeros(count, np.int64), numbers=numbers, prefix="train", size=size)


@pytest.fixture(scope="module")
def eyes() -> Eyes:
    torch.manual_seed(0)
    model = create_model("conv2-w8", 3, 16).eval().requires_grad_(False)
    return Eyes(
        activation=ClassActivation(model, 16), mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25), device=torch.device("cpu")
    )


def test_random_crops_are_square_inside_the_image_and_of_the_stated_areas() -> None:
    boxes = np.concatenate([random_crops(0, index, 64, SETTINGS) for index in range(200)])
    top, left, height, width = boxes.T
    assert (height == width).all()
    assert (top >= 0).all() and (left >= 0).all()
    assert (top + height <= 64).all() and (left + width <= 64).all()
    share = height * width / 64**2
    assert share.min() >= 0.07 and share.max() <= 1
    assert abs(share.mean() - 0.54) < 0.03  # uniform in (0.08, 1)


def test_random_crops_depend_on_the_image_and_the_seed_alone() -> None:
    first = random_crops(0, 7, 32, SETTINGS)
    np.testing.assert_array_equal(first, random_crops(0, 7, 32, SETTINGS))
    assert (first != random_crops(1, 7, 32, SETTINGS)).any()
    assert (first != random_crops(0, 8, 32, SETTINGS)).any()


@pytest.mark.parametrize(("score", "best"), [("mean", 0), ("sum", 1)])
def test_the_crop_score_decides_between_a_small_hot_crop_and_a_large_warm_one(score: CropScore, best: int) -> None:
    cam = torch.full((1, 8, 8), 0.5)
    cam[0, :2, :2] = 1.0
    boxes = torch.tensor([[[0, 0, 2, 2], [0, 0, 8, 8], [4, 4, 3, 3]]])
    image, kept = top_crops(cam, boxes, torch.tensor([1]), replace(SETTINGS, crop_score=score))
    assert image.tolist() == [0] and torch.equal(kept, boxes[:, best])


def test_top_crops_come_best_first_and_as_many_as_each_image_wants() -> None:
    cam = torch.zeros(2, 8, 8)
    cam[:, 4:, 4:] = 1.0
    boxes = torch.tensor([[[0, 0, 4, 4], [4, 4, 4, 4], [2, 2, 4, 4]], [[2, 2, 4, 4], [0, 0, 4, 4], [4, 4, 4, 4]]])
    image, kept = top_crops(cam, boxes, torch.tensor([3, 1]), SETTINGS)
    assert image.tolist() == [0, 0, 0, 1]
    assert torch.equal(kept, torch.stack([*boxes[0, [1, 2, 0]], boxes[1, 2]]))


def test_tiles_lie_in_reading_order_and_hold_whole_patches() -> None:
    patches = np.stack([np.full((3, 8, 8), value, np.uint8) for value in (10, 20, 30, 40, 50, 60, 70, 80)])
    images = tile(shrink(torch.from_numpy(patches), 4).numpy(), 4)
    assert images.shape == (2, 3, 8, 8)
    corners = images[:, 0][:, [0, 0, 7, 7], [0, 7, 0, 7]]
    np.testing.assert_array_equal(corners, [[10, 20, 30, 40], [50, 60, 70, 80]])


def test_one_patch_an_image_is_left_untouched() -> None:
    patches = np.random.default_rng(0).integers(0, 256, (3, 3, 8, 8), np.uint8)
    np.testing.assert_array_equal(tile(shrink(torch.from_numpy(patches), 1).numpy(), 1), patches)


def test_confidence_orders_the_kept_patches(eyes: Eyes) -> None:
    train, usable = _images(6), list(range(6))

    def confidence(kind: Confidence) -> NDArray[np.float32]:
        settings = replace(SETTINGS, confidence=kind)
        (images,) = _discover(train, [usable], eyes, settings)
        with torch.no_grad():
            logits: torch.Tensor = eyes.activation.model(eyes.see(images))
            return logits.softmax(1).amax(1).numpy()

    lowest, highest = confidence("lowest"), confidence("highest")
    assert lowest.max() <= highest.min()
    assert lowest[0] <= lowest[1] and highest[0] >= highest[1]


def test_random_confidence_keeps_other_patches_for_another_seed(eyes: Eyes) -> None:
    settings = replace(SETTINGS, confidence="random")
    kept = [_discover(_images(12), [list(range(12))], eyes, settings, seed)[0] for seed in (0, 0, 1)]
    np.testing.assert_array_equal(kept[0], kept[1])
    assert (kept[0] != kept[2]).any()


def test_fewer_images_than_the_pool_wants_give_several_crops_each(eyes: Eyes) -> None:
    """Two images of one class serve IPC 4: t rises until the pool holds enough."""
    settings = replace(SETTINGS, ipc=4)
    assert settings.images_required == 1
    (images,) = _discover(_images(2), [[0, 1]], eyes, settings)
    assert images.shape == (4, 3, 16, 16)
    assert len(np.unique(images.reshape(4, -1), axis=0)) == 4


def test_noise_is_normal_for_the_teacher_and_another_for_each_class_and_seed(eyes: Eyes) -> None:
    settings = replace(SETTINGS, init="noise", ipc=40)
    assert (settings.images_needed, settings.images_required) == (0, 0)
    first, again, other = (_discover(_images(5), [[], []], eyes, settings, seed) for seed in (0, 0, 1))
    assert first[0].shape == (40, 3, 16, 16)
    np.testing.assert_array_equal(first, again)
    assert (first[0] != first[1]).any() and (first[0] != other[0]).any()
    inside = (eyes.see(first[0]).abs() < 1).float().mean()
    assert abs(float(inside) - 0.683) < 0.02


def test_real_initialisation_takes_whole_images(eyes: Eyes) -> None:
    train = _images(5)
    (images,) = _discover(train, [[3, 1, 4]], eyes, replace(SETTINGS, init="real"))
    np.testing.assert_array_equal(images, np.stack([train.read(3), train.read(1)]))


# ---- batches that mix classes, and pools that hold no more than what may be kept


def _by_itself(
    train: ImageSet, label: int, usable: list[int], eyes: Eyes, settings: DiscoverySettings
) -> NDArray[np.uint8]:
    """Discovery of one class as the paper tells it: the whole pool first, then what is kept of it."""
    usable = usable[: settings.images_needed]
    top = min(settings.crops, math.ceil(settings.images_needed / len(usable)))
    pool = []
    for index in usable:
        pixels = torch.from_numpy(train.read(index))[None]
        boxes = torch.from_numpy(random_crops(0, index, pixels.shape[-1], settings))[None]
        cam = eyes.activation(eyes.see(pixels), torch.tensor([label]))[0]
        _, best = top_crops(cam, boxes, torch.tensor([top]), settings)
        pool.append(apply_views(pixels.expand(top, -1, -1, -1), best, torch.zeros(top, dtype=torch.bool)))
    patches = torch.cat(pool)
    with torch.no_grad():
        confidence = eyes.activation.model(eyes.see(patches)).softmax(1).amax(1).numpy()
    if settings.confidence == "random":
        order = draws.permutation(0, "discovery-keep", label, count=len(patches))
    else:
        order = np.argsort(confidence if settings.confidence == "lowest" else -confidence, kind="stable")
    return tile(shrink(patches[order[: settings.patches].copy()], settings.beta).numpy(), settings.beta)


@pytest.mark.parametrize("confidence", ["lowest", "highest", "random"])
@pytest.mark.parametrize("beta", [1, 4])
def test_classes_that_share_batches_come_out_as_if_alone(
    eyes: Eyes, confidence: Confidence, beta: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Classes of 5, 11 and 40 images in batches of 7 and groups of two: t and the pools differ from class to class."""
    monkeypatch.setattr(discovery, "teacher_batch", lambda device, size: 7)
    settings = replace(SETTINGS, confidence=confidence, beta=beta)
    monkeypatch.setattr(discovery, "GROUP_IMAGES", 2 * settings.images_needed)
    train, usable = _images(56), [list(range(5)), list(range(5, 16)), list(range(16, 56))]
    assert [list(group) for group in class_groups(3, settings)] == [[0, 1], [2]]
    for label, images in enumerate(_discover(train, usable, eyes, settings)):
        np.testing.assert_array_equal(images, _by_itself(train, label, usable[label], eyes, settings))


def test_no_more_patches_are_cut_at_once_than_the_teacher_is_shown(eyes: Eyes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of 12 images gives five, 60 in all."""
    cut, counts = discovery._cut, []

    def count(images: torch.Tensor, image: torch.Tensor, boxes: torch.Tensor) -> torch.Tensor:
        counts.append(len(image))
        return cut(images, image, boxes)

    monkeypatch.setattr(discovery, "_cut", count)
    monkeypatch.setattr(discovery, "teacher_batch", lambda device, size: 7)
    settings = replace(SETTINGS, ipc=20)
    _discover(_images(12), [list(range(12))], eyes, settings)
    assert sum(counts) == 60 and max(counts) == 7


@pytest.mark.parametrize("size", [32, 64, 224, 448, 1024])
def test_a_gpu_is_shown_fewer_images_where_they_are_larger(size: int) -> None:
    """As many pixels as at 224 px, and no more images than that."""
    gpu = torch.device("cuda")
    for count, least in ((teacher_batch(gpu, size), 256), (pairs_at_once(size), 250)):
        assert count == least if size <= 224 else count == least * 224**2 // size**2


def test_a_pool_holds_what_may_be_kept_and_no_more() -> None:
    """30 times as many patches come as are kept; the held ones never exceed these, and are shrunk."""
    settings = replace(SETTINGS, beta=4, pool_factor=30)
    pool = Pool(0, 240, settings, 0)
    for start in range(0, 240, 24):
        confidence = np.linspace(1, 0, 240, dtype=np.float32)[start : start + 24]
        pool.offer(torch.full((24, 3, 16, 16), start, dtype=torch.uint8), confidence)
        assert len(pool._kept) <= settings.patches
        assert {patch.untyped_storage().nbytes() for _, _, patch in pool._kept} == {3 * 8 * 8}
    assert pool.kept().shape == (8, 3, 8, 8)
    assert (pool.kept() == 216).all()


@pytest.mark.parametrize("images", [50, 60, 90])
@pytest.mark.parametrize("confidence", ["lowest", "highest", "random"])
def test_every_image_that_is_looked_at_may_be_kept(images: int, confidence: Confidence) -> None:
    """60 patches make the pool: 50 images give two crops each, the last ones too, and of 90 the first 60 are taken."""
    settings = replace(SETTINGS, ipc=20, confidence=confidence)
    assert settings.images_needed == 60
    taken = min(images, 60)
    kept: set[int] = set()
    for seed in range(20):
        pool = Pool(0, taken, settings, seed)
        assert pool.top == (2 if images < 60 else 1)
        values = np.repeat(np.linspace(0.9, 0.1, taken, dtype=np.float32), pool.top)
        values = values if confidence == "lowest" else 1 - values
        for image in range(taken):
            patches = torch.full((pool.top, 3, 4, 4), image, dtype=torch.uint8)
            pool.offer(patches, values[image * pool.top : (image + 1) * pool.top])
        kept.update(pool.kept()[:, 0, 0, 0].tolist())
    assert taken - 1 in kept


def test_equal_confidence_keeps_the_first() -> None:
    pool = Pool(0, 6, SETTINGS, 0)
    for number in range(6):
        pool.offer(torch.full((1, 3, 8, 8), number, dtype=torch.uint8), np.array([0.5], np.float32))
    np.testing.assert_array_equal(pool.kept()[:, 0, 0, 0], [0, 1])


def test_groups_cover_every_class_once_whatever_a_class_needs() -> None:
    for init, ipc in product(get_args(Init), (1, 30, 1000)):
        groups = class_groups(7, replace(SETTINGS, ipc=ipc, init=init))
        assert [label for group in groups for label in group] == list(range(7))


def test_a_file_that_vanished_is_named(eyes: Eyes, tmp_path: Path) -> None:
    """The error of reading reaches the caller as it is."""
    (tmp_path / "ant").mkdir()
    for number in range(6):
        Image.fromarray(np.zeros((16, 16, 3), np.uint8)).save(tmp_path / "ant" / f"{number}.png")
    train = list_classes(tmp_path, ["ant"], 16)
    (tmp_path / "ant" / "4.png").unlink()
    with pytest.raises(DataError, match=r"ant/4\.png: cannot be read"):
        _discover(train, [list(range(6))], eyes, SETTINGS)


def test_discovery_is_the_same_however_many_processes_read(eyes: Eyes, tmp_path: Path) -> None:
    (tmp_path / "ant").mkdir()
    rng = np.random.default_rng(0)
    for number in range(40):
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8)).save(tmp_path / "ant" / f"{number}.png")
    train = list_classes(tmp_path, ["ant"], 16)
    alone, together = (
        [found.classes[0].images for found in discover_groups(train, [[0]], [range(40)], eyes, SETTINGS, 0, processes)]
        for processes in (1, 2)
    )
    np.testing.assert_array_equal(alone, together)
