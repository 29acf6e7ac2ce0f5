"""Teachers: checkpoints, the check on real images, and training that survives being killed."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import pickle
import re
import signal
import struct
import subprocess
import sys
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from trap import Trap

from benchmarks import cli
from builders.image_sets import ArrayImages, FolderImages
from builders.models import create_model
from builders.sources import Source
from builders.teacher import (
    Teacher,
    load_teacher,
    measure_top1,
    preflight,
    save_checkpoint,
    state_dict_sha256,
)
from builders.train_teacher import EpochReport, TrainedTeacher, _Trainer, augment, train_teacher
from nrrdd_format.errors import ConfigError, DataError, OutputError, TeacherError

NAMES = ["red", "green", "blue"]
SIZE = 8
MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)


def coloured(count: int, size: int = SIZE, seed: int = 0) -> ArrayImages:
    """Noise in which the class's own channel is brighter: any network can learn it."""
    labels = np.arange(count) % 3
    pixels = np.random.default_rng(seed).integers(0, 128, (count, size, size, 3), dtype=np.uint8)
    pixels[np.arange(count), :, :, labels] += 64
    return ArrayImages(pixels=pixels, labels=labels, numbers=np.arange(count), prefix="coloured", size=size)


def source(size: int = SIZE, **changes: Any) -> Source:
    made = Source(
        name="coloured",
        class_names=NAMES,
        wnids=None,
        train=coloured(48, size),
        test=coloured(30, size, seed=1),
        size=size,
        mean=MEAN,
        std=STD,
        flip=True,
        beta=1,
        default_model="conv2-w4",
    )
    return replace(made, **changes)


def train(origin: Source, **changes: Any) -> TrainedTeacher:
    options: dict[str, Any] = {
        "architecture": "conv2-w4",
        "epochs": 3,
        "batch_size": 16,
        "learning_rate": 0.1,
        "seed": 0,
        "device": "cpu",
    }
    return train_teacher(origin, **(options | changes))


def load(checkpoint: Path | None, architecture: str | None = None, **changes: Any) -> Teacher:
    options: dict[str, Any] = {"num_classes": 3, "image_size": SIZE, "device": "cpu", "class_names": NAMES}
    return load_teacher(architecture, checkpoint, **(options | changes))


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    path = tmp_path / "teacher.pt"
    save_checkpoint(path, create_model("conv2-w4", 3, SIZE), "conv2-w4", NAMES)
    return path


def rewritten(checkpoint: Path, **changes: Any) -> Path:
    """The checkpoint with some of its entries changed."""
    torch.save(torch.load(checkpoint, weights_only=True) | changes, checkpoint)
    return checkpoint


def weights_of(checkpoint: Path) -> dict[str, Tensor]:
    weights: dict[str, Tensor] = torch.load(checkpoint, weights_only=True)["state_dict"]
    return weights


# The identity of weights


def test_hash_knows_weights_not_their_layout() -> None:
    weights = {"b": torch.randn(2, 3, 4, 4), "a": torch.arange(3)}
    turned = {"a": torch.arange(3), "b": weights["b"].to(memory_format=torch.channels_last)}
    assert state_dict_sha256(weights) == state_dict_sha256(turned)


@pytest.mark.parametrize(
    "other",
    [
        {"a": torch.tensor([1.0, 3.0])},
        {"a": torch.tensor([[1.0, 2.0]])},
        {"a": torch.tensor([1.0, 2.0], dtype=torch.float64)},
        {"b": torch.tensor([1.0, 2.0])},
        {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor(0)},
    ],
)
def test_hash_knows_name_type_shape_and_value(other: dict[str, Tensor]) -> None:
    assert state_dict_sha256({"a": torch.tensor([1.0, 2.0])}) != state_dict_sha256(other)


