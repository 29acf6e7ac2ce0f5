"""How a batch travels to the training loop, mostly from another process.

torch's own way gives the images of every batch new memory, whose pages are then touched for the first time: at 224 px
that costs as much as decoding them. Here a loader owns a few slots of memory that are used again and again. The
training process reserves one with each batch it asks for; it is free once the last tensor on it has gone, however long
the training loop keeps its batches. Where none is free, a batch travels in torch's way. All that is not pixels goes as
NumPy arrays inside the message, where tensors would each be a file of shared memory.

Shapes: U images and B pairs of a batch, S the side in pixels.
"""

from __future__ import annotations

import ctypes
import weakref
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from loaders.batch import ClassDistances, DBRBatch, PlannedBatch
from nrrdd_format.replay import BatchPlan

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
_NEVER = 2**31 - 1


class Slots:
    """The training process's side: which slots of the shared memory are free.

    Args:
        count: how many batches may lie in slots at a time.
        nbytes: size of a slot.
        shared: other processes write them. Shared memory is taken in full here (torch calls posix_fallocate), so that a
            want of room is an error now, and no SIGBUS later; other memory as batches first fill it.

    Raises:
        RuntimeError: there is not so much shared memory.
    """

    def __init__(self, count: int, nbytes: int, *, shared: bool) -> None:
        # `share_memory_` would take the memory twice, and copy every page.
        new: Callable[[int], torch.UntypedStorage] = (
            torch.UntypedStorage._new_shared if shared else torch.UntypedStorage
        )
        self.memory = torch.empty(0, dtype=torch.uint8).set_(new(count * nbytes)).view(count, nbytes)
        self._free = list(range(count))
        self._reserved: deque[int | None] = deque()

    def reserve(self) -> int | None:
        """A slot for the batch that is asked for next; None: there is none left."""
        self._reserved.append(self._free.pop() if self._free else None)
        return self._reserved[-1]

    def forget(self) -> None:
        """Frees what is reserved: the batches asked for are not wanted any more, and no process works on them."""
        self._free += [slot for slot in self._reserved if slot is not None]
        self._reserved.clear()

    def received(self, images: Tensor | Pixels | None) -> Tensor | None:
        """Takes note that a batch has come, in the order in which slots were reserved.

        Args:
            images: of its parcel; None: an error came instead.

        Returns:
            The images in the batch's slot, (U or B, 3, S, S), channels last; None: they are not there.
        """
        slot = self._reserved.popleft()
        if slot is None:
            return None
        if not isinstance(images, Pixels):
            self._free.append(slot)
            return None
        array = room(self.memory, slot, images).permute(0, 2, 3, 1).numpy()
        weakref.finalize(array, self._free.append, slot).atexit = False
        return torch.from_numpy(array).permute(0, 3, 1, 2)


@dataclass(frozen=True, kw_only=True)
class Pixels:
    """What lies in a slot, or in memory of its own: `count` images (3, size, size) of a type."""

    count: int
    size: int
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Size in memory."""
        return self.count * 3 * self.size**2 * self.dtype.itemsize

    def new(self) -> Tensor:
        """Memory for them, (count, 3, size, size), channels last."""
        shape = (self.count, 3, self.size, self.size)
        return torch.empty(shape, dtype=self.dtype, memory_format=torch.channels_last)


def room(memory: Tensor, slot: int, pixels: Pixels) -> Tensor:
    """The memory of a slot, (count, 3, size, size), channels last; `memory` is that of `Slots`, in any process."""
    flat = memory[slot, : pixels.nbytes].view(pixels.dtype)
    return flat.view(pixels.count, pixels.size, pixels.size, 3).permute(0, 3, 1, 2)


PackedDistances: TypeAlias = tuple[NDArray[np.int64], NDArray[np.float32]]
"""Classes and distances of `ClassDistances`."""


@dataclass(frozen=True, kw_only=True)
class Parcel:
    """A batch on its way, its images still to be replayed (the plan's U) or finished (B)."""

    plan: BatchPlan
    finished: bool
    label_org: NDArray[np.int64]
    label_aug: NDArray[np.int64]
    distance_org: NDArray[np.float32]
    distance_aug: NDArray[np.float32]
    prior_org: PackedDistances | None
    prior_aug: PackedDistances | None
    further: PackedDistances | None
    images: Tensor | Pixels
    """(U or B, 3, S, S), channels last; `Pixels`: they lie in the slot reserved for this batch."""

    def pin_memory(self) -> DBRBatch | PlannedBatch:
        """The opened batch in page-locked memory; torch calls this where it is asked to pin."""
        return self.opened().pin_memory()

    def opened(self, in_slot: Tensor | None = None) -> DBRBatch | PlannedBatch:
        """The batch, its images those in its slot if they are not in the parcel."""
        images = self.images if isinstance(self.images, Tensor) else in_slot
        assert images is not None
        known: dict[str, Any] = {
            "label_org": torch.from_numpy(self.label_org),
            "label_aug": torch.from_numpy(self.label_aug),
            "distance_org": torch.from_numpy(self.distance_org),
            "distance_aug": torch.from_numpy(self.distance_aug),
            "prior_org": _unpacked(self.prior_org),
            "prior_aug": _unpacked(self.prior_aug),
            "further": _unpacked(self.further),
        }
        if self.finished:
            return DBRBatch(images=images, lam=torch.from_numpy(self.plan.lam), **known)
        return PlannedBatch(pairs=self.plan.with_images(images), **known)


def _unpacked(packed: PackedDistances | None) -> ClassDistances | None:
    if packed is None:
        return None
    return ClassDistances(classes=torch.from_numpy(packed[0]), distances=torch.from_numpy(packed[1]))


def keep_freed_memory(_: int) -> None:
    """In a worker, for all of its life: what a batch frees is kept for the next.

    glibc returns large blocks to the system at once, and getting them again costs a tenth of a worker's time.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(_M_MMAP_MAX, 0)
        libc.mallopt(_M_TRIM_THRESHOLD, _NEVER)
