"""Exports: class folders that torchvision labels as the dataset does, and FKD stores that an import reads back."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from make_dataset import make_tiny_dataset
from make_fkd_store import trainer_batches
from torchvision.datasets import ImageFolder

from benchmarks.command import run
from benchmarks.exchange_verbs import add_exchange_verbs
from builders.export import FkdConfig, export_fkd, export_images
from builders.fkd_layout import FkdBatch, batch_path, count_batches, count_epochs, read_batch
from builders.image_folder import Classes, class_folders, open_folder
from builders.import_fkd import ImportConfig, import_fkd
from builders.models import create_model
from builders.teacher import Teacher, load_teacher, save_checkpoint
from nrrdd_format.codebooks import quantize
from nrrdd_format.dataset import DistilledDataset, open_dataset
from nrrdd_format.errors import ConfigError, DataError, OutputError, TeacherError
from nrrdd_format.pairs import draw_pairs
from nrrdd_format.records import encode_shard_records
from nrrdd_format.replay import normalize
from nrrdd_format.shards import EncodedImage, write_shard
from nrrdd_format.verify import verify_dataset

CLASSES, SIZE, BATCH = ("class 0", "class 1", "class 2"), 16, 5


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained teacher."""
    path = tmp_path_factory.mktemp("teacher") / "teacher.pt"
    torch.manual_seed(0)
    save_checkpoint(path, create_model("conv2-w8", len(CLASSES), SIZE), "conv2-w8", CLASSES)
    return path


@pytest.fixture(scope="module")
def teacher(checkpoint: Path) -> Teacher:
    """The same, loaded."""
    return load_teacher(None, checkpoint, num_classes=len(CLASSES), image_size=SIZE, device="cpu", class_names=CLASSES)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory, teacher: Teacher) -> DistilledDataset:
    """Twelve images of three classes in two shards, labelled, as it says, by that teacher."""
    path = make_tiny_dataset(tmp_path_factory.mktemp("export") / "data")
    facts = {"architecture": teacher.architecture, "sha256": teacher.sha256}
    _edit(path, lambda manifest: manifest["teacher"].update(facts))
    return open_dataset(path)


def _edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    manifest = json.loads((path / "dataset.json").read_text())
    change(manifest)
    (path / "dataset.json").write_text(json.dumps(manifest))


def _images(dataset: DistilledDataset) -> list[tuple[int, int, bytes]]:
    """Label, number and bytes of every image, in ImageFolder's order."""
    return sorted(
        (int(shard.labels[image]), int(shard.indices[image]), shard.image_bytes(image))
        for shard in dataset.shards
        for image in range(shard.images)
    )


def _found(root: Path) -> list[tuple[int, int, bytes]]:
    return [(label, int(Path(path).stem), Path(path).read_bytes()) for path, label in ImageFolder(root).samples]


def test_class_folders_hold_the_bytes_under_the_datasets_labels(dataset: DistilledDataset, tmp_path: Path) -> None:
    assert export_images(dataset, tmp_path / "out") == 12
    assert ImageFolder(tmp_path / "out").classes == list(CLASSES)
    assert _found(tmp_path / "out") == _images(dataset)
    assert sorted(path.name for path in (tmp_path / "out" / "class 1").iterdir())[0] == "0000001.png"
    assert (tmp_path / "out" / "classes.txt").read_text().splitlines()[1] == "class 1\tclass 1"


@pytest.mark.parametrize(
    ("names", "wnids", "folders"),
    [
        (["cat", "ant", "bee"], None, ["0_cat", "1_ant", "2_bee"]),
        (["ant", "bee", "cat"], None, ["ant", "bee", "cat"]),
        (["a", "a", "b"], None, ["0_a", "1_a", "2_b"]),
        (["A", "a", "b"], None, ["0_A", "1_a", "2_b"]),
        (["tench", "cock", "hen"], ["n01", "n02", "n03"], ["n01", "n02", "n03"]),
        (["tench", "cock", "hen"], ["n03", "n02", "n01"], ["0_n03", "1_n02", "2_n01"]),
        (["../../etc", "a/b", "c/d"], None, ["_.._etc", "a_b", "c_d"]),
        (["..", "ant", "bee"], None, ["0_", "1_ant", "2_bee"]),
        (["x" * 4000, "y", "z"], None, ["x" * 60, "y", "z"]),
    ],
)
def test_folder_names_are_safe_and_keep_the_order(
    tmp_path: Path, names: list[str], wnids: list[str] | None, folders: list[str]
) -> None:
    path = make_tiny_dataset(tmp_path / "data")
    _edit(path, lambda manifest: manifest["dataset"].update(class_names=names, wnids=wnids))
    with open_dataset(path) as dataset:
        export_images(dataset, tmp_path / "out")
        assert ImageFolder(tmp_path / "out").classes == folders
        assert _found(tmp_path / "out") == _images(dataset)
    _, classes = open_folder(tmp_path / "out")
    assert (classes.names, classes.wnids) == (tuple(names), None if wnids is None else tuple(wnids))
    assert sorted(each.name for each in tmp_path.iterdir()) == ["data", "out"]


