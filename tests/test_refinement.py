"""Non-critical region refinement: the mask, masked Adam, the BatchNorm loss, label refinement."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from compiler import needs_compiler
from mix_gradients import mix_gradients
from torch import nn
from torch._dynamo.utils import counters

from builders import refinement
from builders.batchnorm import BatchNormLoss, batch_statistics
from builders.cam import ClassActivation
from builders.compiled import compile_errors, compiled, in_one_order
from builders.config import LabelRefinement, RefinementSettings
from builders.discovery import Eyes
from builders.job import has_bfloat16
from builders.label_refinement import MixDraws, Mixes, PairTables, label_refinement_loss, partner_choices
from builders.models import create_model
from builders.passes import Passes
from builders.pipeline import COMPILING_PAYS, compile_notice, precision_notice
from builders.refinement import (
    REPORT_STEPS,
    MaskedAdam,
    Objective,
    RefinedBatch,
    jitter,
    learning_rate,
    refine_batch,
    step_mask,
)
from nrrdd_format.codebooks import MixTable, mix_codebook, view_codebook
from nrrdd_format.errors import ConfigError, TeacherError
from nrrdd_format.replay import apply_views, mix

SETTINGS = RefinementSettings(
    iterations=12,
    learning_rate=0.05,
    schedule="cosine",
    mask="non-critical",
    epsilon=0.5,
    cam_every=0,
    alpha_bn=0.01,
    alpha_lr=1.0,
    label_refinement="soft",
    label_refinement_views=True,
    jitter=False,
    batch_size=100,
    mix="cutmix",
)
TABLES = PairTables(
    views=view_codebook(0, 16, (0.3, 1.0), count=32),
    flip=True,
    mixes=MixTable.from_entries(mix_codebook(0, 16, "both", count=64), 16),
)


@pytest.fixture(scope="module")
def eyes() -> Eyes:
    torch.manual_seed(0)
    model = create_model("conv2-w8", 3, 16)
    with torch.no_grad():
        for _ in range(20):  # running statistics that a random image does not match
            model(torch.randn(8, 3, 16, 16) * 0.5 + 0.3)
    model.eval().requires_grad_(False)
    return Eyes(
        activation=ClassActivation(model, 16), mean=(0.5, 0.4, 0.3), std=(0.25, 0.2, 0.3), device=torch.device("cpu")
    )


def _initial(count: int = 6) -> tuple[np.ndarray, np.ndarray]:
    images = np.random.default_rng(1).integers(0, 256, (count, 3, 16, 16), np.uint8)
    return images, np.arange(count) % 3


def _refine(eyes: Eyes, settings: RefinementSettings, steps: list[dict[str, float]] | None = None) -> RefinedBatch:
    images, labels = _initial()

    def record(count: int, terms: dict[str, float]) -> None:
        if steps is not None:
            steps.append(terms)

    return refine_batch(images, labels, Passes(eyes, settings), tables=TABLES, seed=0, batch=0, on_steps=record)


def test_critical_pixels_never_change_and_others_do(eyes: Eyes) -> None:
    images, _ = _initial()
    mask = _mask(eyes)
    assert mask.min() == 0 and 0.45 < mask.max() <= 0.5
    changed = (_refine(eyes, SETTINGS).images != images).any(1)
    assert not changed[mask == 0].any()
    assert changed[mask > 0.25].mean() > 0.5


def _mask(eyes: Eyes, **changes: Any) -> np.ndarray:
    images, labels = _initial()
    mask = step_mask(eyes, eyes.see(images), torch.from_numpy(labels), replace(SETTINGS, **changes))
    assert mask.shape == (len(images), 1, 16, 16)
    return mask[:, 0].numpy()


def test_a_binary_mask_opens_the_same_pixels_and_all_opens_every_one(eyes: Eyes) -> None:
    np.testing.assert_array_equal(_mask(eyes, mask="binary"), _mask(eyes) > 0)
    assert (_mask(eyes, mask="all") == 1).all()
    images, _ = _initial()
    assert (_refine(eyes, replace(SETTINGS, mask="all")).images != images).any(1).all((1, 2)).any()


def test_a_new_activation_map_opens_other_pixels(eyes: Eyes) -> None:
    """A high rate changes the images so much that their maps move."""
    wide = replace(SETTINGS, learning_rate=2.0, epsilon=0.3)
    once, anew = _refine(eyes, wide).images, _refine(eyes, replace(wide, cam_every=4)).images
    closed = _mask(eyes, epsilon=0.3) == 0
    images, _ = _initial()
    assert not (once != images).any(1)[closed].any()
    assert (anew != images).any(1)[closed].any()
    np.testing.assert_array_equal(_refine(eyes, replace(wide, cam_every=12)).images, once)  # after the last step


def test_every_term_falls(eyes: Eyes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(refinement, "REPORT_STEPS", 1)
    steps: list[dict[str, float]] = []
    result = _refine(eyes, replace(SETTINGS, iterations=80), steps)
    assert set(steps[0]) == {"ce", "bn", "lr"}
    assert result.losses == steps[-1]
    assert steps[-1]["ce"] < 0.9 * steps[0]["ce"]
    assert steps[-1]["bn"] < steps[0]["bn"]
    assert np.mean([s["lr"] for s in steps[-10:]]) < np.mean([s["lr"] for s in steps[:10]])


@pytest.mark.parametrize(("iterations", "counts"), [(2, [2]), (25, [25]), (60, [25, 25, 10])])
def test_losses_are_reported_every_few_steps_and_at_the_end(eyes: Eyes, iterations: int, counts: list[int]) -> None:
    images, labels = _initial()
    reports: list[tuple[int, dict[str, float]]] = []
    passes = Passes(eyes, replace(SETTINGS, iterations=iterations))
    result = refine_batch(
        images, labels, passes, tables=TABLES, seed=0, batch=0, on_steps=lambda *args: reports.append(args)
    )
    assert [count for count, _ in reports] == counts and REPORT_STEPS == 25
    assert result.losses == reports[-1][1]


@pytest.mark.parametrize(("lost_at", "iterations", "told"), [(1, 30, "step 25 .*ce, bn, lr"), (11, 12, "step 12 ")])
def test_a_gradient_that_is_not_finite_ends_the_batch(eyes: Eyes, lost_at: int, iterations: int, told: str) -> None:
    """One value of one image is enough, at the very last step, too: the images would come out black."""
    passes = Passes(eyes, replace(SETTINGS, iterations=iterations))
    steps = iter(range(iterations))

    def lose(pixels: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        gradient, terms = Passes.unmixed(passes, pixels, targets)
        if next(steps) == lost_at:
            gradient[0, 0, 0, 0] = torch.nan
        return gradient, terms

    images, labels = _initial()
    reports: list[object] = []
    with pytest.MonkeyPatch.context() as patch, pytest.raises(TeacherError, match=f"batch 7: by {told}.*pixels; .*--"):
        patch.setattr(passes, "unmixed", lose)
        refine_batch(
            images, labels, passes, tables=TABLES, seed=0, batch=7, on_steps=lambda *args: reports.append(args)
        )
    assert reports == []


# ---- the faster ways to the gradient


def _plain_gradient(passes: Passes, pixels: torch.Tensor, targets: torch.Tensor, step: int) -> torch.Tensor:
    """The gradient as the loss is written down: one graph of both passes, float32."""
    pixels = pixels.detach().requires_grad_(True)
    settings, mixes = passes.settings, MixDraws(targets.numpy(), TABLES, 0, 0).draw(step, pixels.device)
    seen = jitter(pixels, 0, 0, step, flip=True) if settings.jitter else pixels
    logits, batchnorm = passes.batchnorm(seen)
    loss = nn.functional.cross_entropy(logits, targets) + settings.alpha_bn * batchnorm
    loss = loss + settings.alpha_lr * label_refinement_loss(passes.model, seen, targets, mixes, "soft")
    (gradient,) = torch.autograd.grad(loss, pixels)
    return gradient


@pytest.mark.parametrize("jittered", [False, True])
def test_two_passes_give_the_gradient_of_one_graph(eyes: Eyes, jittered: bool) -> None:
    images, labels = _initial()
    pixels, targets = eyes.see(images), torch.from_numpy(labels)
    passes = Passes(eyes, replace(SETTINGS, jitter=jittered))
    objective = Objective(passes, targets, TABLES, 0, 0)
    with passes.batchnorm:
        for step in range(3):
            gradient, _ = objective.gradient(pixels, step)
            expected = _plain_gradient(passes, pixels, targets, step)
            torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-7)


def _trained(architecture: str) -> nn.Module:
    """A network that tells which of three colours a noisy image leans to."""
    torch.manual_seed(0)
    model = create_model(architecture, 3, 16)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(40):
        labels = torch.randint(3, (32,))
        images = torch.randn(32, 3, 16, 16) + nn.functional.one_hot(labels, 3)[:, :, None, None]
        loss = nn.functional.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return model.eval().requires_grad_(False)


@pytest.mark.parametrize(("architecture", "cosine"), [("conv3-w16", 0.99), ("resnet18-small-w8", 0.97)])
def test_bfloat16_gradients_point_where_float32_ones_do(architecture: str, cosine: float) -> None:
    """At every step of a run, and images that end close together.

    The less a network is trained and the more layers it has, the more the roundings grow;
    `benchmarks.gradient_cosine` reports the cosine of a teacher, and what turns it.
    """
    activation = ClassActivation(_trained(architecture), 16)
    wide = Eyes(activation=activation, mean=(0.5, 0.4, 0.3), std=(0.25, 0.2, 0.3), device=torch.device("cpu"))
    images, labels = _initial(12)
    pixels, targets = wide.see(images), torch.from_numpy(labels)
    half = replace(SETTINGS, precision="bf16")
    adam = _adam(pixels, torch.ones(1), SETTINGS)
    for step in range(SETTINGS.iterations):
        (gradient, terms), (close, near) = (
            _gradient(Passes(wide, settings), pixels, targets, step) for settings in (SETTINGS, half)
        )
        assert close.dtype == torch.float32 and near["bn"].dtype == torch.float32
        assert float(torch.cosine_similarity(gradient.flatten(), close.flatten(), dim=0)) >= cosine
        assert all(float(near[name]) == pytest.approx(float(terms[name]), rel=0.03) for name in terms)
        pixels = adam.step(pixels, gradient, step)
    ends = [_refine(wide, settings).images.astype(int) for settings in (SETTINGS, half)]
    assert 0 < np.abs(ends[0] - ends[1]).mean() < 2  # of 255


def _gradient(
    passes: Passes, pixels: torch.Tensor, targets: torch.Tensor, step: int
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    with passes.batchnorm:
        return Objective(passes, targets, TABLES, 0, 0).gradient(pixels, step)


def _adam(pixels: torch.Tensor, mask: torch.Tensor, settings: RefinementSettings) -> MaskedAdam:
    """Without bounds."""
    return MaskedAdam(pixels, mask, (torch.tensor(-torch.inf), torch.tensor(torch.inf)), settings)


def test_no_iterations_leave_the_images_as_they_are(eyes: Eyes) -> None:
    result = _refine(eyes, replace(SETTINGS, iterations=0))
    np.testing.assert_array_equal(result.images, _initial()[0])
    assert result.losses == {}


def test_the_same_seed_gives_the_same_images_and_settings_matter(eyes: Eyes) -> None:
    base = _refine(eyes, SETTINGS).images
    np.testing.assert_array_equal(base, _refine(eyes, SETTINGS).images)
    changes = (
        {"alpha_lr": 0.0},
        {"alpha_bn": 1.0},
        {"schedule": "constant"},
        {"label_refinement": "pair"},
        {"jitter": True},
        {"epsilon": 0.9},
    )
    for change in changes:
        assert (_refine(eyes, replace(SETTINGS, **change)).images != base).any(), change


def test_unmasked_adam_is_torchs_adam() -> None:
    torch.manual_seed(0)
    start, gradients = torch.randn(4, 5), torch.randn(6, 4, 5)
    settings = replace(SETTINGS, schedule="constant")
    ours, mine = _adam(start, torch.ones(4, 1), settings), start.clone()
    theirs = start.clone().requires_grad_(True)
    adam = torch.optim.Adam([theirs], lr=0.05, betas=(0.5, 0.9))
    for step, gradient in enumerate(gradients):
        mine = ours.step(mine, gradient, step)
        theirs.grad = gradient.clone()
        adam.step()
    torch.testing.assert_close(mine, theirs.detach())


def test_the_mask_scales_the_step_not_the_gradient() -> None:
    """With the mask on the gradient both rows would move alike: Adam divides the factor away."""
    start = torch.zeros(2, 3)
    adam = _adam(start, torch.tensor([[0.5], [0.1]]), replace(SETTINGS, schedule="constant"))
    moved = adam.step(start, torch.ones(2, 3), 0)
    torch.testing.assert_close(moved, torch.tensor([[-0.025], [-0.005]]).expand(2, 3))


def test_the_cosine_schedule_falls_from_the_full_rate_towards_zero() -> None:
    rates = [learning_rate(SETTINGS, step) for step in range(12)]
    assert rates[0] == 0.05 and rates[6] == pytest.approx(0.025) and rates[-1] < 0.001
    assert rates == sorted(rates, reverse=True)


def test_the_batchnorm_loss_is_its_definition(eyes: Eyes) -> None:
    torch.manual_seed(0)
    first, convolution, second = nn.BatchNorm2d(3), nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2)
    model = nn.Sequential(first, convolution, second).eval()
    images = torch.randn(5, 3, 4, 4)
    with BatchNormLoss(model, first_factor=10.0) as batchnorm:
        model(images * 7)  # not measured: must not count
        logits, found = batchnorm(images)
        model(images * 7)
    torch.testing.assert_close(logits, model(images))
    inner = convolution(first(images))
    expected = torch.zeros(())
    for factor, x, layer in ((10, images, first), (1, inner, second)):
        mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=False)
        assert layer.running_mean is not None and layer.running_var is not None
        expected = expected + factor * ((mean - layer.running_mean).norm() + (var - layer.running_var).norm())
    torch.testing.assert_close(found, expected)


def _torchs_statistics(features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return features.mean((0, 2, 3)), features.var((0, 2, 3), unbiased=False)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_statistics_gradient_is_torchs(layout: torch.memory_format) -> None:
    torch.manual_seed(0)
    features = (torch.randn(4, 5, 3, 3, dtype=torch.float64) + 1).contiguous(memory_format=layout).requires_grad_()
    assert torch.autograd.gradcheck(batch_statistics, features.double())
    ours, theirs = (
        torch.autograd.grad(mean.square().sum() + variance.exp().sum(), features)[0]
        for mean, variance in (batch_statistics(features), _torchs_statistics(features))
    )
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_statistics_are_float32_and_exact_whatever_the_features(
    dtype: torch.dtype, layout: torch.memory_format
) -> None:
    """Rounded to bfloat16 they would be off by up to 0.4 %; one pass over squares would lose a variance by a mean."""
    torch.manual_seed(0)
    features = torch.randn(64, 3, 16, 16) * 0.5 + torch.tensor([0.1, 1.0, 9.0])[:, None, None]
    features = features.to(dtype).contiguous(memory_format=layout)
    for found, exact in zip(batch_statistics(features), _torchs_statistics(features.double()), strict=True):
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), exact, rtol=1e-3, atol=1e-5)


def test_hooks_are_gone_afterwards() -> None:
    model = nn.Sequential(nn.BatchNorm2d(3))
    with BatchNormLoss(model, 10.0):
        assert model[0]._forward_pre_hooks
    assert not model[0]._forward_pre_hooks


def test_partners_are_of_another_class_where_possible_and_never_oneself() -> None:
    choices = partner_choices(np.array([0, 0, 1, 2]))
    assert [c.tolist() for c in choices] == [[2, 3], [2, 3], [0, 1, 3], [0, 1, 2]]
    assert [c.tolist() for c in partner_choices(np.array([4, 4, 4]))] == [[1, 2], [0, 2], [0, 1]]


@pytest.mark.parametrize("kind", ["soft", "pair"])
def test_label_refinement_is_its_definition(kind: LabelRefinement) -> None:
    """A model that ignores its input: the loss depends on the labels and λ alone."""

    class Constant(nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return torch.log(torch.tensor([0.5, 0.3, 0.2])).repeat(len(images), 1)

    targets, swapped = torch.tensor([0, 1]), torch.tensor([1, 0])
    whole, unflipped = None, torch.zeros(2) > 0
    mixes = Mixes(
        view=whole,
        flip=unflipped,
        aug=swapped,
        is_cutmix=torch.zeros(2) > 0,
        box=torch.zeros(2, 4),
        lam=torch.full((2,), 0.25),
    )
    loss = label_refinement_loss(Constant(), torch.zeros(2, 3, 8, 8), targets, mixes, kind)
    soft = -np.mean([0.25 * np.log(a) + 0.75 * np.log(b) for a, b in ((0.5, 0.3), (0.3, 0.5))])
    assert float(loss) == pytest.approx(soft if kind == "soft" else -np.log(0.8))


def test_label_refinement_sees_views(eyes: Eyes) -> None:
    """The loss is that of the views mixed whole, and pixels that no view shows get no gradient."""
    pixels, targets = torch.rand(2, 3, 16, 16, requires_grad=True), torch.tensor([0, 1])
    box, flips = torch.tensor([[0, 0, 8, 8], [4, 6, 8, 10]]), torch.tensor([True, False])
    half = torch.full((2,), 0.5)
    mixes = Mixes(
        view=box, flip=flips, aug=torch.tensor([1, 0]), is_cutmix=torch.zeros(2) > 0, box=torch.zeros(2, 4), lam=half
    )
    model = eyes.activation.model
    loss = label_refinement_loss(model, pixels, targets, mixes, "soft")
    seen = apply_views(pixels, box, flips)
    whole = label_refinement_loss(model, seen, targets, replace(mixes, view=None), "soft")
    assert torch.isclose(loss, whole)
    (gradient,) = torch.autograd.grad(loss, pixels)
    shown = torch.zeros(2, 16, 16, dtype=torch.bool)
    shown[0, :8, :8], shown[1, 4:12, 6:] = True, True
    assert not gradient.abs().amax(1)[~shown].any()
    assert gradient.abs().amax(1)[shown].gt(0).float().mean() > 0.9


def test_views_and_flips_are_drawn_from_the_tables_anew_in_every_step() -> None:
    labels, device = np.arange(64) % 4, torch.device("cpu")
    draws = MixDraws(labels, TABLES, 0, 0)
    first, second = draws.draw(0, device), draws.draw(1, device)
    assert first.view is not None and second.view is not None and TABLES.views is not None
    known = {tuple(view) for view in TABLES.views.tolist()}
    assert {tuple(view) for view in first.view.tolist()} <= known
    assert (first.view != second.view).any() and (first.flip != second.flip).any()
    assert 0.25 < first.flip.float().mean() < 0.75
    again = MixDraws(labels, TABLES, 0, 0).draw(0, device).view
    assert again is not None and torch.equal(first.view, again)
    assert not MixDraws(labels, replace(TABLES, flip=False), 0, 0).draw(0, device).flip.any()
    whole = MixDraws(labels, replace(TABLES, views=None), 0, 0).draw(0, device)
    assert whole.view is None
    assert torch.equal(whole.aug, first.aug)


def test_gradients_flow_through_the_mix_to_both_images(eyes: Eyes) -> None:
    pixels, targets = torch.rand(2, 3, 16, 16, requires_grad=True), torch.tensor([0, 1])
    mixes = MixDraws(targets.numpy(), replace(TABLES, views=None, mixes=MixTable.from_entries([0.5], 16)), 0, 0).draw(
        0, pixels.device
    )
    loss = label_refinement_loss(eyes.activation.model, pixels, targets, mixes, "soft")
    (gradient,) = torch.autograd.grad(loss, pixels)
    assert (gradient.abs().amax((1, 2, 3)) > 0).all()


def test_jitter_keeps_the_shape_and_differs_from_step_to_step() -> None:
    pixels = torch.rand(2, 3, 16, 16)
    first, second = (jitter(pixels, 0, 0, step, flip=True) for step in (0, 1))
    assert first.shape == pixels.shape
    assert (first != second).any()
    assert torch.equal(first, jitter(pixels, 0, 0, 0, flip=True))


def test_jitter_mirrors_images_only_where_views_may_be_flipped() -> None:
    """A mirrored digit shows another class, or none."""
    ramp = torch.arange(16.0).expand(1, 3, 16, 16)

    def mirrored(flip: bool) -> list[bool]:
        rises = [(jitter(ramp, 0, 0, step, flip=flip).diff(dim=-1) >= 0).float().mean() for step in range(12)]
        return [float(share) < 0.5 for share in rises]

    assert not any(mirrored(False)) and 0 < sum(mirrored(True)) < 12


def test_pixels_stay_in_range(eyes: Eyes) -> None:
    """A huge learning rate drives pixels to black and white, not beyond (uint8 would wrap around)."""
    images = _refine(eyes, replace(SETTINGS, learning_rate=50.0, schedule="constant", epsilon=1.0)).images
    share_at_ends = np.isin(images, (0, 255)).mean()
    assert share_at_ends > 0.5


# ---- compiled

PASSES_AND_STEP = 3
"""Graphs of a build: the unmixed pass, the mixed one, Adam's step."""


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    """Nothing compiled yet, and counters at zero."""
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def _graphs() -> int:
    return int(counters["stats"]["unique_graphs"])


