"""Folders that nobody may look into, for tests that may run as root, whom no folder is closed to."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

VERSION_3 = 0x20080522
CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH = 1, 2


@contextmanager
def closed_folder(path: Path) -> Iterator[None]:
    """A folder without permissions, for this process, too, until the block ends."""
    if not sys.platform.startswith("linux"):
        pytest.skip("root's powers are given up in Linux's way")
    path.mkdir(parents=True, exist_ok=True)
    path.chmod(0)
    try:
        with _without_roots_powers():
            yield
    finally:
        path.chmod(0o700)


@contextmanager
def _without_roots_powers() -> Iterator[None]:
    """What the permissions say holds for this thread; others than root have no more power than that anyway."""
    libc = ctypes.CDLL(None, use_errno=True)
    head = (ctypes.c_uint32 * 2)(VERSION_3, 0)
    sets = (ctypes.c_uint32 * 6)()  # effective, permitted and inheritable, of capabilities 0 to 31 and then of the rest
    assert libc.capget(head, sets) == 0
    before = sets[0]
    try:
        sets[0] = before & ~(1 << CAP_DAC_OVERRIDE | 1 << CAP_DAC_READ_SEARCH)
        assert libc.capset(head, sets) == 0
        yield
    finally:
        sets[0] = before
        assert libc.capset(head, sets) == 0