def test_many_classes_are_numbered_with_equally_many_digits() -> None:
    folders = class_folders(Classes(names=tuple(map(str, range(1000))), wnids=None))
    assert folders[:2] == ["000_0", "001_1"] and folders == sorted(folders)


def test_numbers_of_different_lengths_keep_their_order(dataset: DistilledDataset, tmp_path: Path) -> None:
    numbers, layout = (10**8, 5, 10**7, 3, 10**6, 7), dataset.manifest.layout_for(6)
    images = [
        EncodedImage(index=number, label=position % 3, data=dataset.shards[0].image_bytes(position))
        for position, number in enumerate(numbers)
    ]
    near = np.ones(6, np.float32)
    pairs = [replace(draw_pairs(layout, 0, epoch), distance_org=near, distance_aug=near) for epoch in range(3)]
    (tmp_path / "data").mkdir()
    entry = write_shard(
        tmp_path / "data" / "shard-00000.tar",
        shard=0,
        images=images,
        extension="png",
        blocks=encode_shard_records(pairs, layout, 0),
        epochs=3,
        layout=layout,
    )
    info = replace(dataset.manifest.images, count=6)
    replace(dataset.manifest, images=info, shards=(entry,)).save(tmp_path / "data" / "dataset.json")
    with open_dataset(tmp_path / "data") as made:
        export_images(made, tmp_path / "out")
        assert _found(tmp_path / "out") == _images(made)


