"""Pair records: how they are drawn, packed into one block an epoch, and read back (SPEC.md sections 5 to 7).

Shapes: n images a shard, P pairs an epoch (P == n in version 1), G = ceil(P / mix_group) mix groups.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, fields, replace
from typing import Literal

import numpy as np
import zstandard
from numpy.typing import NDArray

from nrrdd_format import bits, draws
from nrrdd_format.codebooks import MixTable
from nrrdd_format.errors import ConfigError, FormatError
from nrrdd_format.limits import MAX_IMAGES, MAX_LEVELS, MAX_MIXES, MAX_VIEWS

Coding = Literal["explicit", "derived"]
_ZSTD_LEVEL = 19


@dataclass(frozen=True, kw_only=True, eq=False)
class RecordLayout:
    """Everything besides the bytes that is needed to read one shard's record blocks."""

    images: int  # n, images in the shard
    pairs: int  # P, pairs an epoch
    cycle: int  # g, images that are each other's partners
    mix_group: int  # consecutive pairs that share one mix
    flip: bool  # whether views may be flipped
    coding: Coding
    seed: int
    views: NDArray[np.int16]  # (V, 4)
    mixes: MixTable  # M entries
    levels: NDArray[np.float32]  # (L,) distances in nats

    def __post_init__(self) -> None:
        _require(2 <= self.images <= MAX_IMAGES, f"{self.images} images in a shard: expected 2..{MAX_IMAGES}")
        _require(self.pairs == self.images, f"{self.pairs} pairs for {self.images} images: expected as many pairs")
        _require(2 <= self.cycle <= MAX_IMAGES, f"cycle {self.cycle}: expected 2..{MAX_IMAGES}")
        _require(1 <= self.mix_group <= MAX_IMAGES, f"mix_group {self.mix_group}: expected 1..{MAX_IMAGES}")
        _require(self.coding in ("explicit", "derived"), f"coding {self.coding!r}: expected explicit or derived")
        _require(1 <= len(self.views) <= MAX_VIEWS, f"{len(self.views)} views: expected 1..{MAX_VIEWS}")
        _require(1 <= len(self.mixes) <= MAX_MIXES, f"{len(self.mixes)} mixes: expected 1..{MAX_MIXES}")
        _require(1 <= len(self.levels) <= MAX_LEVELS, f"{len(self.levels)} levels: expected 1..{MAX_LEVELS}")

    @property
    def groups(self) -> int:
        """G, the number of mixes drawn for one epoch."""
        return -(-self.pairs // self.mix_group)


@dataclass(frozen=True, kw_only=True, eq=False)
class PairDraws:
    """What chance decides for one epoch of one shard, as codebook indices."""

    order: NDArray[np.int64]  # (P,) a permutation of the images; pair t has org = order[t]
    view: NDArray[np.int64]  # (n,) by image
    flip: NDArray[np.bool_]  # (n,) by image
    mix: NDArray[np.int64]  # (G,) pair t uses mix[t // mix_group]


@dataclass(frozen=True, kw_only=True, eq=False)
class PairRecords:
    """The pairs of one epoch of one shard, as columns of length P."""

    index_org: NDArray[np.int64]  # index of the image within its shard
    index_aug: NDArray[np.int64]
    view_org: NDArray[np.int16]  # (P, 4) crop [top, left, height, width], pixels
    view_aug: NDArray[np.int16]
    flip_org: NDArray[np.bool_]
    flip_aug: NDArray[np.bool_]
    is_cutmix: NDArray[np.bool_]
    mix_box: NDArray[np.int16]  # (P, 4) box [top, left, height, width] pasted from aug; zeros for Mixup
    lam: NDArray[np.float32]  # share of org
    distance_org: NDArray[np.float32]  # nats; NaN before relabeling
    distance_aug: NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.index_org)

    def take(self, pairs: NDArray[np.int64] | slice) -> PairRecords:
        """The chosen pairs, in the order given."""
        return PairRecords(**{f.name: getattr(self, f.name)[pairs] for f in fields(self)})


