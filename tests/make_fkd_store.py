"""A small relabel store made the way FKD's and SRe2L's own scripts make it, for tests of what reads one.

Nothing here comes from the package: the order from torch's DataLoader over torchvision's ImageFolder, crops from
torchvision, boxes drawn with NumPy, files by torch.save. Only the logits are invented: mostly right about the pair.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, RandomSampler
from torchvision.datasets import ImageFolder
from torchvision.transforms import InterpolationMode, RandomResizedCrop
from torchvision.transforms import functional as steps

Mix = Literal["cutmix", "mixup", "none"]


def make_images(
    root: Path, *, folders: Sequence[str] = ("ant", "bee", "cat"), each: int = 7, size: int = 32, codec: str = "PNG"
) -> Path:
    """Smooth random pictures `<class>/<number>` in the new folder `root`."""
    generator = np.random.default_rng(5)
    for folder in folders:
        (root / folder).mkdir(parents=True)
        for number in range(each):
            coarse = generator.integers(0, 256, (5, 5, 3), dtype=np.uint8)
            picture = Image.fromarray(coarse).resize((size, size), Image.Resampling.BICUBIC)
            picture.save(root / folder / f"{number:03d}.{codec.lower()}", codec)
    return root


def make_store(
    root: Path,
    images: Path,
    *,
    epochs: int = 2,
    batch: int = 6,
    mix: Mix = "cutmix",
    seed: int = 42,
    half: bool = True,
    drop_last: bool = False,
    sure: float = 6.0,
) -> Path:
    """Writes `epoch_{E}/batch_{N}.tar` into the new folder `root`. `sure`: how far the pair's logits stand out."""
    folder = ImageFolder(images)
    classes = len(folder.classes)
    generator, draw = torch.Generator().manual_seed(7), np.random.default_rng(7)
    torch_order = RandomSampler(folder, generator=torch.Generator().manual_seed(seed))
    loader: DataLoader[int] = DataLoader(_Labels(folder), batch_size=batch, sampler=torch_order, drop_last=drop_last)
    crop = RandomResizedCrop(1)
    for epoch in range(epochs):
        (root / f"epoch_{epoch}").mkdir(parents=True)
        for number, labels in enumerate(loader):
            with Image.open(folder.samples[0][0]) as first:
                size = first.size[0]
            blank = Image.new("RGB", (size, size))
            torch.manual_seed(1000 * epoch + number)
            boxes = [crop.get_params(blank, (0.08, 1.0), (3 / 4, 4 / 3)) for _ in labels]
            coordinates = torch.tensor(boxes, dtype=torch.float32) / size
            flip = torch.rand(len(labels), generator=generator) < 0.5
            index = torch.randperm(len(labels), generator=generator)
            lam = 1.0 if mix == "none" else draw.beta(1.0, 1.0)
            logits = torch.randn(len(labels), classes, generator=generator)
            logits[range(len(labels)), labels] += sure * max(lam, 0.5)
            logits[range(len(labels)), labels[index]] += sure * (1 - lam)
            mixed: list[Any] = [index, lam, _rand_bbox(size, lam, draw)]
            if mix == "mixup":
                mixed[2] = None
            if mix == "none":
                mixed = [None, None, None]
            content = [coordinates, flip, *mixed, logits.half() if half else logits]
            torch.save(content, root / f"epoch_{epoch}" / f"batch_{number}.tar")
    return root


def trainer_batches(store: Path, images: Path, epoch: int, *, batch: int, seed: int = 42) -> Iterator[tuple[Any, ...]]:
    """What a trainer on such a store sees in an epoch: mixed images (B, 3, S, S) of 0..255 and logits, by batch."""
    folder = ImageFolder(images)
    sampler = RandomSampler(folder, generator=torch.Generator().manual_seed(seed))
    for _ in range(epoch):
        list(sampler)
    order = list(sampler)
    for number in range(-(-len(order) // batch)):
        path = store / f"epoch_{epoch}" / f"batch_{number}.tar"
        coordinates, flip, index, lam, box, logits = _trusted(path)
        shown = order[number * batch :][: len(flip)]
        views = torch.stack(
            [
                _view(folder[image][0], *row)
                for image, row in zip(shown, zip(coordinates, flip, strict=True), strict=True)
            ]
        )
        yield _mixed(views, index, lam, box), logits, [folder.targets[image] for image in shown]


def rewrite(path: Path, change: Any) -> None:
    """Loads a batch file, lets `change` alter its list, and saves what that returns (None: the list itself)."""
    content = _trusted(path)
    changed = change(content)
    torch.save(content if changed is None else changed, path)


def png(size: tuple[int, int]) -> bytes:
    """A grey PNG."""
    buffer = io.BytesIO()
    Image.new("RGB", size, "grey").save(buffer, "PNG")
    return buffer.getvalue()


class _Labels(Dataset[int]):
    """The folder without its pixels: the loader only decides the order."""

    def __init__(self, folder: ImageFolder) -> None:
        self._labels = folder.targets

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> int:
        label: int = self._labels[index]
        return label


def _rand_bbox(size: int, lam: float, draw: np.random.Generator) -> list[np.int64]:
    side = int(size * np.sqrt(1.0 - lam))
    x, y = draw.integers(size), draw.integers(size)
    corners = (x - side // 2, y - side // 2, x + side // 2, y + side // 2)
    return [np.clip(np.int64(corner), 0, size) for corner in corners]


def _view(image: Image.Image, coordinates: Tensor, flip: Tensor) -> Tensor:
    size = image.size[0]
    box = [value.item() * size for value in coordinates]
    crop = steps.resized_crop(image, *box, [size, size], InterpolationMode.BILINEAR)
    pixels: Tensor = steps.pil_to_tensor(steps.hflip(crop) if flip else crop).float()
    return pixels


def _mixed(images: Tensor, index: Tensor | None, lam: float | None, box: Sequence[int] | None) -> Tensor:
    if index is None:
        return images
    if box is None:
        assert lam is not None
        return lam * images + (1 - lam) * images[index]
    x1, y1, x2, y2 = box
    images[:, :, x1:x2, y1:y2] = images[index, :, x1:x2, y1:y2]
    return images


def _trusted(path: Path) -> list[Any]:
    """A file of our own; it holds NumPy's numbers beside tensors."""
    known: list[Any] = [np.float64(0).__reduce__()[0]]
    known += [type(np.dtype(kind)) for kind in (np.float64, np.float32, np.int64)]
    with torch.serialization.safe_globals([*known, np.dtype]):
        content: list[Any] = torch.load(path, weights_only=True)
    return content
