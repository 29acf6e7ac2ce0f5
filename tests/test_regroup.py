"""Split and merge: shards go byte for byte, and the parts of a dataset make it whole again."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from make_dataset import make_tiny_dataset
from tiny_dataset import tiny_images, tiny_manifest, tiny_records, write_tiny

from nrrdd_format import copies, regroup
from nrrdd_format.errors import ConfigError, FormatError, OutputError
from nrrdd_format.manifest import MANIFEST_NAME, Manifest
from nrrdd_format.records import encode_shard_records
from nrrdd_format.regroup import merge_datasets, split_dataset
from nrrdd_format.shards import shard_name, write_shard
from nrrdd_format.verify import verify_dataset


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A dataset of five shards."""
    return make_tiny_dataset(tmp_path / "data", ipc=10, shards=5)


@settings(max_examples=15)
@given(
    shards=st.integers(2, 6),
    parts=st.integers(2, 6),
    coding=st.sampled_from(["explicit", "derived"]),
    order=st.randoms(use_true_random=False),
)
def test_the_merged_parts_are_the_dataset(
    tmp_path_factory: pytest.TempPathFactory, shards: int, parts: int, coding: Any, order: Any
) -> None:
    root = tmp_path_factory.mktemp("regroup")
    data = make_tiny_dataset(root / "data", ipc=5, shards=shards, epochs=2, coding=coding)
    outs = [root / f"part-{number}" for number in range(min(parts, shards))]
    manifests = split_dataset(data, outs)
    assert all(verify_dataset(out) == [] for out in outs)
    sizes = [len(manifest.shards) for manifest in manifests]
    assert sum(sizes) == shards and max(sizes) - min(sizes) <= 1
    assert sum(manifest.images.count for manifest in manifests) == 15
    for out in outs:
        for name, content in contents(out).items():
            assert name == MANIFEST_NAME or content == (data / name).read_bytes()
    order.shuffle(outs)
    merged = merge_datasets(outs, root / "merged")
    assert merged.dataset_id == Manifest.load(data / MANIFEST_NAME).dataset_id
    assert contents(root / "merged") == contents(data)


def test_parts_are_neighbours(folder: Path, tmp_path: Path) -> None:
    parts = split_dataset(folder / MANIFEST_NAME, [tmp_path / "a", tmp_path / "deeper" / "b"])
    assert [[entry.name for entry in part.shards] for part in parts] == [
        [shard_name(0), shard_name(1)],
        [shard_name(2), shard_name(3), shard_name(4)],
    ]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["a"], "found one folder"),
        ([*"abcdef"], "6 folders for 5 shards"),
        (["a", "b", "a"], "named twice"),
        (["a", "a/b"], "a/b lies in .*a, expected folders beside each other"),
    ],
)
def test_numbers_of_parts_that_cannot_be(folder: Path, tmp_path: Path, names: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        split_dataset(folder, [tmp_path / name for name in names])
    assert list(tmp_path.iterdir()) == [folder]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data"]


def test_an_existing_folder_is_refused_and_nothing_written(folder: Path, tmp_path: Path) -> None:
    outs = [tmp_path / "a", tmp_path / "b"]
    split_dataset(folder, outs)
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="file: exists already"):
        merge_datasets(outs, tmp_path / "file")
    shutil.rmtree(tmp_path / "a")
    with pytest.raises(OutputError, match="b: exists already"):
        split_dataset(folder, outs)
    with pytest.raises(OutputError, match=r"cannot make the folder \(File name too long\)"):
        split_dataset(folder, [tmp_path / "c", tmp_path / ("n" * 300)])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b", "data", "file"]


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[3000] ^= 1
    path.write_bytes(content)


def test_a_damaged_shard_is_not_passed_on(folder: Path, tmp_path: Path) -> None:
    parts = [tmp_path / "a", tmp_path / "b"]
    split_dataset(folder, parts)
    damage(folder / shard_name(4))
    with pytest.raises(FormatError, match=r"shard-00004\.tar.*sha256.*nrrdd repair"):
        split_dataset(folder, [tmp_path / "c", tmp_path / "d"])
    damage(parts[0] / shard_name(1))
    with pytest.raises(FormatError, match=r"a/shard-00001\.tar.*sha256"):
        merge_datasets(parts, tmp_path / "merged")
    (parts[0] / shard_name(1)).unlink()
    with pytest.raises(FormatError, match=r"shard-00001\.tar.*cannot be opened"):
        merge_datasets(parts, tmp_path / "merged")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "data"]


