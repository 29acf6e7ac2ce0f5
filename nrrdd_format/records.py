"""Record blocks: the pairs of K consecutive epochs of a shard as one zstd frame, and back (SPEC.md section 6).

A block holds the packed fields of its epochs, then the distance levels of all their pairs, which so share one entropy
code, then the columns of their further classes, where the dataset has any.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np
import zstandard
from numpy.typing import NDArray

from nrrdd_format.codebooks import quantize
from nrrdd_format.compression import decompress
from nrrdd_format.errors import ConfigError, FormatError
from nrrdd_format.fields import pack_fields, packed_bytes, unpack_fields
from nrrdd_format.further import column_count, pack_further, unpack_further
from nrrdd_format.limits import MAX_BLOCK_CONTENT
from nrrdd_format.pairs import PairRecords, RecordLayout, draw_pairs

JOINT_LEVELS = 16  # up to so many levels, both of a pair share a byte
_ZSTD_LEVEL = 19


def encode_shard_records(epochs: Iterable[PairRecords], layout: RecordLayout, shard: int) -> list[bytes]:
    """The record blocks of all epochs of a shard, K epochs in each; see `encode_block`."""
    rest, blocks, first = iter(epochs), [], 0
    while part := list(islice(rest, layout.block_epochs)):
        blocks.append(encode_block(part, layout, shard=shard, first_epoch=first))
        first += len(part)
    return blocks


def encode_block(epochs: Sequence[PairRecords], layout: RecordLayout, *, shard: int, first_epoch: int) -> bytes:
    """The block of some consecutive epochs of a shard. Distances become the nearest of the layout's levels.

    That further classes are not the pair's own is for the caller to see to: a block knows no labels.

    Raises:
        ConfigError: the coding cannot express these pairs (with derived coding: they are not those of `draw_pairs`),
            or they have other numbers of further classes than the layout.
        FormatError: a distance that is negative or not finite, or further classes that break a rule.
    """
    if layout.coding == "derived":
        for number, records in enumerate(epochs, start=first_epoch):
            _check_drawn(records, draw_pairs(layout, shard, number), shard, number)
    packed = b"".join(pack_fields(records, layout) for records in epochs)
    org = quantize(np.stack([records.distance_org for records in epochs]), layout.levels)
    aug = quantize(np.stack([records.distance_aug for records in epochs]), layout.levels)
    return _compress([packed, _join_levels(org, aug, len(layout.levels)), *_pack_further(epochs, layout)])


@dataclass(frozen=True, kw_only=True, eq=False)
class Block:
    """A decompressed block; made by `open_block`."""

    layout: RecordLayout
    shard: int
    first_epoch: int
    packed: NDArray[np.uint8]  # (K, bytes of an epoch's packed fields)
    levels: NDArray[np.uint8]  # (K, P, 1 or 2)
    further: NDArray[np.uint8] | None  # (b + 1, x, K, P): see `nrrdd_format.further`

    def epoch(self, epoch: int) -> PairRecords:
        """The pairs of this stored epoch, which the block holds. Raises FormatError for a field out of its range."""
        here, table = epoch - self.first_epoch, self.layout.levels
        if self.layout.coding == "derived":
            records = draw_pairs(self.layout, self.shard, epoch)
        else:
            records = unpack_fields(self.packed[here], self.layout)
        org, aug = _split_levels(self.levels[here], len(table))
        records = replace(records, distance_org=table[org], distance_aug=table[aug])
        if self.further is None:
            return records
        classes, distances = unpack_further(self.further[:, :, here], self.layout.classes, table)
        return replace(records, further_classes=classes, further_distances=distances)


def open_block(data: bytes, layout: RecordLayout, *, shard: int, number: int, epochs: int) -> Block:
    """Decompresses a block made by `encode_block`.

    Args:
        data: the block.
        layout: of the shard.
        shard: its number.
        number: the block's, from 0.
        epochs: how many the shard stores: they say how many the last block holds.

    Raises:
        FormatError: however the bytes are wrong.
    """
    first = number * layout.block_epochs
    count = epochs_in_block(layout, number, epochs)
    content = np.frombuffer(decompress(data, content_bytes(layout, count), "record block"), np.uint8)
    first_level = count * packed_bytes(layout)
    first_further = first_level + count * layout.pairs * _level_bytes(layout)
    packed, levels, further = np.split(content, [first_level, first_further])
    return Block(
        layout=layout,
        shard=shard,
        first_epoch=first,
        packed=packed.reshape(count, -1),
        levels=levels.reshape(count, layout.pairs, -1),
        further=None if layout.further is None else further.reshape(-1, layout.further, count, layout.pairs),
    )


def content_bytes(layout: RecordLayout, epochs: int) -> int:
    """Length of a decompressed block of so many epochs. Raises FormatError if it is over the limit."""
    length = epochs * (packed_bytes(layout) + layout.pairs * (_level_bytes(layout) + _further_bytes(layout)))
    if length > MAX_BLOCK_CONTENT:
        raise FormatError(f"record blocks of {length} bytes, expected at most {MAX_BLOCK_CONTENT} (block_epochs)")
    return length


def max_block_bytes(layout: RecordLayout, epochs: int) -> int:
    """Upper bound of the length of a compressed block of so many epochs, checked before one is read."""
    content = content_bytes(layout, epochs)
    return content + content // 128 + 512


def block_count(layout: RecordLayout, epochs: int) -> int:
    """Number of blocks that so many epochs take."""
    return -(-epochs // layout.block_epochs)


def epochs_in_block(layout: RecordLayout, number: int, epochs: int) -> int:
    """How many of so many epochs a block holds: the last one may hold fewer than K."""
    return min(layout.block_epochs, epochs - number * layout.block_epochs)


def _level_bytes(layout: RecordLayout) -> int:
    """Of a pair."""
    return 1 if len(layout.levels) <= JOINT_LEVELS else 2


def _further_bytes(layout: RecordLayout) -> int:
    """Of a pair."""
    return 0 if layout.further is None else layout.further * column_count(layout.classes)


def _pack_further(epochs: Sequence[PairRecords], layout: RecordLayout) -> list[bytes]:
    """The columns of the further classes of some epochs; none where the layout has none."""
    classes = [records.further_classes for records in epochs if records.further_classes is not None]
    distances = [records.further_distances for records in epochs if records.further_distances is not None]
    found = [column.shape for column in classes] + [column.shape for column in distances]
    expected = [] if layout.further is None else [(layout.pairs, layout.further)] * 2 * len(epochs)
    if found != expected:
        raise ConfigError(
            f"pair records: further classes of shapes {sorted(set(found))}, expected {expected[:1]} in every epoch"
        )
    if layout.further is None:
        return []
    return pack_further(classes, distances, layout.classes, layout.levels)


def _join_levels(org: NDArray[np.uint8], aug: NDArray[np.uint8], count: int) -> bytes:
    """Level indices (K, P) as bytes: a pair's two in one byte where they fit, otherwise one after the other."""
    if count <= JOINT_LEVELS:
        return (org * np.uint8(count) + aug).tobytes()
    return np.stack([org, aug], axis=-1).tobytes()