def test_a_class_without_images_is_named(tmp_path: Path) -> None:
    path = make_tiny_dataset(tmp_path / "data")
    _edit(path, lambda manifest: manifest["dataset"]["class_names"].append("dog"))
    with open_dataset(path) as dataset, pytest.raises(DataError, match="no image of dog; class folders cannot"):
        export_images(dataset, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_damaged_image_stops_the_export_and_leaves_nothing(tmp_path: Path) -> None:
    path = make_tiny_dataset(tmp_path / "data")
    with open_dataset(path) as dataset:
        data = dataset.shards[1].image_bytes(3)
        shard = path / "shard-00001.tar"
        shard.write_bytes(shard.read_bytes().replace(data, data[:-1] + b"?"))
        with pytest.raises(Exception, match=r"shard-00001\.tar.*crc32"):
            export_images(dataset, tmp_path / "out")
    assert [each.name for each in tmp_path.iterdir()] == ["data"]


def test_a_folder_that_is_there_is_left_alone(dataset: DistilledDataset, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="exists already"):
        export_images(dataset, tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="out: cannot make the folder"):
        export_images(dataset, tmp_path / "file" / "out")


def test_an_exported_store_says_what_the_teacher_says_to_its_own_trainers(
    dataset: DistilledDataset, teacher: Teacher, tmp_path: Path
) -> None:
    config, out = FkdConfig(epochs=2, batch_size=BATCH, sampler_seed=9), tmp_path / "out"
    written = export_fkd(dataset, teacher, out, config, device="cpu")
    assert written == sum(path.stat().st_size for path in out.rglob("*.tar"))
    assert _found(out / "images") == _images(dataset)
    info = dataset.manifest.images
    for epoch in range(2):
        for pixels, logits, _ in trainer_batches(out / "relabel", out / "images", epoch, batch=BATCH, seed=9):
            assert logits.dtype == torch.float16
            expected = teacher.model(normalize(pixels, info.mean, info.std))
            torch.testing.assert_close(logits.float(), expected, rtol=0.01, atol=0.02)


def _read(store: Path, epoch: int, number: int) -> FkdBatch:
    return read_batch(batch_path(store, epoch, number), size=SIZE, num_classes=3, most=12)


def test_draws_follow_the_seed_and_differ_between_batches(
    dataset: DistilledDataset, teacher: Teacher, tmp_path: Path
) -> None:
    stores = []
    for name, seed in (("a", 0), ("same", 0), ("other", 1)):
        export_fkd(dataset, teacher, tmp_path / name, FkdConfig(epochs=2, batch_size=BATCH, seed=seed), device="cpu")
        stores.append(tmp_path / name / "relabel")
    assert (count_epochs(stores[0]), count_batches(stores[0], 1)) == (2, 3)
    first, same, other = (_read(store, 0, 0) for store in stores)
    assert first.views.tolist() == same.views.tolist() != other.views.tolist()
    assert first.mix_box == same.mix_box and torch.equal(first.logits, same.logits)
    later = [_read(stores[0], *at) for at in ((0, 1), (1, 0))]
    assert all(batch.views.tolist() != first.views.tolist() for batch in later)
    assert len({batch.mix_box for batch in (first, *later)}) == 3
    assert len(_read(stores[0], 0, 2)) == 2


def test_without_flips_and_crops_none_are_drawn(dataset: DistilledDataset, teacher: Teacher, tmp_path: Path) -> None:
    path = make_tiny_dataset(tmp_path / "data", flip=False)
    with open_dataset(path) as upright:
        export_fkd(upright, teacher, tmp_path / "out", FkdConfig(epochs=1, view_scale=1.0), device="cpu")
    batch = _read(tmp_path / "out" / "relabel", 0, 0)
    assert not batch.flip.any() and batch.views.tolist() == [[0, 0, SIZE, SIZE]] * 12


def test_an_import_of_an_export_gives_the_images_back_and_the_teachers_distances(
    dataset: DistilledDataset, teacher: Teacher, tmp_path: Path
) -> None:
    export_fkd(dataset, teacher, tmp_path / "out", FkdConfig(epochs=2, batch_size=BATCH), device="cpu")
    store, images = tmp_path / "out" / "relabel", tmp_path / "out" / "images"
    import_fkd(ImportConfig(store=store, images=images, out=tmp_path / "back", min_agreement=0))
    assert verify_dataset(tmp_path / "back") == []
    with open_dataset(tmp_path / "back") as back:
        assert back.manifest.dataset.class_names == CLASSES
        assert [row[::2] for row in _images(back)] == [row[::2] for row in _images(dataset)]
        levels = back.manifest.codebooks.distances
        for epoch in range(2):
            records, labels = back.shards[0].records(epoch), back.shards[0].labels
            logits = torch.cat([_read(store, epoch, number).logits for number in range(3)])
            exact = -logits.float().log_softmax(1).gather(1, torch.from_numpy(labels[records.index_org])[:, None])
            np.testing.assert_array_equal(records.distance_org, levels[quantize(exact[:, 0].numpy(), levels)])


def test_unusable_options_are_named(dataset: DistilledDataset, teacher: Teacher, tmp_path: Path) -> None:
    options: list[dict[str, int]] = [{"epochs": 0}, {"batch_size": 0}, {"sampler_seed": -1}, {"seed": -1}]
    for given in options:
        with pytest.raises(ConfigError, match="--" + next(iter(given)).replace("_", "-")):
            FkdConfig(**given)
    with pytest.raises(ConfigError, match="view scale"):
        export_fkd(dataset, teacher, tmp_path / "out", FkdConfig(epochs=1, view_scale=0.0), device="cpu")
    assert list(tmp_path.iterdir()) == []


def test_logits_beyond_half_precision_are_refused(dataset: DistilledDataset, tmp_path: Path) -> None:
    model = create_model("conv2-w8", 3, SIZE).eval()
    model.classifier.weight.data.mul_(1e9)  # type: ignore[union-attr, operator]
    loud = Teacher(model=model, architecture="conv2-w8", num_classes=3, sha256="")
    with pytest.raises(TeacherError, match="not finite in half precision"):
        export_fkd(dataset, loud, tmp_path / "out", FkdConfig(epochs=1), device="cpu")
    assert list(tmp_path.iterdir()) == []


def _nrrdd(*arguments: object) -> int:
    """Exit status of a parser with the two verbs of this area."""
    parser = argparse.ArgumentParser()
    add_exchange_verbs(parser.add_subparsers(required=True))
    options = parser.parse_args(list(map(str, arguments)))
    return run(lambda: options.verb(options))


def test_the_command_writes_both_layouts(
    dataset: DistilledDataset, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _nrrdd("export", dataset.path, "--layout", "imagefolder", "--to", tmp_path / "images") == 0
    assert "12 images" in capsys.readouterr().out
    assert len(ImageFolder(tmp_path / "images")) == 12
    options = ["--teacher-checkpoint", checkpoint, "--epochs", 1, "--batch-size", 4, "--device", "cpu"]
    assert _nrrdd("export", dataset.path, "--layout", "fkd", "--to", tmp_path / "store", *options) == 0
    assert "train with batch size 4 and sampler seed 42" in capsys.readouterr().out
    assert count_batches(tmp_path / "store" / "relabel", 0) == 3


def test_the_command_refuses_what_would_do_nothing_and_another_teacher(
    dataset: DistilledDataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["export", dataset.path, "--to", tmp_path / "out", "--layout"]
    assert _nrrdd(*command, "imagefolder", "--batch-size", 4) == 2
    assert "--batch-size: found with --layout imagefolder" in capsys.readouterr().err
    assert _nrrdd(*command, "fkd") == 2
    assert "--teacher-checkpoint" in capsys.readouterr().err
    save_checkpoint(tmp_path / "other.pt", create_model("conv2-w8", 3, SIZE), "conv2-w8", CLASSES)
    assert _nrrdd(*command, "fkd", "--teacher-checkpoint", tmp_path / "other.pt") == 2
    assert "SHA-256" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
