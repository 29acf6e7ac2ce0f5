"""Several teachers as one: their mean probability, what a manifest says of them, and who refuses what."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from benchmarks.cli import main as nrrdd
from builders.cli import main, parse
from builders.config import TeacherChoice, pair_teachers
from builders.ensemble import Ensemble, load_teachers
from builders.models import create_model
from builders.pipeline import build
from builders.teacher import Normalisation, save_checkpoint
from nrrdd_format.dataset import open_dataset
from nrrdd_format.errors import ConfigError, TeacherError
from nrrdd_format.verify import verify_dataset

SIZE = 16
CLASSES = ("ape", "bee", "cat")
ARCHITECTURES = ("conv2-w8", "conv1-w8")


class Fixed(nn.Module):
    """Gives the same logits for every image."""

    def __init__(self, *logits: float) -> None:
        super().__init__()
        self.logits = torch.tensor(logits)

    def forward(self, images: Tensor) -> Tensor:
        return self.logits.expand(len(images), -1)


def test_the_mean_of_the_probabilities() -> None:
    members = [Fixed(0.0, 1.0, 2.0), Fixed(3.0, 0.0, 0.0), Fixed(0.0, 0.0, 0.0)]
    images = torch.zeros(2, 3, 4, 4)
    expected = torch.stack([member(images).softmax(1) for member in members]).mean(0)
    torch.testing.assert_close(Ensemble(members)(images).softmax(1), expected)


def test_probabilities_that_float32_cannot_hold_stay_finite() -> None:
    """Each member is sure of another class: the third has e^-500, the others' mean is that of one member alone."""
    logits = Ensemble([Fixed(500.0, 0.0, 0.0), Fixed(0.0, 500.0, 0.0)])(torch.zeros(1, 3, 4, 4))[0]
    assert logits.isfinite().all()
    torch.testing.assert_close(logits, torch.tensor([np.log(0.5), np.log(0.5), -500.0], dtype=torch.float32))


def test_half_precision_is_averaged_in_float32() -> None:
    member = Fixed(9.0, -9.0)
    member.logits = member.logits.half()
    assert Ensemble([member, member])(torch.zeros(1, 3, 4, 4)).dtype == torch.float32


def test_the_order_of_the_members_changes_no_bit(tmp_path: Path) -> None:
    """Their digest does not tell it, and work of one order is taken up by another."""
    for number in range(4):
        save(tmp_path / f"{number}.pt", "conv1-w8", number)
    images = torch.rand(64, 3, SIZE, SIZE)

    def logits(order: tuple[int, ...]) -> torch.Tensor:
        choices = [TeacherChoice(checkpoint=tmp_path / f"{number}.pt") for number in order]
        teacher = load_teachers(choices, num_classes=3, image_size=SIZE, device="cpu", class_names=CLASSES)
        with torch.no_grad():
            return teacher.model(images)  # type: ignore[no-any-return]

    first = logits((0, 1, 2, 3))
    assert all(torch.equal(logits(order), first) for order in ((3, 2, 1, 0), (1, 3, 0, 2)))


# Options


def test_what_belongs_together() -> None:
    a, b = Path("a.pt"), Path("b.pt")
    assert pair_teachers((), ()) == (TeacherChoice(),)
    assert pair_teachers(("x", "y"), ()) == (TeacherChoice(architecture="x"), TeacherChoice(architecture="y"))
    assert pair_teachers((), (a, b)) == (TeacherChoice(checkpoint=a), TeacherChoice(checkpoint=b))
    assert pair_teachers(("x", "y"), (a, b))[1] == TeacherChoice(architecture="y", checkpoint=b)
    with pytest.raises(ConfigError, match="--teacher: found 1 architecture for 2 checkpoints"):
        pair_teachers(("x",), (a, b))
    config = parse(["--dataset", "digits", "--ipc", "1", "--teacher-checkpoint", "a.pt", "b.pt"])
    assert config.teachers == pair_teachers((), (a, b))


# The build


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("inputs")
    rng = np.random.default_rng(0)
    for name in CLASSES:
        (root / "train" / name).mkdir(parents=True)
        for number in range(4):
            pixels = rng.integers(0, 256, (SIZE, SIZE, 3), np.uint8)
            Image.fromarray(pixels).save(root / "train" / name / f"{number}.png")
    for seed, architecture in enumerate(ARCHITECTURES):
        save(root / f"{seed}.pt", architecture, seed)
    return root


