"""Further classes: what the teacher's are, that they survive storage, and that wrong ones are refused by name."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from tiny_dataset import tiny_manifest, tiny_records, write_tiny

from builders.config import BuildConfig
from builders.relabel import label_pairs
from nrrdd_format.codebooks import distance_levels
from nrrdd_format.dataset import open_dataset
from nrrdd_format.errors import ConfigError, FormatError
from nrrdd_format.further import check_labels, column_count, pack_further, unpack_further
from nrrdd_format.inspect import describe
from nrrdd_format.manifest import Manifest
from nrrdd_format.pairs import Coding, draw_pairs
from nrrdd_format.records import encode_block, max_block_bytes
from nrrdd_format.reshard import reshard_dataset
from nrrdd_format.verify import verify_dataset

LEVELS = distance_levels(16)


def columns_of(classes: NDArray[np.int64], levels: NDArray[np.int64], count: int) -> NDArray[np.uint8]:
    """One epoch as its part of a block's columns."""
    packed = pack_further([classes], [LEVELS[levels]], count, LEVELS)
    return np.frombuffer(b"".join(packed), np.uint8).reshape(-1, *classes.T.shape)


@given(st.data())
def test_columns_keep_classes_and_levels(data: st.DataObject) -> None:
    count = data.draw(st.integers(3, 2**17))
    further, pairs, epochs = data.draw(st.integers(1, min(count - 2, 16))), data.draw(st.integers(2, 5)), 2
    row = st.lists(st.integers(0, count - 1), min_size=further, max_size=further, unique=True)
    level = st.lists(st.integers(0, 15), min_size=further, max_size=further).map(sorted)
    classes = np.array([[data.draw(row) for _ in range(pairs)] for _ in range(epochs)])
    levels = np.array([[data.draw(level) for _ in range(pairs)] for _ in range(epochs)])
    packed = pack_further(list(classes), list(LEVELS[levels]), count, LEVELS)
    stored = np.frombuffer(b"".join(packed), np.uint8).reshape(-1, further, epochs, pairs)
    assert len(stored) == len(packed) == column_count(count)
    for epoch in range(epochs):
        found, distances = unpack_further(stored[:, :, epoch], count, LEVELS)
        assert found.tolist() == classes[epoch].tolist()
        assert distances.tolist() == LEVELS[levels[epoch]].tolist()


@pytest.mark.parametrize(("classes", "count"), [(3, 2), (256, 2), (257, 3), (65536, 3), (65537, 4), (2**17, 4)])
def test_a_class_number_takes_as_many_bytes_as_it_needs(classes: int, count: int) -> None:
    assert column_count(classes) == count


CLASSES, STEPS = np.array([[0, 4], [2, 1]]), np.array([[3, 3], [0, 15]])


@pytest.mark.parametrize(
    ("plane", "value", "message"),
    [
        (0, 5, r"pair 1: classes \[2, 5\], levels \[0, 15\], expected classes less than 5"),
        (0, 2, r"pair 1: classes \[2, 2\], .*, expected different classes"),
        (1, 16, r"pair 1: .*levels \[0, 16\], expected levels less than 16"),
    ],
)
def test_columns_that_break_a_rule_are_refused(plane: int, value: int, message: str) -> None:
    columns = columns_of(CLASSES, STEPS, 5).copy()
    unpack_further(columns, 5, LEVELS)
    columns[plane, 1, 1] = value
    with pytest.raises(FormatError, match=message):
        unpack_further(columns, 5, LEVELS)


def test_levels_that_fall_are_neither_read_nor_written() -> None:
    columns = columns_of(CLASSES, STEPS, 5).copy()
    columns[1, 1, 0] = 2
    with pytest.raises(FormatError, match=r"pair 0: .*levels \[3, 2\], expected levels that do not fall"):
        unpack_further(columns, 5, LEVELS)
    with pytest.raises(FormatError, match="expected levels that do not fall"):
        columns_of(CLASSES, STEPS[:, ::-1], 5)


def test_a_pairs_own_classes_are_no_further_ones() -> None:
    check_labels(CLASSES, np.array([1, 0]), np.array([3, 0]))
    for own in ((np.array([1, 0]), np.array([3, 1])), (np.array([1, 1]), np.array([3, 0]))):
        with pytest.raises(FormatError, match="further classes of pair 1: name its own 1, expected others only"):
            check_labels(CLASSES, *own)


# ---- the teacher's


