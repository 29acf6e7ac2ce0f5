"""What a GPU has room for: how much is shown to it at once, and the lines that say that a build does not fit."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from nrrdd_format.errors import ConfigError

_TORCHS_SHORTAGE = "DefaultCPUAllocator: "


@contextmanager
def named_shortage() -> Iterator[None]:
    """For what runs on the device of a build.

    Raises:
        ConfigError: the GPU's memory, or the machine's, is too small for it, or others hold it.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        wanted = str(error).split(" GPU ")[0].strip()  # the rest is an account of the GPU and advice to programmers
        raise ConfigError(
            f"--device: the GPU has too little memory free ({wanted}); lower --batch-size or --size, end other "
            f"programs on it, or use a larger one (--batch-size and --size change the images)"
        ) from error
    except (MemoryError, RuntimeError) as error:  # NumPy's, and torch's, which has no class of its own
        _, is_torchs, wanted = str(error).rpartition(_TORCHS_SHORTAGE)
        if not is_torchs and not isinstance(error, MemoryError):
            raise
        raise ConfigError(
            f"this machine has too little memory ({' '.join(wanted.split())}); lower --ipc, --batch-size or --size, "
            f"which changes the images, end other programs, or use a larger one"
        ) from error


def at_once(count: int, size: int) -> int:
    """So many images of at most 224 px; of larger ones as many as have the same pixels, since memory goes by these."""
    return min(count, count * 224**2 // size**2)
