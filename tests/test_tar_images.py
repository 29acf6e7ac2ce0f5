"""WebDataset shards as sources: where labels stand, how splits are told apart, and damage that a tar reader hides."""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import tarfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import webdataset
from PIL import Image

from builders import tar_index
from builders.cli import main
from builders.image_sets import Columns
from builders.images import UnusableImage
from builders.models import create_model
from builders.sources import Source, load_source
from builders.tar_images import TarImages
from builders.tar_index import ShardIndex, index_shards
from builders.teacher import save_checkpoint
from nrrdd_format.dataset import open_dataset
from nrrdd_format.errors import ConfigError, DataError
from nrrdd_format.verify import verify_dataset

SIZE = 16


def encoded(number: int, side: int = SIZE) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 256, (side, side, 3), np.uint8)
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def write_tar(path: Path, members: dict[str, bytes], **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", **options) as archive:
        for name, data in members.items():
            header = tarfile.TarInfo(name)
            header.size = len(data)
            archive.addfile(header, io.BytesIO(data))
    return path


def samples(numbers: range, classes: int = 3) -> dict[str, bytes]:
    members: dict[str, bytes] = {}
    for k in numbers:
        members |= {f"{k:04d}.png": encoded(k), f"{k:04d}.cls": str(k % classes).encode()}
    return members


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder in which indexes are kept."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    return tmp_path / "xdg" / "nrrdd" / "indexes"


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Two shards of training images, one of test images, three classes."""
    root = tmp_path / "shards"
    write_tar(root / "train" / "000.tar", samples(range(5)))
    write_tar(root / "train" / "001.tar", samples(range(5, 9)))
    write_tar(root / "test" / "000.tar", samples(range(20, 23)))
    return root


def load(place: Path | str, classes: list[str] | None = None, **options: Any) -> Source:
    columns = Columns(image=options.pop("image", None), label=options.pop("label", None))
    return load_source("webdataset", data_dir=Path(place), classes=classes, columns=columns, **options)


def refuse(place: Path | str, match: str, **options: Any) -> None:
    with pytest.raises(DataError, match=match) as caught:
        load(place, **options)
    assert "\n" not in str(caught.value)


def test_images_are_read_in_any_order(shards: Path) -> None:
    source = load(shards)
    assert source.class_names == ["0", "1", "2"]
    assert source.train.labels.tolist() == [0, 1, 2] * 3
    for index in (8, 0, 5):
        expected = np.asarray(Image.open(io.BytesIO(encoded(index)))).transpose(2, 0, 1)
        np.testing.assert_array_equal(source.train.read(index), expected)
    assert source.train.name(5) == "001.tar/0005"
    assert source.test is not None and len(source.test) == 3
    assert (source.size, source.beta, source.flip) == (SIZE, 1, True)


def test_what_the_library_writes_and_a_pattern(tmp_path: Path) -> None:
    for number in range(2):
        with webdataset.TarWriter(str(tmp_path / f"a-{number:03d}.tar")) as writer:
            for k in range(6):
                writer.write({"__key__": f"sub/{k}", "png": encoded(k), "cls": k % 3})
    source = load(tmp_path / "a-{000..001}.tar")
    assert len(source.train) == 12
    assert source.train.name(11) == "a-001.tar/sub/5"
    refuse(tmp_path / "a-{000..002}.tar", r"found no file a-002\.tar")


def test_class_names_beside_the_shards_and_a_subset(shards: Path) -> None:
    (shards / "classnames.txt").write_text("ape\nbee\ncat\n")
    assert load(shards).class_names == ["ape", "bee", "cat"]
    source = load(shards, ["cat", "ape"])
    assert source.class_names == ["ape", "cat"]
    assert source.train.labels.tolist() == [0, 1] * 3
    assert source.train.name(1) == "000.tar/0002"
    with pytest.raises(ConfigError, match="--classes: found 'dog'"):
        load(shards, ["dog", "ape"])


def test_splits_told_apart_by_the_names_of_shards(tmp_path: Path) -> None:
    for name in ("imagenet1k-train-00.tar", "imagenet1k-train-01.tar", "imagenet1k-validation-00.tar", "other.tar"):
        write_tar(tmp_path / name, samples(range(3)))
    source = load(tmp_path)
    assert source.test is not None
    assert (len(source.train), len(source.test)) == (6, 3)


def test_splits_told_apart_by_the_folders_of_shards(tmp_path: Path) -> None:
    for split in ("train", "val"):
        write_tar(tmp_path / split / "000.tar", samples(range(3)))
        write_tar(tmp_path / f"b-{split}-0123456789ab" / "000.tar", samples(range(3)))  # as kept of a URL
    for pattern in ("{train,val}/000.tar", "{b-train,b-val}-0123456789ab/000.tar"):
        source = load(tmp_path / pattern)
        assert source.test is not None and (len(source.train), len(source.test)) == (3, 3)


def test_braces_that_do_not_match(tmp_path: Path) -> None:
    refuse(tmp_path / "{000..", r"Unbalanced braces.*expected a pattern as path/\{000\.\.099\}\.tar")


def test_shards_of_unknown_names_are_all_for_training(tmp_path: Path, shards: Path) -> None:
    for name in ("contest.tar", "valley.tar"):
        write_tar(tmp_path / "all" / name, samples(range(3)))
    source = load(tmp_path / "all")
    assert (len(source.train), source.test) == (6, None)
    test = load(tmp_path / "all", test_dir=shards / "test").test
    assert test is not None and len(test) == 3


# Labels


def test_labels_in_json(tmp_path: Path) -> None:
    members: dict[str, bytes] = {}
    for k, name in enumerate(["cow", "ant", "cow", "ant"]):
        members |= {f"{k}.png": encoded(k), f"{k}.json": json.dumps({"label": name, "fine": k}).encode()}
    write_tar(tmp_path / "0.tar", members)
    source = load(tmp_path)
    assert source.class_names == ["ant", "cow"]
    assert source.train.labels.tolist() == [1, 0, 1, 0]
    assert load(tmp_path, label="fine").class_names == ["0", "1", "2", "3"]
    refuse(tmp_path, r"sample '0' has no label: found png, json, .* under 'coarse'", label="coarse")


def test_classes_named_by_wnids_get_their_words(tmp_path: Path) -> None:
    """As ImageNette's folders do: a teacher trained on those knows the classes by the same names."""
    members: dict[str, bytes] = {}
    for k, wnid in enumerate(["n03000684", "n01440764", "n02102040"]):
        members |= {f"{k}.png": encoded(k), f"{k}.cls": wnid.encode()}
    write_tar(tmp_path / "0.tar", members)
    (tmp_path / "words.txt").write_text("n03000684\tchainsaw, a tool\n")
    source = load(tmp_path)
    assert source.class_names == ["tench", "English springer", "chainsaw, a tool"]
    assert source.wnids == ["n01440764", "n02102040", "n03000684"]
    for wanted in ("n03000684", "chainsaw"):
        source = load(tmp_path / "0.tar", [wanted, "tench"])
        assert (source.wnids, source.train.labels.tolist()) == (["n01440764", "n03000684"], [1, 0])


def test_label_and_image_by_their_endings(tmp_path: Path) -> None:
    members: dict[str, bytes] = {}
    for k in range(4):
        members |= {f"{k}.left.png": encoded(k), f"{k}.jpg": encoded(k + 10), f"{k}.png": encoded(k), f"{k}.cls": b"0"}
        members[f"{k}.target.txt"] = b"dog\n" if k % 2 else b"cat\n"
    write_tar(tmp_path / "0.tar", members)
    refuse(tmp_path, r"sample '0' has several images \(jpg, png\); name one with --image-column")
    source = load(tmp_path, image="jpg", label="target.txt")
    assert source.class_names == ["cat", "dog"]
    expected = np.asarray(Image.open(io.BytesIO(encoded(11)))).transpose(2, 0, 1)
    np.testing.assert_array_equal(source.train.read(1), expected)


@pytest.mark.parametrize(
    ("members", "match"),
    [
        ({"a.png": encoded(0)}, r"0\.tar: sample 'a' has no label: found png, expected a member \.cls"),
        ({"a.png": encoded(0), "a.json": b"{"}, r"sample 'a': its \.json cannot be read"),
        ({"a.png": encoded(0), "a.json": b"[" * 100_000}, r"sample 'a': its \.json cannot be read"),
        ({"a.png": encoded(0), "a.json": b'{"label": 1.5}'}, "sample 'a' has no label"),
        ({"a.png": encoded(0), "a.json": b'{"label": true}'}, "sample 'a' has no label"),
        ({"a.png": encoded(0), "a.json": b"[1]"}, "sample 'a' has no label"),
        ({"a.png": encoded(0), "a.cls": b"\xff"}, r"sample 'a': its \.cls is no UTF-8 text"),
        ({"a.png": encoded(0), "a.cls": bytes((1 << 20) + 1)}, r"its \.cls has 1048577 bytes, expected at most"),
        ({"a.png": encoded(0), "a.cls": b"1", "b.png": encoded(0), "b.cls": b"x"}, "numbers and names as labels"),
        ({"a.png": encoded(0), "a.cls": b"999999999999"}, "labels 999999999999 to 999999999999, expected classes numb"),
        ({"a.png": encoded(0), "a.json": b'{"label": -1}'}, "labels -1 to -1, expected classes numbered from 0"),
        ({"a.png": encoded(0), "a.cls": b"1", "b.png": encoded(0), "b.cls": b"2"}, "split has no images for 0"),
        ({"a.txt": b"no image", "a.cls": b"1"}, "found no images in 1 shard"),
        ({"a.png": b"broken", "a.cls": b"0"}, "found no usable image in 1 shard"),
    ],
)  # fmt: skip
def test_samples_without_a_usable_label(tmp_path: Path, members: dict[str, bytes], match: str) -> None:
    write_tar(tmp_path / "0.tar", members)
    refuse(tmp_path, match)


def test_a_label_beyond_the_names(shards: Path) -> None:
    (shards / "classnames.txt").write_text("ape\nbee\n")
    refuse(shards, r"000\.tar: sample '0002' has the label 2, expected one of the 2 classes")


def test_what_is_no_sample_is_passed_over(tmp_path: Path) -> None:
    members = {"__nrrdd__/header": b"x", ".hidden.png": b"x", "lost.json": b"{}", **samples(range(3))}
    path = write_tar(tmp_path / "0.tar", members)
    with tarfile.open(path, "a") as archive:
        link = tarfile.TarInfo("link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    write_tar(tmp_path / "._0.tar", {})
    assert len(load(tmp_path).train) == 3


def test_long_names(tmp_path: Path) -> None:
    long = "deep/" * 40 + "x" * 150
    members = {
        f"{long}{k}.{ending}": data for k in range(2) for ending, data in (("png", encoded(k)), ("cls", b"%d" % k))
    }
    write_tar(tmp_path / "gnu.tar", members, format=tarfile.GNU_FORMAT)
    write_tar(tmp_path / "pax.tar", members, format=tarfile.PAX_FORMAT)
    train = load(tmp_path).train
    assert train.name(3) == f"pax.tar/{long}1"
    np.testing.assert_array_equal(train.read(1), train.read(3))


# Damage


def test_a_tar_cut_off_anywhere_is_named(tmp_path: Path) -> None:
    """Even between two members, where Python's reader sees a whole archive with fewer of them."""
    whole = write_tar(tmp_path / "whole.tar", samples(range(3))).read_bytes()
    cut = tmp_path / "cut" / "0.tar"
    cut.parent.mkdir()
    used = len(whole.rstrip(b"\0"))
    for length in range(0, used, 512):
        cut.write_bytes(whole[:length])
        refuse(cut.parent, r"0\.tar: (is no whole tar file|is damaged or cut off at byte|ends within)")
    for length in (100, 700, used - 1):
        cut.write_bytes(whole[:length])
        refuse(cut.parent, r"0\.tar: (is no whole tar file|is damaged or cut off at byte|ends within)")


def test_a_damaged_header_does_not_end_the_shard_in_silence(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "0.tar", samples(range(3)))
    data = bytearray(path.read_bytes())
    with tarfile.open(path) as archive:
        place = archive.getmember("0001.png").offset
    data[place] ^= 0xFF
    path.write_bytes(data)
    refuse(tmp_path, rf"0\.tar: is damaged or cut off at byte {place}, before the tar's end marker")


def header(name: str, size: int, kind: bytes = tarfile.REGTYPE) -> bytes:
    """A tar header that states any size, also one that `tarfile` would not write."""
    block = bytearray(tarfile.TarInfo(name).tobuf(tarfile.USTAR_FORMAT))
    octal = 0 <= size < 8**11
    block[124:136] = b"%011o\0" % size if octal else (size % 256**12 | (1 << 95 if size > 0 else 0)).to_bytes(12, "big")
    block[156:157] = kind
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


@pytest.mark.parametrize("kind", [tarfile.REGTYPE, tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.XGLTYPE])
@pytest.mark.parametrize("size", [-512, -5 * 512, 2**36, 2**61, 2**66])
@pytest.mark.parametrize("is_first", [False, True])
def test_a_header_that_states_an_impossible_size_ends_neither_in_a_loop_nor_in_full_memory(
    tmp_path: Path, kind: bytes, size: int, is_first: bool
) -> None:
    path = write_tar(tmp_path / "0.tar", samples(range(2)))
    with tarfile.open(path) as archive:
        place = 0 if is_first else archive.getmembers()[-1].offset_data + 512
    path.write_bytes(path.read_bytes()[:place] + header("notes.txt", size, kind) + bytes(2 * 512))
    refuse(tmp_path, r"0\.tar: (is no whole tar file|is damaged or cut off at byte)")


def test_a_number_of_too_many_digits_is_no_label(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", samples(range(3)) | {"9.png": encoded(9), "9.cls": b"7" * 5000})
    refuse(tmp_path, "found numbers and names as labels")


def test_a_class_name_that_labels_cannot_tell_apart_is_named(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", {"0.png": encoded(0), "0.cls": b"crane", "1.png": encoded(1), "1.cls": b"dog"})
    (tmp_path / "classnames.txt").write_text("crane\ncrane\ndog\n")
    refuse(tmp_path, r"classnames\.txt: several classes are named crane")


@pytest.mark.parametrize("content", [b"", b"text" * 500, b"\x1f\x8b\x08" + bytes(600)])
def test_what_is_no_tar(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "0.tar").write_bytes(content)
    refuse(tmp_path, r"0\.tar: is no whole tar file")


def test_a_shard_that_shrinks_or_goes_after_it_was_indexed(shards: Path) -> None:
    train = load(shards).train
    path = shards / "train" / "001.tar"
    path.write_bytes(path.read_bytes()[:600])
    with pytest.raises(DataError, match=r"001\.tar: ends within 0005"):
        train.read(5)
    path.unlink()
    with pytest.raises(DataError, match=r"001\.tar: cannot be read"):
        train.read(5)


def test_a_huge_member_is_not_read(shards: Path) -> None:
    train = load(shards).train
    assert isinstance(train, TarImages)
    train.length[0] = 1 << 40
    with pytest.raises(UnusableImage, match="more than the"):
        train.read(0)


def test_places_without_shards(tmp_path: Path) -> None:
    refuse(tmp_path, "found no .tar files")
    for place in ("pipe:curl x", "pipe:curl https://host/{0..9}.tar", "ftp://host/0.tar"):
        with pytest.raises(ConfigError, match=r"--data-dir: URLs that begin with '(pipe|ftp)' are not read; expected"):
            load_source("webdataset", data_dir=place)
    with pytest.raises(DataError, match="webdataset: --data-dir is missing"):
        load_source("webdataset", data_dir=None)


def test_the_fingerprint_follows_the_samples(shards: Path) -> None:
    first = load(shards).train.fingerprint()
    assert load(shards).train.fingerprint() == first
    others = {load(shards, size=24).train.fingerprint(), load(shards, ["0", "1"]).train.fingerprint()}
    members = samples(range(5, 9))
    members["0005.cls"] = b"1"
    write_tar(shards / "train" / "001.tar", members)
    others.add(load(shards).train.fingerprint())
    write_tar(shards / "train" / "001.tar", samples(range(5, 10)))
    others.add(load(shards).train.fingerprint())
    assert len(others | {first}) == 5


def test_a_build_from_shards_skips_broken_images(shards: Path, tmp_path: Path) -> None:
    members = samples(range(5))
    members["0003.png"] = b"broken"
    write_tar(shards / "train" / "000.tar", members)
    torch.manual_seed(0)
    save_checkpoint(tmp_path / "teacher.pt", create_model("conv2-w8", 3, SIZE), "conv2-w8", ["0", "1", "2"])
    command = (
        f"--dataset webdataset --data-dir {shards} --size {SIZE} --ipc 2 --out {tmp_path}/out --epochs 1 "
        f"--iterations 1 --device cpu --teacher-checkpoint {tmp_path}/teacher.pt --min-teacher-top1 0"
    )
    assert main(command.split()) == 0
    assert verify_dataset(tmp_path / "out") == []
    assert open_dataset(tmp_path / "out").manifest.dataset.name == "webdataset"
    assert "000.tar/0003" in next((tmp_path / "out.work").glob("build-*.json")).read_text()


# The kept index


def test_an_index_is_kept_and_read_again(shards: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = load(shards)
    assert len(list(own_cache.glob("*.json"))) == 3
    monkeypatch.setattr(tar_index, "_make_and_keep", None)  # as if it could not be made
    again = load(shards)
    assert again.train.fingerprint() == first.train.fingerprint()
    np.testing.assert_array_equal(again.train.read(7), first.train.read(7))


def test_what_decides_the_index_leads_to_another(shards: Path, own_cache: Path) -> None:
    """Of a shard its place, size and time; and the columns. Only the shard that changed is gone through again."""
    load(shards)
    kept = set(own_cache.glob("*.json"))
    write_tar(shards / "train" / "001.tar", samples(range(5, 10)))
    load(shards)
    longer = set(own_cache.glob("*.json"))
    assert len(longer - kept) == 1
    os.utime(shards / "train" / "000.tar", ns=(0, 0))
    load(shards)
    touched = set(own_cache.glob("*.json"))
    assert len(touched - longer) == 1
    load(shards, image="png")
    assert len(set(own_cache.glob("*.json")) - touched) == 3


def test_names_and_labels_of_any_kind_are_kept(tmp_path: Path, own_cache: Path) -> None:
    """Also a name that is no UTF-8."""
    members = {"\udcff.png": encoded(0), "\udcff.cls": b"1", "b.png": encoded(1), "b.cls": b"x"}
    write_tar(tmp_path / "0.tar", members)
    made, kept = (index_shards([tmp_path / "0.tar"], Columns(), own_cache.parent) for _ in range(2))
    assert made == kept
    assert (kept[0].keys, kept[0].labels) == (["\udcff", "b"], [1, "x"])


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"{}", b"[" * 100_000, b'{"keys": ["a"], "labels": [0], "offsets": [0]}',
     b'{"keys": ["a"], "labels": [0], "offsets": [-1], "lengths": [1]}',
     b'{"keys": ["a"], "labels": [0.5], "offsets": [0], "lengths": [1]}',
     b'{"keys": ["a"], "labels": [0], "offsets": [true], "lengths": [1]}',
     b'{"keys": [0], "labels": [0], "offsets": [0], "lengths": [1]}', b'{"names": []}'],
)  # fmt: skip
def test_a_damaged_index_is_made_anew(shards: Path, own_cache: Path, content: bytes) -> None:
    first = load(shards).train.fingerprint()
    for path in own_cache.glob("*.json"):
        path.write_bytes(content)
    assert load(shards).train.fingerprint() == first
    assert all(path.read_bytes() != content for path in own_cache.glob("*.json"))


def test_where_nothing_can_be_kept_the_index_is_made_each_time(shards: Path, own_cache: Path) -> None:
    own_cache.parent.mkdir(parents=True)
    own_cache.write_text("in the way")
    assert load(shards).train.fingerprint() == load(shards).train.fingerprint()
    assert own_cache.read_text() == "in the way"


def test_a_damaged_shard_leaves_no_index(shards: Path, own_cache: Path) -> None:
    path = shards / "train" / "001.tar"
    path.write_bytes(path.read_bytes()[:1500])
    refuse(shards, r"001\.tar: (is no whole tar file|is damaged or cut off)")
    assert len(list(own_cache.glob("*.json"))) == 1


def test_one_process_at_a_time_indexes(shards: Path, tmp_path: Path) -> None:
    """The others wait, and find what it has kept."""
    paths, made = sorted(shards.glob("train/*.tar")), tmp_path / "made"
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_index_slowly, args=(paths, tmp_path, made)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert made.read_text() == "000.tar\n001.tar\n"


def _index_slowly(paths: list[Path], cache_dir: Path, made: Path) -> None:
    make = tar_index._make_and_keep

    def slowly(path: Path, columns: Columns, folder: Path) -> ShardIndex:
        time.sleep(0.05)
        with open(made, "a") as log:
            log.write(f"{path.name}\n")
        return make(path, columns, folder)

    tar_index._make_and_keep = slowly
    assert sum(len(index.keys) for index in index_shards(paths, Columns(), cache_dir)) == 9


def test_a_cache_for_images_that_need_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--cache-dir: imagefolder keeps nothing there, only webdataset does"):
        load_source("imagefolder", data_dir=tmp_path, cache_dir=tmp_path)
