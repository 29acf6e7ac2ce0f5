"""builders.sources on small folders in every layout it knows, and on the mistakes users make with them."""

from __future__ import annotations

import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.error import URLError

import numpy as np
import pytest
from PIL import Image
from trap import Trap

from builders.conventions import DATASETS, default_model
from builders.folders import ignored_notes
from builders.image_sets import ArrayImages
from builders.sources import Source, load_source
from nrrdd_format.errors import ConfigError, DataError

CIFAR10 = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
IMAGENETTE = [
    *("n01440764", "n02102040", "n02979186", "n03000684", "n03028079"),
    *("n03394916", "n03417042", "n03425413", "n03445777", "n03888257"),
]
FISH, FROG, BOX = "n01443537", "n01641577", "n02892201"


def add_images(folder: Path, count: int = 1, *, side: int = 12, ending: str = "JPEG") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        Image.new("RGB", (side, side), (number, 50, 200)).save(folder / f"{number}.{ending}")


def add_split(split: Path, classes: list[str], **options: Any) -> None:
    for name in classes:
        add_images(split / name, **options)


@pytest.fixture
def pets(tmp_path: Path) -> Path:
    """An image folder of two classes with a test split."""
    add_split(tmp_path / "train", ["cat", "ant"], count=3, side=20, ending="png")
    add_split(tmp_path / "test", ["cat", "ant"], count=2, side=20, ending="png")
    return tmp_path


def image_folder(data_dir: Path, **options: Any) -> Source:
    return load_source("imagefolder", data_dir=data_dir, **options)


def refuse(match: str, kind: type[Exception] = DataError, **arguments: Any) -> None:
    """Checks that `load_source` fails with one line that matches."""
    with pytest.raises(kind, match=match) as caught:
        load_source(arguments.pop("name", "imagefolder"), **arguments)
    assert "\n" not in str(caught.value)


# digits


def test_digits_is_split_in_equal_shares() -> None:
    source = load_source("digits", data_dir=None)
    assert source.test is not None
    assert (len(source.train), len(source.test)) == (1438, 359)
    shares = np.bincount(source.test.labels) / np.bincount(np.concatenate([source.train.labels, source.test.labels]))
    np.testing.assert_allclose(shares, 0.2, atol=0.005)


def test_digits_never_puts_an_image_in_both_splits() -> None:
    source = load_source("digits", data_dir=None)
    assert source.test is not None
    names = {split.name(i) for split in (source.train, source.test) for i in range(len(split))}
    assert len(names) == 1797


def test_digits_is_always_the_same_split() -> None:
    test = load_source("digits", data_dir=None).test
    assert test is not None
    assert [test.name(i) for i in range(3)] == ["digits/00000", "digits/00009", "digits/00022"]


def test_digits_images_and_conventions() -> None:
    source = load_source("digits", data_dir=None)
    image = source.train.read(0)
    assert image.shape == (3, 32, 32)
    assert image.dtype == np.uint8
    assert image.flags.c_contiguous
    np.testing.assert_array_equal(image[0], image[2])
    assert (source.flip, source.beta, source.default_model, source.wnids) == (False, 1, "conv3", None)
    assert source.class_names == [str(digit) for digit in range(10)]


def test_digits_constants_describe_its_images() -> None:
    source = load_source("digits", data_dir=None)
    pixels = np.stack([source.train.read(i) for i in range(len(source.train))]) / 255
    assert pixels.mean() == pytest.approx(source.mean[0], abs=0.002)
    assert pixels.std() == pytest.approx(source.std[0], abs=0.002)


def test_digits_subset_is_relabelled_in_the_datasets_order() -> None:
    source = load_source("digits", data_dir=None, classes=["7", "3"])
    assert source.class_names == ["3", "7"]
    assert set(source.train.labels.tolist()) == {0, 1}
    whole = load_source("digits", data_dir=None).train
    threes = [whole.name(int(i)) for i in np.flatnonzero(whole.labels == 3)]
    found = [source.train.name(int(i)) for i in np.flatnonzero(source.train.labels == 0)]
    assert found == threes


