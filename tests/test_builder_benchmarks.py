"""The builder's benchmarks: a short run of each through its command line, and the plain loop ours is timed beside."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks import build_scaling, builder_throughput, gradient_cosine, wide_build
from benchmarks.build_watch import STAGES, take_sample
from benchmarks.gradient_cosine import Decisions
from benchmarks.plain_recover import recover
from builders.image_sets import FolderImages

TINY = ["--size", "16", "--architecture", "conv2-w4", "--threads", "1", "--device", "cpu"]


def _record(folder: Path) -> tuple[dict[str, object], str]:
    (record,), (text,) = folder.glob("*.json"), folder.glob("*.md")
    return json.loads(record.read_text()), text.read_text()


def test_a_wide_build_reports_every_stage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shape = ["--classes", "12", "--per-class", "3", "--iterations", "2", "--batch-size", "4", "--epochs", "2"]
    assert wide_build.main([*TINY, *shape, "--out", str(tmp_path)]) == 0
    record, text = _record(tmp_path)
    stages = record["stages"]
    assert isinstance(stages, list)
    assert [stage["stage"] for stage in stages] == ["start", *STAGES]
    assert all(stage["seconds"] >= 0 for stage in stages)
    units = {stage["stage"]: stage["units"] for stage in stages}
    # Discovery: the images of 12 classes, and the flat maps counted in their one group.
    assert (units["scan"], units["discovery"], units["encoding"], units["relabeling"]) == (12, 13, 1, 2)
    assert stages[0]["peak_rss"] > 0 and stages[2]["disk"] > 12 * 3 * 16 * 16
    assert "| relabeling" in text and "| relabeling" in capsys.readouterr().out


def test_a_build_is_not_measured_over_another(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "dataset").mkdir()
    assert wide_build.main([*TINY, "--classes", "2", "--per-class", "1", "--folder", str(tmp_path)]) == 2
    assert "exists already" in capsys.readouterr().err


def test_a_sample_counts_this_process() -> None:
    sample = take_sample(os.getpid())
    assert sample.rss > 1e7 and sample.processor > 0
    assert take_sample(2**22 + 1).rss == 0


def test_builder_throughput_times_every_stage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shape = ["--batch-size", "4", "--iterations", "1", "--source-images", "20", "--repeats", "1", "--classes", "10"]
    assert builder_throughput.main([*TINY, *shape, "--out", str(tmp_path)]) == 0
    record, text = _record(tmp_path)
    timings = record["timings"]
    assert isinstance(timings, list)
    assert [timing["stage"] for timing in timings] == ["refinement"] * 5 + ["relabeling"] * 2 + ["discovery"] * 3
    assert all(timing["ms"] > 0 for timing in timings)
    cosines = record["gradient_cosines"]
    assert isinstance(cosines, dict) and list(cosines) == ["bf16"] and cosines["bf16"] > 0.9
    assert "hours, ImageNet-1k IPC 200" in text and "plain recovery" in capsys.readouterr().out


@pytest.mark.parametrize("source_images", [10, 190, 500])
def test_discovery_is_timed_by_the_images_it_looks_at(
    source_images: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = builder_throughput.make_parser().parse_args([*TINY, "--source-images", str(source_images)])
    bench, _ = builder_throughput.make_bench(options, tmp_path)
    looked_at: list[int] = []
    read = FolderImages.read

    def counted(images: FolderImages, index: int) -> np.ndarray:
        looked_at.append(index)
        return read(images, index)

    monkeypatch.setattr(FolderImages, "read", counted)
    cases = {case.name: case for case in builder_throughput.make_cases(bench) if case.stage == "discovery"}
    cases["nrrdd"].prepare()()
    assert sorted(looked_at) == list(range(cases["nrrdd"].items))
    assert source_images - 10 * 12 < cases["nrrdd"].items <= source_images


def test_rounding_turns_the_gradient_by_what_relus_decide(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An untrained deep network: far from float32's gradient, and close to it with float32's decisions."""
    options = ["--architecture", "resnet18-small-w8", "--size", "16", "--classes", "10", "--batch-size", "8"]
    assert gradient_cosine.main([*options, "--threads", "1", "--device", "cpu", "--out", str(tmp_path)]) == 0
    record, text = _record(tmp_path)
    rows, differing = record["rows"], record["differing_decisions"]
    assert isinstance(rows, list) and isinstance(differing, list)
    assert [row["term"] for row in rows] == ["ce", "bn", "lr", "all"]
    assert all(row["cosine"] < 0.99 and row["forced"] > 0.999 for row in rows)
    assert len(differing) == 17 and 0 < differing[0] < differing[-1] < 0.1
    assert "| all" in text and "| all" in capsys.readouterr().out


def test_decisions_change_nothing_until_they_are_forced() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1), nn.Conv2d(4, 4, 3))
    images, others = torch.randn(2, 3, 12, 12, requires_grad=True), torch.randn(2, 3, 12, 12)

    def gradient(decisions: Decisions | None) -> torch.Tensor:
        with decisions or torch.enable_grad():
            value = model(images).square().sum()
        return torch.autograd.grad(value, images)[0]

    kept, foreign = Decisions(), Decisions()
    torch.testing.assert_close(gradient(kept), gradient(None))
    mask, places = kept.made
    assert mask.dtype == torch.bool and places.dtype == torch.int64
    torch.testing.assert_close(gradient(Decisions(kept.made)), gradient(None))
    with foreign:
        model(others)
    assert not torch.allclose(gradient(Decisions(foreign.made)), gradient(None))


def test_the_plain_loop_lowers_its_loss_within_bounds() -> None:
    """A baseline that does not do the work would be no baseline."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 14 * 14, 3))
    model.eval().requires_grad_(False)
    images, labels = torch.randn(6, 3, 16, 16), torch.arange(6) % 3
    bounds = (torch.full((1, 3, 1, 1), -2.0), torch.full((1, 3, 1, 1), 2.0))
    found = recover(model, images, labels, 60, bounds)
    assert found.abs().max() <= 2
    before, after = (nn.functional.cross_entropy(model(pixels), labels) for pixels in (images, found))
    assert after < before


def test_scaling_compares_builds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = replace(
        build_scaling.BASE, classes=3, per_class=3, size=16, ipc=1, iterations=1, epochs=1, architecture="conv2-w4"
    )
    assert build_scaling.report(base, [("epochs", 2)], tmp_path) == 0
    record, text = _record(tmp_path)
    builds = record["builds"]
    assert isinstance(builds, dict) and list(builds) == ["base", "epochs ×2"]
    units = [build["stages"][5]["units"] for build in builds.values()]
    assert units == [1, 2]
    assert "| epochs ×2" in text and "| epochs ×2" in capsys.readouterr().out
