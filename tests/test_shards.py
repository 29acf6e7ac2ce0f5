"""Shards: round trips, and for every rule of the file a shard that breaks it."""

from __future__ import annotations

import io
import multiprocessing
import os
import pickle
import re
import tarfile
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import msgpack
import numpy as np
import pytest
import zstandard
from tiny_dataset import tiny_images, tiny_manifest, write_tiny

from nrrdd_format import shard_header, tar
from nrrdd_format.dataset import DistilledDataset, open_dataset
from nrrdd_format.errors import ConfigError, DataError, FormatError, NrrddError, OutputError
from nrrdd_format.files import atomic_write
from nrrdd_format.frames import pack_frame, payload_length, unpack_frame
from nrrdd_format.limits import MAX_HEADER_BYTES
from nrrdd_format.pairs import RecordLayout
from nrrdd_format.records import max_block_bytes
from nrrdd_format.shard_header import HEADER_NAME, RECORDS_NAME, parse_image_name
from nrrdd_format.shards import EncodedImage, ShardReader, file_sha256, shard_name, shard_number, write_shard
from nrrdd_format.verify import unread_faults, verify_dataset

LAYOUT = tiny_manifest().layout_for(7)


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    """A whole shard of 7 images and 2 epochs."""
    return write_tiny(tmp_path / "tiny", shards=1) / "shard-00000.tar"


def read_all(path: Path, layout: RecordLayout = LAYOUT) -> None:
    """Read all of a shard as a careful reader would."""
    with ShardReader(path, None, layout) as reader:
        for image in range(reader.images):
            reader.image_bytes(image)
        for epoch in range(reader.epochs):
            reader.records(epoch)
        for fault in unread_faults(reader):
            raise fault.located(path=path)


def test_a_shard_of_fewer_epochs_than_a_block_may_hold(tmp_path: Path) -> None:
    """A whole block of them would be over the limit."""
    path = write_tiny(tmp_path / "few", tiny_manifest(epochs=3, block_epochs=65536), shards=1, images=200)
    with open_dataset(path) as dataset:
        assert len(list(dataset.shards[0].all_records())) == 3


def test_a_last_block_has_the_bound_of_its_own_epochs(tmp_path: Path) -> None:
    manifest = tiny_manifest(epochs=3, block_epochs=2)
    path = write_tiny(tmp_path / "three", manifest, shards=1, images=200) / "shard-00000.tar"
    layout = manifest.layout_for(200)
    most = max_block_bytes(layout, 1)
    assert most < max_block_bytes(layout, 2)
    rewrite(path, blocks=lambda blocks: [blocks[0], blocks[1] + bytes(most + 1 - len(blocks[1]))])
    with pytest.raises(FormatError, match=rf"block size is {most + 1}, expected 1\.\.{most}"):
        read_all(path, layout)


def members_of(path: Path) -> list[tuple[str, bytes]]:
    with tarfile.open(path) as archive:
        return [(m.name, archive.extractfile(m).read()) for m in archive]  # type: ignore[union-attr]


def write_members(path: Path, members: list[tuple[str, bytes]]) -> None:
    data = b"".join(tar.header(n, len(d)) + d + bytes(tar.padded(len(d)) - len(d)) for n, d in members)
    path.write_bytes(data + tar.END)


def rewrite(
    path: Path,
    *,
    header: Callable[[dict[str, Any]], object] = lambda content: None,
    head: Callable[[dict[str, Any]], object] = lambda content: None,
    blocks: Callable[[list[bytes]], list[bytes]] = lambda blocks: blocks,
) -> None:
    """Write a shard anew with changed content; checksums and tar headers are right unless changed on purpose."""
    (_, first), *images, (_, last) = members_of(path)
    length = 8 + payload_length(last, len(last))
    table, data = unpack_frame(last[:length]), last[length:]
    changed = blocks([data[: table["blocks"][0]], data[table["blocks"][0] :]])
    table["blocks"], table["crcs"] = [len(b) for b in changed], [zlib.crc32(b) for b in changed]
    head(table)
    records = pack_frame(table) + b"".join(changed)
    content = unpack_frame(first)
    content["members"][-1] = [RECORDS_NAME, len(records), zlib.crc32(records)]
    header(content)
    write_members(path, [(HEADER_NAME, pack_frame(content)), *images, (RECORDS_NAME, records)])