def test_digits_without_scikit_learn_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    refuse(r"pip install 'nrrdd\[digits\]'", name="digits", data_dir=None)


@pytest.mark.parametrize("option", ["data_dir", "test_dir"])
def test_digits_takes_no_folder(option: str, tmp_path: Path) -> None:
    arguments: dict[str, Path | None] = {"data_dir": None, option: tmp_path}
    refuse(f"--{option.replace('_', '-')}: digits", ConfigError, name="digits", **arguments)


def test_importing_sources_does_not_import_scikit_learn_or_torchvision() -> None:
    code = "import sys, builders.sources; sys.exit(any(m in sys.modules for m in ('sklearn', 'torchvision')))"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=120).returncode == 0


# imagefolder


def test_image_folder(pets: Path) -> None:
    source = image_folder(pets)
    assert source.class_names == ["ant", "cat"]
    assert source.train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert source.train.labels.dtype == np.int64
    assert [source.train.name(i) for i in (0, 5)] == ["ant/0.png", "cat/2.png"]
    assert source.train.read(5)[:, 0, 0].tolist() == [2, 50, 200]
    assert source.test is not None
    assert source.test.labels.tolist() == [0, 0, 1, 1]
    assert (source.size, source.beta, source.default_model, source.flip) == (20, 1, "conv3", True)


def test_image_folder_takes_val_where_there_is_no_test(pets: Path) -> None:
    (pets / "test").rename(pets / "val")
    test = image_folder(pets).test
    assert test is not None
    assert len(test) == 4


def test_image_folder_named_train_finds_its_sibling(pets: Path) -> None:
    source = image_folder(pets / "train")
    assert len(source.train) == 6
    assert source.test is not None


def test_bare_image_folder_has_no_test_split(pets: Path) -> None:
    (pets / "train").rename(pets / "all")
    source = image_folder(pets / "all")
    assert len(source.train) == 6
    assert source.test is None


def test_a_test_folder_elsewhere(pets: Path) -> None:
    (pets / "test").rename(pets / "held-out")
    assert image_folder(pets).test is None
    test = image_folder(pets, test_dir=pets / "held-out").test
    assert test is not None
    assert len(test) == 4


def test_a_test_folder_without_train_is_no_class(pets: Path) -> None:
    (pets / "train").rename(pets / "training")
    refuse("found a folder 'test' but no 'train'", data_dir=pets)


def test_missing_test_dir(pets: Path) -> None:
    refuse("no-such: no such folder; --test-dir", data_dir=pets, test_dir=pets / "no-such")


def test_a_class_known_only_to_the_test_split(pets: Path) -> None:
    add_images(pets / "test" / "cow")
    refuse("classes that the training split lacks: cow", data_dir=pets)


def test_a_class_missing_from_the_test_split(pets: Path) -> None:
    (pets / "test" / "cat").rename(pets / "cat")
    refuse(r"test: found no images for cat", data_dir=pets)


def test_empty_classes_are_named_together(pets: Path) -> None:
    for name in ("bee", "cow"):
        (pets / "train" / name).mkdir()
    (pets / "train" / "cow" / "notes.txt").write_text("none yet")
    refuse("found no images for bee, cow; add images", data_dir=pets)


def test_many_empty_classes_are_counted(pets: Path) -> None:
    for number in range(9):
        (pets / "train" / f"empty{number}").mkdir()
    refuse(r"empty4, … \(9 in all\)", data_dir=pets)


def test_an_empty_class_outside_the_subset_does_not_matter(pets: Path) -> None:
    (pets / "train" / "bee").mkdir()
    assert image_folder(pets, classes=["ant", "cat"]).class_names == ["ant", "cat"]


