"""Critical-based initial data discovery: from the training images of each class to its initial synthetic images.

Each image's class activation map says which of its random crops show what matters; the best crops are the class's
patch pool; of the pool, the patches the teacher is surest of are kept (the paper's choice, those it is least sure of,
taught students less: docs/method.md), and β of them tile one synthetic image (paper, Section 3.2 and Eq. 1).

Images are read ahead by processes and come to the teacher in batches that mix the classes of a group. Only the patches
that may still be kept stay in memory, each as small as the tile that it will be.

Shapes: N images, K crops an image, P patches, S the side in pixels; images are uint8 RGB (N, 3, S, S).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from builders.cam import ClassActivation, teacher_batch
from builders.config import DiscoverySettings
from builders.conventions import Colour
from builders.image_sets import ImageSet
from builders.prefetch import in_processes
from nrrdd_format import draws
from nrrdd_format.replay import apply_views, normalize

GROUP_IMAGES = 500
"""Images of a group of classes, at most, unless one class has more: what a stopped build may do again."""


@dataclass(frozen=True, kw_only=True)
class Eyes:
    """The teacher as discovery and refinement use it: its activation maps and the pixels it expects."""

    activation: ClassActivation
    mean: Colour
    std: Colour
    device: torch.device

    def see(self, images: NDArray[np.uint8] | Tensor) -> Tensor:
        """Normalises uint8 images (N, 3, S, S) to the teacher's input, float32 on its device."""
        pixels = torch.from_numpy(images) if isinstance(images, np.ndarray) else images
        return normalize(pixels.to(self.device).float(), self.mean, self.std)


@dataclass(frozen=True, kw_only=True)
class DiscoveredClass:
    """The initial synthetic images of one class: `images` (ipc, 3, S, S) uint8."""

    label: int
    images: NDArray[np.uint8]


@dataclass(frozen=True, kw_only=True)
class DiscoveredGroup:
    """The classes of one group; `flat_maps` counts images whose CAM is flat."""

    classes: list[DiscoveredClass]
    flat_maps: int


