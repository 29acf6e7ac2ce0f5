"""Imports of relabel stores: the same pairs as a trainer on the store sees, the same distances, and clear refusals."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from make_fkd_store import Mix, make_images, make_store, png, rewrite, trainer_batches
from torchvision.datasets import ImageFolder

from benchmarks.command import run
from benchmarks.exchange_verbs import add_exchange_verbs
from builders.fkd_layout import batch_path
from builders.image_folder import open_folder
from builders.import_fkd import ImportConfig, ImportFacts, import_fkd
from nrrdd_format.codebooks import quantize
from nrrdd_format.dataset import DistilledDataset, open_dataset
from nrrdd_format.decoding import decode_image
from nrrdd_format.errors import ConfigError, DataError, FormatError, NrrddError, OutputError
from nrrdd_format.pairs import PairRecords
from nrrdd_format.replay import plan_batch, replay, stack_images
from nrrdd_format.verify import verify_dataset

BATCH, EACH, SIZE = 6, 7, 32
FOLDERS = ("ant", "bee", "cat")
COUNT = EACH * len(FOLDERS)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """21 images of three classes: three batches of six and one of three. Only read."""
    return make_images(tmp_path_factory.mktemp("fkd") / "images", folders=FOLDERS, each=EACH, size=SIZE)


def _import(store: Path, images: Path, out: Path, **options: Any) -> tuple[DistilledDataset, ImportFacts]:
    facts = import_fkd(ImportConfig(store=store, images=images, out=out, **options))
    assert verify_dataset(out) == []
    return open_dataset(out), facts


def _replayed(dataset: DistilledDataset, records: PairRecords) -> torch.Tensor:
    """The mixed pixels of some pairs, 0..255, by the format's own replay."""
    plan, (shard,) = plan_batch([(0, records)]), dataset.shards
    used = stack_images([decode_image(shard.image_bytes(image), SIZE) for image in plan.image.tolist()])
    return replay(plan.with_images(used), mean=(0, 0, 0), std=(1 / 255,) * 3)


@pytest.mark.parametrize("mix", ["cutmix", "mixup", "none"])
@pytest.mark.parametrize("half", [True, False])
def test_pairs_are_those_that_the_stores_own_trainer_sees(images: Path, tmp_path: Path, mix: Mix, half: bool) -> None:
    store = make_store(tmp_path / "store", images, epochs=2, batch=BATCH, mix=mix, half=half)
    dataset, _ = _import(store, images, tmp_path / "data")
    (shard,), levels = dataset.shards, dataset.manifest.codebooks.distances
    assert shard.labels.tolist() == ImageFolder(images).targets
    for epoch in range(2):
        records = shard.records(epoch)
        for number, (pixels, logits, labels) in enumerate(trainer_batches(store, images, epoch, batch=BATCH)):
            part = records.take(slice(number * BATCH, number * BATCH + BATCH))
            assert shard.labels[part.index_org].tolist() == labels
            assert float((_replayed(dataset, part) - pixels).abs().max()) <= 1.01
            for index, stored in ((part.index_org, part.distance_org), (part.index_aug, part.distance_aug)):
                exact = -logits.float().log_softmax(1)[range(len(labels)), shard.labels[index]].numpy()
                np.testing.assert_array_equal(stored, levels[quantize(exact, levels)])


def test_box_and_lam_are_kept_as_stated(images: Path, tmp_path: Path) -> None:
    store = make_store(tmp_path / "store", images, epochs=1, batch=BATCH)
    rewrite(batch_path(store, 0, 1), lambda content: [*content[:3], np.float64(0.9), [1, 2, 4, 12], content[5]])
    rewrite(batch_path(store, 0, 2), lambda content: [*content[:3], np.float64(0.999), [5, 7, 5, 9], content[5]])
    dataset, _ = _import(store, images, tmp_path / "data")
    records = dataset.shards[0].records(0)
    assert records.mix_box[BATCH].tolist() == [1, 2, 3, 10] and records.lam[BATCH] == np.float32(0.9)
    # An empty box pastes nothing: a Mixup of `org` alone.
    assert not records.is_cutmix[2 * BATCH] and records.lam[2 * BATCH] == 1
    assert dataset.manifest.records.mix == "cutmix"


