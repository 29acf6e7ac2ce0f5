"""`describe` says what a dataset is, holds and costs; its figures are those of the records themselves."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from make_dataset import make_tiny_dataset
from tiny_dataset import tiny_manifest, write_tiny

from nrrdd_format import inspect
from nrrdd_format.dataset import open_dataset
from nrrdd_format.errors import ConfigError, FormatError
from nrrdd_format.inspect import describe, render
from nrrdd_format.pairs import Coding


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A dataset of two shards of 7 images."""
    return write_tiny(tmp_path / "tiny")


def test_facts_of_the_manifest(folder: Path) -> None:
    facts = describe(folder)
    assert (facts["images"], facts["pairs"], facts["epochs"], facts["shards"]) == (14, 28, 2, 2)
    assert facts["bytes"] == sum(p.stat().st_size for p in folder.glob("*.tar"))
    assert facts["record_bytes_per_pair"] == round(facts["record_bytes"] / 28, 3)
    assert facts["teacher"]["architecture"] == "conv3"
    assert "conv3" in render(facts)


@pytest.mark.parametrize("coding", ["explicit", "derived"])
def test_statistics_are_those_of_the_records(tmp_path: Path, coding: Coding) -> None:
    folder = make_tiny_dataset(tmp_path / "data", ipc=10, shards=3, epochs=5, coding=coding)
    facts = describe(folder)
    json.dumps(facts)
    assert [row["epoch"] for row in facts["epoch_table"]] == list(range(5))
    with open_dataset(folder) as dataset:
        for epoch, row in enumerate(facts["epoch_table"]):
            records = [shard.records(epoch) for shard in dataset.shards]
            pairs = list(zip(records, [shard.labels for shard in dataset.shards], strict=True))
            same = np.concatenate([labels[r.index_org] == labels[r.index_aug] for r, labels in pairs])
            assert row["pairs"] == len(same) == 30
            assert row["same_class_share"] == pytest.approx(same.mean(), abs=1e-4)
            assert row["mean_lam"] == pytest.approx(np.concatenate([r.lam for r in records]).mean(), abs=1e-4)
            assert row["cutmix_share"] == pytest.approx(np.concatenate([r.is_cutmix for r in records]).mean(), abs=1e-4)
            for name in ("distance_org", "distance_aug"):
                values = np.concatenate([getattr(r, name) for r in records])
                assert row[name]["mean"] == pytest.approx(values.mean(), abs=1e-3)
                for quantile, share in inspect.QUANTILES.items():
                    expected = np.quantile(values, share, method="inverted_cdf")
                    assert row[name][quantile] == pytest.approx(float(expected)), (epoch, name, quantile)


def test_classes_are_counted_and_named(tmp_path: Path) -> None:
    manifest = tiny_manifest()
    named = replace(manifest, dataset=replace(manifest.dataset, wnids=("n01", "n02", "n03")))
    table = describe(write_tiny(tmp_path / "data", named))["class_table"]
    assert table == [
        {"label": 0, "name": "circle", "wnid": "n01", "images": 5},
        {"label": 1, "name": "square", "wnid": "n02", "images": 5},
        {"label": 2, "name": "star", "wnid": "n03", "images": 4},
    ]


def test_every_byte_of_the_shards_has_its_place(folder: Path) -> None:
    facts = describe(folder)
    with open_dataset(folder) as dataset:
        members = [member for shard in dataset.shards for member in shard.header.members]
    images = sum(member.size for member in members if member.name.endswith(".png"))
    shares = facts["share_of_bytes"]
    assert sum(shares.values()) == pytest.approx(1, abs=1e-3)
    assert shares["images"] == pytest.approx(images / facts["bytes"], abs=1e-4)
    assert shares["records"] == pytest.approx(facts["record_bytes"] / facts["bytes"], abs=1e-4)


def test_long_tables_are_cut_in_text_only(tmp_path: Path) -> None:
    folder = make_tiny_dataset(tmp_path / "data", classes=50, ipc=1, epochs=15)
    facts = describe(folder)
    assert len(facts["class_table"]) == 50 and len(facts["epoch_table"]) == 15
    text = render(facts)
    assert "… 30 more classes" in text and "… 5 more epochs" in text
    assert "class 19" in text and "class 20" not in text
    first = describe(folder, epochs=inspect.SHOWN_EPOCHS)
    assert first["epoch_table"] == facts["epoch_table"][:10]
    assert render(first) == text
    assert max(map(len, text.splitlines())) <= 140


def test_a_long_class_name_is_cut_in_text(tmp_path: Path) -> None:
    manifest = tiny_manifest()
    names = ("x" * 4000, "square", "star")
    folder = write_tiny(tmp_path / "data", replace(manifest, dataset=replace(manifest.dataset, class_names=names)))
    assert "x" * 39 + "…" in render(describe(folder))


def test_a_dataset_without_shards(tmp_path: Path) -> None:
    facts = describe(write_tiny(tmp_path / "none", shards=0))
    assert facts["epoch_table"] == [] and facts["record_bytes_per_pair"] is None
    assert facts["share_of_bytes"] == {"images": None, "records": None, "headers": None}
    assert "circle" in render(facts)


def test_a_damaged_shard_is_refused(folder: Path) -> None:
    path = folder / "shard-00001.tar"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(FormatError, match=r"shard-00001\.tar"):
        describe(folder)


def test_a_record(folder: Path) -> None:
    record = describe(folder, record=(1, 1, 3))["record"]
    with open_dataset(folder) as dataset:
        records = dataset.shards[1].records(1)
        label = dataset.shards[1].labels[records.index_org[3]]
    assert record["index_org"] == records.index_org[3]
    assert record["class_org"] == tiny_manifest().dataset.class_names[label]
    assert record["distance_aug"] == pytest.approx(float(records.distance_aug[3]))
    assert record["view_org"] == records.view_org[3].tolist()
    assert "class_org" in render(describe(folder, record=(1, 1, 3)))


@pytest.mark.parametrize(("record", "what"), [((2, 0, 0), "shard 2"), ((0, 2, 0), "epoch 2"), ((0, 0, -1), "pair -1")])
def test_a_record_that_does_not_exist_is_refused(folder: Path, record: tuple[int, int, int], what: str) -> None:
    with pytest.raises(ConfigError, match=what):
        describe(folder, record=record)
