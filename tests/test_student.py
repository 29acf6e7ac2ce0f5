"""The student's recipe, piece by piece, and whole trainings on a tiny dataset."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from make_dataset import make_tiny_dataset
from PIL import Image
from torch import nn

from benchmarks.student import (
    StudentConfig,
    check_classes,
    check_source,
    learning_rate,
    load_matching_source,
    make_optimizer,
    pick_batch_size,
    train_student,
)
from builders.models import create_model
from builders.sources import Source
from builders.teacher import load_teacher, save_checkpoint
from loaders import CompletedDBRLoss, DBRLoss
from nrrdd_format.dataset import open_dataset
from nrrdd_format.errors import ConfigError, DataError, TeacherError
from nrrdd_format.manifest import MANIFEST_NAME, Manifest

CLASSES = ("class 0", "class 1", "class 2")
SIZE = 16
TINY = StudentConfig(labels="dbr", architecture="conv2-w8", epochs=2, device="cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Real images of the tiny dataset's classes, a teacher for them, and the dataset, labelled by that teacher."""
    root = tmp_path_factory.mktemp("student")
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        for label, name in enumerate(CLASSES):
            (root / "real" / split / name).mkdir(parents=True)
            for number in range(4):
                pixels = rng.integers(0, 100, (SIZE, SIZE, 3), np.uint8)
                pixels[..., label] += 150
                Image.fromarray(pixels).save(root / "real" / split / name / f"{number}.png")
    torch.manual_seed(0)
    save_checkpoint(root / "teacher.pt", create_model("conv2-w8", 3, SIZE), "conv2-w8", CLASSES)
    torch.manual_seed(1)
    save_checkpoint(root / "other.pt", create_model("conv2-w8", 3, SIZE), "conv2-w8", CLASSES)
    _label(make_tiny_dataset(root / "data", size=SIZE), root / "teacher.pt")
    return root


def _label(dataset: Path, checkpoint: Path) -> None:
    """Names the teacher in the manifest."""
    teacher = load_teacher(None, checkpoint, num_classes=3, image_size=SIZE, device="cpu", class_names=CLASSES)
    manifest = Manifest.load(dataset / MANIFEST_NAME)
    named = replace(manifest.teacher, architecture=teacher.architecture, sha256=teacher.sha256)
    replace(manifest, teacher=named).save(dataset / MANIFEST_NAME)


@pytest.fixture(scope="module")
def source(folder: Path) -> Source:
    """The tiny dataset's source."""
    manifest = open_dataset(folder / "data").manifest
    return load_matching_source(manifest, name="imagefolder", data_dir=folder / "real", test_dir=None)


def test_the_learning_rate_ends_at_about_half_of_its_start() -> None:
    config = StudentConfig(labels="dbr", epochs=300)
    rates = [learning_rate(epoch, config) for epoch in range(300)]
    assert rates[0] == 1e-3
    assert rates == sorted(rates, reverse=True)
    assert rates[150] == pytest.approx(1e-3 * 0.5 * (1 + math.cos(math.pi / 4)))
    assert rates[-1] == pytest.approx(5e-4, rel=0.01)


@pytest.mark.parametrize(
    ("ipc", "count", "asked", "expected"),
    [
        (1, 100, None, 10),
        (2, 100, None, 50),
        (10, 100, None, 50),
        (11, 1000, None, 100),
        (50, 1000, None, 100),
        (1, 3, None, 3),
        (50, 100, 7, 7),
        (50, 100, 1000, 100),
    ],
)
def test_batches_are_10_50_or_100_pairs_and_never_more_than_there_are(
    folder: Path, ipc: int, count: int, asked: int | None, expected: int
) -> None:
    manifest = open_dataset(folder / "data").manifest
    changed = replace(manifest, images=replace(manifest.images, ipc=ipc, count=count))
    assert pick_batch_size(asked, changed) == expected


