"""Reads a mutated dataset as a user's program and as `verify` would, and judges what came of it.

Outcomes: *refused* by every reader; refused by *verify* only; read as *identical* data; read as *another* dataset. The
last is right only where a mutation says so, and only if the data are exactly what the bytes say:

- the manifest as read has every value that its JSON has;
- images and labels as read are those of the tar members;
- the records as read, encoded again, give the very bytes that were stored: nothing was ignored and nothing made up (not
  asked where a mutation made two entries of a codebook equal: then the same records have several encodings);
- the dataset id is not the original's, so whoever compares it with a trusted copy notices.
"""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Literal

import numpy as np

from benchmarks.mutants import Expectation, Mutant
from benchmarks.mutation_parts import Base, decompress, take_apart
from nrrdd_format.dataset import open_dataset
from nrrdd_format.errors import FormatError, NrrddError
from nrrdd_format.limits import MAX_TEXT
from nrrdd_format.manifest import MANIFEST_NAME, Manifest
from nrrdd_format.pairs import PairRecords
from nrrdd_format.records import encode_block
from nrrdd_format.shard_header import image_name
from nrrdd_format.shards import ShardReader
from nrrdd_format.verify import verify_dataset

Outcome = Literal["refused", "verify", "identical", "another"]

MAX_SECONDS = 1.0  # of processor time, for one case
MAX_MEMORY = 200 * 2**20  # bytes above what the process had before the first case
HANG_SECONDS = 20.0
_ADDRESS = re.compile(r"<\S+ object at 0x")


class Hang(BaseException):
    """A case is broken off; no `except Exception` of the code under test may swallow it."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What came of one case."""

    outcome: Outcome | None  # None: none of them
    fault: str | None  # why it is a failure
    message: str  # the reader's, or the first of verify's
    seconds: float


@dataclass(frozen=True, kw_only=True)
class ShardData:
    """All that a reader gives of one shard."""

    reader: ShardReader
    images: list[tuple[int, int, bytes]]  # number, label, encoded image
    priors: dict[str, list[int]]  # as they are packed; empty without any
    epochs: list[PairRecords]


@dataclass(frozen=True, kw_only=True)
class Data:
    """All that a reader gives of one dataset."""

    manifest: Manifest
    shards: list[ShardData]

    def key(self) -> tuple[object, ...]:
        """Equal for equal data: everything but how the shards are stored."""
        stated = self.manifest.to_json()
        del stated["shards"]
        shards = [(s.reader.shard, s.images, s.priors, [_columns(e) for e in s.epochs]) for s in self.shards]
        return (json.dumps(stated), shards)


def read(folder: Path) -> Data:
    """Reads everything, as a program that trains on the dataset would. Raises FormatError."""
    with open_dataset(folder) as dataset:
        return Data(manifest=dataset.manifest, shards=[_read_shard(reader) for reader in dataset.shards])


def _read_shard(reader: ShardReader) -> ShardData:
    data = [reader.image_bytes(image) for image in range(reader.images)]
    return ShardData(
        reader=reader,
        images=list(zip(reader.indices.tolist(), reader.labels.tolist(), data, strict=True)),
        priors={} if reader.priors is None else reader.priors.pack(),
        epochs=[reader.records(epoch) for epoch in range(reader.epochs)],
    )


def _columns(records: PairRecords) -> list[bytes]:
    return [column.tobytes() for column in records.columns().values()]


# ---- one case