def test_the_shard_holds_the_images_byte_for_byte_and_the_manifest_says_what_is_known(
    images: Path, tmp_path: Path
) -> None:
    store = make_store(tmp_path / "store", images, epochs=3, batch=BATCH, mix="mixup")
    dataset, facts = _import(store, images, tmp_path / "data", epochs=2, dataset_name="cifar10", temperature=2.0)
    manifest, (shard,) = dataset.manifest, dataset.shards
    files = [Path(path) for path, _ in ImageFolder(images).samples]
    assert [shard.image_bytes(image) for image in range(COUNT)] == [path.read_bytes() for path in files]
    assert manifest.dataset.class_names == FOLDERS and manifest.dataset.wnids is None
    assert (manifest.images.ipc, manifest.images.size, manifest.images.codec) == (EACH, SIZE, "png")
    assert manifest.images.mean == (0.4914, 0.4822, 0.4465)
    info = manifest.records
    assert (info.coding, info.epochs, info.cycle, info.mix_group) == ("verbatim", 2, BATCH, BATCH)
    assert (info.mix, info.temperature) == ("mixup", 2.0)
    assert (manifest.teacher.architecture, manifest.teacher.sha256) == ("unknown", "0" * 64)
    assert manifest.method["sampler_seed"] == 42 and manifest.method["agreement"] == round(facts.agreement, 4)
    assert "unknown" in (tmp_path / "data" / "README.md").read_text()
    assert str(tmp_path) not in (tmp_path / "data" / "dataset.json").read_text()


def test_a_store_without_the_last_batch_has_fewer_pairs_than_images(images: Path, tmp_path: Path) -> None:
    store = make_store(tmp_path / "store", images, epochs=2, batch=BATCH, drop_last=True)
    dataset, facts = _import(store, images, tmp_path / "data")
    assert dataset.manifest.shards[0].pairs_per_epoch == 18 and facts.pairs == 36
    pixels, _, labels = next(trainer_batches(store, images, 1, batch=BATCH))
    part = dataset.shards[0].records(1).take(slice(0, BATCH))
    assert dataset.shards[0].labels[part.index_org].tolist() == labels
    assert float((_replayed(dataset, part) - pixels).abs().max()) <= 1.01


@pytest.mark.parametrize("batch", [1, 4, COUNT - 1, COUNT])
def test_batches_of_any_size_are_imported(images: Path, tmp_path: Path, batch: int) -> None:
    store = make_store(tmp_path / "store", images, epochs=2, batch=batch)
    dataset, facts = _import(store, images, tmp_path / "data")
    assert facts.pairs == 2 * COUNT
    records = dataset.shards[0].records(1)
    pixels, _, _ = next(trainer_batches(store, images, 1, batch=batch))
    assert float((_replayed(dataset, records.take(slice(0, batch))) - pixels).abs().max()) <= 1.01


def test_jpegs_and_webps_are_taken_as_they_are(tmp_path: Path) -> None:
    for codec in ("JPEG", "WEBP"):
        images = make_images(tmp_path / codec, codec=codec)
        store = make_store(tmp_path / f"{codec} store", images)
        dataset, _ = _import(store, images, tmp_path / f"{codec} data")
        assert (dataset.manifest.images.codec, dataset.manifest.images.quality) == (codec.lower(), None)


def _names(rows: list[str]) -> Callable[[Path], object]:
    return lambda folder: (folder / "classes.txt").write_text("\n".join(rows))


def test_classes_are_named_by_their_file_or_by_wnids(tmp_path: Path) -> None:
    folders = ("n01440764", "n02102040")
    images = make_images(tmp_path / "images", folders=folders, each=2)
    _, classes = open_folder(images)
    assert classes.names == ("tench", "English springer") and classes.wnids == folders
    _names(["n01440764\tfish", "n02102040\tdog"])(images)
    assert open_folder(images)[1].names == ("fish", "dog") and open_folder(images)[1].wnids is None
    _names(["n01440764\tfish\tn1", "n02102040\tdog\tn2"])(images)
    assert open_folder(images)[1].wnids == ("n1", "n2")
    for rows in (["n02102040\tdog", "n01440764\tfish"], ["n01440764\tfish"], ["n01440764\tfish", "n02102040\ta\tb"]):
        _names(rows)(images)
        with pytest.raises(DataError, match=r"classes\.txt: expected a line for each of the 2 class folders"):
            open_folder(images)


