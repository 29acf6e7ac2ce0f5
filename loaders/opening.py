"""Opens the dataset that a loader is given: a folder of this machine, or a URL whose shards go through a cache."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from loaders.cache import ShardCache
from nrrdd_format.dataset import DistilledDataset, open_dataset
from nrrdd_format.errors import ConfigError, require, shown
from nrrdd_format.files import default_cache_dir
from nrrdd_format.remote import RemoteFolder, is_url, local_path


@dataclass(frozen=True, kw_only=True)
class OpenedPlace:
    """A dataset, and where its shards come from."""

    dataset: DistilledDataset
    cache: ShardCache | None
    """Fetches the shards of a URL to where `dataset` reads them; None: they lie there."""
    shown: str
    """The place as messages name it."""


def open_place(
    path: str | os.PathLike[str],
    *,
    cache_dir: str | os.PathLike[str] | None,
    cache_limit_bytes: int | None,
    timeout: float,
    attempts: int,
    storage_options: Mapping[str, Any],
) -> OpenedPlace:
    """Opens a folder, or the manifest behind a URL; the arguments are those of `DBRLoader`, and raise as there."""
    if cache_limit_bytes is not None:
        cache_limit_bytes = whole("cache_limit_bytes", cache_limit_bytes, 1)
    require(
        isinstance(timeout, int | float) and timeout > 0,
        f"timeout: found {shown(timeout)}, expected more than 0 seconds",
    )
    attempts = whole("attempts", attempts, 1)
    if not is_url(path):
        return OpenedPlace(dataset=open_dataset(local_path(path)), cache=None, shown=os.fspath(path))
    remote = RemoteFolder(url=os.fspath(path), timeout=timeout, attempts=attempts, storage_options=storage_options)
    manifest = remote.manifest()
    root = default_cache_dir() if cache_dir is None else Path(cache_dir)
    cache = ShardCache(remote, manifest.dataset_id, root, cache_limit_bytes)
    return OpenedPlace(dataset=DistilledDataset(cache.folder, manifest), cache=cache, shown=remote.shown())


def whole(name: str, value: object, least: int) -> int:
    """The value as a plain integer: NumPy's count as well, as sizes are computed, but do not belong into a state.

    Raises:
        ConfigError: naming the argument, which is no integer from `least` on.
    """
    if isinstance(value, int | np.integer) and not isinstance(value, bool) and value >= least:
        return int(value)
    raise ConfigError(f"{name}: found {shown(value)}, expected a whole number, {least} or more")
