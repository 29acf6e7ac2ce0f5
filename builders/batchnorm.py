"""The BatchNorm loss: how far a batch's statistics lie from those the teacher was trained on (paper, Eq. 3)."""

from __future__ import annotations

from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

OVER = (0, 2, 3)
"""What a BatchNorm layer's statistics are taken over: images and places."""


class BatchNormLoss:
    """L_bn = Σ_l ‖μ_l(x̃) − μ_l‖₂ + ‖σ²_l(x̃) − σ²_l‖₂ over the BatchNorm layers' inputs.

    SRe2L's form: norms are not squared, the variance is biased, the first layer counts `first_factor` times. Use as a
    context manager (it hooks the layers); a call is one measured forward pass. Passes run otherwise, such as those of
    mixed images, do not count.
    """

    def __init__(self, model: nn.Module, first_factor: float) -> None:
        self._model = model
        self._layers = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
        self._first_factor = first_factor
        self._terms: list[Tensor] | None = None  # of the measured pass under way
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def __enter__(self) -> BatchNormLoss:
        self._handles = [layer.register_forward_pre_hook(self._record) for layer in self._layers]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Runs the model: logits (B, C) and the loss (scalar) of the images (B, 3, S, S)."""
        terms: list[Tensor] = []
        self._terms = terms
        logits: Tensor = self._model(images)
        self._terms = None
        return logits, sum(terms[1:], start=self._first_factor * terms[0])

    def _record(self, layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if self._terms is None:
            return
        assert isinstance(layer, nn.BatchNorm2d)
        assert layer.running_mean is not None and layer.running_var is not None
        mean, variance = batch_statistics(inputs[0])
        self._terms.append((mean - layer.running_mean).norm() + (variance - layer.running_var).norm())


def batch_statistics(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance (C,) of each channel of (B, C, h, w), float32 whatever the features' type."""
    mean, variance = _BatchStatistics.apply(features)
    return mean, variance


class _BatchStatistics(torch.autograd.Function):
    """The gradient is one linear function of each channel; torch's own goes over the features several times."""

    @staticmethod
    def forward(context: Any, features: Tensor) -> tuple[Tensor, Tensor]:
        mean, variance = (_reductions if torch.compiler.is_compiling() else _one_kernel)(features)
        context.save_for_backward(features, mean)
        return mean, variance

    @staticmethod
    def backward(context: Any, grad_mean: Tensor, grad_variance: Tensor) -> Tensor:
        features, mean = context.saved_tensors
        count = features.numel() // features.shape[1]
        slope = grad_variance * (2 / count)
        offset = grad_mean / count - slope * mean
        channels = (1, -1, 1, 1)
        slope, offset = slope.view(channels).to(features.dtype), offset.view(channels).to(features.dtype)
        return torch.addcmul(offset, features, slope)


def _one_kernel(features: Tensor) -> tuple[Tensor, Tensor]:
    """By what brings BatchNorm's running statistics up to date: var_mean is slow over channels that come last."""
    dtype = torch.promote_types(features.dtype, torch.float32)  # of the running ones, and so of the result
    running = features.new_zeros((2, features.shape[1]), dtype=dtype)
    mean, variance = torch.batch_norm_update_stats(features, running[0], running[1], 0.0)
    return mean, variance


def _reductions(features: Tensor) -> tuple[Tensor, Tensor]:
    """In operations that torch.compile knows, and fuses with what comes before."""
    if features.dtype not in (torch.bfloat16, torch.float16):
        variance, mean = torch.var_mean(features, dim=OVER, correction=0)
        return mean, variance
    # Sums in float32 without a float32 copy of the features.
    mean = features.mean(OVER, dtype=torch.float32)
    square = torch.linalg.vector_norm(features, dim=OVER, dtype=torch.float32).square()
    return mean, (square / (features.numel() // features.shape[1]) - mean.square()).clamp_min(0)
