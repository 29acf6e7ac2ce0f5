"""Random draws as pure functions of (seed, purpose, index): SPEC.md section 7.

Only raw 64-bit outputs of NumPy's Philox bit generator are used, which NumPy keeps stable, never
`Generator.permutation` and its kin, which it does not. The same arguments give the same draws on every
machine and in every process, whatever else was drawn before.
"""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray


def _philox(seed: int, purpose: str, index: tuple[int, ...]) -> np.random.Philox:
    text = f"nrrdd/{purpose}/{seed}" + "".join(f"/{i}" for i in index)
    key = np.frombuffer(hashlib.sha256(text.encode("utf-8")).digest()[:16], dtype="<u8")
    return np.random.Philox(counter=0, key=key.astype(np.uint64))


def raw(seed: int, purpose: str, *index: int, count: int) -> NDArray[np.uint64]:
    """The first `count` 64-bit outputs of the stream named by the arguments."""
    return np.asarray(_philox(seed, purpose, index).random_raw(count), dtype=np.uint64)


def permutation(seed: int, purpose: str, *index: int, count: int) -> NDArray[np.int64]:
    """A permutation of 0..count-1: the stable argsort of `count` raw outputs."""
    return np.argsort(raw(seed, purpose, *index, count=count), kind="stable").astype(np.int64)


def integers(seed: int, purpose: str, *index: int, count: int, high: int) -> NDArray[np.int64]:
    """`count` integers in [0, high), 1 <= high <= 2**31: the upper 32 bits of a raw output, scaled."""
    top = raw(seed, purpose, *index, count=count) >> np.uint64(32)
    return ((top * np.uint64(high)) >> np.uint64(32)).astype(np.int64)


def uniform(seed: int, purpose: str, *index: int, count: int) -> NDArray[np.float64]:
    """`count` floats in [0, 1) with 53 random bits."""
    return (raw(seed, purpose, *index, count=count) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def torch_seed(seed: int, purpose: str, *index: int) -> int:
    """A 63-bit seed for a `torch.Generator`."""
    return int(raw(seed, purpose, *index, count=1)[0]) >> 1


def generator(seed: int, purpose: str, *index: int) -> np.random.Generator:
    """A NumPy generator on the same stream, for draws whose *results* are stored (codebooks).

    Its distributions may change between NumPy versions, so nothing a reader must reproduce may come from it.
    """
    return np.random.Generator(_philox(seed, purpose, index))
