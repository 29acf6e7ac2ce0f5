"""The baseline that refinement is timed beside: image recovery as the SRe2L paper describes it, in plain PyTorch.

One forward and one backward pass a step, in float32: cross-entropy plus the distance of every BatchNorm layer's input
statistics from the running ones, read by forward hooks; a random crop and flip before the pass; torch's Adam with a
cosine schedule; pixels clipped to their range. Nothing is compiled, and nothing is taken from anybody's code.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.transforms import RandomHorizontalFlip, RandomResizedCrop

ALPHA_BN = 0.01
FIRST_FACTOR = 10.0


class _Statistics:
    """Forward hook of one BatchNorm layer: keeps how far its input's statistics lie from the running ones."""

    def __init__(self, layer: nn.BatchNorm2d) -> None:
        self.distance = torch.zeros(())
        layer.register_forward_hook(self._measure)

    def _measure(self, layer: nn.Module, inputs: tuple[Tensor, ...], output: Any) -> None:
        assert isinstance(layer, nn.BatchNorm2d) and layer.running_mean is not None and layer.running_var is not None
        features = inputs[0]
        mean = features.mean((0, 2, 3))
        variance = features.permute(1, 0, 2, 3).reshape(features.shape[1], -1).var(1, unbiased=False)
        self.distance = torch.norm(layer.running_var - variance, 2) + torch.norm(layer.running_mean - mean, 2)


def recover(model: nn.Module, images: Tensor, labels: Tensor, iterations: int, bounds: tuple[Tensor, Tensor]) -> Tensor:
    """Optimises a batch of images for `iterations` steps.

    Args:
        model: a network in eval mode that belongs to this call alone: its hooks stay.
        images: (B, 3, S, S) float32, normalised.
        labels: (B,) int64.
        iterations: steps.
        bounds: black and white in normalised space, each (1, 3, 1, 1).
    """
    statistics = [_Statistics(module) for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    crop, flip = RandomResizedCrop(images.shape[-1], antialias=True), RandomHorizontalFlip()
    images = images.clone().requires_grad_(True)
    optimizer = torch.optim.Adam([images], lr=0.25, betas=(0.5, 0.9), eps=1e-8)
    for step in range(iterations):
        for group in optimizer.param_groups:
            group["lr"] = 0.25 * 0.5 * (1 + math.cos(math.pi * step / iterations))
        optimizer.zero_grad()
        logits = model(flip(crop(images)))
        distances = [one.distance for one in statistics]
        loss = F.cross_entropy(logits, labels) + ALPHA_BN * (FIRST_FACTOR * distances[0] + sum(distances[1:]))
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        with torch.no_grad():
            images.copy_(images.clamp(*bounds))
    return images.detach()
