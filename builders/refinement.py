"""Non-critical region refinement: writes class-general features where the class activation map sees nothing critical.

Every step moves the pixels x̃ of a class-mixed batch against the gradient of the loss (see `builders.passes`) with
Adam, and the mask M = max(0, ε − C) scales Adam's *step* (Eq. 4 and 5): Adam divides a constant per-pixel factor
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
from torch import Tensor
from torch.nn import functional as F

from builders.compiled import compile_errors, compiled
from builders.config import RefinementSettings
from builders.discovery import Eyes
from builders.label_refinement import MixDraws, PairTables
from builders.passes import Passes
from nrrdd_format import draws
from nrrdd_format.errors import TeacherError

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
    passes: Passes,
    *,
    tables: PairTables,
    seed: int,
    batch: int,
    on_steps: Callable[[int, dict[str, float]], None],
) -> RefinedBatch:
    """Refines one class-mixed batch of initial images.

    Args:
        initial: (B, 3, S, S) uint8.
        labels: (B,) class of each image.
        passes: the teacher and the stage's settings; the same for all batches.
        tables: label refinement sees and mixes images as the records will.
        seed: the build's seed.
        batch: the batch's number, which keys its random draws.
        on_steps: called after every few steps with their number and the last one's unweighted terms of the loss.

    Raises:
        ConfigError: the passes shall be compiled, and cannot be.
        TeacherError: a loss or a pixel is not finite.
    """
    eyes, settings = passes.eyes, passes.settings
    pixels = eyes.see(initial).contiguous(memory_format=torch.channels_last)
    targets = torch.from_numpy(labels).to(eyes.device)
    objective = Objective(passes, targets, tables, seed, batch)
    adam = MaskedAdam(pixels, step_mask(eyes, pixels, targets, settings), _pixel_range(eyes), settings)
    losses: dict[str, float] = {}
    with passes.batchnorm, compile_errors():
        for step in range(settings.iterations):
            if settings.cam_every and step and step % settings.cam_every == 0:
                adam.mask = step_mask(eyes, pixels, targets, settings)
            gradient, terms = objective.gradient(pixels, step)
            pixels = adam.step(pixels, gradient, step)
            if (step + 1) % REPORT_STEPS == 0 or step + 1 == settings.iterations:
                losses = {name: float(value) for name, value in terms.items()}
                _check_finite(losses, pixels, batch, step)
                on_steps(step % REPORT_STEPS + 1, losses)
    return RefinedBatch(images=_to_uint8(pixels, eyes), losses=losses)


def _check_finite(losses: dict[str, float], pixels: Tensor, batch: int, step: int) -> None:
    """One pixel that is no number makes the whole batch such within a step, and that would be stored as black."""
    lost = [name for name, value in losses.items() if not math.isfinite(value)]
    if not bool(pixels.isfinite().all()):
        lost.append("pixels")
    if lost:
        raise TeacherError(
            f"refinement of batch {batch}: by step {step + 1} not finite: {', '.join(lost)}; the teacher's gradient "
            f"is not, or overflows: try --precision fp32, a lower --learning-rate or another teacher"
        )


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

    def __init__(self, passes: Passes, targets: Tensor, tables: PairTables, seed: int, batch: int) -> None:
        self._passes, self._targets = passes, targets
        self._mixes = MixDraws(targets.cpu().numpy(), tables, seed, batch)
        self._seed, self._batch, self._flip = seed, batch, tables.flip

    def gradient(self, pixels: Tensor, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The gradient of the weighted loss at `pixels`, like them float32, and the unweighted terms (scalars)."""
        passes, settings = self._passes, self._passes.settings
        pixels = pixels.detach().requires_grad_(settings.jitter)
        seen = jitter(pixels, self._seed, self._batch, step, flip=self._flip) if settings.jitter else pixels
        gradient, terms = passes.unmixed(seen, self._targets)
        if settings.alpha_lr > 0:
            mixed, more = passes.mixed(seen, self._targets, self._mixes.draw(step, pixels.device))
            gradient, terms = gradient + mixed, terms | more
        if settings.jitter:
            (gradient,) = torch.autograd.grad(seen, pixels, gradient)
        return gradient, terms


class MaskedAdam:
    """Adam whose step, not its gradient, is scaled by the mask (Eq. 5); pixels stay within their bounds.

    Args:
        pixels: where it starts, (B, 3, S, S).
        mask: M, broadcast to the pixels' shape.
        bounds: least and largest pixel, each (1, 3, 1, 1).
        settings: the stage's settings.
    """

    def __init__(
        self, pixels: Tensor, mask: Tensor, bounds: tuple[Tensor, Tensor], settings: RefinementSettings
    ) -> None:
        self.mask, self._bounds, self._betas = mask, bounds, settings.betas
        self._mean, self._square = torch.zeros_like(pixels), torch.zeros_like(pixels)
        self._factors = torch.tensor(adam_factors(settings), device=pixels.device)
        self._update = compiled(masked_adam, settings.compile)

    def step(self, pixels: Tensor, gradient: Tensor, step: int) -> Tensor:
        """The pixels moved against the gradient, new memory."""
        return self._update(
            pixels, gradient, self.mask, self._mean, self._square, self._factors[step], self._bounds, self._betas
        )


def masked_adam(
    pixels: Tensor,
    gradient: Tensor,
    mask: Tensor,
    mean: Tensor,
    square: Tensor,
    factors: Tensor,
    bounds: tuple[Tensor, Tensor],
    betas: tuple[float, float],
    eps: float = 1e-8,
) -> Tensor:
    """x̃ − M ⊙ η·m̂/(√v̂ + eps), clamped; `mean` m and `square` v are brought up to date in place.

    `factors` are the step's (see `adam_factors`), as a tensor: as numbers they would be compiled anew in every step.
    """
    mean.lerp_(gradient, 1 - betas[0])
    square.mul_(betas[1]).addcmul_(gradient, gradient, value=1 - betas[1])
    rate, share = factors.unbind()
    root = (square / share).sqrt_().add_(eps)
    return (pixels - (mean * rate).div_(root).mul_(mask)).clamp_(*bounds)


def adam_factors(settings: RefinementSettings) -> list[tuple[float, float]]:
    """For each step η/(1 − β₁ᵗ), which turns m into η·m̂, and 1 − β₂ᵗ, by which v is divided for v̂; t counts from 1."""
    beta1, beta2 = settings.betas
    steps = range(settings.iterations)
    return [(learning_rate(settings, t) / (1 - beta1 ** (t + 1)), 1 - beta2 ** (t + 1)) for t in steps]


def learning_rate(settings: RefinementSettings, step: int) -> float:
    """η at this step: cosine from the full rate towards 0, or constant."""
    if settings.schedule == "constant":
        return settings.learning_rate
    return settings.learning_rate * 0.5 * (1 + math.cos(math.pi * step / settings.iterations))


def jitter(pixels: Tensor, seed: int, batch: int, step: int, *, flip: bool) -> Tensor:
    """SRe2L's augmentation inside the loop, one draw for the batch: random resized crop, roll and (`flip`) flip."""
    size = pixels.shape[-1]
    area, down, right, mirror, roll_y, roll_x = draws.uniform(seed, "refinement-jitter", batch, step, count=6)
    side = max(1, round(size * math.sqrt(0.08 + 0.92 * area)))
    top, left = int(down * (size - side + 1)), int(right * (size - side + 1))
    cut = F.interpolate(pixels[..., top : top + side, left : left + side], size, mode="bilinear")
    if flip and mirror < 0.5:
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
