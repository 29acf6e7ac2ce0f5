"""Losses against values computed by hand or in plain float64 Python, every alternative, and in half precision."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from compiler import needs_compiler
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from loaders import (
    ClassDistances,
    CompactLoss,
    CompletedDBRLoss,
    DBRBatch,
    DBRLoss,
    OneHotLoss,
    SoftLoss,
    completed_labels,
)
from loaders.losses import Distance, Sce, floor_of
from nrrdd_format.errors import ConfigError

CLASSES = 5
TENSORS = ("images", "label_org", "label_aug", "lam", "distance_org", "distance_aug")


def make_batch(
    labels: list[tuple[int, int]], lam: list[float], distances: list[tuple[float, float]] | None = None
) -> DBRBatch:
    distances = distances or [(0.5, 1.5)] * len(lam)
    return DBRBatch(
        images=torch.zeros(len(lam), 3, 2, 2),
        label_org=torch.tensor([org for org, _ in labels]),
        label_aug=torch.tensor([aug for _, aug in labels]),
        lam=torch.tensor(lam),
        distance_org=torch.tensor([org for org, _ in distances]),
        distance_aug=torch.tensor([aug for _, aug in distances]),
    )


BATCH = make_batch(
    [(0, 1), (2, 4), (3, 3), (1, 0), (4, 2)],
    [0.9, 0.25, 0.6, 0.5, 1.0],
    [(0.1, 2.5), (0.7, 0.9), (0.2, 0.2), (0.01, 0.02), (1.0, 4.0)],
)
PRIORS = [
    [[(1, 0.3), (2, 1.9)], [(0, 1.0), (1, 1.0)], [(0, 0.0), (4, 0.0)], [(2, 0.7), (3, 12.0)], [(0, 0.4), (3, 2.0)]],
    [[(0, 2.0), (4, 0.2)], [(0, 5.0), (2, 0.1)], [(1, 0.5), (2, 3.0)], [(3, 0.3), (4, 3.0)], [(1, 9.0), (3, 9.0)]],
]
"""(class, distance) of the priors of `org` and `aug`, two of each image."""


def listed(rows: list[list[tuple[int, float]]]) -> ClassDistances:
    return ClassDistances(
        classes=torch.tensor([[label for label, _ in row] for row in rows]),
        distances=torch.tensor([[distance for _, distance in row] for row in rows]),
    )


COMPLETED = replace(BATCH, prior_org=listed(PRIORS[0]), prior_aug=listed(PRIORS[1]))
FURTHER = replace(COMPLETED, further=listed([[(3, 1.5)], [(0, 2.0)], [(1, 0.3)], [(4, 4.0)], [(0, 0.9)]]))
LOGITS = torch.randn(5, CLASSES, generator=torch.Generator().manual_seed(3)) * 2
# The second pair is fitted well enough that its cross-entropy lies below the radius plus the labels' entropy.
LOGITS[1] = torch.tensor([-4.0, -4.0, 1.0, -4.0, 2.0])
LOGITS[2] = torch.tensor([-4.0, -4.0, -4.0, 3.0, -4.0])


def log_p(logits: Tensor, temperature: float = 1.0) -> list[list[float]]:
    """log softmax in float64, row by row."""
    rows = (logits.double() / temperature).tolist()
    return [[x - math.log(sum(map(math.exp, row))) for x in row] for row in rows]


def pairs(batch: DBRBatch) -> list[tuple[int, int, float, float, float]]:
    columns = (batch.label_org, batch.label_aug, batch.lam, batch.distance_org, batch.distance_aug)
    return list(zip(*(column.tolist() for column in columns), strict=True))


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def cross_entropies(batch: DBRBatch, logits: Tensor) -> list[float]:
    rows = zip(log_p(logits), pairs(batch), strict=True)
    return [-lam * row[org] - (1 - lam) * row[aug] for row, (org, aug, lam, _, _) in rows]


def entropy(lam: float) -> float:
    return -sum(x * math.log(x) for x in (lam, 1 - lam) if x > 0)


def expected_sce(sce: str, radius: float) -> tuple[float, float]:
    """L_sce and the clipped share."""
    values = cross_entropies(BATCH, LOGITS)
    if sce == "batch":
        return max(0.0, mean(values) - radius), float(mean(values) <= radius)
    if sce == "target":
        return expected_target(radius)
    if sce == "entropy":
        lows = [0.0 if org == aug else entropy(lam) for org, aug, lam, _, _ in pairs(BATCH)]
        values = [value - low for value, low in zip(values, lows, strict=True)]
    return mean([max(0.0, v - radius) for v in values]), mean([float(v <= radius) for v in values])


def expected_target(radius: float) -> tuple[float, float]:
    losses, cut = [], []
    for row, (org, aug, lam, _, _) in zip(log_p(LOGITS), pairs(BATCH), strict=True):
        label = [0.0] * CLASSES
        label[org] += lam
        label[aug] += 1 - lam
        over = [k for k in range(CLASSES) if label[k] > 1 - radius]
        excess = sum(label[k] - (1 - radius) for k in over)
        label = [1 - radius if k in over else value + excess / (CLASSES - len(over)) for k, value in enumerate(label)]
        assert sum(label) == pytest.approx(1)
        losses.append(-sum(value * x for value, x in zip(label, row, strict=True)))
        cut.append(float(bool(over)))
    return mean(losses), mean(cut)


def expected_dbr(distance: str, temperature: float) -> float:
    def error(x: float) -> float:
        if distance == "huber":
            return 0.5 * x * x if abs(x) <= 1 else abs(x) - 0.5
        return abs(x) if distance == "l1" else x * x

    values = []
    for row, (org, aug, _, d_org, d_aug) in zip(log_p(LOGITS, temperature), pairs(BATCH), strict=True):
        second = 0.0 if org == aug else error(-row[aug] - d_aug)
        values.append(error(-row[org] - d_org) + second)
    return mean(values)


@pytest.mark.parametrize("sce", get_args(Sce))
@pytest.mark.parametrize("radius", [0.0, 0.4, 0.8])
def test_bounded_cross_entropy(sce: Sce, radius: float) -> None:
    terms = DBRLoss(sce=sce, radius=radius).terms(LOGITS, BATCH)
    value, clipped = expected_sce(sce, radius)
    assert terms["sce"].item() == pytest.approx(value, rel=1e-5)
    assert terms["clipped_share"].item() == pytest.approx(clipped)


def test_the_examples_clip_some_pairs_and_not_others() -> None:
    for sce in ("sample", "target", "entropy"):
        assert 0 < expected_sce(sce, 0.4)[1] < 1


@pytest.mark.parametrize("distance", get_args(Distance))
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_distance_error(distance: Distance, temperature: float) -> None:
    terms = DBRLoss(distance=distance, temperature=temperature).terms(LOGITS, BATCH)
    assert terms["dbr"].item() == pytest.approx(expected_dbr(distance, temperature), rel=1e-5)


@given(st.integers(2, 6), st.floats(0, 1), st.floats(0, 0.99), st.booleans())
def test_cut_labels_are_distributions(classes: int, lam: float, radius: float, same: bool) -> None:
    """With equal logits the cross-entropy to any distribution is log C."""
    batch = make_batch([(0, 0 if same else 1)], [lam])
    found = DBRLoss(sce="target", radius=radius).terms(torch.zeros(1, classes), batch)["sce"]
    assert found.item() == pytest.approx(math.log(classes), rel=1e-5)


def test_a_cut_label_is_at_most_even() -> None:
    """What is cut from one of two classes must not make the other one the likelier."""
    logits = torch.tensor([[0.9, 0.1]]).log()
    found = DBRLoss(sce="target", radius=0.8).terms(logits, make_batch([(0, 0)], [1.0]))["sce"]
    assert found.item() == pytest.approx(-0.5 * math.log(0.9) - 0.5 * math.log(0.1), rel=1e-5)


def test_the_loss_is_the_weighted_sum() -> None:
    loss = DBRLoss(alpha_sce=0.3, alpha_dbr=2.0)
    terms = loss.terms(LOGITS, BATCH)
    assert terms["loss"].item() == pytest.approx(0.3 * terms["sce"].item() + 2.0 * terms["dbr"].item(), rel=1e-6)
    assert torch.equal(loss(LOGITS, BATCH), terms["loss"])


def test_one_pair_by_hand() -> None:
    """p = (1/2, 1/4, 1/4): CE = 0.75 ln 2 + 0.25 ln 4 = 1.25 ln 2; distances ln 2 and 2 ln 2."""
    logits = torch.tensor([[0.5, 0.25, 0.25]]).log()
    batch = make_batch([(0, 1)], [0.75], [(math.log(2) + 0.1, 2 * math.log(2) - 0.2)])
    terms = DBRLoss(radius=0.4).terms(logits, batch)
    assert terms["sce"].item() == pytest.approx(1.25 * math.log(2) - 0.4, rel=1e-5)
    assert terms["dbr"].item() == pytest.approx(0.3, rel=1e-4)


def test_one_hot() -> None:
    assert OneHotLoss()(LOGITS, BATCH).item() == pytest.approx(mean(cross_entropies(BATCH, LOGITS)), rel=1e-5)


def test_compact() -> None:
    expected = []
    for row, (org, aug, _, d_org, d_aug) in zip(log_p(LOGITS), pairs(BATCH), strict=True):
        p_org, p_aug = math.exp(-d_org), math.exp(-d_aug)
        expected.append(-(p_org * row[org] + p_aug * row[aug]) / (p_org + p_aug))
    assert CompactLoss()(LOGITS, BATCH).item() == pytest.approx(mean(expected), rel=1e-5)


def test_compact_labels_meet_the_student_at_the_teachers_temperature() -> None:
    """A student with the teacher's logits has no gradient along the two classes, at whatever temperature."""
    batch = replace(BATCH, distance_org=torch.tensor([0.5]), distance_aug=torch.tensor([1.5]))
    one = replace(batch, label_org=torch.tensor([0]), label_aug=torch.tensor([1]), lam=torch.tensor([0.5]))
    logits = torch.tensor([[-2.0 * 0.5, -2.0 * 1.5, -1e4]], requires_grad=True)
    CompactLoss(temperature=2.0)(logits, one).backward()
    assert logits.grad is not None
    torch.testing.assert_close(logits.grad, torch.zeros_like(logits), atol=1e-5, rtol=0)
    with pytest.raises(ConfigError, match="temperature"):
        CompactLoss(temperature=0)


