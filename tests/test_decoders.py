"""The decoders' benchmark: what it times gives the same pixels, and what it says comes from what it measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import decoders
from benchmarks.loader_data import encoded_picture
from nrrdd_format.decoding import decode_image


@pytest.mark.filterwarnings("ignore:The image decoding:DeprecationWarning")  # torchvision's, since 0.29
def test_the_decoders_agree() -> None:
    data = encoded_picture(0, 32)
    ours = decode_image(data, 32)
    assert ours.shape == (3, 32, 32)
    assert decoders._by_pillow(data).equal(ours)
    assert (decoders._by_torchvision(data).int() - ours.int()).abs().max() <= 2


def test_every_decoder_is_timed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert decoders.main(["--images", "2", "--repeats", "3", "--out", str(tmp_path)]) == 0
    (record,) = tmp_path.glob("*-decoders.json")
    microseconds = json.loads(record.read_text())["microseconds"]
    assert list(microseconds) == ["32", "224"]
    for times in microseconds.values():
        assert list(times) == [decoders.OURS, decoders.PILLOW, decoders.TORCHVISION]
        assert all(len(repeats) == 3 and min(repeats) > 0 for repeats in times.values())
    assert "| Pillow " in capsys.readouterr().out


def test_ratios_are_of_the_same_repeat() -> None:
    timings = {32: {decoders.OURS: [1.0, 4.0, 2.0], decoders.PILLOW: [2.0, 16.0, 4.0]}}
    assert decoders._cells(timings, decoders.OURS) == ["2.0", "0.50"]