def test_hash_is_fixed() -> None:
    """A change of the rule would orphan every dataset's record of its teacher."""
    weights = {"w": torch.tensor([[1.0, -2.0]]), "n": torch.tensor(3), "h": torch.tensor([0.5], dtype=torch.bfloat16)}
    content = b"h torch.bfloat16 [1]\n\x00\x3f" + b"n torch.int64 []\n" + struct.pack("<q", 3)
    content += b"w torch.float32 [1, 2]\n" + struct.pack("<2f", 1, -2)
    assert state_dict_sha256(weights) == hashlib.sha256(content).hexdigest()


# Checkpoints


@pytest.mark.parametrize("architecture", ["conv2-w4", "resnet18-small-w4", "mnasnet0_5"])
def test_checkpoint_comes_back(architecture: str, tmp_path: Path) -> None:
    size = 32
    model = create_model(architecture, 3, size).eval()
    save_checkpoint(tmp_path / "teacher.pt", model, architecture, NAMES)
    teacher = load(tmp_path / "teacher.pt", image_size=size)
    assert (teacher.architecture, teacher.num_classes) == (architecture, 3)
    assert teacher.sha256 == state_dict_sha256(model.state_dict())
    assert not teacher.model.training
    assert not any(parameter.requires_grad for parameter in teacher.model.parameters())
    images = torch.randn(2, 3, size, size)
    torch.testing.assert_close(teacher.model(images), model(images))


def test_plain_state_dict_needs_the_architecture(checkpoint: Path) -> None:
    weights = weights_of(checkpoint)
    torch.save(weights, checkpoint)
    with pytest.raises(TeacherError, match="does not name its architecture; say it with --teacher"):
        load(checkpoint)
    assert load(checkpoint, "conv2-w4").sha256 == state_dict_sha256(weights)


def test_weights_saved_from_distributed_training(checkpoint: Path) -> None:
    weights = weights_of(checkpoint)
    torch.save({f"module.{name}": tensor for name, tensor in weights.items()}, checkpoint)
    assert load(checkpoint, "conv2-w4").sha256 == state_dict_sha256(weights)


def test_torchvisions_files_for_googlenet_have_training_heads(tmp_path: Path) -> None:
    model = create_model("googlenet", 3, 32)
    torch.save(model.state_dict() | {"aux1.fc2.bias": torch.zeros(3)}, tmp_path / "googlenet.pth")
    loaded = load(tmp_path / "googlenet.pth", "googlenet", image_size=32)
    assert loaded.sha256 == state_dict_sha256(model.state_dict())


def test_torchvisions_files_for_densenet_have_old_names(tmp_path: Path) -> None:
    model = create_model("densenet121", 3, 32)
    old = OrderedDict(
        (re.sub(r"(denselayer\d+\.(?:norm|conv))([12])\.", r"\1.\2.", name), tensor)
        for name, tensor in model.state_dict().items()
    )
    assert "features.denseblock1.denselayer1.norm.1.weight" in old
    torch.save(old, tmp_path / "densenet121.pth")
    loaded = load(tmp_path / "densenet121.pth", "densenet121", image_size=32)
    assert loaded.sha256 == state_dict_sha256(model.state_dict())


def test_another_architecture_is_refused(checkpoint: Path) -> None:
    with pytest.raises(TeacherError, match="holds a conv2-w4, expected resnet18"):
        load(checkpoint, "resnet18")


def test_another_class_order_is_refused(checkpoint: Path) -> None:
    with pytest.raises(TeacherError, match="class 1 of the teacher is 'green', expected 'blue'"):
        load(checkpoint, class_names=["red", "blue", "green"])


def test_another_number_of_classes_is_refused(checkpoint: Path) -> None:
    with pytest.raises(TeacherError, match="teacher of 3 classes, expected 4; train one on this source"):
        load(checkpoint, num_classes=4, class_names=[*NAMES, "black"])


