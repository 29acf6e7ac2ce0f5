"""Distilled images that lie in a dataset of Hugging Face: kept bytes, columns, the order of classes, mistakes."""

from __future__ import annotations

import io
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from builders.cli import main
from builders.config import BuildConfig, EncodingSettings
from builders.given_images import GivenImages, find_table, stored_bytes, take_given
from builders.hub_images import TableImages
from builders.image_sets import PLAIN, Columns
from builders.inputs import Inputs, load_inputs
from builders.models import create_model
from builders.teacher import save_checkpoint
from nrrdd_format.dataset import open_dataset
from nrrdd_format.errors import ConfigError, DataError
from nrrdd_format.verify import verify_dataset

datasets = pytest.importorskip("datasets", reason="datasets is not installed")
SIZE = 16
CLASSES = ["ape", "bee", "cat"]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf-cache")


def picture(number: int, codec: str = "JPEG", side: int = SIZE) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(number).integers(0, 256, (side, side, 3), np.uint8)).save(buffer, codec)
    return buffer.getvalue()


def save(
    folder: Path, labels: list[Any], feature: Any = None, image: str = "image", files: dict[int, Any] | None = None
) -> Path:
    """A table by `save_to_disk` whose row k has `labels[k]` and the picture k, or what `files` says."""
    kind = feature or datasets.ClassLabel(names=CLASSES)
    rows = [{"bytes": (files or {}).get(k, picture(k)), "path": None} for k in range(len(labels))]
    features = datasets.Features({image: datasets.Image(), "label": kind})
    datasets.Dataset.from_dict({image: rows, "label": labels}, features=features).save_to_disk(str(folder))
    return folder


def inputs(tmp_path: Path, place: Path | str, **changes: Any) -> Inputs:
    base: dict[str, Any] = {"dataset": "imagefolder", "ipc": 0, "device": "cpu"}
    return load_inputs(BuildConfig(out=tmp_path / "out", from_images=Path(f"hf:{place}"), **(base | changes)))


def given(tmp_path: Path, place: Path | str, **changes: Any) -> GivenImages:
    found = inputs(tmp_path, place, **changes).given
    assert found is not None
    return found


def names(images: GivenImages) -> list[str]:
    return [images.files.name(number) for number in range(len(images.files))]


def real_images(root: Path, classes: list[str]) -> Path:
    for label, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for number in range(2):
            (root / name / f"{number}.png").write_bytes(picture(100 + 10 * label + number, "PNG"))
    return root


def test_a_build_keeps_the_bytes_of_the_table(tmp_path: Path) -> None:
    """Row k has class 2 - k mod 3: images are numbered by class and place, not by row."""
    save(tmp_path / "syn", [2, 1, 0] * 2, image="picture")
    real_images(tmp_path / "real", CLASSES)
    torch.manual_seed(0)
    save_checkpoint(tmp_path / "teacher.pt", create_model("conv2-w8", 3, SIZE), "conv2-w8", CLASSES)
    command = (
        f"--dataset imagefolder --from-images hf:{tmp_path}/syn --image-column picture --data-dir {tmp_path}/real "
        f"--out {tmp_path}/out --epochs 1 --device cpu --threads 1 --teacher-checkpoint {tmp_path}/teacher.pt "
        f"--min-teacher-top1 0"
    )
    assert main(command.split()) == 0
    assert verify_dataset(tmp_path / "out") == []
    with open_dataset(tmp_path / "out") as dataset:
        images = dataset.manifest.images
        assert (images.ipc, images.codec, images.quality, images.size) == (2, "jpeg", None, SIZE)
        assert dataset.manifest.dataset.class_names == tuple(CLASSES)
        stored = [shard.image_bytes(k) for shard in dataset.shards for k in range(shard.images)]
    assert stored == [picture(row) for row in (2, 1, 0, 5, 4, 3)]


def test_parquet_files_and_the_sides_of_the_first_image(tmp_path: Path) -> None:
    (tmp_path / "files").mkdir()
    table = datasets.load_from_disk(str(save(tmp_path / "syn", [0, 1, 2], files={0: picture(0, side=24)})))
    table.to_parquet(str(tmp_path / "files" / "train-00000.parquet"))
    found = inputs(tmp_path, tmp_path / "files")
    assert (found.source.size, found.source.class_names, found.real) == (24, CLASSES, None)
    assert found.given is not None
    settings = EncodingSettings(codec="jpeg", quality=90, shard_images=10)
    assert stored_bytes(found.given, 0, settings, keep=True) == picture(0, side=24)
    assert stored_bytes(found.given, 1, settings, keep=True) != picture(1), "another size than the first"
    assert stored_bytes(found.given, 0, settings, keep=False) != picture(0, side=24)