@pytest.mark.parametrize("architecture", ["conv2-w8", "resnet18-small-w4"])
def test_batchnorm_and_biases_have_no_weight_decay(architecture: str) -> None:
    model = create_model(architecture, 3, SIZE)
    optimizer = make_optimizer(model, TINY)
    decayed, free = optimizer.param_groups
    assert (decayed["weight_decay"], free["weight_decay"]) == (0.01, 0.0)
    assert decayed["betas"] == free["betas"] == (0.9, 0.999)
    kept = {id(p) for p in free["params"]}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            assert (id(parameter) in kept) == (isinstance(module, nn.BatchNorm2d) or name == "bias")


@pytest.mark.parametrize("labels", ["dbr", "dbr-completed", "compact", "one-hot", "soft", "soft-top5"])
def test_a_student_learns_from_every_kind_of_labels(folder: Path, source: Source, labels: str) -> None:
    teacher = folder / "teacher.pt" if labels.startswith("soft") else None
    config = replace(TINY, labels=labels, teacher_checkpoint=teacher)  # type: ignore[arg-type]
    result = train_student(folder / "data", source, config)
    assert 0 <= result.top1 <= 1 and result.test_images == 12
    assert math.isfinite(result.loss)
    assert (result.clipped_share is not None) == (labels == "dbr")
    assert result.settings["batch_size"] == 12 and result.settings["labels"] == labels


def test_unusable_test_images_are_left_out_and_named(folder: Path, tmp_path: Path) -> None:
    real = shutil.copytree(folder / "real", tmp_path / "real")
    (real / "test" / CLASSES[1] / "2.png").write_bytes(b"no image")
    manifest = open_dataset(folder / "data").manifest
    source = load_matching_source(manifest, name="imagefolder", data_dir=real, test_dir=None)
    result = train_student(folder / "data", source, TINY)
    assert result.test_images == 11
    (skipped,) = result.skipped_test_images
    assert skipped["image"] == f"{CLASSES[1]}/2.png" and skipped["reason"].startswith("is not an image")


def test_the_seed_alone_decides_and_the_callers_random_state_stays(folder: Path, source: Source) -> None:
    torch.manual_seed(3)
    state = torch.get_rng_state()
    first = train_student(folder / "data", source, TINY)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(4)
    assert train_student(folder / "data", source, TINY).loss == first.loss
    assert train_student(folder / "data", source, replace(TINY, seed=1)).loss != first.loss


def test_options_of_the_losses_have_an_effect(folder: Path, source: Source) -> None:
    def loss(**changes: object) -> float:
        return train_student(folder / "data", source, replace(TINY, **changes)).loss  # type: ignore[arg-type]

    soft = {"labels": "soft", "teacher_checkpoint": folder / "teacher.pt"}
    changed = [loss(), loss(radius=1.5), loss(sce="entropy"), loss(distance="squared"), loss(alpha_sce=0.5)]
    assert len({*changed, loss(alpha_dbr=0.5)}) == 6
    assert loss(**soft) != loss(**soft, soft_temperature=20.0)
    assert loss(labels="dbr-completed") != loss(labels="dbr-completed", alpha_dbr=0.0)
    assert loss(alpha_dbr=DBRLoss().alpha_dbr) == loss()
    assert loss(labels="dbr-completed", alpha_dbr=CompletedDBRLoss().alpha_dbr) == loss(labels="dbr-completed")
    assert loss(batch_size=4) != loss()