def test_compact_labels_sum_to_one_where_the_stored_probabilities_exceed_it() -> None:
    """Both distances 0.1: p_i + p_j = 1.81, yet each class gets one half."""
    logits = torch.tensor([[0.5, 0.25, 0.25]]).log()
    batch = make_batch([(0, 1)], [0.5], [(0.1, 0.1)])
    assert CompactLoss()(logits, batch).item() == pytest.approx(1.5 * math.log(2), rel=1e-5)


def test_one_class_counts_once_in_every_loss() -> None:
    """p = (1/2, 1/4, 1/4), both images of class 0 at teacher distance 0.1."""
    logits = torch.tensor([[0.5, 0.25, 0.25]]).log()
    batch = make_batch([(0, 0)], [0.3], [(0.1, 0.1)])
    assert DBRLoss().terms(logits, batch)["dbr"].item() == pytest.approx(math.log(2) - 0.1, rel=1e-5)
    assert DBRLoss(radius=0.0).terms(logits, batch)["sce"].item() == pytest.approx(math.log(2), rel=1e-5)
    assert DBRLoss(radius=0.0, sce="entropy").terms(logits, batch)["sce"].item() == pytest.approx(math.log(2))
    assert OneHotLoss()(logits, batch).item() == pytest.approx(math.log(2), rel=1e-5)
    assert CompactLoss()(logits, batch).item() == pytest.approx(math.log(2), rel=1e-5)


