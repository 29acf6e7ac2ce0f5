"""Critical-based initial data discovery: from the training images of one class to its initial synthetic images.

Each image's class activation map says which of its random crops show what matters; the best crops fill the class's
patch pool; of the pool, the patches the teacher is least sure of are kept, and β of them tile one synthetic image
(paper, Section 3.2 and Eq. 1).

Shapes: N images, K crops an image, S the side in pixels; images are uint8 RGB (N, 3, S, S).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from builders.cam import ClassActivation
from builders.config import DiscoverySettings
from builders.conventions import Colour
from builders.image_sets import ImageSet
from nrrdd_format import draws
from nrrdd_format.replay import apply_views, normalize

BATCH = 100


@dataclass(frozen=True, kw_only=True)
class Eyes:
    """The teacher as discovery and refinement use it: its activation maps and the pixels it expects."""

    activation: ClassActivation
    mean: Colour
    std: Colour
    device: torch.device

    def see(self, images: NDArray[np.uint8]) -> torch.Tensor:
        """Normalises uint8 images (N, 3, S, S) to the teacher's input, float32 on its device."""
        return normalize(torch.from_numpy(images).to(self.device).float(), self.mean, self.std)


@dataclass(frozen=True, kw_only=True)
class DiscoveredClass:
    """The initial synthetic images of one class: `images` (ipc, 3, S, S) uint8; `flat_maps` counts flat CAMs."""

    images: NDArray[np.uint8]
    flat_maps: int


def discover_class(
    train: ImageSet, label: int, usable: Sequence[int], eyes: Eyes, settings: DiscoverySettings, seed: int
) -> DiscoveredClass:
    """Makes the initial synthetic images of one class.

    Args:
        train: the training images.
        label: the class.
        usable: indices into `train` of the images to look at, in the order they are taken.
        eyes: the teacher.
        settings: the stage's settings.
        seed: the build's seed.
    """
    if settings.init == "real":
        images = np.stack([train.read(index) for index in usable[: settings.ipc]])
        return DiscoveredClass(images=images, flat_maps=0)
    pool, flat_maps = _fill_pool(train, label, usable, eyes, settings, seed)
    kept = pool[_keep(_confidence(pool, eyes), label, settings, seed)]
    return DiscoveredClass(images=tile(kept, settings.beta), flat_maps=flat_maps)


def _fill_pool(
    train: ImageSet, label: int, usable: Sequence[int], eyes: Eyes, settings: DiscoverySettings, seed: int
) -> tuple[NDArray[np.uint8], int]:
    """The class's patch pool (P, 3, S, S): the top-t crops of every image, t as small as fills the pool."""
    top = min(settings.crops, math.ceil(settings.images_needed / len(usable)))
    patches, flat_maps = [], 0
    for start in range(0, len(usable), BATCH):
        indices = usable[start : start + BATCH]
        images = np.stack([train.read(index) for index in indices])
        boxes = np.stack([random_crops(seed, index, images.shape[-1], settings) for index in indices])
        cam, _, flat = eyes.activation(eyes.see(images), torch.full((len(indices),), label, device=eyes.device))
        best = top_crops(cam.cpu().numpy(), boxes, top, settings)
        patches.append(_cut(images, best))
        flat_maps += flat
    return np.concatenate(patches)[: settings.images_needed], flat_maps


def random_crops(seed: int, index: int, size: int, settings: DiscoverySettings) -> NDArray[np.int64]:
    """Random square crops of one image: (K, 4) int64 [top, left, height, width] in pixels (RDED's crops, ratio 1)."""
    area, down, right = draws.uniform(seed, "discovery-crops", index, count=3 * settings.crops).reshape(3, -1)
    low, high = settings.crop_scale
    side = np.clip(np.rint(size * np.sqrt(low + (high - low) * area)), 1, size)
    top, left = np.floor(down * (size - side + 1)), np.floor(right * (size - side + 1))
    return np.stack([top, left, side, side], axis=1).astype(np.int64)


def top_crops(
    cam: NDArray[np.float32], boxes: NDArray[np.int64], top: int, settings: DiscoverySettings
) -> NDArray[np.int64]:
    """The `top` boxes of each image with the highest activation inside: (N, top, 4) from (N, K, 4)."""
    total = np.pad(cam.astype(np.float64).cumsum(1).cumsum(2), ((0, 0), (1, 0), (1, 0)))
    up, left = boxes[..., 0], boxes[..., 1]
    down, right = up + boxes[..., 2], left + boxes[..., 3]
    image = np.arange(len(cam))[:, None]
    score = total[image, down, right] - total[image, up, right] - total[image, down, left] + total[image, up, left]
    if settings.crop_score == "mean":
        score = score / (boxes[..., 2] * boxes[..., 3])
    order = np.argsort(-score, axis=1, kind="stable")[:, :top]
    return np.take_along_axis(boxes, order[..., None], axis=1)


def _cut(images: NDArray[np.uint8], boxes: NDArray[np.int64]) -> NDArray[np.uint8]:
    """Crops and resizes to full size: (N·t, 3, S, S) from images (N, 3, S, S) and boxes (N, t, 4)."""
    top = boxes.shape[1]
    views = apply_views(
        torch.from_numpy(np.repeat(images, top, axis=0)),
        torch.from_numpy(boxes.reshape(-1, 4)),
        torch.zeros(len(images) * top, dtype=torch.bool),
    )
    return views.numpy()


@torch.no_grad()
def _confidence(pool: NDArray[np.uint8], eyes: Eyes) -> NDArray[np.float32]:
    """The teacher's highest softmax probability for each patch: (P,) float32."""
    model = eyes.activation.model
    parts = [
        model(eyes.see(pool[start : start + BATCH])).float().softmax(1).amax(1).cpu()
        for start in range(0, len(pool), BATCH)
    ]
    return torch.cat(parts).numpy()


def _keep(confidence: NDArray[np.float32], label: int, settings: DiscoverySettings, seed: int) -> NDArray[np.int64]:
    """Indices of the β·IPC patches that are kept."""
    if settings.confidence == "random":
        order = draws.permutation(seed, "discovery-keep", label, count=len(confidence))
    else:
        sign = 1 if settings.confidence == "lowest" else -1
        order = np.argsort(sign * confidence, kind="stable").astype(np.int64)
    return order[: settings.patches]


def tile(patches: NDArray[np.uint8], beta: int) -> NDArray[np.uint8]:
    """Tiles β patches, each resized to 1/√β of the side, into one image: (P/β, 3, S, S) from (P, 3, S, S)."""
    side = math.isqrt(beta)
    if side == 1:
        return patches
    count, channels, size, _ = patches.shape
    small = F.interpolate(torch.from_numpy(patches), size // side, mode="bilinear", antialias=True).numpy()
    grid = small.reshape(count // beta, side, side, channels, size // side, size // side)
    return np.ascontiguousarray(grid.transpose(0, 3, 1, 4, 2, 5).reshape(count // beta, channels, size, size))
