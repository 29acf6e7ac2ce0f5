"""Pair records: drawing, bit packing, blocks, codebooks; every way a block can be wrong."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st
from tiny_dataset import free_pairs

from nrrdd_format import bits
from nrrdd_format.codebooks import (
    MixEntry,
    MixTable,
    distance_levels,
    mix_codebook,
    quantize,
    view_codebook,
)
from nrrdd_format.errors import ConfigError, FormatError
from nrrdd_format.pairs import Coding, PairDraws, PairRecords, RecordLayout, cycle_bounds, draw_pairs, expand
from nrrdd_format.records import (
    block_count,
    encode_block,
    encode_shard_records,
    epochs_in_block,
    max_block_bytes,
    open_block,
)

CODINGS: tuple[Coding, ...] = ("explicit", "derived", "verbatim")


def make_layout(**changes: Any) -> RecordLayout:
    images = changes.pop("images", 9)
    defaults: dict[str, Any] = {
        "images": images,
        "pairs": images,
        "classes": 3,
        "size": 16,
        "cycle": 4,
        "mix_group": 2,
        "block_epochs": 2,
        "flip": True,
        "coding": "explicit",
        "seed": 1,
        "views": view_codebook(0, 16, (0.3, 1.0), count=6),
        "mixes": MixTable.from_entries(mix_codebook(0, 16, "both", count=5), 16),
        "levels": distance_levels(16),
    }
    if changes.get("coding") == "verbatim":
        defaults |= {"views": None, "mixes": None}
    return RecordLayout(**{**defaults, **changes})


def labelled(records: PairRecords, layout: RecordLayout, step: int = 1) -> PairRecords:
    """The pairs with distances that are levels."""
    org, aug = (np.arange(len(records)) * k % len(layout.levels) for k in (step, step + 1))
    return replace(records, distance_org=layout.levels[org], distance_aug=layout.levels[aug])


def some_pairs(layout: RecordLayout, epoch: int = 0, step: int = 1) -> PairRecords:
    """Pairs that the layout's coding can express, with distances."""
    if layout.coding == "verbatim":
        return labelled(free_pairs(layout, epoch), layout, step)
    return labelled(draw_pairs(layout, 0, epoch), layout, step)


def encode(records: PairRecords, layout: RecordLayout) -> bytes:
    return encode_block([records], layout, shard=0, first_epoch=0)


def decode(block: bytes, layout: RecordLayout) -> PairRecords:
    return open_block(block, layout, shard=0, number=0, epochs=1).epoch(0)


def assert_same(a: PairRecords, b: PairRecords) -> None:
    assert a.columns().keys() == b.columns().keys()
    for name, left in a.columns().items():
        right = b.columns()[name]
        assert left.dtype == right.dtype, name
        np.testing.assert_array_equal(left, right, err_msg=name)


# ---- bit packing


@given(st.lists(st.integers(0, 18).flatmap(lambda w: st.tuples(st.just(w), st.integers(0, 2**w - 1))), max_size=60))
def test_bits_round_trip(items: list[tuple[int, int]]) -> None:
    widths = np.array([w for w, _ in items], np.int64)
    values = np.array([v for _, v in items], np.int64)
    data = bits.pack(values, widths)
    assert len(data) == bits.packed_bytes(widths)
    stream = np.frombuffer(data, np.uint8)
    assert bits.padding_bits(stream, widths) == 0
    assert bits.unpack(stream, widths).tolist() == values.tolist()


def test_bits_have_the_layout_of_the_spec() -> None:
    assert bits.pack(np.array([1, 2, 5]), np.array([1, 3, 6])) == bytes([0b01010101, 0b00])
    assert bits.width_of(np.array([1, 2, 3, 4, 5, 65536])).tolist() == [0, 1, 2, 2, 3, 16]


@pytest.mark.parametrize("value", [-1, 8])
def test_bits_refuse_a_value_that_does_not_fit(value: int) -> None:
    with pytest.raises(ValueError, match="does not fit"):
        bits.pack(np.array([value]), np.array([3]))