def test_the_entropy_bound_is_zero_at_the_best_fit() -> None:
    """A student that predicts the mixed labels exactly has CE = H(lam)."""
    logits = torch.tensor([[0.7, 0.3, 1e-9]]).log()
    loss = DBRLoss(radius=0.0, sce="entropy").terms(logits, make_batch([(0, 1)], [0.7]))
    assert loss["sce"].item() == pytest.approx(0.0, abs=1e-6)


def completed_row(batch: DBRBatch, pair: int, classes: int) -> list[float]:
    """The completed label of a pair in plain Python."""
    org, aug, lam, d_org, d_aug = pairs(batch)[pair]
    known = {org: math.exp(-d_org)} | ({} if org == aug else {aug: math.exp(-d_aug)})
    known = {label: p / max(1, sum(known.values())) for label, p in known.items()}
    shares = {}
    for label in set(range(classes)) - known.keys():
        parts = []
        for prior in (batch.prior_org, batch.prior_aug):
            if prior is None:
                parts.append(1.0)
                continue
            of = dict(zip(prior.classes[pair].tolist(), prior.distances[pair].tolist(), strict=True))
            listed = {one: math.exp(-distance) for one, distance in of.items()}
            left = max(0.0, 1 - sum(listed.values())) / (classes - 1 - len(listed))
            parts.append(listed.get(label, left))
        shares[label] = max(floor_of(classes), lam * parts[0] + (1 - lam) * parts[1])
    rest = 1 - sum(known.values())
    return [known[k] if k in known else rest * shares[k] / sum(shares.values()) for k in range(classes)]


