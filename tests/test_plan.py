"""The dry run: it writes nothing, counts what is done, guesses sizes well, and finds what would stop a build."""

from __future__ import annotations

import os
import shutil
import time
from collections import namedtuple
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from builders import measurements
from builders import plan as planning
from builders.cli import EPILOG, main, parse
from builders.config import BuildConfig
from builders.job import Job, prepare
from builders.measurements import discovery_seconds
from builders.models import create_model
from builders.passes import Passes
from builders.pipeline import build
from builders.plan import StagePlan, plan, plan_stages
from builders.quantities import shown_duration, shown_size
from builders.ranks import Ranks
from builders.teacher import save_checkpoint
from nrrdd_format.errors import DataError

SIZE = 16
CLASSES = ("ape", "bee", "cat")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("source")
    rng = np.random.default_rng(0)
    for name in CLASSES:
        (root / "train" / name).mkdir(parents=True)
        for number in range(8):
            pixels = rng.integers(0, 256, (SIZE, SIZE, 3), np.uint8)
            Image.fromarray(pixels).save(root / "train" / name / f"{number}.png")
    torch.manual_seed(0)
    save_checkpoint(root / "teacher.pt", create_model("conv2-w8", 3, SIZE), "conv2-w8", CLASSES)
    return root


def options(source: Path, out: Path, *more: str) -> list[str]:
    return (
        f"--dataset imagefolder --data-dir {source}/train --size {SIZE} --ipc 4 --out {out} --epochs 6 --iterations 2 "
        f"--batch-size 4 --shard-images 6 --cycle 2 --device cpu --threads 1 --min-teacher-top1 0 "
        f"--teacher-checkpoint {source}/teacher.pt"
    ).split() + list(more)


def config(source: Path, out: Path, **changes: Any) -> BuildConfig:
    return replace(parse(options(source, out)), **changes)


def job(config: BuildConfig) -> Job:
    return prepare(config, Ranks(rank=0, world_size=1, local_rank=0))


def stages(config: BuildConfig) -> dict[str, StagePlan]:
    return {stage.name: stage for stage in plan_stages(job(config))}


def content(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in sorted(folder.rglob("*"))}