@pytest.mark.parametrize("epoch", [0, 1])
def test_logits_of_other_images_are_refused(images: Path, tmp_path: Path, epoch: int) -> None:
    store = make_store(tmp_path / "store", images, epochs=2, batch=BATCH, sure=20)
    other = make_store(tmp_path / "other", images, epochs=2, batch=BATCH, sure=20, seed=1)
    (store / f"epoch_{epoch}").rename(tmp_path / "moved")
    (other / f"epoch_{epoch}").rename(store / f"epoch_{epoch}")
    with pytest.raises(FormatError) as caught:
        _import(store, images, tmp_path / "data")
    assert caught.value.path == str(store / f"epoch_{epoch}")
    assert (
        "--sampler-seed" in caught.value.reason and "42" in caught.value.reason and "by chance" in caught.value.reason
    )
    assert list(tmp_path.glob("*data*")) == []


def test_a_small_epoch_that_agrees_little_by_bad_luck_is_taken(tmp_path: Path) -> None:
    """Ten classes of one image, logits of which one or two in three are right: some of 60 epochs look like chance."""
    images = make_images(tmp_path / "images", folders=[f"{number}" for number in range(10)], each=1, size=SIZE)
    store = make_store(tmp_path / "store", images, epochs=60, batch=10, sure=2.0)
    dataset, facts = _import(store, images, tmp_path / "data")
    shard = dataset.shards[0]
    shares = []
    for epoch in range(60):
        records = shard.records(epoch)
        logits = torch.cat([each[1] for each in trainer_batches(store, images, epoch, batch=10)])
        likeliest = logits.argmax(1).numpy()
        agreed = (likeliest == shard.labels[records.index_org]) | (likeliest == shard.labels[records.index_aug])
        shares.append(agreed.mean())
    assert min(shares) <= 0.3 < 0.4 < facts.agreement
    for seed in range(5):
        with pytest.raises(FormatError, match=r"store: the highest .* by chance 1\d\.\d%: these hardly look like"):
            import_fkd(ImportConfig(store=store, images=images, out=tmp_path / "more", sampler_seed=seed))


def test_a_large_epoch_is_judged_before_the_next_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("builders.fkd_epochs.LEAST_PAIRS", COUNT)
    images = make_images(tmp_path / "images", folders=FOLDERS, each=EACH, size=SIZE)
    store = make_store(tmp_path / "store", images, epochs=2, batch=BATCH, sure=20, seed=1)
    batch_path(store, 1, 1).write_bytes(b"damaged")
    with pytest.raises(FormatError, match="epoch_0: the highest logit"):
        import_fkd(ImportConfig(store=store, images=images, out=tmp_path / "data"))


def test_pairs_that_agree_by_chance_are_too_few_to_tell(tmp_path: Path) -> None:
    """With six pairs, every 35th wrong seed or so makes all of them agree."""
    images = make_images(tmp_path / "images", folders=FOLDERS, each=2, size=SIZE)
    store = make_store(tmp_path / "store", images, epochs=1, batch=BATCH, sure=20)
    for seed in range(60):
        with pytest.raises(FormatError, match="--min-agreement"):
            import_fkd(ImportConfig(store=store, images=images, out=tmp_path / "data", sampler_seed=seed))
    with pytest.raises(FormatError, match=r"in 6 of 6 pairs, by chance in 2\.9: too few to tell whether .*seed 42 is"):
        _import(store, images, tmp_path / "data")
    _, facts = _import(store, images, tmp_path / "data", min_agreement=1)
    assert facts.agreement == 1 and 0.1 < facts.doubt < 0.2


def test_more_pairs_leave_less_doubt(images: Path, tmp_path: Path) -> None:
    store = make_store(tmp_path / "store", images, epochs=3, batch=BATCH, sure=20)
    doubts = [_import(store, images, tmp_path / f"{n}", epochs=n)[1].doubt for n in (1, 2, 3)]
    assert 1e-2 > doubts[0] > 10 * doubts[1] > 100 * doubts[2] > 0


def test_the_agreement_asked_for_is_what_counts(images: Path, tmp_path: Path) -> None:
    store = make_store(tmp_path / "store", images, seed=1, batch=BATCH, sure=20)
    _, facts = _import(store, images, tmp_path / "seed", sampler_seed=1)
    assert facts.agreement == 1
    with pytest.raises(FormatError, match="--min-agreement"):
        _import(store, images, tmp_path / "data", sampler_seed=2)
    _, facts = _import(store, images, tmp_path / "data", sampler_seed=2, min_agreement=0)
    assert facts.agreement < 0.9
    with pytest.raises(FormatError, match="--min-agreement"):
        _import(store, images, tmp_path / "more", sampler_seed=2, min_agreement=0.9)


