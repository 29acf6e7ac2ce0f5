"""Distilled images that exist already become a dataset: kept bytes, matched classes, and what cannot be used."""

from __future__ import annotations

import io
import json
import signal
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from builders.cli import main, make_parser, parse
from builders.config import MAKING_OPTIONS, BuildConfig, EncodingSettings
from builders.given_images import (
    GivenImages,
    find_folders,
    match_classes,
    refuse_unusable,
    stored_bytes,
    take_given,
)
from builders.inputs import load_inputs
from builders.models import create_model
from builders.pipeline import build
from builders.teacher import mixed_up_classes, save_checkpoint
from nrrdd_format.dataset import open_dataset
from nrrdd_format.decoding import decode_image
from nrrdd_format.errors import ConfigError, DataError, OutputError, TeacherError
from nrrdd_format.verify import verify_dataset

SIZE = 16
CLASSES = ("ape", "bee", "cat")


def picture(number: int, codec: str = "JPEG", size: tuple[int, int] = (SIZE, SIZE), **options: Any) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, codec, **options)
    return buffer.getvalue()


def write_images(root: Path, folders: tuple[str, ...] = CLASSES, count: int = 2, ending: str = "jpg") -> Path:
    for label, folder in enumerate(folders):
        (root / folder).mkdir(parents=True)
        for number in range(count):
            data = picture(10 * label + number, {"jpg": "JPEG", "png": "PNG"}[ending])
            (root / folder / f"{number}.{ending}").write_bytes(data)
    return root


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images as another method leaves them, real images, and an untrained teacher without BatchNorm or map."""
    root = tmp_path_factory.mktemp("made")
    write_images(root / "syn")
    write_images(root / "real", count=3, ending="png")
    torch.manual_seed(0)
    save_checkpoint(root / "teacher.pt", create_model("conv2-w8", 3, SIZE), "conv2-w8", CLASSES)
    return root


def options(made: Path, out: Path, *more: str) -> list[str]:
    return (
        f"--dataset imagefolder --from-images {made}/syn --data-dir {made}/real --out {out} --epochs 3 --cycle 2 "
        f"--mix-group 2 --shard-images 3 --threads 1 --device cpu --teacher-checkpoint {made}/teacher.pt "
        f"--min-teacher-top1 0"
    ).split() + list(more)


def take(root: Path, ipc: int = 0) -> GivenImages:
    return take_given(find_folders(root), range(len(CLASSES)), CLASSES, ipc=ipc, size=SIZE)


def names(given: GivenImages) -> list[str]:
    return [given.files.name(number) for number in range(len(given.files))]


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*"))}


def stored(out: Path) -> dict[tuple[int, int], bytes]:
    """The stored bytes of every image by (class, number within it)."""
    found = {}
    with open_dataset(out) as dataset:
        classes = len(dataset.manifest.dataset.class_names)
        for shard in dataset.shards:
            for place, (index, label) in enumerate(zip(shard.indices.tolist(), shard.labels.tolist(), strict=True)):
                assert index % classes == label
                found[label, index // classes] = shard.image_bytes(place)
    return found


@pytest.fixture(scope="module")
def reference(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("reference") / "distilled"
    assert main(options(made, out, "--images-method", "RDED")) == 0
    return out


def test_files_that_fit_keep_their_bytes(made: Path, reference: Path) -> None:
    assert verify_dataset(reference) == []
    expected = {
        (label, number): (made / "syn" / name / f"{number}.jpg").read_bytes()
        for label, name in enumerate(CLASSES)
        for number in range(2)
    }
    assert stored(reference) == expected


def test_the_manifest_says_where_the_images_came_from_and_names_no_path(made: Path, reference: Path) -> None:
    manifest = open_dataset(reference).manifest
    assert (manifest.images.ipc, manifest.images.codec, manifest.images.quality) == (2, "jpeg", None)
    assert manifest.method["given_images"]["method"] == "RDED"
    assert manifest.method["name"] != "NRR-DD" and "refinement" not in manifest.method
    assert "distilled before (method: RDED)" in (reference / "README.md").read_text()
    assert str(made) not in (reference / "dataset.json").read_text()
    assert (reference / "contact-sheet.png").is_file()
    (log,) = (reference.parent / "distilled.work").glob("build-*.json")
    assert json.loads(log.read_text())["options"]["from_images"] == str(made / "syn")


def test_only_labelling_leaves_work(reference: Path) -> None:
    folders = {path.name.partition("-")[0] for path in (reference.parent / "distilled.work").iterdir() if path.is_dir()}
    assert folders == {"encoding", "relabeling", "writing"}


def test_killed_and_resumed_by_two_ranks_gives_the_same_bytes(made: Path, reference: Path, tmp_path: Path) -> None:
    out, work = tmp_path / "distilled", tmp_path / "distilled.work"
    arguments = options(made, out, "--images-method", "RDED")
    command = [sys.executable, "-m", "builders", *arguments]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while process.poll() is None and sum(path.is_file() for path in work.rglob("*")) < 5:
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
    assert not (out.exists() and verify_dataset(out)), "a half-written dataset has the final name"
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "builders",
    ]
    done = subprocess.run([*torchrun, *arguments], capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    assert content(out) == content(reference)


def test_a_changed_image_starts_the_work_anew(made: Path, tmp_path: Path) -> None:
    """Even one of equal size: the dataset would mix old and new."""
    write_images(tmp_path / "syn", ending="png")
    for name in ("real", "teacher.pt"):
        (tmp_path / name).symlink_to(made / name)
    work = ("--work-dir", str(tmp_path / "work"))
    assert main(options(tmp_path, tmp_path / "first", *work)) == 0
    path = tmp_path / "syn" / "ape" / "0.png"
    Image.fromarray(np.full((SIZE, SIZE, 3), 7, np.uint8)).save(path)
    size = len(path.read_bytes())
    Image.fromarray(np.full((SIZE, SIZE, 3), 9, np.uint8)).save(path)
    assert len(path.read_bytes()) == size
    assert main(options(tmp_path, tmp_path / "second", *work)) == 0
    assert stored(tmp_path / "second")[0, 0] == path.read_bytes()


def test_what_does_not_fit_is_encoded_from_its_pixels(made: Path, tmp_path: Path) -> None:
    """Another size, grey pixels with alpha, a turned photo: each as the source reader shows it; the rest is kept."""
    syn = write_images(tmp_path / "syn", ending="png")
    (syn / "ape" / "0.png").write_bytes(picture(1, "PNG", (40, 20)))
    Image.fromarray(np.random.default_rng(1).integers(0, 256, (SIZE, SIZE, 2), np.uint8), "LA").save(syn / "bee/0.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    (syn / "cat" / "0.png").write_bytes(picture(2, "PNG", exif=exif))
    out = build(config(tmp_path / "out", from_images=syn, data_dir=made / "real", size=SIZE))
    assert verify_dataset(out) == []
    found = stored(out)
    inputs = load_inputs(config(tmp_path / "out", from_images=syn, size=SIZE))
    assert inputs.given is not None
    for label, name in enumerate(CLASSES):
        assert found[label, 1] == (syn / name / "1.png").read_bytes()
        assert found[label, 0] != (syn / name / "0.png").read_bytes()
        np.testing.assert_array_equal(decode_image(found[label, 0], SIZE).numpy(), inputs.given.files.read(label))


def sixteen_bits(path: Path) -> None:
    """A PNG of 16-bit RGB, which Pillow reads as 8-bit but does not write."""
    rows = b"".join(b"\0" + bytes(6 * SIZE) for _ in range(SIZE))
    content = struct.pack(">IIBBBBB", SIZE, SIZE, 16, 2, 0, 0, 0)
    chunks = ((b"IHDR", content), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    coded = [struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in chunks]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(coded))


def transparent(path: Path) -> None:
    path.write_bytes(picture(1, "PNG", transparency=(7, 7, 7)))


def animated(path: Path) -> None:
    frames = [Image.open(io.BytesIO(picture(number, "PNG"))) for number in range(2)]
    frames[0].save(path, save_all=True, append_images=frames[1:])


@pytest.mark.parametrize("write", [sixteen_bits, transparent, animated])
def test_a_file_that_readers_may_show_differently_does_not_keep_its_bytes(
    write: Callable[[Path], None], tmp_path: Path
) -> None:
    syn = write_images(tmp_path / "syn", ending="png")
    write(syn / "ape" / "0.png")
    given = take(syn)
    settings = EncodingSettings(codec="png", quality=None, shard_images=10)
    assert stored_bytes(given, 3, settings, keep=True) == (syn / "ape" / "1.png").read_bytes()
    assert stored_bytes(given, 0, settings, keep=True) != (syn / "ape" / "0.png").read_bytes()


def test_another_size_is_another_build(made: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    save_checkpoint(tmp_path / "teacher.pt", create_model("resnet18-small-w8", 3, SIZE), "resnet18-small-w8", CLASSES)
    teacher = {"teacher_checkpoint": tmp_path / "teacher.pt"}
    sizes = config(tmp_path / "out", from_images=made / "syn", data_dir=made / "real", size=SIZE, **teacher)
    build(sizes)
    other = replace(sizes, size=SIZE // 2)
    with pytest.raises(OutputError, match="size: 16 there, 8 here"):
        build(other)
    out = build(replace(other, out=tmp_path / "small", work_dir=sizes.work_path))
    assert verify_dataset(out) == []
    assert open_dataset(out).manifest.images.size == SIZE // 2


def config(out: Path, **changes: Any) -> BuildConfig:
    teacher = changes.get("data_dir", Path()).parent / "teacher.pt"
    base: dict[str, Any] = {"dataset": "imagefolder", "ipc": 0, "epochs": 1, "min_teacher_top1": 0.0, "device": "cpu"}
    return BuildConfig(out=out, **(base | {"teacher_checkpoint": teacher} | changes))


@pytest.mark.parametrize(
    ("change", "codec", "quality"),
    [
        ({"image_codec": "webp"}, "webp", None),
        ({"image_quality": 70}, "jpeg", 70),
        ({"image_codec": "png"}, "png", None),
    ],
)
def test_another_codec_or_quality_on_request(
    made: Path, tmp_path: Path, change: dict[str, Any], codec: str, quality: int | None
) -> None:
    out = build(config(tmp_path / "out", from_images=made / "syn", data_dir=made / "real", **change))
    assert verify_dataset(out) == []
    images = open_dataset(out).manifest.images
    assert (images.codec, images.quality) == (codec, quality)


def test_a_teacher_that_could_make_no_images_can_label_them(made: Path, tmp_path: Path) -> None:
    """Discovery needs class activation maps, and refinement BatchNorm; labels need neither."""
    torch.manual_seed(0)
    save_checkpoint(tmp_path / "teacher.pt", create_model("squeezenet1_1", 3, 32), "squeezenet1_1", CLASSES)
    for name in ("syn", "real"):
        (tmp_path / name).symlink_to(made / name)
    changes = {"from_images": tmp_path / "syn", "data_dir": tmp_path / "real", "size": 32}
    out = build(config(tmp_path / "out", **changes))
    assert open_dataset(out).manifest.teacher.architecture == "squeezenet1_1"


def test_without_real_images_the_teacher_is_tested_on_those_given(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = {"teacher_checkpoint": made / "teacher.pt", "from_images": made / "syn"}
    out = build(config(tmp_path / "out", **changes))
    manifest = open_dataset(out).manifest
    assert manifest.teacher.top1 is None
    assert manifest.dataset.class_names == CLASSES
    said = capsys.readouterr().err
    assert "on the given images" in said and "no real images to test the teacher on" in said
    assert "not tested on real images" in (out / "README.md").read_text()


def test_a_teacher_that_does_not_know_the_given_images_is_refused(made: Path, tmp_path: Path) -> None:
    changes = {"teacher_checkpoint": made / "teacher.pt", "min_teacher_top1": 1.0}
    with pytest.raises(TeacherError, match=r"on the given images, expected 100\.0% or more.*another order"):
        build(config(tmp_path / "out", from_images=made / "syn", **changes))


def test_classes_in_each_others_place_are_named() -> None:
    """Folders 1 and 2 are swapped; class 3 is merely hard, and of class 4 there are too few images to say."""
    labels = np.repeat([0, 1, 2, 3, 4], [8, 8, 8, 8, 3])
    predicted = np.array([0] * 8 + [2] * 7 + [1] + [1] * 5 + [2] * 3 + [0] * 8 + [3] * 3)
    assert mixed_up_classes(labels, predicted) == {1: 2, 2: 1}
    assert mixed_up_classes(labels, labels) == {}


def test_swapped_folders_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """To a teacher that sees the brighter of two colours."""
    for label, name in enumerate(("green", "red")):
        (tmp_path / "syn" / name).mkdir(parents=True)
        for number in range(4):
            pixels = np.full((SIZE, SIZE, 3), number, np.uint8)
            pixels[..., label] = 200
            Image.fromarray(pixels).save(tmp_path / "syn" / name / f"{number}.png")
    model = create_model("conv1-w8", 2, SIZE)
    weights = {name: torch.zeros_like(tensor) for name, tensor in model.state_dict().items()}
    weights["features.0.0.weight"][0, 0, 1, 1] = weights["features.0.0.weight"][1, 1, 1, 1] = 1.0
    weights["features.0.1.weight"] += 1
    weights["features.0.1.running_var"] += 1
    weights["classifier.weight"] = torch.zeros(2, 8, 8, 8)
    weights["classifier.weight"][1, 0], weights["classifier.weight"][0, 1] = 1.0, 1.0
    weights["classifier.weight"] = weights["classifier.weight"].reshape(2, -1)
    model.load_state_dict(weights)
    save_checkpoint(tmp_path / "teacher.pt", model, "conv1-w8", ("green", "red"))
    build(config(tmp_path / "out", from_images=tmp_path / "syn", teacher_checkpoint=tmp_path / "teacher.pt"))
    assert "seem mixed up, check their order: green (shows red), red (shows green)" in capsys.readouterr().err


def test_a_test_split_alone_names_the_classes_and_tests_the_teacher(made: Path, tmp_path: Path) -> None:
    given = write_images(tmp_path / "syn", tuple(f"new{k:03d}" for k in range(3)))
    inputs = load_inputs(config(tmp_path / "out", from_images=given, test_dir=made / "real"))
    assert inputs.source.class_names == list(CLASSES)
    assert inputs.real is not None and len(inputs.real) == 9
    assert "new000 = ape, new001 = bee" in " ".join(inputs.notices)


# Classes


def test_numbered_folders_follow_their_numbers(tmp_path: Path) -> None:
    """Sorted as text, class 10 would come before class 2."""
    names = tuple(f"{k}" for k in range(11))
    found = find_folders(write_images(tmp_path / "syn", names, count=1))
    assert found.folders == names
    assert [found.images.name(index) for index in np.argsort(found.images.labels)] == [f"{k}/0.jpg" for k in range(11)]
    assert match_classes(found, [f"class {k:02d}" for k in range(11)], None, subset=False) == (list(range(11)), True)


def test_folders_numbered_with_gaps_stay_sorted(tmp_path: Path) -> None:
    assert find_folders(write_images(tmp_path / "syn", ("1", "10", "2"), count=1)).folders == ("1", "10", "2")


def test_classes_match_by_name_before_position(tmp_path: Path) -> None:
    found = find_folders(write_images(tmp_path / "syn", ("0", "1", "2"), count=1))
    assert match_classes(found, ["2", "1", "0"], None, subset=False) == ([2, 1, 0], False)


def test_classes_txt_names_the_folders(tmp_path: Path) -> None:
    syn = write_images(tmp_path / "syn", ("0_cat", "1_ape", "2_bee"), count=1)
    (syn / "classes.txt").write_text("0_cat\tcat\n1_ape\tape\n2_bee\tbee\n")
    assert match_classes(find_folders(syn), CLASSES, None, subset=False) == ([1, 2, 0], False)


@pytest.mark.parametrize(
    ("folders", "classes", "message"),
    [
        (("0\tcrane", "1\tcrane", "2\tdog"), ["crane", "ape", "dog"], "several classes are named crane"),
        (
            ("0\tcrane", "1\tape", "2\tdog"),
            ["crane", "crane", "dog"],
            "several of the source's classes are named crane",
        ),
    ],
)
def test_names_that_cannot_be_told_apart_are_refused(
    folders: tuple[str, ...], classes: list[str], message: str, tmp_path: Path
) -> None:
    syn = write_images(tmp_path / "syn", ("0", "1", "2"), count=1)
    (syn / "classes.txt").write_text("\n".join(folders) + "\n")
    with pytest.raises(DataError, match=message):
        match_classes(find_folders(syn), classes, None, subset=False)


def test_wnids_match_whatever_their_words(tmp_path: Path) -> None:
    wnids = ("n01440764", "n02102040")
    found = find_folders(write_images(tmp_path / "syn", wnids, count=1))
    assert match_classes(found, ["a fish", "a dog"], wnids[::-1], subset=False) == ([1, 0], False)


def test_a_subset_of_the_classes(made: Path, tmp_path: Path) -> None:
    changes = {"from_images": made / "syn", "data_dir": made / "real", "classes": ("cat", "ape")}
    inputs = load_inputs(config(tmp_path / "out", **changes))
    assert inputs.given is not None
    assert names(inputs.given) == ["ape/0.jpg", "cat/0.jpg", "ape/1.jpg", "cat/1.jpg"]
    assert inputs.source.class_names == ["ape", "cat"]


def test_classes_without_folder_and_folders_without_class(made: Path, tmp_path: Path) -> None:
    syn = write_images(tmp_path / "syn", ("ape", "bee", "dog"))
    changes: dict[str, Any] = {"from_images": syn, "data_dir": made / "real"}
    with pytest.raises(DataError, match="syn: found no class cat"):
        load_inputs(config(tmp_path / "out", **changes))
    (syn / "dog").rename(syn / "cat")
    write_images(syn, ("elk",))
    with pytest.raises(DataError, match="found classes that the source lacks: elk"):
        load_inputs(config(tmp_path / "out", **changes))


def test_other_names_and_another_number(made: Path, tmp_path: Path) -> None:
    syn = write_images(tmp_path / "syn", ("x", "y"))
    with pytest.raises(DataError, match=r"found 2 classes \(x, y\), none named as one of the source's 3"):
        load_inputs(config(tmp_path / "out", from_images=syn, data_dir=made / "real"))


def test_a_dataset_of_known_classes_must_have_them_all(made: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="found 3/10 classes of cifar10"):
        load_inputs(config(tmp_path / "out", dataset="cifar10", from_images=made / "syn"))


# Numbers of images


def test_unequal_classes_are_named_with_their_counts(made: Path, tmp_path: Path) -> None:
    syn = write_images(tmp_path / "syn")
    (syn / "bee" / "1.jpg").unlink()
    with pytest.raises(DataError, match=r"have 1 to 2 images, fewer than 2 in bee \(1\).*--ipc 1") as caught:
        take(syn)
    assert "\n" not in str(caught.value)
    assert names(take(syn, 1)) == ["ape/0.jpg", "bee/0.jpg", "cat/0.jpg"]


def test_too_few_for_ipc_and_none_at_all(made: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"too few images in ape \(2\), bee \(2\), cat \(2\); expected 3 or more"):
        take(made / "syn", 3)
    syn = write_images(tmp_path / "syn")
    for path in (syn / "cat").iterdir():
        path.unlink()
    with pytest.raises(DataError, match=r"too few images in cat \(0\); expected at least one"):
        take(syn)
    for path in syn.rglob("*.jpg"):
        path.write_text("no image")
    with pytest.raises(DataError, match=r"syn: found no usable image in the folders ape, bee, cat"):
        find_folders(syn)


def damaged(made: Path, root: Path, *, empty: bool = False) -> Path:
    """Given images of which one lost its end and one is text, the first of all; and, if asked for, an empty one."""
    syn = write_images(root / "syn", count=3)
    (syn / "bee" / "1.jpg").write_bytes(picture(0)[:300])
    (syn / "ape" / "0.jpg").write_text("no image")
    if empty:
        (syn / "cat" / "2.jpg").write_bytes(b"")
    for name in ("real", "teacher.pt"):
        (root / name).symlink_to(made / name)
    return syn


@pytest.mark.parametrize("empty", [False, True])
def test_damaged_images_are_named_at_once_before_any_work(
    made: Path, tmp_path: Path, empty: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    damaged(made, tmp_path, empty=empty)
    assert main(options(tmp_path, tmp_path / "out")) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {tmp_path}/syn: ape/0.jpg: is not an image")
    assert "bee/1.jpg: cannot be decoded" in line and ("cat/2.jpg: expected an image of 1.." in line) == empty
    assert not (tmp_path / "out").exists() and not list((tmp_path / "out.work").rglob("*.msgpack"))


def test_a_plan_names_damaged_images_and_goes_on(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damaged(made, tmp_path)
    assert main([*options(tmp_path, tmp_path / "out"), "--min-teacher-top1", "1", "--plan"]) == 2
    printed = capsys.readouterr()
    images, teacher = [line for line in printed.err.splitlines() if line.startswith(("error: ", "problem: "))]
    assert images.startswith(f"problem: {tmp_path}/syn: ape/0.jpg: is not an image") and "bee/1.jpg: " in images
    assert "expected 100.0% or more" in teacher
    assert printed.out.splitlines()[-1] == "the build could not start"


def test_of_many_damaged_images_the_first_few_are_named(tmp_path: Path) -> None:
    syn = write_images(tmp_path / "syn", count=4)
    given = take(syn)
    for path in syn.rglob("[0-2].jpg"):
        path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(DataError, match=r"^[^\n]*syn: ape/0\.jpg: [^\n]*, bee/0\.jpg: [^\n]*, … \(9 in all\); replace"):
        refuse_unusable(given.place, given.files, range(12), processes=2)
    refuse_unusable(given.place, given.files, range(9, 12), processes=1)


def test_files_that_are_ignored_for_their_ending_are_said(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    syn = write_images(tmp_path / "syn")
    for name in ("ape/2.JFIF", "bee/deep.er/2.avif", "bee/3.jfif", "cat/none", "cat/notes.txt", "cat/.hidden.jfif"):
        (syn / name).parent.mkdir(exist_ok=True)
        (syn / name).write_bytes(picture(0))
    for name in ("real", "teacher.pt"):
        (tmp_path / name).symlink_to(made / name)
    assert main([*options(tmp_path, tmp_path / "out"), "--plan"]) == 0
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "ignored" in line]
    assert line == (
        f"{syn}: ignored 4 files for the ending (.avif, .jfif, none), read are .bmp, .gif, .jpeg, .jpg, .pgm, .png, "
        ".ppm, .tif, .tiff, .webp"
    )
    (syn / "ape" / "0.jpg").rename(syn / "ape" / "0.jfif")
    with pytest.raises(DataError, match=r"--ipc 1; ignored 5 files for the ending \(\.avif, \.jfif, none\)"):
        take(syn)


# Options


def test_columns_without_a_table(made: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--label-column: found without --data-dir"):
        load_inputs(config(tmp_path / "out", from_images=made / "syn", label_column="x"))


@pytest.mark.parametrize("method", ["", "RDED\nSRe2L"])
def test_a_method_that_no_manifest_can_hold_is_named_by_its_option(method: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^--images-method: found '.*', expected 1 to 4096 characters in one line$"):
        config(tmp_path / "out", from_images=tmp_path, images_method=method)


def test_ipc_or_given_images_are_required(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(["--dataset", "digits"])
    assert "--ipc (or --from-images)" in capsys.readouterr().err
    for images in ("syn", "hf:syn", "hf:some/syn"):
        assert parse(["--dataset", "digits", "--from-images", images]).out == Path("digits-syn")


@pytest.mark.parametrize(
    "change",
    [
        {"iterations": 5},
        {"beta": 4},
        {"jitter": True},
        {"confidence": "random"},
        {"alpha_bn": 1.0},
        {"mask": "all"},
        {"cam_every": 5},
    ],
)
def test_options_of_what_is_not_done_are_refused(change: dict[str, Any]) -> None:
    name = next(iter(change)).replace("_", "-")
    with pytest.raises(ConfigError, match=f"--{name}: found with --from-images"):
        BuildConfig(dataset="digits", out=Path("x"), ipc=0, from_images=Path("syn"), **change)
    with pytest.raises(ConfigError, match="--images-method: found without --from-images"):
        BuildConfig(dataset="digits", out=Path("x"), ipc=1, images_method="RDED")


def test_every_option_of_making_images_is_among_them() -> None:
    groups = {str(group.title)[:7]: group._group_actions for group in make_parser()._action_groups}
    assert {action.dest for stage in ("stage 1", "stage 2") for action in groups[stage]} == set(MAKING_OPTIONS)