def test_another_image_size_is_refused(checkpoint: Path) -> None:
    shapes = r"classifier.weight has shape \[3, 16\], expected \[3, 64\]"
    with pytest.raises(TeacherError, match=f"a conv2-w4 for 3 classes and images of 16 px: {shapes}; .*--size"):
        load(checkpoint, image_size=16)


def test_missing_weights_are_refused(checkpoint: Path) -> None:
    weights = weights_of(checkpoint)
    del weights["features.1.0.weight"]
    with pytest.raises(TeacherError, match=r"features\.1\.0\.weight is missing"):
        load(rewritten(checkpoint, state_dict=weights))


def test_superfluous_weights_are_refused(checkpoint: Path) -> None:
    weights = weights_of(checkpoint) | {"extra": torch.zeros(1)}
    with pytest.raises(TeacherError, match="extra is not part of it"):
        load(rewritten(checkpoint, state_dict=weights))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(checkpoint: Path, value: float) -> None:
    weights = weights_of(checkpoint)
    weights["classifier.bias"][1] = value
    with pytest.raises(TeacherError, match=r"classifier\.bias holds values that are not finite"):
        load(rewritten(checkpoint, state_dict=weights))


@pytest.mark.parametrize("weights", [None, {}, {"classifier.weight": 3}, ["classifier.weight"], {0: torch.ones(1)}])
def test_content_that_is_no_state_dict_is_refused(checkpoint: Path, weights: object) -> None:
    with pytest.raises(TeacherError, match=r"teacher\.pt: (holds no state dict|not the weights of a conv2-w4)"):
        load(rewritten(checkpoint, state_dict=weights))


@pytest.mark.parametrize("names", ["red", 3])
def test_unreadable_class_names_are_refused(checkpoint: Path, names: object) -> None:
    with pytest.raises(TeacherError, match="teacher of unreadable classes"):
        load(rewritten(checkpoint, class_names=names))


def test_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TeacherError, match=r"none\.pt: cannot be read \(No such file"):
        load(tmp_path / "none.pt")


@pytest.mark.parametrize("content", [b"", b"no checkpoint", b"PK\x03\x04 cut off"])
def test_file_that_is_no_checkpoint_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "teacher.pt"
    path.write_bytes(content)
    with pytest.raises(TeacherError, match=r"teacher\.pt: damaged.*torch\.save\(model\.state_dict\(\)"):
        load(path)


def test_every_cut_of_a_checkpoint_is_refused(checkpoint: Path) -> None:
    whole = checkpoint.read_bytes()
    for length in range(0, len(whole), len(whole) // 20):
        checkpoint.write_bytes(whole[:length])
        with pytest.raises(TeacherError, match="damaged"):
            load(checkpoint)


def test_list_is_refused(tmp_path: Path) -> None:
    torch.save([torch.zeros(1)], tmp_path / "list.pt")
    with pytest.raises(TeacherError, match="holds a list, expected a dictionary"):
        load(tmp_path / "list.pt")


def test_code_in_a_checkpoint_is_not_run(tmp_path: Path) -> None:
    path, mark = tmp_path / "trap.pt", tmp_path / "mark"
    torch.save({"state_dict": Trap(mark)}, path)
    with pytest.raises(TeacherError, match="damaged, or no file"):
        load(path)
    path.write_bytes(pickle.dumps(Trap(mark), protocol=2))
    with pytest.raises(TeacherError, match="damaged, or no file"):
        load(path)
    assert not mark.exists()


def test_failed_write_leaves_the_older_checkpoint(checkpoint: Path) -> None:
    before = checkpoint.read_bytes()
    with pytest.raises(OutputError):
        save_checkpoint(checkpoint.parent / "missing" / "teacher.pt", nn.Linear(1, 1), "linear", [])
    assert checkpoint.read_bytes() == before
    assert [path.name for path in checkpoint.parent.iterdir()] == [checkpoint.name]


def test_no_checkpoint_is_only_for_imagenet() -> None:
    with pytest.raises(TeacherError, match="no teacher for 3 classes; train one with `nrrdd teacher`"):
        load(None)


def test_imagenets_default_is_the_pretrained_resnet18(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Any, ...]] = []

    def made(architecture: str, num_classes: int, image_size: int, *, pretrained: bool = False) -> nn.Module:
        asked.append((architecture, num_classes, image_size, pretrained))
        return create_model("conv1-w1", num_classes, image_size)

    monkeypatch.setattr("builders.teacher.create_model", made)
    teacher = load(None, num_classes=1000, class_names=[str(number) for number in range(1000)])
    assert asked == [("resnet18", 1000, SIZE, True)]
    assert teacher.architecture == "resnet18"


