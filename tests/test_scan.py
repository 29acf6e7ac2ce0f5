"""builders.scan on a real folder with good, broken and unreadable files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from builders.folders import list_classes
from builders.image_sets import FolderImages
from builders.images import UnusableImage
from builders.scan import Usable, usable_images
from nrrdd_format.errors import DataError

ANTS = np.arange(6, dtype=np.int64)
CATS = ANTS + 6
NOISE = np.random.Generator(np.random.Philox(3)).integers(0, 256, (30, 30), dtype=np.uint8)


@pytest.fixture
def folder(tmp_path: Path) -> FolderImages:
    """Two classes of six images; in `cat`, 1 is text, 2 is empty and 4 is cut off."""
    for name in ("ant", "cat"):
        (tmp_path / name).mkdir()
        for number in range(6):
            Image.fromarray(NOISE).save(tmp_path / name / f"{number}.png")
    (tmp_path / "cat" / "1.png").write_text("not found")
    (tmp_path / "cat" / "2.png").write_bytes(b"")
    whole = (tmp_path / "cat" / "4.png").read_bytes()
    (tmp_path / "cat" / "4.png").write_bytes(whole[: len(whole) // 2])
    return list_classes(tmp_path, ["ant", "cat"], 8)


def scan(folder: FolderImages, candidates: np.ndarray, needed: int) -> Usable:
    """Of one class."""
    (found,) = usable_images(folder, [candidates], needed=needed)
    return found


def test_a_sound_class_gives_the_first_images_asked_for(folder: FolderImages) -> None:
    found = scan(folder, ANTS[::-1], 3)
    assert found.indices == [5, 4, 3]
    assert found.bad == []


@pytest.mark.parametrize("processes", [1, 2])
def test_bad_files_are_passed_over_and_named(folder: FolderImages, processes: int) -> None:
    ants, found, none = usable_images(folder, [ANTS, CATS, CATS[:0]], needed=3, processes=processes)
    assert ants.indices == [0, 1, 2] and not ants.bad and not none.indices
    assert found.indices == [6, 9, 11]
    assert [name for name, _ in found.bad] == ["cat/1.png", "cat/2.png", "cat/4.png"]
    assert [reason.split("(")[0].strip() for _, reason in found.bad] == [
        "is not an image of a known format",
        "is empty",
        "cannot be decoded",
    ]


def test_nothing_is_read_beyond_what_is_needed(folder: FolderImages) -> None:
    found = scan(folder, CATS, 1)
    assert found.indices == [6]
    assert found.bad == []


def test_a_class_with_too_few_gives_what_it_has(folder: FolderImages) -> None:
    found = scan(folder, CATS, 6)
    assert found.indices == [6, 9, 11]
    assert len(found.bad) == 3


def test_only_the_candidates_are_taken(folder: FolderImages) -> None:
    found = scan(folder, CATS[[5, 1]], 6)
    assert found.indices == [11]
    assert [name for name, _ in found.bad] == ["cat/1.png"]


def test_a_file_that_cannot_be_read_is_not_replaced(folder: FolderImages) -> None:
    (folder.root / "ant" / "0.png").unlink()
    with pytest.raises(DataError, match=r"ant/0\.png: cannot be read") as caught:
        scan(folder, ANTS, 3)
    assert not isinstance(caught.value, UnusableImage)
