"""Pair records: drawing, bit packing, blocks, codebooks; every way a block can be wrong."""

from __future__ import annotations

from dataclasses import fields, replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

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
from nrrdd_format.records import (
    Coding,
    PairDraws,
    PairRecords,
    RecordLayout,
    cycle_bounds,
    decode_epoch,
    draw_pairs,
    encode_epoch,
    expand,
    expand_pairs,
    max_block_bytes,
)

CODINGS: tuple[Coding, ...] = ("explicit", "derived")


def make_layout(**changes: Any) -> RecordLayout:
    images = changes.pop("images", 9)
    defaults: dict[str, Any] = {
        "images": images,
        "pairs": images,
        "cycle": 4,
        "mix_group": 2,
        "flip": True,
        "coding": "explicit",
        "seed": 1,
        "views": view_codebook(0, 16, (0.3, 1.0), count=6),
        "mixes": MixTable.from_entries(mix_codebook(0, 16, "both", count=5), 16),
        "levels": distance_levels(16),
    }
    return RecordLayout(**{**defaults, **changes})


def levels_of(layout: RecordLayout, step: int) -> NDArray[np.uint8]:
    return (np.arange(layout.pairs) * step % len(layout.levels)).astype(np.uint8)


def assert_same(a: PairRecords, b: PairRecords) -> None:
    for field in fields(PairRecords):
        left, right = getattr(a, field.name), getattr(b, field.name)
        assert left.dtype == right.dtype, field.name
        np.testing.assert_array_equal(left, right, err_msg=field.name)


# ---- bit packing


@given(st.lists(st.integers(0, 16).flatmap(lambda w: st.tuples(st.just(w), st.integers(0, 2**w - 1))), max_size=60))
def test_bits_round_trip(items: list[tuple[int, int]]) -> None:
    widths = np.array([w for w, _ in items], np.int64)
    values = np.array([v for _, v in items], np.int64)
    data = bits.pack(values, widths)
    assert len(data) == bits.packed_bytes(widths)
    assert bits.padding_bits(data, widths) == 0
    assert bits.unpack(data, widths).tolist() == values.tolist()


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
    records = expand_pairs(draw_pairs(layout, 0, epoch), layout)
    assert sorted(records.index_org.tolist()) == list(range(images))
    assert sorted(records.index_aug.tolist()) == list(range(images))
    assert not np.any(records.index_org == records.index_aug)
    bounds = cycle_bounds(images, cycle)
    for low, high in pairwise(bounds.tolist()):
        assert high - low >= 2
        assert set(records.index_org[low:high].tolist()) == set(records.index_aug[low:high].tolist())


def test_an_image_has_one_view_in_both_roles() -> None:
    layout = make_layout(images=30)
    records = expand_pairs(draw_pairs(layout, 0, 0), layout)
    as_org = {i: (tuple(v), f) for i, v, f in zip(records.index_org, records.view_org, records.flip_org, strict=True)}
    as_aug = {i: (tuple(v), f) for i, v, f in zip(records.index_aug, records.view_aug, records.flip_aug, strict=True)}
    assert as_org == as_aug


def test_pairs_of_a_mix_group_share_their_mix_and_distances_are_unknown_before_relabeling() -> None:
    layout = make_layout(images=9, mix_group=4)
    drawn = draw_pairs(layout, 0, 0)
    records = expand_pairs(drawn, layout)
    assert layout.groups == 3 == len(drawn.mix)
    assert len(np.unique(records.lam[:4])) == 1 and len(np.unique(records.lam[4:8])) == 1
    assert np.isnan(records.distance_org).all() and np.isnan(records.distance_aug).all()


def test_draws_depend_on_seed_shard_and_epoch() -> None:
    def order(seed: int, shard: int, epoch: int) -> tuple[int, ...]:
        return tuple(draw_pairs(make_layout(images=50, seed=seed), shard, epoch).order.tolist())

    assert len({order(1, 0, 0), order(2, 0, 0), order(1, 1, 0), order(1, 0, 1)}) == 4


def test_no_flips_where_the_dataset_allows_none() -> None:
    assert not draw_pairs(make_layout(images=50, flip=False), 0, 0).flip.any()


def test_take_keeps_the_order_asked_for() -> None:
    layout = make_layout()
    records = expand(draw_pairs(layout, 0, 0), layout, levels_of(layout, 1), levels_of(layout, 3))
    chosen = records.take(np.array([4, 0]))
    assert len(chosen) == 2
    assert chosen.index_org.tolist() == [records.index_org[4], records.index_org[0]]
    assert_same(records.take(slice(1, 3)), records.take(np.array([1, 2])))


