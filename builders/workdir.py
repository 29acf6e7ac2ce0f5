"""The work folder: every result of every stage, each appearing by rename, so that a build can stop at any moment.

A stage's results lie in `<work>/<stage>-<key>/`. The key is a digest of all that determines them: the stage's settings
and the key of the stage before. So a changed option starts only the stages it touches, and two builds that share their
first stages may share one work folder.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nrrdd_format.errors import OutputError
from nrrdd_format.files import atomic_write, make_folder

KEY_DIGITS = 16
LOCK = "lock"
"""The file whose lock a build holds; it is empty and stays."""
WRITABLE = "choose a writable --work-dir"


def stage_key(name: str, settings: Mapping[str, Any], upstream: str) -> str:
    """Digest of a stage's name, its settings (JSON values) and the key of what it builds on."""
    text = json.dumps([name, settings, upstream], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:KEY_DIGITS]


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Lets Ctrl-C wait until the block is done: a unit may have taken hours, writing it takes a moment."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread is interrupted
        return
    waiting: list[tuple[int, FrameType | None]] = []
    usual = signal.signal(signal.SIGINT, lambda number, frame: waiting.append((number, frame)))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, usual)
    if waiting and callable(usual):
        usual(*waiting[0])


@contextmanager
def claimed(work: Path, say: Callable[[str], object]) -> Iterator[None]:
    """Keeps other builds out of the work folder, which is made where it is missing.

    On a GPU two of them would refine the same images to different pixels, and one might label what the other replaces.
    The lock is the process's (fcntl's kind): it ends with the process, however that ends, and those it has started
    to read images, which outlive it for a moment, do not hold it.

    Args:
        work: the work folder.
        say: told where the file system has no locks, and nothing keeps others out.

    Raises:
        OutputError: another process builds there, or the folder or the file cannot be made.
    """
    make_folder(work, WRITABLE)
    path = work / LOCK
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise OutputError(f"{path}: cannot open ({error.strerror}); {WRITABLE}") from error
    try:
        _claim(descriptor, work, say)
        yield
    finally:
        os.close(descriptor)


def _claim(descriptor: int, work: Path, say: Callable[[str], object]) -> None:
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            raise OutputError(
                f"{work}: another process is building there; wait for its end or stop it, and the same command goes "
                f"on, or choose another --work-dir (if its machine has vanished, remove {work / LOCK})"
            ) from error
        say(f"{work}: has no locks ({error.strerror}), so see to it that no other process builds there meanwhile")


class Stage:
    """One stage's folder of finished units.

    Attributes:
        key: what determines the results; the next stage's key builds on it.
        path: the folder; `make` makes it.
    """

    def __init__(self, work: Path, name: str, settings: Mapping[str, Any], upstream: str) -> None:
        self.key = stage_key(name, settings, upstream)
        self.path = work / f"{name}-{self.key}"

    def make(self) -> None:
        """Makes the folder where it is missing.

        Raises:
            OutputError: it cannot be made.
        """
        make_folder(self.path, WRITABLE)

    def has(self, unit: str) -> bool:
        """Whether the unit is finished; a file under its final name is always whole."""
        return os.path.isfile(self.path / unit)

    def save_array(self, unit: str, array: NDArray[Any]) -> None:
        """Stores an array as `.npy` under the unit's name."""
        array = np.ascontiguousarray(array)
        with uninterrupted(), atomic_write(self.path / unit) as file:
            # np.save would write through C's stdio and lose the reason why it cannot, such as a full disk.
            np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(array))
            file.write(array.data)

    def save_bytes(self, unit: str, data: bytes) -> None:
        """Stores bytes under the unit's name."""
        with uninterrupted(), atomic_write(self.path / unit) as file:
            file.write(data)

    def load_array(self, unit: str) -> NDArray[Any]:
        """Opens a finished unit's array; its pages are read only where they are used."""
        array: NDArray[Any] = np.load(self.path / unit, mmap_mode="r", allow_pickle=False)
        return array

    def save_json(self, unit: str, value: Any) -> None:
        """Stores a JSON value under the unit's name."""
        self.save_bytes(unit, json.dumps(value, indent=1, sort_keys=True).encode() + b"\n")

    def load_json(self, unit: str) -> Any:
        """Reads a finished JSON unit."""
        return json.loads((self.path / unit).read_bytes())