# ---- whole shards


def test_round_trip(shard: Path) -> None:
    images = tiny_images(0, 7)
    with ShardReader(shard, None, LAYOUT) as reader:
        assert (reader.images, reader.epochs, reader.shard) == (7, 2, 0)
        assert reader.labels.tolist() == [i.label for i in images]
        assert reader.indices.tolist() == [i.index for i in images]
        assert [reader.image_bytes(i) for i in range(7)] == [i.data for i in images]
        assert len(reader.records(1)) == 7
    read_all(shard)


def test_opening_reads_every_name_once(shard: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parse = Mock(wraps=parse_image_name)
    monkeypatch.setattr(shard_header, "parse_image_name", parse)
    with ShardReader(shard, None, LAYOUT) as reader:
        assert [call.args[0] for call in parse.call_args_list] == [m.name for m in reader.header.members[:-1]]


def test_equal_content_gives_equal_bytes_and_no_partial_files(tmp_path: Path) -> None:
    a, b = write_tiny(tmp_path / "a"), write_tiny(tmp_path / "b")
    for name in ("dataset.json", "shard-00000.tar", "shard-00001.tar"):
        assert (a / name).read_bytes() == (b / name).read_bytes()
    assert len(list(a.iterdir())) == 3


def test_tarfile_reads_the_members_with_zeroed_metadata(shard: Path) -> None:
    with tarfile.open(shard) as archive:
        members = archive.getmembers()
    assert [m.name for m in members[1:-1]] == [f"{i:07d}_c{i % 3:05d}.png" for i in range(7)]
    assert (members[0].name, members[-1].name) == (HEADER_NAME, RECORDS_NAME)
    for m in members:
        assert (m.mode, m.uid, m.gid, m.mtime, m.uname, m.gname, m.type) == (0o644, 0, 0, 0, "", "", tarfile.REGTYPE)


def test_our_tar_headers_are_those_of_tarfile() -> None:
    """tarfile leaves the device numbers empty or writes zeros there, by version: compare the rest."""
    ours = tar.header("0000001_c00002.jpg", 12345)
    info = tarfile.TarInfo("0000001_c00002.jpg")
    info.size = 12345
    theirs = info.tobuf(tarfile.USTAR_FORMAT)
    assert tarfile.TarInfo.frombuf(ours, "ascii", "strict").size == 12345
    assert ours[:148] == theirs[:148] and ours[156:329] == theirs[156:329]


def test_reading_in_other_processes(shard: Path) -> None:
    with ShardReader(shard, None, LAYOUT) as reader:
        expected = reader.image_bytes(3)
        with multiprocessing.get_context("fork").Pool(2) as pool:
            assert pool.map(reader.image_bytes, [3, 3, 3]) == [expected] * 3
        assert pickle.loads(pickle.dumps(reader)).image_bytes(3) == expected
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            assert pool.map(reader.image_bytes, [3]) == [expected]
        reader.close()
        assert reader.image_bytes(3) == expected


@pytest.mark.parametrize("position", [-1, 7])
def test_positions_out_of_range(shard: Path, position: int) -> None:
    with ShardReader(shard, None, LAYOUT) as reader:
        with pytest.raises(IndexError):
            reader.image_bytes(position)
        with pytest.raises(IndexError):
            reader.records(position)


# ---- damage


def test_every_truncation_is_refused(shard: Path) -> None:
    data = shard.read_bytes()
    for size in [*range(0, len(data), 97), len(data) - 1, len(data) - 512, len(data) - 1024]:
        shard.write_bytes(data[:size])
        with pytest.raises(FormatError, match=r"shard-00000\.tar"):
            ShardReader(shard, None, LAYOUT)


def test_bytes_after_the_end_are_refused(shard: Path) -> None:
    shard.write_bytes(shard.read_bytes() + b"\0")
    with pytest.raises(FormatError, match=r"the file has 10241, expected 10240 bytes"):
        ShardReader(shard, None, LAYOUT)


def test_every_flipped_byte_is_refused(shard: Path) -> None:
    data = shard.read_bytes()
    for at in range(0, len(data), 23):
        shard.write_bytes(data[:at] + bytes([data[at] ^ 0x10]) + data[at + 1 :])
        with pytest.raises(FormatError, match=r"shard-00000\.tar"):
            read_all(shard)


def test_a_damaged_image_is_named_with_its_offset_and_the_others_stay_readable(shard: Path) -> None:
    data = bytearray(shard.read_bytes())
    at = data.index(tiny_images(2, 1)[0].data)
    data[at + 40] ^= 1
    shard.write_bytes(data)
    with ShardReader(shard, None, LAYOUT) as reader:
        reader.image_bytes(1)
        with pytest.raises(FormatError, match=r"crc32 .* expected") as caught:
            reader.image_bytes(2)
    assert (caught.value.path, caught.value.member, caught.value.offset) == (str(shard), "0000002_c00002.png", at)


def test_a_damaged_tar_header_is_named_with_its_offset(shard: Path) -> None:
    data = bytearray(shard.read_bytes())
    at = data.index(b"0000002_c00002.png", 1024) + 124
    data[at] = ord("7")
    shard.write_bytes(data)
    with ShardReader(shard, None, LAYOUT) as reader, pytest.raises(FormatError, match="tar header byte 124") as caught:
        reader.image_bytes(2)
    assert caught.value.offset == at


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="cannot be opened"):
        ShardReader(tmp_path / "shard-00000.tar", None, LAYOUT)


