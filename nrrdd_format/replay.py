"""Replay: from stored uint8 images and pair records to the batch that a network sees.

The teacher's distances hold only for exactly the images it saw, so builder and loader both come through here:
view (crop, resize, flip), mix (CutMix or Mixup), normalise. SPEC.md ("Replay") defines the arithmetic.

Shapes: U unique images of a batch, B pairs, S side of an image. Boxes are [top, left, height, width] in
pixels. On a CPU everything runs image by image, in channels_last memory: an image stays in cache from its
crop to its normalisation, several times faster than batched float operations. On a GPU everything is batched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from nrrdd_format.pairs import PairRecords


def stack_images(images: Iterable[Tensor], *, out: Tensor | None = None) -> Tensor:
    """Stacks (3, S, S) uint8 images to (U, 3, S, S), channels last in memory as replay wants them.

    `out` may give the memory; each image goes there as it is taken.
    """
    if out is None:
        images = list(images)
        shape = (len(images), *images[0].shape)
        out = torch.empty(shape, dtype=torch.uint8, memory_format=torch.channels_last)
    for slot, image in zip(out, images, strict=True):
        slot.copy_(image)
    return out


@dataclass(frozen=True, kw_only=True)
class BatchPlan:
    """Which images a batch of pairs needs, each once in the order of first use, and how its pairs are made of them."""

    shard: NDArray[np.int64]
    """(U,) shard of each image."""
    image: NDArray[np.int64]
    """(U,) index of each image within its shard."""
    boxes: NDArray[np.int64]
    """(U, 4) crop of each image."""
    flips: NDArray[np.bool_]
    """(U,) whether the crop is flipped left to right."""
    org: NDArray[np.int64]
    """(B,) position among the U images of the image that a pair starts from."""
    aug: NDArray[np.int64]
    """(B,) position of the image that is mixed in."""
    is_cutmix: NDArray[np.bool_]
    """(B,) CutMix, otherwise Mixup."""
    mix_box: NDArray[np.int64]
    """(B, 4) CutMix: the box pasted from `aug`; Mixup: zeros."""
    lam: NDArray[np.float32]
    """(B,) share of `org`."""

    def with_images(self, images: Tensor) -> PairTensors:
        """The plan as tensors. `images` (U, 3, S, S) uint8 come in the order of `shard` and `image`."""
        return PairTensors(
            images=images,
            boxes=torch.from_numpy(self.boxes),
            flips=torch.from_numpy(self.flips),
            org=torch.from_numpy(self.org),
            aug=torch.from_numpy(self.aug),
            is_cutmix=torch.from_numpy(self.is_cutmix),
            mix_box=torch.from_numpy(self.mix_box),
            lam=torch.from_numpy(self.lam),
        )


Group = TypeVar("Group", bound="TensorGroup")


@dataclass(frozen=True, kw_only=True)
class TensorGroup:
    """Tensors, and groups of such, that lie on one device and move together; a field that is None stays so."""

    def to(self: Group, device: torch.device | str, *, non_blocking: bool = False) -> Group:
        """The same on another device."""
        return self._each(lambda value: value.to(device, non_blocking=non_blocking))

    def pin_memory(self: Group) -> Group:
        """The same in page-locked memory."""
        return self._each(lambda value: value.pin_memory())

    def _each(self: Group, change: Callable[[Any], Any]) -> Group:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return type(self)(**{name: None if value is None else change(value) for name, value in values.items()})


@dataclass(frozen=True, kw_only=True)
class PairTensors(TensorGroup):
    """All that replay needs for a batch; the fields are those of `BatchPlan`, as tensors on one device."""

    images: Tensor
    """(U, 3, S, S) uint8, as decoded."""
    boxes: Tensor
    flips: Tensor
    org: Tensor
    aug: Tensor
    is_cutmix: Tensor
    mix_box: Tensor
    lam: Tensor


def plan_batch(parts: Sequence[tuple[int, PairRecords]]) -> BatchPlan:
    """Plans a batch from (shard, records of some of its pairs) parts, pairs in the order given.

    All parts must be of one epoch: an image has one view there, whichever role it plays.
    """
    records = [part for _, part in parts]
    shard = np.concatenate([np.full(len(part.index_org), shard, dtype=np.int64) for shard, part in parts])
    index_org = np.concatenate([part.index_org for part in records])
    index_aug = np.concatenate([part.index_aug for part in records])
    key = (shard[:, None] << 32 | np.stack([index_org, index_aug], axis=1)).reshape(-1)  # both of a pair, then the next
    unique, first, position = np.unique(key, return_index=True, return_inverse=True)
    by_use = np.argsort(first)
    unique, first, position = unique[by_use], first[by_use], np.argsort(by_use)[position]
    view = np.concatenate([np.stack([part.view_org, part.view_aug], axis=1) for part in records]).reshape(-1, 4)
    flip = np.concatenate([np.stack([part.flip_org, part.flip_aug], axis=1) for part in records]).reshape(-1)
    return BatchPlan(
        shard=unique >> 32,
        image=unique & 0xFFFFFFFF,
        boxes=view[first].astype(np.int64),
        flips=flip[first],
        org=position[0::2],
        aug=position[1::2],
        is_cutmix=np.concatenate([part.is_cutmix for part in records]),
        mix_box=np.concatenate([part.mix_box for part in records]).astype(np.int64),
        lam=np.concatenate([part.lam for part in records]),
    )


def replay(pairs: PairTensors, *, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Makes the mixed, normalised images of a batch, on the device where `pairs` lie.

    Args:
        pairs: images and plan of the batch.
        mean, std: of a pixel's value / 255, one per channel (the manifest's).

    Returns:
        (B, 3, S, S) float32, channels last in memory.
    """
    if pairs.images.device.type == "cpu":
        shape = (len(pairs.org), *pairs.images.shape[1:])
        out = torch.empty(shape, dtype=torch.float32, memory_format=torch.channels_last)
        return replay_one_by_one(pairs, pairs.images, mean=mean, std=std, out=out)
    views = apply_views(pairs.images, pairs.boxes, pairs.flips)
    mixed = mix(views, pairs.org, pairs.aug, pairs.is_cutmix, pairs.mix_box, pairs.lam)
    return normalize(mixed, mean, std)


