"""Passes as CUDA graphs, and a whole build on a GPU."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks.builder_throughput import refinement_settings
from benchmarks.student import StudentConfig, train_student
from builders.cam import ClassActivation
from builders.config import BuildConfig
from builders.discovery import Eyes
from builders.graphs import Graphed, Outputs, Pass, _Recording
from builders.label_refinement import PairTables
from builders.models import create_model
from builders.passes import Passes
from builders.pipeline import build
from builders.refinement import Objective, RefinedBatch, refine_batch
from builders.sources import load_source
from builders.teacher import save_checkpoint
from builders.train_teacher import train_teacher
from nrrdd_format.codebooks import MixTable, mix_codebook, view_codebook
from nrrdd_format.verify import verify_dataset

SETTINGS = refinement_settings(iterations=30, batch_size=100)
SIZE = 32
TABLES = PairTables(
    views=view_codebook(0, SIZE, (0.3, 1.0), count=32),
    flip=True,
    mixes=MixTable.from_entries(mix_codebook(0, SIZE, "both", count=64), SIZE),
)


def eyes(device: str, architecture: str = "resnet18-small-w16") -> Eyes:
    torch.manual_seed(0)
    model = create_model(architecture, 10, SIZE).eval().requires_grad_(False)
    model = model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return Eyes(activation=ClassActivation(model, SIZE), mean=(0.5,) * 3, std=(0.25,) * 3, device=torch.device(device))


def refine(passes: Passes, count: int, batch: int) -> RefinedBatch:
    images = np.random.default_rng(batch).integers(0, 256, (count, 3, SIZE, SIZE), np.uint8)
    labels = np.arange(count) % 10
    return refine_batch(images, labels, passes, tables=TABLES, seed=0, batch=batch, on_steps=lambda steps, terms: None)


def doubled(values: Tensor, more: Tensor | None) -> Outputs:
    return (values * 2 if more is None else values * 2 + more,)


def test_elsewhere_than_on_a_gpu_nothing_is_recorded() -> None:
    graphed = Graphed(torch.device("cpu"))
    assert graphed(doubled, torch.ones(2), None)[0].tolist() == [2, 2]
    assert graphed(doubled, torch.ones(2), torch.ones(2))[0].tolist() == [3, 3]


class _NoGraph:
    def replay(self) -> None:
        """Leaves the outputs as they are."""


def test_a_recording_keeps_no_history_of_its_inputs() -> None:
    """Pixels under jitter have one, and it would grow with every step."""
    fixed = torch.zeros(2)
    recording = _Recording(graph=_NoGraph(), inputs=(fixed, None), outputs=(fixed,))  # type: ignore[arg-type]
    given = torch.ones(2, requires_grad=True) * 3
    assert recording.replay((given, None))[0].tolist() == [3, 3]
    assert not fixed.requires_grad


@pytest.mark.gpu
def test_a_recording_serves_every_input_of_its_shape() -> None:
    graphed = Graphed(torch.device("cuda"))
    first = graphed(doubled, torch.full((2,), 1.0, device="cuda"), None)[0]
    second = graphed(doubled, torch.full((2,), 2.0, device="cuda"), None)[0]
    other = graphed(doubled, torch.full((3,), 3.0, device="cuda"), torch.ones(3, device="cuda"))[0]
    assert [each.tolist() for each in (first, second, other)] == [[2, 2], [4, 4], [7, 7, 7]]


@pytest.mark.gpu
def test_recordings_share_their_memory() -> None:
    """Each needs 64 MiB meanwhile; what the first has taken serves all."""
    torch.cuda.empty_cache()
    graphed, before = Graphed(torch.device("cuda")), torch.cuda.memory_reserved()
    taken = []
    for number in range(4):
        graphed(_wide(number), torch.ones(2, device="cuda"))
        torch.cuda.empty_cache()
        taken.append(torch.cuda.memory_reserved() - before)
    assert taken[0] >= 64 << 20 and taken[-1] < 1.5 * taken[0]


def _wide(number: int) -> Pass:
    def spread(values: Tensor) -> Outputs:
        return ((values.repeat(1 << 23) + number).sum()[None],)

    return spread


@pytest.mark.gpu
def test_what_cannot_be_recorded_still_runs_and_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    def looks(values: Tensor) -> Outputs:
        return (values * 2 if float(values.sum()) > 0 else values,)

    graphed = Graphed(torch.device("cuda"))
    for value, expected in ((1.0, 2.0), (-1.0, -1.0)):
        assert graphed(looks, torch.full((2,), value, device="cuda"))[0].tolist() == [expected] * 2
    assert capsys.readouterr().err.count("cannot be recorded as a CUDA graph") == 1
    assert graphed(doubled, torch.ones(2, device="cuda"), None)[0].tolist() == [2, 2]
    assert torch.cuda.current_stream() == torch.cuda.default_stream()


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("jitter", [False, True])
def test_graphs_give_what_the_kernels_alone_give(
    precision: str, compile: bool, jitter: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gradients of both passes over several steps, for two sizes of batches in turn."""
    settings = replace(SETTINGS, precision=precision, compile=compile, jitter=jitter)  # type: ignore[arg-type]
    watched = eyes("cuda")
    graphed, alone = Passes(watched, settings), Passes(watched, settings)
    monkeypatch.setattr(alone, "_graphed", lambda function, *inputs: function(*inputs))
    for count in (12, 7, 12):
        images = np.random.default_rng(count).integers(0, 256, (count, 3, SIZE, SIZE), np.uint8)
        targets = torch.arange(count, device="cuda") % 10
        pixels = watched.see(images).contiguous(memory_format=torch.channels_last)
        for step in range(3):
            found, expected = (_gradient(passes, pixels, targets, step) for passes in (graphed, alone))
            assert float(torch.cosine_similarity(found, expected, dim=0)) > (0.999 if precision == "fp32" else 0.98)


