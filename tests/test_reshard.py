"""`reshard_dataset`: larger shards, the same images, the same pairs."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from make_dataset import make_tiny_dataset
from tiny_dataset import tiny_images

from nrrdd_format.codebooks import Codebooks
from nrrdd_format.dataset import open_dataset
from nrrdd_format.errors import ConfigError, FormatError, OutputError
from nrrdd_format.manifest import MANIFEST_NAME, Manifest
from nrrdd_format.pairs import PairRecords, RecordLayout, cycle_bounds
from nrrdd_format.records import encode_shard_records
from nrrdd_format.regroup import merge_datasets, split_dataset
from nrrdd_format.reshard import join_neighbours, reshard_dataset
from nrrdd_format.shards import shard_name, write_shard
from nrrdd_format.verify import verify_dataset


def all_pairs(folder: Path, epoch: int) -> Iterator[tuple[Any, ...]]:
    """Every pair of an epoch, its images by their number in the dataset."""
    with open_dataset(folder) as dataset:
        for shard in dataset.shards:
            records = shard.records(epoch)
            columns = records.columns()
            columns["index_org"], columns["index_aug"] = (
                shard.indices[records.index_org],
                shard.indices[records.index_aug],
            )
            yield from zip(*(column.tolist() for column in columns.values()), strict=True)


def all_images(folder: Path) -> list[tuple[int, int, bytes]]:
    with open_dataset(folder) as dataset:
        return [
            (int(shard.indices[image]), int(shard.labels[image]), shard.image_bytes(image))
            for shard in dataset.shards
            for image in range(shard.images)
        ]


def assert_same(before: Path, after: Path) -> None:
    """The same images and pairs, in the same order, and a sound dataset."""
    assert verify_dataset(after) == []
    assert all_images(after) == all_images(before)
    for epoch in range(Manifest.load(before / MANIFEST_NAME).records.epochs):
        assert list(all_pairs(after, epoch)) == list(all_pairs(before, epoch))


@settings(max_examples=25)
@given(
    ipc=st.integers(2, 8),
    shards=st.integers(2, 5),
    target=st.integers(2, 40),
    cycle=st.integers(2, 6),
    mix_group=st.integers(1, 5),
    coding=st.sampled_from(["explicit", "derived"]),
    flip=st.booleans(),
    epochs=st.integers(1, 3),
)
def test_images_and_pairs_stay_the_same(
    tmp_path_factory: pytest.TempPathFactory, ipc: int, shards: int, target: int, epochs: int, **settings: Any
) -> None:
    root = tmp_path_factory.mktemp("reshard")
    shards = min(shards, 3 * ipc // 2)  # two images a shard at least
    data = make_tiny_dataset(root / "data", ipc=ipc, shards=shards, epochs=epochs, **settings)
    try:
        done = reshard_dataset(data, target, root / "out")
    except ConfigError as error:
        assert "joins no two shards" in str(error)
        assert [path.name for path in root.iterdir()] == ["data"]
        return
    assert_same(data, root / "out")
    assert len(done.after.shards) < len(done.before.shards)
    assert done.after.records.coding in ("explicit", "verbatim")
    assert done.after.images == done.before.images
    names = [entry.name for entry in done.before.shards]
    assert [entry.name for entry in done.after.shards] == [name for name in names if (root / "out" / name).exists()]


@pytest.mark.parametrize("coding", ["explicit", "derived"])
def test_where_cycles_and_groups_fit_records_are_explicit(tmp_path: Path, coding: Any) -> None:
    data = make_tiny_dataset(tmp_path / "data", ipc=10, shards=5, cycle=3, mix_group=2, coding=coding)
    done = reshard_dataset(data, 12, tmp_path / "out")
    assert done.after.records == replace(done.before.records, coding="explicit", block_epochs=1)
    assert [entry.images for entry in done.after.shards] == [12, 12, 6]
    assert done.after.codebooks.mixes == done.before.codebooks.mixes
    assert_same(data, tmp_path / "out")


@pytest.mark.parametrize(
    ("ipc", "shards", "cycle", "mix_group", "expected"),
    [
        (10, 5, 4, 2, (6, 2)),  # cycles of 4 and 2 in a shard of 6: groups of 6
        (10, 5, 3, 4, (3, 2)),  # cycles fit, mix groups of 4 are cut at 6
        (10, 5, 5, 6, (6, 6)),  # 5 + 1 are one cycle
        (7, 3, 4, 7, (7, 7)),
        (7, 3, 2, 3, (7, 1)),
    ],
)
def test_otherwise_they_are_verbatim_in_the_smallest_groups(
    tmp_path: Path, ipc: int, shards: int, cycle: int, mix_group: int, expected: tuple[int, int]
) -> None:
    data = make_tiny_dataset(tmp_path / "data", ipc=ipc, shards=shards, cycle=cycle, mix_group=mix_group)
    after = reshard_dataset(data, ipc * 3, tmp_path / "out").after
    assert after.records.coding == "verbatim"
    assert after.codebooks.views is None and after.codebooks.mixes is None
    assert (after.records.cycle, after.records.mix_group) == expected
    assert_same(data, tmp_path / "out")


@pytest.mark.parametrize(("shards", "images", "expected"), [(4, 6, 4), (4, 12, 2), (2, 12, 4), (4, 100, 2)])
def test_blocks_hold_about_as_many_pairs_as_before(tmp_path: Path, shards: int, images: int, expected: int) -> None:
    data = make_tiny_dataset(tmp_path / "data", ipc=4, shards=shards, block_epochs=8)
    after = reshard_dataset(data, images, tmp_path / "out").after
    assert after.records.block_epochs == expected
    assert_same(data, tmp_path / "out")


def test_shards_of_several_sizes(tmp_path: Path) -> None:
    """Shards of 7, 7, 6 and 6 images: no cycle fits all of them, so a joined shard is one group, as long as it is."""
    data = make_tiny_dataset(tmp_path / "data", classes=2, ipc=13, shards=4, cycle=3, mix_group=3)
    after = reshard_dataset(data, 13, tmp_path / "out").after
    assert [entry.images for entry in after.shards] == [14, 12]
    assert (after.records.cycle, after.records.mix_group) == (14, 1)
    assert_same(data, tmp_path / "out")


def write_verbatim(folder: Path, pairs: int = 4, images: int = 6, shards: int = 3) -> Path:
    """A dataset whose pairs were not drawn by the format: some images have none, a pair may be its own partner."""
    make_tiny_dataset(folder, classes=images * shards, ipc=1, shards=shards, epochs=3)
    manifest = Manifest.load(folder / MANIFEST_NAME)
    records = replace(manifest.records, coding="verbatim", cycle=pairs, mix_group=2)
    codebooks = Codebooks(views=None, mixes=None, distances=manifest.codebooks.distances)
    manifest = replace(manifest, records=records, codebooks=codebooks)
    entries = []
    for number in range(shards):
        layout = manifest.layout_for(images, pairs)
        entries.append(
            write_shard(
                folder / shard_name(number),
                shard=number,
                images=[replace(image, label=number) for image in tiny_images(images * number, images)],
                extension="png",
                blocks=encode_shard_records([foreign_pairs(layout, number, e) for e in range(3)], layout, number),
                epochs=3,
                layout=layout,
            )
        )
    replace(manifest, shards=tuple(entries)).save(folder / MANIFEST_NAME)
    return folder


def foreign_pairs(layout: RecordLayout, shard: int, epoch: int) -> PairRecords:
    rng = np.random.default_rng([shard, epoch])
    order = rng.permutation(layout.images)[: layout.pairs]
    partner = rng.integers(0, layout.pairs, layout.pairs)
    corner = rng.integers(0, layout.size // 2, (layout.pairs, 2))
    view = np.concatenate([corner, rng.integers(1, layout.size // 2, (layout.pairs, 2))], axis=1).astype(np.int16)
    flip = rng.integers(0, 2, layout.pairs).astype(bool)
    is_cutmix = rng.integers(0, 2, layout.groups).astype(bool)
    group = layout.group_of_pair
    return PairRecords(
        index_org=order,
        index_aug=order[partner],
        view_org=view,
        view_aug=view[partner],
        flip_org=flip,
        flip_aug=flip[partner],
        is_cutmix=is_cutmix[group],
        mix_box=np.where(is_cutmix[:, None], [1, 2, 3, 4], 0).astype(np.int16)[group],
        lam=rng.uniform(size=layout.groups).astype(np.float32)[group],
        distance_org=layout.levels[rng.integers(0, len(layout.levels), layout.pairs)],
        distance_aug=layout.levels[rng.integers(0, len(layout.levels), layout.pairs)],
    )


def test_verbatim_records_stay_verbatim(tmp_path: Path) -> None:
    data = write_verbatim(tmp_path / "data")
    assert verify_dataset(data) == []
    after = reshard_dataset(data, 12, tmp_path / "out").after
    assert [(entry.images, entry.pairs_per_epoch) for entry in after.shards] == [(12, 8), (6, 4)]
    assert (after.records.cycle, after.records.mix_group) == (4, 2)
    assert_same(data, tmp_path / "out")


def test_parts_can_be_resharded_and_then_merged(tmp_path: Path) -> None:
    data = make_tiny_dataset(tmp_path / "data", ipc=16, shards=8, cycle=3, mix_group=3)
    split_dataset(data, [tmp_path / "a", tmp_path / "b"])
    for part in "ab":
        reshard_dataset(tmp_path / part, 12, tmp_path / f"large-{part}")
    merge_datasets([tmp_path / "large-b", tmp_path / "large-a"], tmp_path / "out")
    assert_same(data, tmp_path / "out")


@given(sizes=st.lists(st.integers(2, 50), max_size=20), target=st.integers(2, 100))
def test_neighbours_come_near_the_target(sizes: list[int], target: int) -> None:
    groups = join_neighbours(sizes, target)
    assert [index for group in groups for index in group] == list(range(len(sizes)))
    totals = [sum(sizes[index] for index in group) for group in groups]
    for group, total in list(zip(groups, totals, strict=True))[:-1]:
        following, last = sizes[group.stop], sizes[group.stop - 1]
        assert abs(total + following - target) > abs(total - target), "the next shard brings it no nearer"
        assert len(group) == 1 or abs(total - target) <= abs(total - last - target), "nor does leaving one out"


@pytest.mark.parametrize(
    ("images", "message"),
    [(1, "found 1"), (2, "joins no two"), (8, "which hold up to 6; ask for 12"), (2**19, "ex")],
)
def test_targets_that_cannot_be(tmp_path: Path, images: int, message: str) -> None:
    data = make_tiny_dataset(tmp_path / "data")
    with pytest.raises(ConfigError, match=f"--images: .*{message}"):
        reshard_dataset(data, images, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_a_damaged_dataset_and_an_existing_folder_are_refused(tmp_path: Path) -> None:
    data = make_tiny_dataset(tmp_path / "data")
    (tmp_path / "out").mkdir()
    with pytest.raises(OutputError, match="exists already"):
        reshard_dataset(data, 12, tmp_path / "out")
    (tmp_path / "out").rmdir()
    path = data / shard_name(1)
    content = bytearray(path.read_bytes())
    content[content.index(b"IDAT") + 6] ^= 1
    path.write_bytes(content)
    with pytest.raises(FormatError, match=r"shard-00001\.tar"):
        reshard_dataset(data, 12, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_more_shards_are_joined_than_files_may_be_open(tmp_path: Path) -> None:
    data = make_tiny_dataset(tmp_path / "data", ipc=20, shards=30)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/dev/fd")) + 15, hard))
    try:
        reshard_dataset(data, 60, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert verify_dataset(tmp_path / "out") == []


def test_groups_of_a_joined_shard_are_closed(tmp_path: Path) -> None:
    """What the loader relies on: both images of a pair stand in the same group of positions."""
    data = make_tiny_dataset(tmp_path / "data", ipc=10, shards=5, cycle=4, mix_group=4)
    after = reshard_dataset(data, 100, tmp_path / "out").after
    bounds = cycle_bounds(30, after.records.cycle)
    with open_dataset(tmp_path / "out") as dataset:
        records = dataset.shards[0].records(0)
    for start, stop in pairwise(bounds):
        assert set(records.index_aug[start:stop]) == set(records.index_org[start:stop])