def test_a_plan_writes_nothing(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = content(tmp_path), content(source)
    assert main([*options(source, tmp_path / "deep" / "out"), "--plan"]) == 0
    assert (content(tmp_path), content(source)) == before
    printed = capsys.readouterr()
    lines = printed.out.splitlines()
    assert lines[0] == "12 images of 3 classes, 16 px, in 2 shards"
    assert [line.split()[:5] for line in lines[2:8]] == [
        ["scan", "3", "class", "0", "3"],
        ["discover", "3", "class", "0", "3"],
        ["refine", "3", "batch", "0", "3"],
        ["encode", "2", "shard", "0", "2"],
        ["relabel", "12", "epoch", "0", "12"],
        ["write", "2", "shard", "0", "2"],
    ]
    assert lines[-1] == "the build could start"
    assert "teacher conv2-w8: top-1" in printed.err


def test_what_is_done_is_counted_and_not_measured(source: Path, tmp_path: Path) -> None:
    work = tmp_path / "work"
    build(config(source, tmp_path / "few", epochs=2, work_dir=work))
    found = stages(config(source, tmp_path / "more", work_dir=work))
    assert {name: (stage.done, stage.left) for name, stage in found.items()} == {
        "scan": (3, 0),
        "discover": (3, 0),
        "refine": (3, 0),
        "encode": (2, 0),
        "relabel": (4, 8),
        "write": (0, 2),
    }
    assert found["refine"].seconds == 0 < found["relabel"].seconds
    refined = job(config(source, tmp_path / "more", work_dir=work)).refinement.path
    (refined / "batch-00001.npy").unlink()
    found = stages(config(source, tmp_path / "more", work_dir=work))
    assert (found["refine"].left, found["encode"].left) == (1, 0)
    assert found["refine"].seconds > 0
    assert stages(config(source, tmp_path / "priors", work_dir=work, priors=1))["priors"].left == 2


def test_discovery_waits_for_reading_by_all_its_processes(source: Path, tmp_path: Path) -> None:
    """Reading is said to take so long that nothing else counts; images of noise are not read."""
    reads = job(config(source, tmp_path / "out"))
    assert discovery_seconds(reads, 1e4, processes=1) == pytest.approx(1e4, rel=0.01)
    assert discovery_seconds(reads, 1e4, processes=4) == pytest.approx(2500, rel=0.01)
    makes = job(config(source, tmp_path / "out", init="noise", mask="all", label_refinement_views=False))
    assert discovery_seconds(makes, 1e4, processes=4) < 100


@pytest.mark.parametrize(
    ("device", "step", "warming", "expected"),
    [("cpu", 0.1, 0.0, 5 + 2000 * 0.1), ("cpu", 4.0, 0.0, (5 + 3 * 4) / 3 * 2000), ("cuda", 0.1, 60.0, 5 + 2000 * 0.1)],
)
def test_what_a_batch_costs_besides_its_steps_counts_once(
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    device: str,
    step: float,
    warming: float,
    expected: float,
) -> None:
    """Five seconds, and on a GPU a minute in the first run; where three steps take long, no more are tried."""
    clock, warmed = [0.0], list[int]()

    def refine(initial: object, labels: object, passes: Passes, **more: object) -> None:
        clock[0] += 5 + step * passes.settings.iterations + (0 if warmed else warming)
        warmed.append(passes.settings.iterations)

    monkeypatch.setattr(measurements, "refine_batch", refine)
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    here = replace(job(config(source, tmp_path / "out", iterations=2000)), device=torch.device(device))
    found = measurements.refinement_seconds(here, np.zeros((1, 3, SIZE, SIZE), np.uint8))
    assert found == pytest.approx(expected)


def test_sizes_are_near_those_of_the_build(source: Path, tmp_path: Path) -> None:
    """Noise compresses alike before and after refinement; distances of an untrained teacher are all the same."""
    here = config(source, tmp_path / "out", iterations=0, further=1, priors=2)
    found = stages(here)
    build(here)
    folders = {path.name.partition("-")[0]: path for path in (tmp_path / "out.work").iterdir() if path.is_dir()}
    for name, folder, pattern in (
        ("discover", "discovery", "*.npy"),
        ("refine", "refinement", "*.npy"),
        ("encode", "encoding", "*.msgpack"),
        ("relabel", "relabeling", "*.npy"),
        ("priors", "priors", "*.npy"),
    ):
        size = sum(path.stat().st_size for path in folders[folder].glob(pattern))
        assert found[name].total * found[name].bytes == pytest.approx(size, rel=0.1), name
    shards = sum(path.stat().st_size for path in (tmp_path / "out").glob("*.tar"))
    assert found["write"].total * found["write"].bytes == pytest.approx(shards, rel=0.1)


def test_a_finished_build(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    here = config(source, tmp_path / "out", epochs=1)
    build(here)
    before = content(tmp_path)
    assert plan(here)
    assert "already built from these settings" in capsys.readouterr().err
    assert content(tmp_path) == before


def test_given_images_are_only_labelled(source: Path, tmp_path: Path) -> None:
    command = (
        f"--dataset imagefolder --from-images {source}/train --out {tmp_path}/out --epochs 2 --shard-images 6 "
        f"--teacher-checkpoint {source}/teacher.pt --min-teacher-top1 0 --device cpu"
    )
    found = stages(parse(command.split()))
    assert list(found) == ["encode", "relabel", "write"]
    sizes = [path.stat().st_size for path in (source / "train").rglob("*.png")]
    assert found["encode"].total * found["encode"].bytes == pytest.approx(sum(sizes), rel=0.1)
    assert main([*command.split(), "--plan"]) == 0


def test_noise_needs_no_images(source: Path, tmp_path: Path) -> None:
    """Ten images of each class are made, of which eight real ones are there."""
    here = config(source, tmp_path / "out", init="noise", ipc=10, epochs=1, iterations=0)
    assert stages(here)["discover"].seconds > 0
    assert plan(here)
    assert build(here) == tmp_path / "out"


def test_examples_of_the_help_hold_no_runs_of_blanks() -> None:
    assert not [line for line in EPILOG.splitlines() if "  " in line.strip()]


# What would stop a build


def problems(command: list[str], capsys: pytest.CaptureFixture[str]) -> list[str]:
    assert main([*command, "--plan"]) == 2
    printed = capsys.readouterr()
    assert printed.out.splitlines()[-1] == "the build could not start"
    return [line for line in printed.err.splitlines() if line.startswith("problem: ")]


def test_all_problems_are_found_at_once(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "file").write_text("x")
    more = ("--min-teacher-top1", "1", "--ipc", "100", "--work-dir", f"{tmp_path}/file/work")
    found = problems(options(source, tmp_path / "out", *more), capsys)
    expected = ("something else is there already", "expected 100.0% or more", "too few usable images in 3 of 3 classes")
    assert len(found) == 4
    for line, words in zip(found, (*expected, "file is no folder"), strict=True):
        assert words in line


def test_what_is_in_the_way_is_said_before_anything_is_measured(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    build(config(source, tmp_path / "out", epochs=1))

    def measure(job: Job) -> list[StagePlan]:
        assert "problem: " in capsys.readouterr().err
        raise DataError("measured")

    monkeypatch.setattr(planning, "plan_stages", measure)
    with pytest.raises(DataError, match="measured"):
        plan(config(source, tmp_path / "out", epochs=2))


def test_a_folder_that_cannot_be_written_to(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: not str(path).endswith("shut"))
    (tmp_path / "shut").mkdir()
    found = problems(options(source, tmp_path / "shut" / "deep" / "out"), capsys)
    assert [line.partition(": ")[2] for line in found] == [
        f"{option}: {tmp_path}/shut cannot be written to; choose another" for option in ("--out", "--work-dir")
    ]


def test_a_disk_without_room(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(100, 80, 20))
    (line,) = problems(options(source, tmp_path / "out"), capsys)
    assert "20 bytes free on its disk, expected about" in line and "make room" in line


def test_what_leaves_nothing_to_plan_is_an_error(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*options(source, tmp_path / "out", "--teacher-checkpoint", "gone.pt"), "--plan"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: gone.pt: cannot be read")


def test_unusable_images(source: Path, tmp_path: Path) -> None:
    for name in CLASSES:
        (tmp_path / "train" / name).mkdir(parents=True)
        for number in range(8):
            (tmp_path / "train" / name / f"{number}.png").write_bytes(b"broken")
    broken = config(source, tmp_path / "out", data_dir=tmp_path / "train")
    with pytest.raises(DataError, match=r"none of 8 images is usable, the first being \w+/\d\.png"):
        plan_stages(job(broken))
    for number in range(8):
        (tmp_path / "train" / "cat" / f"{number}.png").write_bytes(
            (source / "train/cat" / f"{number}.png").read_bytes()
        )
    with pytest.raises(DataError, match="class ape: 0 of the first 8 training images are usable"):
        plan_stages(job(broken))


# Text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (0.0312, "0.031 s"),
        (9.94, "9.9 s"),
        (119, "119 s"),
        (120, "2.0 min"),
        (7200, "2.0 h"),
        (2e6, "23.1 d"),
        (1e8, "3.17 years"),
        (1e12, "3.17e+04 years"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert shown_duration(seconds) == text


@pytest.mark.parametrize(("count", "text"), [(0, "0 bytes"), (999, "999 bytes"), (1234, "1.23 KB"), (5e12, "5 TB")])
def test_sizes(count: float, text: str) -> None:
    assert shown_size(count) == text