def _gradient(passes: Passes, pixels: Tensor, targets: Tensor, step: int) -> Tensor:
    with passes.batchnorm:
        return Objective(passes, targets, TABLES, 0, 0).gradient(pixels, step)[0].double().flatten()


@pytest.mark.gpu
def test_refinement_on_a_gpu_comes_to_what_a_cpu_comes_to() -> None:
    on_gpu = [refine(passes, 12, batch) for passes in [Passes(eyes("cuda"), SETTINGS)] for batch in range(2)]
    on_cpu = [refine(passes, 12, batch) for passes in [Passes(eyes("cpu"), SETTINGS)] for batch in range(2)]
    for found, expected in zip(on_gpu, on_cpu, strict=True):
        assert found.losses == pytest.approx(expected.losses, rel=0.05)
        assert np.abs(found.images.astype(int) - expected.images).mean() < 4


@pytest.mark.gpu
@pytest.mark.parametrize("compile", [False, True])
def test_a_build_and_a_student_on_a_gpu(tmp_path: Path, compile: bool) -> None:
    source = load_source("digits", data_dir=None)
    trained = train_teacher(
        source, architecture="conv2-w16", epochs=4, batch_size=64, learning_rate=0.1, seed=0, device="cuda"
    )
    save_checkpoint(tmp_path / "teacher.pt", trained.model, "conv2-w16", source.class_names)
    build(
        BuildConfig(
            dataset="digits",
            out=tmp_path / "out",
            ipc=3,
            epochs=4,
            iterations=20,
            priors=3,
            further=2,
            teacher_checkpoint=tmp_path / "teacher.pt",
            device="cuda",
            compile=compile,
        )
    )
    assert not verify_dataset(tmp_path / "out")
    for labels in ("dbr", "dbr-completed", "soft"):
        config = StudentConfig(
            labels=labels,
            epochs=40,
            teacher_checkpoint=tmp_path / "teacher.pt" if labels == "soft" else None,
            device="cuda",
        )
        assert train_student(tmp_path / "out", source, config).top1 > 0.4
