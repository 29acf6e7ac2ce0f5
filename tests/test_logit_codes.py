"""Codes of whole predictions, as the benchmark of accuracy by the byte compares them with completed labels."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from benchmarks.logit_codes import LogitCode, LowRank, ProductCode, coded_bytes, spread_rest
from loaders import DBRBatch, completed_labels


def some_log_p(count: int, classes: int, components: int, noise: float = 0.0) -> Tensor:
    """Predictions whose centred logits lie in `components` dimensions, but for the noise."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(count, components, generator=generator) @ torch.randn(components, classes, generator=generator)
    return (logits + noise * torch.randn(count, classes, generator=generator)).log_softmax(1)


def kl(code: LogitCode, log_p: Tensor) -> float:
    """Mean KL of the decoded predictions from the true ones, nats."""
    decoded = code.decode(code.encode(log_p)).log_softmax(1)
    return float((log_p.exp() * (log_p - decoded)).sum(1).mean())


def test_a_low_rank_code_tells_what_has_this_rank() -> None:
    log_p = some_log_p(500, 12, components=3)
    errors = [kl(LowRank.fit(log_p, rank), log_p) for rank in (1, 2, 3)]
    assert errors[0] > errors[1] > 4 * errors[2]
    assert LowRank.fit(log_p, 3).encode(log_p).shape == (500, 3)


def test_a_product_code_tells_more_with_more_parts() -> None:
    log_p = some_log_p(3000, 12, components=6, noise=0.5)
    codes = [ProductCode.fit(log_p, parts, seed=0) for parts in (1, 3, 6)]
    errors = [kl(code, log_p) for code in codes]
    assert errors[0] > errors[1] > errors[2]
    assert codes[2].encode(log_p).dtype == torch.uint8


def test_fewer_pairs_than_centroids_are_all_kept() -> None:
    log_p = some_log_p(40, 6, components=4)
    assert kl(ProductCode.fit(log_p, 1, seed=0), log_p) == pytest.approx(0, abs=1e-5)


def test_a_code_that_says_nothing_takes_nothing() -> None:
    log_p = torch.full((10_000, 4), 0.25).log()
    assert coded_bytes(LowRank.fit(log_p, 2), log_p) < 0.01
    spread = some_log_p(10_000, 12, components=8)
    assert 3.0 < coded_bytes(LowRank.fit(spread, 8), spread) <= 4.5


@pytest.mark.parametrize(("org", "aug"), [(0, 1), (2, 2)])
def test_the_rest_is_spread_as_the_code_says(org: int, aug: int) -> None:
    p = torch.tensor([[0.4, 0.2, 0.2, 0.15, 0.05]])
    batch = DBRBatch(
        images=torch.zeros(1, 3, 2, 2),
        label_org=torch.tensor([org]),
        label_aug=torch.tensor([aug]),
        lam=torch.tensor([0.5]),
        distance_org=-p[:, org].log(),
        distance_aug=-p[:, aug].log(),
    )
    label = completed_labels(replace(batch, further=spread_rest(batch, p.log())), 5)
    if org != aug:
        torch.testing.assert_close(label, p)
    else:  # there is one more other class than the pairs of two classes have: the least likely gets nothing
        torch.testing.assert_close(label[0, :4], p[0, :4], atol=0.06, rtol=0)
        torch.testing.assert_close(label.sum(1), torch.ones(1))