@pytest.mark.parametrize("content", [b"", b"\0" * 2048, b"not a tar file" * 100, b"\x1f\x8b" + b"\0" * 3000])
def test_other_files_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "shard-00000.tar").write_bytes(content)
    with pytest.raises(FormatError):
        ShardReader(tmp_path / "shard-00000.tar", None, LAYOUT)


# ---- the header's rules


def set_row(number: int, column: int, value: object) -> Callable[[dict[str, Any]], None]:
    def change(content: dict[str, Any]) -> None:
        content["members"][number][column] = value

    return change


HEADER_FAULTS: list[tuple[Callable[[dict[str, Any]], object], str]] = [
    (lambda c: c.update(format="tar"), "format is 'tar', expected 'nrrdd-shard'"),
    (lambda c: c.update(version=[3, 0]), r"version is 3\.0, this reader knows 1\.x and 2\.x"),
    (lambda c: c.update(version=[0, 9]), r"version is 0\.9"),
    (lambda c: c.update(version=[2, 0]), "states version 2, expected 1"),  # without further classes
    (lambda c: c.update(version="1.0"), "expected \\[major, minor\\]"),
    (lambda c: c.pop("version"), "version is None"),
    (lambda c: c.update(shard=-1), "shard is -1"),
    (lambda c: c.update(shard=65536), "shard is 65536"),
    (lambda c: c.update(shard=True), "shard is True"),
    (lambda c: c.update(epochs=0), "epochs is 0"),
    (lambda c: c.update(epochs=3), "epochs is 2, expected 3"),
    (lambda c: c.update(epochs=65537), "epochs is 65537"),
    (lambda c: c.update(members={}), "members"),
    (lambda c: c.update(members=c["members"][-2:]), "2 entries"),
    (lambda c: c.update(members=c["members"][1:]), "expected .* bytes"),
    (lambda c: c["members"].pop(), "last member is '0000006_c00000.png'"),
    (lambda c: c["members"].insert(0, "row"), "row 'row'"),
    (set_row(2, 0, "../../0000002_c00002.png"), "member name"),
    (set_row(2, 0, "0000002_c00002.exe"), "member name"),
    (set_row(2, 0, "00000002_c00002.png"), "member name"),
    (set_row(2, 0, "0000002_c2.png"), "member name"),
    (set_row(2, 0, "0000001_c00002.png"), "image 1 appears 2 times"),
    (set_row(2, 0, "0000002_c00002.jpg"), "extensions"),
    (set_row(2, 0, "0000002_c00001.png"), "tar header byte"),
    (set_row(2, 1, 0), "member '0000002_c00002.png': size is 0"),
    (set_row(2, 1, 2**24 + 1), "member '0000002_c00002.png': size is 16777217"),
    (set_row(2, 1, 2**63), "member '0000002_c00002.png': size"),
    (set_row(2, 1, 89), "tar header byte"),
    (set_row(2, 1, 700), "expected .* bytes"),
    (set_row(2, 1, 1.5), "size is"),
    (set_row(2, 2, 2**32), "member '0000002_c00002.png': crc32"),
    (set_row(2, 2, 5), "crc32 .* expected 00000005"),
    (set_row(-1, 1, 8**11), "member '__nrrdd__/records': size"),
    (set_row(-1, 2, 5), "crc32 .* expected 00000005"),
]


