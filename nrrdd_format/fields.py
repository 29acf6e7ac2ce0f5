"""The packed fields of an epoch: its pairs as one stream of bits (SPEC.md section 6).

Explicit coding stores codebook indices, verbatim coding positions and pixels as they are. Either way the stream's
length follows from the layout alone.
"""

from __future__ import annotations

from bisect import bisect_left

import numpy as np
from numpy.typing import NDArray

from nrrdd_format import bits
from nrrdd_format.codebooks import MixTable
from nrrdd_format.errors import ConfigError, FormatError
from nrrdd_format.pairs import PairDraws, PairRecords, RecordLayout, cycle_bounds, expand

Fields = NDArray[np.int64]


def packed_bytes(layout: RecordLayout) -> int:
    """Length of one epoch's packed fields; 0 with derived coding."""
    return bits.packed_bytes(_widths(layout))


def pack_fields(records: PairRecords, layout: RecordLayout) -> bytes:
    """The packed fields of one epoch. Raises ConfigError for pairs that the layout's coding cannot express."""
    if layout.coding == "derived":
        return b""
    fields = _verbatim_fields(records, layout) if layout.coding == "verbatim" else _explicit_fields(records, layout)
    return bits.pack(fields, _widths(layout))


def unpack_fields(packed: NDArray[np.uint8], layout: RecordLayout) -> PairRecords:
    """The pairs of one epoch, with NaN distances. Raises FormatError for a field out of its range."""
    widths = _widths(layout)
    if bits.padding_bits(packed, widths):
        raise FormatError("padding bits after the packed fields are set, expected zeros")
    fields = bits.unpack(packed, widths)
    return _read_verbatim(fields, layout) if layout.coding == "verbatim" else _read_explicit(fields, layout)


def _widths(layout: RecordLayout) -> Fields:
    if layout.coding == "derived":
        return np.zeros(0, np.int64)
    return _verbatim_widths(layout) if layout.coding == "verbatim" else _explicit_widths(layout)


# ---- explicit: n order codes, n views, n flips (0 bits without flips), G mixes


def _explicit_widths(layout: RecordLayout) -> Fields:
    views, mixes = layout.codebooks
    order = bits.width_of(np.arange(layout.images, 0, -1))
    view = np.full(layout.images, bits.width_of(len(views)))
    flip = np.full(layout.images, int(layout.flip))
    mix = np.full(layout.groups, bits.width_of(len(mixes)))
    return np.concatenate([order, view, flip, mix])


def _explicit_fields(records: PairRecords, layout: RecordLayout) -> Fields:
    _check_once(records, layout)
    view, flip = np.empty(layout.images, np.int64), np.empty(layout.images, np.int64)
    views, mixes = layout.codebooks
    view[records.index_org] = _find(_box_keys(records.view_org), _box_keys(views), "view")
    flip[records.index_org] = records.flip_org
    firsts = slice(None, None, layout.mix_group)
    mix = _find(_mix_keys(_table(records, firsts)), _mix_keys(mixes), "mix")
    drawn = PairDraws(order=records.index_org, view=view, flip=flip.astype(bool), mix=mix)
    _check_expressible(records, expand(drawn, layout))
    return np.concatenate([_rank_order(records.index_org), view, flip, mix])


def _read_explicit(fields: Fields, layout: RecordLayout) -> PairRecords:
    n = layout.images
    views, mixes = layout.codebooks
    codes, view, flip, mix = np.split(fields, [n, 2 * n, 3 * n])
    _check_below(codes, np.arange(n, 0, -1), "order")
    _check_below(view, len(views), "view")
    _check_below(mix, len(mixes), "mix")
    return expand(PairDraws(order=_unrank_order(codes), view=view, flip=flip.astype(bool), mix=mix), layout)


def _rank_order(order: Fields) -> Fields:
    """Each image's position among the images not named yet, so that later positions need fewer bits."""
    left = list(range(len(order)))
    codes = []
    for image in order.tolist():
        codes.append(bisect_left(left, image))
        del left[codes[-1]]
    return np.array(codes, np.int64)