# ---- cycles and pairs


@pytest.mark.parametrize(
    ("pairs", "cycle", "expected"),
    [
        (2, 10, [0, 2]),
        (10, 10, [0, 10]),
        (11, 10, [0, 11]),
        (12, 10, [0, 10, 12]),
        (7, 3, [0, 3, 7]),
        (4, 2, [0, 2, 4]),
        (5, 2, [0, 2, 5]),
    ],
)
def test_cycle_bounds(pairs: int, cycle: int, expected: list[int]) -> None:
    assert cycle_bounds(pairs, cycle).tolist() == expected


@given(st.integers(2, 80), st.integers(2, 20), st.integers(0, 3))
def test_each_image_is_org_once_and_aug_once_and_never_its_own_partner(images: int, cycle: int, epoch: int) -> None:
    layout = make_layout(images=images, cycle=cycle)
    records = draw_pairs(layout, 0, epoch)
    assert sorted(records.index_org.tolist()) == list(range(images))
    assert sorted(records.index_aug.tolist()) == list(range(images))
    assert not np.any(records.index_org == records.index_aug)
    bounds = cycle_bounds(images, cycle)
    for low, high in pairwise(bounds.tolist()):
        assert high - low >= 2
        assert set(records.index_org[low:high].tolist()) == set(records.index_aug[low:high].tolist())


def test_an_image_has_one_view_in_both_roles() -> None:
    layout = make_layout(images=30)
    records = draw_pairs(layout, 0, 0)
    as_org = {i: (tuple(v), f) for i, v, f in zip(records.index_org, records.view_org, records.flip_org, strict=True)}
    as_aug = {i: (tuple(v), f) for i, v, f in zip(records.index_aug, records.view_aug, records.flip_aug, strict=True)}
    assert as_org == as_aug


def test_pairs_of_a_mix_group_share_their_mix_and_distances_are_unknown_before_relabeling() -> None:
    layout = make_layout(images=9, mix_group=4)
    records = draw_pairs(layout, 0, 0)
    assert layout.groups == 3
    assert len(np.unique(records.lam[:4])) == 1 and len(np.unique(records.lam[4:8])) == 1
    assert np.isnan(records.distance_org).all() and np.isnan(records.distance_aug).all()


def test_draws_depend_on_seed_shard_and_epoch() -> None:
    def order(seed: int, shard: int, epoch: int) -> tuple[int, ...]:
        return tuple(draw_pairs(make_layout(images=50, seed=seed), shard, epoch).index_org.tolist())

    assert len({order(1, 0, 0), order(2, 0, 0), order(1, 1, 0), order(1, 0, 1)}) == 4


def test_no_flips_where_the_dataset_allows_none() -> None:
    assert not draw_pairs(make_layout(images=50, flip=False), 0, 0).flip_org.any()


def test_take_keeps_the_order_asked_for() -> None:
    layout = make_layout()
    records = some_pairs(layout)
    chosen = records.take(np.array([4, 0]))
    assert len(chosen) == 2
    assert chosen.index_org.tolist() == [records.index_org[4], records.index_org[0]]
    assert_same(records.take(slice(1, 3)), records.take(np.array([1, 2])))


# ---- blocks


@st.composite
def layouts(draw: st.DrawFn) -> RecordLayout:
    coding = draw(st.sampled_from(CODINGS))
    images = draw(st.integers(2, 70))
    codebooks = (
        {} if coding == "verbatim" else {"views": view_codebook(0, 16, (0.3, 1.0), count=draw(st.integers(1, 40)))}
    )
    return make_layout(
        images=images,
        pairs=draw(st.integers(2, images)) if coding == "verbatim" else images,
        cycle=draw(st.integers(2, 12)),
        mix_group=draw(st.integers(1, 80)),
        block_epochs=draw(st.integers(1, 4)),
        flip=draw(st.booleans()),
        coding=coding,
        seed=draw(st.integers(0, 2**63 - 1)),
        levels=distance_levels(draw(st.integers(2, 256))),
        **codebooks,
    )


