"""The layout of an FKD or SRe2L relabel store: soft labels as files of torch.save, one a batch of every epoch.

    epoch_{E}/batch_{N}.tar    a list (it is no tar archive):
    [coordinates (B, 4) float, flip (B,) bool, mix index (B,) int64, λ, box [x1, y1, x2, y2], logits (B, K)]

Coordinates are fractions of the image's side: top, left, height, width. λ and box are one a batch. The pixels inside
the box, x over rows and y over columns, come from the batch's image at the mix index. Mixup has no box (None); without
any mixing index, λ and box are all None. Which images a batch shows is not stored: it is what torch's RandomSampler
gives over an ImageFolder, with one generator for all epochs.

Shapes: B pairs a file, K classes, S the side in pixels. Boxes in pixels are [top, left, height, width].
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import RandomSampler

from nrrdd_format.errors import FormatError, OutputError, first_line

SAMPLER_SEED = 42
"""The seed of SRe2L's own sampler."""

_COLUMNS = ("coordinates", "flip", "mix index", "lam", "box", "logits")
_ENTRY_BYTES = 64
"""Room for all of a pair but its logits; a file has less."""
_FILE_BYTES = 1 << 20
"""Room for what a file holds besides its pairs; it is about 3 KB."""
_DIRT = 0.01
"""What rounding adds to a coordinate that was a whole number of pixels, in pixels, beyond that of its own type."""

Box = tuple[int, int, int, int]


@dataclass(frozen=True, kw_only=True, eq=False)
class FkdBatch:
    """What one file says, in pixels."""

    views: NDArray[np.int16]  # (B, 4) crop of each image
    flip: NDArray[np.bool_]  # (B,)
    mix_index: NDArray[np.int64] | None  # (B,) position of each image's partner in the batch; None: nothing is mixed
    mix_box: Box | None  # None: Mixup, or nothing is mixed; height or width may be 0
    lam: float | None  # share of the image itself, as stated; None: nothing is mixed
    logits: Tensor  # (B, K) float16 or float32

    def __len__(self) -> int:
        return len(self.views)


def batch_path(store: Path, epoch: int, batch: int) -> Path:
    """Where a batch lies."""
    return store / f"epoch_{epoch}" / f"batch_{batch}.tar"


def sampler_orders(images: int, seed: int) -> Iterator[NDArray[np.int64]]:
    """The order of the images (images,) in epoch 0, 1, …: one generator, carried on from epoch to epoch."""
    sampler = RandomSampler(range(images), generator=torch.Generator().manual_seed(seed))
    while True:
        yield np.array(list(sampler), np.int64)


def write_batch(path: Path, batch: FkdBatch, size: int, *, classes: Tensor | None = None) -> int:
    """Writes one file; returns its length in bytes.

    Args:
        path: the file.
        batch: its content.
        size: S.
        classes: (B, k) of which classes the logits (B, k) are; None: of all.

    Raises:
        OutputError: the file cannot be written.
    """
    content: list[Any] = [
        torch.from_numpy((batch.views / size).astype(np.float32)),
        torch.from_numpy(batch.flip),
        None if batch.mix_index is None else torch.from_numpy(batch.mix_index),
        None if batch.lam is None else np.float64(batch.lam),
        None if batch.mix_box is None else _corners(batch.mix_box),
        batch.logits,
        *([] if classes is None else [classes]),
    ]
    try:
        torch.save(content, path)
        return path.stat().st_size
    except (OSError, RuntimeError) as error:  # RuntimeError: torch's own writer, as when the disk is full
        raise OutputError(f"{path}: cannot write ({error}); make room or choose another disk") from error


def _corners(box: Box) -> list[np.int64]:
    """[x1, y1, x2, y2] as the stores have it, NumPy's integers included."""
    top, left, height, width = box
    return [np.int64(top), np.int64(left), np.int64(top + height), np.int64(left + width)]


def count_epochs(store: Path) -> int:
    """Number of epochs in a store, whose folders count from 0 without a gap.

    Raises:
        FormatError: there is none, or one is missing.
    """
    return _count(store, re.compile(r"epoch_(0|[1-9]\d*)"), "epoch_{}")


def count_batches(store: Path, epoch: int) -> int:
    """Number of batches in an epoch, whose files count from 0 without a gap. Raises FormatError."""
    return _count(store / f"epoch_{epoch}", re.compile(r"batch_(0|[1-9]\d*)\.tar"), "batch_{}.tar")