@pytest.mark.parametrize(("change", "message"), HEADER_FAULTS)
def test_header_faults(shard: Path, change: Callable[[dict[str, Any]], object], message: str) -> None:
    rewrite(shard, header=change)
    with pytest.raises(FormatError, match=message) as caught:
        read_all(shard)
    assert caught.value.path == str(shard)


def test_a_higher_minor_version_and_unknown_keys_are_read(shard: Path) -> None:
    rewrite(shard, header=lambda c: c.update(version=[1, 7], news="ignored"), head=lambda c: c.update(more=[1]))
    read_all(shard)


@pytest.mark.parametrize(
    ("payload", "message"),
    [
        (b"", "msgpack"),
        (b"\xc1", "msgpack"),
        (b"\x81\xa6format", "msgpack"),
        (msgpack.packb([1, 2]), "holds a list"),
        (msgpack.packb({"format": b"nrrdd-shard"}), "msgpack"),
        (msgpack.packb({"format": msgpack.ExtType(1, b"x")}), "msgpack"),
        (b"\xdd\xff\xff\xff\xff", "msgpack"),
        (b"\xdf\xff\xff\xff\xff", "msgpack"),
        (b"\xdb\xff\xff\xff\xff", "msgpack"),
        (b"\x91" * 5000, "msgpack"),
        (msgpack.packb({"a" * 5000: 1}), "msgpack"),
        (b"\x81\x01\x02", "msgpack"),
        (b"\x82\xa1a\x01\xa1a\x02", "a key appears twice"),
        (b"\x81\xa1\xff\x02", "msgpack"),
    ],
)
def test_hostile_msgpack_is_refused(payload: bytes, message: str) -> None:
    with pytest.raises(FormatError, match=message):
        unpack_frame(framed(zstandard.ZstdCompressor().compress(payload)))


def framed(payload: bytes) -> bytes:
    return len(payload).to_bytes(4, "little") + zlib.crc32(payload).to_bytes(4, "little") + payload


@pytest.mark.parametrize(
    ("payload", "message"),
    [
        (b"\x81\xa1a\x01", "header is not a valid zstd frame"),
        (zstandard.ZstdCompressor(write_content_size=False).compress(b"\x80"), "header states no length"),
        (zstandard.ZstdCompressor().compress(bytes(2**23 + 1)), "header states 8388609 bytes of content, expected at"),
        (zstandard.ZstdCompressor().compress(b"\x80") + b"\0", "header is not a valid zstd frame"),
    ],
)
def test_hostile_compression_is_refused(payload: bytes, message: str) -> None:
    with pytest.raises(FormatError, match=message):
        unpack_frame(framed(payload))


