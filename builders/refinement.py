"""Non-critical region refinement: writes class-general features where the class activation map sees nothing critical.

Every step moves the pixels x̃ of a class-mixed batch against the gradient of

    L = L_ce(T(x̃), y) + α_bn·L_bn + α_lr·L_lr        (paper, Eq. 2, 3, 11 and 12)

with Adam, and the mask M = max(0, ε − C) scales Adam's *step* (Eq. 4 and 5): Adam divides a constant per-pixel factor
of the gradient away again, so a masked gradient would only switch pixels on and off.

Shapes: B images, S the side, K classes; x̃ is (B, 3, S, S) float32 in the teacher's normalised space.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from builders.batchnorm import BatchNormLoss
from builders.config import RefinementSettings
from builders.discovery import Eyes
from builders.label_refinement import LabelRefinementLoss
from nrrdd_format import draws
from nrrdd_format.codebooks import MixTable

REPORT_STEPS = 25
"""Reading a loss makes a GPU wait, so it is done once in so many steps."""


@dataclass(frozen=True, kw_only=True)
class RefinedBatch:
    """Result of one batch.

    Attributes:
        images: (B, 3, S, S) uint8.
        losses: the terms of the last step, unweighted; empty without steps.
    """

    images: NDArray[np.uint8]
    losses: dict[str, float]


def refine_batch(
    initial: NDArray[np.uint8],
    labels: NDArray[np.int64],
    eyes: Eyes,
    settings: RefinementSettings,
    *,
    mixes: MixTable,
    seed: int,
    batch: int,
    on_steps: Callable[[int, dict[str, float]], None],
) -> RefinedBatch:
    """Refines one class-mixed batch of initial images.

    Args:
        initial: (B, 3, S, S) uint8.
        labels: (B,) class of each image.
        eyes: the teacher.
        settings: the stage's settings.
        mixes: the dataset's mix codebook: label refinement mixes as the records will.
        seed: the build's seed.
        batch: the batch's number, which keys its random draws.
        on_steps: called after every few steps with their number and the last one's unweighted terms of the loss.
    """
    pixels = eyes.see(initial).contiguous(memory_format=torch.channels_last)
    targets = torch.from_numpy(labels).to(eyes.device)
    objective = Objective(eyes, targets, settings, mixes, seed, batch)
    low, high = _pixel_range(eyes)
    adam = MaskedAdam(pixels, step_mask(eyes, pixels, targets, settings), settings)
    losses: dict[str, float] = {}
    with objective.batchnorm:
        for step in range(settings.iterations):
            if settings.cam_every and step and step % settings.cam_every == 0:
                adam.mask = step_mask(eyes, pixels, targets, settings)
            gradient, terms = objective.gradient(pixels, step)
            pixels = adam.step(pixels, gradient, step).clamp_(low, high)
            if (step + 1) % REPORT_STEPS == 0 or step + 1 == settings.iterations:
                losses = {name: float(value) for name, value in terms.items()}
                on_steps(step % REPORT_STEPS + 1, losses)
    return RefinedBatch(images=_to_uint8(pixels, eyes), losses=losses)


def step_mask(eyes: Eyes, pixels: Tensor, targets: Tensor, settings: RefinementSettings) -> Tensor:
    """M, the factor of every pixel's step: (B, 1, S, S) float32, 0 keeps a pixel.

    It is max(0, ε − C), C the activation map of each image's class (Eq. 4), unless `settings.mask` says otherwise.
    """
    if settings.mask == "all":
        return torch.ones_like(pixels[:, :1])
    margin = settings.epsilon - eyes.activation(pixels, targets)[0][:, None]
    return (margin > 0).float() if settings.mask == "binary" else margin.clamp_min(0)


class Objective:
    """The refinement loss of one batch; its random draws are keyed by (seed, batch, step)."""

    def __init__(
        self,
        eyes: Eyes,
        targets: Tensor,
        settings: RefinementSettings,
        mixes: MixTable,
        seed: int,
        batch: int,
    ) -> None:
        self.model: nn.Module = eyes.activation.model
        self.batchnorm = BatchNormLoss(self.model, settings.first_bn_factor)
        self.label_refinement = LabelRefinementLoss(targets, settings.label_refinement, mixes, seed, batch)
        self.targets = targets
        self.settings = settings
        self._seed, self._batch = seed, batch

    def gradient(self, pixels: Tensor, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The gradient of the weighted loss at `pixels`, like them float32, and the unweighted terms (scalars).

        Each pass of the teacher is followed back before the next begins, so that memory holds one at a time.
        """
        settings = self.settings
        pixels = pixels.detach().requires_grad_(True)
        moved = jitter(pixels, self._seed, self._batch, step) if settings.jitter else pixels
        seen = moved.detach().requires_grad_(True)
        terms = {}
        with self._precision(), self.batchnorm.recording():
            logits = self.model(seen)
        terms["ce"], terms["bn"] = F.cross_entropy(logits.float(), self.targets), self.batchnorm.loss()
        (gradient,) = torch.autograd.grad(terms["ce"] + settings.alpha_bn * terms["bn"], seen)
        if settings.alpha_lr > 0:
            with self._precision():
                terms["lr"] = self.label_refinement(self.model, seen, step)
            (mixed,) = torch.autograd.grad(settings.alpha_lr * terms["lr"], seen)
            gradient = gradient + mixed
        if settings.jitter:
            (gradient,) = torch.autograd.grad(moved, pixels, gradient)
        return gradient, {name: value.detach() for name, value in terms.items()}

    def _precision(self) -> torch.autocast:
        """Where the teacher computes in bfloat16, images, statistics and losses stay float32."""
        return torch.autocast(self.targets.device.type, torch.bfloat16, enabled=self.settings.precision == "bf16")