@given(layouts(), st.integers(1, 9), st.integers(1, 50))
def test_blocks_round_trip(layout: RecordLayout, epochs: int, step: int) -> None:
    records = [some_pairs(layout, epoch, step + epoch) for epoch in range(epochs)]
    blocks = encode_shard_records(records, layout, 0)
    assert len(blocks) == block_count(layout, epochs)
    for number, data in enumerate(blocks):
        assert len(data) <= max_block_bytes(layout, epochs_in_block(layout, number, epochs))
    for epoch in range(epochs):
        number = epoch // layout.block_epochs
        block = open_block(blocks[number], layout, shard=0, number=number, epochs=epochs)
        assert_same(block.epoch(epoch), records[epoch])


@given(st.permutations(range(12)), st.lists(st.integers(0, 5), min_size=12, max_size=12))
def test_explicit_blocks_hold_any_indices(order: list[int], view: list[int]) -> None:
    layout = make_layout(images=12)
    drawn = PairDraws(
        order=np.array(order), view=np.array(view), flip=np.array(view) > 2, mix=np.array([4, 0, 1, 2, 3, 4])
    )
    records = labelled(expand(drawn, layout), layout)
    assert_same(decode(encode(records, layout), layout), records)


@pytest.mark.parametrize(("coding", "images"), [("explicit", 16384), ("verbatim", 262144)])
def test_the_largest_shards(coding: Coding, images: int) -> None:
    layout = make_layout(images=images, cycle=10, coding=coding)
    records = some_pairs(layout)
    assert_same(decode(encode(records, layout), layout), records)


def test_distances_are_rounded_to_the_nearest_level() -> None:
    layout = make_layout()
    records = some_pairs(layout)
    moved = replace(records, distance_org=records.distance_org + np.float32(0.01))
    assert_same(decode(encode(moved, layout), layout), records)


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -0.1])
def test_distances_that_are_none_are_refused(wrong: float) -> None:
    layout = make_layout()
    records = some_pairs(layout)
    records.distance_aug[3] = wrong
    with pytest.raises(FormatError, match="expected a finite number >= 0"):
        encode(records, layout)


def changed(records: PairRecords, **columns: Any) -> PairRecords:
    """The records with the first entry of some columns replaced."""
    copies = {name: getattr(records, name).copy() for name in columns}
    for name, value in columns.items():
        copies[name][0] = value
    return replace(records, **copies)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"view_org": [0, 0, 1, 1]}, "view 0 is not in the codebook; store them with verbatim coding"),
        ({"mix_box": [0, 0, 1, 1], "is_cutmix": True}, "mix 0 is not in the codebook"),
        ({"lam": 0.123, "is_cutmix": False}, "mix 0 is not in the codebook"),
        ({"index_org": 1}, "each image `org` at most once"),
        ({"index_aug": 1}, "index_aug of pair 0 is 1, but this coding can only say"),
        ({"view_aug": [0, 0, 1, 1]}, "view_aug of pair 0"),
    ],
)
def test_explicit_coding_refuses_what_it_cannot_say(columns: dict[str, Any], message: str) -> None:
    layout = make_layout()
    records = some_pairs(layout)
    if "index_org" in columns:
        columns = {"index_org": records.index_org[1]}
    if "index_aug" in columns:
        columns = {"index_aug": records.index_org[0]}
        message = message.replace("is 1", f"is {records.index_org[0]}")
    with pytest.raises(ConfigError, match=message):
        encode(changed(records, **columns), layout)


def test_derived_coding_refuses_other_pairs_than_its_own() -> None:
    layout = make_layout(coding="derived")
    with pytest.raises(ConfigError, match=r"shard 1, epoch 0: the pairs are not those .* \(index_org differs\)"):
        encode_block([some_pairs(layout)], layout, shard=1, first_epoch=0)