def test_rows_that_name_files_keep_the_bytes_of_these(tmp_path: Path) -> None:
    for number in range(2):
        (tmp_path / f"{number}.jpg").write_bytes(picture(number))
    rows = [{"bytes": None, "path": str(tmp_path / f"{number}.jpg")} for number in range(2)]
    table = datasets.Dataset.from_dict({"image": rows, "label": ["a", "b"]})
    table.cast_column("image", datasets.Image(decode=False)).save_to_disk(str(tmp_path / "syn"))
    settings = EncodingSettings(codec="jpeg", quality=90, shard_images=10)
    assert stored_bytes(given(tmp_path, tmp_path / "syn"), 1, settings, keep=True) == picture(1)


# Classes


def test_a_test_split_beside_the_given_images_does_not_count(tmp_path: Path) -> None:
    table = datasets.load_from_disk(str(save(tmp_path / "one", [0, 1, 2])))
    datasets.DatasetDict(train=table, test=table).save_to_disk(str(tmp_path / "syn"))
    found = inputs(tmp_path, tmp_path / "syn")
    assert found.given is not None
    assert (names(found.given), found.real) == ([f"train/000000{k}" for k in range(3)], None)


def test_classes_match_by_name_whatever_their_numbers(tmp_path: Path) -> None:
    save(tmp_path / "syn", [0, 1, 2], datasets.ClassLabel(names=["cat", "ape", "bee"]))
    found = inputs(tmp_path, tmp_path / "syn", data_dir=real_images(tmp_path / "real", CLASSES))
    assert found.given is not None
    assert (names(found.given), found.notices) == ([f"train/000000{k}" for k in (1, 2, 0)], ())
    with pytest.raises(DataError, match=r"hf:.*syn: found no class dog"):
        inputs(tmp_path, tmp_path / "syn", data_dir=real_images(tmp_path / "other", ["ape", "cat", "dog"]))
    subset = given(tmp_path, tmp_path / "syn", data_dir=tmp_path / "real", classes=("ape", "cat"))
    assert names(subset) == ["train/0000001", "train/0000000"]


@pytest.mark.parametrize("as_text", [True, False])
def test_numbers_are_taken_in_their_order_and_said(tmp_path: Path, as_text: bool) -> None:
    """Sorted as text, class 10 would come before class 2."""
    labels = list(range(11))
    kind = datasets.Value("string" if as_text else "int64")
    save(tmp_path / "syn", [str(k) for k in labels] if as_text else labels, kind)
    real = real_images(tmp_path / "real", [f"class {k:02d}" for k in labels])
    found = inputs(tmp_path, tmp_path / "syn", data_dir=real)
    assert found.given is not None
    assert names(found.given) == [f"train/{k:07d}" for k in labels]
    assert "0 = class 00, 1 = class 01" in " ".join(found.notices)


def test_wnids_match_and_get_their_words(tmp_path: Path) -> None:
    save(tmp_path / "syn", [0, 1], datasets.ClassLabel(names=["n02102040", "n01440764"]))
    source = inputs(tmp_path, tmp_path / "syn", classes=("tench", "n02102040")).source
    assert source.class_names == ["English springer", "tench"]
    assert source.wnids == ["n02102040", "n01440764"]


# Numbers


def test_unequal_classes_and_too_few(tmp_path: Path) -> None:
    save(tmp_path / "syn", [0, 0, 1, 2, 2])
    with pytest.raises(
        DataError, match=r"hf:.*syn: the classes have 1 to 2 images, fewer than 2 in bee \(1\).*--ipc 1"
    ):
        inputs(tmp_path, tmp_path / "syn")
    assert names(given(tmp_path, tmp_path / "syn", ipc=1)) == ["train/0000000", "train/0000002", "train/0000003"]
    save(tmp_path / "gap", [0, 1])
    with pytest.raises(DataError, match=r"hf:.*gap: too few images in cat \(0\); expected at least one"):
        inputs(tmp_path, tmp_path / "gap")


# Mistakes