def save(path: Path, architecture: str, seed: int, normalisation: Normalisation | None = None) -> None:
    torch.manual_seed(seed)
    save_checkpoint(path, create_model(architecture, 3, SIZE), architecture, CLASSES, normalisation)


def options(inputs: Path, out: Path, *teachers: str) -> list[str]:
    checkpoints = " ".join(str(inputs / name) for name in teachers)
    return (
        f"--dataset imagefolder --data-dir {inputs}/train --ipc 2 --out {out} --epochs 4 --iterations 1 --cycle 2 "
        f"--batch-size 6 --device cpu --threads 1 --min-teacher-top1 0 --teacher-checkpoint {checkpoints}"
    ).split()


@pytest.fixture(scope="module")
def distilled(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Labelled by both teachers, after the same work folder served the first alone."""
    root = tmp_path_factory.mktemp("distilled")
    for out, teachers in (("single", ("0.pt",)), ("joint", ("0.pt", "1.pt"))):
        assert main([*options(inputs, root / out, *teachers), "--work-dir", str(root / "work")]) == 0
    return root


def test_images_are_made_with_the_first_teacher_alone(distilled: Path) -> None:
    assert verify_dataset(distilled / "joint") == []
    folders = sorted(path.name.partition("-")[0] for path in (distilled / "work").iterdir() if path.is_dir())
    assert folders == ["discovery", "encoding", "refinement", "relabeling", "relabeling", "scan", "writing", "writing"]
    with open_dataset(distilled / "single") as single, open_dataset(distilled / "joint") as joint:
        assert single.shards[0].image_bytes(0) == joint.shards[0].image_bytes(0)
        ours, theirs = single.shards[0].records(0), joint.shards[0].records(0)
        assert (ours.distance_org != theirs.distance_org).any()


def test_the_manifest_names_the_members(distilled: Path) -> None:
    teacher = open_dataset(distilled / "joint").manifest.teacher
    members = open_dataset(distilled / "joint").manifest.method["teachers"]
    assert teacher.architecture == "conv2-w8+conv1-w8"
    assert [member["architecture"] for member in members] == ["conv2-w8", "conv1-w8"]
    digests = "\n".join(sorted(member["sha256"] for member in members))
    assert teacher.sha256 == hashlib.sha256(digests.encode()).hexdigest()
    assert members[0]["sha256"] == open_dataset(distilled / "single").manifest.teacher.sha256
    assert "teachers" not in open_dataset(distilled / "single").manifest.method


def test_verify_and_soft_labels_take_all_members(
    inputs: Path, distilled: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    both = ["--teacher-checkpoint", str(inputs / "0.pt"), str(inputs / "1.pt")]
    assert nrrdd(["verify", str(distilled / "joint"), *both, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["drift"]["explained"]
    assert nrrdd(["verify", str(distilled / "joint"), *both[:2]]) == 2
    assert "found 1 checkpoint, expected 2: the dataset was labelled by conv2-w8+conv1-w8" in capsys.readouterr().err
    assert nrrdd(["verify", str(distilled / "joint"), both[0], both[2], both[1]]) == 2
    assert "holds a conv1-w8, expected conv2-w8" in capsys.readouterr().err
    student = f"student {distilled}/joint --labels soft --student conv1-w8 --epochs 1 --data-dir {inputs}/train --json"
    assert nrrdd([*student.split(), "--test-dir", str(inputs / "train"), *both]) == 0
    assert json.loads(capsys.readouterr().out)["settings"]["teacher_checkpoint"] == both[1:]


def test_the_same_weights_twice(inputs: Path) -> None:
    choices = pair_teachers((), (inputs / "0.pt", inputs / "0.pt"))
    with pytest.raises(TeacherError, match="same weights"):
        load_teachers(choices, num_classes=3, image_size=SIZE, device="cpu", class_names=CLASSES)


def test_members_that_see_their_input_differently(inputs: Path, tmp_path: Path) -> None:
    save(tmp_path / "other.pt", "conv1-w8", 3, ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)))
    config = parse(options(inputs, tmp_path / "out", "0.pt", str(tmp_path / "other.pt")))
    with pytest.raises(TeacherError, match=r"conv1-w8: its input is normalised.*trained alike"):
        build(config)


def test_every_member_is_tested(inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One whose classes stand in another order would hide behind the others."""
    config = replace(parse(options(inputs, tmp_path / "out", "0.pt", "1.pt")), epochs=1, iterations=0)
    build(config)
    said = capsys.readouterr().err
    for name in ("conv2-w8", "conv1-w8", "conv2-w8+conv1-w8"):
        assert f"teacher {name}: top-1" in said