def cycle_bounds(pairs: int, cycle: int) -> NDArray[np.int64]:
    """Bounds b (k+1,) of the closed cycles: cycle c is positions b[c]:b[c+1] of the order.

    Every cycle has `cycle` positions except the last, which is shorter, or one longer where a single position
    would be left over.
    """
    starts = list(range(0, pairs, cycle))
    if len(starts) > 1 and pairs % cycle == 1:
        starts.pop()
    return np.array([*starts, pairs], np.int64)


def draw_pairs(layout: RecordLayout, shard: int, epoch: int) -> PairDraws:
    """The draws of one epoch of one shard (SPEC.md section 7), for the builder and for derived decoding."""

    def pick(purpose: str, count: int, high: int) -> NDArray[np.int64]:
        return draws.integers(layout.seed, purpose, shard, epoch, count=count, high=high)

    flip = pick("flip", layout.images, 2) if layout.flip else np.zeros(layout.images, np.int64)
    return PairDraws(
        order=draws.permutation(layout.seed, "order", shard, epoch, count=layout.images),
        view=pick("view", layout.images, len(layout.views)),
        flip=flip.astype(bool),
        mix=pick("mix", layout.groups, len(layout.mixes)),
    )


def expand_pairs(drawn: PairDraws, layout: RecordLayout) -> PairRecords:
    """The records the draws stand for, with NaN distances: what relabeling replays."""
    org, aug = drawn.order, drawn.order[_partners(layout)]
    mix = drawn.mix[np.arange(layout.pairs) // layout.mix_group]
    unknown = np.full(layout.pairs, np.nan, np.float32)
    return PairRecords(
        index_org=org,
        index_aug=aug,
        view_org=layout.views[drawn.view[org]],
        view_aug=layout.views[drawn.view[aug]],
        flip_org=drawn.flip[org],
        flip_aug=drawn.flip[aug],
        is_cutmix=layout.mixes.is_cutmix[mix],
        mix_box=layout.mixes.box[mix],
        lam=layout.mixes.lam[mix],
        distance_org=unknown,
        distance_aug=unknown,
    )


def expand(
    drawn: PairDraws, layout: RecordLayout, levels_org: NDArray[np.uint8], levels_aug: NDArray[np.uint8]
) -> PairRecords:
    """The records the draws stand for, with distances looked up from level indices (P,) uint8."""
    return replace(
        expand_pairs(drawn, layout),
        distance_org=layout.levels[levels_org],
        distance_aug=layout.levels[levels_aug],
    )


def _partners(layout: RecordLayout) -> NDArray[np.int64]:
    """Position (P,) of each pair's `aug` in the order: the next one in its cycle, the first for the last."""
    bounds = cycle_bounds(layout.pairs, layout.cycle)
    following = np.arange(1, layout.pairs + 1)
    following[bounds[1:] - 1] = bounds[:-1]
    return following


def encode_epoch(
    drawn: PairDraws, layout: RecordLayout, levels_org: NDArray[np.uint8], levels_aug: NDArray[np.uint8]
) -> bytes:
    """One epoch's record block: a zstd frame of the packed draws (explicit only) and the two level columns.

    With derived coding the draws must be those of `draw_pairs`; they are not stored.
    """
    _check_levels(levels_org, levels_aug, layout)
    packed = bits.pack(_to_fields(drawn, layout), _widths(layout)) if layout.coding == "explicit" else b""
    return _compress(packed, levels_org.tobytes() + levels_aug.tobytes())


def decode_epoch(data: bytes, layout: RecordLayout, shard: int, epoch: int) -> PairRecords:
    """The records of a block made by `encode_epoch`. Raises FormatError however the bytes are wrong."""
    widths = _widths(layout)
    packed_bytes = bits.packed_bytes(widths) if layout.coding == "explicit" else 0
    content = _decompress(data, packed_bytes + 2 * layout.pairs)
    levels_org, levels_aug = np.frombuffer(content, np.uint8, offset=packed_bytes).reshape(2, layout.pairs)
    _check_levels(levels_org, levels_aug, layout)
    if layout.coding == "derived":
        return expand(draw_pairs(layout, shard, epoch), layout, levels_org, levels_aug)
    packed = content[:packed_bytes]
    if bits.padding_bits(packed, widths):
        raise FormatError("padding bits after the packed columns are set, expected zeros")
    return expand(_from_fields(bits.unpack(packed, widths), layout), layout, levels_org, levels_aug)


def max_block_bytes(layout: RecordLayout) -> int:
    """Upper bound of a compressed block's length, checked before one is read."""
    content = bits.packed_bytes(_widths(layout)) + 2 * layout.pairs
    return content + content // 128 + 512


def _widths(layout: RecordLayout) -> NDArray[np.int64]:
    """Widths of the packed fields: n order codes, n views, n flips (0 bits without flips), G mixes."""
    order = bits.width_of(np.arange(layout.images, 0, -1))
    view = np.full(layout.images, bits.width_of(len(layout.views)))
    flip = np.full(layout.images, int(layout.flip))
    mix = np.full(layout.groups, bits.width_of(len(layout.mixes)))
    return np.concatenate([order, view, flip, mix])


def _to_fields(drawn: PairDraws, layout: RecordLayout) -> NDArray[np.int64]:
    return np.concatenate([_rank_order(drawn.order), drawn.view, drawn.flip.astype(np.int64), drawn.mix])


def _from_fields(values: NDArray[np.int64], layout: RecordLayout) -> PairDraws:
    n = layout.images
    codes, view, flip, mix = np.split(values, [n, 2 * n, 3 * n])
    _check_below(codes, np.arange(n, 0, -1), "order")
    _check_below(view, len(layout.views), "view")
    _check_below(mix, len(layout.mixes), "mix")
    return PairDraws(order=_unrank_order(codes), view=view, flip=flip.astype(bool), mix=mix)


def _rank_order(order: NDArray[np.int64]) -> NDArray[np.int64]:
    """Each image's position among the images not named yet, so that later positions need fewer bits."""
    left = list(range(len(order)))
    codes = []
    for image in order.tolist():
        codes.append(bisect_left(left, image))
        del left[codes[-1]]
    return np.array(codes, np.int64)


def _unrank_order(codes: NDArray[np.int64]) -> NDArray[np.int64]:
    left = list(range(len(codes)))
    return np.array([left.pop(code) for code in codes.tolist()], np.int64)


def _compress(packed: bytes, levels: bytes) -> bytes:
    """One zstd frame; dense bits and skewed levels get zstd blocks of their own, so each is coded well."""
    coder = zstandard.ZstdCompressor(level=_ZSTD_LEVEL).compressobj(size=len(packed) + len(levels))
    dense = coder.compress(packed) + coder.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK) if packed else b""
    return dense + coder.compress(levels) + coder.flush()