class MaskedAdam:
    """Adam whose step, not its gradient, is scaled by the mask (Eq. 5)."""

    def __init__(self, pixels: Tensor, mask: Tensor, settings: RefinementSettings, eps: float = 1e-8) -> None:
        self._mean, self._square = torch.zeros_like(pixels), torch.zeros_like(pixels)
        self.mask, self._settings, self._eps = mask, settings, eps

    def learning_rate(self, step: int) -> float:
        """η at this step: cosine from the full rate towards 0, or constant."""
        if self._settings.schedule == "constant":
            return self._settings.learning_rate
        return self._settings.learning_rate * 0.5 * (1 + math.cos(math.pi * step / self._settings.iterations))

    def step(self, pixels: Tensor, gradient: Tensor, step: int) -> Tensor:
        """x̃ − M ⊙ η·m̂/(√v̂ + eps)."""
        beta1, beta2 = self._settings.betas
        self._mean.lerp_(gradient, 1 - beta1)
        self._square.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        root = (self._square / (1 - beta2 ** (step + 1))).sqrt_().add_(self._eps)
        rate = self.learning_rate(step) / (1 - beta1 ** (step + 1))
        return pixels - (self._mean * rate).div_(root).mul_(self.mask)


def jitter(pixels: Tensor, seed: int, batch: int, step: int) -> Tensor:
    """SRe2L's augmentation inside the loop, one draw for the batch: random resized crop, roll and flip."""
    size = pixels.shape[-1]
    area, down, right, flip, roll_y, roll_x = draws.uniform(seed, "refinement-jitter", batch, step, count=6)
    side = max(1, round(size * math.sqrt(0.08 + 0.92 * area)))
    top, left = int(down * (size - side + 1)), int(right * (size - side + 1))
    cut = F.interpolate(pixels[..., top : top + side, left : left + side], size, mode="bilinear")
    if flip < 0.5:
        cut = cut.flip(-1)
    reach = size // 8
    shift = (int(roll_y * (2 * reach + 1)) - reach, int(roll_x * (2 * reach + 1)) - reach)
    return torch.roll(cut, shift, dims=(-2, -1))


def _pixel_range(eyes: Eyes) -> tuple[Tensor, Tensor]:
    """Black and white in normalised space, each (1, 3, 1, 1)."""
    mean, std = _channels(eyes.mean, eyes.device), _channels(eyes.std, eyes.device)
    return -mean / std, (1 - mean) / std


def _to_uint8(pixels: Tensor, eyes: Eyes) -> NDArray[np.uint8]:
    mean, std = _channels(eyes.mean, eyes.device), _channels(eyes.std, eyes.device)
    return ((pixels * std + mean) * 255).round().clamp(0, 255).to(torch.uint8).cpu().numpy()


def _channels(values: Sequence[float], device: torch.device) -> Tensor:
    return torch.tensor(values, device=device, dtype=torch.float32).view(1, -1, 1, 1)
