"""The comparison of the loader's order with a full shuffle."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from make_dataset import make_tiny_dataset

from benchmarks.loader_order import FullShuffle, imbalance, main
from loaders import DBRBatch, DBRLoader


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_dataset(tmp_path_factory.mktemp("order") / "tiny", epochs=3)


def test_a_full_shuffle_has_the_same_pairs_in_another_order_each_epoch(dataset: Path) -> None:
    loader, shuffled = DBRLoader(dataset, 5), FullShuffle(DBRLoader(dataset, 5), 5, seed=0)
    orders = []
    for epoch in range(3):
        loader.set_epoch(epoch)
        shuffled.set_epoch(epoch)
        expected = torch.cat([batch.images.sum((1, 2, 3)) for batch in loader])
        found = torch.cat([batch.images.sum((1, 2, 3)) for batch in shuffled])
        assert Counter(found.tolist()) == Counter(expected.tolist())
        orders.append([expected.tolist().index(value) for value in found.tolist()])
    assert len({tuple(one) for one in orders}) == 3


class Fixed:
    """One batch with these labels, whatever the epoch."""

    def __init__(self, labels: list[int]) -> None:
        self.labels = torch.tensor(labels)

    def set_epoch(self, epoch: int) -> None:
        pass

    def __iter__(self) -> Iterator[DBRBatch]:
        nothing = torch.zeros(len(self.labels))
        yield DBRBatch(
            images=nothing,
            label_org=self.labels,
            label_aug=self.labels,
            lam=nothing,
            distance_org=nothing,
            distance_aug=nothing,
        )


@pytest.mark.parametrize(("labels", "expected"), [([0, 1, 2, 3], 0.0), ([0, 0, 0, 0], 75.0), ([0, 0, 1, 1], 50.0)])
def test_unevenness_is_half_the_distance_to_even_shares(labels: list[int], expected: float) -> None:
    assert imbalance(Fixed(labels), 4) == pytest.approx(expected)


def test_too_few_shards_are_refused(dataset: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(dataset)]) == 2
    assert "expected more than 4" in capsys.readouterr().err
