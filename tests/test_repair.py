"""`repair_dataset`: bad shards are replaced or dropped, what is lost is said, and no file is ever deleted."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from make_dataset import make_tiny_dataset
from tiny_dataset import tiny_images, tiny_records

from nrrdd_format import repair
from nrrdd_format.dataset import open_dataset
from nrrdd_format.errors import ConfigError, FormatError, OutputError
from nrrdd_format.manifest import MANIFEST_NAME, Manifest
from nrrdd_format.records import encode_shard_records
from nrrdd_format.repair import repair_dataset
from nrrdd_format.shards import shard_name, write_shard
from nrrdd_format.verify import verify_dataset

SHARDS = 4
Damage = Callable[[Path], None]


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    """A sound dataset of four shards of six images."""
    return make_tiny_dataset(tmp_path / "whole", ipc=8, shards=SHARDS)


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    """A copy of it, to be damaged."""
    return shutil.copytree(whole, tmp_path / "data")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def flip(path: Path, at: int = 3000) -> None:
    data = bytearray(path.read_bytes())
    data[at % len(data)] ^= 1
    path.write_bytes(data)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 600)


def extend(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


def replace_by_another(path: Path) -> None:
    shutil.copy(path.with_name(shard_name(0)), path)


DAMAGES: list[Damage] = [flip, truncate, extend, Path.unlink, replace_by_another]
damages = pytest.mark.parametrize("damage", DAMAGES)


def test_a_sound_dataset_is_left_alone(folder: Path) -> None:
    before = contents(folder)
    for copy in (None, folder.parent / "whole"):
        done = repair_dataset(folder, copy=copy)
        assert not (done.bad or done.left or done.fetched or done.dropped or done.set_aside)
        assert contents(folder) == before


@damages
def test_a_bad_shard_is_fetched_from_another_copy(whole: Path, folder: Path, damage: Damage) -> None:
    damage(folder / shard_name(2))
    damaged = contents(folder)
    done = repair_dataset(folder, copy=whole)
    assert done.fetched == (shard_name(2),) and done.left == () and done.dropped == ()
    assert verify_dataset(folder) == []
    after = contents(folder)
    if damage is Path.unlink:
        assert done.set_aside == ()
    else:
        assert done.set_aside == (f"{shard_name(2)}.damaged",)
        assert after.pop(done.set_aside[0]) == damaged[shard_name(2)], "the damaged file is kept as it was"
    assert after == contents(whole)


@damages
def test_without_another_copy_a_bad_shard_is_dropped(whole: Path, folder: Path, damage: Damage) -> None:
    damage(folder / shard_name(2))
    damaged = contents(folder)
    done = repair_dataset(folder)
    assert done.dropped == (shard_name(2),) and not done.left and not done.fetched
    (lost,) = done.bad
    assert (lost.images, lost.pairs) == (6, 18)
    assert verify_dataset(folder) == []
    after, before = Manifest.load(folder / MANIFEST_NAME), Manifest.load(whole / MANIFEST_NAME)
    assert after.dataset_id == done.manifest.dataset_id
    assert after.images.count == 18
    assert after.shards == tuple(entry for entry in before.shards if entry.name != shard_name(2))
    assert replace(after, images=before.images, shards=before.shards).to_json() == before.to_json()
    assert not (folder / shard_name(2)).exists()
    kept = [] if damage is Path.unlink else [damaged[shard_name(2)]]
    assert [(folder / name).read_bytes() for name in done.set_aside] == kept


@damages
@pytest.mark.parametrize("with_copy", [False, True])
def test_a_dry_run_says_the_same_and_changes_nothing(
    whole: Path, folder: Path, damage: Damage, with_copy: bool
) -> None:
    damage(folder / shard_name(1))
    before = contents(folder)
    copy = whole if with_copy else None
    said = repair_dataset(folder, copy=copy, dry_run=True)
    assert contents(folder) == before
    done = repair_dataset(folder, copy=copy)
    assert (said.fetched, said.dropped, said.bad) == (done.fetched, done.dropped, done.bad)
    assert said.manifest.dataset_id == done.manifest.dataset_id
    assert said.set_aside == ()


@settings(max_examples=20)
@given(
    here=st.sets(st.integers(0, SHARDS - 1), max_size=SHARDS),
    there=st.sets(st.integers(0, SHARDS - 1), max_size=SHARDS),
)
def test_what_one_copy_lost_the_other_gives(
    tmp_path_factory: pytest.TempPathFactory, here: set[int], there: set[int]
) -> None:
    root = tmp_path_factory.mktemp("repair")
    data = make_tiny_dataset(root / "data", ipc=4, shards=SHARDS, epochs=1)
    copy = shutil.copytree(data, root / "copy")
    for number in here:
        flip(data / shard_name(number), 2000)
    for number in there:
        flip(copy / shard_name(number), 2001)
    untouched = contents(copy)
    done = repair_dataset(data, copy=copy)
    assert contents(copy) == untouched
    assert set(done.fetched) == {shard_name(number) for number in here - there}
    assert {one.name for one in done.left} == {shard_name(number) for number in here & there}
    assert len(Manifest.load(data / MANIFEST_NAME).shards) == SHARDS, "with a copy nothing is dropped"
    assert {problem.shard for problem in verify_dataset(data)} == {one.name for one in done.left}
    if 0 < len(done.left) < SHARDS:
        repair_dataset(data)
        assert verify_dataset(data) == []


def test_a_shard_that_is_bad_in_both_copies_stays_as_it_is(whole: Path, folder: Path) -> None:
    flip(folder / shard_name(0))
    flip(folder / shard_name(3))
    truncate(whole / shard_name(3))
    damaged = contents(folder)
    done = repair_dataset(folder, copy=whole)
    (left,) = done.left
    assert left.name == shard_name(3) and left.fault_of_copy is not None and "sha256" in left.fault_of_copy
    assert contents(folder)[shard_name(3)] == damaged[shard_name(3)]
    assert [problem.shard for problem in verify_dataset(folder)] == [shard_name(3)] * 2


def test_a_damaged_file_never_takes_the_place_of_an_earlier_one(whole: Path, folder: Path) -> None:
    kept = []
    for at in (2000, 2001, 2002):
        flip(folder / shard_name(1), at)
        kept.append((folder / shard_name(1)).read_bytes())
        repair_dataset(folder, copy=whole)
    names = [f"{shard_name(1)}.damaged", f"{shard_name(1)}.damaged-2", f"{shard_name(1)}.damaged-3"]
    assert [(folder / name).read_bytes() for name in names] == kept
    assert verify_dataset(folder) == []


def test_if_every_shard_is_bad_nothing_is_done(whole: Path, folder: Path) -> None:
    for number in range(SHARDS):
        flip(folder / shard_name(number))
    before = contents(folder)
    with pytest.raises(FormatError, match=r"every shard is bad.*--from"):
        repair_dataset(folder)
    assert contents(folder) == before
    assert len(repair_dataset(folder, copy=whole).fetched) == SHARDS


@pytest.mark.parametrize("damaged", [b"{", b"", None])
def test_a_damaged_manifest_is_taken_from_the_other_copy(whole: Path, folder: Path, damaged: bytes | None) -> None:
    file = folder / MANIFEST_NAME
    file.unlink()
    if damaged is not None:
        file.write_bytes(damaged)
    flip(folder / shard_name(1))
    with pytest.raises(FormatError, match=r"dataset\.json.*--from"):
        repair_dataset(folder)
    said = repair_dataset(folder, copy=whole, dry_run=True)
    assert said.manifest_fault is not None and "dataset.json" in said.manifest_fault
    assert file.exists() == (damaged is not None)
    done = repair_dataset(folder, copy=whole)
    assert done.fetched == (shard_name(1),)
    assert file.read_bytes() == (whole / MANIFEST_NAME).read_bytes()
    aside = [] if damaged is None else ["dataset.json.damaged"]
    assert list(done.set_aside) == [*aside, f"{shard_name(1)}.damaged"]
    assert verify_dataset(folder) == []


def test_a_manifest_of_another_dataset_is_refused(tmp_path: Path, folder: Path) -> None:
    other = make_tiny_dataset(tmp_path / "other", seed=1, ipc=8, shards=SHARDS)
    (folder / MANIFEST_NAME).write_bytes(b"{")
    before = contents(folder)
    with pytest.raises(FormatError, match="is that a copy of this dataset"):
        repair_dataset(folder, copy=other)
    assert contents(folder) == before


def test_a_copy_of_another_dataset_gives_nothing(tmp_path: Path, folder: Path) -> None:
    other = make_tiny_dataset(tmp_path / "other", seed=1, ipc=8, shards=SHARDS)
    flip(folder / shard_name(1))
    before = contents(folder)
    assert [one.name for one in repair_dataset(folder, copy=other).left] == [shard_name(1)]
    assert contents(folder) == before


def test_both_manifests_damaged(whole: Path, folder: Path) -> None:
    for path in (whole, folder):
        (path / MANIFEST_NAME).write_bytes(b"{")
    with pytest.raises(FormatError, match=r"whole/dataset\.json"):
        repair_dataset(folder, copy=whole)


def test_an_empty_folder_is_filled_from_a_copy(whole: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    repair_dataset(tmp_path / "empty", copy=whole)
    assert contents(tmp_path / "empty") == contents(whole)


@pytest.mark.parametrize(
    ("path", "copy", "message"),
    [
        ("data", "data", "is the dataset itself"),
        ("data", "none", "is no folder"),
        ("none", "data", "no such folder"),
        ("data", "n" * 300, "is no folder"),  # a name that the system refuses to look for
        ("n" * 300, "data", "no such folder"),
    ],
)
def test_folders_that_cannot_be(folder: Path, path: str, copy: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        repair_dataset(folder.parent / path, copy=folder.parent / copy)


def test_a_shard_that_may_not_be_read_is_not_called_damaged(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = contents(folder)
    monkeypatch.setattr(os, "access", lambda path, mode: path.name != shard_name(2))
    with pytest.raises(ConfigError, match=r"shard-00002\.tar: may not be read"):
        repair_dataset(folder)
    assert contents(folder) == before


def test_a_repeated_image_costs_the_later_shard_unless_the_first_is_bad(folder: Path) -> None:
    """Shard 3 holds the images of shard 0 under the manifest's own hash, as a wrong builder would write it."""
    manifest = Manifest.load(folder / MANIFEST_NAME)
    layout = manifest.layout(3)
    blocks = encode_shard_records((tiny_records(layout, 3, epoch) for epoch in range(3)), layout, 3)
    entry = write_shard(
        folder / shard_name(3),
        shard=3,
        images=tiny_images(0, 6),
        extension="png",
        blocks=blocks,
        epochs=3,
        layout=layout,
    )
    replace(manifest, shards=(*manifest.shards[:3], entry)).save(folder / MANIFEST_NAME)
    assert repair_dataset(folder, dry_run=True).dropped == (shard_name(3),)
    flip(folder / shard_name(0))
    assert repair_dataset(folder).dropped == (shard_name(0),)
    assert verify_dataset(folder) == []