def test_deep_nesting_has_a_short_message(shard: Path) -> None:
    deep: list[Any] = []
    for _ in range(400):
        deep = [deep]
    rewrite(shard, header=lambda content: content.update(shard=deep))
    with pytest.raises(FormatError, match=r"shard is \[\[\[\[\.\.\.\]\]\]\], expected 0\.\.65535"):
        ShardReader(shard, None, LAYOUT)


@pytest.mark.parametrize(
    ("empty", "message"), [(b"\x90", "more than 1048640 list entries"), (b"\x80", "more than 64 map keys")]
)
def test_millions_of_empty_containers_are_refused(empty: bytes, message: str) -> None:
    """Each takes a byte here and sixty in memory."""
    many = b"\xdd\x00\x04\x00\x01" + empty * 262145
    payload = b"\x85" + b"".join(b"\xa1%c" % name + many for name in b"abcde")
    with pytest.raises(FormatError, match=message):
        unpack_frame(framed(zstandard.ZstdCompressor().compress(payload)))


def test_frames_with_wrong_lengths_or_checksums_are_refused() -> None:
    frame = pack_frame({"a": 1})
    assert unpack_frame(frame) == {"a": 1}
    for wrong in (b"", frame[:7], frame[:-1], frame + b"\0", frame[:-1] + b"\x02", b"\xff" * 4 + frame[4:]):
        with pytest.raises(FormatError):
            unpack_frame(wrong)
    with pytest.raises(FormatError, match="expected at most"):
        payload_length((MAX_HEADER_BYTES + 1).to_bytes(4, "little") + bytes(4), 2**40)


def test_a_header_longer_than_its_member_is_refused(shard: Path) -> None:
    members = members_of(shard)
    write_members(shard, [(HEADER_NAME, members[0][1] + b"\0"), *members[1:]])
    with pytest.raises(FormatError, match="tar header states"):
        ShardReader(shard, None, LAYOUT)


def test_the_first_member_must_be_the_header(shard: Path) -> None:
    members = members_of(shard)
    write_members(shard, [members[1], members[0], *members[2:]])
    with pytest.raises(FormatError, match="tar header byte 0"):
        ShardReader(shard, None, LAYOUT)


# ---- the records member's rules

BLOCK = 26  # bytes of a block of one epoch: 7 of packed fields and 7 of levels, in a zstd frame

HEAD_FAULTS: list[tuple[Callable[[dict[str, Any]], object], str]] = [
    (lambda c: c.update(epochs=1), "epochs is 1, expected 2"),
    (lambda c: c.update(pairs=6), "pairs is 6, expected 7"),
    (lambda c: c.update(blocks=[BLOCK]), "blocks: 1 entries"),
    (lambda c: c.update(blocks=[0, 2 * BLOCK]), "block size is 0"),
    (lambda c: c.update(blocks=[2**40, 1]), "block size is"),
    (lambda c: c.update(blocks=[BLOCK, BLOCK + 1]), "head and blocks take"),
    (lambda c: c.update(blocks=[BLOCK - 1, BLOCK + 1]), "crc32"),
    (lambda c: c.update(crcs=[0, 0]), "block 0: crc32"),
    (lambda c: c.update(crcs=[2**32, 0]), "block crc32 is"),
    (lambda c: c.pop("crcs"), "crcs: None"),
]


@pytest.mark.parametrize(("change", "message"), HEAD_FAULTS)
def test_records_head_faults(shard: Path, change: Callable[[dict[str, Any]], object], message: str) -> None:
    rewrite(shard, head=change)
    with ShardReader(shard, None, LAYOUT) as reader, pytest.raises(FormatError, match=message) as caught:
        reader.records(0)
    assert (caught.value.path, caught.value.member) == (str(shard), RECORDS_NAME)
    assert caught.value.offset is not None


