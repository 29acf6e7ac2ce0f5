"""The examples as a user starts them: stopped and started again, they end with the weights of a run without a stop."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.cli import main as nrrdd
from builders.cli import main as build_distilled

PAIRS = 20  # of an epoch of the dataset below
ENDLESS = "1000000"
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Handwritten digits, distilled with as little work as shows what happens to a batch."""
    folder = tmp_path_factory.mktemp("examples")
    teacher, out = folder / "teacher.pt", folder / "digits"
    assert nrrdd(f"teacher --dataset digits --architecture conv2-w8 --epochs 1 --out {teacher}".split()) == 0
    options = f"--ipc 2 --teacher-checkpoint {teacher} --min-teacher-top1 0 --iterations 1 --epochs 2 --out {out}"
    assert build_distilled(f"--dataset digits {options}".split()) == 0
    return out


@pytest.fixture
def examples(repository: Path) -> Path:
    return repository / "docs" / "examples"


def needs(package: str) -> None:
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed; it comes with the extra `examples`")


def start(repository: Path, command: Sequence[object]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *map(str, command)],
        cwd=repository,
        env=environment(repository),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def environment(repository: Path) -> dict[str, str]:
    paths = [str(repository), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONWARNINGS": "ignore"}


def finish(repository: Path, command: Sequence[object]) -> str:
    process = start(repository, command)
    output, _ = process.communicate(timeout=280)
    assert process.returncode == 0, output
    return output


def stop_once(process: subprocess.Popen[str], saved: Callable[[], bool], stop: Callable[[], None]) -> None:
    """Stops the process as soon as something is saved; fails if it ends by itself."""
    while not saved():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)
    stop()
    process.communicate(timeout=60)


def load(path: Path) -> dict[str, Any]:
    state: dict[str, Any] = torch.load(path, weights_only=True)
    return state


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_plain_goes_on_where_it_was_killed(repository: Path, examples: Path, dataset: Path, tmp_path: Path) -> None:
    def command(name: str, epochs: object) -> list[object]:
        options = ["--epochs", epochs, "--batch-size", 1, "--save-every", 1, "--checkpoint", tmp_path / name]
        return [examples / "plain.py", dataset, *options]

    stopped = tmp_path / "stopped.pt"
    process = start(repository, command(stopped.name, ENDLESS))
    stop_once(process, stopped.exists, process.kill)
    epochs = load(stopped)["loader"]["epoch"] + 1
    finish(repository, command(stopped.name, epochs))
    output = finish(repository, command("whole.pt", epochs))
    assert output.count(f"over {PAIRS} pairs") == epochs
    assert_same(load(stopped)["model"], load(tmp_path / "whole.pt")["model"])


def test_ddp_goes_on_where_it_was_stopped(repository: Path, examples: Path, dataset: Path, tmp_path: Path) -> None:
    def command(name: str, epochs: object) -> list[object]:
        options = ["--epochs", epochs, "--batch-size", 1, "--save-every", 1, "--checkpoint", tmp_path / name]
        return [*TORCHRUN, examples / "ddp.py", dataset, *options]

    stopped = tmp_path / "stopped.pt"
    process = start(repository, command(stopped.name, ENDLESS))
    stop_once(process, stopped.exists, process.terminate)
    epochs = load(stopped)["loader"]["epoch"] + 1
    finish(repository, command(stopped.name, epochs))
    output = finish(repository, command("whole.pt", epochs))
    assert output.count(f"over {PAIRS} pairs") == epochs
    assert_same(load(stopped)["model"], load(tmp_path / "whole.pt")["model"])


def test_lightning_goes_on_within_an_epoch(repository: Path, examples: Path, dataset: Path, tmp_path: Path) -> None:
    needs("lightning")

    def command(name: str, steps: int) -> list[object]:
        options = ["--epochs", 3, "--batch-size", 7, "--save-every", 4, "--max-steps", steps]
        return [examples / "with_lightning.py", dataset, *options, "--checkpoints", tmp_path / name]

    def saved(name: str, file: str = "final.ckpt") -> dict[str, Any]:
        return load(tmp_path / name / file)

    def epochs(output: str) -> list[tuple[int, int]]:
        """Number and pairs of every epoch, or rest of one, that was trained."""
        found = re.findall(r"epoch (\d+): loss [\d.]+ over (\d+) pairs", output)
        return [(int(epoch), int(pairs)) for epoch, pairs in found]

    finish(repository, command("stopped", 4))  # an epoch has three steps
    (loader,) = saved("stopped", "last.ckpt")["loops"]["fit_loop"]["state_dict"]["combined_loader"]
    assert (loader["epoch"], loader["pairs"]) == (1, 7)
    output = finish(repository, command("stopped", -1))
    assert epochs(output) == [(1, PAIRS - 7), (2, PAIRS)]
    output = finish(repository, command("whole", -1))
    assert epochs(output) == [(epoch, PAIRS) for epoch in range(3)]
    assert epochs(finish(repository, command("stopped", -1))) == []
    assert saved("stopped")["global_step"] == saved("whole")["global_step"] == 9
    assert_same(saved("stopped")["state_dict"], saved("whole")["state_dict"])


def test_accelerate_goes_on_where_it_was_killed(
    repository: Path, examples: Path, dataset: Path, tmp_path: Path
) -> None:
    needs("accelerate")
    load_file = pytest.importorskip("safetensors.torch").load_file

    def command(name: str, epochs: object) -> list[object]:
        options = ["--epochs", epochs, "--batch-size", 1, "--save-every", 1, "--checkpoints", tmp_path / name]
        return [examples / "with_accelerate.py", dataset, *options]

    def newest(name: str) -> Path | None:
        return max((tmp_path / name).glob("epoch-*"), default=None)

    process = start(repository, command("stopped", ENDLESS))
    stop_once(process, lambda: newest("stopped") is not None, process.kill)
    checkpoint = newest("stopped")
    assert checkpoint is not None
    epochs = load(checkpoint / "custom_checkpoint_0.pkl")["epoch"] + 1
    finish(repository, command("stopped", epochs))
    output = finish(repository, command("whole", epochs))
    assert output.count(f"over {PAIRS} pairs") == epochs
    stopped, whole = newest("stopped"), newest("whole")
    assert stopped is not None
    assert whole is not None
    assert stopped.name == whole.name
    assert_same(load_file(stopped / "model.safetensors"), load_file(whole / "model.safetensors"))
