"""Networks of the library timm, as `timm/<name>` or `timm/<name>.<tag>`.

timm's ImageNet-1k weights know the 1000 classes in the order of their sorted WNIDs, which is that of torchvision and of
a folder of WNIDs; the check on real images shows it. Their input's mean and standard deviation differ from one to the
next and stand in timm's configuration: whoever uses the weights normalises with these.
"""

from __future__ import annotations

import difflib
from types import ModuleType
from typing import Any

from torch import nn

from builders.conventions import Colour
from builders.foreign_weights import weights_only_loads
from nrrdd_format.errors import ConfigError, TeacherError

PREFIX = "timm/"


def create_timm_model(architecture: str, num_classes: int, *, pretrained: bool) -> nn.Module:
    """Makes the network, in training mode, with timm's weights or those that torch's global generator draws.

    Raises:
        ConfigError: timm is not installed, does not know the name, or has no weights for so many classes.
        TeacherError: the weights cannot be downloaded, or hold more than weights.
    """
    timm, name = _timm(), architecture.removeprefix(PREFIX)
    if not timm.is_model(name):
        close = difflib.get_close_matches(name, timm.list_models(), n=3)
        hint = f"; did you mean {' or '.join(PREFIX + other for other in close)}?" if close else ""
        raise ConfigError(f"{architecture}: timm {timm.__version__} has no network of this name{hint}")
    config = _config(timm, architecture)
    if pretrained:
        return _pretrained(timm, architecture, num_classes, config)
    model: nn.Module = timm.create_model(name, num_classes=num_classes)
    return model


def timm_normalisation(architecture: str, num_classes: int) -> tuple[Colour, Colour] | None:
    """Mean and standard deviation that timm's own weights for so many classes expect; None: it has no such weights."""
    config = _config(_timm(), architecture)
    if config is None or config.num_classes != num_classes:
        return None
    mean, std = (tuple(map(float, values)) for values in (config.mean, config.std))
    if len(mean) != 3 or len(std) != 3:
        raise ConfigError(f"{architecture}: takes {len(mean)} colours, expected 3")
    return (mean[0], mean[1], mean[2]), (std[0], std[1], std[2])


def _pretrained(timm: ModuleType, architecture: str, num_classes: int, config: Any) -> nn.Module:
    if config is None or not config.has_weights:
        raise ConfigError(f"{architecture}: timm has no weights for it; give a file with --teacher-checkpoint")
    if config.num_classes != num_classes:
        raise ConfigError(
            f"{architecture}: timm's weights know {config.num_classes} classes, expected {num_classes}; take other "
            "weights (a tag such as .a1_in1k), or train a teacher and give it with --teacher-checkpoint"
        )
    try:
        with weights_only_loads():  # timm's versions differ in which files they load so
            model: nn.Module = timm.create_model(architecture.removeprefix(PREFIX), pretrained=True)
    except Exception as error:  # the hub's client passes on whatever its HTTP library raises
        raise TeacherError(
            f"{architecture}: pretrained weights cannot be had ({' '.join(str(error).split())[:200]}); get "
            f"pytorch_model.bin of {config.hf_hub_id or config.url} where there is a network and give it with "
            f"--teacher {architecture} --teacher-checkpoint FILE"
        ) from error
    return model


def _config(timm: ModuleType, architecture: str) -> Any:
    """timm's configuration of the weights that the name stands for: mean, std, classes, where they lie."""
    try:
        return timm.get_pretrained_cfg(architecture.removeprefix(PREFIX))
    except RuntimeError as error:  # an unknown tag
        raise ConfigError(f"{architecture}: {error}") from error


def _timm() -> ModuleType:
    try:
        import timm
    except ImportError as error:
        raise ConfigError("timm is not installed; run: pip install 'nrrdd[timm]'") from error
    module: ModuleType = timm
    return module