def _refine_batch(passes: Passes, count: int, batch: int) -> RefinedBatch:
    images, labels = _initial(count)
    return refine_batch(images, labels, passes, tables=TABLES, seed=0, batch=batch, on_steps=lambda steps, terms: None)


@needs_compiler
def test_compiled_steps_are_those_that_are_not_and_compiled_once(eyes: Eyes, fresh_compiler: None) -> None:
    """Over all steps of several batches, whose hooks and draws are new each time."""
    plain, fast = (Passes(eyes, replace(SETTINGS, compile=compile)) for compile in (False, True))
    expected, found = (_refine_batch(passes, 6, batch=0) for passes in (plain, fast))
    assert found.losses == pytest.approx(expected.losses, rel=1e-3)
    assert np.abs(found.images.astype(int) - expected.images).mean() < 0.1
    assert _graphs() == PASSES_AND_STEP and not counters["graph_break"]

    images, labels = _initial(6)
    pixels, targets = eyes.see(images).contiguous(memory_format=torch.channels_last), torch.from_numpy(labels)
    for step in range(3):
        gradient, close = (_gradient(passes, pixels, targets, step)[0] for passes in (plain, fast))
        assert close.dtype == torch.float32 and close.stride() == pixels.stride()
        assert float(torch.cosine_similarity(gradient.double().flatten(), close.double().flatten(), dim=0)) >= 0.9999

    first, again = (_refine_batch(fast, 6, batch=2).images for _ in range(2))
    assert _graphs() == PASSES_AND_STEP
    np.testing.assert_array_equal(first, again)