def test_verbatim_coding_refuses_a_partner_outside_the_group() -> None:
    layout = make_layout(coding="verbatim")
    records = some_pairs(layout)
    with pytest.raises(ConfigError, match="pair 0 has a partner outside its cycle of 4"):
        encode(changed(records, index_aug=records.index_org[5]), layout)


def test_every_flipped_byte_is_refused_or_harmless() -> None:
    """A damaged block never crashes the decoder; the shard's checksums are not consulted here."""
    for coding in CODINGS:
        layout = make_layout(coding=coding)
        data = encode(some_pairs(layout), layout)
        for at in range(len(data)):
            for flip in (0x01, 0x80, 0xFF):
                damaged = bytearray(data)
                damaged[at] ^= flip
                try:
                    records = decode(bytes(damaged), layout)
                except FormatError:
                    continue
                assert sorted(records.index_org.tolist()) == list(range(9))


@given(st.binary(max_size=80))
def test_garbage_is_refused(data: bytes) -> None:
    with pytest.raises(FormatError):
        decode(data, make_layout())


def test_truncated_and_extended_blocks_are_refused() -> None:
    layout = make_layout()
    data = encode(some_pairs(layout), layout)
    for wrong in [data[:n] for n in range(len(data))] + [data + b"\0", data + data]:
        with pytest.raises(FormatError):
            decode(wrong, layout)


def test_a_block_of_fewer_epochs_than_it_should_hold_is_refused() -> None:
    layout = make_layout()
    with pytest.raises(FormatError, match="states 18 bytes of content, expected 36"):
        open_block(encode(some_pairs(layout), layout), layout, shard=0, number=0, epochs=2)


def test_blocks_over_the_limit_are_refused_before_they_are_read() -> None:
    with pytest.raises(FormatError, match=r"record blocks of \d+ bytes, expected at most 16777216"):
        max_block_bytes(make_layout(coding="verbatim", images=262144), 300)


def test_a_zstd_bomb_is_refused_before_it_is_unpacked() -> None:
    bomb = zstandard.ZstdCompressor().compress(bytes(200_000_000))
    with pytest.raises(FormatError, match="states 200000000 bytes of content, expected 18"):
        decode(bomb, make_layout())


def test_a_frame_that_does_not_state_its_size_is_refused() -> None:
    layout = make_layout()
    frame = zstandard.ZstdCompressor(write_content_size=False).compress(bytes(18))
    with pytest.raises(FormatError, match="record block states no length of its content"):
        decode(frame, layout)


def test_a_frame_that_holds_more_than_it_states_is_refused() -> None:
    honest = zstandard.ZstdCompressor().compress(bytes(range(19)))
    assert honest[5] == 19
    with pytest.raises(FormatError):
        decode(honest[:5] + bytes([18]) + honest[6:], make_layout())


# ---- fields out of range

WIDTHS = {
    "explicit": [4, 3, 3, 3, 3, 2, 2, 1, 0] + [3] * 9 + [1] * 9 + [3] * 5,
    "verbatim": [4] * 9 + [2] * 4 + [3] * 5 + [4] * 36 + [1] * 9 + [1, 4, 4, 4, 4, 16, 16] * 5,
}
STARTS = {
    "explicit": {"order": 0, "view": 9, "mix": 27},
    "verbatim": {"image": 0, "partner": 9, "view": 18, "cutmix": 63, "mix box": 64, "lam": 68},
}


def with_fields(coding: Coding, **changes: int | list[int]) -> bytes:
    """A block of a layout with n=9, V=6, M=5, S=16 whose named fields are replaced from the first on."""
    widths = np.array(WIDTHS[coding])
    values = np.zeros(len(widths), np.int64)
    if coding == "verbatim":
        values[:9] = range(9)
    for name, value in changes.items():
        start = STARTS[coding][name.replace("_", " ")]
        values[start : start + np.size(value)] = value
    return zstandard.ZstdCompressor().compress(bits.pack(values, widths) + bytes(9))


