"""`verify_dataset` finds every planted fault, and `describe` says what a dataset is."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image
from tiny_dataset import tiny_images, tiny_levels, tiny_manifest, write_tiny

from nrrdd_format.dataset import open_dataset
from nrrdd_format.errors import ConfigError
from nrrdd_format.inspect import describe, render
from nrrdd_format.records import draw_pairs, encode_epoch
from nrrdd_format.shards import EncodedImage, write_shard
from nrrdd_format.verify import verify_dataset


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A dataset of two shards of 7 images."""
    return write_tiny(tmp_path / "tiny")


def damage(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def write_images(folder: Path, images: list[EncodedImage]) -> None:
    """Replace shard 1 and its entry by one with these images."""
    with open_dataset(folder) as dataset:
        manifest = dataset.manifest
    layout = manifest.layout(1)
    level = tiny_levels(7, 0, 1)
    blocks = [encode_epoch(draw_pairs(layout, 1, e), layout, level, level) for e in range(2)]
    path = folder / "shard-00001.tar"
    entry = write_shard(path, shard=1, images=images, extension="png", blocks=blocks, layout=layout)
    replace(manifest, shards=(manifest.shards[0], entry)).save(folder / "dataset.json")


def picture(side: int, codec: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (side, side)).save(buffer, format=codec)
    return buffer.getvalue()


def test_a_whole_dataset_has_no_problems(folder: Path) -> None:
    assert verify_dataset(folder) == []
    assert verify_dataset(folder / "dataset.json") == []
    (folder / "README.md").write_text("other files are ignored")
    assert verify_dataset(folder) == []


def test_all_faults_are_found_not_just_the_first(folder: Path) -> None:
    first, second = folder / "shard-00000.tar", folder / "shard-00001.tar"
    with open_dataset(folder) as dataset:
        records = int(dataset.shards[1]._offsets[-2]) + 512
    damage(first, first.read_bytes().index(tiny_images(0, 1)[0].data) + 20)
    damage(first, first.read_bytes().index(tiny_images(4, 1)[0].data) + 20)
    damage(second, records + 60)
    problems = verify_dataset(folder)
    assert [(p.shard, p.member) for p in problems] == [
        ("shard-00000.tar", None),
        ("shard-00000.tar", "0000000_c00000.png"),
        ("shard-00000.tar", "0000004_c00001.png"),
        ("shard-00001.tar", None),
        ("shard-00001.tar", "__nrrdd__/records"),
        ("shard-00001.tar", "__nrrdd__/records"),
    ]
    assert "sha256" in problems[0].message and "crc32" in problems[1].message
    assert problems[1].offset is not None and f"offset {problems[1].offset}" in str(problems[1])
    assert all("\n" not in str(p) for p in problems)


@pytest.mark.parametrize("at", [-1, -1025, 1023])
def test_padding_is_checked(folder: Path, at: int) -> None:
    path = folder / "shard-00000.tar"
    size = path.stat().st_size
    damage(path, at % size)
    assert [p.message.split()[0] for p in verify_dataset(folder)] == ["sha256", "padding"]


def test_missing_and_truncated_shards(folder: Path) -> None:
    (folder / "shard-00000.tar").unlink()
    path = folder / "shard-00001.tar"
    path.write_bytes(path.read_bytes()[:5000])
    problems = verify_dataset(folder)
    assert [p.shard for p in problems] == ["shard-00000.tar", "shard-00001.tar", "shard-00001.tar"]
    assert "cannot be read" in problems[0].message and "5000" in problems[2].message


def test_swapped_shards(folder: Path) -> None:
    first, second = folder / "shard-00000.tar", folder / "shard-00001.tar"
    first.rename(folder / "x")
    second.rename(first)
    (folder / "x").rename(second)
    assert any("says it is shard-00001.tar" in p.message for p in verify_dataset(folder))


def test_a_broken_manifest_is_one_problem(tmp_path: Path) -> None:
    (problem,) = verify_dataset(tmp_path)
    assert problem.shard is None and "dataset.json" in str(problem)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (picture(15), "image is 15x15, expected 16x16"),
        (picture(16, "JPEG"), "is not a whole png image"),
        (tiny_images(13, 1)[0].data[:60], "is not a whole png image"),
        (b"text", "is not a whole png image"),
    ],
)
def test_images_are_decoded(folder: Path, data: bytes, message: str) -> None:
    images = [*tiny_images(7, 6), EncodedImage(index=13, label=0, data=data)]
    write_images(folder, images)
    (problem,) = verify_dataset(folder)
    assert problem.member == "0000013_c00000.png" and message in problem.message


def test_an_image_number_occurs_once_in_the_dataset(folder: Path) -> None:
    write_images(folder, [*tiny_images(7, 6), replace(tiny_images(3, 1)[0], label=1)])
    (problem,) = verify_dataset(folder)
    assert "image 3 is in shard-00000.tar already" in problem.message


def test_describe(folder: Path) -> None:
    facts = describe(folder)
    assert (facts["images"], facts["pairs"], facts["epochs"], facts["shards"]) == (14, 28, 2, 2)
    assert facts["bytes"] == sum(p.stat().st_size for p in folder.glob("*.tar"))
    assert facts["record_bytes_per_pair"] == round(facts["record_bytes"] / 28, 3)
    json.dumps(facts)
    assert "conv3" in render(facts)


def test_describe_a_record(folder: Path) -> None:
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
def test_describe_refuses_a_record_that_does_not_exist(folder: Path, record: tuple[int, int, int], what: str) -> None:
    with pytest.raises(ConfigError, match=what):
        describe(folder, record=record)
