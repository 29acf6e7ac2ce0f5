"""Drift: distances computed anew are those stored, up to rounding and device; anything else is told."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from labelled_dataset import label_dataset
from make_dataset import make_tiny_dataset
from tiny_dataset import tiny_manifest
from torch import Tensor

from builders import drift
from builders.drift import ALLOWANCE, KNEE, Drift, compare, draw_sample, measure_drift
from builders.models import create_model
from builders.teacher import Teacher, load_teacher, save_checkpoint
from nrrdd_format import replay
from nrrdd_format.codebooks import distance_levels, quantize
from nrrdd_format.dataset import open_dataset
from nrrdd_format.errors import ConfigError, TeacherError
from nrrdd_format.manifest import Manifest
from nrrdd_format.pairs import PairRecords
from nrrdd_format.shards import ShardEntry

CLASSES = ("class 0", "class 1", "class 2")
SIZE = 16


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Teacher:
    """A network with random weights: its distances are of all sizes, as a trained one's."""
    path = tmp_path_factory.mktemp("drift") / "teacher.pt"
    torch.manual_seed(0)
    model = create_model("conv2-w8", 3, SIZE)
    model.state_dict()["classifier.weight"].mul_(20)
    save_checkpoint(path, model, "conv2-w8", CLASSES)
    return load_teacher(None, path, num_classes=3, image_size=SIZE, device="cpu", class_names=CLASSES)


