"""The pictures of a build: what they hold, and that they appear for every kind of dataset."""

from __future__ import annotations

import os
import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from make_dataset import make_tiny_dataset
from PIL import Image

from builders import preview
from builders.preview import (
    CONTACT_SHEET,
    GAP,
    HISTOGRAM,
    preview_dataset,
    redraw,
    shown_images,
    write_contact_sheet,
    write_distance_histogram,
)
from nrrdd_format.dataset import open_dataset
from nrrdd_format.errors import ConfigError, FormatError, OutputError
from nrrdd_format.manifest import MANIFEST_NAME, Manifest

SIZE = 8
WHITE = 255


def _images(count: int, value: int) -> preview.Images:
    return np.full((count, 3, SIZE, SIZE), value, np.uint8)


def _pixels(path: Path) -> tuple[int, int]:
    with Image.open(path) as image:
        image.load()
        return image.size


@contextmanager
def _few_open_files(count: int) -> Iterator[None]:
    """No more than so many files may be opened at once, beside those that are open."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/dev/fd")) + count, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_the_montage_holds_every_pixel_in_its_row_and_column() -> None:
    first, second = np.zeros((2, SIZE, SIZE, 3), np.uint8), np.ones((2, SIZE, SIZE, 3), np.uint8)
    second[1] = 2
    sheet = preview._montage([first, second], 3)
    cell = SIZE + GAP
    assert sheet.shape == (2 * cell, 3 * cell, 3)
    assert (sheet[:SIZE, :SIZE] == 0).all()
    assert (sheet[cell : cell + SIZE, :SIZE] == 1).all()
    assert (sheet[cell : cell + SIZE, cell : cell + SIZE] == 2).all()
    assert (sheet[:, 2 * cell :] == WHITE).all()


def test_masks_are_drawn_with_the_largest_value_white_and_a_zero_mask_black() -> None:
    mask = np.zeros((2, SIZE, SIZE), np.float32)
    assert (preview._grey(mask) == 0).all()
    mask[1, 0, 0] = 0.5
    grey = preview._grey(mask)
    assert (grey[1, 0, 0] == WHITE).all() and grey.sum() == 3 * WHITE


@pytest.mark.parametrize("count", [1, 10, 11])
def test_a_contact_sheet_is_a_png_that_grows_by_bands_and_rows(tmp_path: Path, count: int) -> None:
    names = [f"a class with a long name {k}" for k in range(count)]
    refined, mask = _images(count, 9), np.zeros((count, SIZE, SIZE), np.float32)
    path, full = tmp_path / "sheet.png", tmp_path / "full.png"
    write_contact_sheet(path, initial=None, mask=None, refined=refined, class_names=names, dataset_id="a")
    write_contact_sheet(full, initial=refined, mask=mask, refined=refined, class_names=names, dataset_id="a")
    assert _pixels(full)[1] > _pixels(path)[1]
    assert _pixels(full)[0] == _pixels(path)[0]


@pytest.mark.parametrize("distances", [[0.0, 0.5, 16.0], [0.0, 0.0], [2.0]])
def test_histograms_take_zero_and_equal_distances(tmp_path: Path, distances: list[float]) -> None:
    path = tmp_path / "histogram.png"
    write_distance_histogram(path, np.array(distances, np.float32), np.array(distances, np.float32), dataset_id="a")
    assert min(_pixels(path)) > 100


def test_the_first_image_of_every_class_is_shown_in_the_order_of_the_classes(tmp_path: Path) -> None:
    path = make_tiny_dataset(tmp_path / "data", classes=5, ipc=2, shards=3)
    with open_dataset(path) as dataset:
        shown = shown_images(dataset)
    assert [image.label for image in shown] == [0, 1, 2, 3, 4]
    assert [image.index for image in shown] == [0, 1, 2, 3, 4]
    assert [image.shard for image in shown] == sorted(image.shard for image in shown)


def test_at_most_fifty_classes_are_shown(tmp_path: Path) -> None:
    path = make_tiny_dataset(tmp_path / "data", classes=53, ipc=1, epochs=1)
    with open_dataset(path) as dataset:
        assert len(shown_images(dataset)) == preview.MOST_CLASSES


def test_a_dataset_is_previewed_with_and_without_what_only_the_build_knows(tmp_path: Path) -> None:
    path = make_tiny_dataset(tmp_path / "data", size=SIZE)
    plain = preview_dataset(path, tmp_path / "plain")
    images, masks = dict(enumerate(_images(12, 7))), dict.fromkeys(range(12), np.zeros((SIZE, SIZE), np.float32))
    full = preview_dataset(path, tmp_path / "a" / "full", initial=images, mask=masks)
    assert plain.contact_sheet == tmp_path / "plain" / CONTACT_SHEET
    assert plain.histogram == tmp_path / "plain" / HISTOGRAM
    assert _pixels(full.contact_sheet)[1] > _pixels(plain.contact_sheet)[1]
    assert {item.name for item in (tmp_path / "plain").iterdir()} == {CONTACT_SHEET, HISTOGRAM}


def test_a_preview_is_drawn_anew_with_what_the_work_folder_still_holds(tmp_path: Path) -> None:
    path = make_tiny_dataset(tmp_path / "data", size=SIZE)
    manifest = Manifest.load(path / MANIFEST_NAME)
    replace(manifest, method={"build_key": "abc"}).save(path / MANIFEST_NAME)
    gone = redraw(path, tmp_path / "gone")
    kept = tmp_path / "data.work" / "writing-abc"
    kept.mkdir(parents=True)
    np.save(kept / preview.SHOWN_INDICES, np.arange(3))
    np.save(kept / preview.SHOWN_INITIAL, _images(3, 7))
    np.save(kept / preview.SHOWN_MASK, np.zeros((3, SIZE, SIZE), np.float32))
    for full in (redraw(path, tmp_path / "full"), redraw(path, tmp_path / "named", work=tmp_path / "data.work")):
        assert _pixels(full.contact_sheet)[1] > _pixels(gone.contact_sheet)[1]


@pytest.mark.parametrize(
    ("made", "message"), [(False, "no such folder"), (True, "holds no initial images of this dataset's build")]
)
def test_a_named_work_folder_must_be_the_builds(tmp_path: Path, made: bool, message: str) -> None:
    path, work = make_tiny_dataset(tmp_path / "data"), tmp_path / "elsewhere"
    if made:
        work.mkdir()
    with pytest.raises(ConfigError, match=f"--work-dir: .*elsewhere: {message}"):
        redraw(path, tmp_path / "out", work=work)
    assert not (tmp_path / "out").exists()


def test_pictures_of_the_same_dataset_only_are_drawn_over(tmp_path: Path) -> None:
    out = tmp_path / "out"
    first, second = (make_tiny_dataset(tmp_path / str(seed), seed=seed) for seed in range(2))
    written = redraw(first, out)
    before = written.contact_sheet.read_bytes()
    with pytest.raises(
        OutputError, match=r"contact-sheet\.png: shows another dataset, of id \w+, expected \w+; move it"
    ):
        redraw(second, out)
    assert written.contact_sheet.read_bytes() == before
    redraw(first, out)
    for content in (b"mine", b"\x89PNG\r\n\x1a\n"):
        written.histogram.write_bytes(content)
        with pytest.raises(OutputError, match=r"distances\.png: is no preview of a known dataset"):
            redraw(first, out)
        assert written.histogram.read_bytes() == content


def test_pictures_beside_a_dataset_are_its_own_whatever_it_was_before(tmp_path: Path) -> None:
    path = make_tiny_dataset(tmp_path / "data", seed=0)
    before = redraw(path).contact_sheet.read_bytes()
    shutil.rmtree(path)
    make_tiny_dataset(path, seed=1)
    written = redraw(path)
    assert written.contact_sheet == tmp_path / "data.preview" / CONTACT_SHEET
    assert written.contact_sheet.read_bytes() != before


def test_distances_of_a_large_dataset_are_taken_from_its_first_epochs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_tiny_dataset(tmp_path / "data", classes=2, ipc=3, shards=1, epochs=5)
    monkeypatch.setattr(preview, "MOST_DISTANCES", 7)
    with open_dataset(path) as dataset:
        org, aug = preview._distances(dataset)
    assert len(org) == len(aug) == 12


def test_a_dataset_may_have_more_shards_than_files_may_be_open(tmp_path: Path) -> None:
    path = make_tiny_dataset(tmp_path / "data", classes=30, ipc=2, shards=30)
    preview_dataset(path, tmp_path / "before")  # what it imports opens files, too
    with _few_open_files(15):
        preview_dataset(path, tmp_path / "out")
    assert _pixels(tmp_path / "out" / CONTACT_SHEET) == _pixels(tmp_path / "before" / CONTACT_SHEET)


def test_shards_behind_the_last_shown_image_are_not_read(tmp_path: Path) -> None:
    """A dataset of a thousand shards shows images of its first one."""
    path = make_tiny_dataset(tmp_path / "data", classes=2, ipc=6, shards=3)
    (path / "shard-00002.tar").unlink()
    with open_dataset(path) as dataset:
        assert [(image.label, image.shard) for image in shown_images(dataset)] == [(0, 0), (1, 0)]


@pytest.mark.parametrize("name", ["$_$", "$5 to $10", r"x$^$", "\\$_$"])
def test_names_are_drawn_as_they_are(tmp_path: Path, name: str) -> None:
    """None is taken for a formula, which would end a build after all its work."""
    path = tmp_path / "sheet.png"
    names = [name, "b"]
    write_contact_sheet(path, initial=None, mask=None, refined=_images(2, 9), class_names=names, dataset_id="a")
    assert min(_pixels(path)) > 0


@pytest.mark.filterwarnings("error")
def test_names_whose_letters_the_font_lacks_are_drawn_without_a_warning(tmp_path: Path) -> None:
    path = tmp_path / "sheet.png"
    write_contact_sheet(path, initial=None, mask=None, refined=_images(1, 9), class_names=["猫"], dataset_id="a")
    assert min(_pixels(path)) > 0


def test_a_damaged_dataset_is_refused(tmp_path: Path) -> None:
    path = make_tiny_dataset(tmp_path / "data")
    shard = path / "shard-00000.tar"
    shard.write_bytes(shard.read_bytes()[:2000])
    with pytest.raises(FormatError, match=r"shard-00000\.tar"):
        preview_dataset(path, tmp_path / "out")


def test_a_file_in_the_way_of_the_folder_is_named(tmp_path: Path) -> None:
    path = make_tiny_dataset(tmp_path / "data")
    (tmp_path / "out").write_text("in the way")
    with pytest.raises(OutputError, match="cannot make the folder"):
        preview_dataset(path, tmp_path / "out")