def _remove_image(store: Path, images: Path) -> None:
    for folder in FOLDERS:
        (images / folder / "000.png").unlink()


def _add_images(store: Path, images: Path) -> None:
    for number in range(BATCH):
        (images / "ant" / f"x{number}.png").write_bytes((images / "ant" / "000.png").read_bytes())


def _change(change: Callable[[list[Any]], Any]) -> Callable[[Path, Path], None]:
    return lambda store, images: rewrite(batch_path(store, 1, 2), change)


def _move_crop(content: list[Any]) -> None:
    content[0][3, 0] += 0.4 / SIZE


def _cut(store: Path, images: Path) -> None:
    path = batch_path(store, 1, 3)
    path.write_bytes(path.read_bytes()[:-100])


def _first(data: bytes) -> Callable[[Path, Path], object]:
    return lambda store, images: (images / "ant" / "000.png").write_bytes(data)


def _last(change: Callable[[Path], object]) -> Callable[[Path, Path], object]:
    return lambda store, images: change(images / "cat" / "006.png")


FAULTS: list[tuple[str, Callable[[Path, Path], object], type[NrrddError], str]] = [
    ("fewer images", _remove_image, FormatError, "epoch_0: holds 4 batches of 6, expected 3 for the 18 images"),
    ("more images", _add_images, FormatError, r"batch_3\.tar: holds 3 pairs, expected 6 for the 27 i"),
    ("a batch is missing", lambda s, i: batch_path(s, 1, 1).unlink(), FormatError, r"epoch_1: batch_1\.tar is missing"),
    ("the last is missing", lambda s, i: batch_path(s, 1, 3).unlink(), FormatError, "epoch_1: holds 3 batches, expect"),
    ("an epoch is missing", lambda s, i: (s / "epoch_0").rename(s / "x"), FormatError, "epoch_0 is missing"),
    (
        "a short batch",
        _change(lambda c: [c[0][:1], c[1][:1], None, None, None, c[5][:1]]),
        FormatError,
        "1 pairs, expec",
    ),
    ("other classes", _change(lambda c: [*c[:5], c[5][:, :2]]), FormatError, r"batch_2\.tar: logits: float16 \[6, 2\]"),
    ("between pixels", _change(_move_crop), FormatError, r"epoch_1/batch_2\.tar: coordinates of pair 3"),
    ("truncated", _cut, FormatError, r"epoch_1/batch_3\.tar: truncated"),
    ("an image of another size", _last(lambda p: p.write_bytes(png((16, 16)))), DataError, r"006\.png: image is 16x16"),
    (
        "a damaged image",
        _last(lambda p: p.write_bytes(p.read_bytes()[:-9])),
        DataError,
        r"006\.png: is not a whole png",
    ),
    ("no image", _last(lambda p: p.write_bytes(b"")), DataError, r"006\.png: expected an image of 1"),
    ("oblong images", _first(png((32, 16))), DataError, r"000\.png: 32x16 pixels, expected a square"),
    ("text", _first(b"text"), DataError, r"000\.png: expected a JPEG, PNG or WebP image"),
    (
        "a class without images",
        lambda s, i: (i / "dog").mkdir(),
        DataError,
        "expected a folder of images for each class",
    ),
]