@pytest.mark.parametrize("batch", [COMPLETED, BATCH])
def test_completed_labels(batch: DBRBatch) -> None:
    labels = completed_labels(batch, CLASSES)
    expected = [completed_row(batch, pair, CLASSES) for pair in range(len(batch))]
    torch.testing.assert_close(labels, torch.tensor(expected), rtol=1e-5, atol=1e-7)
    terms = [
        sum(p * (math.log(p) - x) for p, x in zip(label, row, strict=True) if p > 0)
        for label, row in zip(expected, log_p(LOGITS, 1.5), strict=True)
    ]
    loss = CompletedDBRLoss(temperature=1.5, alpha_dbr=0.0)(LOGITS, batch)
    assert loss.item() == pytest.approx(mean(terms), rel=1e-5)


def test_an_image_that_looks_like_a_third_class_gives_it_the_rest() -> None:
    """By hand: d = 1 and 2 leave 0.497, of which the priors, 0.9 and 0.5 for class 2, give 0.8 at λ = 0.75."""
    prior_org = listed([[(2, -math.log(0.9)), (3, -math.log(0.1))]])
    prior_aug = listed([[(2, -math.log(0.5)), (3, -math.log(0.5))]])
    batch = replace(make_batch([(0, 1)], [0.75], [(1.0, 2.0)]), prior_org=prior_org, prior_aug=prior_aug)
    rest = 1 - math.exp(-1) - math.exp(-2)
    expected = [math.exp(-1), math.exp(-2), 0.8 * rest, 0.2 * rest]
    torch.testing.assert_close(completed_labels(batch, 4)[0], torch.tensor(expected), rtol=1e-3, atol=1e-4)


