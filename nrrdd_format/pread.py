"""Positioned reads of one file: no shared file offset, so safe after a fork, and picklable."""

from __future__ import annotations

import os
from typing import Any

from nrrdd_format.errors import FormatError


class PositionedFile:
    """A file opened when first read; each process that got it by pickling opens its own descriptor."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fspath(path)
        self._descriptor: int | None = None

    def size(self) -> int:
        """Length of the file in bytes."""
        return os.fstat(self._open()).st_size

    def read(self, offset: int, size: int, member: str | None) -> bytes:
        """Exactly `size` bytes, which the caller has bounded. Raises FormatError if the file ends earlier."""
        try:
            data = _pread(self._open(), size, offset)
        except OSError as error:
            raise FormatError(f"cannot be read: {error.strerror}", path=self.path, member=member) from error
        if len(data) != size:
            reason = f"the file ends here, {size - len(data)} bytes are missing: it is truncated"
            raise FormatError(reason, path=self.path, member=member, offset=offset + len(data))
        return data

    def close(self) -> None:
        """Close the file; a later read opens it again."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _open(self) -> int:
        if self._descriptor is None:
            try:
                self._descriptor = os.open(self.path, os.O_RDONLY)
            except OSError as error:
                raise FormatError(f"cannot be opened: {error.strerror}", path=self.path) from error
        return self._descriptor

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "_descriptor": None}

    def __del__(self) -> None:
        self.close()


def _pread(descriptor: int, size: int, offset: int) -> bytes:
    data = os.pread(descriptor, size, offset)
    while 0 < len(data) < size:  # one call may return less than asked
        more = os.pread(descriptor, size - len(data), offset + len(data))
        if not more:
            break
        data += more
    return data
