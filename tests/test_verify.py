"""`verify_dataset` finds every planted fault."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image
from tiny_dataset import tiny_images, tiny_manifest, tiny_records, write_tiny

from nrrdd_format.dataset import open_dataset
from nrrdd_format.records import encode_shard_records
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
    blocks = encode_shard_records((tiny_records(layout, 1, epoch) for epoch in range(2)), layout, 1)
    path = folder / "shard-00001.tar"
    entry = write_shard(path, shard=1, images=images, extension="png", blocks=blocks, epochs=2, layout=layout)
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


def test_every_damaged_padding_is_a_problem_of_its_own(folder: Path) -> None:
    path = folder / "shard-00000.tar"
    size = path.stat().st_size
    places = [1023, size - 1025, size - 1]  # behind the header, behind the records, in the end marker
    for at in places:
        damage(path, at)
    hash_problem, *rest = verify_dataset(folder)
    assert "sha256" in hash_problem.message
    assert [(p.offset, p.message) for p in rest] == [(at, "padding is not all zeros") for at in places]
    assert [p.member for p in rest] == ["__nrrdd__/header", "__nrrdd__/records", None]


def test_every_damaged_image_and_block_is_a_problem_of_its_own(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path / "data", tiny_manifest(epochs=5))  # three blocks a shard
    path = folder / "shard-00000.tar"
    with open_dataset(folder) as dataset:
        shard = dataset.shards[0]
        head, start = shard._load_records_head()
    blocks = [start, start + head.blocks[0], start + sum(head.blocks[:2])]
    images = [path.read_bytes().index(tiny_images(number, 1)[0].data) for number in (1, 2, 6)]
    for at in [*images, blocks[0], blocks[2]]:
        damage(path, at + 15)
    problems = verify_dataset(folder)[1:]
    assert [p.offset for p in problems[:-1]] == [*images, blocks[0], blocks[2]]
    assert all("crc32" in p.message for p in problems)
    assert (problems[-1].member, problems[-1].offset) == ("__nrrdd__/records", start - len(head.pack()))


def test_a_record_member_whose_checksum_alone_is_wrong(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only a writer that is wrong makes it, so one is made wrong here."""
    from nrrdd_format import shards

    member = shards._member
    monkeypatch.setattr(
        shards,
        "_member",
        lambda name, parts: (
            member(name, parts)._replace(crc32=1) if name == "__nrrdd__/records" else member(name, parts)
        ),
    )
    write_images(folder, tiny_images(7, 7))
    (problem,) = verify_dataset(folder)
    assert problem.member == "__nrrdd__/records" and "crc32" in problem.message


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
        (tiny_images(13, 1)[0].data[:-12], "ends before its end chunk"),
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
