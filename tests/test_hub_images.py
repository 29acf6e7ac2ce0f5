"""Hugging Face datasets as sources: columns and classes found or named, rows read one at a time, mistakes named."""

from __future__ import annotations

import io
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image

from builders.cli import main
from builders.hub_images import TableImages
from builders.image_sets import Columns
from builders.images import UnusableImage
from builders.models import create_model
from builders.sources import Source, load_source
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


def encoded(number: int, side: int = SIZE, codec: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 256, (side, side + 4, 3), np.uint8)
    Image.fromarray(pixels).save(buffer, codec)
    return buffer.getvalue()


def table(count: int = 9, label: Any = None, image: str = "image", **more: list[Any]) -> Any:
    """A table whose row k has class k mod 3."""
    features = {image: datasets.Image(), "label": label or datasets.ClassLabel(names=CLASSES)}
    columns = {
        image: [{"bytes": encoded(k), "path": None} for k in range(count)],
        "label": [k % 3 for k in range(count)],
    }
    base = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
    for name, values in more.items():
        base = base.add_column(name, values)
    return base


def load(folder: Path, classes: list[str] | None = None, **options: Any) -> Source:
    columns = Columns(image=options.pop("image", None), label=options.pop("label", None))
    return load_source("hf", data_dir=folder, classes=classes, columns=columns, **options)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    splits = datasets.DatasetDict(train=table(), validation=table(6), test=table(3))
    splits["test"] = splits["test"].map(lambda row: {"label": -1})  # as on the hub where labels are withheld
    splits.save_to_disk(str(tmp_path / "saved"))
    return tmp_path / "saved"


def test_what_save_to_disk_wrote(saved: Path) -> None:
    source = load(saved)
    assert source.class_names == CLASSES
    assert source.train.labels.tolist() == [0, 1, 2] * 3
    assert (source.size, source.beta, source.flip, source.wnids) == (SIZE, 1, True, None)
    pixels = np.asarray(Image.open(io.BytesIO(encoded(4))))[:, 2 : 2 + SIZE]
    np.testing.assert_array_equal(source.train.read(4), pixels.transpose(2, 0, 1))
    assert source.train.name(4) == "train/0000004"


def test_a_test_split_without_labels_does_not_count(saved: Path) -> None:
    test = load(saved).test
    assert test is not None
    assert (len(test), test.name(0)) == (6, "validation/0000000")


def test_a_subset_of_the_classes_keeps_names_and_order(saved: Path) -> None:
    source = load(saved, ["cat", "ape"])
    assert source.class_names == ["ape", "cat"]
    assert source.train.labels.tolist() == [0, 1] * 3
    assert source.train.name(1) == "train/0000002"
    with pytest.raises(ConfigError, match="--classes: found 'dog'"):
        load(saved, ["dog", "ape"])


def test_classes_named_by_wnids_get_their_words(tmp_path: Path) -> None:
    names = datasets.ClassLabel(names=["n01440764", "n02102040", "n03000684"])
    table(label=names).save_to_disk(str(tmp_path / "nette"))
    source = load(tmp_path / "nette", ["n03000684", "tench"])
    assert (source.class_names, source.wnids) == (["tench", "chain saw"], ["n01440764", "n03000684"])


def test_parquet_files_and_another_size(tmp_path: Path) -> None:
    (tmp_path / "files").mkdir()
    table().to_parquet(str(tmp_path / "files" / "train-00000.parquet"))
    source = load(tmp_path / "files", size=24)
    assert source.train.read(0).shape == (3, 24, 24)
    assert source.test is None


def test_columns_are_named_where_they_are_not_plain(tmp_path: Path) -> None:
    fine = table(coarse_label=[0] * 9).cast_column("coarse_label", datasets.ClassLabel(names=["thing"]))
    fine.rename_column("label", "fine_label").rename_column("image", "img").save_to_disk(str(tmp_path / "fine"))
    with pytest.raises(ConfigError, match=r"--label-column: .* has 2 columns of labels \(fine_label, coarse_label\)"):
        load(tmp_path / "fine")
    assert load(tmp_path / "fine", label="fine_label").class_names == CLASSES
    with pytest.raises(ConfigError, match=r"--image-column: found 'picture', expected a column of"):
        load(tmp_path / "fine", image="picture", label="fine_label")


def test_no_column_of_images(tmp_path: Path) -> None:
    datasets.Dataset.from_dict({"text": ["a", "b"], "label": [0, 1]}).save_to_disk(str(tmp_path / "text"))
    with pytest.raises(ConfigError, match=r"--image-column: .* has 0 columns of images \(text, label\)"):
        load(tmp_path / "text")


@pytest.mark.parametrize(
    ("values", "names"), [([30, 4, 4] * 3, ["4", "30"]), (["cow", "ant", "bee"] * 3, ["ant", "bee", "cow"])]
)
def test_labels_without_names_are_their_sorted_values(tmp_path: Path, values: list[Any], names: list[str]) -> None:
    table().remove_columns("label").add_column("kind", values).save_to_disk(str(tmp_path / "values"))
    source = load(tmp_path / "values", label="kind")
    assert source.class_names == names
    assert [names[label] for label in source.train.labels] == [str(value) for value in values]


@pytest.mark.parametrize("value", [0.5, [1, 2], {"a": 1}, True])
@pytest.mark.parametrize(("option", "expected"), [("label", "numbers or names"), ("image", "images or their bytes")])
def test_a_column_of_another_kind_is_refused(tmp_path: Path, value: Any, option: str, expected: str) -> None:
    table().add_column("other", [value] * 9).save_to_disk(str(tmp_path / "kinds"))
    with pytest.raises(ConfigError, match=rf"--{option}-column: other of .* holds .*, expected {expected}"):
        load(tmp_path / "kinds", None, size=SIZE, **{option: "other"})