@pytest.mark.parametrize(("field", "limit"), [("order", 9), ("view", 6), ("mix", 5)])
def test_explicit_fields_out_of_range_are_refused(field: str, limit: int) -> None:
    layout = make_layout()
    decode(with_fields("explicit", **{field: limit - 1}), layout)
    with pytest.raises(FormatError, match=f"{field} 0 is {limit}, expected less than {limit}"):
        decode(with_fields("explicit", **{field: limit}), layout)


ONE_HALF = [0, int(np.float32(0.5).view(np.uint32)) >> 16]
TWO = [0, int(np.float32(2).view(np.uint32)) >> 16]
NAN = [0, 0x7FC0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image": 9}, "image 0 is 9, expected less than 9"),
        ({"image": [1, 1]}, "an image is named twice"),
        ({"partner": [0, 0, 0, 0, 5]}, "partner 4 is 5, expected less than 5"),
        ({"view": [10, 0, 6, 0]}, r"view 0 is \[10, 0, 7, 1\], expected a box inside 16x16"),
        ({"cutmix": 1, "mix_box": [0, 10, 0, 6]}, r"mix box 0 is \[0, 10, 1, 7\], expected a box inside 16x16"),
        ({"cutmix": 0, "mix_box": [0, 1, 0, 0]}, "a Mixup has a box"),
        ({"lam": TWO}, "lam of mix 0 is 2.0, expected 0..1"),
        ({"lam": NAN}, "lam of mix 0 is nan, expected 0..1"),
    ],
)
def test_verbatim_fields_out_of_range_are_refused(changes: dict[str, Any], message: str) -> None:
    layout = make_layout(coding="verbatim")
    fine = decode(with_fields("verbatim", cutmix=1, mix_box=[0, 10, 0, 5], lam=ONE_HALF), layout)
    assert fine.mix_box[0].tolist() == [0, 10, 1, 6] and fine.lam[0] == 0.5
    with pytest.raises(FormatError, match=message):
        decode(with_fields("verbatim", **changes), layout)


def test_padding_bits_must_be_zero() -> None:
    layout = make_layout(flip=False)  # 63 bits of fields: one bit of padding
    decode(zstandard.ZstdCompressor().compress(bytes(8) + bytes(9)), layout)
    with pytest.raises(FormatError, match="padding"):
        decode(zstandard.ZstdCompressor().compress(bytes(7) + b"\x80" + bytes(9)), layout)


@pytest.mark.parametrize(
    ("levels", "content", "message"),
    [
        (16, bytes([255] * 9), None),
        (15, bytes([224] * 9), None),
        (15, bytes([225]) + bytes(8), "levels of pair 0 are 225, expected less than 225"),
        (17, bytes([16] * 18), None),
        (17, bytes(9) + bytes([17]) + bytes(8), "levels of pair 4 are 17, expected less than 17"),
        (256, bytes([255] * 18), None),
    ],
)
def test_levels_out_of_range_are_refused(levels: int, content: bytes, message: str | None) -> None:
    layout = make_layout(coding="derived", levels=distance_levels(levels))
    block = zstandard.ZstdCompressor().compress(content)
    if message is None:
        assert (decode(block, layout).distance_org == layout.levels[-1]).all()
    else:
        with pytest.raises(FormatError, match=message):
            decode(block, layout)


@pytest.mark.parametrize(
    "changes",
    [
        {"images": 1},
        {"images": 16385},
        {"images": 262145, "coding": "verbatim"},
        {"images": 5, "pairs": 6},
        {"images": 5, "pairs": 4},
        {"images": 5, "pairs": 6, "coding": "verbatim"},
        {"coding": "verbatim", "views": view_codebook(0, 16, (0.3, 1.0), count=6)},
        {"views": None},
        {"mixes": None},
        {"size": 1},
        {"block_epochs": 0},
        {"cycle": 1},
        {"mix_group": 0},
        {"coding": "other"},
        {"views": np.zeros((0, 4), np.int16)},
        {"levels": np.zeros(257, np.float32)},
    ],
)
def test_impossible_layouts_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        make_layout(**changes)


