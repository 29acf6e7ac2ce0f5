"""Files behind a URL, read through fsspec: bounded and retried; those of a dataset are checked against its manifest."""

from __future__ import annotations

import asyncio
import hashlib
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import SplitResult, urlsplit
from urllib.request import url2pathname

from nrrdd_format.errors import ConfigError, FormatError
from nrrdd_format.json_checks import parse_json
from nrrdd_format.limits import MAX_MANIFEST_BYTES
from nrrdd_format.manifest import MANIFEST_NAME, Manifest
from nrrdd_format.shards import ShardEntry

EXTRAS = {"http": "http", "https": "http", "s3": "s3", "gs": "gs", "hf": "hf"}
"""Scheme of a URL -> the extra that installs what reads it."""
_SCHEME = re.compile(r"(pipe):|([^/]*)://")
_USER = re.compile(r"//[^\s/?#]*@")  # and password
_QUERY = re.compile(r"\?\S+")
_CHUNK = 2**20
_FIRST_WAIT, _LONGEST_WAIT = 0.5, 30.0  # seconds between attempts; each wait is twice the one before
_REFUSALS = (401, 403, 404, 410)  # HTTP statuses that another attempt does not change
T = TypeVar("T")


class RefusedError(FormatError):
    """The server will not give this file: another attempt is of no use."""


def place_of(text: str) -> Path | str:
    """A place as a user names it: URLs stay text, since a Path would drop one of two slashes."""
    return Path(text) if _scheme(text) is None else text


def is_url(path: str | os.PathLike[str], option: str = "path") -> bool:
    """Whether a place lies behind a URL that fsspec reads; False: in a local folder.

    Raises ConfigError, naming `option`, for URLs of other schemes, and for what is none.
    """
    scheme = _scheme(path)
    if scheme in (None, "file"):
        return False
    if scheme not in EXTRAS:
        known = ", ".join([*EXTRAS, "file"])
        raise ConfigError(
            f"{option}: URLs that begin with {scheme!r} are not read; expected a folder, or one of {known}"
        )
    _split(path, option)
    return True


def local_path(path: str | os.PathLike[str], option: str = "path") -> Path:
    """The folder that a plain path or a file:// URL means.

    Raises ConfigError, naming `option`, where it is another machine's.
    """
    if _scheme(path) != "file":
        return Path(path)
    parts = _split(path, option)
    if parts.netloc not in ("", "localhost"):
        machine = parts.netloc.rpartition("@")[2]
        raise ConfigError(
            f"{option}: {without_secrets(os.fspath(path))} names the machine {machine!r}, expected file:///folder"
        )
    return Path(url2pathname(parts.path))


def _scheme(path: str | os.PathLike[str]) -> str | None:
    """Of a URL, in small letters; None: a plain path."""
    match = _SCHEME.match(os.fspath(path))
    return None if match is None else (match[1] or match[2]).lower()


def _split(url: str | os.PathLike[str], option: str) -> SplitResult:
    try:
        return urlsplit(os.fspath(url))
    except ValueError:
        shown = without_secrets(os.fspath(url))
        # Not from it: its text may quote user and password.
        raise ConfigError(f"{option}: {shown} is not a URL, expected scheme://host/folder") from None


def without_secrets(text: str) -> str:
    """A text in which URLs stand, without their users, passwords and queries."""
    return _QUERY.sub("?...", _USER.sub("//...@", text))