@needs_compiler
def test_a_compiled_gradient_is_the_same_every_time(fresh_compiler: None) -> None:
    """With several threads, too, and where an image stands in many pairs: a build gives the same bytes again."""
    with in_one_order(True):
        gradients = mix_gradients(compiled(mix, True))
    assert all(torch.equal(gradient, gradients[0]) for gradient in gradients)


def test_the_compiled_pass_of_mixed_images_sums_in_one_order(eyes: Eyes, monkeypatch: pytest.MonkeyPatch) -> None:
    orders: list[bool] = []

    def recorded(function: Callable[..., Any], wanted: bool) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            orders.append(torch.are_deterministic_algorithms_enabled())
            return function(*arguments)

        return call

    monkeypatch.setattr("builders.passes.compiled", recorded)
    images, labels = _initial()
    for compile in (False, True):
        _gradient(Passes(eyes, replace(SETTINGS, compile=compile)), eyes.see(images), torch.from_numpy(labels), 0)
    assert orders == [False, False, False, True]  # of each, the pass of the images as they are comes first
    assert not torch.are_deterministic_algorithms_enabled()


def test_what_cannot_be_compiled_as_a_whole_is_refused_in_one_line(fresh_compiler: None) -> None:
    def branches(values: torch.Tensor) -> torch.Tensor:
        return values + 1 if values.sum() > 0 else values

    with pytest.raises(ConfigError, match=r"^--compile: .*without the option nothing is compiled$"), compile_errors():
        compiled(branches, True)(torch.ones(2))
    assert compiled(branches, False) is branches