class Bench:
    """One base dataset in a folder of its own, where mutants take its place one after the other."""

    def __init__(self, base: Base, folder: Path) -> None:
        folder.mkdir()
        self.base = base
        self._folder = folder
        self._changed = set(base.files)
        self._put({})
        if problems := verify_dataset(folder):
            raise NrrddError(f"the {base.coding} dataset is broken before anything is mutated: {problems[0]}")
        original = read(folder)
        for fault in _unfaithful(base.files, original):
            raise NrrddError(f"the {base.coding} dataset is not read right before anything is mutated: {fault}")
        self._id, self._key = original.manifest.dataset_id, original.key()
        self._memory = peak_memory()

    def judge(self, mutant: Mutant) -> Verdict:
        """Reads and verifies the mutant."""
        self._put(mutant.files)
        before, start = peak_memory(), time.process_time()
        with _no_hang():
            found = self._attempt()
        seconds, peak = time.process_time() - start, peak_memory()
        if isinstance(found, str):
            return Verdict(outcome=None, fault=found, message="", seconds=seconds)
        faults = list(_message_faults(found.messages))
        if seconds > MAX_SECONDS:
            faults.append(f"took {seconds:.2f} s of processor time")
        if peak > before and peak - self._memory > MAX_MEMORY:
            faults.append(f"took {peak - self._memory} bytes of memory")
        identical = found.data is not None and found.data.key() == self._key
        outcome = _outcome(found, identical)
        faults += self._faults(mutant, found, outcome, identical)
        message = next(iter(found.messages), "")
        return Verdict(outcome=outcome, fault="; ".join(faults) or None, message=message, seconds=seconds)

    def _attempt(self) -> Found | str:
        """What reading and verifying give; or how the code under test fell over."""
        data, refusal = None, None
        try:
            try:
                data = read(self._folder)
            except FormatError as error:
                refusal = str(error)
            return Found(data=data, refusal=refusal, problems=[str(p) for p in verify_dataset(self._folder)])
        except (Exception, Hang) as error:
            return f"{type(error).__name__} instead of a FormatError: {str(error)[:200]}"

    def _faults(self, mutant: Mutant, found: Found, outcome: Outcome, identical: bool) -> Iterator[str]:
        if outcome not in _RIGHT[mutant.expectation]:
            yield f"{outcome}, expected {' or '.join(_RIGHT[mutant.expectation])}"
        if found.data is None:
            if not found.problems:
                yield "refused by the reader, but verify finds no problem"
        elif not identical:
            if mutant.expectation == "damage":
                yield "damaged data were read without complaint"
            if found.data.manifest.dataset_id == self._id:
                yield "other data under the same dataset id"
            yield from _unfaithful({**self.base.files, **mutant.files}, found.data)

    def _put(self, files: Mapping[str, bytes | None]) -> None:
        """Writes what differs from what lies there."""
        for name in self._changed | files.keys():
            data = files[name] if name in files else self.base.files.get(name)
            path = self._folder / name
            if data is None:
                path.unlink(missing_ok=True)
            else:
                path.write_bytes(data)
        self._changed = set(files)


@dataclass(frozen=True, kw_only=True)
class Found:
    """What a reader and `verify` gave."""

    data: Data | None
    refusal: str | None
    problems: list[str]

    @property
    def messages(self) -> list[str]:
        """All that was said, the reader first."""
        return [*([self.refusal] if self.refusal is not None else []), *self.problems]


def _outcome(found: Found, identical: bool) -> Outcome:
    if found.data is None:
        return "refused"
    if found.problems:
        return "verify"
    return "identical" if identical else "another"


_RIGHT: dict[Expectation, tuple[Outcome, ...]] = {
    "harmless": ("identical",),
    "damage": ("refused", "verify"),
    "unseen": ("refused", "verify"),
    "broken": ("refused",),
    "open": ("refused", "verify", "identical", "another"),
}


def _message_faults(messages: list[str]) -> Iterator[str]:
    for message in messages:
        if "\n" in message or len(message) > MAX_TEXT:
            yield f"a message of {len(message)} characters and {message.count(chr(10)) + 1} lines"
        if not _printable(message):
            yield "a message that cannot be printed"
        if _ADDRESS.search(message):
            yield "a message that names an object of the program"


