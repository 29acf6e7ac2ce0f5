"""The networks: their names, shapes and refusals."""

from __future__ import annotations

import warnings
from pathlib import Path
from urllib.error import URLError

import pytest
import torch
import torchvision.models as zoo
from torch import nn
from trap import Trap

from builders.models import SmallResNet18, create_model
from nrrdd_format.errors import ConfigError, TeacherError


@pytest.mark.parametrize(
    ("architecture", "size"),
    [
        ("conv3-w8", 32),
        ("conv1-w4", 8),
        ("conv4-w8", 64),
        ("resnet18-small-w4", 32),
        ("resnet18-small-w4", 8),
        ("shufflenet_v2_x0_5", 64),
    ],
)
def test_logits(architecture: str, size: int) -> None:
    model = create_model(architecture, 7, size)
    assert model.training
    assert model(torch.randn(2, 3, size, size)).shape == (2, 7)


def test_default_widths_are_the_papers() -> None:
    convolutions = [module for module in create_model("conv3", 10, 32).modules() if isinstance(module, nn.Conv2d)]
    assert [convolution.out_channels for convolution in convolutions] == [128, 128, 128]
    # ResNet-18 for CIFAR has 11,173,962 parameters in every publication that counts them.
    assert sum(p.numel() for p in create_model("resnet18-small", 10, 32).parameters()) == 11_173_962


def test_small_resnet_keeps_a_map_of_four_places_a_side() -> None:
    model = create_model("resnet18-small-w4", 10, 32)
    assert isinstance(model, SmallResNet18)
    assert model.stages(model.stem(torch.randn(1, 3, 32, 32))).shape == (1, 32, 4, 4)


@pytest.mark.parametrize(
    "architecture",
    [
        "",
        "conv",
        "conv0",
        "conv3-w",
        "conv3-w0",
        "conv3-w16 ",
        "conv3-w99999",
        "resnet18-small-w0",
        "fcn_resnet50",
        "r18",
    ],
)
def test_unknown_name_is_refused(architecture: str) -> None:
    with pytest.raises(ConfigError, match=r"unknown architecture .*resnet18-small.*torchvision"):
        create_model(architecture, 10, 32)


def test_misspelt_name_brings_a_suggestion() -> None:
    with pytest.raises(ConfigError, match=r"did you mean .*resnet18-small"):
        create_model("resnet18-smal", 10, 32)


def test_no_classes_are_refused() -> None:
    with pytest.raises(ConfigError, match="0 classes"):
        create_model("conv3", 0, 32)


@pytest.mark.parametrize(("architecture", "size"), [("conv5", 16), ("squeezenet1_1", 8), ("vit_b_16", 50)])
def test_images_the_network_cannot_take_are_refused(architecture: str, size: int) -> None:
    with pytest.raises(ConfigError, match=f"{architecture}.* {size} px"):
        create_model(architecture, 10, size)


def test_googlenet_has_one_output_in_training_too() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = create_model("googlenet", 5, 32)
    assert isinstance(model(torch.randn(2, 3, 32, 32)), torch.Tensor)


def test_pretrained_weights_are_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = _put_into_cache("squeezenet1_1", tmp_path, monkeypatch)
    model = create_model("squeezenet1_1", 1000, 64, pretrained=True)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("architecture", ["conv3", "resnet18-small"])
def test_own_networks_have_no_pretrained_weights(architecture: str) -> None:
    with pytest.raises(ConfigError, match=r"no pretrained weights.*nrrdd teacher"):
        create_model(architecture, 1000, 32, pretrained=True)


def test_pretrained_weights_are_for_a_thousand_classes() -> None:
    with pytest.raises(ConfigError, match=r"know 1000 classes, expected 10.*--teacher-checkpoint"):
        create_model("resnet18", 10, 224, pretrained=True)


def test_failed_download_names_file_and_option(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_network(*arguments: object, **options: object) -> None:
        raise URLError("no route to host")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("torch.hub.urlopen", no_network)
    with pytest.raises(TeacherError, match=r"no route to host.*squeezenet1_1-\w+\.pth.*--teacher-checkpoint") as caught:
        create_model("squeezenet1_1", 1000, 64, pretrained=True)
    assert "\n" not in str(caught.value)


def test_pretrained_weights_that_would_run_code_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _put_into_cache("squeezenet1_1", tmp_path, monkeypatch)
    (file,) = (tmp_path / "hub" / "checkpoints").iterdir()
    torch.save({"weight": Trap(tmp_path / "sprung")}, file)
    with pytest.raises(TeacherError, match=rf"holds more than weights.*remove {file.name}.*--teacher-checkpoint"):
        create_model("squeezenet1_1", 1000, 64, pretrained=True)
    assert not (tmp_path / "sprung").exists()


def _put_into_cache(architecture: str, home: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, torch.Tensor]:
    """Puts random weights where torchvision looks for the pretrained ones before it downloads them."""
    weights: dict[str, torch.Tensor] = zoo.get_model(architecture).state_dict()
    file = Path(zoo.get_model_weights(architecture)["DEFAULT"].url).name
    folder = home / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    torch.save(weights, folder / file)
    monkeypatch.setenv("TORCH_HOME", str(home))
    return weights