# ---- blocks


@st.composite
def layouts(draw: st.DrawFn) -> RecordLayout:
    return make_layout(
        images=draw(st.integers(2, 70)),
        cycle=draw(st.integers(2, 12)),
        mix_group=draw(st.integers(1, 80)),
        flip=draw(st.booleans()),
        coding=draw(st.sampled_from(CODINGS)),
        seed=draw(st.integers(0, 2**63 - 1)),
        views=view_codebook(0, 16, (0.3, 1.0), count=draw(st.integers(1, 40))),
        levels=distance_levels(draw(st.integers(2, 256))),
    )


@given(layouts(), st.integers(0, 65535), st.integers(0, 65535), st.integers(1, 50))
def test_blocks_round_trip(layout: RecordLayout, shard: int, epoch: int, step: int) -> None:
    drawn = draw_pairs(layout, shard, epoch)
    org, aug = levels_of(layout, step), levels_of(layout, step + 1)
    data = encode_epoch(drawn, layout, org, aug)
    assert len(data) <= max_block_bytes(layout)
    assert_same(decode_epoch(data, layout, shard, epoch), expand(drawn, layout, org, aug))


@given(st.permutations(range(12)), st.lists(st.integers(0, 5), min_size=12, max_size=12))
def test_explicit_blocks_hold_any_draws(order: list[int], view: list[int]) -> None:
    layout = make_layout(images=12)
    drawn = PairDraws(
        order=np.array(order), view=np.array(view), flip=np.array(view) > 2, mix=np.array([4, 0, 1, 2, 3, 4])
    )
    data = encode_epoch(drawn, layout, levels_of(layout, 1), levels_of(layout, 2))
    assert_same(decode_epoch(data, layout, 0, 0), expand(drawn, layout, levels_of(layout, 1), levels_of(layout, 2)))


def test_the_largest_shard() -> None:
    layout = make_layout(images=65536, cycle=10)
    drawn = draw_pairs(layout, 0, 0)
    data = encode_epoch(drawn, layout, levels_of(layout, 1), levels_of(layout, 2))
    assert decode_epoch(data, layout, 0, 0).index_org.tolist() == drawn.order.tolist()


def test_a_pair_costs_what_the_design_promises() -> None:
    layout = make_layout(
        images=1000,
        cycle=10,
        mix_group=10,
        views=view_codebook(0, 64, (0.25, 1.0)),
        mixes=MixTable.from_entries(mix_codebook(0, 64), 64),
        levels=distance_levels(16),
    )
    rng = np.random.default_rng(0)
    org, aug = (quantize(rng.lognormal(1.2, 0.7, 1000), layout.levels) for _ in range(2))
    explicit = encode_epoch(draw_pairs(layout, 0, 0), layout, org, aug)
    derived = encode_epoch(draw_pairs(layout, 0, 0), replace(layout, coding="derived"), org, aug)
    assert len(explicit) / 1000 <= 3.4
    assert len(derived) / 1000 <= 0.9


def test_every_flipped_byte_is_refused_or_harmless() -> None:
    """A damaged block never crashes the decoder; the shard's checksums are not consulted here."""
    layout = make_layout()
    data = encode_epoch(draw_pairs(layout, 0, 0), layout, levels_of(layout, 1), levels_of(layout, 3))
    for at in range(len(data)):
        for flip in (0x01, 0x80, 0xFF):
            damaged = bytearray(data)
            damaged[at] ^= flip
            try:
                records = decode_epoch(bytes(damaged), layout, 0, 0)
            except FormatError:
                continue
            assert sorted(records.index_org.tolist()) == list(range(9))


@given(st.binary(max_size=80))
def test_garbage_is_refused(data: bytes) -> None:
    with pytest.raises(FormatError):
        decode_epoch(data, make_layout(), 0, 0)


def test_truncated_and_extended_blocks_are_refused() -> None:
    layout = make_layout()
    data = encode_epoch(draw_pairs(layout, 0, 0), layout, levels_of(layout, 1), levels_of(layout, 3))
    for wrong in [data[:n] for n in range(len(data))] + [data + b"\0", data + data]:
        with pytest.raises(FormatError):
            decode_epoch(wrong, layout, 0, 0)


def test_a_zstd_bomb_is_refused_before_it_is_unpacked() -> None:
    bomb = zstandard.ZstdCompressor().compress(bytes(200_000_000))
    with pytest.raises(FormatError, match="states 200000000 bytes of content, expected 27"):
        decode_epoch(bomb, make_layout(), 0, 0)


