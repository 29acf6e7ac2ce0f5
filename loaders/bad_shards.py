"""Finds the shards that are not what the manifest says, before an epoch begins."""

from __future__ import annotations

from loaders.cache import ShardCache
from nrrdd_format.copies import check_shard
from nrrdd_format.dataset import DistilledDataset
from nrrdd_format.errors import FormatError
from nrrdd_format.shards import ShardEntry


def find_bad_shards(dataset: DistilledDataset, cache: ShardCache | None) -> dict[int, str]:
    """Reads every shard (fetched if the dataset is remote) and compares it with the manifest: shard -> what is wrong.

    Raises OutputError where the cache folder cannot be used.
    """
    bad = {}
    for shard, entry in enumerate(dataset.manifest.shards):
        try:
            if cache is not None:
                _hold_sound(cache, entry)
            else:
                check_shard(dataset.path / entry.name, entry)
        except FormatError as error:
            bad[shard] = str(error)
    if cache is not None:
        cache.hold([])
    return bad


def _hold_sound(cache: ShardCache, entry: ShardEntry) -> None:
    """Holds a shard; one that was damaged since it was fetched is fetched, and so compared, anew."""
    cache.hold([entry])
    cache.discard_damaged(entry)
    cache.hold([entry])