def _decompress(data: bytes, expected: int) -> bytes:
    """The content of a zstd frame that states `expected` as its size; nothing larger is allocated."""
    try:
        stated = zstandard.get_frame_parameters(data).content_size
        if stated != expected:
            found = "no length" if stated == zstandard.CONTENTSIZE_UNKNOWN else f"{stated} bytes"
            raise FormatError(f"record block states {found} of content, expected {expected} bytes")
        content = zstandard.ZstdDecompressor().decompress(data, max_output_size=expected, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise FormatError(f"record block is not a valid zstd frame: {error}") from None
    if len(content) != expected:
        raise FormatError(f"record block holds {len(content)} bytes of content, expected {expected}")
    return content


def _check_levels(org: NDArray[np.uint8], aug: NDArray[np.uint8], layout: RecordLayout) -> None:
    for name, column in (("distance_org", org), ("distance_aug", aug)):
        if column.dtype != np.uint8 or column.shape != (layout.pairs,):
            raise FormatError(f"{name}: {column.dtype} levels {column.shape}, expected uint8 ({layout.pairs},)")
        _check_below(column, len(layout.levels), name)


def _check_below(values: NDArray[np.integer], high: int | NDArray[np.int64], name: str) -> None:
    wrong = np.flatnonzero(values >= high)
    if len(wrong):
        limit = np.broadcast_to(high, values.shape)[wrong[0]]
        raise FormatError(f"{name} {wrong[0]} is {values[wrong[0]]}, expected less than {limit}")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)