def test_only_images_in_sight_count(pets: Path) -> None:
    for name in (".hidden.png", "._0.png", "readme.txt", "0.png.part"):
        (pets / "train" / "ant" / name).write_text("x")
    (pets / "train" / ".cache").mkdir()
    (pets / "train" / "list.csv").write_text("x")
    source = image_folder(pets)
    assert source.class_names == ["ant", "cat"]
    assert len(source.train) == 6


def test_files_without_an_images_ending_are_counted(pets: Path) -> None:
    for name in (
        "train/ant/3.heic",
        "train/cat/3.HEIC",
        "test/cat/2.jfif",
        "train/cat/boxes.txt",
        "train/cat/._3.heic",
    ):
        (pets / name).write_text("x")
    source = image_folder(pets)
    train, test = ignored_notes(source.train, source.test, None, source.train)
    assert train.startswith(f"{pets}/train: ignored 2 files for the ending (.heic), read are .bmp, ")
    assert test.startswith(f"{pets}/test: ignored 1 file for the ending (.jfif), ")
    assert ignored_notes(image_folder(pets, classes=["ant", "cat"], test_dir=pets / "train").train) == (train,)
    for path in (pets / "train" / "cat").glob("*.png"):
        path.rename(path.with_suffix(".avif"))
    refuse(r"found no images for cat; add .*; ignored 5 files for the ending \(\.avif, \.heic\)", data_dir=pets)


def test_a_broken_file_with_an_images_ending_is_listed(pets: Path) -> None:
    (pets / "train" / "ant" / "broken.JPG").write_text("x")
    assert [image_folder(pets).train.name(3)] == ["ant/broken.JPG"]


def test_images_in_deeper_folders_and_behind_links_count(pets: Path) -> None:
    add_images(pets / "train" / "ant" / "more" / "b", count=1)
    (pets / "elsewhere").mkdir()
    add_images(pets / "elsewhere" / "bee", count=1)
    (pets / "train" / "bee").symlink_to(pets / "elsewhere" / "bee")
    (pets / "test").rename(pets / "unused")
    train = image_folder(pets).train
    assert [train.name(i) for i in (3, 4)] == ["ant/more/b/0.JPEG", "bee/0.JPEG"]


def test_names_that_are_not_utf8_are_read_and_hashed(pets: Path) -> None:
    odd = pets / "train" / "ant" / b"\xff.png".decode(errors="surrogateescape")
    try:
        (pets / "train" / "ant" / "0.png").rename(odd)
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    train = image_folder(pets).train
    assert train.read(2).shape == (3, 20, 20)
    assert len(train.fingerprint()) == 64


@pytest.mark.parametrize(("side", "expected"), [(4, 8), (33, 32), (65, 64), (300, 224)])
def test_the_size_of_an_image_folder_follows_its_images(tmp_path: Path, side: int, expected: int) -> None:
    add_split(tmp_path, ["a", "b"], side=side)
    assert image_folder(tmp_path).size == expected


def test_the_first_usable_image_gives_the_size(pets: Path) -> None:
    (pets / "train" / "ant" / "0.png").write_text("x")
    Image.new("RGB", (50, 40)).save(pets / "train" / "ant" / "1.png")
    assert image_folder(pets).size == 40


