"""The loaders that `benchmarks.loader_throughput` compares, each as a function that opens it on the same images.

An opened loader is a function of the epoch's number that gives the number of pairs in every batch of it, as the main
process receives them. All shuffle, and all but the bare decoder deliver mixed, normalised float32 images.

Shapes: B pairs, S the side in pixels.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias
from unittest import mock

import numpy as np
import torch
import webdataset
from PIL import Image
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler, Sampler, default_collate
from torchvision.transforms import v2
from torchvision.transforms.functional import hflip, normalize, resized_crop, to_tensor

from benchmarks.loader_data import CLASSES, EPOCHS, MEAN, SEED, STD, Data, label_of
from builders.fkd_layout import SAMPLER_SEED, batch_path, read_batch, sampler_orders
from loaders import DBRLoader, reading
from loaders.batch import PlannedBatch
from nrrdd_format.decoding import decode_image
from nrrdd_format.replay import stack_images

Epoch: TypeAlias = Callable[[int], Iterator[int]]
STREAMING = "streaming"
"""The module of MosaicML Streaming. It is imported where it is used: it needs an older NumPy than we allow."""
UNBOUNDED = 2**60


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What a loader is opened on."""

    data: Data
    workers: int
    device: str


def open_decoder(setting: Setting) -> Epoch:
    """The ceiling: JPEGs held in memory are decoded in the workers, uint8 batches delivered, nothing else."""
    data = setting.data
    sampler = BatchSampler(_shuffled(data.images), data.batch, drop_last=False)
    decoder = _Decoder([path.read_bytes() for path in data.image_files()], data.size)
    loader = DataLoader(decoder, batch_size=None, sampler=sampler, **_workers(setting))
    return lambda _: (len(images) for images in loader)


class _Decoder(Dataset[Tensor]):
    """Decodes a batch of images: (B, 3, S, S) uint8."""

    def __init__(self, encoded: Sequence[bytes], size: int) -> None:
        self.encoded = encoded
        self.size = size

    def __getitem__(self, indices: list[int]) -> Tensor:
        return stack_images([decode_image(self.encoded[index], self.size) for index in indices])


def open_ours(setting: Setting, *, cache_bytes: int) -> Epoch:
    """Our loader, images decoded anew in every epoch or (`cache_bytes`) once; "cuda" replays on the GPU."""
    data = setting.data
    loader = DBRLoader(
        data.dataset,
        data.batch,
        seed=SEED,
        num_workers=setting.workers,
        device=setting.device,
        pin_memory=setting.device == "cuda",
        cache_bytes=cache_bytes,
    )
    return lambda number: _ours(loader, number)


def open_ours_without_replay(setting: Setting) -> Epoch:
    """Our loader as for a training device, but without one: what the device would do is left out, not counted."""
    epoch = open_ours(setting, cache_bytes=0)

    def without_replay(number: int) -> Iterator[int]:
        with mock.patch.object(PlannedBatch, "replayed", lambda batch, **_: batch.label_org):
            yield from epoch(number)

    return without_replay


def count_decodes(data: Data, *, cache_bytes: int) -> float:
    """How often our loader decodes an image for each pair, in the epoch after the first."""
    loader = DBRLoader(data.dataset, data.batch, seed=SEED, cache_bytes=cache_bytes)
    sum(_ours(loader, 0))
    with mock.patch.object(reading, "decode_image", wraps=decode_image) as decoder:
        pairs = sum(_ours(loader, 1))
    return decoder.call_count / pairs


def _ours(loader: DBRLoader, number: int) -> Iterator[int]:
    loader.set_epoch(number % EPOCHS)
    return (len(batch) for batch in loader)


