"""Critical-based initial data discovery: crops, their scores, which patches are kept, tiling."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from builders.cam import ClassActivation
from builders.config import Confidence, CropScore, DiscoverySettings
from builders.discovery import Eyes, discover_class, random_crops, tile, top_crops
from builders.image_sets import ArrayImages
from builders.models import create_model

SETTINGS = DiscoverySettings(ipc=2, beta=1, init="cidd", confidence="lowest", crop_score="mean")


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
    cam = np.full((1, 8, 8), 0.5, np.float32)
    cam[0, :2, :2] = 1.0
    boxes = np.array([[[0, 0, 2, 2], [0, 0, 8, 8], [4, 4, 3, 3]]])
    kept = top_crops(cam, boxes, 1, replace(SETTINGS, crop_score=score))
    np.testing.assert_array_equal(kept[0, 0], boxes[0, best])


def test_top_crops_come_best_first() -> None:
    cam = np.zeros((1, 8, 8), np.float32)
    cam[0, 4:, 4:] = 1.0
    boxes = np.array([[[0, 0, 4, 4], [4, 4, 4, 4], [2, 2, 4, 4]]])
    np.testing.assert_array_equal(top_crops(cam, boxes, 3, SETTINGS)[0], boxes[0, [1, 2, 0]])


def test_tiles_lie_in_reading_order_and_hold_whole_patches() -> None:
    patches = np.stack([np.full((3, 8, 8), value, np.uint8) for value in (10, 20, 30, 40, 50, 60, 70, 80)])
    images = tile(patches, 4)
    assert images.shape == (2, 3, 8, 8)
    corners = images[:, 0][:, [0, 0, 7, 7], [0, 7, 0, 7]]
    np.testing.assert_array_equal(corners, [[10, 20, 30, 40], [50, 60, 70, 80]])


def test_one_patch_an_image_is_left_untouched() -> None:
    patches = np.random.default_rng(0).integers(0, 256, (3, 3, 8, 8), np.uint8)
    np.testing.assert_array_equal(tile(patches, 1), patches)


def test_confidence_orders_the_kept_patches(eyes: Eyes) -> None:
    train, usable = _images(6), list(range(6))

    def confidence(kind: Confidence) -> NDArray[np.float32]:
        settings = replace(SETTINGS, confidence=kind)
        images = discover_class(train, 0, usable, eyes, settings, seed=0).images
        with torch.no_grad():
            logits: torch.Tensor = eyes.activation.model(eyes.see(images))
            return logits.softmax(1).amax(1).numpy()

    lowest, highest = confidence("lowest"), confidence("highest")
    assert lowest.max() <= highest.min()
    assert lowest[0] <= lowest[1] and highest[0] >= highest[1]


def test_random_confidence_keeps_other_patches_for_another_seed(eyes: Eyes) -> None:
    settings = replace(SETTINGS, confidence="random")
    kept = [discover_class(_images(12), 0, list(range(12)), eyes, settings, seed=seed).images for seed in (0, 0, 1)]
    np.testing.assert_array_equal(kept[0], kept[1])
    assert (kept[0] != kept[2]).any()


def test_fewer_images_than_the_pool_wants_give_several_crops_each(eyes: Eyes) -> None:
    """Two images of one class serve IPC 4: t rises until the pool holds enough."""
    settings = replace(SETTINGS, ipc=4)
    assert settings.images_required == 1
    images = discover_class(_images(2), 0, [0, 1], eyes, settings, seed=0).images
    assert images.shape == (4, 3, 16, 16)
    assert len(np.unique(images.reshape(4, -1), axis=0)) == 4


def test_real_initialisation_takes_whole_images(eyes: Eyes) -> None:
    train = _images(5)
    images = discover_class(train, 0, [3, 1, 4], eyes, replace(SETTINGS, init="real"), seed=0).images
    np.testing.assert_array_equal(images, np.stack([train.read(3), train.read(1)]))