def test_no_usable_image_at_all(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.png").write_text("x")
    refuse("found no usable image in the folders a, b", data_dir=tmp_path)


def test_size_option(pets: Path) -> None:
    source = image_folder(pets, size=96)
    assert source.train.read(0).shape == (3, 96, 96)
    assert (source.beta, source.default_model) == (4, "conv5")


@pytest.mark.parametrize("size", [0, 7, 1025, -1])
def test_size_out_of_bounds(pets: Path, size: int) -> None:
    refuse(f"--size: found {size}, expected 8 to 1024", ConfigError, data_dir=pets, size=size)


def test_size_is_for_image_folders_only(pets: Path) -> None:
    refuse("--size: cifar10 is read at its own size", ConfigError, name="cifar10", data_dir=pets, size=64)


def test_one_class_is_none(tmp_path: Path) -> None:
    add_images(tmp_path / "train" / "all")
    refuse(r"found 1 class folder \(all\), expected 2 or more", data_dir=tmp_path)


def test_a_test_folder_that_cannot_be_listed(pets: Path) -> None:
    (pets / "empty").mkdir()
    refuse("empty: found no folders", data_dir=pets, test_dir=pets / "empty")


def test_images_without_class_folders(tmp_path: Path) -> None:
    add_images(tmp_path / "train")
    refuse("train: found no folders, expected one folder of images for each class", data_dir=tmp_path)


def test_fingerprint_follows_names_sizes_and_resolution(pets: Path) -> None:
    first = image_folder(pets).train.fingerprint()
    assert image_folder(pets).train.fingerprint() == first
    others = {image_folder(pets, size=24).train.fingerprint(), image_folder(pets / "test").train.fingerprint()}
    (pets / "train" / "ant" / "0.png").rename(pets / "train" / "ant" / "00.png")
    others.add(image_folder(pets).train.fingerprint())
    with (pets / "train" / "ant" / "1.png").open("ab") as file:
        file.write(b"!")
    others.add(image_folder(pets).train.fingerprint())
    assert len(others | {first}) == 5


def test_fingerprint_of_a_vanished_file(pets: Path) -> None:
    train = image_folder(pets).train
    (pets / "train" / "cat" / "1.png").unlink()
    with pytest.raises(DataError, match=r"cat/1\.png: cannot be read"):
        train.fingerprint()


def test_array_fingerprint_covers_the_pixels() -> None:
    def of(pixels: list[int], labels: list[int], size: int) -> str:
        images = np.array(pixels, dtype=np.uint8).reshape(-1, 1, 1, 1).repeat(3, axis=3)
        numbers = np.arange(len(pixels))
        return ArrayImages(pixels=images, labels=np.array(labels), numbers=numbers, prefix="x", size=size).fingerprint()

    assert len({of([1, 2], [0, 1], 8), of([1, 3], [0, 1], 8), of([1, 2], [1, 0], 8), of([1, 2], [0, 1], 9)}) == 4
    assert of([1, 2], [0, 1], 8) == of([1, 2], [0, 1], 8)


# classes


def test_unknown_class(pets: Path) -> None:
    refuse("--classes: found 'dog', expected names out of: ant, cat", ConfigError, data_dir=pets, classes=["dog"])


@pytest.mark.parametrize("classes", [[], ["cat"], ["cat", "cat"]], ids=["none", "one", "one twice"])
def test_fewer_than_two_classes(pets: Path, classes: list[str]) -> None:
    refuse("different classes, expected 2 or more", ConfigError, data_dir=pets, classes=classes)


def tiny(root: Path, words: str = "") -> Path:
    add_split(root / "train", [FROG, FISH, BOX], count=2, side=64)
    add_split(root / "val", [FROG, FISH, BOX], side=64)
    if words:
        (root / "words.txt").write_text(words)
    return root


def tiny_source(root: Path, **options: Any) -> Source:
    return load_source("tiny-imagenet", data_dir=root, **options)


def test_classes_by_wnid_by_name_and_by_first_word(tmp_path: Path) -> None:
    tiny(tmp_path, f"{FISH}\tgoldfish, Carassius auratus\n{FROG}\tbullfrog\n{BOX}\tbrass, plaque\n")
    for wanted in (FISH, "goldfish", "goldfish, Carassius auratus"):
        source = tiny_source(tmp_path, classes=["brass", wanted])
        assert source.class_names == ["goldfish, Carassius auratus", "brass, plaque"]
        assert source.wnids == [FISH, BOX]
        assert source.train.labels.tolist() == [0, 0, 1, 1]


def test_an_ambiguous_word(tmp_path: Path) -> None:
    tiny(tmp_path, f"{FISH}\tcrane, a bird\n{FROG}\tcrane, a machine\n")
    with pytest.raises(ConfigError, match="'crane' fits several classes: crane, a bird, crane, a machine"):
        tiny_source(tmp_path, classes=["crane", BOX])


def test_classes_that_share_their_words_get_their_wnid(tmp_path: Path) -> None:
    tiny(tmp_path, f"{FISH}\tcrane\n{FROG}\tcrane\n")
    assert tiny_source(tmp_path).class_names == [f"crane ({FISH})", f"crane ({FROG})", BOX]


# WNID datasets


def test_tiny_imagenet_as_class_folders(tmp_path: Path) -> None:
    source = tiny_source(tiny(tmp_path))
    assert source.wnids == source.class_names == [FISH, FROG, BOX]
    assert (source.size, source.beta, source.default_model) == (64, 1, "conv4")
    assert source.test is not None
    assert len(source.test) == 3


def test_tiny_imagenet_as_its_archive_unpacks(tmp_path: Path) -> None:
    root = tmp_path / "tiny-imagenet-200"
    for wnid in (FROG, FISH):
        add_images(root / "train" / wnid / "images", count=2)
        (root / "train" / wnid / f"{wnid}_boxes.txt").write_text("x")
    add_images(root / "val" / "images", count=3)
    lines = [f"{number}.JPEG\t{wnid}\t0\t1\t2\t3\n" for number, wnid in enumerate((FROG, FISH, FROG))]
    (root / "val" / "val_annotations.txt").write_text("".join(lines))
    add_images(root / "test" / "images")
    source = tiny_source(tmp_path)
    assert source.train.name(0) == f"{FISH}/images/0.JPEG"
    assert source.test is not None
    assert source.test.labels.tolist() == [1, 0, 1]
    assert source.test.name(1) == "images/1.JPEG"
    assert source.test.read(1)[0, 0, 0] == pytest.approx(1, abs=2)


@pytest.mark.parametrize(
    ("annotations", "match"),
    [
        (f"0.JPEG {FISH}\n", "line 1: expected a file name, a tab and a WNID"),
        (f"0.JPEG\t{FISH}\n", f"found no images for {FROG}"),
        (f"0.JPEG\t{FISH}\n1.JPEG\tn99999999\n", "training split lacks: n99999999"),
        ("0.JPEG\t\xff\n", "expected UTF-8 text, found other bytes at offset 7"),
    ],
    ids=["no tab", "missing class", "unknown class", "not text"],
)
def test_broken_annotations(tmp_path: Path, annotations: str, match: str) -> None:
    add_split(tmp_path / "train", [FROG, FISH])
    add_images(tmp_path / "val" / "images", count=2)
    (tmp_path / "val" / "val_annotations.txt").write_text(annotations, encoding="latin-1")
    refuse(match, name="tiny-imagenet", data_dir=tmp_path)


def test_annotations_beyond_the_bound_are_not_read(tmp_path: Path) -> None:
    add_split(tmp_path / "train", [FROG, FISH])
    (tmp_path / "val").mkdir()
    with (tmp_path / "val" / "val_annotations.txt").open("wb") as file:
        file.truncate((1 << 24) + 1)
    refuse("at most 16777216 bytes", name="tiny-imagenet", data_dir=tmp_path)


def test_folders_that_are_no_wnids(pets: Path) -> None:
    refuse("named by WNIDs such as n01440764, found ant, cat", name="tiny-imagenet", data_dir=pets)


def test_imagenette_as_its_archive_unpacks(tmp_path: Path) -> None:
    add_split(tmp_path / "imagenette2-160" / "train", IMAGENETTE)
    add_split(tmp_path / "imagenette2-160" / "val", IMAGENETTE)
    source = load_source("imagenette", data_dir=tmp_path)
    assert source.class_names[:3] == ["tench", "English springer", "cassette player"]
    assert source.wnids == IMAGENETTE
    assert (source.size, source.beta, source.default_model) == (128, 4, "conv5")


def test_two_copies_of_imagenette(tmp_path: Path) -> None:
    for copy in ("imagenette2", "imagenette2-320"):
        add_split(tmp_path / copy / "train", IMAGENETTE)
    refuse("several copies of imagenette", name="imagenette", data_dir=tmp_path)
    assert load_source("imagenette", data_dir=tmp_path / "imagenette2").test is None


def add_imagenet(root: Path) -> list[str]:
    wnids = [f"n{number:08d}" for number in range(1000)]
    add_images(root / "one")
    for wnid in wnids:
        folder = root / "train" / wnid
        folder.mkdir(parents=True)
        (folder / "0.JPEG").symlink_to(root / "one" / "0.JPEG")
    return wnids


def test_imagenet_takes_sorted_wnids_and_their_words(tmp_path: Path) -> None:
    wnids = add_imagenet(tmp_path)
    (tmp_path / "LOC_synset_mapping.txt").write_text(f"{wnids[1]} goldfish, Carassius auratus\n")
    (tmp_path / "test").mkdir()  # the challenge's test images have no labels
    source = load_source("imagenet", data_dir=tmp_path)
    assert source.wnids == wnids
    assert source.class_names[:2] == [wnids[0], "goldfish, Carassius auratus"]
    assert (source.size, source.beta, source.default_model, source.test) == (224, 4, "resnet18", None)


def test_a_part_of_imagenet_is_refused(tmp_path: Path) -> None:
    add_split(tmp_path / "train", [FISH, FROG, BOX])
    refuse("found 3/1000 class folders of imagenet", name="imagenet", data_dir=tmp_path)


# CIFAR


def test_cifar10_as_class_folders(tmp_path: Path) -> None:
    for split in ("train", "test"):
        add_split(tmp_path / split, CIFAR10, side=32, ending="jpg")
    source = load_source("cifar10", data_dir=tmp_path)
    assert source.class_names == CIFAR10
    assert (source.size, source.beta, source.default_model, source.flip) == (32, 1, "conv3", True)


def test_cifar_folders_with_a_class_missing(tmp_path: Path) -> None:
    add_split(tmp_path / "train", CIFAR10[1:])
    refuse("found 9/10 class folders of cifar10", name="cifar10", data_dir=tmp_path)


def write_cifar100(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """CIFAR-100's files as torchvision knows them, with three images a split."""
    from torchvision import datasets
    from torchvision.datasets.utils import calculate_md5

    folder = root / "cifar-100-python"
    folder.mkdir()
    names = [f"class{number:02d}" for number in range(100)]
    split = {"data": np.arange(3 * 3072, dtype=np.uint8).reshape(3, 3072), "fine_labels": [5, 0, 99]}
    for file, content in (("train", split), ("test", split), ("meta", {"fine_label_names": names})):
        (folder / file).write_bytes(pickle.dumps(content))
    sums = {file: calculate_md5(str(folder / file)) for file in ("train", "test", "meta")}
    monkeypatch.setattr(datasets.CIFAR100, "train_list", [["train", sums["train"]]])
    monkeypatch.setattr(datasets.CIFAR100, "test_list", [["test", sums["test"]]])
    monkeypatch.setattr(datasets.CIFAR100, "meta", {"filename": "meta", "key": "fine_label_names", "md5": sums["meta"]})


def test_cifar100_from_torchvisions_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_cifar100(tmp_path, monkeypatch)
    source = load_source("cifar100", data_dir=tmp_path)
    assert source.class_names[99] == "class99"
    assert source.train.labels.tolist() == [5, 0, 99]
    assert source.train.name(2) == "train/00002"
    first = np.arange(3072, dtype=np.uint8).reshape(3, 32, 32)
    np.testing.assert_array_equal(source.train.read(0), first)


def test_a_subset_of_torchvisions_cifar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_cifar100(tmp_path, monkeypatch)
    source = load_source("cifar100", data_dir=tmp_path, classes=["class99", "class05"])
    assert source.train.labels.tolist() == [0, 1]
    assert [source.train.name(i) for i in range(2)] == ["train/00000", "train/00002"]


def test_torchvisions_cifar_takes_no_test_folder(tmp_path: Path) -> None:
    refuse("brings its own test split", ConfigError, name="cifar10", data_dir=tmp_path, test_dir=tmp_path)


def test_a_foreign_pickle_is_never_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cifar-10-batches-py").mkdir()
    for file in ("batches.meta", "test_batch", *(f"data_batch_{k}" for k in range(1, 6))):
        (tmp_path / "cifar-10-batches-py" / file).write_bytes(pickle.dumps(Trap(tmp_path / "sprung")))
    cut_the_network(monkeypatch)
    refuse("cannot be downloaded", name="cifar10", data_dir=tmp_path)
    assert not (tmp_path / "sprung").exists()


def cut_the_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise URLError("no route to host")

    monkeypatch.setattr("urllib.request.urlopen", fail)


def test_cifar_that_cannot_be_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cut_the_network(monkeypatch)
    match = r"cifar10 is not there and cannot be downloaded \(.*no route.*\); expected train/<class>"
    refuse(match, name="cifar10", data_dir=tmp_path / "new")


# what every dataset has in common


def test_unknown_dataset() -> None:
    refuse("found 'mnist', expected one of digits, cifar10", ConfigError, name="mnist", data_dir=None)


FOLDER_DATASETS = [name for name in DATASETS if name not in ("digits", "hf", "webdataset")]


@pytest.mark.parametrize("name", FOLDER_DATASETS)
def test_no_data_dir(name: str) -> None:
    refuse(f"^{name}: --data-dir is missing; give the folder that holds .*<", name=name, data_dir=None)


@pytest.mark.parametrize("name", [name for name in FOLDER_DATASETS if not name.startswith("cifar")])
def test_absent_data_dir(name: str, tmp_path: Path) -> None:
    refuse(f"no such folder; {name} expects --data-dir to hold .*<", name=name, data_dir=tmp_path / "gone")


@pytest.mark.parametrize("name", ["imagenette", "tiny-imagenet", "imagenet"])
def test_data_dir_without_the_dataset(name: str, tmp_path: Path) -> None:
    refuse(f"found no folder 'train'; {name} expects .*<wnid>", name=name, data_dir=tmp_path)


@pytest.mark.parametrize(
    ("size", "model"),
    [(8, "conv3"), (32, "conv3"), (64, "conv4"), (128, "conv5"), (129, "resnet18"), (224, "resnet18")],
)
def test_default_model(size: int, model: str) -> None:
    assert default_model(size) == model


# real images, where they are at hand


@pytest.mark.slow
def test_real_cifar10(shared_data: Callable[..., Path]) -> None:
    source = load_source("cifar10", data_dir=shared_data("cifar10-jpeg", per_class=20))
    assert source.class_names == CIFAR10
    assert np.bincount(source.train.labels).tolist() == [20] * 10
    pixels = np.stack([source.train.read(i) for i in range(len(source.train))]) / 255
    np.testing.assert_allclose(pixels.mean(axis=(0, 2, 3)), source.mean, atol=0.04)
    np.testing.assert_allclose(pixels.std(axis=(0, 2, 3)), source.std, atol=0.04)


@pytest.mark.slow
def test_real_tiny_imagenet(shared_data: Callable[..., Path]) -> None:
    source = load_source("tiny-imagenet", data_dir=shared_data("tiny-imagenet-a", per_class=4))
    assert len(source.class_names) == 50
    assert source.test is not None
    assert np.bincount(source.test.labels).tolist() == [4] * 50
    assert all(source.train.read(i).shape == (3, 64, 64) for i in range(len(source.train)))