def _count(folder: Path, pattern: re.Pattern[str], name: str) -> int:
    try:
        matches = [pattern.fullmatch(path.name) for path in folder.iterdir()]
    except OSError as error:
        raise FormatError(f"cannot be read ({error.strerror or error}); give the store's folder", path=folder) from None
    found = {int(match[1]) for match in matches if match}
    first_gap = next(number for number in range(len(found) + 1) if number not in found)
    if not found:
        raise FormatError(f"holds no {name.format(0)}; give the folder of an FKD store", path=folder)
    if first_gap < len(found):
        last = name.format(max(found))
        raise FormatError(f"{name.format(first_gap)} is missing, while {last} is there; complete it", path=folder)
    return len(found)


def read_batch(path: Path, *, size: int, num_classes: int, most: int) -> FkdBatch:
    """Reads one file. Nothing in it is trusted, and no code of it is run.

    Args:
        path: the file.
        size: S.
        num_classes: K.
        most: the largest B that is accepted.

    Raises:
        FormatError: damaged, or anything else than the layout says; names the file and what was found.
    """
    try:
        return _checked(_load(path, most * (4 * num_classes + _ENTRY_BYTES) + _FILE_BYTES), size, num_classes, most)
    except FormatError as error:
        raise error.located(path=path) from error.__cause__


def _load(path: Path, limit: int) -> Any:
    """The objects of a torch.save file of at most `limit` bytes."""
    try:
        with zipfile.ZipFile(path) as archive:
            length = sum(member.file_size for member in archive.infolist())
            if length > limit:
                raise FormatError(f"holds {length} bytes, expected at most {limit} for these images and classes")
            damaged = archive.testzip()  # torch itself compares no checksums
    except FormatError:
        raise
    except OSError as error:
        raise FormatError(f"cannot be read ({error.strerror or error})") from error
    except Exception as error:  # BadZipFile, or whatever a damaged table of contents leads to
        raise FormatError("truncated, or no file of torch.save; fetch it again") from error
    if damaged is not None:
        raise FormatError(f"the checksum of {damaged!r:.60} does not match; fetch the file again")
    try:
        with torch.serialization.safe_globals(_ALLOWED):
            # Mapped: tensors that claim more bytes than the file has are refused, not read from beyond it.
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except FormatError:
        raise
    except Exception as error:  # an unpickler that is fed damaged bytes raises whatever it stumbles over
        raise FormatError(_why_refused(path, error)) from error


def _why_refused(path: Path, error: Exception) -> str:
    """Names what a foreign pickle asks for, where that is why torch refused it."""
    try:
        with torch.serialization.safe_globals(_ALLOWED):
            unsafe = sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except Exception:  # the file is damaged, so that even its names cannot be listed
        unsafe = []
    if unsafe:
        return f"asks for {', '.join(unsafe)[:200]}, which is no part of an FKD batch and is not run; refused"
    return f"damaged, or no file that torch.load(weights_only=True) reads ({first_line(error)[:200]}); fetch it again"


class _NumberType:
    """Stands in for `numpy.dtype` when a file is read: it can be a plain number's type and nothing else."""

    CODES = ("f4", "f8", "i4", "i8")

    def __init__(self, code: object, *_: object) -> None:
        if code not in self.CODES:
            raise FormatError(f"holds a number of NumPy's type {code!r:.40}, expected one of {', '.join(self.CODES)}")
        self.dtype = np.dtype(f"<{code}")

    def __setstate__(self, state: object) -> None:
        if not isinstance(state, tuple) or len(state) < 2 or state[1] != "<":
            raise FormatError(f"describes a NumPy type by {state!r:.60}, expected little-endian numbers")


def _number(kind: object, data: object) -> int | float:
    """Stands in for NumPy's `scalar` when a file is read."""
    if not isinstance(kind, _NumberType) or not isinstance(data, bytes) or len(data) != kind.dtype.itemsize:
        raise FormatError("holds a NumPy number that does not fit its type; fetch the file again")
    value: int | float = np.frombuffer(data, kind.dtype)[0].item()
    return value


_ALLOWED: list[Any] = [
    (_NumberType, "numpy.dtype"),
    (_number, "numpy.core.multiarray.scalar"),  # NumPy 1
    (_number, "numpy._core.multiarray.scalar"),  # NumPy 2
]
"""What a file may name besides tensors: λ and box hold NumPy's numbers. They are read by the stand-ins above."""


