"""Bytes on disk: every byte has its place, both codings hold the same pairs, and soft labels are stored as FKD does."""

from __future__ import annotations

import json
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from make_dataset import make_tiny_dataset
from tiny_dataset import tiny_manifest, write_tiny

from benchmarks import footprint, storage_footprint
from benchmarks import grid as grids
from benchmarks.exact_distances import load_sample
from benchmarks.fkd_store import FkdStore
from benchmarks.footprint import (
    Footprint,
    epoch_pairs,
    fkd_bytes_per_pair,
    in_full_batches,
    measure,
    recode,
    recoded,
    soft_label_bytes,
)
from benchmarks.grid import Cell, Grid, build_config, image_kind
from benchmarks.model_shard import write_model_shard
from benchmarks.model_store import measure_import
from benchmarks.teacher import TeacherConfig
from builders.config import plan_settings
from builders.sources import load_source
from nrrdd_format.codebooks import quantize
from nrrdd_format.dataset import DistilledDataset, open_dataset
from nrrdd_format.errors import ConfigError
from nrrdd_format.manifest import MANIFEST_NAME
from nrrdd_format.pairs import Coding, PairRecords
from nrrdd_format.reshard import reshard_dataset
from nrrdd_format.verify import verify_dataset

IMAGES, EPOCHS = 12, 3


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> DistilledDataset:
    """Twelve images in two shards, three epochs."""
    return open_dataset(make_tiny_dataset(tmp_path_factory.mktemp("footprint") / "data"))


