"""Finds the shards that are not what the manifest says, before an epoch begins."""

from __future__ import annotations

from loaders.cache import ShardCache
from nrrdd_format.copies import verified_chunks
from nrrdd_format.dataset import DistilledDataset
from nrrdd_format.errors import FormatError


def find_bad_shards(dataset: DistilledDataset, cache: ShardCache | None) -> dict[int, str]:
    """Reads every shard (fetched if the dataset is remote) and compares it with the manifest: shard -> what is wrong.

    Raises OutputError where the cache folder cannot be used.
    """
    bad = {}
    for shard, entry in enumerate(dataset.manifest.shards):
        try:
            if cache is not None:
                cache.hold([entry])
            for _ in verified_chunks(dataset.path / entry.name, entry):
                pass
        except FormatError as error:
            bad[shard] = str(error)
    if cache is not None:
        cache.hold([])
    return bad
