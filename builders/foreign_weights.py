"""Other libraries may load a downloaded file as a full pickle: here they are held to weights-only reading.

timm up to 1.0.15 at least asks for a full pickle or leaves the choice to torch; all its ways to a downloaded pickle
(hub, URL, file) go through torch.load, so what holds that holds any version of it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

_FORCE = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
"""Read by every torch.load, whatever its caller asks for."""


@contextmanager
def weights_only_loads() -> Iterator[None]:
    """While it lasts, every `torch.load` of this process refuses (with UnpicklingError) files that would run code."""
    before = os.environ.get(_FORCE)
    os.environ[_FORCE] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_FORCE]
        else:
            os.environ[_FORCE] = before
