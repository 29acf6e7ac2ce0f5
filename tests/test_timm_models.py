"""timm's networks as teachers: names, class counts and the normalisation of their input."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from trap import Trap

from builders.models import create_model
from builders.teacher import load_teacher, save_checkpoint
from builders.timm_models import timm_normalisation
from nrrdd_format.errors import ConfigError, TeacherError

SIZE = 16
HALF = (0.5, 0.5, 0.5)
CLASSES = ["ape", "bee", "cat"]


class FakeTimm(SimpleNamespace):
    """The part of timm that is used: one network, `tiny`, whose weights know 3 classes."""

    config: SimpleNamespace

    def __init__(self) -> None:
        config = {"mean": HALF, "std": HALF, "num_classes": 3, "has_weights": True, "hf_hub_id": "timm/tiny", "url": ""}
        super().__init__(__version__="0", config=SimpleNamespace(**config), offline=False)

    def is_model(self, name: str) -> bool:
        return name.partition(".")[0] == "tiny"

    def list_models(self) -> list[str]:
        return ["tiny"]

    def get_pretrained_cfg(self, name: str) -> SimpleNamespace:
        if name == "tiny.foo":
            raise RuntimeError("Invalid pretrained tag (foo) for tiny.")
        return self.config

    def create_model(self, name: str, *, pretrained: bool = False, num_classes: int = 3) -> nn.Module:
        if pretrained and self.offline:
            raise ValueError("cannot reach\nthe hub")
        return create_model("conv2-w8", num_classes, SIZE)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeTimm:
    module = FakeTimm()
    monkeypatch.setitem(sys.modules, "timm", module)
    return module


def load(architecture: str | None, checkpoint: Path | None = None, classes: list[str] = CLASSES) -> Any:
    size = {"image_size": SIZE, "device": "cpu"}
    return load_teacher(architecture, checkpoint, num_classes=len(classes), class_names=classes, **size)  # type: ignore[arg-type]


def test_pretrained_weights_bring_their_normalisation(fake: FakeTimm) -> None:
    teacher = load("timm/tiny.a1")
    assert (teacher.architecture, teacher.normalisation) == ("timm/tiny.a1", (HALF, HALF))


def test_a_file_of_timms_own_weights_too(fake: FakeTimm, tmp_path: Path) -> None:
    torch.save(create_model("conv2-w8", 3, SIZE).state_dict(), tmp_path / "weights.bin")
    assert load("timm/tiny", tmp_path / "weights.bin").normalisation == (HALF, HALF)


def test_weights_trained_for_other_classes_do_not(fake: FakeTimm, tmp_path: Path) -> None:
    """How those see their input their file says, or else the source."""
    classes = ["ape", "bee"]
    torch.save(create_model("conv2-w8", 2, SIZE).state_dict(), tmp_path / "weights.bin")
    assert load("timm/tiny", tmp_path / "weights.bin", classes).normalisation is None
    own = ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    save_checkpoint(tmp_path / "teacher.pt", create_model("timm/tiny", 3, SIZE), "timm/tiny", CLASSES, own)
    assert load(None, tmp_path / "teacher.pt").normalisation == own


def test_weights_of_another_number_of_classes_are_refused(fake: FakeTimm) -> None:
    with pytest.raises(ConfigError, match=r"timm/tiny: timm's weights know 3 classes, expected 2"):
        load("timm/tiny", classes=["ape", "bee"])


def test_weights_that_cannot_be_had(fake: FakeTimm) -> None:
    fake.offline = True
    with pytest.raises(TeacherError, match=r"cannot be had \(cannot reach the hub\).*bin of timm/tiny") as caught:
        load("timm/tiny")
    assert "\n" not in str(caught.value)
    fake.config.has_weights = False
    with pytest.raises(ConfigError, match="timm has no weights for it"):
        load("timm/tiny")


def test_weights_that_would_run_code_are_refused(
    fake: FakeTimm, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Whatever timm asks torch.load for."""
    torch.save({"weight": Trap(tmp_path / "sprung")}, tmp_path / "weights.bin")
    monkeypatch.setattr(fake, "create_model", lambda *_, **__: torch.load(tmp_path / "weights.bin", weights_only=False))
    with pytest.raises(TeacherError, match=r"timm/tiny: pretrained weights cannot be had \(.*weights_only"):
        load("timm/tiny")
    assert not (tmp_path / "sprung").exists()
    torch.load(tmp_path / "weights.bin", weights_only=False)  # others are left as they were
    assert (tmp_path / "sprung").exists()


def test_unknown_names_and_tags(fake: FakeTimm) -> None:
    with pytest.raises(ConfigError, match=r"timm 0 has no network of this name; did you mean timm/tiny\?"):
        create_model("timm/tinny", 3, SIZE)
    with pytest.raises(ConfigError, match=r"timm/tiny.foo: Invalid pretrained tag"):
        create_model("timm/tiny.foo", 3, SIZE)


def test_networks_for_other_than_three_colours(fake: FakeTimm) -> None:
    fake.config.mean = fake.config.std = (0.5,)
    with pytest.raises(ConfigError, match="takes 1 colours, expected 3"):
        timm_normalisation("timm/tiny", 3)


def test_without_timm_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ConfigError, match=r"pip install 'nrrdd\[timm\]'"):
        create_model("timm/resnet18", 3, SIZE)


# The library itself


def test_timms_own_networks() -> None:
    pytest.importorskip("timm", reason="timm is not installed")
    from builders.cam import ClassActivation

    model = create_model("timm/resnet10t", 3, 64)
    assert ClassActivation(model, 64).pooling == "mean"
    assert timm_normalisation("timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k", 1000) == (HALF, HALF)
    assert timm_normalisation("timm/resnetv2_50x1_bit.goog_in21k", 1000) is None
    with pytest.raises(ConfigError, match="Invalid pretrained tag"):
        create_model("timm/resnet18.foo", 3, 64)
    with pytest.raises(ConfigError, match="has no network of this name"):
        create_model("timm/resnet1888", 3, 64)
    with pytest.raises(ConfigError, match="cannot take images of 64 px"):
        create_model("timm/vit_tiny_patch16_224", 3, 64)
    with pytest.raises(ConfigError, match="know 21843 classes, expected 1000"):
        create_model("timm/resnetv2_50x1_bit.goog_in21k", 1000, 64, pretrained=True)