def replay_one_by_one(
    plan: BatchPlan | PairTensors,
    images: Iterable[Tensor],
    *,
    mean: Sequence[float],
    std: Sequence[float],
    out: Tensor,
) -> Tensor:
    """`replay` on a CPU of images that may be decoded only as they are taken, while they are in its cache.

    An image is taken when the first pair needs it, and its view let go after the last, so that the few views of a
    cycle, not those of a batch, go through the cache, and its memory serves the next.

    Args:
        plan: the batch.
        images: the plan's U images in its order, each (3, S, S) uint8, channels last in memory.
        mean, std: as in `replay`.
        out: memory for the result, (B, 3, S, S) float32, channels last.

    Returns:
        `out`.
    """
    made = enumerate(_view(*one) for one in zip(images, plan.boxes.tolist(), plan.flips.tolist(), strict=True))
    rows = _pair_rows(plan)
    last_pair = {position: pair for pair, (org, aug, *_) in enumerate(rows) for position in (org, aug)}
    views: dict[int, Tensor] = {}
    shift, scale = _row_constants(mean, std, out.shape[-1], out.device)
    for pair, (mixed, (org, aug, is_cutmix, mix_box, lam)) in enumerate(zip(out, rows, strict=True)):
        while org not in views or aug not in views:
            position, view = next(made)
            views[position] = view
        _mix_pair(mixed, views[org], views[aug], is_cutmix, mix_box, lam)
        mixed.sub_(shift).div_(scale)
        for position in {org, aug}:
            if last_pair[position] == pair:
                del views[position]
    return out


def apply_views(images: Tensor, boxes: Tensor, flips: Tensor) -> Tensor:
    """Crops each image, resizes the crop to full size, then flips it.

    Bilinear with half-pixel centres and no antialiasing: a crop is never larger than the image, so nothing is
    ever reduced. CPU and GPU agree within one grey level.

    Args:
        images: (U, 3, S, S) uint8, or floating point (then gradients flow to it).
        boxes: (U, 4) integer boxes inside the image.
        flips: (U,) bool.

    Returns:
        (U, 3, S, S) of the images' type, channels last in memory; uint8 is rounded, floating point is not.
    """
    if images.device.type == "cpu" and not images.is_floating_point():
        return stack_images([_view(*one) for one in zip(images, boxes.tolist(), flips.tolist(), strict=True)])
    return _views_batched(images, boxes, flips)