# The check on real images


class Brightest(nn.Module):
    """Always right about `coloured` images; `shift` turns its classes round."""

    def __init__(self, shift: int = 0) -> None:
        super().__init__()
        self.shift = shift

    def forward(self, images: Tensor) -> Tensor:
        assert not self.training
        return images.mean((2, 3)).roll(self.shift, 1)


def judge(shift: int) -> Teacher:
    return Teacher(model=Brightest(shift).eval(), architecture="brightest", num_classes=3, sha256="")


def test_top1_counts_right_answers() -> None:
    images = coloured(40)
    assert measure_top1(Brightest(), images, MEAN, STD, device="cpu") == 1
    assert measure_top1(Brightest(1), images, MEAN, STD, device="cpu") == 0
    wrong = replace(images, labels=np.where(np.arange(40) < 10, 0, images.labels))
    assert measure_top1(Brightest(), wrong, MEAN, STD, device="cpu") == (30 + 4) / 40


def test_top1_leaves_the_mode_as_it_was() -> None:
    model = Brightest().train()
    measure_top1(model, coloured(3), MEAN, STD, device="cpu")
    assert model.training


def test_top1_of_some_images_looks_at_all_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    images = coloured(300)
    ordered = replace(images, labels=np.sort(images.labels), pixels=images.pixels[np.argsort(images.labels)])
    read = ArrayImages.read

    def watched(self: ArrayImages, index: int) -> np.ndarray[Any, Any]:
        seen.append(int(self.labels[index]))
        return read(self, index)

    monkeypatch.setattr(ArrayImages, "read", watched)
    measure_top1(Brightest(), ordered, MEAN, STD, device="cpu", limit=30)
    assert len(seen) == 30 and set(seen) == {0, 1, 2}


def folder(root: Path, size: int, count: int, broken: int) -> FolderImages:
    """`coloured` images as files, the first `broken` of them unusable."""
    images = coloured(count, size)
    for index in range(count):
        Image.fromarray(images.pixels[index]).save(root / f"{index}.png")
    for index in range(broken):
        (root / f"{index}.png").write_bytes(b"no image")
    return FolderImages(root=root, names=[f"{index}.png" for index in range(count)], labels=images.labels, size=size)


def test_top1_passes_over_unusable_images(tmp_path: Path) -> None:
    assert measure_top1(Brightest(), folder(tmp_path, SIZE, 6, broken=2), MEAN, STD, device="cpu") == 1


def test_top1_of_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TeacherError, match=r"no usable image.*--test-dir"):
        measure_top1(Brightest(), folder(tmp_path, SIZE, 2, broken=2), MEAN, STD, device="cpu")


def test_preflight_passes_a_good_teacher() -> None:
    assert preflight(judge(0), coloured(30), mean=MEAN, std=STD, device="cpu") == 1


def test_preflight_refuses_another_class_order() -> None:
    with pytest.raises(TeacherError, match=r"top-1 0\.0% on real images, expected 60\.0% or more.*another order"):
        preflight(judge(1), coloured(30), mean=MEAN, std=STD, device="cpu")


