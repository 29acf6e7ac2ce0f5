"""The networks that teachers and students are made of.

Two families that the distillation papers use and torchvision lacks are defined here; `timm/NAME` is timm's
(see `builders.timm_models`), and every other name is torchvision's.

- `convD`, `convD-wW`: D blocks of 3×3 convolution (W = 128 channels), BatchNorm, ReLU and 2×2 average pool, then one
  linear layer on the flattened map. conv3 is the papers' network for 32 px, conv4 for 64, conv5 for 128.
- `resnet18-small`, `resnet18-small-wW`: ResNet-18 for images of 32 to 64 px: a 3×3 stem of stride 1, no max-pool;
  W = 64 channels in the first of its four stages.
"""

from __future__ import annotations

import difflib
import re
from collections import OrderedDict
from http.client import HTTPException
from pickle import UnpicklingError  # what torch.load raises when it refuses a file
from typing import Any

import torch
import torchvision.models as zoo
from torch import Tensor, hub, nn
from torch.nn import functional as F

from builders.foreign_weights import weights_only_loads
from builders.timm_models import PREFIX, create_timm_model
from nrrdd_format.errors import ConfigError, TeacherError, first_line

IMAGENET_CLASSES = 1000
_CONV = re.compile(r"conv(?P<depth>[1-9])(?:-w(?P<width>[1-9]\d{0,3}))?")
_RESNET = re.compile(r"resnet18-small(?:-w(?P<width>[1-9]\d{0,3}))?")


def create_model(architecture: str, num_classes: int, image_size: int, *, pretrained: bool = False) -> nn.Module:
    """Makes a classifier (B, 3, image_size, image_size) float32 -> logits (B, num_classes), in training mode.

    Args:
        architecture: `conv3`, `conv3-w32`, `resnet18-small`, `resnet18-small-w16` or the like, the name of a
            torchvision classification model, or timm's as `timm/NAME`.
        num_classes: length of the logits.
        image_size: side of the images in pixels; the weights of `convD` and torchvision's transformers depend on it.
        pretrained: take torchvision's best ImageNet-1k weights, or timm's; otherwise torch's generator draws them.

    Raises:
        ConfigError: the name is unknown, or the network does not fit `num_classes` or `image_size`.
        TeacherError: the pretrained weights cannot be downloaded, or hold more than weights.
    """
    if num_classes < 1:
        raise ConfigError(f"{architecture}: {num_classes} classes; expected at least 1")
    conv, resnet = _CONV.fullmatch(architecture), _RESNET.fullmatch(architecture)
    if architecture.startswith(PREFIX):
        return _fitting(architecture, create_timm_model(architecture, num_classes, pretrained=pretrained), image_size)
    if not conv and not resnet:
        return _torchvision_model(architecture, num_classes, image_size, pretrained)
    if pretrained:
        raise ConfigError(
            f"{architecture}: there are no pretrained weights for it; train a teacher with `nrrdd teacher`"
        )
    if conv:
        return ConvNet(int(conv["depth"]), int(conv["width"] or 128), num_classes, image_size)
    assert resnet is not None
    return SmallResNet18(int(resnet["width"] or 64), num_classes)


class ConvNet(nn.Module):
    """`convD`: `depth` blocks of `width` channels, flatten, linear. Sides must survive `depth` halvings."""

    def __init__(self, depth: int, width: int, num_classes: int, image_size: int) -> None:
        super().__init__()
        side = image_size >> depth
        if side < 1:
            raise ConfigError(
                f"conv{depth}: {image_size} px images vanish after {depth} halvings; take a smaller depth"
            )
        self.features = nn.Sequential(*(_conv_block(width if i else 3, width) for i in range(depth)))
        self.classifier = nn.Linear(width * side * side, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.classifier(self.features(images).flatten(1))
        return logits


def _conv_block(channels_in: int, channels_out: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels_in, channels_out, 3, padding=1, bias=False),
        nn.BatchNorm2d(channels_out),
        nn.ReLU(inplace=True),
        nn.AvgPool2d(2),
    )