def test_an_interrupted_split_leaves_no_folder(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = copies.copy_shard

    def stop_at_the_last(source: Path, entry: Any, target: Path) -> None:
        if entry.name == shard_name(4):
            raise KeyboardInterrupt
        copy(source, entry, target)

    monkeypatch.setattr(regroup, "copy_shard", stop_at_the_last)
    with pytest.raises(KeyboardInterrupt):
        split_dataset(folder, [tmp_path / "a", tmp_path / "b"])
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


# ---- what cannot be merged


def altered(folder: Path, changes: dict[str, dict[str, Any]]) -> None:
    manifest = Manifest.load(folder / MANIFEST_NAME)
    for section, values in changes.items():
        manifest = replace(manifest, **{section: replace(getattr(manifest, section), **values)})
    manifest.save(folder / MANIFEST_NAME)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"records": {"seed": 9}}, r"b: records.seed is 9, expected 0 as in .*a:"),
        ({"records": {"temperature": 2.0, "seed": 9}}, r"records.seed"),  # the first of the file
        ({"dataset": {"name": "other"}}, r"dataset.name is 'other', expected 'tiny'"),
        ({"dataset": {"class_names": ("class 0", "x", "class 2")}}, r"dataset.class_names\[1\] is 'x'"),
        ({"dataset": {"class_names": tuple("abcdef")}}, r"dataset.class_names is a list of 6"),
        ({"dataset": {"source_license": "CC0"}}, r"dataset.source_license is 'CC0', expected None"),
        ({"images": {"quality": 3, "ipc": 11}}, r"images.ipc is 11, expected 10"),
        ({"teacher": {"sha256": "1" * 64}}, r"teacher.sha256"),
    ],
)
def test_manifests_must_agree(folder: Path, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    parts = [tmp_path / "a", tmp_path / "b"]
    split_dataset(folder, parts)
    altered(parts[1], changes)
    with pytest.raises(ConfigError, match=message):
        merge_datasets(parts, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_the_method_must_agree(folder: Path, tmp_path: Path) -> None:
    parts = [tmp_path / "a", tmp_path / "b"]
    split_dataset(folder, parts)
    replace(Manifest.load(parts[1] / MANIFEST_NAME), method={"x": [1, {"y": 2}]}).save(parts[1] / MANIFEST_NAME)
    replace(Manifest.load(parts[0] / MANIFEST_NAME), method={"x": [1, {"y": 3}]}).save(parts[0] / MANIFEST_NAME)
    with pytest.raises(ConfigError, match=r"method.x\[1\].y is 2, expected 3"):
        merge_datasets(parts, tmp_path / "merged")
    replace(Manifest.load(parts[0] / MANIFEST_NAME), method={"x": None}).save(parts[0] / MANIFEST_NAME)
    replace(Manifest.load(parts[1] / MANIFEST_NAME), method={}).save(parts[1] / MANIFEST_NAME)
    with pytest.raises(ConfigError, match=r"method.x is not there, expected None"):
        merge_datasets(parts, tmp_path / "merged")


def test_a_shard_in_two_parts_is_refused(folder: Path, tmp_path: Path) -> None:
    split_dataset(folder, [tmp_path / "a", tmp_path / "b"])
    with pytest.raises(ConfigError, match=r"b: shard-00002\.tar is in .*data as well"):
        merge_datasets([folder, tmp_path / "b"], tmp_path / "merged")
    with pytest.raises(ConfigError, match=r"a: shard-00000\.tar is in .*a as well"):
        merge_datasets([tmp_path / "a", tmp_path / "a"], tmp_path / "merged")


def test_an_image_in_two_parts_is_refused(tmp_path: Path) -> None:
    first = write_tiny(tmp_path / "a", shards=1)
    manifest = tiny_manifest()
    (tmp_path / "b").mkdir()
    layout = manifest.layout_for(7)
    blocks = encode_shard_records((tiny_records(layout, 1, epoch) for epoch in range(2)), layout, 1)
    path = tmp_path / "b" / shard_name(1)
    entry = write_shard(
        path, shard=1, images=tiny_images(6, 7), extension="png", blocks=blocks, epochs=2, layout=layout
    )
    listed = replace(manifest, images=replace(manifest.images, count=7), shards=(entry,))
    listed.save(tmp_path / "b" / MANIFEST_NAME)
    with pytest.raises(ConfigError, match=r"b: image 6 is in .*a as well"):
        merge_datasets([first, tmp_path / "b"], tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_one_dataset_is_nothing_to_merge(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="expected two or more"):
        merge_datasets([folder], tmp_path / "merged")