@pytest.mark.parametrize(("classes", "floor"), [(10, "60.0%"), (100, "20.0%"), (1000, "2.0%")])
def test_preflight_asks_less_of_more_classes(classes: int, floor: str) -> None:
    with pytest.raises(TeacherError, match=f"expected {floor}"):
        preflight(replace(judge(1), num_classes=classes), coloured(9), mean=MEAN, std=STD, device="cpu")


def test_preflight_takes_the_users_floor() -> None:
    assert preflight(judge(1), coloured(9), mean=MEAN, std=STD, device="cpu", minimum=0) == 0


# Training


def test_training_learns() -> None:
    reports: list[EpochReport] = []
    trained = train(source(), epochs=8, on_epoch=reports.append)
    assert trained.top1 is not None and trained.top1 > 0.9
    assert not trained.model.training
    assert [report.epoch for report in reports] == list(range(8))
    assert reports[-1].loss < reports[0].loss
    assert 0 <= reports[-1].train_top1 <= 1


def test_training_learns_in_bfloat16() -> None:
    trained = train(source(), epochs=8, bf16=True)
    assert trained.top1 is not None and trained.top1 > 0.9
    assert {weight.dtype for weight in trained.model.parameters()} == {torch.float32}
    assert digest(trained) != digest(train(source(), epochs=8))


@pytest.mark.parametrize("epochs", [1, 5, 10])
def test_training_of_few_steps(epochs: int) -> None:
    """Five steps in all would rise in a single one, by which torch would divide."""
    assert train(source(), epochs=epochs, batch_size=1000).top1 is not None


def test_training_without_test_images() -> None:
    assert train(source(test=None), epochs=1).top1 is None


def digest(trained: TrainedTeacher) -> str:
    return state_dict_sha256(trained.model.state_dict())


def test_seed_decides_the_weights_and_global_state_does_not() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = digest(train(source(), architecture="mobilenet_v2", batch_size=24, epochs=1))  # has dropout
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    assert digest(train(source(), architecture="mobilenet_v2", batch_size=24, epochs=1)) == first
    assert digest(train(source(), architecture="mobilenet_v2", batch_size=24, epochs=1, seed=1)) != first


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, "tests")
import torch
from test_teacher import source, train

torch.set_num_threads(int(sys.argv[2]))  # the result depends on them

def stop(report):
    if report.epoch == 1:
        os.kill(os.getpid(), signal.SIGKILL)