@dataclass(frozen=True, kw_only=True)
class RemoteFolder:
    """A folder of files behind a URL. Can be pickled, and used after a fork."""

    url: str
    """Of the folder, or of the `dataset.json` in it; a query (an access token) is kept, and never shown."""
    timeout: float = 30.0
    """Seconds without a byte before an attempt has failed (http, https and s3; others: as their package does)."""
    attempts: int = 5
    storage_options: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of the fsspec filesystem."""
    _filesystems: dict[int, Any] = field(default_factory=dict, init=False, repr=False, compare=False)
    """Of each process that forks have led to. An inherited one is not used but kept: freeing it stalls."""

    @property
    def longest_pause(self) -> float:
        """Seconds that `retried` takes at most from one attempt's start to the next's where no byte comes."""
        return self.timeout + _LONGEST_WAIT

    def shown(self, name: str = "") -> str:
        """The URL of a file as messages show it: without user, password and query."""
        parts = self._parts(name)
        return parts._replace(netloc=parts.netloc.rpartition("@")[2], query="").geturl()

    def manifest(self) -> Manifest:
        """Fetches and reads `dataset.json`. Raises FormatError naming its URL."""
        data = self.retried(MANIFEST_NAME, self._manifest_bytes)
        try:
            return Manifest.decode(data)
        except FormatError as error:
            raise error.located(path=self.shown(MANIFEST_NAME)) from None

    def _manifest_bytes(self) -> bytes:
        """Nothing says how long a manifest is, but one that was cut off is no JSON, and worth another attempt."""
        data = b"".join(self.pieces(MANIFEST_NAME, MAX_MANIFEST_BYTES))
        if len(data) <= MAX_MANIFEST_BYTES:
            try:
                parse_json(data)
            except FormatError as error:
                raise FormatError(f"what came {error.reason}") from None
        return data

    def shard(self, entry: ShardEntry) -> Iterator[bytes]:
        """The bytes of a shard in pieces, no more than it has.

        Raises FormatError: they cannot be read, or (after the last) are not those that the entry describes.
        """
        digest, size = hashlib.sha256(), 0
        for piece in self.pieces(entry.name, entry.bytes):
            size += len(piece)
            if size > entry.bytes:
                raise FormatError(f"more than {entry.bytes} bytes came, expected {entry.bytes} (manifest)")
            digest.update(piece)
            yield piece
        if size != entry.bytes:
            raise FormatError(f"{size} bytes came, expected {entry.bytes} (manifest)")
        if digest.hexdigest() != entry.sha256:
            raise FormatError(f"sha256 is {digest.hexdigest()}, expected {entry.sha256} (manifest)")

    def retried(self, name: str, fetch: Callable[[], T]) -> T:
        """The result of `fetch`, which is tried again, after ever longer waits, where it raises FormatError.

        Raises FormatError naming the URL and what the last attempt found.
        """
        for attempt in range(1, self.attempts + 1):
            try:
                return fetch()
            except FormatError as error:
                if attempt == self.attempts or isinstance(error, RefusedError):
                    tries = "" if attempt == 1 else f" ({attempt} attempts)"
                    reason = f"cannot be fetched{tries}: {error.reason}"
                    raise type(error)(reason, path=self.shown(name)) from error
            time.sleep(min(_FIRST_WAIT * 2 ** (attempt - 1), _LONGEST_WAIT))
        raise AssertionError("no attempt was made")

    def size(self, name: str) -> int | None:
        """Bytes of a file; None: the server does not say. Raises FormatError without a location."""
        parts, filesystem = self._parts(name), self._filesystem()
        try:
            found = filesystem.info(parts.geturl()).get("size")
        except Exception as error:  # every backend has exceptions of its own
            cause, is_http = error.__cause__, EXTRAS[parts.scheme] == "http"
            # fsspec's http calls every failure a missing file.
            # Not from it: a traceback would show its text, and in it the URL with its secrets.
            raise self._fault(cause if is_http and isinstance(cause, Exception) else error) from None
        return found if isinstance(found, int) else None

    def pieces(self, name: str, most: int) -> Iterator[bytes]:
        """The bytes of a file, cut off one byte after `most`. Raises FormatError without a location."""
        left = most + 1
        parts, filesystem = self._parts(name), self._filesystem()
        # With a size given, fsspec does not ask for it; with blocks of 0 it sends one request, not one a block.
        as_stream = {"block_size": 0, "size": 1} if EXTRAS[parts.scheme] == "http" else {}
        try:
            with filesystem.open(parts.geturl(), "rb", **as_stream) as file:
                while left and (piece := file.read(min(_CHUNK, left))):
                    left -= len(piece)
                    yield piece
        except Exception as error:  # every backend has exceptions of its own
            raise self._fault(error) from None  # whose text may hold the secrets of the URL

    def _filesystem(self) -> Any:
        """The fsspec filesystem of this process: none works on after a fork."""
        if os.getpid() not in self._filesystems:
            self._filesystems[os.getpid()] = self._new_filesystem()
        return self._filesystems[os.getpid()]

    def _new_filesystem(self) -> Any:
        scheme = urlsplit(self.url).scheme
        try:
            import fsspec

            return fsspec.filesystem(scheme, skip_instance_cache=True, **self._with_timeout(scheme))
        except ImportError as error:
            raise ConfigError(
                f"{self.shown()}: reading {scheme}:// needs packages that are not installed ({error}); "
                f'pip install "nrrdd[{EXTRAS[scheme]}]"'
            ) from error

    def _with_timeout(self, scheme: str) -> dict[str, Any]:
        options = dict(self.storage_options)
        if EXTRAS[scheme] == "http":
            import aiohttp

            timeout = aiohttp.ClientTimeout(total=None, sock_connect=self.timeout, sock_read=self.timeout)
            options["client_kwargs"] = {"timeout": timeout, **options.get("client_kwargs", {})}
        elif scheme == "s3":
            timeouts = {"connect_timeout": self.timeout, "read_timeout": self.timeout}
            options["config_kwargs"] = {**timeouts, **options.get("config_kwargs", {})}
        return options

    def _parts(self, name: str) -> SplitResult:
        """The parts of a file's URL."""
        parts = urlsplit(self.url)
        folder = parts.path.removesuffix(MANIFEST_NAME).rstrip("/")
        return parts._replace(path=f"{folder}/{name}", fragment="")

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_filesystems": {}}

    def _fault(self, error: Exception) -> FormatError:
        """A backend's exception as one of ours, without a location."""
        refused = isinstance(error, FileNotFoundError | PermissionError)
        refused |= getattr(error, "status", None) in _REFUSALS
        return (RefusedError if refused else FormatError)(self._reason(error))

    def _reason(self, error: Exception) -> str:
        """What a backend's exception says, in one line, without the secrets of the URL."""
        if isinstance(error, FileNotFoundError):
            return "there is no such file"
        status = getattr(error, "status", None)
        if isinstance(status, int) and status >= 400:
            return f"the server answers {status} {getattr(error, 'message', '')}".rstrip()
        if isinstance(error, TimeoutError | asyncio.TimeoutError):  # one and the same from Python 3.11 on
            return f"nothing came for {self.timeout:g} seconds"
        text = f"{type(error).__name__}: {error}".partition("\n")[0]
        parts = urlsplit(self.url)
        for secret in filter(None, (parts.query, parts.netloc.rpartition("@")[0])):
            text = text.replace(secret, "...")
        # Backends write a URL in forms of their own (other characters are percent-encoded), and name others.
        return without_secrets(text)
