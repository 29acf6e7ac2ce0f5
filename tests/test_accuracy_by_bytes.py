"""Priors and further classes as the benchmark makes them, and the whole command on a tiny dataset."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from make_dataset import make_tiny_dataset
from PIL import Image
from torch import Tensor, nn

from benchmarks.accuracy_by_bytes import main
from benchmarks.completion import complete
from benchmarks.logit_codes import predictions as all_predictions
from builders.models import create_model
from builders.relabel import prior_masses
from builders.teacher import Teacher, load_teacher, save_checkpoint
from loaders import DBRLoader
from nrrdd_format.dataset import open_dataset
from nrrdd_format.decoding import decode_image
from nrrdd_format.manifest import MANIFEST_NAME, Manifest
from nrrdd_format.replay import plan_batch, replay, stack_images
from nrrdd_format.verify import verify_dataset

CLASSES = tuple(f"class {k}" for k in range(6))
SIZE = 16


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Real images of six classes, an untrained teacher, and a tiny dataset that names it."""
    root = tmp_path_factory.mktemp("by-bytes")
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        for name in CLASSES:
            (root / split / name).mkdir(parents=True)
            Image.fromarray(rng.integers(0, 256, (SIZE, SIZE, 3), np.uint8)).save(root / split / name / "0.png")
    torch.manual_seed(0)
    save_checkpoint(root / "teacher.pt", create_model("conv2-w8", len(CLASSES), SIZE), "conv2-w8", CLASSES)
    data = make_tiny_dataset(root / "data", classes=len(CLASSES), size=SIZE, shards=1)
    manifest = Manifest.load(data / MANIFEST_NAME)
    named = replace(manifest.teacher, architecture="conv2-w8", sha256=tiny_teacher(root).sha256, top1=None)
    replace(manifest, teacher=named).save(data / MANIFEST_NAME)
    return root


def tiny_teacher(folder: Path) -> Teacher:
    return load_teacher(
        "conv2-w8", folder / "teacher.pt", num_classes=len(CLASSES), image_size=SIZE, device="cpu", class_names=CLASSES
    )


def predictions(teacher: nn.Module, images: Tensor) -> Tensor:
    with torch.no_grad():
        p: Tensor = teacher(images).softmax(1)
    return p


def test_further_classes_are_the_likeliest_others_rounded(folder: Path, tmp_path: Path) -> None:
    teacher = tiny_teacher(folder)
    out = complete(folder / "data", teacher, priors=None, further=2, out=tmp_path / "with", device="cpu")
    assert verify_dataset(out) == []
    table = torch.from_numpy(Manifest.load(out / MANIFEST_NAME).codebooks.distances)
    for batch in DBRLoader(out, 8):
        assert batch.further is not None
        for row, p in enumerate(predictions(teacher.model, batch.images)):
            own = {int(batch.label_org[row]), int(batch.label_aug[row])}
            others = sorted(set(range(len(CLASSES))) - own, key=lambda label: -float(p[label]))
            assert batch.further.classes[row].tolist() == others[:2]
            nearest = [(table + p[label].log()).abs().min() for label in others[:2]]
            stored = (batch.further.distances[row] + p[others[:2]].log()).abs()
            torch.testing.assert_close(stored, torch.stack(nearest))


def test_a_dataset_is_completed_and_keeps_the_rest(folder: Path, tmp_path: Path) -> None:
    out = complete(folder / "data", tiny_teacher(folder), priors=3, further=1, out=tmp_path / "with", device="cpu")
    assert verify_dataset(out) == []
    with open_dataset(folder / "data") as before, open_dataset(out) as after:
        old, new = before.shards[0], after.shards[0]
        assert new.priors is not None and new.priors.classes.shape == (old.images, 3)
        assert [new.image_bytes(i) for i in range(3)] == [old.image_bytes(i) for i in range(3)]
        assert [r.distance_org.tolist() for r in new.all_records()] == [
            r.distance_org.tolist() for r in old.all_records()
        ]


def test_masses_are_means_over_the_pairs_of_an_image(folder: Path) -> None:
    """Against loops over pairs and classes."""
    teacher = tiny_teacher(folder).model
    with open_dataset(folder / "data") as dataset:
        info, reader = dataset.manifest.images, dataset.shards[0]
        images = stack_images([decode_image(reader.image_bytes(i), info.size) for i in range(reader.images)])
        epochs, labels = list(reader.all_records()), reader.labels
    found = prior_masses(images, labels, epochs, model=teacher, temperature=1.0, mean=info.mean, std=info.std)
    total, weight = np.zeros((2, len(labels), len(CLASSES)))
    for records in epochs:
        plan = plan_batch([(0, records)])
        mixed = replay(plan.with_images(images[torch.from_numpy(plan.image)]), mean=info.mean, std=info.std)
        for pair, p in enumerate(predictions(teacher, mixed).double().numpy()):
            both = (int(records.index_org[pair]), int(records.index_aug[pair]))
            lam = float(records.lam[pair])
            for image, share in zip(both, (lam, 1 - lam), strict=True):
                for label in set(range(len(CLASSES))) - {int(labels[one]) for one in both}:
                    total[image, label] += share * p[label]
                    weight[image, label] += share
    expected = np.divide(total, weight, out=np.zeros_like(total), where=weight > 0)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)
    assert (found[np.arange(len(labels)), labels] == 0).all()


def _rebuild(dataset: Path, out: Path) -> None:
    """The same images and records under a manifest of another build."""
    shutil.copytree(dataset, out)
    manifest = Manifest.load(out / MANIFEST_NAME)
    replace(manifest, method=manifest.method | {"build_key": "another"}).save(out / MANIFEST_NAME)