train(source(), state_path=Path(sys.argv[1]), on_epoch=stop)
"""


def test_killed_training_goes_on_where_it_was(tmp_path: Path, repository: Path) -> None:
    state = tmp_path / "teacher.state"
    command = [sys.executable, "-c", KILLED, str(state), str(torch.get_num_threads())]
    killed = subprocess.run(command, cwd=repository, check=False)
    assert killed.returncode == -signal.SIGKILL
    reports: list[EpochReport] = []
    resumed = train(source(), state_path=state, on_epoch=reports.append)
    assert [report.epoch for report in reports] == [2]
    assert digest(resumed) == digest(train(source()))


def test_finished_training_is_not_repeated(tmp_path: Path) -> None:
    state = tmp_path / "teacher.state"
    first = train(source(), state_path=state)
    reports: list[EpochReport] = []
    again = train(source(), state_path=state, on_epoch=reports.append)
    assert not reports
    assert (digest(again), again.top1) == (digest(first), first.top1)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"epochs": 4}, "epochs"),
        ({"seed": 1, "learning_rate": 0.2}, "learning_rate, seed"),
        ({"architecture": "conv1-w4"}, "architecture"),
        ({"bf16": True}, "bf16"),
    ],
)
def test_state_of_other_options_is_refused(tmp_path: Path, changes: dict[str, Any], named: str) -> None:
    state = tmp_path / "teacher.state"
    train(source(), state_path=state)
    with pytest.raises(ConfigError, match=f"teacher.state: a training state made with another {named};"):
        train(source(), state_path=state, **changes)


def test_state_of_other_images_is_refused(tmp_path: Path) -> None:
    state = tmp_path / "teacher.state"
    train(source(), state_path=state)
    with pytest.raises(ConfigError, match="another train_fingerprint"):
        train(source(train=coloured(48, seed=9)), state_path=state)


def test_damaged_state_is_refused(tmp_path: Path) -> None:
    state = tmp_path / "teacher.state"
    state.write_bytes(b"half a state")
    with pytest.raises(TeacherError, match=r"teacher\.state: damaged.*remove it"):
        train(source(), state_path=state)
    torch.save({"run": 3}, state)
    with pytest.raises(ConfigError, match="another kind of content"):
        train(source(), state_path=state)


DIVERGED = r"conv2-w4: training diverged in epoch [12] of 3 \(loss (nan|inf)\); lower --learning-rate, which was 1e\+30"


def test_diverged_training_ends_and_lets_another_start(tmp_path: Path) -> None:
    state = tmp_path / "teacher.state"
    reports: list[EpochReport] = []
    with pytest.raises(TeacherError, match=DIVERGED):
        train(source(), learning_rate=1e30, state_path=state, on_epoch=reports.append)
    assert len(reports) < 2 and not state.exists()
    reports.clear()
    train(source(), state_path=state, on_epoch=reports.append)
    assert len(reports) == 3


def test_weights_that_diverge_in_the_last_step_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step = _Trainer._step

    def spoilt(trainer: _Trainer, images: Tensor, labels: Tensor) -> Tensor:
        totals = step(trainer, images, labels)
        if trainer.schedule.last_epoch == 9:
            trainer.model.get_buffer("features.1.1.running_var")[0] = torch.inf
        return totals

    monkeypatch.setattr(_Trainer, "_step", spoilt)
    with pytest.raises(TeacherError, match=r"in epoch 3 of 3 \(features\.1\.1\.running_var is not finite\)"):
        train(source(), state_path=tmp_path / "teacher.state")
    assert not any(tmp_path.iterdir())


def test_diverged_training_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("builders.sources.load_source", lambda *arguments, **options: source())
    command = f"teacher --dataset coloured --epochs 3 --learning-rate 1e30 --device cpu --out {tmp_path}/teacher.pt"
    assert cli.main(command.split()) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.match(f"error: {DIVERGED}", line)
    assert not any(tmp_path.iterdir())


def class_folders(split: Path, count: int, size: int = SIZE, seed: int = 0) -> Path:
    """`coloured` images in a folder for each class."""
    images = coloured(count, size, seed)
    for index, label in enumerate(images.labels.tolist()):
        path = split / NAMES[label] / f"{index:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(images.pixels[index]).save(path)
    return split


def teach(data: Path, out: Path, *more: str) -> int:
    options = f"--architecture conv3-w4 --epochs 2 --batch-size 8 --device cpu --out {out}"
    return cli.main(["teacher", "--dataset", "imagefolder", "--data-dir", str(data), *options.split(), *more])


@pytest.mark.parametrize("size", [SIZE, 72])
def test_unusable_images_are_named(size: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Held in memory or read by a worker."""
    train, test = class_folders(tmp_path / "train", 24, size), class_folders(tmp_path / "test", 9, size)
    broken = [train / "blue" / "05.png", train / "red" / "03.png", test / "green" / "04.png"]
    for path in broken:
        path.write_bytes(b"no image")
    (train / NAMES[0] / "x.heic").write_bytes(b"no image")
    assert teach(tmp_path, tmp_path / "t.pt", "--workers", "1") == 0
    ignored, skipped = capsys.readouterr().err.splitlines()
    assert ignored.startswith(f"{train}: ignored 1 file for the ending (.heic)")
    names = [path.relative_to(path.parent.parent).as_posix() for path in broken]
    assert skipped == f"3 unusable source images skipped, named in {tmp_path}/t.pt.json: {', '.join(names)}"
    log = json.loads((tmp_path / "t.pt.json").read_text())
    assert [image["image"] for image in log["skipped_images"] + log["skipped_test_images"]] == names
    assert log["skipped_images"][0]["reason"].startswith("is not an image")


