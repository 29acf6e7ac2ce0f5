"""Priors: which classes are kept, that they survive storage, and that wrong ones are refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_dataset import CLASSES, tiny_images, tiny_manifest, tiny_priors, write_tiny

from nrrdd_format.codebooks import distance_levels
from nrrdd_format.dataset import open_dataset
from nrrdd_format.errors import ConfigError, FormatError
from nrrdd_format.priors import Priors, choose_priors
from nrrdd_format.reshard import reshard_dataset
from nrrdd_format.shards import write_shard
from nrrdd_format.verify import verify_dataset

LEVELS = distance_levels(16)


def test_the_likeliest_other_classes_are_kept() -> None:
    masses = np.array([[5.0, 1.0, 0.0, 2.0, 1.0], [0.5, 0.1, 0.3, 0.0, 0.2]])
    priors = choose_priors(masses, np.array([0, 4]), 2, LEVELS)
    assert priors.classes.tolist() == [[1, 3], [0, 2]]
    exact = -np.log([[1 / 4, 2 / 4], [0.5 / 0.9, 0.3 / 0.9]])
    nearest = LEVELS[np.abs(LEVELS - exact[..., None]).argmin(-1)]
    assert priors.distances(LEVELS).tolist() == nearest.tolist()


def test_an_image_without_any_other_class_gets_the_highest_distance() -> None:
    priors = choose_priors(np.array([[1.0, 0.0, 0.0]]), np.array([0]), 2, LEVELS)
    assert priors.classes.tolist() == [[1, 2]]
    assert priors.levels.tolist() == [[15, 15]]


@pytest.mark.parametrize("count", [0, 3])
def test_a_prior_has_one_class_or_all_others(count: int) -> None:
    with pytest.raises(ConfigError, match=rf"priors of {count} classes, expected 1\.\.2"):
        choose_priors(np.ones((1, 3)), np.array([0]), count, LEVELS)


@given(st.data())
def test_packing_keeps_priors(data: st.DataObject) -> None:
    classes = data.draw(st.integers(2, 300))
    count = data.draw(st.integers(1, min(classes - 1, 12)))
    images = data.draw(st.integers(1, 5))
    rows = st.lists(st.integers(0, classes - 1), min_size=count, max_size=count, unique=True).map(sorted)
    chosen = data.draw(st.lists(rows, min_size=images, max_size=images))
    levels = data.draw(st.lists(st.integers(0, 15), min_size=images * count, max_size=images * count))
    priors = Priors(classes=np.array(chosen), levels=np.array(levels, np.uint8).reshape(images, count))
    again = Priors.unpack(priors.pack(), images=images, count=count, classes=classes, levels=16)
    assert np.array_equal(again.classes, priors.classes)
    assert np.array_equal(again.levels, priors.levels)


GOOD = {"prior_gaps": [0, 1, 1, 0], "prior_levels": [3, 15, 0, 1]}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"prior_gaps": [0, 1, 1]}, "prior_gaps: 3 entries, expected a list of 4 entries"),
        ({"prior_gaps": None}, "prior_gaps: None, expected a list of 4 entries"),
        ({"prior_gaps": [0, 1, 1, -1]}, r"prior_gaps\[3\] is -1, expected 0\.\.3"),
        ({"prior_gaps": [0, 1, 1, True]}, r"prior_gaps\[3\] is True"),
        ({"prior_gaps": [0, 1, 1, 2**70]}, r"prior_gaps\[3\] is "),
        ({"prior_gaps": [0, 1, 1, 2]}, "prior of image 1: class 4, expected less than 4"),
        ({"prior_levels": [3, 16, 0, 1]}, r"prior_levels\[1\] is 16, expected 0\.\.15"),
        ({"prior_levels": [3, 15, 0]}, "prior_levels: 3 entries"),
    ],
)
def test_what_is_no_prior_is_refused(changed: dict[str, Any], message: str) -> None:
    assert Priors.unpack(GOOD, images=2, count=2, classes=4, levels=16).classes.tolist() == [[0, 2], [1, 2]]
    with pytest.raises(FormatError, match=message):
        Priors.unpack({**GOOD, **changed}, images=2, count=2, classes=4, levels=16)


def test_a_dataset_with_priors_is_whole_and_keeps_them_when_resharded(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path / "small", tiny_manifest(priors=1), shards=4, images=6)
    assert verify_dataset(folder) == []
    after = reshard_dataset(folder, 12, tmp_path / "large").after
    assert (len(after.shards), after.version) == (2, (1, 1))
    assert verify_dataset(tmp_path / "large") == []
    with open_dataset(folder) as small, open_dataset(tmp_path / "large") as large:
        parts = [reader.priors for reader in small.shards]
        whole = [reader.priors for reader in large.shards]
        for name in ("classes", "levels"):
            stored = np.concatenate([getattr(part, name) for part in parts])
            assert np.array_equal(np.concatenate([getattr(part, name) for part in whole]), stored)


def test_a_dataset_without_priors_is_one_of_version_1_0(tmp_path: Path) -> None:
    with open_dataset(write_tiny(tmp_path / "plain")) as dataset:
        assert dataset.manifest.version == (1, 0)
        assert [reader.priors for reader in dataset.shards] == [None, None]
        assert "priors" not in dataset.manifest.to_json()["records"]


def test_a_shard_is_not_written_with_priors_that_its_layout_does_not_have(tmp_path: Path) -> None:
    layout, images = tiny_manifest(priors=2).layout_for(6), tiny_images(0, 6)
    own = Priors(classes=np.tile([0, 1], (6, 1)), levels=np.zeros((6, 2), np.uint8))
    narrow = tiny_priors(tiny_manifest(priors=1).layout_for(6), 0)
    for priors, error, message in (
        (None, ConfigError, r"priors of shape None, expected \(6, 2\)"),
        (narrow, ConfigError, r"priors of shape \(6, 1\), expected \(6, 2\)"),
        (own, FormatError, "prior of image 0: names its own class 0"),
    ):
        with pytest.raises(error, match=message):
            write_shard(
                tmp_path / "shard-00000.tar",
                shard=0,
                images=images,
                extension="png",
                blocks=[b"a", b"b"],
                epochs=2,
                layout=layout,
                priors=priors,
            )


@pytest.mark.parametrize("priors", [0, len(CLASSES)])
def test_a_layout_has_priors_of_other_classes_only(priors: int) -> None:
    with pytest.raises(ConfigError, match=rf"priors of {priors} classes: expected 1\.\.2"):
        tiny_manifest(priors=priors).layout_for(6)