# ---- codebooks


@given(st.integers(2, 300), st.floats(0.01, 1.0), st.integers(1, 30))
def test_views_lie_inside_the_image(size: int, low: float, count: int) -> None:
    top, left, height, width = view_codebook(7, size, (low, 1.0), count=count).astype(int).T
    assert top.min() >= 0 and left.min() >= 0 and height.min() >= 1 and width.min() >= 1
    assert (top + height).max() <= size and (left + width).max() <= size


def test_views_follow_scale_and_ratio() -> None:
    boxes = view_codebook(7, 224, (0.25, 0.5)).astype(float)
    area, ratio = boxes[:, 2] * boxes[:, 3] / 224**2, boxes[:, 3] / boxes[:, 2]
    assert boxes.shape == (512, 4)
    assert area.min() > 0.24 and area.max() < 0.51 and area.std() > 0.05
    assert ratio.min() > 0.73 and ratio.max() < 1.37 and ratio.std() > 0.1


def test_scale_one_is_the_whole_image_once() -> None:
    assert view_codebook(7, 32, (1.0, 1.0)).tolist() == [[0, 0, 32, 32]]


@pytest.mark.parametrize("scale", [(0.0, 1.0), (0.5, 0.4), (0.5, 1.1)])
def test_impossible_view_scales_are_refused(scale: tuple[float, float]) -> None:
    with pytest.raises(ConfigError, match="view scale"):
        view_codebook(7, 32, scale)


@given(st.integers(2, 300), st.integers(0, 2**32))
def test_cutmix_boxes_cover_some_but_not_all(size: int, seed: int) -> None:
    table = MixTable.from_entries(mix_codebook(seed, size, "cutmix", count=20), size)
    top, left, height, width = table.box.astype(int).T
    assert top.min() >= 0 and left.min() >= 0
    assert (top + height).max() <= size and (left + width).max() <= size
    assert table.is_cutmix.all() and table.lam.min() > 0 and table.lam.max() < 1
    np.testing.assert_allclose(table.lam, 1 - height * width / size**2, rtol=1e-6)


def test_mixup_entries_are_multiples_of_1_256() -> None:
    entries = mix_codebook(7, 32, "mixup")
    assert all(isinstance(e, float) and 0 < e < 1 and (e * 256).is_integer() for e in entries)
    table = MixTable.from_entries(entries, 32)
    assert not table.is_cutmix.any() and not table.box.any()
    assert len(np.unique(table.lam)) > 100


def test_both_kinds_alternate() -> None:
    table = MixTable.from_entries(mix_codebook(7, 32, "both", count=6), 32)
    assert table.is_cutmix.tolist() == [True, False] * 3


def test_lam_is_the_exact_remaining_share() -> None:
    entries: list[MixEntry] = [(0, 0, 8, 4), 0.25]
    assert MixTable.from_entries(entries, 16).lam.tolist() == [1 - 32 / 256, 0.25]


@given(st.integers(2, 256), st.lists(st.floats(0, 1e6), min_size=1, max_size=20))
def test_quantize_finds_the_nearest_level(count: int, distances: list[float]) -> None:
    levels = distance_levels(count)
    for distance, index in zip(distances, quantize(np.array(distances), levels), strict=True):
        gap = np.abs(levels.astype(np.float64) - distance)
        assert gap[index] == gap.min()


def test_levels_quantize_to_themselves_and_ends_clamp() -> None:
    levels = distance_levels()
    assert quantize(levels, levels).tolist() == list(range(16))
    assert quantize(np.array([0.0, 1e9]), levels).tolist() == [0, 15]
    assert levels.dtype == np.float32 and levels[0] == 0 and levels[-1] == 16


@pytest.mark.parametrize("value", [np.nan, np.inf, -0.5])
def test_broken_distances_are_refused(value: float) -> None:
    with pytest.raises(FormatError, match="finite"):
        quantize(np.array([1.0, value]), distance_levels())
