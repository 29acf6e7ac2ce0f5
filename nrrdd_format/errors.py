"""Every failure a user can meet, as one family of exceptions.

A message is one line: what failed (file, shard, member, option), what was found, what was expected and, where
it helps, what to do. Command-line tools print it as `error: ...` and exit with status 2.
"""

from __future__ import annotations

import os
import reprlib

_REPR = reprlib.Repr()
_REPR.maxlevel, _REPR.maxstring, _REPR.maxother = 3, 60, 60


def shown(value: object) -> str:
    """A value of any kind and size as a message shows it: one line of at most 60 characters."""
    text = _REPR.repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def counted(count: int, one: str, several: str | None = None) -> str:
    """`1 shard`, `2 shards`; `several` where the plural is not `one` with an s."""
    return f"{count} {one if count == 1 else several or one + 's'}"


def require(condition: bool, message: str) -> None:
    """Raises ConfigError with this message unless the condition holds."""
    if not condition:
        raise ConfigError(message)


def first_line(error: BaseException) -> str:
    """What another library's error says, or its kind if it says nothing; without the account that follows."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


class NrrddError(Exception):
    """Base of all errors this project raises on purpose."""


class FormatError(NrrddError):
    """Bytes of a dataset that break SPEC.md.

    `path` is the file, `member` the tar member inside it (None: the file itself), `offset` the byte position
    in the file where the fault lies (None: unknown), `reason` the message without its location.
    """

    def __init__(
        self,
        reason: str,
        *,
        path: str | os.PathLike[str] | None = None,
        member: str | None = None,
        offset: int | None = None,
    ) -> None:
        self.reason = reason
        self.path = None if path is None else os.fspath(path)
        self.member = member
        self.offset = offset
        super().__init__(reason)

    def __str__(self) -> str:
        where = [self.path] if self.path is not None else []
        if self.member is not None:
            where.append(f"member {self.member!r}")
        if self.offset is not None:
            where.append(f"offset {self.offset}")
        return f"{', '.join(where)}: {self.reason}" if where else self.reason

    def located(
        self,
        *,
        path: str | os.PathLike[str] | None = None,
        member: str | None = None,
        offset: int | None = None,
    ) -> FormatError:
        """The same error with the location fields filled in where they were unknown."""
        return type(self)(
            self.reason,
            path=self.path if self.path is not None else path,
            member=self.member if self.member is not None else member,
            offset=self.offset if self.offset is not None else offset,
        )

    def __reduce__(self) -> tuple[object, ...]:  # worker processes send errors to the parent by pickling them
        return _rebuild, (type(self), self.reason, self.path, self.member, self.offset)


def _rebuild(
    kind: type[FormatError], reason: str, path: str | None, member: str | None, offset: int | None
) -> FormatError:
    return kind(reason, path=path, member=member, offset=offset)


class ConfigError(NrrddError):
    """An option or configuration the user gave that cannot work."""


class DataError(NrrddError):
    """Source images or a data directory that cannot be used."""


class TeacherError(NrrddError):
    """A teacher network or checkpoint that cannot be used."""


class OutputError(NrrddError):
    """Output that cannot be written: disk full, or something in the way."""


class RankError(NrrddError):
    """Processes that share one piece of work have lost each other."""