@given(st.integers(2, 9), st.integers(0, 2**32 - 1), st.booleans())
def test_completed_labels_are_distributions_that_keep_what_is_stored(classes: int, seed: int, has_priors: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    label_org, label_aug = torch.randint(classes, (2, 20), generator=generator)
    distances = torch.rand(2, 20, generator=generator) * 8
    batch = DBRBatch(
        images=torch.zeros(20, 3, 1, 1),
        label_org=label_org,
        label_aug=label_aug,
        lam=torch.rand(20, generator=generator),
        distance_org=distances[0],
        distance_aug=torch.where(label_org == label_aug, distances[0], distances[1]),
        **({} if not has_priors else {"prior_org": any_prior(generator, label_org, classes)}),
        **({} if not has_priors else {"prior_aug": any_prior(generator, label_aug, classes)}),
    )
    labels = completed_labels(batch, classes)
    assert (labels >= 0).all()
    torch.testing.assert_close(labels.sum(1), torch.ones(20), rtol=1e-6, atol=1e-6)
    p = torch.stack([-batch.distance_org, -batch.distance_aug]).exp()
    total = torch.where(label_org == label_aug, p[0], p.sum(0))
    kept = labels.gather(1, torch.stack([label_org, label_aug], 1)).T
    complete = (classes == 2) & (label_org != label_aug)  # no other class can take the rest
    torch.testing.assert_close(kept, p / torch.where(complete, total, total.clamp_min(1)), rtol=1e-5, atol=1e-6)


def test_distances_beyond_all_probabilities_complete_to_numbers() -> None:
    far = torch.tensor([1e6])
    batch = DBRBatch(
        images=torch.zeros(1, 3, 2, 2),
        label_org=torch.tensor([0]),
        label_aug=torch.tensor([1]),
        lam=torch.tensor([0.5]),
        distance_org=far,
        distance_aug=far,
    )
    assert completed_labels(batch, 2).isfinite().all()
    assert torch.equal(completed_labels(batch, 3), torch.tensor([[0.0, 0.0, 1.0]]))


@given(st.integers(3, 12), st.integers(0, 2**32 - 1))
def test_with_all_other_classes_the_completed_label_is_the_soft_label(classes: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    log_p = torch.randn(8, classes, generator=generator).mul(3).log_softmax(1)
    order = torch.rand(8, classes, generator=generator).argsort(1)
    distances = log_p.neg().gather(1, order)
    batch = DBRBatch(
        images=torch.zeros(8, 3, 1, 1),
        label_org=order[:, 0],
        label_aug=order[:, 1],
        lam=torch.rand(8, generator=generator),
        distance_org=distances[:, 0],
        distance_aug=distances[:, 1],
        prior_org=any_prior(generator, order[:, 0], classes),
        prior_aug=any_prior(generator, order[:, 1], classes),
        further=ClassDistances(classes=order[:, 2:], distances=distances[:, 2:]),
    )
    torch.testing.assert_close(completed_labels(batch, classes), log_p.exp(), rtol=1e-4, atol=1e-6)


def test_further_classes_keep_what_they_state_and_leave_the_rest_to_others() -> None:
    plain = make_batch([(0, 1)], [0.5], [(1.0, 2.0)])
    further = ClassDistances(classes=torch.tensor([[3]]), distances=torch.tensor([[1.5]]))
    known = [math.exp(-1), math.exp(-2), math.exp(-1.5)]
    left = (1 - sum(known)) / 2
    expected = torch.tensor([[known[0], known[1], left, known[2], left]])
    torch.testing.assert_close(completed_labels(replace(plain, further=further), 5), expected)


def any_prior(generator: torch.Generator, labels: Tensor, classes: int) -> ClassDistances:
    """Priors of one class or more beside each label."""
    count = int(torch.randint(1, classes, (1,), generator=generator))
    order = torch.rand(len(labels), classes, generator=generator).scatter(1, labels[:, None], 2.0).argsort(1)
    return ClassDistances(classes=order[:, :count], distances=torch.rand(len(labels), count, generator=generator) * 9)


def test_a_batch_moves_with_its_priors() -> None:
    moved = COMPLETED.to("cpu")
    assert moved.prior_org is not None and moved.prior_aug is not None
    assert torch.equal(moved.prior_aug.classes, torch.tensor([[label for label, _ in row] for row in PRIORS[1]]))
    assert BATCH.to("cpu").prior_org is None


def test_soft() -> None:
    teacher = torch.randn(5, CLASSES, generator=torch.Generator().manual_seed(4))
    expected = []
    for student_row, teacher_row in zip(log_p(LOGITS, 20.0), log_p(teacher, 20.0), strict=True):
        expected.append(sum(math.exp(t) * (t - s) for s, t in zip(student_row, teacher_row, strict=True)))
    assert SoftLoss(20.0)(LOGITS, BATCH, teacher).item() == pytest.approx(mean(expected), rel=1e-3)
    assert SoftLoss()(teacher, BATCH, teacher).item() == pytest.approx(0.0, abs=1e-7)


def test_top_labels_keep_the_highest_and_spread_the_rest_evenly() -> None:
    teacher = torch.tensor([[0.5, 0.3, 0.1, 0.06, 0.04]]).log()
    student = torch.randn(1, 5, generator=torch.Generator().manual_seed(4))
    target = (0.5, 0.3, 0.2 / 3, 0.2 / 3, 0.2 / 3)
    expected = sum(t * (math.log(t) - s) for t, s in zip(target, log_p(student)[0], strict=True))
    batch = make_batch([(0, 1)], [0.7])
    assert SoftLoss(1.0, top=2)(student, batch, teacher).item() == pytest.approx(expected, rel=1e-5)
    for top in (5, 9):
        assert SoftLoss(1.0, top=top)(student, batch, teacher) == SoftLoss(1.0)(student, batch, teacher)


@pytest.mark.parametrize("distance", get_args(Distance))
@pytest.mark.parametrize("sce", get_args(Sce))
def test_gradients_of_dbr(sce: Sce, distance: Distance) -> None:
    loss = DBRLoss(sce=sce, distance=distance)
    assert torch.autograd.gradcheck(lambda logits: loss(logits, BATCH), LOGITS.double().requires_grad_())


def told_in_full(teacher: Tensor) -> DBRBatch:
    """The pairs of `BATCH`, whose labels tell all that the teacher's logits do."""
    log_p = teacher.log_softmax(1)
    own = torch.stack([BATCH.label_org, BATCH.label_aug], 1)
    others = [[k for k in range(CLASSES) if k not in row] for row in own.tolist()]
    width = min(map(len, others))  # a pair of one class leaves a class more, which takes the rest
    classes = torch.tensor([row[:width] for row in others])
    return replace(
        BATCH,
        distance_org=-log_p.gather(1, own[:, :1]).squeeze(1),
        distance_aug=-log_p.gather(1, own[:, 1:]).squeeze(1),
        further=ClassDistances(classes=classes, distances=-log_p.gather(1, classes)),
    )


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0, 20.0])
def test_labels_told_in_full_are_soft_labels_at_any_temperature(temperature: float) -> None:
    teacher = LOGITS.flip(0) * 0.7  # no probability below the floor
    assert teacher.softmax(1).min() > floor_of(CLASSES)
    found = CompletedDBRLoss(soft_temperature=temperature, alpha_dbr=0.0)(LOGITS, told_in_full(teacher))
    assert found.item() == pytest.approx(SoftLoss(temperature)(LOGITS, BATCH, teacher).item(), rel=1e-4)


