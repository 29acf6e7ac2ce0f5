"""Class activation maps: where in an image a classifier sees the class (paper, Eq. 1; Zhou et al. 2016).

The map of class y is C = Σ_k w_k^y · f_k(x): f the last feature map, w the weights of the linear layer behind it. This
holds for two kinds of networks: those that average the feature map over space, and those that flatten it (`convD`),
whose weights then differ from place to place: C(u,v) = Σ_k w_{k,u,v}^y · f_k(u,v).

Shapes: B images of side S, K channels of the feature map, h × w its places, C classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from builders.memory import at_once
from nrrdd_format.errors import TeacherError

FLAT = 1e-6
"""A map whose values lie closer together than this says nothing."""
PROBE_IMAGES = 2
PROBE_TOLERANCE = 1e-3

Pooling = Literal["mean", "flatten"]


def teacher_batch(device: torch.device, size: int) -> int:
    """Images of `size` px that a teacher is shown at once: a CPU is fastest where they stay in its cache."""
    return max(16, min(100, (1 << 20) // size**2)) if device.type == "cpu" else at_once(256, size)


class ClassActivation:
    """Class activation maps of one network.

    Making one finds the linear head and the last feature map by running a probe, and checks on it that pooling the map
    gives the head's input; so what a call returns is what the logits are made of.

    Attributes:
        model: the network, switched to eval mode.
        image_size: S.
        pooling: `mean` where the logit is the map's mean plus bias, `flatten` where it is its sum plus bias.

    Raises:
        TeacherError: the network has no such structure, or no BatchNorm, on which refinement rests, or is dead.
    """

    def __init__(self, model: nn.Module, image_size: int, origin: str | None = None) -> None:
        """`origin` is the file of the weights, for messages."""
        self.model, self.image_size = model.eval(), image_size
        kind = type(model).__name__
        anatomy = _examine(model, image_size, kind if origin is None else f"{origin}: {kind}")
        self.pooling: Pooling = anatomy.pooling
        self._features, self._head = anatomy.features, anatomy.head

    @torch.no_grad()
    def raw(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The maps as Eq. 1 has them.

        Args:
            images: (B, 3, S, S) float32, normalised.
            labels: (B,) int64, the class whose map is wanted.

        Returns:
            Maps (B, h, w) float32 and the network's logits (B, C).
        """
        features, logits = self._forward(images)
        weight = self._head.weight[labels]
        if self.pooling == "mean":
            maps = torch.einsum("bkhw,bk->bhw", features, weight)
        else:
            maps = (features * weight.view_as(features)).sum(1)
        return maps.float(), logits

    @torch.no_grad()
    def __call__(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, int]:
        """Maps stretched to [0, 1] image by image, then resized to the images' size.

        Args:
            images: (B, 3, S, S) float32, normalised.
            labels: (B,) int64, the class whose map is wanted.

        Returns:
            Maps (B, S, S) float32 in [0, 1], logits (B, C), and how many maps are flat; those are all zeros.
        """
        maps, logits = self.raw(images, labels)
        low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
        flat = high - low < FLAT
        stretched = torch.where(flat, 0.0, (maps - low) / (high - low).clamp_min(FLAT))
        resized = F.interpolate(stretched[:, None], images.shape[-2:], mode="bilinear", align_corners=False)
        return resized[:, 0].clamp(0, 1), logits, int(flat.sum())

    def _forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Last feature map (B, K, h, w) and logits (B, C)."""
        kept: list[Tensor] = []
        handle = self._features.register_forward_hook(lambda module, inputs, output: kept.append(output))
        try:
            logits: Tensor = self.model(images)
        finally:
            handle.remove()
        return kept[-1], logits


@dataclass(frozen=True, kw_only=True, eq=False)
class _Anatomy:
    """The parts of a network that its maps are made of; `features` is the module that gives the last feature map."""

    features: nn.Module
    head: nn.Linear
    pooling: Pooling


@dataclass(frozen=True, kw_only=True, eq=False)
class _Call:
    """One call of a module during the probe."""

    module: nn.Module
    input: Any
    output: Any


def _examine(model: nn.Module, image_size: int, name: str) -> _Anatomy:
    """Finds the head and the last feature map from what the modules do to a probe, and checks that they fit."""
    calls = _trace(model, image_size)
    last = next(call for call in reversed(calls) if next(call.module.children(), None) is None)
    if not isinstance(last.module, nn.Linear):
        raise _refusal(name, f"its last layer is {type(last.module).__name__}, expected a linear head")
    if not any(isinstance(module, nn.BatchNorm2d) for module in model.modules()):
        raise _refusal(name, "it has no BatchNorm layers, whose statistics refinement matches")
    position = max(i for i, call in enumerate(calls) if _is_map(call))
    linear = [call for call in calls[position + 1 :] if isinstance(call.module, nn.Linear)]
    if len(linear) > 1:
        raise _refusal(name, f"its head has {len(linear)} linear layers, expected one behind the last feature map")
    features = calls[position]
    if features.output[0, 0].numel() == 1:
        raise _refusal(
            name, f"at {image_size} px its last feature map has a single place; resnet18-small shrinks images less"
        )
    if not bool(features.output.any()):
        raise _refusal(name, "its features are all zero whatever it is shown, so its training failed; train it anew")
    pooling = _pooling(features.output, last.input)
    if pooling is None:
        raise _refusal(name, "neither mean nor flattening of its last feature map gives the input of its linear layer")
    return _Anatomy(features=features.module, head=last.module, pooling=pooling)


def _refusal(name: str, reason: str) -> TeacherError:
    return TeacherError(f"{name} cannot be a teacher: {reason}")


def _is_map(call: _Call) -> bool:
    """Whether a call gave a feature map, and not merely reduced or passed on the one before."""
    is_new = not isinstance(call.module, (nn.AdaptiveAvgPool2d, nn.Dropout))
    return is_new and isinstance(call.output, Tensor) and call.output.ndim == 4


def _pooling(features: Tensor, head_input: Tensor) -> Pooling | None:
    """How `features` (B, K, h, w) became `head_input`, by comparing the numbers."""
    ways: list[tuple[Pooling, Tensor]] = [("mean", features.mean((2, 3))), ("flatten", features.flatten(1))]
    tolerance = PROBE_TOLERANCE * float(head_input.abs().max())
    for pooling, pooled in ways:
        if pooled.shape == head_input.shape and float((pooled - head_input).abs().max()) < tolerance:
            return pooling
    return None


@torch.no_grad()
def _trace(model: nn.Module, image_size: int) -> list[_Call]:
    """Every call of every module on a probe of noise, in the order in which the calls end."""
    calls: list[_Call] = []

    def keep(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        calls.append(_Call(module=module, input=inputs[0] if inputs else None, output=output))

    handles = [module.register_forward_hook(keep) for module in model.modules()]
    device = next(model.parameters()).device
    noise = torch.randn(PROBE_IMAGES, 3, image_size, image_size, generator=torch.Generator().manual_seed(0))
    try:
        model(noise.to(device))
    finally:
        for handle in handles:
            handle.remove()
    return calls