def test_other_errors_stay_what_they_are() -> None:
    with pytest.raises(RuntimeError, match="out of memory"), compile_errors():
        raise RuntimeError("out of memory")


@pytest.mark.parametrize(
    ("compile", "device", "steps", "told"),
    [
        (True, "cpu", 1, "the first step compiles"),
        (True, "cuda", 0, None),
        (False, "cuda", COMPILING_PAYS, "(--compile) takes a minute"),
        (False, "cuda", COMPILING_PAYS - 1, None),
        (False, "cpu", COMPILING_PAYS, None),
    ],
)
def test_what_compiling_takes_or_would_save_is_said(compile: bool, device: str, steps: int, told: str | None) -> None:
    notice = compile_notice(replace(SETTINGS, compile=compile), torch.device(device), steps)
    assert notice is None if told is None else notice is not None and told in notice


@pytest.mark.parametrize("has", [True, False])
def test_a_gpu_that_only_emulates_bfloat16_is_left_out_or_named(has: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def supported(including_emulation: bool = True) -> bool:
        return has or including_emulation

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    gpu = torch.device("cuda")
    assert has_bfloat16(gpu) == has and not has_bfloat16(torch.device("cpu"))
    asked = replace(SETTINGS, precision="bf16")
    assert (precision_notice(asked, gpu, 10) is None) == has
    assert precision_notice(asked, gpu, 0) is None and precision_notice(SETTINGS, gpu, 10) is None
    assert precision_notice(asked, torch.device("cpu"), 10) is None