def test_softened_labels_take_no_class_as_less_than_the_floor() -> None:
    """Otherwise what a label cannot tell would weigh most."""
    teacher = torch.zeros(len(LOGITS), CLASSES)
    teacher[:, 0] = -40.0
    expected = teacher.softmax(1).clamp_min(floor_of(CLASSES)).log()
    found = CompletedDBRLoss(soft_temperature=4.0, alpha_dbr=0.0)(LOGITS, told_in_full(teacher))
    assert found.item() == pytest.approx(SoftLoss(4.0)(LOGITS, BATCH, expected).item(), rel=1e-4)


@pytest.mark.parametrize("classes", [10, 1000, 131_072])
def test_the_floor_of_many_classes_does_not_fill_a_label(classes: int) -> None:
    """A pair's own classes have 0.9; of the rest, 0.1, the prior's one class keeps nearly all."""
    prior = listed([[(2, 0.0)]])
    batch = replace(make_batch([(0, 1)], [0.5], [(-math.log(0.6), -math.log(0.3))]), prior_org=prior, prior_aug=prior)
    labels = completed_labels(batch, classes)
    assert labels[0, 2] == pytest.approx(0.1, rel=0.02)
    logits = torch.zeros(1, classes)
    at_one, near_one = (CompletedDBRLoss(soft_temperature=t)(logits, batch).item() for t in (1.0, 1.001))
    assert near_one == pytest.approx(at_one, rel=0.02)


def test_a_temperature_of_the_labels_is_beside_the_teachers() -> None:
    """With τ = 2 of the distances and T = 3 the student's softmax is at 6."""
    teacher = LOGITS.flip(0) * 0.7
    batch = told_in_full(teacher / 2)
    found = CompletedDBRLoss(temperature=2.0, soft_temperature=3.0, alpha_dbr=0.0)(LOGITS, batch)
    assert found.item() == pytest.approx(SoftLoss(6.0)(LOGITS, BATCH, teacher).item(), rel=1e-4)


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan])
def test_a_temperature_of_completed_labels_is_positive(value: float) -> None:
    with pytest.raises(ConfigError, match="soft_temperature: found"):
        CompletedDBRLoss(soft_temperature=value)


@pytest.mark.parametrize("soft_temperature", [1.0, 4.0])
def test_completed_labels_come_with_the_error_of_every_stored_distance(soft_temperature: float) -> None:
    """At τ = 1.5 of the distances, whatever T of the labels; the third pair is of one class, which counts once."""
    batch = FURTHER
    assert batch.further is not None
    errors = []
    for row, own, other in zip(log_p(LOGITS, 1.5), pairs(BATCH), further_of(batch.further), strict=True):
        stored = {own[0]: own[3]} | ({} if own[0] == own[1] else {own[1]: own[4]}) | other
        errors.append(sum(abs(-row[label] - distance) for label, distance in stored.items()) / len(stored))
    plain, both = (
        CompletedDBRLoss(temperature=1.5, soft_temperature=soft_temperature, alpha_dbr=alpha)(LOGITS, batch).item()
        for alpha in (0.0, 2.0)
    )
    assert both - plain == pytest.approx(2 * mean(errors) / soft_temperature**2, rel=1e-4)


def further_of(further: ClassDistances) -> list[dict[int, float]]:
    rows = zip(further.classes.tolist(), further.distances.tolist(), strict=True)
    return [dict(zip(labels, distances, strict=True)) for labels, distances in rows]


def test_a_weight_of_the_distances_is_not_negative() -> None:
    with pytest.raises(ConfigError, match="alpha_dbr: found -0"):
        CompletedDBRLoss(alpha_dbr=-0.1)


@pytest.mark.parametrize("loss", [OneHotLoss(), CompactLoss(), CompletedDBRLoss()])
def test_gradients_of_the_other_kinds(loss: nn.Module) -> None:
    assert torch.autograd.gradcheck(lambda logits: loss(logits, FURTHER), LOGITS.double().requires_grad_())


def test_gradients_of_soft() -> None:
    teacher = LOGITS.flip(0).double()
    loss = SoftLoss(4.0)
    assert torch.autograd.gradcheck(lambda logits: loss(logits, BATCH, teacher), LOGITS.double().requires_grad_())


