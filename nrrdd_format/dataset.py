"""A dataset on disk: its manifest and its shards, opened when first used."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import overload

from nrrdd_format.errors import FormatError
from nrrdd_format.manifest import Manifest, manifest_path
from nrrdd_format.shards import ShardReader


class Shards(Sequence[ShardReader]):
    """The shards in manifest order; each is opened and checked against the manifest when first used."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self._folder = folder
        self._manifest = manifest
        self._open: dict[int, ShardReader] = {}

    def __len__(self) -> int:
        return len(self._manifest.shards)

    @overload
    def __getitem__(self, index: int) -> ShardReader: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[ShardReader]: ...
    def __getitem__(self, index: int | slice) -> ShardReader | Sequence[ShardReader]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index = range(len(self))[index]
        if index not in self._open:
            self._open[index] = open_shard(self._folder, self._manifest, index)
        return self._open[index]

    def __iter__(self) -> Iterator[ShardReader]:
        return (self[i] for i in range(len(self)))

    def close(self) -> None:
        """Close all open files."""
        self.close_all_but(())

    def close_all_but(self, kept: Collection[int]) -> None:
        """Close the shards that are not among `kept`, and forget their headers; a later use opens them again."""
        for index in self._open.keys() - set(kept):
            self._open.pop(index).close()


class DistilledDataset:
    """An opened dataset; use `open_dataset`."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path  # the folder
        self.manifest = manifest
        self.shards = Shards(path, manifest)

    def close(self) -> None:
        """Close all open files."""
        self.shards.close()

    def __enter__(self) -> DistilledDataset:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_dataset(path: str | os.PathLike[str]) -> DistilledDataset:
    """Open a dataset by its folder or its `dataset.json`. Raises FormatError if the manifest is wrong."""
    file = manifest_path(path)
    return DistilledDataset(file.parent, Manifest.load(file))


def open_shard(folder: Path, manifest: Manifest, index: int) -> ShardReader:
    """Open `manifest.shards[index]` and compare it with the manifest. Raises FormatError."""
    entry = manifest.shards[index]
    reader = ShardReader(folder / entry.name, entry, manifest.layout(index))
    classes, epochs = len(manifest.dataset.class_names), manifest.records.epochs
    if reader.epochs != epochs:
        reason = f"the shard header says {reader.epochs} epochs, expected {epochs} (manifest)"
        raise FormatError(reason, path=reader.path)
    if reader.labels.max() >= classes:
        member = reader.header.members[int(reader.labels.argmax())].name
        reason = f"class {reader.labels.max()}, expected less than {classes} (manifest)"
        raise FormatError(reason, path=reader.path, member=member)
    return reader