def _printable(text: str) -> bool:
    """Whether the text can be encoded: a lone surrogate cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _unfaithful(files: Mapping[str, bytes | None], data: Data) -> Iterator[str]:
    """Where the data are not what the files say."""
    stated = data.manifest.to_json()
    yield from _differences(stated, json.loads(files[MANIFEST_NAME] or b""), "")
    entries = [repr(entry) for table in ("views", "mixes") for entry in stated["codebooks"][table] or ()]
    for shard, entry in zip(data.shards, data.manifest.shards, strict=True):
        stored, block_epochs = files[entry.name] or b"", data.manifest.records.block_epochs
        yield from _unfaithful_shard(shard, stored, block_epochs, unique=len(set(entries)) == len(entries))


def _differences(read: Any, stated: Any, path: str) -> Iterator[str]:
    """Where the manifest as read (`to_json`) does not say what the JSON states; unknown keys are no difference."""
    if path in (".format", ".version"):
        return
    if isinstance(read, dict) and isinstance(stated, dict):
        for key in stated if path == ".method" else read:
            yield from _differences(read.get(key), stated.get(key), f"{path}.{key}")
    elif isinstance(read, list | tuple) and isinstance(stated, list) and len(read) == len(stated):
        for number, pair in enumerate(zip(read, stated, strict=True)):
            yield from _differences(*pair, f"{path}[{number}]" if path != ".codebooks.distances" else ".distances")
    elif isinstance(read, str) and not _printable(read) and not path.startswith(".method"):
        yield f"{path} was read as a text that cannot be printed"
    elif not _same_value(read, stated, single=path == ".distances"):
        yield f"{path} was read as {read!r:.60}, the JSON states {stated!r:.60}"


def _same_value(read: Any, stated: Any, *, single: bool) -> bool:
    numbers = type(read) in (int, float) and type(stated) in (int, float)
    if numbers and single:
        return bool(np.float32(read) == np.float32(stated))
    return bool(read == stated) and (numbers or type(read) is type(stated))


def _unfaithful_shard(shard: ShardData, stored: bytes, block_epochs: int, *, unique: bool) -> Iterator[str]:
    number = shard.reader.shard
    try:
        parts = take_apart(stored)
        again = [
            decompress(encode_block(epochs, shard.reader.layout, shard=number, first_epoch=first))
            for first in range(0, len(shard.epochs), block_epochs)
            for epochs in [shard.epochs[first : first + block_epochs]]
        ]
    except Exception as error:  # what was read cannot be written, or what lies there is no shard
        yield f"shard {number}: what was read cannot be compared with the file: {error!r:.200}"
        return
    extension = parts.images[0][0].rpartition(".")[2]
    images = tuple((image_name(index, label, extension), data) for index, label, data in shard.images)
    if images != parts.images:
        yield f"shard {number}: the images read are not those of the members"
    if shard.priors != {key: parts.head.get(key) for key in shard.priors}:
        yield f"shard {number}: the priors read are not those stored"
    if unique and tuple(again) != parts.contents:
        yield f"shard {number}: the records read do not encode to the blocks as stored"


# ---- time and memory


@contextmanager
def _no_hang() -> Iterator[None]:
    """Raises Hang in the block once it has taken too much processor time. A call into C is not broken off."""
    before = signal.signal(signal.SIGVTALRM, _raise_hang)
    signal.setitimer(signal.ITIMER_VIRTUAL, HANG_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def _raise_hang(number: int, frame: FrameType | None) -> None:
    raise Hang(f"more than {HANG_SECONDS:.0f} s of processor time")


def peak_memory() -> int:
    """The most memory that this process has touched so far, in bytes."""
    unit = 1 if os.uname().sysname == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def limit_memory() -> None:
    """Lets this process reserve no more than MAX_MEMORY above what it has now. Without /proc it does nothing."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
    except OSError:
        return
    limit = pages * os.sysconf("SC_PAGE_SIZE") + MAX_MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.getrlimit(resource.RLIMIT_AS)[1]))