def test_a_row_without_image_is_named(tmp_path: Path) -> None:
    save(tmp_path / "syn", [0, 1, 2], files={1: b""})
    with pytest.raises(DataError, match=r"hf:.*syn: train/0000001: expected an image of 1") as caught:
        inputs(tmp_path, tmp_path / "syn")
    assert "\n" not in str(caught.value)
    found = find_table(save(tmp_path / "whole", [0, 1, 2]), PLAIN)
    rows = [{"bytes": None, "path": "https://host/0.png"}] * 3
    table = datasets.Dataset.from_dict({"image": rows}).cast_column("image", datasets.Image(decode=False))
    assert isinstance(found.images, TableImages)
    found = replace(found, images=replace(found.images, table=table))
    with pytest.raises(DataError, match=r"hf:.*whole: train/0000000: holds neither an image's bytes"):
        take_given(found, range(3), CLASSES, ipc=0, size=SIZE)


def test_a_damaged_image_is_named(tmp_path: Path) -> None:
    save(tmp_path / "syn", [0, 1, 2], files={1: picture(1)[:300]})
    settings = EncodingSettings(codec="jpeg", quality=90, shard_images=10)
    with pytest.raises(DataError, match=r"hf:.*syn: train/0000001: cannot be decoded"):
        stored_bytes(given(tmp_path, tmp_path / "syn"), 1, settings, keep=True)


def test_another_image_is_another_digest(tmp_path: Path) -> None:
    digests = {
        given(tmp_path, save(tmp_path / str(k), [0, 1, 2], files={1: picture(k)}), ipc=1).sha256 for k in (1, 1 + 7)
    }
    assert len(digests) == 2
    assert given(tmp_path, tmp_path / "1").sha256 in digests


def test_a_table_without_its_prefix_says_how_to_name_it(tmp_path: Path) -> None:
    save(tmp_path / "syn", [0, 1, 2])
    (tmp_path / "files").mkdir()
    datasets.load_from_disk(str(tmp_path / "syn")).to_parquet(str(tmp_path / "files" / "0.parquet"))
    for place in (tmp_path / "syn", tmp_path / "files"):
        config = BuildConfig(dataset="imagefolder", out=tmp_path / "out", ipc=0, from_images=place)
        with pytest.raises(DataError, match=rf"is a dataset of Hugging Face.*write hf:{re.escape(str(place))}"):
            load_inputs(config)


def test_places_that_hold_no_dataset(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--from-images: found hf: alone, expected hf:FOLDER or hf:NAME"):
        inputs(tmp_path, "")
    with pytest.raises(DataError, match="datasets cannot load it"):
        inputs(tmp_path, tmp_path / "nowhere")


def test_columns_belong_to_the_tables_on_the_command_line(tmp_path: Path) -> None:
    """Those of the source too, where it is a table; folders have none."""
    save(tmp_path / "syn", [0, 1, 2], image="picture")
    with pytest.raises(ConfigError, match=r"--image-column: found 'image', expected a column of .*syn"):
        inputs(tmp_path, tmp_path / "syn", image_column="image")
    real = real_images(tmp_path / "real", CLASSES)
    found = inputs(tmp_path, tmp_path / "syn", image_column="picture", label_column="label", data_dir=real)
    assert len(found.source.train) == 6
    save(tmp_path / "table", [0, 1, 2, 0])
    with pytest.raises(ConfigError, match=r"--image-column: found 'picture', expected a column of .*table"):
        inputs(tmp_path, tmp_path / "syn", dataset="hf", data_dir=tmp_path / "table", image_column="picture")
    both = inputs(tmp_path, tmp_path / "syn", dataset="hf", data_dir=tmp_path / "table", label_column="label")
    assert len(both.source.train) == 4


def test_a_cache_that_would_hold_nothing_is_refused(tmp_path: Path) -> None:
    save(tmp_path / "syn", [0, 1, 2])
    with pytest.raises(ConfigError, match="--cache-dir: imagefolder keeps nothing there"):
        inputs(tmp_path, tmp_path / "syn", cache_dir=tmp_path)
    with pytest.raises(ConfigError, match="--test-dir: imagefolder is read from a folder, not from a URL"):
        inputs(tmp_path, tmp_path / "syn", test_dir="https://host/x")


def test_what_is_found_before_the_source_is_known(tmp_path: Path) -> None:
    found = find_table(save(tmp_path / "syn", [1, 0]), PLAIN)
    assert (found.folders, found.images.labels.tolist()) == (tuple(CLASSES), [1, 0])
    assert find_table(tmp_path / "syn", Columns(label="label")).place == f"hf:{tmp_path}/syn"