def test_a_zstd_bomb_in_a_block_is_refused(shard: Path) -> None:
    bomb = zstandard.ZstdCompressor().compress(bytes(5_000_000))
    rewrite(shard, blocks=lambda blocks: [blocks[0], bomb])
    with ShardReader(shard, None, LAYOUT) as reader:
        reader.records(0)
        with pytest.raises(FormatError, match="block 1: record block states 5000000 bytes"):
            reader.records(1)


# ---- the shard and its manifest


@pytest.fixture
def dataset(tmp_path: Path) -> DistilledDataset:
    return open_dataset(write_tiny(tmp_path / "tiny"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bytes": 10239}, "bytes \\(manifest\\)"),
        ({"images": 6}, "expected 6 images \\(manifest\\)"),
        ({"record_bytes": 5}, "expected 5 bytes \\(manifest\\)"),
        ({"name": "shard-00001.tar"}, "says it is shard-00000.tar, expected shard-00001.tar"),
    ],
)
def test_a_shard_that_differs_from_its_manifest_entry(
    dataset: DistilledDataset, changes: dict[str, Any], message: str
) -> None:
    entry = replace(dataset.manifest.shards[0], **changes)
    with pytest.raises(FormatError, match=message):
        ShardReader(dataset.path / "shard-00000.tar", entry, dataset.manifest.layout_for(entry.images))


def test_labels_and_epochs_are_compared_with_the_manifest(tmp_path: Path) -> None:
    manifest = tiny_manifest()
    few = replace(manifest, dataset=replace(manifest.dataset, class_names=("circle", "square")))
    with pytest.raises(FormatError, match=r"0000002_c00002\.png.*class 2, expected less than 2"):
        open_dataset(write_tiny(tmp_path / "few", few)).shards[0]
    folder = write_tiny(tmp_path / "more", shards=1)
    text = (folder / "dataset.json").read_text()
    (folder / "dataset.json").write_text(text.replace('"epochs":2', '"epochs":3'))
    with pytest.raises(FormatError, match="2 epochs, expected 3"):
        open_dataset(folder).shards[0]


def test_shards_behave_like_a_sequence(dataset: DistilledDataset) -> None:
    with dataset:
        assert len(dataset.shards) == 2
        assert dataset.shards[0] is dataset.shards[0]
        assert [s.shard for s in dataset.shards] == [0, 1] == [s.shard for s in dataset.shards[:]]
        assert dataset.shards[-1].shard == 1
        with pytest.raises(IndexError):
            dataset.shards[2]


def test_a_dataset_survives_the_loss_of_a_shard(tmp_path: Path) -> None:
    for coding in ("explicit", "derived"):
        folder = write_tiny(tmp_path / coding, tiny_manifest(coding=coding), shards=3)
        with open_dataset(folder) as whole:
            expected = whole.shards[2].records(1).index_org.tolist()
            m = whole.manifest
        rest = replace(m, images=replace(m.images, count=14), shards=(m.shards[0], m.shards[2]))
        rest.save(folder / "dataset.json")
        (folder / "shard-00001.tar").unlink()
        assert verify_dataset(folder) == []
        with open_dataset(folder) as partial:
            assert partial.shards[1].records(1).index_org.tolist() == expected


# ---- writing


