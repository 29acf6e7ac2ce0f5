"""The draw generator: SPEC.md's test vectors, and an implementation of its text that shares no code with ours."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from nrrdd_format import draws

MASK = 2**64 - 1


def philox_block(key: tuple[int, int], counter: int) -> list[int]:
    """Philox4x64-10 as published: four 64-bit outputs of one counter value."""
    x = [(counter >> (64 * i)) & MASK for i in range(4)]
    k0, k1 = key
    for _ in range(10):
        a, b = x[0] * 0xD2E7470EE14C6C93, x[2] * 0xCA5A826395121157
        x = [(b >> 64) ^ x[1] ^ k0, b & MASK, (a >> 64) ^ x[3] ^ k1, a & MASK]
        k0, k1 = (k0 + 0x9E3779B97F4A7C15) & MASK, (k1 + 0xBB67AE8584CAA73B) & MASK
    return x


def spec_outputs(text: str, count: int) -> list[int]:
    digest = hashlib.sha256(text.encode()).digest()
    key = int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:16], "little")
    blocks = [philox_block(key, counter) for counter in range(1, count // 4 + 2)]
    return [value for block in blocks for value in block][:count]


def test_outputs_follow_the_published_generator() -> None:
    assert draws.raw(11, "order", 0, 0, count=13).tolist() == spec_outputs("nrrdd/order/11/0/0", 13)
    assert draws.raw(0, "view", count=1).tolist() == spec_outputs("nrrdd/view/0", 1)


def test_spec_vectors() -> None:
    raw = draws.raw(11, "order", 0, 0, count=8)
    assert [f"{value:016x}" for value in raw.tolist()] == [
        "f971f7e75e6795b8", "0e7867e2f89508c7", "6871a52f97f0e917", "120d7098e25f87ba",
        "8828f6bb024312c8", "a0eaf659f2cafd97", "816740ea14fe5581", "c7efb997c90da35a",
    ]  # fmt: skip
    assert draws.permutation(11, "order", 0, 0, count=7).tolist() == [1, 3, 2, 6, 4, 5, 0]
    assert draws.integers(11, "view", 0, 0, count=7, high=6).tolist() == [1, 1, 4, 1, 3, 0, 1]
    assert draws.integers(11, "flip", 0, 0, count=7, high=2).tolist() == [0, 0, 1, 1, 1, 1, 1]
    assert draws.integers(11, "mix", 0, 0, count=4, high=5).tolist() == [2, 3, 1, 4]
    assert draws.uniform(11, "order", 0, 0, count=1)[0] == (0xF971F7E75E6795B8 >> 11) * 2.0**-53
    assert draws.torch_seed(11, "order", 0, 0) == 0xF971F7E75E6795B8 >> 1


@pytest.mark.parametrize("high", [1, 2, 7, 65536, 2**31])
def test_integers_stay_below_high(high: int) -> None:
    values = draws.integers(3, "test", count=500, high=high)
    assert values.min() >= 0 and values.max() < high
    assert len(np.unique(values)) >= min(high, 200) // 2


def test_permutation_is_complete() -> None:
    assert sorted(draws.permutation(1, "test", 5, count=1000).tolist()) == list(range(1000))


def test_streams_differ_by_every_part_of_their_name() -> None:
    names: list[tuple[int, str, tuple[int, ...]]] = [
        (1, "a", (2, 3)),
        (2, "a", (2, 3)),
        (1, "b", (2, 3)),
        (1, "a", (3, 3)),
        (1, "a", (2, 4)),
        (1, "a", (2,)),
        (1, "a", (23,)),
    ]
    first = {int(draws.raw(seed, purpose, *index, count=1)[0]) for seed, purpose, index in names}
    assert len(first) == len(names)


def test_a_longer_draw_begins_like_a_shorter_one_and_ignores_global_state() -> None:
    np.random.seed(0)  # noqa: NPY002
    short = draws.raw(4, "test", count=5)
    np.random.seed(1)  # noqa: NPY002
    assert draws.raw(4, "test", count=50)[:5].tolist() == short.tolist()


def test_numpy_integers_name_the_same_stream() -> None:
    four, seven = np.array([4, 7])
    assert draws.raw(four, "test", seven, count=2).tolist() == draws.raw(4, "test", 7, count=2).tolist()


def test_generator_is_repeatable() -> None:
    assert draws.generator(1, "test").beta(1, 1) == draws.generator(1, "test").beta(1, 1)