@pytest.mark.parametrize(("break_it", "kind", "message"), [f[1:] for f in FAULTS], ids=[f[0] for f in FAULTS])
def test_what_does_not_fit_is_named_and_leaves_nothing(
    tmp_path: Path, break_it: Callable[[Path, Path], object], kind: type[NrrddError], message: str
) -> None:
    images = make_images(tmp_path / "images", folders=FOLDERS, each=EACH, size=SIZE)
    store = make_store(tmp_path / "store", images, epochs=2, batch=BATCH, sure=20)
    break_it(store, images)
    with pytest.raises(kind, match=message) as caught:
        import_fkd(ImportConfig(store=store, images=images, out=tmp_path / "data"))
    assert "\n" not in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images", "store"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sampler_seed": -1}, "--sampler-seed: found -1"),
        ({"epochs": 0}, "--epochs: found 0"),
        ({"epochs": 3}, "--epochs: found 3, but"),
        ({"temperature": 0.0}, "--temperature: found 0"),
        ({"min_agreement": 1.5}, "--min-agreement: found 1.5"),
        ({"distance_levels": 1}, "1 distance levels"),
        ({"source_license": ""}, "--source-license: found ''"),
        ({"dataset_name": "a\nb"}, "--dataset-name: found 'a\\nb'"),
        ({"teacher": ""}, "--teacher: found ''"),
        ({"teacher_sha256": "beef"}, "teacher.sha256"),
        ({"std": (0.0, 1.0, 1.0)}, "images.std"),
    ],
)
def test_unusable_options_are_named(images: Path, tmp_path: Path, options: dict[str, Any], message: str) -> None:
    store = make_store(tmp_path / "store", images, epochs=2)
    with pytest.raises((ConfigError, FormatError)) as caught:
        import_fkd(ImportConfig(store=store, images=images, out=tmp_path / "data", **options))
    assert message in str(caught.value) and not (tmp_path / "data").exists()


def test_a_folder_that_is_there_is_left_alone(images: Path, tmp_path: Path) -> None:
    store = make_store(tmp_path / "store", images)
    (tmp_path / "data").mkdir()
    with pytest.raises(OutputError, match="exists already"):
        import_fkd(ImportConfig(store=store, images=images, out=tmp_path / "data"))


def _nrrdd(*arguments: object) -> int:
    """Exit status of a parser with the two verbs of this area."""
    parser = argparse.ArgumentParser()
    add_exchange_verbs(parser.add_subparsers(required=True))
    options = parser.parse_args(list(map(str, arguments)))
    return run(lambda: options.verb(options))


def test_the_command_says_what_the_labels_took_and_take(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = make_store(tmp_path / "store", images, epochs=2, batch=BATCH)
    sizes = sum(path.stat().st_size for path in store.rglob("*.tar"))
    facts = ["--dataset-name", "cifar10", "--teacher", "conv3", "--teacher-sha256", "ab" * 32, "--teacher-top1", "0.9"]
    colours = ["--mean", "0.1", "0.2", "0.3", "--std", "0.4", "0.5", "0.6"]
    arguments = ["import-fkd", store, "--images", images, "--out", tmp_path / "data", *facts, *colours, "--json"]
    assert _nrrdd(*arguments) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["images"], said["epochs"], said["pairs"], said["store_bytes"]) == (COUNT, 2, 2 * COUNT, sizes)
    manifest = open_dataset(tmp_path / "data").manifest
    assert (manifest.teacher.architecture, manifest.teacher.sha256, manifest.teacher.top1) == ("conv3", "ab" * 32, 0.9)
    assert (manifest.images.mean, manifest.images.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    whole = sum((tmp_path / "data" / name).stat().st_size for name in ("dataset.json", "shard-00000.tar"))
    in_tar = sum(512 + -(-path.stat().st_size // 512) * 512 for path in images.rglob("*.png"))
    assert said["label_bytes"] == whole - in_tar
    assert said["ratio"] == pytest.approx(sizes / said["label_bytes"])
    assert _nrrdd(*arguments) == 2
    assert "exists already" in capsys.readouterr().err
    assert _nrrdd("import-fkd", store, "--images", images, "--out", tmp_path / "more") == 0
    assert f"the store: {sizes:,} bytes" in capsys.readouterr().out


def test_a_thousand_classes_shrink_more_than_a_hundredfold(tmp_path: Path) -> None:
    images = make_images(tmp_path / "images", folders=[f"{number:03d}" for number in range(1000)], each=1, size=8)
    store = make_store(tmp_path / "store", images, epochs=4, batch=100, sure=20)
    _, facts = _import(store, images, tmp_path / "data")
    assert facts.store_bytes / facts.pairs > 2025
    assert facts.ratio > 100


def test_the_loader_trains_on_an_import(images: Path, tmp_path: Path) -> None:
    from loaders import DBRLoader

    store = make_store(tmp_path / "store", images, batch=BATCH, drop_last=True)
    _import(store, images, tmp_path / "data")
    loader = DBRLoader(tmp_path / "data", 5, num_workers=0)
    batches = list(loader)
    assert sum(len(batch) for batch in batches) == 18
    assert all(bool(batch.images.isfinite().all()) for batch in batches)