def class_groups(num_classes: int, settings: DiscoverySettings) -> list[range]:
    """The classes whose images share batches; the settings alone decide, so that every run forms the same batches."""
    of_class = max(settings.images_needed, settings.ipc)  # noise looks at none, and makes as many
    size = max(1, GROUP_IMAGES // of_class)
    return [range(first, min(first + size, num_classes)) for first in range(0, num_classes, size)]


def discover_groups(
    train: ImageSet,
    groups: Sequence[Sequence[int]],
    usable: Sequence[Sequence[int] | NDArray[np.int64]],
    eyes: Eyes,
    settings: DiscoverySettings,
    seed: int,
    processes: int = 1,
) -> Iterator[DiscoveredGroup]:
    """Makes the initial synthetic images of groups of classes, one group after the other.

    Args:
        train: the training images.
        groups: the classes of each group.
        usable: for each class, indices into `train` of the images to look at, in the order they are taken.
        eyes: the teacher.
        settings: the stage's settings.
        seed: the build's seed.
        processes: how many read images.
    """

    def taken(group: Sequence[int]) -> dict[int, NDArray[np.int64]]:
        return {label: np.asarray(usable[label][: settings.images_needed], np.int64) for label in group}

    if settings.init == "noise":
        yield from (_noise(group, eyes, settings, seed) for group in groups)
        return
    order = np.concatenate([np.empty(0, np.int64), *(each for group in groups for each in taken(group).values())])
    with closing(in_processes(train.read, order, processes)) as pixels:
        for group in groups:
            images = taken(group)
            yield _whole(images, pixels) if settings.init == "real" else _mosaics(images, pixels, eyes, settings, seed)


def _noise(group: Sequence[int], eyes: Eyes, settings: DiscoverySettings, seed: int) -> DiscoveredGroup:
    """Standard normal values in the teacher's normalised space, as images."""
    size, classes = eyes.activation.image_size, []
    for label in group:
        values = draws.generator(seed, "discovery-noise", label).standard_normal((settings.ipc, size, size, 3))
        shown = ((values * eyes.std + eyes.mean) * 255).round().clip(0, 255).astype(np.uint8)
        classes.append(DiscoveredClass(label=label, images=np.ascontiguousarray(shown.transpose(0, 3, 1, 2))))
    return DiscoveredGroup(classes=classes, flat_maps=0)


def _whole(images: Mapping[int, NDArray[np.int64]], pixels: Iterator[NDArray[np.uint8]]) -> DiscoveredGroup:
    """Training images as they are."""
    classes = [
        DiscoveredClass(label=label, images=np.stack([next(pixels) for _ in indices]))
        for label, indices in images.items()
    ]
    return DiscoveredGroup(classes=classes, flat_maps=0)


def _mosaics(
    images: Mapping[int, NDArray[np.int64]],
    pixels: Iterator[NDArray[np.uint8]],
    eyes: Eyes,
    settings: DiscoverySettings,
    seed: int,
) -> DiscoveredGroup:
    """Mosaics of the kept patches of every class; `pixels` gives the images' pixels in order."""
    pools = {label: Pool(label, len(indices), settings, seed) for label, indices in images.items()}
    waiting = [(label, index) for label, indices in images.items() for index in indices.tolist()]
    flat_maps, side = 0, eyes.activation.image_size
    most = teacher_batch(eyes.device, side)
    size = min(len(waiting), most)
    memory = torch.empty((size, 3, side, side), dtype=torch.uint8, pin_memory=eyes.device.type == "cuda")
    for start in range(0, len(waiting), size):
        labels, indices = zip(*waiting[start : start + size], strict=True)
        for slot, _ in zip(memory, labels, strict=False):
            slot.copy_(torch.from_numpy(next(pixels)))
        batch = memory[: len(labels)].to(eyes.device)
        cam, _, flat = eyes.activation(eyes.see(batch), torch.tensor(labels, device=eyes.device))
        flat_maps += flat
        boxes = torch.from_numpy(np.stack([random_crops(seed, index, batch.shape[-1], settings) for index in indices]))
        tops = torch.tensor([pools[label].top for label in labels], device=eyes.device)
        image, best = top_crops(cam, boxes.to(eyes.device), tops, settings)
        for first in range(0, len(image), most):  # an image may give five patches: at once they would fill the memory
            part = slice(first, first + most)
            patches = _cut(batch, image[part], best[part])
            _offer(pools, [labels[number] for number in image[part].tolist()], patches, eyes)
    classes = [DiscoveredClass(label=label, images=tile(pool.kept(), settings.beta)) for label, pool in pools.items()]
    return DiscoveredGroup(classes=classes, flat_maps=flat_maps)


def _offer(pools: Mapping[int, Pool], labels: Sequence[int], patches: Tensor, eyes: Eyes) -> None:
    """Offers patches (P, 3, S, S), those of one class in a row, to the pools of their classes."""
    confidence = _confidence(patches, eyes)
    start = 0
    while start < len(labels):
        stop = start + labels[start:].count(labels[start])
        pools[labels[start]].offer(patches[start:stop], confidence[start:stop])
        start = stop


class Pool:
    """The patch pool of one class, of which only the patches that may still be kept are held.

    Attributes:
        top: t, how many crops of each image are patches: as few as fill the pool, which is larger where t > 1, since
            every image gives as many.
    """

    def __init__(self, label: int, images: int, settings: DiscoverySettings, seed: int) -> None:
        self.top = min(settings.crops, math.ceil(settings.images_needed / images))
        self._settings = settings
        self._offered = 0
        self._kept: list[tuple[float, int, Tensor]] = []  # rank, number in the pool, pixels; the best first
        self._places: NDArray[np.int64] | None = None
        if settings.confidence == "random":
            order = draws.permutation(seed, "discovery-keep", label, count=images * self.top)
            self._places = np.argsort(order)

    def offer(self, patches: Tensor, confidence: NDArray[np.float32]) -> None:
        """Takes the next patches (P, 3, S, S) of the pool; `confidence` (P,) is the teacher's in each."""
        numbers = range(self._offered, self._offered + len(patches))
        self._offered += len(patches)
        ranked = [(self._rank(number, value), number) for number, value in zip(numbers, confidence, strict=True)]
        full = len(self._kept) == self._settings.patches
        better = [at for at, rank in enumerate(ranked) if not full or rank < self._kept[-1][:2]]
        if better:
            small = shrink(patches[better].cpu(), self._settings.beta)
            # Copies: a view would keep all the patches that came with it. Contiguous ones are made many times faster.
            copies = (patch.clone(memory_format=torch.contiguous_format) for patch in small)
            self._kept += [(*ranked[at], patch) for at, patch in zip(better, copies, strict=True)]
            self._kept = sorted(self._kept, key=lambda entry: entry[:2])[: self._settings.patches]

    def _rank(self, number: int, confidence: np.float32) -> float:
        """The lower, the sooner a patch is kept."""
        if self._places is not None:
            return float(self._places[number])
        return float(confidence if self._settings.confidence == "lowest" else -confidence)

    def kept(self) -> NDArray[np.uint8]:
        """The β·IPC patches that are kept, (P, 3, S/√β, S/√β)."""
        return torch.stack([patch for _, _, patch in self._kept]).numpy()


def random_crops(seed: int, index: int, size: int, settings: DiscoverySettings) -> NDArray[np.int64]:
    """Random square crops of one image: (K, 4) int64 [top, left, height, width] in pixels (RDED's crops, ratio 1)."""
    area, down, right = draws.uniform(seed, "discovery-crops", index, count=3 * settings.crops).reshape(3, -1)
    low, high = settings.crop_scale
    side = np.clip(np.rint(size * np.sqrt(low + (high - low) * area)), 1, size)
    top, left = np.floor(down * (size - side + 1)), np.floor(right * (size - side + 1))
    return np.stack([top, left, side, side], axis=1).astype(np.int64)


def top_crops(cam: Tensor, boxes: Tensor, tops: Tensor, settings: DiscoverySettings) -> tuple[Tensor, Tensor]:
    """The boxes of each image with the highest activation inside, best first.

    Args:
        cam: (N, S, S) float32.
        boxes: (N, K, 4) int64, on the same device.
        tops: (N,) int64, how many boxes of each image are wanted.
        settings: how the activation in a box is judged.

    Returns:
        For each of the P boxes wanted its image (P,) int64, ascending, and the box (P, 4).
    """
    total = F.pad(cam.double().cumsum(1).cumsum(2), (1, 0, 1, 0))
    up, left, height, width = boxes.unbind(-1)
    down, right = up + height, left + width
    image = torch.arange(len(cam), device=cam.device)[:, None]
    score = total[image, down, right] - total[image, up, right] - total[image, down, left] + total[image, up, left]
    if settings.crop_score == "mean":
        score = score / (height * width)
    order = score.argsort(dim=1, descending=True, stable=True)
    wanted = torch.arange(order.shape[1], device=cam.device) < tops[:, None]
    return image.expand_as(order)[wanted], boxes[image, order][wanted]


def _cut(images: Tensor, image: Tensor, boxes: Tensor) -> Tensor:
    """Crops and resizes to full size: (P, 3, S, S) from images (N, 3, S, S), positions (P,) and boxes (P, 4)."""
    return apply_views(images[image], boxes, torch.zeros(len(boxes), dtype=torch.bool, device=boxes.device))


@torch.no_grad()
def _confidence(patches: Tensor, eyes: Eyes) -> NDArray[np.float32]:
    """The teacher's highest softmax probability for each patch: (P,) float32."""
    confidence: NDArray[np.float32] = eyes.activation.model(eyes.see(patches)).float().softmax(1).amax(1).cpu().numpy()
    return confidence


def shrink(patches: Tensor, beta: int) -> Tensor:
    """Resizes uint8 patches (P, 3, S, S) to the 1/√β of the side that they will have in a mosaic."""
    side = math.isqrt(beta)
    if side == 1:
        return patches
    return F.interpolate(patches, patches.shape[-1] // side, mode="bilinear", antialias=True)


def tile(patches: NDArray[np.uint8], beta: int) -> NDArray[np.uint8]:
    """Tiles β shrunk patches (P, 3, S/√β, S/√β) each into images (P/β, 3, S, S)."""
    side = math.isqrt(beta)
    count, channels, size, _ = patches.shape
    grid = patches.reshape(count // beta, side, side, channels, size, size)
    return np.ascontiguousarray(
        grid.transpose(0, 3, 1, 4, 2, 5).reshape(count // beta, channels, side * size, side * size)
    )