def _unrank_order(codes: Fields) -> Fields:
    left = list(range(len(codes)))
    return np.array([left.pop(code) for code in codes.tolist()], np.int64)


def _find(wanted: Fields, known: Fields, name: str) -> Fields:
    """Where each key stands in the codebook, the first place if it stands there twice."""
    sorter = np.argsort(known, kind="stable")
    place: Fields = sorter[np.searchsorted(known, wanted, sorter=sorter).clip(max=len(known) - 1)]
    missing = np.flatnonzero(known[place] != wanted)
    if len(missing):
        raise ConfigError(f"pair records: {name} {missing[0]} is not in the codebook; store them with verbatim coding")
    return place


def _box_keys(boxes: NDArray[np.int16]) -> Fields:
    """Boxes (N, 4) of sides up to 4096 as one number each."""
    keys: Fields = boxes.astype(np.int64) @ np.array([1 << 39, 1 << 26, 1 << 13, 1])
    return keys


def _mix_keys(mixes: MixTable) -> Fields:
    """A CutMix is known by its box, a Mixup by the bits of its λ, as a negative number."""
    mixup = mixes.lam.view(np.uint32).astype(np.int64) - 2**62
    keys: Fields = np.where(mixes.is_cutmix, _box_keys(mixes.box), mixup)
    return keys


def _table(records: PairRecords, pairs: slice) -> MixTable:
    return MixTable(is_cutmix=records.is_cutmix[pairs], box=records.mix_box[pairs], lam=records.lam[pairs])


# ---- verbatim: P positions' images, partners within their cycles, boxes, flips; then G mixes

_MIX_FIELDS = 7  # CutMix or not, box, λ's lower and upper half
_LESS_ONE = np.array([0, 0, 1, 1])  # height and width are stored less one


def _verbatim_widths(layout: RecordLayout) -> Fields:
    pairs, box = layout.pairs, [bits.width_of(layout.size)] * 4
    image = np.full(pairs, bits.width_of(layout.images))
    partner = bits.width_of(_cycle_lengths(layout))
    view = np.full(4 * pairs, box[0])
    flip = np.full(pairs, int(layout.flip))
    mix = np.tile([1, *box, 16, 16], layout.groups)
    return np.concatenate([image, partner, view, flip, mix])


def _verbatim_fields(records: PairRecords, layout: RecordLayout) -> Fields:
    _check_once(records, layout)
    position = np.full(layout.images, -1)
    position[records.index_org] = np.arange(layout.pairs)
    partner = position[records.index_aug] - _cycle_starts(layout)
    wrong = np.flatnonzero((partner < 0) | (partner >= _cycle_lengths(layout)))
    if len(wrong):
        raise ConfigError(f"pair records: pair {wrong[0]} has a partner outside its cycle of {layout.cycle}")
    mixes = _table(records, slice(None, None, layout.mix_group))
    halves = mixes.lam.view(np.uint32).astype(np.int64)
    mix = np.column_stack([mixes.is_cutmix, _stored_boxes(mixes.box, mixes.is_cutmix), halves & 0xFFFF, halves >> 16])
    view = _stored_boxes(records.view_org, np.ones(layout.pairs, bool))
    fields = np.concatenate(
        [records.index_org, partner, view.ravel(), records.flip_org.astype(np.int64), mix.astype(np.int64).ravel()]
    )
    _check_expressible(records, _read_verbatim(fields, layout))
    return fields


def _read_verbatim(fields: Fields, layout: RecordLayout) -> PairRecords:
    pairs = layout.pairs
    image, partner, view, flip, mix = np.split(fields, [pairs, 2 * pairs, 6 * pairs, 7 * pairs])
    _check_below(image, layout.images, "image")
    if len(np.unique(image)) < pairs:
        raise FormatError("an image is named twice in an epoch, expected once")
    _check_below(partner, _cycle_lengths(layout), "partner")
    aug = _cycle_starts(layout) + partner
    boxes = _read_boxes(view.reshape(pairs, 4), layout.size, "view")
    mixes = _read_mixes(mix.reshape(layout.groups, _MIX_FIELDS), layout)
    group, flips = layout.group_of_pair, flip.astype(bool)
    return PairRecords(
        index_org=image,
        index_aug=image[aug],
        view_org=boxes,
        view_aug=boxes[aug],
        flip_org=flips,
        flip_aug=flips[aug],
        is_cutmix=mixes.is_cutmix[group],
        mix_box=mixes.box[group],
        lam=mixes.lam[group],
        distance_org=np.full(pairs, np.nan, np.float32),
        distance_aug=np.full(pairs, np.nan, np.float32),
    )