def _split_levels(stored: NDArray[np.uint8], count: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Level indices (P,) of org and aug from one epoch's bytes (P, 1 or 2)."""
    if count <= JOINT_LEVELS:
        _check_levels(stored[:, 0], count * count)
        return np.divmod(stored[:, 0], np.uint8(count))
    org, aug = stored.T
    _check_levels(np.maximum(org, aug), count)
    return org, aug


def _check_levels(values: NDArray[np.uint8], high: int) -> None:
    wrong = np.flatnonzero(values > high - 1)
    if len(wrong):
        raise FormatError(f"levels of pair {wrong[0]} are {values[wrong[0]]}, expected less than {high}")


def _check_drawn(records: PairRecords, drawn: PairRecords, shard: int, epoch: int) -> None:
    """Derived records store no pairs, so they must be the pairs the format draws."""
    for name in ("index_org", "index_aug", "view_org", "view_aug", "flip_org", "flip_aug", "mix_box", "lam"):
        if not np.array_equal(getattr(records, name), getattr(drawn, name)):
            raise ConfigError(
                f"shard {shard}, epoch {epoch}: the pairs are not those the format draws for this seed "
                f"({name} differs), so derived coding cannot store them; use explicit coding"
            )


def _compress(parts: Sequence[bytes]) -> bytes:
    """One zstd frame; each part, such as dense bits or skewed levels, is coded for itself, and so well."""
    *first, last = [part for part in parts if part]
    coder = zstandard.ZstdCompressor(level=_ZSTD_LEVEL).compressobj(size=sum(map(len, parts)))
    data = [coder.compress(part) + coder.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK) for part in first]
    return b"".join([*data, coder.compress(last), coder.flush()])