class SmallResNet18(nn.Module):
    """`resnet18-small`: four stages of two basic blocks with `width`, 2·, 4· and 8·`width` channels."""

    def __init__(self, width: int, num_classes: int) -> None:
        super().__init__()
        stem = OrderedDict(conv=nn.Conv2d(3, width, 3, padding=1, bias=False), norm=nn.BatchNorm2d(width))
        self.stem = nn.Sequential(stem)
        self.stages = nn.Sequential(
            _stage(width, width, stride=1),
            _stage(width, 2 * width, stride=2),
            _stage(2 * width, 4 * width, stride=2),
            _stage(4 * width, 8 * width, stride=2),
        )
        self.classifier = nn.Linear(8 * width, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        features = self.stages(F.relu(self.stem(images)))
        logits: Tensor = self.classifier(F.adaptive_avg_pool2d(features, 1).flatten(1))
        return logits


def _stage(channels_in: int, channels_out: int, stride: int) -> nn.Sequential:
    return nn.Sequential(BasicBlock(channels_in, channels_out, stride), BasicBlock(channels_out, channels_out, 1))


class BasicBlock(nn.Module):
    """Two 3×3 convolutions beside a shortcut, as in ResNet-18."""

    def __init__(self, channels_in: int, channels_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels_out)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels_out)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or channels_in != channels_out:
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels_in, channels_out, 1, stride, bias=False), nn.BatchNorm2d(channels_out)
            )

    def forward(self, images: Tensor) -> Tensor:
        residual = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(images)))))
        return F.relu(residual + self.shortcut(images))


def _torchvision_model(architecture: str, num_classes: int, image_size: int, pretrained: bool) -> nn.Module:
    if architecture not in zoo.list_models(module=zoo):
        raise ConfigError(_unknown(architecture))
    if pretrained:
        return _fitting(architecture, _pretrained(architecture, num_classes), image_size)
    try:
        model = zoo.get_model(architecture, weights=None, **_options(architecture, num_classes, image_size))
    except (RuntimeError, ValueError, AssertionError) as error:
        raise _misfit(architecture, image_size, error) from error
    return _fitting(architecture, model, image_size)


def _fitting(architecture: str, model: nn.Module, image_size: int) -> nn.Module:
    """The model, if it takes images of this size."""
    try:
        _probe(model, image_size)
    except (RuntimeError, ValueError, AssertionError) as error:
        raise _misfit(architecture, image_size, error) from error
    return model


def _misfit(architecture: str, image_size: int, error: Exception) -> ConfigError:
    return ConfigError(
        f"{architecture}: cannot take images of {image_size} px ({first_line(error)}); take another network or "
        "larger images (resnet18-small takes 8 px and more)"
    )


@torch.no_grad()
def _probe(model: nn.Module, image_size: int) -> None:
    """Runs the network once, since the smallest image it takes is written down nowhere."""
    model.eval()(torch.zeros(1, 3, image_size, image_size))
    model.train()


def _options(architecture: str, num_classes: int, image_size: int) -> dict[str, Any]:
    """The arguments of torchvision's builders that must not be left to their defaults."""
    options: dict[str, Any] = {"num_classes": num_classes}
    if architecture.startswith("vit_"):
        options["image_size"] = image_size
    if architecture == "maxvit_t":
        options["input_size"] = (image_size, image_size)
    if architecture in ("googlenet", "inception_v3"):
        # Auxiliary heads would make the output a tuple. The input transform is part of the pretrained networks, but not
        # of their weights; with it always on, a checkpoint means the same network as `pretrained`.
        options |= {"aux_logits": False, "init_weights": False, "transform_input": True}
    return options


def _pretrained(architecture: str, num_classes: int) -> nn.Module:
    if num_classes != IMAGENET_CLASSES:
        raise ConfigError(
            f"{architecture}: pretrained weights know {IMAGENET_CLASSES} classes, expected {num_classes}; "
            "train a teacher with `nrrdd teacher` and give it with --teacher-checkpoint"
        )
    url = zoo.get_model_weights(architecture)["DEFAULT"].url
    elsewhere = (
        f"get {url} where there is a network and give it with --teacher {architecture} --teacher-checkpoint FILE"
    )
    try:
        with weights_only_loads():
            model: nn.Module = zoo.get_model(architecture, weights="DEFAULT")
    except UnpicklingError as error:
        raise TeacherError(
            f"{architecture}: the file of pretrained weights holds more than weights and is not loaded; remove "
            f"{url.rpartition('/')[2]} from {hub.get_dir()}/checkpoints, or {elsewhere}"
        ) from error
    except (OSError, HTTPException, RuntimeError) as error:  # the last: the file is damaged
        raise TeacherError(
            f"{architecture}: pretrained weights cannot be downloaded ({first_line(error)}); {elsewhere}"
        ) from error
    return model


def _unknown(architecture: str) -> str:
    known = ["conv3", "conv4", "conv5", "resnet18-small", *zoo.list_models(module=zoo)]
    close = difflib.get_close_matches(architecture, known, n=3)
    hint = f"did you mean {' or '.join(close)}? " if close else ""
    return (
        f"unknown architecture {architecture!r}; {hint}expected convD or convD-wW (conv3, conv3-w32), resnet18-small "
        "or resnet18-small-wW, the name of a torchvision classification model (resnet18, mobilenet_v2, …), or timm/NAME"
    )