def one_class_a_shard(folder: Path) -> Path:
    """Three shards, each with a class of its own."""
    make_tiny_dataset(folder, classes=1, ipc=12, shards=3, epochs=1)
    manifest = Manifest.load(folder / MANIFEST_NAME)
    wider = replace(manifest, dataset=replace(manifest.dataset, class_names=("a", "b", "c")))
    entries = []
    for number, entry in enumerate(manifest.shards):
        layout = wider.layout(number)
        images = [replace(image, label=number) for image in tiny_images(4 * number, 4)]
        blocks = encode_shard_records([tiny_records(layout, number, 0)], layout, number)
        path = folder / entry.name
        entries.append(
            write_shard(path, shard=number, images=images, extension="png", blocks=blocks, epochs=1, layout=layout)
        )
    replace(wider, shards=tuple(entries)).save(folder / MANIFEST_NAME)
    return folder


@pytest.mark.parametrize(("damage", "before"), [(flip, 4), (truncate, 4 / 3)])
def test_a_class_that_becomes_small_is_named(tmp_path: Path, damage: Damage, before: float) -> None:
    """Where the header can still be read, what was there is known; else it is estimated."""
    folder = one_class_a_shard(tmp_path / "data")
    assert verify_dataset(folder) == []
    damage(folder / shard_name(1))
    (thinned,) = repair_dataset(folder).thinned
    assert (thinned.label, thinned.name, thinned.images) == (1, "b", 0)
    assert thinned.before == pytest.approx(before)