@pytest.mark.parametrize("length", [0, 100, 5000, 9000])
def test_a_shard_that_is_cut_off_ends_with_one_line(
    length: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = make_tiny_dataset(tmp_path / "data")
    shard = path / "shard-00001.tar"
    shard.write_bytes(shard.read_bytes()[:length])
    assert storage_footprint.main([str(path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {shard}: ") and error.count("\n") == 1


def test_every_byte_of_a_dataset_is_counted_once(dataset: DistilledDataset) -> None:
    footprint = measure(dataset)
    assert (footprint.images, footprint.pairs) == (IMAGES, IMAGES * EPOCHS)
    whole = sum(path.stat().st_size for path in dataset.path.iterdir())
    images = [shard.image_bytes(k) for shard in dataset.shards for k in range(shard.images)]
    in_tar = sum(512 + -(-len(data) // 512) * 512 for data in images)
    assert footprint.labels == whole - in_tar
    assert footprint.image_data == sum(map(len, images))
    assert footprint.manifest == (dataset.path / MANIFEST_NAME).stat().st_size


def test_more_pairs_take_records_and_more_images_take_headers() -> None:
    footprint = Footprint(
        images=10,
        pairs=30,
        image_data=0,
        image_members=53,
        records=90,
        shard_overhead=50,
        manifest=7,
        shards=2,
        manifest_entry=3,
    )
    assert footprint.labels == 147
    assert footprint.image_share == 53 / 200
    assert footprint.labels_at(10, 3) == 147
    assert footprint.labels_at(100, 6) == 3 * 600 + 500 + 7 + 18 * 3


@pytest.mark.parametrize("coding", ["explicit", "derived"])
@pytest.mark.parametrize("stored", ["explicit", "derived"])
def test_recoded_datasets_are_sound_and_hold_the_same_pairs(tmp_path: Path, stored: Coding, coding: Coding) -> None:
    original = open_dataset(make_tiny_dataset(tmp_path / "original", coding=stored))
    (tmp_path / "recoded").mkdir()
    recode(original, coding, tmp_path / "recoded")
    assert verify_dataset(tmp_path / "recoded") == []
    recoded = open_dataset(tmp_path / "recoded")
    assert recoded.manifest.records.coding == coding
    for before, after in zip(original.shards, recoded.shards, strict=True):
        assert before.image_bytes(0) == after.image_bytes(0)
        for epoch in range(EPOCHS):
            _assert_equal(before.records(epoch), after.records(epoch))


def test_a_dataset_that_lost_a_shard_is_recoded_under_its_own_numbers(tmp_path: Path) -> None:
    path = make_tiny_dataset(tmp_path / "data")
    manifest = json.loads((path / MANIFEST_NAME).read_text())
    del manifest["shards"][0]
    manifest["images"]["count"] = manifest["shards"][0]["images"]
    (path / MANIFEST_NAME).write_text(json.dumps(manifest))
    (tmp_path / "recoded").mkdir()
    recode(open_dataset(path), "derived", tmp_path / "recoded")
    assert verify_dataset(tmp_path / "recoded") == []


def test_foreign_pairs_are_measured_as_they_are(tmp_path: Path) -> None:
    path = write_tiny(tmp_path / "data", tiny_manifest(coding="verbatim"))
    assert storage_footprint.main([str(path), "--json", str(tmp_path / "rows.json")]) == 0
    names = [row["name"] for row in json.loads((tmp_path / "rows.json").read_text())["rows"]]
    assert [name for name in names if name.startswith("tiny")] == ["tiny IPC 1, verbatim"]


def _assert_equal(left: PairRecords, right: PairRecords) -> None:
    assert left.columns().keys() == right.columns().keys()
    for name, column in left.columns().items():
        np.testing.assert_array_equal(column, right.columns()[name])


def test_derived_records_are_smaller(dataset: DistilledDataset) -> None:
    explicit = measure(dataset)
    with recoded(dataset, "explicit") as same, recoded(dataset, "derived") as copy:
        assert same is dataset
        derived = measure(copy)
    assert derived.records <= explicit.records
    assert (derived.pairs, derived.image_data) == (explicit.pairs, explicit.image_data)


def test_pairs_drawn_by_another_rule_are_not_recoded(tmp_path: Path) -> None:
    path = make_tiny_dataset(tmp_path / "data")
    manifest = json.loads((path / MANIFEST_NAME).read_text())
    manifest["records"]["seed"] += 1
    (path / MANIFEST_NAME).write_text(json.dumps(manifest))
    with pytest.raises(ConfigError, match="shard 0, epoch 0"), recoded(open_dataset(path), "derived"):
        pass


@pytest.mark.parametrize(
    ("form", "columns", "dtype"), [("fp16", 7, torch.float16), ("fp32", 7, torch.float32), ("top5", 5, torch.float16)]
)
def test_soft_labels_have_the_layout_of_an_fkd_store(
    dataset: DistilledDataset, tmp_path: Path, form: str, columns: int, dtype: torch.dtype
) -> None:
    pairs = epoch_pairs(dataset)
    store = FkdStore(size=16, num_classes=7, form=form)  # type: ignore[arg-type]
    written = store.write_epoch(tmp_path, 4, pairs)
    path = tmp_path / "epoch_4" / "batch_0.tar"
    assert written == path.stat().st_size
    with torch.serialization.safe_globals(_numpy_scalars()):
        coordinates, flip, mix_index, lam, box, logits, *classes = torch.load(path, weights_only=True)
    assert (coordinates.shape, coordinates.dtype) == ((IMAGES, 4), torch.float32)
    assert float(coordinates.min()) >= 0 and float(coordinates.max()) <= 1
    assert (flip.dtype, mix_index.dtype) == (torch.bool, torch.int64)
    assert 0 <= lam <= 1 and len(box) == 4
    assert (logits.shape, logits.dtype) == ((IMAGES, columns), dtype)
    assert [each.dtype for each in classes] == ([torch.int16] if form == "top5" else [])


def _numpy_scalars() -> list[Any]:
    """What an FKD batch holds besides tensors: NumPy's numbers."""
    kinds = [type(np.dtype(kind)) for kind in (np.float64, np.int64)]
    return [np.float64(0).__reduce__()[0], np.dtype, *kinds]


def test_a_file_holds_a_hundred_pairs(dataset: DistilledDataset, tmp_path: Path) -> None:
    pairs = epoch_pairs(dataset).take(np.resize(np.arange(IMAGES), 201))
    written = FkdStore(size=16, num_classes=3).write_epoch(tmp_path, 0, pairs)
    files = sorted((tmp_path / "epoch_0").iterdir())
    assert [path.name for path in files] == ["batch_0.tar", "batch_1.tar", "batch_2.tar"]
    assert written == sum(path.stat().st_size for path in files)


def test_a_thousand_classes_in_fp16_take_what_is_published(dataset: DistilledDataset) -> None:
    """2000 B of logits, 25 B of parameters, and about 3 KB a file of 100 pairs at most."""
    each = fkd_bytes_per_pair(in_full_batches(epoch_pairs(dataset)), size=16, num_classes=1000)
    assert 2025 < each < 2060


def test_soft_labels_of_a_dataset_cover_all_epochs(dataset: DistilledDataset) -> None:
    each = fkd_bytes_per_pair(epoch_pairs(dataset), size=16, num_classes=3)
    assert soft_label_bytes(dataset) == pytest.approx(each * IMAGES * EPOCHS)


def test_the_command_prints_tables_and_writes_json_markdown_and_plot(
    dataset: DistilledDataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(dataset.path), "--json", str(tmp_path / "rows.json"), "--out", str(tmp_path / "results")]
    assert storage_footprint.main(arguments) == 0
    printed = capsys.readouterr().out
    assert "soft labels, fp16" in printed and "tiny IPC 4, derived" in printed
    record = json.loads((tmp_path / "rows.json").read_text())
    rows = {row["name"]: row for row in record["rows"]}
    fp16, ours = rows["soft labels, fp16"], rows["tiny IPC 4, explicit"]
    assert fp16["ratio_to_fkd_fp16"] == 1
    assert ours["ratio_to_fkd_fp16"] == pytest.approx(fp16["bytes_per_pair"] / ours["bytes_per_pair"])
    assert fp16["gigabytes"]["200"] == pytest.approx(fp16["bytes_per_pair"] * 60e6 / 1e9)
    assert rows["the teacher itself (ResNet-18)"]["gigabytes"]["10"] == pytest.approx(0.0468, rel=0.02)
    assert str(tmp_path) not in json.dumps(record)
    assert {path.suffix for path in (tmp_path / "results").iterdir()} == {".json", ".md", ".png"}


@pytest.mark.parametrize("coding", ["explicit", "derived"])
def test_the_model_shard_is_a_sound_dataset(coding: Coding, tmp_path: Path) -> None:
    sample = np.array([[0.5, 2.0], [3.0, 1.0]], np.float32)
    write_model_shard(tmp_path, coding, sample, epochs=2)
    assert verify_dataset(tmp_path) == []
    with open_dataset(tmp_path) as dataset:
        records = dataset.shards[0].records(1)
        levels = dataset.manifest.codebooks.distances
        assert len(dataset.manifest.dataset.class_names) == 1000 and len(records) == 1000
    drawn = {tuple(pair) for pair in zip(records.distance_org, records.distance_aug, strict=True)}
    assert drawn == {tuple(levels[quantize(pair, levels)]) for pair in sample.T}


def test_records_stay_within_their_budget(tmp_path: Path) -> None:
    """Twenty epochs of the storage benchmark's shard, with the distances of a teacher of a hundred classes."""
    sample = load_sample(storage_footprint.DISTANCES / f"{storage_footprint.SAMPLE}.npy")
    budgets: dict[Coding, float] = {"explicit": 3.4, "derived": 0.9}
    for coding, budget in budgets.items():
        (tmp_path / coding).mkdir()
        with open_dataset(write_model_shard(tmp_path / coding, coding, sample, epochs=20)) as dataset:
            footprint = measure(dataset)
        assert footprint.records / footprint.pairs <= budget


def test_a_resharded_dataset_is_measured_as_it_is(tmp_path: Path) -> None:
    path = make_tiny_dataset(tmp_path / "data", cycle=3, mix_group=2)
    reshard_dataset(path, 12, tmp_path / "joined")
    assert storage_footprint.main([str(tmp_path / "joined"), "--json", str(tmp_path / "rows.json")]) == 0
    names = [row["name"] for row in json.loads((tmp_path / "rows.json").read_text())["rows"]]
    assert [name for name in names if name.startswith("tiny")] == ["tiny IPC 4, explicit"]


def test_the_preset_measures_both_codings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage_footprint, "write_model_shard", partial(write_model_shard, epochs=2))
    monkeypatch.setattr(storage_footprint, "measure_import", partial(measure_import, epochs=1))
    (tmp_path / "samples").mkdir()
    monkeypatch.setattr(storage_footprint, "DISTANCES", tmp_path / "samples")
    facts = {"dataset": "d", "classes": 3, "teacher": "t", "teacher_top1": 0.5, "pairs": 4}
    facts |= {"mean_mass_of_both_classes": 0.25}
    np.save(tmp_path / "samples" / "four.npy", np.array([[0, 1, 2, 3], [3, 2, 1, 0]], np.float16))
    (tmp_path / "samples" / "four.json").write_text(json.dumps(facts))
    arguments = ["--preset", "imagenet1k-ipc200", "--distances", str(tmp_path / "samples" / "four.npy")]
    assert storage_footprint.main([*arguments, "--json", str(tmp_path / "rows.json")]) == 0
    record = json.loads((tmp_path / "rows.json").read_text())
    rows = {row["name"]: row for row in record["rows"]}
    explicit, derived = (rows[f"imagenet1k-ipc200, {coding}"] for coding in ("explicit", "derived"))
    assert derived["bytes_per_pair"] < explicit["bytes_per_pair"]
    assert explicit["gigabytes"]["200"] == pytest.approx(explicit["bytes_per_pair"] * 60e6 / 1e9)
    assert rows["one-hot: the class in the image's name"]["ratio_to_fkd_fp16"] is None
    assert record["distances"][0]["joint_entropy_bits"] == pytest.approx(2)
    imported = record["imported_store"]
    assert (imported["images"], imported["pairs"]) == (1000, 1000)
    assert 2000 < imported["store_bytes"] / imported["pairs"] < 2100
    assert imported["label_bytes"] < imported["store_bytes"] / 10


@pytest.mark.parametrize(
    ("content", "message"), [(b"no array", "not a sample of distances"), (None, "not a sample"), ((2, 3), "float64")]
)
def test_bad_samples_end_with_one_line(
    content: Any, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "sample.npy"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        np.save(path, np.zeros(content))
    assert storage_footprint.main(["--preset", "imagenet1k-ipc200", "--distances", str(path)]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_nothing_to_measure_ends_with_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert storage_footprint.main([]) == 2
    assert capsys.readouterr().err == (
        "error: nothing to measure: name a dataset's folder, or say --preset imagenet1k-ipc200\n"
    )


METHOD = {
    "name": "NRR-DD",
    "refinement": {"iterations": 5, "alpha_lr": 1.0, "label_refinement_views": True},
    "discovery": {"init": "cidd", "confidence": "highest"},
}


def test_top1_joins_the_bytes_of_the_images_it_was_measured_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recodes = Mock(wraps=footprint.recode)
    monkeypatch.setattr(footprint, "recode", recodes)
    path = make_tiny_dataset(tmp_path / "data")
    manifest = json.loads((path / MANIFEST_NAME).read_text())
    manifest["method"] = METHOD
    (path / MANIFEST_NAME).write_text(json.dumps(manifest))
    cell = {"dataset": "tiny", "ipc": 4, "images": "nrr+lr"}
    size = {"bytes_labels": 0.0}
    cells = [cell | size | {"labels": labels, "top1": top1} for labels in ("one-hot", "dbr") for top1 in (0.25, 0.75)]
    cells += [cell | size | {"labels": "dbr", "top1": 0.9} | other for other in ({"ipc": 1}, {"images": "nrr"})]
    others: list[dict[str, Any]] = [
        {"iterations": 6},
        {"teacher": "another"},
        {"teacher_top1": 0.123},
        {"stored_epochs": 9},
        {"build": {"epsilon": 0.1}},
    ]
    cells += [cell | size | {"labels": "dbr", "top1": 0.9} | other for other in others]
    cells[0] |= {"iterations": 5}
    cells += [cell | {"labels": "dbr-further1", "top1": 0.5, "bytes_labels": size} for size in (1000.0, 3000.0)]
    (tmp_path / "accuracy.json").write_text(json.dumps({"cells": cells}))
    arguments = [str(path), "--accuracy", str(tmp_path / "accuracy.json"), "--out", str(tmp_path / "results")]
    assert storage_footprint.main(arguments) == 0
    (written,) = (tmp_path / "results").glob("*-storage.json")
    points = json.loads(written.read_text())["points"]
    assert [(point["labels"], point["top1"]) for point in points] == [
        ("one-hot: the image's name", [25, 75]),
        ("DBR, explicit", [25, 75]),
        ("DBR, derived", [25, 75]),
        ("DBR, with 2 priors and 1 further class", [50, 50]),
    ]
    assert points[3]["bytes"] == 2000
    assert points[0]["bytes"] == 0 and points[1]["bytes"] == measure(open_dataset(path)).labels
    assert written.with_name(written.stem + "-accuracy.png").stat().st_size > 0
    assert [call.args[1] for call in recodes.call_args_list] == ["derived"]  # once, for bytes and points alike
    assert "50.00 ± 35.36" in written.with_suffix(".md").read_text()


SOUND_CELL = {"dataset": "x", "ipc": 4, "images": "nrr", "labels": "dbr", "top1": 0.5, "bytes_labels": 9.0}


WRONG_CELLS: list[Any] = [3, {"dataset": "x"}, SOUND_CELL | {"top1": "0.5"}]


@pytest.mark.parametrize(
    "content",
    [None, "{", "[]", '{"cells": 3}', *(json.dumps({"cells": [SOUND_CELL, wrong]}) for wrong in WRONG_CELLS)],
)
def test_a_file_that_is_no_accuracy_result_is_named_before_anything_is_measured(
    content: str | None,
    dataset: DistilledDataset,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(storage_footprint, "measure_coded", Mock(side_effect=AssertionError("was measured")))
    other = tmp_path / "other.json"
    if content is not None:
        other.write_text(content)
    assert storage_footprint.main([str(dataset.path), "--accuracy", str(other)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {other}: not a result of benchmarks.accuracy") and error.count("\n") == 1


@pytest.mark.parametrize("images", tuple(grids.IMAGES))
def test_the_kind_of_images_is_read_back_from_a_build(images: str, tmp_path: Path) -> None:
    grid = Grid(
        dataset="digits",
        out=tmp_path,
        teacher_checkpoint=tmp_path / "teacher.pt",
        teacher=TeacherConfig(),
        ipcs=(1,),
        images=(images,),
        labels=("dbr",),
        seeds=(0,),
        student="conv2",
        epochs=1,
        iterations=3,
    )
    (tmp_path / "teacher.pt").write_bytes(b"weights")
    config = build_config(grid, Cell(ipc=1, images=images, labels="dbr", seed=0))
    settings = plan_settings(config, load_source("digits", data_dir=None))
    assert image_kind(asdict(settings)) == images


def test_a_missing_dataset_ends_with_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert storage_footprint.main([str(tmp_path / "none")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