def mix(views: Tensor, org: Tensor, aug: Tensor, is_cutmix: Tensor, mix_box: Tensor, lam: Tensor) -> Tensor:
    """Mixes pairs: CutMix pastes the box from `aug` onto `org`, Mixup takes lam * org + (1 - lam) * aug.

    Args:
        views: (U, 3, S, S) uint8, or floating point (then gradients flow to it).
        org, aug: (B,) positions among the views.
        is_cutmix: (B,) bool.
        mix_box: (B, 4), for CutMix.
        lam: (B,) float, for Mixup.

    Returns:
        (B, 3, S, S), float32 from uint8 views (values 0..255), otherwise the views' own type.
    """
    top, left, height, width = mix_box[:, :, None].unbind(1)
    pixel = torch.arange(views.shape[-1], device=views.device)
    rows = (pixel >= top) & (pixel < top + height)
    columns = (pixel >= left) & (pixel < left + width)
    pasted = rows[:, :, None] & columns[:, None, :]
    share = torch.where(is_cutmix[:, None, None], (~pasted).float(), lam[:, None, None].float())[:, None]
    values = views if views.is_floating_point() else views.float()
    # Not values[aug]: its gradient is summed by several threads in any order, where an image stands in several pairs.
    org_values, aug_values = (values.index_select(0, image) for image in (org, aug))
    return torch.lerp(aug_values, org_values, share.to(values.dtype))


def normalize(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """(x - 255 * mean) / (255 * std) by channel.

    Args:
        images: (..., 3, S, S), values 0..255, any type.
        mean, std: of a pixel's value / 255, one per channel.

    Returns:
        float32 of the same shape.
    """
    shift, scale = _row_constants(mean, std, images.shape[-1], images.device)
    return (images.float() - shift) / scale


def _row_constants(
    mean: Sequence[float], std: Sequence[float], size: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Normalisation constants (3, 1, S), laid out like a row of a channels_last image.

    One value per channel would broadcast along runs of 3 values, ten times slower on a CPU.
    """
    constants = 255.0 * torch.tensor([list(mean), list(std)], dtype=torch.float64)
    rows = constants.float()[:, None, None, :].expand(2, 1, size, 3).contiguous().to(device)
    shift, scale = rows.permute(0, 3, 1, 2)
    return shift, scale


def _pair_rows(plan: BatchPlan | PairTensors) -> list[tuple[int, int, bool, list[int], float]]:
    """The plan as Python values: indexing arrays one value at a time would cost more than the pixels."""
    columns = (plan.org, plan.aug, plan.is_cutmix, plan.mix_box, plan.lam)
    return list(zip(*(column.tolist() for column in columns), strict=True))


def _mix_pair(out: Tensor, org: Tensor, aug: Tensor, is_cutmix: bool, mix_box: list[int], lam: float) -> None:
    """Writes a pair of uint8 views (3, S, S), mixed, into `out` (3, S, S) float32."""
    out.copy_(org)
    if is_cutmix:
        top, left, height, width = mix_box
        box = (slice(None), slice(top, top + height), slice(left, left + width))
        out[box].copy_(aug[box])
    else:
        out.mul_(lam).add_(aug, alpha=1.0 - lam)


def _view(image: Tensor, box: list[int], flip: bool) -> Tensor:
    """One view of an image, both (3, S, S) uint8, channels last in memory; without crop and flip, the image itself."""
    size = image.shape[-1]
    top, left, height, width = box
    crop = image[None, :, top : top + height, left : left + width]
    # torch's fast uint8 kernel needs a dense channels_last input.
    crop = crop.contiguous(memory_format=torch.channels_last)
    if (height, width) != (size, size):
        crop = F.interpolate(crop, size=(size, size), mode="bilinear", align_corners=False)
    return crop[0].flip(2) if flip else crop[0]


def _views_batched(images: Tensor, boxes: Tensor, flips: Tensor) -> Tensor:
    size = images.shape[-1]
    top, left, height, width = boxes[:, :, None].float().unbind(1)
    rows = _source_positions(top, height, size)
    columns = _source_positions(left, width, size)
    columns = torch.where(flips[:, None], columns.flip(1), columns)
    grid = torch.stack([columns[:, None, :].expand(-1, size, -1), rows[:, :, None].expand(-1, -1, size)], dim=-1)
    values = images if images.is_floating_point() else images.float()
    views = F.grid_sample(values, grid.to(values.dtype), mode="bilinear", padding_mode="border", align_corners=False)
    return (
        views
        if images.is_floating_point()
        else views.round_().to(torch.uint8).contiguous(memory_format=torch.channels_last)
    )


def _source_positions(start: Tensor, length: Tensor, size: int) -> Tensor:
    """Where an axis's S output pixels lie in the image, (U, S), in grid_sample's units (-1..1 edge to edge).

    Positions are clamped to the crop's outermost pixel centres: the crop must not see its surroundings.
    """
    output = torch.arange(size, device=start.device, dtype=torch.float32)
    inside = (output + 0.5) * (length / size) - 0.5
    inside = torch.minimum(inside.clamp_min(0.0), length - 1)
    return (2.0 * (start + inside) + 1.0) / size - 1.0