def test_rows_without_label(tmp_path: Path) -> None:
    table().map(lambda row: {"label": -1 if row["label"] == 1 else 0}).save_to_disk(str(tmp_path / "part"))
    with pytest.raises(DataError, match="rows of the split train have no label in the column label"):
        load(tmp_path / "part")


def test_a_class_without_images(tmp_path: Path) -> None:
    names = datasets.ClassLabel(names=[*CLASSES, "dog"])
    table(label=names).save_to_disk(str(tmp_path / "gap"))
    with pytest.raises(DataError, match="hf: the training split has no images for dog"):
        load(tmp_path / "gap")
    assert load(tmp_path / "gap", CLASSES).class_names == CLASSES


def test_bytes_in_a_plain_column(tmp_path: Path) -> None:
    raw = datasets.Dataset.from_dict({"data": [encoded(0), encoded(1)], "label": ["a", "b"]})
    raw.save_to_disk(str(tmp_path / "raw"))
    source = load(tmp_path / "raw", image="data")
    assert source.train.read(1).shape == (3, SIZE, SIZE)
    assert len(source.train.fingerprint()) == 64


def test_rows_that_name_a_file(tmp_path: Path) -> None:
    (tmp_path / "0.png").write_bytes(encoded(0))
    rows = [{"bytes": None, "path": path} for path in (str(tmp_path / "0.png"), "https://host/1.png")]
    column = datasets.Dataset.from_dict({"image": rows}).cast_column("image", datasets.Image(decode=False))
    images = TableImages(labels=np.arange(2), rows=np.arange(2), size=SIZE, table=column, split="train")
    assert images.read(0).shape == (3, SIZE, SIZE)
    with pytest.raises(UnusableImage, match="neither an image's bytes nor the path of a file"):
        images.read(1)
    assert len(images.fingerprint()) == 64


def test_the_fingerprint_reads_no_image(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And is the same however the column lies in pieces."""
    images = load(saved).train
    assert isinstance(images, TableImages)
    pieces = datasets.concatenate_datasets([images.table.select(range(k, k + 3)) for k in (0, 3, 6)])
    assert len(pieces.data.column(0).chunks) > 1
    many = datasets.concatenate_datasets([pieces] * 100)
    before, pool = pa.default_memory_pool(), pa.proxy_memory_pool(pa.default_memory_pool())
    pa.set_memory_pool(pool)
    try:
        facts = list(replace(images, table=many).facts())
    finally:
        pa.set_memory_pool(before)
    assert pool.max_memory() < 100 * sum(len(encoded(k)) for k in range(9)) / 10
    lengths = [len(encoded(k)) for k in range(9)] * 100
    assert facts == [str(lengths).encode()]
    assert list(replace(images, table=pieces).facts()) == list(images.facts()) == [str(lengths[:9]).encode()]


def test_the_fingerprint_follows_the_content(tmp_path: Path, saved: Path) -> None:
    first = load(saved).train.fingerprint()
    assert load(saved).train.fingerprint() == first
    others = {load(saved, size=24).train.fingerprint(), load(saved, CLASSES[:2]).train.fingerprint()}
    table(12).save_to_disk(str(tmp_path / "longer"))
    others.add(load(tmp_path / "longer").train.fingerprint())
    smaller = table().map(lambda row, k: {"image": {"bytes": encoded(k, 12), "path": None}}, with_indices=True)
    smaller.save_to_disk(str(tmp_path / "smaller"))
    others.add(load(tmp_path / "smaller", size=SIZE).train.fingerprint())
    assert len(others | {first}) == 5


def test_a_folder_without_a_dataset(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="datasets cannot load it") as caught:
        load(tmp_path / "empty")
    assert "\n" not in str(caught.value)
    datasets.DatasetDict(one=table(), two=table()).save_to_disk(str(tmp_path / "named"))
    with pytest.raises(DataError, match="found the splits one, two, expected one named train"):
        load(tmp_path / "named")


def test_options_of_other_sources(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--test-dir: hf brings its own test split"):
        load(saved, test_dir=tmp_path)
    with pytest.raises(ConfigError, match="--label-column: imagefolder has no columns"):
        load_source("imagefolder", data_dir=tmp_path, columns=Columns(label="x"))
    with pytest.raises(DataError, match="hf: --data-dir is missing; give the folder that holds a dataset of Hugging"):
        load_source("hf", data_dir=None)


def test_without_the_library_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ConfigError, match=r"pip install 'nrrdd\[datasets\]'"):
        load(tmp_path)


def test_a_build_from_a_table_skips_its_broken_images(tmp_path: Path) -> None:
    rows = [{"bytes": b"broken" if k == 2 else encoded(k), "path": None} for k in range(12)]
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=CLASSES))
    content = {"image": rows, "label": [k % 3 for k in range(12)]}
    datasets.Dataset.from_dict(content, features=features).save_to_disk(str(tmp_path / "data"))
    torch.manual_seed(0)
    save_checkpoint(tmp_path / "teacher.pt", create_model("conv2-w8", 3, SIZE), "conv2-w8", CLASSES)
    command = (
        f"--dataset hf --data-dir {tmp_path}/data --label-column label --size {SIZE} --ipc 2 --out {tmp_path}/out "
        f"--epochs 1 --iterations 1 --device cpu --teacher-checkpoint {tmp_path}/teacher.pt --min-teacher-top1 0"
    )
    assert main(command.split()) == 0
    assert verify_dataset(tmp_path / "out") == []
    assert open_dataset(tmp_path / "out").manifest.dataset.name == "hf"
    assert "train/0000002" in next((tmp_path / "out.work").glob("build-*.json")).read_text()
