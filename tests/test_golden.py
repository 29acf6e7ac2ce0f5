"""Golden datasets of every released version decode to what they decoded to when they were made."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest

from nrrdd_format.manifest import VERSION
from nrrdd_format.verify import verify_dataset

GOLDEN = Path(__file__).resolve().parent / "golden"
FOLDERS = sorted(path.parent.name for path in GOLDEN.glob("*/dataset.json"))


@pytest.fixture(scope="module")
def make_golden() -> ModuleType:
    """The script that makes the golden datasets."""
    spec = importlib.util.spec_from_file_location("make_golden", GOLDEN / "make_golden.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_current_version_has_golden_datasets(make_golden: ModuleType) -> None:
    current = {f"v{VERSION[0]}.{VERSION[1]}-{coding}" for coding in make_golden.CODINGS}
    assert current <= set(FOLDERS)


@pytest.mark.parametrize("name", FOLDERS)
def test_golden_content(name: str, make_golden: ModuleType) -> None:
    expected = json.loads((GOLDEN / name / "expected.json").read_text())
    assert make_golden.dataset_content(GOLDEN / name) == expected
    assert verify_dataset(GOLDEN / name) == []


@pytest.mark.parametrize("coding", ["explicit", "derived", "verbatim"])
def test_writing_the_golden_dataset_again_gives_the_same_content(
    coding: str, make_golden: ModuleType, tmp_path: Path
) -> None:
    """Compressors may change, and so the bytes and hashes; what is decoded may not."""
    folder = make_golden.write_golden(tmp_path / "again", coding)
    content = make_golden.dataset_content(folder)
    expected = json.loads((GOLDEN / f"v1.0-{coding}" / "expected.json").read_text())
    assert content["shards"] == expected["shards"]


def test_both_codings_hold_the_same_records() -> None:
    a, b = (json.loads((GOLDEN / f"v1.0-{c}" / "expected.json").read_text()) for c in ("explicit", "derived"))
    assert a["shards"] == b["shards"]
    assert a["dataset_id"] != b["dataset_id"]