def _read_mixes(rows: Fields, layout: RecordLayout) -> MixTable:
    """The mixes of an epoch's groups from rows (G, 7)."""
    is_cutmix, lam = rows[:, 0].astype(bool), (rows[:, 5] | rows[:, 6] << 16).astype(np.uint32).view(np.float32)
    wrong = np.flatnonzero(~((lam >= 0) & (lam <= 1)))
    if len(wrong):
        raise FormatError(f"lam of mix {wrong[0]} is {lam[wrong[0]]}, expected 0..1")
    box = np.zeros((len(rows), 4), np.int16)
    box[is_cutmix] = _read_boxes(rows[is_cutmix, 1:5], layout.size, "mix box")
    if rows[~is_cutmix, 1:5].any():
        raise FormatError("a Mixup has a box, expected zeros")
    return MixTable(is_cutmix=is_cutmix, box=box, lam=lam)


def _cycle_bounds(layout: RecordLayout) -> Fields:
    return cycle_bounds(layout.pairs, layout.cycle)


def _cycle_starts(layout: RecordLayout) -> Fields:
    """First position of each position's cycle, (P,)."""
    bounds = _cycle_bounds(layout)
    return np.repeat(bounds[:-1], np.diff(bounds))


def _cycle_lengths(layout: RecordLayout) -> Fields:
    """Positions in each position's cycle, (P,)."""
    lengths = np.diff(_cycle_bounds(layout))
    return np.repeat(lengths, lengths)


def _stored_boxes(boxes: NDArray[np.int16], used: NDArray[np.bool_]) -> Fields:
    """Boxes (N, 4) with height and width less one, so that S fits the width of S − 1; zeros where none is used."""
    stored = boxes.astype(np.int64) - _LESS_ONE
    return np.where(used[:, None], stored, boxes)


def _read_boxes(stored: Fields, size: int, name: str) -> NDArray[np.int16]:
    boxes: Fields = stored + _LESS_ONE
    wrong = np.flatnonzero((boxes[:, :2] + boxes[:, 2:] > size).any(1))
    if len(wrong):
        raise FormatError(f"{name} {wrong[0]} is {boxes[wrong[0]].tolist()}, expected a box inside {size}x{size}")
    return boxes.astype(np.int16)


# ---- checks


def _check_once(records: PairRecords, layout: RecordLayout) -> None:
    count = np.bincount(records.index_org, minlength=layout.images) if len(records) else np.zeros(1, np.int64)
    if len(records) != layout.pairs or len(count) != layout.images or count.max() > 1:
        raise ConfigError(
            f"pair records: {len(records)} pairs of {len(count)} images, expected {layout.pairs} of {layout.images}, "
            "each image `org` at most once"
        )


def _check_expressible(records: PairRecords, stored: PairRecords) -> None:
    """Compares all columns but the distances."""
    for name in ("index_aug", "view_aug", "flip_org", "flip_aug", "is_cutmix", "mix_box", "lam"):
        found, expected = getattr(records, name), getattr(stored, name)
        wrong = np.flatnonzero((found != expected).reshape(len(found), -1).any(1))
        if len(wrong):
            raise ConfigError(
                f"pair records: {name} of pair {wrong[0]} is {found[wrong[0]].tolist()}, but this coding can only say "
                f"{expected[wrong[0]].tolist()} there; store them with verbatim coding"
            )


def _check_below(values: Fields, high: int | Fields, name: str) -> None:
    wrong = np.flatnonzero(values >= high)
    if len(wrong):
        limit = np.broadcast_to(high, values.shape)[wrong[0]]
        raise FormatError(f"{name} {wrong[0]} is {values[wrong[0]]}, expected less than {limit}")