def test_a_finished_teacher_is_tested_on_other_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """On those given for the first time, and on others; not on the same, and it stays as it was without any."""
    out, log = tmp_path / "t.pt", tmp_path / "t.pt.json"
    train, test = class_folders(tmp_path / "data", 24), class_folders(tmp_path / "test", 9, seed=1)
    moved = class_folders(tmp_path / "moved", 9, seed=2)
    (tmp_path / "other").mkdir()
    for label in range(3):  # each class's images bear the next one's name
        (moved / NAMES[label]).rename(tmp_path / "other" / NAMES[(label + 1) % 3])
    assert teach(train, out) == 0
    assert json.loads(log.read_text())["test_top1"] is None and "not tested" in capsys.readouterr().out
    weights, found = out.read_bytes(), []
    for split, anew in ((test, True), (test, False), (tmp_path / "other", True)):
        assert teach(train, out, "--test-dir", str(split)) == 0
        printed = capsys.readouterr()
        assert f"{out}: trained already with these settings" in printed.err and ("tested anew" in printed.err) == anew
        found.append(json.loads(log.read_text())["test_top1"])
        assert f"test top-1 {found[-1]:.2%}" in printed.out
    assert found[0] == found[1] > found[2]
    before = log.read_bytes()
    assert teach(train, out) == 0
    assert "tested anew" not in capsys.readouterr().err
    assert (out.read_bytes(), log.read_bytes()) == (weights, before)