def open_fkd(setting: Setting) -> Epoch:
    """As FKD and SRe2L train: Pillow, one transform after the other on each image, a file of soft labels a batch."""
    data = setting.data
    order = _InOrder(-(-data.images // data.batch))
    loader = DataLoader(_FkdBatches(data), batch_size=None, sampler=order, **_workers(setting))

    def epoch(number: int) -> Iterator[int]:
        order.epoch = number % EPOCHS
        return (len(images) for images, _ in loader)

    return epoch


class _InOrder(Sampler[tuple[int, int]]):
    """(epoch, batch) in ascending order: which images they hold is random."""

    def __init__(self, batches: int) -> None:
        self.epoch = 0
        self.batches = batches

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return ((self.epoch, batch) for batch in range(self.batches))

    def __len__(self) -> int:
        return self.batches


class _FkdBatches(Dataset[tuple[Tensor, Tensor]]):
    """Mixed images (B, 3, S, S) float32 and their soft labels (B, K)."""

    def __init__(self, data: Data) -> None:
        self.data = data
        self.files = data.image_files()
        self.orders = [
            order for order, _ in zip(sampler_orders(data.images, SAMPLER_SEED), range(EPOCHS), strict=False)
        ]

    def __getitem__(self, position: tuple[int, int]) -> tuple[Tensor, Tensor]:
        epoch, number = position
        data = self.data
        chosen = self.orders[epoch][number * data.batch : (number + 1) * data.batch]
        path = batch_path(data.soft_labels, epoch, number)
        labels = read_batch(path, size=data.size, num_classes=CLASSES, most=data.batch)
        views = zip(chosen.tolist(), labels.views.tolist(), labels.flip.tolist(), strict=True)
        # torch's own collation: in a worker it stacks into shared memory, from where the batch is not copied again.
        images: Tensor = default_collate([self._view(self.files[image], box, flip) for image, box, flip in views])
        assert labels.mix_box is not None
        top, left, height, width = labels.mix_box
        box = images[..., top : top + height, left : left + width]
        box.copy_(box[labels.mix_index])
        return images, labels.logits

    def _view(self, path: Path, box: list[int], flip: bool) -> Tensor:
        picture = resized_crop(_open_picture(path), *box, [self.data.size, self.data.size])
        image: Tensor = normalize(to_tensor(hflip(picture) if flip else picture), MEAN, STD)
        return image


def open_webdataset(setting: Setting) -> Epoch:
    """Plain WebDataset over the images of the same shards, with torchvision's augmentations; one-hot labels only."""
    data = setting.data
    dataset = (
        webdataset.WebDataset(data.shard_files(), shardshuffle=len(data.shard_files()), empty_check=False)
        .shuffle(1000)
        .decode("pil")
        .map(_webdataset_sample(data.size))
        .batched(data.batch)
        .map(_CutMix())
    )
    loader = webdataset.WebLoader(dataset, batch_size=None, **_workers(setting))
    return lambda _: (len(images) for images, _ in loader)


def _webdataset_sample(size: int) -> Callable[[dict[str, Any]], tuple[Tensor, int]]:
    return partial(_transformed, augment=_augmentations(size))


def _transformed(sample: dict[str, Any], *, augment: Callable[[Image.Image], Tensor]) -> tuple[Tensor, int]:
    return augment(sample["jpg"]), int(sample["__key__"].rpartition("c")[2])


def write_streaming(data: Data) -> None:
    """Writes the images in MosaicML Streaming's own format."""
    streaming = importlib.import_module(STREAMING)
    with streaming.MDSWriter(out=str(data.streaming), columns={"image": "jpeg", "label": "int"}) as writer:
        for number, path in enumerate(data.image_files()):
            writer.write({"image": Image.open(path), "label": label_of(number)})


def why_no_streaming() -> str | None:
    """Why MosaicML Streaming cannot be measured here; None: it can."""
    try:
        importlib.import_module(STREAMING)
    except ImportError as error:
        return f"{error}; install mosaicml-streaming in an environment of its own, it needs an older NumPy"
    return None


def open_streaming(setting: Setting) -> Epoch:
    """MosaicML Streaming with torchvision's augmentations; one-hot labels only."""
    data = setting.data
    streaming = importlib.import_module(STREAMING)
    dataset = streaming.StreamingDataset(local=str(data.streaming), shuffle=True, batch_size=data.batch)
    collate = _StreamingCollate(data.size)
    loader = DataLoader(dataset, batch_size=data.batch, collate_fn=collate, **_workers(setting))
    return lambda _: (len(images) for images, _ in loader)


class _StreamingCollate:
    def __init__(self, size: int) -> None:
        self.augment = _augmentations(size)
        self.cutmix = _CutMix()

    def __call__(self, samples: list[dict[str, Any]]) -> tuple[Tensor, Tensor]:
        images = torch.stack([self.augment(sample["image"]) for sample in samples])
        return self.cutmix((images, torch.tensor([int(sample["label"]) for sample in samples])))


class _CutMix:
    """torchvision's CutMix of a batch, in the worker."""

    def __init__(self) -> None:
        self.cutmix = v2.CutMix(num_classes=CLASSES)

    def __call__(self, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        images, labels = self.cutmix(batch[0], torch.as_tensor(np.asarray(batch[1])))
        return images, labels


def _augmentations(size: int) -> Callable[[Image.Image], Tensor]:
    augment: Callable[[Image.Image], Tensor] = v2.Compose(
        [
            v2.RandomResizedCrop(size, scale=(0.5, 1.0)),
            v2.RandomHorizontalFlip(),
            v2.PILToTensor(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(MEAN, STD),
        ]
    )
    return augment


def _open_picture(path: Path) -> Image.Image:
    with Image.open(path) as picture:
        return picture.convert("RGB")


def _shuffled(count: int) -> RandomSampler:
    return RandomSampler(range(count), generator=torch.Generator().manual_seed(SEED))


def _workers(setting: Setting) -> dict[str, Any]:
    return {"num_workers": setting.workers, "persistent_workers": setting.workers > 0}