def test_balanced_losses_name_no_class(folder: Path) -> None:
    flip(folder / shard_name(1))
    assert repair_dataset(folder).thinned == ()


def test_an_interrupted_fetch_leaves_the_damaged_shard(
    whole: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flip(folder / shard_name(1))
    before = contents(folder)

    def broken(*_: object) -> Iterator[bytes]:
        yield b"half"
        raise KeyboardInterrupt

    monkeypatch.setattr(repair, "verified_chunks", broken)
    with pytest.raises(KeyboardInterrupt):
        repair_dataset(folder, copy=whole)
    assert contents(folder) == before


def test_a_copy_that_changes_under_our_hands_is_not_taken(
    whole: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flip(folder / shard_name(1))
    before = contents(folder)
    found = repair._find_bad

    def then_damage(*arguments: Path) -> object:
        bad = found(*arguments)  # type: ignore[arg-type]
        flip(whole / shard_name(1))
        return bad

    monkeypatch.setattr(repair, "_find_bad", then_damage)
    with pytest.raises(FormatError, match="sha256"):
        repair_dataset(folder, copy=whole)
    assert contents(folder) == before


def test_a_full_disk_is_told_and_changes_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flip(folder / shard_name(1))
    before = contents(folder)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match="No space left"):
        repair_dataset(folder)
    assert contents(folder) == before


def test_a_repaired_dataset_is_read_as_before(whole: Path, folder: Path) -> None:
    flip(folder / shard_name(0))
    repair_dataset(folder)
    with open_dataset(whole) as before, open_dataset(folder) as after:
        for old, new in zip(list(before.shards)[1:], after.shards, strict=True):
            assert new.records(1).index_aug.tolist() == old.records(1).index_aug.tolist()
            assert new.image_bytes(2) == old.image_bytes(2)