def test_a_pair_within_the_radius_gets_no_cross_entropy_gradient() -> None:
    logits = LOGITS.clone().requires_grad_()
    clipped = torch.tensor(cross_entropies(BATCH, LOGITS)) <= 0.4
    DBRLoss(alpha_dbr=0.0)(logits, BATCH).backward()
    assert logits.grad is not None
    assert torch.equal(logits.grad.abs().sum(1) == 0, clipped)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits_are_computed_in_float32(dtype: torch.dtype) -> None:
    """Large logits: in half precision itself the small distances would round away or overflow."""
    narrow = (LOGITS * 100).to(dtype)
    for loss in (DBRLoss(), DBRLoss(sce="target"), OneHotLoss(), CompactLoss(), CompletedDBRLoss()):
        result = loss(narrow, FURTHER)
        assert result.dtype == torch.float32
        assert torch.equal(result, loss(narrow.float(), FURTHER))
        assert torch.isfinite(result)
    assert torch.isfinite(SoftLoss()(narrow, BATCH, narrow.flip(0)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("loss", [DBRLoss(), DBRLoss(sce="target"), OneHotLoss(), CompactLoss(), CompletedDBRLoss()])
def test_autocast_leaves_the_loss_in_float32(loss: nn.Module, dtype: torch.dtype) -> None:
    """Under autocast the network's logits are narrow; the loss is that of the same logits without autocast."""
    network = nn.Linear(8, CLASSES, bias=False)
    inputs = torch.randn(len(BATCH), 8, generator=torch.Generator().manual_seed(5))
    with torch.autocast("cpu", dtype):
        logits = network(inputs)
        inside = loss(logits, FURTHER)
    assert logits.dtype == dtype
    assert inside.dtype == torch.float32
    assert torch.equal(inside, loss(logits, FURTHER))
    inside.backward()
    assert network.weight.grad is not None
    assert torch.isfinite(network.weight.grad).all()


@pytest.mark.parametrize("distance", get_args(Distance))
@pytest.mark.parametrize("sce", get_args(Sce))
def test_float32_gradients_are_those_of_float64(sce: Sce, distance: Distance) -> None:
    loss = DBRLoss(sce=sce, distance=distance)

    def gradient(logits: Tensor) -> Tensor:
        leaf = logits.clone().requires_grad_()
        loss(leaf, BATCH).backward()
        assert leaf.grad is not None
        return leaf.grad

    torch.testing.assert_close(gradient(LOGITS).double(), gradient(LOGITS.double()), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("distance", get_args(Distance))
@pytest.mark.parametrize("sce", get_args(Sce))
def test_dbr_compiles_to_one_graph(sce: Sce, distance: Distance) -> None:
    """No break in the graph; the backend runs the captured operators, so that no compiler is needed."""
    loss = DBRLoss(sce=sce, distance=distance)
    assert_same_when_compiled(loss, backend="aot_eager")


def test_completed_dbr_compiles_to_one_graph() -> None:
    assert_same_when_compiled(CompletedDBRLoss(), backend="aot_eager")


@pytest.mark.slow
@needs_compiler
def test_dbr_compiles_to_machine_code() -> None:
    assert_same_when_compiled(DBRLoss(), backend="inductor")


def assert_same_when_compiled(loss: nn.Module, backend: str) -> None:
    torch.compiler.reset()
    compiled = torch.compile(loss, fullgraph=True, backend=backend)
    plain, other = LOGITS.clone().requires_grad_(), LOGITS.clone().requires_grad_()
    expected, found = loss(plain, COMPLETED), compiled(other, COMPLETED)
    torch.autograd.backward([expected, found])
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(other.grad, plain.grad)


def test_gradients_under_ddp_are_those_of_the_whole_batch(tmp_path: Path) -> None:
    """Each process has a part of the pairs, all parts being equally large."""
    context = torch.multiprocessing.get_context("spawn")
    ranks = [context.Process(target=ddp_gradient, args=(rank, tmp_path)) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    assert [process.exitcode for process in ranks] == [0, 0]
    network = ddp_network()
    DBRLoss()(network(torch.eye(4, 8)), part_of_batch(0, 4)).backward()
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        torch.testing.assert_close(found, network.weight.grad)


def ddp_gradient(rank: int, folder: Path) -> None:
    """What one of two processes computes; it leaves the weights' gradient in `folder`."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    try:
        parallel = nn.parallel.DistributedDataParallel(ddp_network())
        mine = slice(2 * rank, 2 * rank + 2)
        DBRLoss()(parallel(torch.eye(4, 8)[mine]), part_of_batch(mine.start, mine.stop)).backward()
        torch.save(parallel.module.weight.grad, folder / f"{rank}.pt")
    finally:
        dist.destroy_process_group()


def ddp_network() -> nn.Linear:
    network = nn.Linear(8, CLASSES, bias=False)
    with torch.no_grad():
        network.weight.copy_(torch.arange(8.0 * CLASSES).reshape(CLASSES, 8).sin())
    return network


def part_of_batch(start: int, stop: int) -> DBRBatch:
    return DBRBatch(**{name: getattr(BATCH, name)[start:stop] for name in TENSORS})


def test_half_precision_gradients_are_finite() -> None:
    logits = (LOGITS * 100).half().requires_grad_()
    DBRLoss(sce="entropy")(logits, BATCH).backward()
    assert logits.grad is not None
    assert torch.isfinite(logits.grad).all()


def test_the_loss_falls_in_a_few_steps_of_training() -> None:
    logits = torch.zeros(5, CLASSES, requires_grad=True)
    optimizer = torch.optim.SGD([logits], lr=0.5)
    loss = DBRLoss()
    first = loss(logits, BATCH).item()
    for _ in range(30):
        optimizer.zero_grad()
        loss(logits, BATCH).backward()
        optimizer.step()
    assert loss(logits, BATCH).item() < 0.5 * first


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sce": "mean"}, "sce: found 'mean', expected one of sample, batch, target, entropy"),
        ({"distance": "l2"}, "distance: found 'l2', expected one of l1, huber, squared"),
        ({"radius": -0.1}, "radius: found -0.1"),
        ({"radius": 1.0, "sce": "target"}, "radius: found 1.0, expected less than 1"),
        ({"alpha_sce": -1}, "alpha_sce: found -1"),
        ({"alpha_dbr": -1}, "alpha_dbr: found -1"),
        ({"temperature": 0}, "temperature: found 0"),
        ({"alpha_sce": math.nan}, "alpha_sce: found nan"),
    ],
)
def test_options_that_cannot_work_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        DBRLoss(**options)  # type: ignore[arg-type]


def test_soft_refuses_a_temperature_of_zero() -> None:
    with pytest.raises(ConfigError, match="temperature: found 0"):
        SoftLoss(0)
    with pytest.raises(ConfigError, match="top: found 0"):
        SoftLoss(top=0)


@pytest.mark.parametrize("loss", [DBRLoss(), OneHotLoss(), CompactLoss(), CompletedDBRLoss()])
@pytest.mark.parametrize("shape", [(4, CLASSES), (5,), (5, CLASSES, 1)])
def test_logits_of_another_shape_are_refused(loss: nn.Module, shape: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match=r"expected \(5, classes\)"):
        loss(torch.zeros(shape), BATCH)


@pytest.mark.parametrize("loss", [DBRLoss(), OneHotLoss(), CompactLoss(), CompletedDBRLoss()])
def test_a_student_of_too_few_classes_is_refused(loss: nn.Module) -> None:
    highest = int(max(BATCH.label_org.max(), BATCH.label_aug.max()))
    with pytest.raises(ConfigError, match=f"logits of {highest} classes, but the batch names class {highest}"):
        loss(torch.zeros(5, highest), BATCH)


@pytest.mark.parametrize("part", ["prior_org", "prior_aug", "further"])
def test_a_student_without_a_class_that_a_label_is_completed_by_is_refused(part: str) -> None:
    """The pairs themselves are of the classes 0 to 2."""
    known, unknown = listed([[(3, 1.0)], [(3, 1.0)]]), listed([[(3, 1.0)], [(4, 1.0)]])
    batch = replace(
        make_batch([(0, 1), (2, 1)], [0.5, 0.5]),
        prior_org=unknown if part == "prior_org" else known,
        prior_aug=unknown if part == "prior_aug" else known,
        further=unknown if part == "further" else known,
    )
    for found in (lambda: CompletedDBRLoss()(torch.zeros(2, 4), batch), lambda: completed_labels(batch, 4)):
        with pytest.raises(ConfigError, match="4 classes, but the batch names class 4"):
            found()


def test_soft_refuses_teacher_logits_of_another_shape() -> None:
    with pytest.raises(ConfigError, match="teacher logits"):
        SoftLoss()(LOGITS, BATCH, LOGITS[:, :4])


def test_the_reference_agrees_with_torch() -> None:
    """The plain Python above against torch's own cross-entropy with class probabilities."""
    labels = F.one_hot(BATCH.label_org, CLASSES) * BATCH.lam[:, None]
    labels = labels + F.one_hot(BATCH.label_aug, CLASSES) * (1 - BATCH.lam[:, None])
    expected = F.cross_entropy(LOGITS, labels).item()
    assert mean(cross_entropies(BATCH, LOGITS)) == pytest.approx(expected, rel=1e-5)