@pytest.fixture(scope="module")
def folder(teacher: Teacher, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset labelled by that teacher."""
    path = make_tiny_dataset(tmp_path_factory.mktemp("drift") / "data", size=SIZE, ipc=10, epochs=4)
    label_dataset(path, teacher)
    return path


def measure(folder: Path, teacher: Teacher, sample: int = 1000, device: str = "cpu") -> Drift:
    with open_dataset(folder) as dataset:
        return measure_drift(dataset, teacher, sample=sample, seed=0, device=device)


def test_the_same_device_gives_the_same_distances(folder: Path, teacher: Teacher) -> None:
    found = measure(folder, teacher)
    assert found.pairs == 120
    assert found.other_level_share == found.far_share == found.unexplained_share == 0
    assert 0 < found.mean_nats < found.max_nats
    assert found.explained and found.to_json()["explained"] is True


def test_a_sample_is_enough(folder: Path, teacher: Teacher) -> None:
    found = measure(folder, teacher, sample=17)
    assert found.pairs == 17 and found.unexplained_share == 0


def batched(pairs: replay.PairTensors, *, mean: Any, std: Any) -> Tensor:
    """The arithmetic of a GPU's replay."""
    views = replay._views_batched(pairs.images, pairs.boxes, pairs.flips)
    mixed = replay.mix(views, pairs.org, pairs.aug, pairs.is_cutmix, pairs.mix_box, pairs.lam)
    return replay.normalize(mixed, mean, std)


def test_a_gpus_arithmetic_is_explained(folder: Path, teacher: Teacher, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drift, "replay", batched)
    assert measure(folder, teacher).explained


@pytest.mark.gpu
def test_a_gpu_is_explained(folder: Path, teacher: Teacher) -> None:
    moved = replace(teacher, model=teacher.model.to("cuda"))
    try:
        assert measure(folder, moved, device="cuda").explained
    finally:
        teacher.model.to("cpu")


def unflipped(pairs: replay.PairTensors, *, mean: Any, std: Any) -> Tensor:
    return replay.replay(replace(pairs, flips=torch.zeros_like(pairs.flips)), mean=mean, std=std)


def other_colours(pairs: replay.PairTensors, *, mean: Any, std: Any) -> Tensor:
    return replay.replay(pairs, mean=[0.5, 0.5, 0.5], std=std)


def moved_by_a_pixel(pairs: replay.PairTensors, *, mean: Any, std: Any) -> Tensor:
    return replay.replay(replace(pairs, images=pairs.images.roll(1, 3)), mean=mean, std=std)


def swapped(pairs: replay.PairTensors, *, mean: Any, std: Any) -> Tensor:
    return replay.replay(replace(pairs, org=pairs.aug, aug=pairs.org), mean=mean, std=std)


@pytest.mark.parametrize("other", [unflipped, other_colours, moved_by_a_pixel, swapped])
def test_another_replay_is_not(
    folder: Path, teacher: Teacher, other: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(drift, "replay", other)
    found = measure(folder, teacher)
    assert not found.explained and found.other_level_share >= found.unexplained_share > 0.01


def test_other_weights_are_not(folder: Path, teacher: Teacher) -> None:
    torch.manual_seed(1)
    other = create_model("conv2-w8", 3, SIZE).eval()
    assert not measure(folder, replace(teacher, model=other)).explained


def test_records_of_other_pairs_are_not(tmp_path: Path, teacher: Teacher) -> None:
    def rolled(records: PairRecords) -> PairRecords:
        return replace(records, distance_org=np.roll(records.distance_org, 1))

    path = make_tiny_dataset(tmp_path / "data", size=SIZE, ipc=10)
    label_dataset(path, teacher, change=rolled)
    assert not measure(path, teacher).explained


def test_a_teacher_that_overflows_is_named(folder: Path, teacher: Teacher) -> None:
    class Broken(torch.nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return images.new_full((len(images), 3), float("inf"))

    with pytest.raises(TeacherError, match=r"shard-00000\.tar: .*not finite"):
        measure(folder, replace(teacher, model=Broken()))


# ---- what rounding and device explain

LEVELS = distance_levels(16)
MIDDLES = (LEVELS[:-1].astype(np.float64) + LEVELS[1:]) / 2


def one(level: int, distance: float) -> Drift:
    return compare(LEVELS[[level]][:, None], np.array([[distance]], np.float32), LEVELS)


@pytest.mark.parametrize("level", [0, 1, 7, 14])
def test_a_distance_may_lie_a_little_beyond_its_middle(level: int) -> None:
    edge = float(MIDDLES[level])  # between this level and the next
    margin = ALLOWANCE * (edge + KNEE)
    inside, beyond, outside = one(level, edge * 0.999), one(level, edge + margin * 0.9), one(level, edge + margin * 1.2)
    assert (inside.other_level_share, inside.unexplained_share) == (0, 0)
    assert (beyond.other_level_share, beyond.unexplained_share) == (1, 0)
    assert (outside.other_level_share, outside.unexplained_share, outside.far_share) == (1, 1, 0)
    assert one(level + 1, edge - margin * 0.8).explained
    assert not one(level + 1, max(0.0, edge - margin * 1.4)).explained


def test_beyond_the_last_level_everything_is_that_level() -> None:
    found = one(15, 400.0)
    assert found.explained and found.max_nats == 0
    assert one(14, 400.0).far_share == 0 and one(13, 400.0).far_share == 1


def test_one_in_a_hundred_is_let_pass() -> None:
    stored = np.full((2, 100), LEVELS[3], np.float32)
    computed = stored.copy()
    computed[0, 0] = LEVELS[9]
    computed[1, 0] = LEVELS[4]
    found = compare(stored, computed, LEVELS)
    assert found.explained and (found.unexplained_share, found.far_share) == (0.01, 0.005)
    computed[0, 1] = LEVELS[4]
    assert not compare(stored, computed, LEVELS).explained


@given(st.lists(st.floats(0, 40), min_size=1, max_size=50), st.sampled_from([2, 16, 64, 256]))
def test_what_was_just_quantised_is_explained(distances: list[float], count: int) -> None:
    levels = distance_levels(count)
    computed = np.array([distances, distances], np.float32)
    found = compare(levels[quantize(computed, levels)], computed, levels)
    assert found.other_level_share == found.unexplained_share == 0


# ---- the sample


@given(
    shards=st.lists(st.integers(2, 30), min_size=1, max_size=6),
    epochs=st.integers(1, 5),
    sample=st.integers(1, 200),
    seed=st.integers(0, 3),
)
def test_a_sample_is_spread_over_all_pairs(shards: list[int], epochs: int, sample: int, seed: int) -> None:
    manifest = _manifest(shards, epochs)
    rows = draw_sample(manifest, sample, seed)
    total = sum(shards) * epochs
    assert np.array_equal(rows, draw_sample(manifest, sample, seed))
    assert len(rows) == min(sample, total)
    shard, epoch, pair = rows.T
    assert (epoch < epochs).all() and (pair < np.array(shards)[shard]).all() and (rows >= 0).all()
    starts = np.concatenate([[0], np.cumsum(np.array(shards) * epochs)])
    number = starts[shard] + epoch * np.array(shards)[shard] + pair
    assert (np.diff(number) > 0).all()
    assert np.diff(np.concatenate([[0], number, [total]])).max() <= 2 * max(1, total / sample) + 1


def _manifest(shards: list[int], epochs: int) -> Manifest:
    entries = [
        ShardEntry(name=f"shard-{k:05d}.tar", sha256="0" * 64, bytes=1, images=n, pairs_per_epoch=n, record_bytes=1)
        for k, n in enumerate(shards)
    ]
    return replace(tiny_manifest(epochs=epochs), shards=tuple(entries))


def test_a_dataset_without_pairs_has_no_sample() -> None:
    with pytest.raises(ConfigError, match="lists no shards"):
        draw_sample(_manifest([], 3), 10, 0)