def test_the_last_epochs_student_is_tested_and_only_it(
    folder: Path, source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def predict(*arguments: object, **options: object) -> tuple[np.ndarray, np.ndarray]:
        calls.append(arguments[1])
        return np.array([0, 1, 2, 0]), np.array([0, 2, 1, 1])

    monkeypatch.setattr("benchmarks.student.predict", predict)
    assert train_student(folder / "data", source, replace(TINY, epochs=3)).top1 == 0.25
    assert calls == [source.test]


def test_test_images_that_are_unusable_are_not_counted(folder: Path, source: Source, tmp_path: Path) -> None:
    shutil.copytree(folder / "real", tmp_path / "real")
    (tmp_path / "real" / "test" / "class 0" / "1.png").write_bytes(b"no image")
    manifest = open_dataset(folder / "data").manifest
    damaged = load_matching_source(manifest, name="imagefolder", data_dir=tmp_path / "real", test_dir=None)
    assert train_student(folder / "data", damaged, TINY).test_images == 11


def test_another_teacher_is_refused_with_both_hashes(folder: Path, source: Source) -> None:
    config = replace(TINY, labels="soft", teacher_checkpoint=folder / "other.pt")
    with pytest.raises(TeacherError) as error:
        train_student(folder / "data", source, config)
    other = load_teacher(None, folder / "other.pt", num_classes=3, image_size=SIZE, device="cpu", class_names=CLASSES)
    assert other.sha256 in str(error.value)
    assert open_dataset(folder / "data").manifest.teacher.sha256 in str(error.value)


def test_soft_labels_without_a_teacher_are_refused(folder: Path, source: Source) -> None:
    with pytest.raises(TeacherError, match="--teacher-checkpoint"):
        train_student(folder / "data", source, replace(TINY, labels="soft"))


def test_a_source_without_test_images_is_refused(folder: Path, source: Source) -> None:
    with pytest.raises(DataError, match="--test-dir"):
        train_student(folder / "data", replace(source, test=None), TINY)


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (["a", "c", "b"], "class 1 of the source is 'c', expected 'b'"),
        (["a", "b"], "2 classes, expected 3"),
        (["a", "b", "c", "d"], "4 classes, expected 3"),
    ],
)
def test_the_first_difference_between_classes_is_named(found: list[str], message: str) -> None:
    with pytest.raises(DataError, match=message):
        check_classes(["a", "b", "c"], found)


def test_a_dataset_of_some_classes_finds_them_in_the_whole_source(folder: Path, tmp_path: Path) -> None:
    manifest = open_dataset(folder / "data").manifest
    some = replace(manifest, dataset=replace(manifest.dataset, class_names=("class 0", "class 2")))
    source = load_matching_source(some, name="imagefolder", data_dir=folder / "real", test_dir=None)
    assert source.class_names == ["class 0", "class 2"]
    assert source.size == SIZE
    check_source(some, source)
    turned = replace(manifest, dataset=replace(manifest.dataset, class_names=("class 2", "class 0")))
    source = load_matching_source(turned, name="imagefolder", data_dir=folder / "real", test_dir=None)
    with pytest.raises(DataError, match="class 0 of the source"):
        check_source(turned, source)


def test_a_source_of_another_size_is_refused(folder: Path, source: Source) -> None:
    with pytest.raises(DataError, match="32 px, expected 16"):
        train_student(folder / "data", replace(source, size=32), TINY)


@pytest.mark.parametrize(
    "make",
    [
        lambda: replace(TINY, epochs=0),
        lambda: replace(TINY, learning_rate=0.0),
        lambda: replace(TINY, learning_rate=math.inf),
        lambda: replace(TINY, soft_temperature=-1.0),
        lambda: replace(TINY, alpha_dbr=-0.1),
        lambda: replace(TINY, alpha_sce=-0.1),
        lambda: replace(TINY, batch_size=0),
    ],
)
def test_settings_that_cannot_work_are_refused(make: Callable[[], StudentConfig]) -> None:
    with pytest.raises(ConfigError, match="--"):
        make()


@pytest.mark.parametrize(
    ("labels", "option", "value"),
    [
        ("one-hot", "radius", 0.5),
        ("compact", "sce", "batch"),
        ("dbr-completed", "distance", "huber"),
        ("dbr", "soft_temperature", 20.0),
        ("compact", "alpha_dbr", 0.25),
        ("dbr-completed", "alpha_sce", 0.25),
        ("dbr", "teacher_checkpoint", Path("teacher.pt")),
    ],
)
def test_options_of_another_kind_of_labels_are_refused(labels: str, option: str, value: object) -> None:
    with pytest.raises(ConfigError, match=f"--{option.replace('_', '-')}: found with --labels {labels}, expected"):
        StudentConfig(labels=labels, **{option: value})  # type: ignore[arg-type]