def test_the_command_trains_every_kind_once_and_reports_it(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [
        *(str(folder / "data"), "--dataset", "imagefolder", "--data-dir", str(folder / "train")),
        *("--test-dir", str(folder / "test"), "--teacher-checkpoint", str(folder / "teacher.pt"), "--priors", "2"),
        *("--student", "conv2-w8", "--epochs", "1", "--further", "0", "1", "--device", "cpu"),
        *("--ranks", "2", "--parts", "2"),
        *("--out", str(tmp_path / "out"), "--results", str(tmp_path / "results")),
    ]
    assert main(options) == 0
    (result,) = (tmp_path / "results").glob("*.json")
    students = json.loads(result.read_text())["students"]
    size = {row["kind"]: row["bytes_per_pair"] for row in students}
    assert {row["alpha_dbr"] for row in students if row["kind"].startswith("completed")} == {0.5}
    assert {row["alpha_dbr"] for row in students if " code, " in row["kind"]} == {0.0}
    assert {row["alpha_dbr"] for row in students if row["kind"] in ("one-hot", "compact", "DBR", "soft")} == {None}
    assert len(size) == 11
    assert size["DBR"] < size["low-rank code, 2 components"] and size["DBR"] < size["product code, 2 parts"]
    assert size["one-hot"] == 0 < size["compact"] == size["DBR"] == size["completed, 0 further, no priors"]
    assert size["DBR"] < size["completed, 1 further, no priors"] < size["completed, 1 further, priors"]
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    assert main(options) == 0
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == times
    assert result.with_suffix(".png").stat().st_size > 1000
    page = result.with_suffix(".md").read_text()
    assert "| completed, 1 further, priors" in page
    assert "; teacher conv2-w8. α_dbr 0.5" in page  # its top-1 is not known
    shutil.copytree(folder / "test", tmp_path / "test")
    shutil.copy(folder / "train" / CLASSES[0] / "0.png", tmp_path / "test" / CLASSES[0] / "1.png")
    capsys.readouterr()
    assert main([*options, "--test-dir", str(tmp_path / "test")]) == 2
    assert "one-hot-conv2-w8-1.json: made with test images of fingerprint" in capsys.readouterr().err
    _rebuild(folder / "data", tmp_path / "data")
    assert main([str(tmp_path / "data"), *options[1:]]) == 2
    assert "one-hot-conv2-w8-1.json: made with the dataset of ID" in capsys.readouterr().err
    assert main([str(tmp_path / "data"), *options]) == 2
    assert "expected folders of different names" in capsys.readouterr().err
    for student in (tmp_path / "out").glob("*.json"):
        student.unlink()
    assert main([str(tmp_path / "data"), *options[1:]]) == 2  # the completed copies are still there
    assert "was completed from another dataset than" in capsys.readouterr().err
    for student in (tmp_path / "out").glob("*.json"):
        student.unlink()
    assert main(options) == 0  # the copies are its own
    capsys.readouterr()
    assert main([*options, "--student", "conv2-w4", "--name", "narrow"]) == 0  # another student is not done yet
    assert len(list((tmp_path / "out").glob("*.json"))) == 2 * len(size)
    assert main([*options, "--alpha-dbr", "0"]) == 0  # nor is one with another loss, of those that have it
    assert len(list((tmp_path / "out").glob("*.json"))) == 2 * len(size) + 4
    assert len(list((tmp_path / "results").glob("*-accuracy-by-bytes-narrow.json"))) == 1


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("images", {"ipc": 7}, "7 images per class, expected "),
        ("teacher", {"sha256": "ab" * 32}, "a teacher of SHA-256 abab"),
        ("records", {"epochs": 99}, "99 stored epochs, expected 3"),
        ("records", {}, "seed 0, expected another than that of "),
    ],
)
def test_datasets_that_differ_in_more_than_their_seed_are_refused(
    part: str, change: dict[str, object], message: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = Manifest.load(folder / "data" / MANIFEST_NAME)
    (tmp_path / "other").mkdir()
    changed: dict[str, Any] = {part: replace(getattr(manifest, part), **change)}
    replace(manifest, **changed).save(tmp_path / "other" / MANIFEST_NAME)
    start = (
        f"--out {tmp_path}/out --dataset imagefolder --data-dir {folder}/train --priors 2 --further 0 --ranks --parts"
    )
    assert main([str(folder / "data"), str(tmp_path / "other"), *start.split()]) == 2
    assert f"error: {tmp_path}/other: {message}" in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--ranks 2 7", "--ranks: found 7, expected 1 to 6 for 6 classes"),
        ("--parts 12", "--parts: found 12, expected 1 to 6"),
        ("--further 0 5", "--further: found 5, expected 0 to 4"),
        ("--priors 6", "--priors: found 6, expected 1 to 5"),
    ],
)
def test_more_than_the_classes_have_room_for_is_refused_at_the_start(
    options: str, message: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start = f"--priors 2 --further 0 --ranks --parts --out {tmp_path}/out --dataset imagefolder --data-dir"
    assert main([str(folder / "data"), *start.split(), str(folder / "train"), *options.split()]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_predictions_have_the_temperature_of_the_distances(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "data", tmp_path / "warm")
    manifest = Manifest.load(tmp_path / "warm" / MANIFEST_NAME)
    replace(manifest, records=replace(manifest.records, temperature=4.0)).save(tmp_path / "warm" / MANIFEST_NAME)
    teacher = tiny_teacher(folder)
    plain, warm = (
        all_predictions(path, teacher, epochs=1, device="cpu") for path in (folder / "data", tmp_path / "warm")
    )
    torch.testing.assert_close((plain / 4).log_softmax(1), warm)