def _checked(content: Any, size: int, num_classes: int, most: int) -> FkdBatch:
    if not isinstance(content, list) or len(content) != len(_COLUMNS):
        found = f"{len(content)} entries" if isinstance(content, list) else f"a {type(content).__name__}"
        raise FormatError(f"holds {found}, expected the list [{', '.join(_COLUMNS)}]")
    logits = _tensor("logits", content[5], (torch.float16, torch.float32), (None, num_classes))
    pairs = len(logits)
    if not 1 <= pairs <= most:
        raise FormatError(f"holds {pairs} pairs, expected 1..{most}")
    if not bool(logits.isfinite().all()):
        raise FormatError("logits are not finite; the store's teacher is broken")
    coordinates = _tensor("coordinates", content[0], (torch.float16, torch.float32, torch.float64), (pairs, 4))
    flip = _tensor("flip", content[1], (torch.bool,), (pairs,))
    mix_index, lam, mix_box = _mix(content[2], content[3], content[4], pairs, size)
    return FkdBatch(
        views=_pixels(coordinates, size),
        flip=flip.view(torch.uint8).numpy() != 0,  # a foreign file may hold other bytes than 0 and 1
        mix_index=mix_index,
        lam=lam,
        mix_box=mix_box,
        logits=logits,
    )


def _tensor(
    name: str, value: object, dtypes: tuple[torch.dtype, ...], shape: tuple[int | None, int] | tuple[int]
) -> Tensor:
    """`value`, if it is a plain tensor of one of these types and this shape (None: any)."""
    wanted = f"{' or '.join(str(dtype).removeprefix('torch.') for dtype in dtypes)} {list(shape)}".replace("None", "B")
    if type(value) is not Tensor or value.layout != torch.strided or value.device.type != "cpu" or value.is_neg():
        raise FormatError(f"{name}: a {type(value).__name__}, expected a plain tensor, {wanted}")
    fits = len(shape) == value.ndim and all(s in (None, v) for s, v in zip(shape, value.shape, strict=True))
    if value.dtype not in dtypes or not fits:
        found = f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
        raise FormatError(f"{name}: {found}, expected {wanted}")
    return value.detach()


def _mix(
    mix_index: Any, lam: Any, box: Any, pairs: int, size: int
) -> tuple[NDArray[np.int64] | None, float | None, Box | None]:
    if mix_index is None and lam is None and box is None:
        return None, None, None
    index: NDArray[np.int64] = _tensor("mix index", mix_index, (torch.int64,), (pairs,)).numpy()
    if not np.array_equal(np.sort(index), np.arange(pairs)):
        raise FormatError(f"mix index {index.tolist()!s:.60}: expected every number of 0..{pairs - 1} once")
    if type(lam) not in (int, float) or not 0 <= lam <= 1:
        raise FormatError(f"lam is {lam!r:.60}, expected a number in 0..1")
    return index, float(lam), None if box is None else _mix_box(box, size)


def _mix_box(box: Any, size: int) -> Box:
    if isinstance(box, list | tuple) and len(box) == 4 and all(type(value) is int for value in box):
        top, left, bottom, right = box
        if 0 <= top <= bottom <= size and 0 <= left <= right <= size:
            return top, left, bottom - top, right - left
    raise FormatError(f"box is {box!r:.80}, expected [x1, y1, x2, y2], whole pixels inside {size}x{size}")


def _pixels(coordinates: Tensor, size: int) -> NDArray[np.int16]:
    """Crops (B, 4) in pixels from fractions that stand for whole pixels."""
    exact = coordinates.double().numpy() * size
    boxes: NDArray[np.float64] = np.rint(np.nan_to_num(exact, nan=-1.0, posinf=-1.0, neginf=-1.0))
    tolerance = size * torch.finfo(coordinates.dtype).eps / 4 + _DIRT
    whole = np.abs(boxes - exact) <= min(tolerance, 0.25)  # NaN compares as false
    inside = (boxes[:, :2] >= 0) & (boxes[:, 2:] >= 1) & (boxes[:, :2] + boxes[:, 2:] <= size)
    wrong = np.flatnonzero(~(whole.all(1) & inside.all(1)))
    if len(wrong):
        raise FormatError(
            f"coordinates of pair {wrong[0]}: {coordinates[wrong[0]].tolist()}, that is {exact[wrong[0]].tolist()} "
            f"pixels, expected whole pixels inside {size}x{size}; are these the images that the store was made from?"
        )
    return boxes.astype(np.int16)