@pytest.mark.parametrize(
    ("option", "value", "bounds"),
    [
        ("--epochs", "1000000000000", "1 to 1000000"),
        ("--batch-size", "1", "2 to 262144"),
        ("--workers", "-1", "0 to 1024"),
        ("--seed", "-1", "0 to 9223372036854775807"),
    ],
)
def test_numbers_out_of_bounds_are_refused_though_the_teacher_is_there(
    option: str, value: str, bounds: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert teach(class_folders(tmp_path / "data", 6), tmp_path / "t.pt") == 0
    capsys.readouterr()
    assert teach(tmp_path / "data", tmp_path / "t.pt", option, value) == 2
    assert capsys.readouterr().err == f"error: {option}: found {value}, expected a value from {bounds}\n"


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"epochs": 0}, "--epochs: found 0"),
        ({"batch_size": 1}, "--batch-size: found 1"),
        ({"learning_rate": 0.0}, "--learning-rate: found 0.0"),
        ({"learning_rate": float("nan")}, "--learning-rate: found nan"),
        ({"architecture": "conv9"}, "conv9: 8 px"),
    ],
)
def test_impossible_options_are_refused(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        train(source(), **changes)


@pytest.mark.parametrize("size", [SIZE, 72])
def test_too_few_images_are_refused(size: int) -> None:
    with pytest.raises(DataError, match="1 usable training image; a"):
        train(source(size, train=coloured(1, size)))


def test_large_images_are_read_by_workers(tmp_path: Path) -> None:
    """Images beyond 64 px; three of the first batches' images are unusable."""
    large = source(72, train=folder(tmp_path, 72, 24, broken=3))
    here = train(large, architecture="conv3-w4", epochs=2, batch_size=8)
    assert here.top1 is not None and here.top1 > 0.5
    assert digest(train(large, architecture="conv3-w4", epochs=2, batch_size=8, workers=1)) == digest(here)


def _in_worker(images: FolderImages, signal_number: int) -> None:
    """A signal comes to a process that reads images, whenever it reads one."""
    read = images.read

    def and_signal(index: int) -> Any:
        if multiprocessing.parent_process() is not None:
            signal.raise_signal(signal_number)
        return read(index)

    object.__setattr__(images, "read", and_signal)


def test_a_worker_that_dies_is_named_with_its_option(tmp_path: Path) -> None:
    large = source(72, train=folder(tmp_path, 72, 24, broken=0))
    _in_worker(large.train, signal.SIGKILL)  # type: ignore[arg-type]
    with pytest.raises(DataError, match=r"a process that reads images has died.*--workers"):
        train(large, architecture="conv3-w4", epochs=1, batch_size=8, workers=1)


def test_workers_leave_an_interrupt_to_the_process_that_started_them(tmp_path: Path) -> None:
    """A terminal's Ctrl-C comes to all of them."""
    large = source(72, train=folder(tmp_path, 72, 24, broken=0))
    here = train(large, architecture="conv3-w4", epochs=1, batch_size=8)
    _in_worker(large.train, signal.SIGINT)  # type: ignore[arg-type]
    assert digest(train(large, architecture="conv3-w4", epochs=1, batch_size=8, workers=1)) == digest(here)


def test_large_images_none_of_which_is_usable(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="hardly any training image is usable"):
        train(source(72, train=folder(tmp_path, 72, 4, broken=4)), architecture="conv3-w4", epochs=1, batch_size=2)


@pytest.mark.gpu
def test_training_on_a_gpu() -> None:
    trained = train(source(), epochs=8, device="cuda", bf16=True)
    assert trained.top1 is not None and trained.top1 > 0.9


# Augmentation


def ramps(count: int, size: int) -> Tensor:
    """Images whose pixels name their place: row, column, and never 0."""
    rows = torch.arange(1, size + 1, dtype=torch.uint8)
    image = torch.stack([rows[:, None].expand(size, size), rows.expand(size, size), torch.full((size, size), 9)])
    return image.to(torch.uint8).expand(count, 3, size, size)


def test_shifts_are_windows_of_the_bordered_image() -> None:
    size, border = 16, 2
    images = ramps(400, size)
    views = augment(images, flip=False, seed=0, epoch=0, step=0)
    bordered = nn.functional.pad(images[0], [border] * 4)
    windows = {
        (top, left): bordered[:, top : top + size, left : left + size]
        for top in range(2 * border + 1)
        for left in range(2 * border + 1)
    }
    found = [[place for place, window in windows.items() if torch.equal(view, window)] for view in views]
    assert all(len(places) == 1 for places in found)
    assert {places[0] for places in found} == set(windows)


@pytest.mark.parametrize("size", [16, 72])
def test_flips_only_where_the_dataset_allows_them(size: int) -> None:
    def mirrored(flip: bool) -> int:
        views = augment(ramps(200, size), flip=flip, seed=0, epoch=0, step=0)
        columns = views[:, 1, size // 2].int()
        return int((columns[:, size // 2 + 4] < columns[:, size // 2 - 4]).sum())

    assert mirrored(False) == 0
    assert 60 < mirrored(True) < 140


def test_large_images_are_cropped() -> None:
    views = augment(ramps(200, 72), flip=False, seed=0, epoch=0, step=0)
    assert views.shape == (200, 3, 72, 72) and views.dtype == torch.uint8
    share = (views[:, 0, -1, 0].double() - views[:, 0, 0, 0].double() + 1) / 72  # of the side
    assert share.min() > 0.47 and share.max() <= 1 and share.std() > 0.1


def test_every_step_draws_anew() -> None:
    images = ramps(20, 16)
    first = augment(images, flip=True, seed=0, epoch=0, step=0)
    assert torch.equal(augment(images, flip=True, seed=0, epoch=0, step=0), first)
    for seed, epoch, step in [(1, 0, 0), (0, 1, 0), (0, 0, 1)]:
        assert not torch.equal(augment(images, flip=True, seed=seed, epoch=epoch, step=step), first)