@pytest.mark.parametrize("further", [None, 1, 3])
def test_the_likeliest_others_are_taken_and_of_equals_the_lower(further: int | None) -> None:
    logits = torch.tensor([[9.0, 1.0, 2.0, 2.0, 8.0], [0.0, 0.0, 0.0, 0.0, 0.0]])
    layout = tiny_manifest().layout_for(2)
    labels = np.array([0, 4])
    pairs = draw_pairs(layout, 0, 0)
    found = label_pairs(logits, labels, pairs, 2.0, further)
    distances = -(logits / 2).log_softmax(1).numpy()
    assert found.distance_org.tolist() == [distances[row, labels[i]] for row, i in enumerate(pairs.index_org)]
    assert found.distance_aug.tolist() == [distances[row, labels[i]] for row, i in enumerate(pairs.index_aug)]
    if further is None:
        assert found.further_classes is None and found.further_distances is None
        return
    assert found.further_classes is not None and found.further_distances is not None
    assert found.further_classes.tolist() == [[2, 3, 1][:further], [1, 2, 3][:further]]
    expected = np.take_along_axis(distances, found.further_classes, 1)
    assert found.further_distances.tolist() == expected.tolist()


def test_a_build_cannot_be_asked_for_more_than_the_format_holds() -> None:
    BuildConfig(dataset="digits", out=Path("out"), ipc=1, further=16)
    with pytest.raises(ConfigError, match=r"--further: found 17, expected a value from 0 to 16"):
        BuildConfig(dataset="digits", out=Path("out"), ipc=1, further=17)


# ---- datasets


def further_manifest(coding: Coding = "explicit", further: int | None = 4, **options: Any) -> Manifest:
    return tiny_manifest(coding=coding, further=further, classes=300, **options)


@pytest.mark.parametrize("coding", ["explicit", "derived", "verbatim"])
def test_a_dataset_with_further_classes_keeps_them_when_resharded(coding: Coding, tmp_path: Path) -> None:
    folder = write_tiny(tmp_path / "small", further_manifest(coding, epochs=3, block_epochs=2), shards=4, images=6)
    assert verify_dataset(folder) == []
    after = reshard_dataset(folder, 12, tmp_path / "large").after
    assert (len(after.shards), after.version, after.records.further) == (2, (2, 0), 4)
    assert verify_dataset(tmp_path / "large") == []
    with open_dataset(folder) as small, open_dataset(tmp_path / "large") as large:
        assert large.shards[0].header.epochs == 3
        for epoch in range(3):
            parts, whole = (
                [reader.records(epoch).columns() for reader in dataset.shards] for dataset in (small, large)
            )
            for name in ("further_classes", "further_distances"):
                stored = np.concatenate([part[name] for part in parts])
                assert stored.shape == (24, 4)
                assert np.array_equal(np.concatenate([part[name] for part in whole]), stored)


def test_a_dataset_without_further_classes_states_no_new_version(tmp_path: Path) -> None:
    with open_dataset(write_tiny(tmp_path / "plain")) as dataset:
        assert dataset.manifest.version == (1, 0)
        assert "further" not in dataset.manifest.to_json()["records"]
        assert dataset.shards[0].records(0).further_classes is None


def test_inspection_names_further_classes(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path / "data", further_manifest(further=2))
    facts = describe(folder, record=(0, 1, 3))
    assert facts["further"] == 2
    with open_dataset(folder) as dataset:
        stored = dataset.shards[0].records(1).columns()
    names = [dataset.manifest.dataset.class_names[label] for label in stored["further_classes"][3]]
    assert facts["record"]["further_classes"] == names
    assert facts["record"]["further_distances"] == pytest.approx(stored["further_distances"][3].tolist())


def test_a_block_holds_what_its_layout_says() -> None:
    layout = further_manifest(further=4).layout_for(6)
    records = tiny_records(layout, 0, 0)
    for wrong, other in (
        (replace(records, further_classes=None, further_distances=None), layout),
        (records, replace(layout, further=3)),
        (records, replace(layout, further=None)),
    ):
        with pytest.raises(ConfigError, match="further classes of shapes"):
            encode_block([records, wrong], other, shard=0, first_epoch=0)


@pytest.mark.parametrize(("further", "classes"), [(0, 300), (17, 300), (2, 3)])
def test_a_layout_has_as_many_further_classes_as_there_can_be(further: int, classes: int) -> None:
    with pytest.raises(
        ConfigError, match=rf"{further} further classes of a pair: expected 1\.\.{min(16, classes - 2)}"
    ):
        tiny_manifest(further=further, classes=classes).layout_for(6)


def test_further_classes_count_in_the_size_of_a_block() -> None:
    layout = further_manifest("verbatim", further=16).layout_for(262144)
    with pytest.raises(FormatError, match="expected at most 16777216"):
        max_block_bytes(layout, 2)
    max_block_bytes(replace(layout, further=None), 2)
