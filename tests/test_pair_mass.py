"""The benchmark of what a pair's two distances leave unsaid."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import pair_mass
from benchmarks.pair_mass import _distances, _masses
from loaders import DBRBatch


def batch_of(label_org: list[int], label_aug: list[int], p: torch.Tensor) -> DBRBatch:
    """A batch whose distances are exactly those of the predictions p (B, K)."""
    org, aug = torch.tensor(label_org), torch.tensor(label_aug)
    return DBRBatch(
        images=torch.zeros(len(org), 3, 2, 2),
        label_org=org,
        label_aug=aug,
        lam=torch.full((len(org),), 0.5),
        distance_org=-p.gather(1, org[:, None]).squeeze(1).log(),
        distance_aug=-p.gather(1, aug[:, None]).squeeze(1).log(),
    )


def test_masses_count_one_class_once() -> None:
    p = torch.tensor([[0.4, 0.3, 0.1, 0.1, 0.05, 0.05], [0.4, 0.3, 0.1, 0.1, 0.05, 0.05]])
    found = _masses(batch_of([0, 2], [1, 2], p), p)
    torch.testing.assert_close(found, torch.tensor([[0.7, 0.25], [0.1, 0.8]]))


def test_a_label_is_no_distance_from_what_it_says_completely() -> None:
    even = torch.tensor([[0.5, 0.3, 0.1, 0.1]])
    torch.testing.assert_close(_distances(batch_of([0], [1], even), even), torch.zeros(1))
    uneven = torch.tensor([[0.5, 0.3, 0.15, 0.05]])
    rest = 0.1 * (torch.tensor(0.1 / 0.15).log() + torch.tensor(0.1 / 0.05).log())
    torch.testing.assert_close(_distances(batch_of([0], [1], uneven), uneven), rest[None])


@pytest.mark.slow
def test_the_command_reports_every_kind(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("sklearn")
    from benchmarks.cli import main as nrrdd

    teacher = tmp_path / "teacher.pt"
    train = f"teacher --dataset digits --architecture conv2-w8 --epochs 2 --out {teacher} --device cpu"
    assert nrrdd(train.split()) == 0
    command = (
        f"--dataset digits --teacher-checkpoint {teacher} --out {tmp_path / 'out'} --results {tmp_path / 'results'} "
        "--images random-real nrr nrr+lr --iterations 1 2 --alpha-lr 3 --stored-epochs 2 --seeds 0 --device cpu"
    )
    assert pair_mass.main(command.split()) == 0
    (result,) = (tmp_path / "results").glob("*.json")
    rows = json.loads(result.read_text())["datasets"]
    assert len(rows) == 1 + 2 + 2
    for row in rows:
        assert 0 < row["pair_mass"] < row["pair_mass"] + row["three_others"] <= 1
        assert row["kl"]["even"] > row["kl"]["3 further"] > 0
        assert row["kl"]["priors of 99"] == row["kl"]["priors"]  # ten classes have nine others
    assert "nrr+lr, 2 steps, α_lr 3" in capsys.readouterr().out
    assert result.with_suffix(".png").stat().st_size > 1000
