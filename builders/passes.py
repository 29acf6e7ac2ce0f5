"""The teacher's passes in a refinement step: the losses of

    L = L_ce(T(x̃), y) + α_bn·L_bn + α_lr·L_lr        (paper, Eq. 2, 3, 11 and 12)

as functions of the pixels, and their gradients. L_ce and L_bn come from one pass, L_lr from another, on mixed images.

Shapes: B images, S the side; x̃ is (B, 3, S, S) float32 in the teacher's normalised space.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from builders.batchnorm import BatchNormLoss
from builders.compiled import compiled, in_one_order
from builders.config import RefinementSettings
from builders.discovery import Eyes
from builders.graphs import Graphed, Outputs
from builders.label_refinement import Mixes, label_refinement_loss


class Passes:
    """Made once for all batches, since compiling takes a minute or two; gradients only inside `with passes.batchnorm`.

    Each pass is followed back before the next begins, so that memory holds the activations of one at a time; on a GPU
    the whole way there and back is one CUDA graph.
    """

    def __init__(self, eyes: Eyes, settings: RefinementSettings) -> None:
        self.eyes, self.settings = eyes, settings
        self.model = eyes.activation.model
        self.batchnorm = BatchNormLoss(self.model, settings.first_bn_factor)
        self._forward_unmixed = compiled(self.unmixed_losses, settings.compile)
        self._forward_mixed = compiled(self.mixed_loss, settings.compile)
        self._graphed = Graphed(eyes.device)

    def forget_graphs(self) -> None:
        """Once no batch is left: gives back the GPU's memory that the graphs hold."""
        self._graphed.forget()

    def unmixed(self, pixels: Tensor, targets: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The gradient of L_ce + α_bn·L_bn, like the pixels float32, and the terms (scalars, unweighted)."""
        gradient, cross_entropy, batchnorm = self._graphed(self._unmixed, pixels, targets)
        return gradient, {"ce": cross_entropy, "bn": batchnorm}

    def mixed(self, pixels: Tensor, targets: Tensor, mixes: Mixes) -> tuple[Tensor, dict[str, Tensor]]:
        """The gradient of α_lr·L_lr, and the term."""
        drawn = (mixes.view, mixes.flip, mixes.aug, mixes.is_cutmix, mixes.box, mixes.lam)
        # On a GPU the gradient of a view comes in any order, compiled or not.
        with in_one_order(self.settings.compile and pixels.device.type == "cpu"):
            gradient, loss = self._graphed(self._mixed, pixels, targets, *drawn)
        return gradient, {"lr": loss}

    def _unmixed(self, pixels: Tensor, targets: Tensor) -> Outputs:
        pixels = pixels.detach().requires_grad_(True)
        cross_entropy, batchnorm = self._forward_unmixed(pixels, targets)
        (gradient,) = torch.autograd.grad(cross_entropy + self.settings.alpha_bn * batchnorm, pixels)
        return gradient, cross_entropy.detach(), batchnorm.detach()

    def _mixed(
        self,
        pixels: Tensor,
        targets: Tensor,
        view: Tensor | None,
        flip: Tensor,
        aug: Tensor,
        is_cutmix: Tensor,
        box: Tensor,
        lam: Tensor,
    ) -> Outputs:
        pixels = pixels.detach().requires_grad_(True)
        mixes = Mixes(view=view, flip=flip, aug=aug, is_cutmix=is_cutmix, box=box, lam=lam)
        loss = self._forward_mixed(pixels, targets, mixes)
        (gradient,) = torch.autograd.grad(self.settings.alpha_lr * loss, pixels)
        return gradient, loss.detach()

    def unmixed_losses(self, pixels: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """L_ce and L_bn of the pixels as they are."""
        with self._precision(pixels):
            logits, batchnorm = self.batchnorm(pixels)
        return F.cross_entropy(logits.float(), targets), batchnorm

    def mixed_loss(self, pixels: Tensor, targets: Tensor, mixes: Mixes) -> Tensor:
        """L_lr of the pixels."""
        with self._precision(pixels):
            return label_refinement_loss(self.model, pixels, targets, mixes, self.settings.label_refinement)

    def _precision(self, pixels: Tensor) -> torch.autocast:
        """Where the teacher computes in bfloat16, images, statistics and losses stay float32."""
        return torch.autocast(pixels.device.type, torch.bfloat16, enabled=self.settings.precision == "bf16")
