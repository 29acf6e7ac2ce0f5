"""The throughput benchmark on a few small images: what every loader delivers, the rows' figures, the files it leaves.

Nothing here is fast or slow: no time is checked.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import loader_throughput as module
from benchmarks.loader_data import EPOCHS, Data, write_data
from benchmarks.loader_peers import (
    UNBOUNDED,
    Epoch,
    Setting,
    _Decoder,
    _FkdBatches,
    count_decodes,
    open_decoder,
    open_fkd,
    open_ours,
    open_ours_without_replay,
    open_webdataset,
    why_no_streaming,
)
from benchmarks.loader_throughput import main, make_rows, table
from benchmarks.loader_timing import Case, Measurement, measure, measure_all
from builders.fkd_layout import count_batches, count_epochs
from nrrdd_format.dataset import open_dataset
from nrrdd_format.verify import verify_dataset

IMAGES, BATCH = 20, 8


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Data:
    folder = tmp_path_factory.mktemp("throughput") / "data"
    return write_data(Data(folder=folder, size=16, images=IMAGES, batch=BATCH))


def setting(data: Data, device: str = "cpu") -> Setting:
    return Setting(data=data, workers=0, device=device)


def open_ours_from_cache(setting: Setting) -> Epoch:
    return open_ours(setting, cache_bytes=UNBOUNDED)


def test_the_same_images_lie_in_every_form(data: Data) -> None:
    assert verify_dataset(data.dataset) == []
    with open_dataset(data.dataset) as dataset:
        stored = [shard.image_bytes(k) for shard in dataset.shards for k in range(shard.images)]
    assert stored == [path.read_bytes() for path in data.image_files()]
    assert (count_epochs(data.soft_labels), count_batches(data.soft_labels, EPOCHS - 1)) == (EPOCHS, 3)


def test_a_picture_weighs_what_a_photograph_does(tmp_path: Path) -> None:
    big = write_data(Data(folder=tmp_path / "big", size=224, images=8, batch=8))
    sizes = [path.stat().st_size for path in big.image_files()]
    assert 15_000 < np.mean(sizes) < 20_000


@pytest.mark.parametrize("loader", [open_decoder, open_ours_from_cache, open_fkd, open_webdataset])
def test_every_loader_delivers_every_image_once_an_epoch(data: Data, loader: Callable[[Setting], Epoch]) -> None:
    epoch = loader(setting(data))
    for number in range(EPOCHS + 1):
        assert sorted(epoch(number)) == [4, 8, 8]


def test_without_a_device_only_the_replay_is_left_out(data: Data) -> None:
    epoch = open_ours_without_replay(setting(data, "meta"))
    assert sorted(epoch(0)) == [4, 8, 8]


def test_the_decoder_gives_the_images_themselves(data: Data) -> None:
    images = _Decoder([path.read_bytes() for path in data.image_files()], data.size)[[3, 1]]
    expected = np.asarray(Image.open(data.image_files()[1])).transpose(2, 0, 1)
    assert images.shape == (2, 3, 16, 16)
    assert np.abs(images[1].numpy().astype(int) - expected).max() <= 3


def test_the_fkd_loader_mixes_whole_batches(data: Data) -> None:
    images, logits = _FkdBatches(data)[1, 2]
    assert images.shape == (4, 3, 16, 16)
    assert images.dtype == torch.float32
    assert logits.shape == (4, 1000)


def test_decodes_a_pair(data: Data) -> None:
    assert 1 <= count_decodes(data, cache_bytes=0) <= 2
    assert count_decodes(data, cache_bytes=UNBOUNDED) == 0


def endless(setting: Setting) -> Epoch:
    def epoch(number: int) -> Iterator[int]:
        return iter([3, 4])

    return epoch


def test_a_fresh_process_measures_whole_epochs(data: Data) -> None:
    ((measurement,),) = measure_all([Case(name="x", open=open_decoder, setting=setting(data))], 1, 0.0)
    assert measurement.pairs_per_second > 0
    if sys.platform == "linux":
        assert measurement.peak_rss_mb is not None
        assert 50 < measurement.peak_rss_mb < 5000


def test_rows_are_medians_and_compare_like_with_like(data: Data) -> None:
    other = Data(folder=data.folder, size=16, images=5, batch=8)
    cases = [
        Case(name=module.DECODER, open=endless, setting=setting(data)),
        Case(name="ours", open=endless, setting=setting(data), decodes=1.5),
        Case(name=module.FKD, open=endless, setting=setting(data)),
        Case(name="ours", open=endless, setting=setting(other, "meta")),
    ]
    speeds = [(10.0, 40.0, 20.0), (9.0, 10.0, 11.0), (5.0, 5.0, 5.0), (7.0, 7.0, 7.0)]
    measured = [[Measurement(pairs_per_second=s, peak_rss_mb=s) for s in each] for each in speeds]
    decoder, ours, fkd, elsewhere = make_rows(cases, measured)
    assert (ours.pairs_per_second, ours.ratio_to_decode_only, ours.ratio_to_fkd) == (10.0, 0.5, 2.0)
    assert (ours.peak_rss_mb, ours.decodes_per_pair) == (11.0, 1.5)
    assert (decoder.ratio_to_decode_only, fkd.ratio_to_decode_only) == (1.0, 0.25)
    assert (elsewhere.ratio_to_decode_only, elsewhere.ratio_to_fkd, elsewhere.device) == (None, None, "none")
    assert "ours" in table([ours, elsewhere])


def in_this_process(cases: list[Case], repeats: int, seconds: float) -> list[list[Measurement]]:
    return [[measure(case, seconds)] * repeats for case in cases]


def test_the_command_leaves_json_markdown_and_a_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(module, "measure_all", in_this_process)
    options = ["--resolution", "16", "--images", "16", "--batch-size", "8", "--workers", "0", "--repeats", "2"]
    status = main([*options, "--seconds", "0", "--json", str(tmp_path / "x.json"), "--out", str(tmp_path / "results")])
    assert status == 0
    record = json.loads((tmp_path / "x.json").read_text())
    needed = {"name", "resolution", "device", "workers", "pairs_per_second", "ratio_to_decode_only", "peak_rss_mb"}
    assert all(needed <= row.keys() for row in record["rows"])
    assert {row["images"] for row in record["rows"]} == {8, 16, 64}
    assert {path.suffix for path in (tmp_path / "results").iterdir()} == {".json", ".md", ".png"}
    (markdown,) = (tmp_path / "results").glob("*.md")
    assert "decode only" in markdown.read_text()
    assert ("Skipped: MosaicML Streaming" in capsys.readouterr().out) == (why_no_streaming() is not None)


def test_streaming_is_skipped_with_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "streaming", None)
    reason = why_no_streaming()
    assert reason is not None
    assert "install mosaicml-streaming" in reason
    monkeypatch.setitem(sys.modules, "streaming", ModuleType("streaming"))
    assert why_no_streaming() is None