def test_a_frame_that_does_not_state_its_size_is_refused() -> None:
    layout = make_layout()
    frame = zstandard.ZstdCompressor(write_content_size=False).compress(bytes(27))
    with pytest.raises(FormatError, match="states no length of content, expected 27"):
        decode_epoch(frame, layout, 0, 0)


def test_a_frame_that_holds_more_than_it_states_is_refused() -> None:
    honest = zstandard.ZstdCompressor().compress(bytes(range(28)))
    assert honest[5] == 28
    with pytest.raises(FormatError):
        decode_epoch(honest[:5] + bytes([27]) + honest[6:], make_layout(), 0, 0)


def with_fields(layout: RecordLayout, **changes: int) -> bytes:
    """An explicit block of layout n=9, V=6, M=5, whose named field 0 is replaced."""
    widths = np.array([4, 3, 3, 3, 3, 2, 2, 1, 0] + [3] * 9 + [1] * 9 + [3] * 5)
    values = np.zeros(len(widths), np.int64)
    starts = {"order": 0, "view": 9, "mix": 27}
    for name, value in changes.items():
        values[starts[name]] = value
    return zstandard.ZstdCompressor().compress(bits.pack(values, widths) + bytes(2 * layout.pairs))


@pytest.mark.parametrize(("field", "limit"), [("order", 9), ("view", 6), ("mix", 5)])
def test_fields_out_of_range_are_refused(field: str, limit: int) -> None:
    layout = make_layout()
    decode_epoch(with_fields(layout, **{field: limit - 1}), layout, 0, 0)
    with pytest.raises(FormatError, match=f"{field} 0 is {limit}, expected less than {limit}"):
        decode_epoch(with_fields(layout, **{field: limit}), layout, 0, 0)


def test_padding_bits_must_be_zero() -> None:
    layout = make_layout(flip=False)  # 63 bits of fields: one bit of padding
    decode_epoch(zstandard.ZstdCompressor().compress(bytes(8) + bytes(18)), layout, 0, 0)
    with pytest.raises(FormatError, match="padding"):
        decode_epoch(zstandard.ZstdCompressor().compress(bytes(7) + b"\x80" + bytes(18)), layout, 0, 0)


@pytest.mark.parametrize("coding", CODINGS)
def test_levels_out_of_range_are_refused(coding: Coding) -> None:
    layout = make_layout(coding=coding)
    wrong = np.array([0] * 8 + [16], np.uint8)
    fine = np.zeros(9, np.uint8)
    with pytest.raises(FormatError, match="distance_aug 8 is 16, expected less than 16"):
        encode_epoch(draw_pairs(layout, 0, 0), layout, fine, wrong)
    block = encode_epoch(draw_pairs(layout, 0, 0), replace(layout, levels=distance_levels(17)), wrong, fine)
    with pytest.raises(FormatError, match="distance_org 8 is 16, expected less than 16"):
        decode_epoch(block, layout, 0, 0)


def test_levels_of_another_shape_are_refused() -> None:
    layout = make_layout()
    with pytest.raises(FormatError, match="distance_org"):
        encode_epoch(draw_pairs(layout, 0, 0), layout, np.zeros(8, np.uint8), np.zeros(9, np.uint8))


@pytest.mark.parametrize(
    "changes",
    [
        {"images": 1},
        {"images": 65537},
        {"images": 5, "pairs": 6},
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


@given(st.integers(2, 300), st.floats(0.1, 5.0))
def test_cutmix_boxes_cover_some_but_not_all(size: int, alpha: float) -> None:
    table = MixTable.from_entries(mix_codebook(7, size, "cutmix", cutmix_alpha=alpha, count=20), size)
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
    logs = np.log(levels.astype(np.float64))
    for distance, index in zip(distances, quantize(np.array(distances), levels), strict=True):
        gap = np.abs(logs - np.log(np.clip(distance, levels[0], levels[-1])))
        assert gap[index] <= gap.min() + 1e-6


def test_levels_quantize_to_themselves_and_ends_clamp() -> None:
    levels = distance_levels()
    assert quantize(levels, levels).tolist() == list(range(64))
    assert quantize(np.array([0.0, 1e9]), levels).tolist() == [0, 63]
    assert levels.dtype == np.float32 and levels[0] == np.float32(1e-3) and levels[-1] == 16


@pytest.mark.parametrize("value", [np.nan, np.inf, -0.5])
def test_broken_distances_are_refused(value: float) -> None:
    with pytest.raises(FormatError, match="finite"):
        quantize(np.array([1.0, value]), distance_levels())