def write(path: Path, **changes: Any) -> None:
    arguments: dict[str, Any] = {
        "shard": 0,
        "images": tiny_images(0, 7),
        "extension": "png",
        "blocks": [b"x", b"y"],
        "epochs": 2,
        "layout": LAYOUT,
    }
    write_shard(path, **{**arguments, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shard": 65536}, "shard number 65536"),
        ({"extension": "gif"}, "image extension 'gif'"),
        ({"images": tiny_images(0, 6)}, "6 images, expected 7"),
        ({"epochs": 0}, "0 epochs"),
        ({"epochs": 3}, "2 record blocks, expected 3"),
        ({"images": [*tiny_images(0, 6), EncodedImage(index=0, label=1, data=b"x")]}, "appears twice"),
        ({"images": [*tiny_images(0, 6), EncodedImage(index=6, label=1, data=b"")]}, "image 6: 0 bytes"),
        ({"images": [*tiny_images(0, 6), EncodedImage(index=10**9, label=1, data=b"x")]}, "image 1000000000: expected"),
        ({"images": [*tiny_images(0, 6), EncodedImage(index=6, label=10**7, data=b"x")]}, "class 10000000, expected 0"),
        ({"images": [*tiny_images(0, 6), EncodedImage(index=6, label=-1, data=b"x")]}, "class -1, expected 0"),
        ({"images": [*tiny_images(0, 6), EncodedImage(index=6, label=1, data=bytes(2**24 + 1))]}, "image 6"),
    ],
)
def test_the_writer_refuses_what_no_reader_would_take(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        write(tmp_path / "shard-00000.tar", **changes)
    assert list(tmp_path.iterdir()) == []


def test_an_unwritable_place_is_an_output_error(tmp_path: Path) -> None:
    with pytest.raises(OutputError):
        write(tmp_path / "missing" / "shard-00000.tar")
    (tmp_path / "shard-00000.tar").mkdir()
    with pytest.raises(OutputError):
        write(tmp_path / "shard-00000.tar")


@pytest.mark.parametrize("place", [".", "/"])
def test_a_folder_without_a_name_is_not_written_to_either(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OutputError, match=rf"^{re.escape(place)}: cannot write \("), atomic_write(Path(place)):
        pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["shard-0.tar", "shard-00000.tgz", "../shard-00000.tar", "shard-65536.tar", "x"])
def test_shard_names(name: str) -> None:
    assert shard_number(shard_name(123)) == 123
    with pytest.raises(FormatError, match="shard name"):
        shard_number(name)


def test_image_names() -> None:
    assert parse_image_name("12345678_c123456.jpg") == (12345678, 123456, "jpg")
    for wrong in (
        "1_c00001.jpg",
        "0000001_c00001.jpeg",
        "0000001_c00001.jpg\n",
        "00000001_c00001.jpg",
        "0000001_c000001.jpg",
        "٠٠٠٠٠٠١_c00001.jpg",
    ):
        with pytest.raises(FormatError):
            parse_image_name(wrong)


def test_file_sha256(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"abc")
    assert file_sha256(tmp_path / "x").startswith("ba7816bf")


# ---- errors


def test_errors_name_their_place_and_survive_pickling() -> None:
    error = FormatError("is broken", member="m", offset=7).located(path="p", member="other")
    assert str(error) == "p, member 'm', offset 7: is broken"
    copy = pickle.loads(pickle.dumps(error))
    assert (str(copy), copy.member, copy.offset, copy.path) == (str(error), "m", 7, "p")
    assert str(FormatError("is broken")) == "is broken"
    assert all(issubclass(e, NrrddError) for e in (FormatError, ConfigError, DataError, OutputError))


def test_reading_uses_no_descriptor_after_close(shard: Path) -> None:
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    reader = ShardReader(shard, None, LAYOUT)
    reader.close()
    if before:
        assert len(os.listdir("/proc/self/fd")) == before
    assert isinstance(io.BytesIO(reader.image_bytes(0)).read(), bytes)
    del reader
    if before:
        assert len(os.listdir("/proc/self/fd")) == before


def test_labels_are_those_of_the_names(shard: Path) -> None:
    with ShardReader(shard, None, LAYOUT) as reader:
        assert reader.labels.dtype == np.int64 and reader.indices.dtype == np.int64
