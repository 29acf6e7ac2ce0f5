"""Golden datasets of every released version decode to what they decoded to when they were made."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest

from nrrdd_format.manifest import Manifest
from nrrdd_format.shards import ShardReader
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


def test_every_golden_dataset_states_the_version_of_its_name(make_golden: ModuleType) -> None:
    assert sorted(make_golden.DATASETS) == FOLDERS
    for name in FOLDERS:
        stated = json.loads((GOLDEN / name / "dataset.json").read_text())["version"]
        assert name.startswith(f"v{stated[0]}.{stated[1]}-")


@pytest.mark.parametrize("name", FOLDERS)
def test_golden_content(name: str, make_golden: ModuleType) -> None:
    expected = json.loads((GOLDEN / name / "expected.json").read_text())
    assert make_golden.dataset_content(GOLDEN / name) == expected
    assert verify_dataset(GOLDEN / name) == []


@pytest.mark.parametrize("name", FOLDERS)
def test_writing_the_golden_dataset_again_gives_the_same_content(
    name: str, make_golden: ModuleType, tmp_path: Path
) -> None:
    """Compressors may change, and so the bytes and hashes; what is decoded may not."""
    folder = make_golden.write_golden(tmp_path / "again", name)
    content = make_golden.dataset_content(folder)
    expected = json.loads((GOLDEN / name / "expected.json").read_text())
    assert content["shards"] == expected["shards"]
    assert (folder / "dataset.json").read_text().splitlines()[:-2] == (
        (GOLDEN / name / "dataset.json").read_text().splitlines()[:-2]
    ), "all but the shards' hashes"


def test_both_codings_hold_the_same_records() -> None:
    a, b = (json.loads((GOLDEN / f"v1.0-{c}" / "expected.json").read_text()) for c in ("explicit", "derived"))
    assert a["shards"] == b["shards"]
    assert a["dataset_id"] != b["dataset_id"]


def test_a_reader_that_knows_no_priors_reads_the_rest_of_a_dataset_with_them() -> None:
    """Version 1.0 ignores the keys that 1.1 added, in the manifest and in front of the record blocks."""
    content = json.loads((GOLDEN / "v1.1-explicit" / "dataset.json").read_text())
    del content["records"]["priors"]
    old = Manifest.decode(json.dumps(content).encode())
    reader = ShardReader(GOLDEN / "v1.1-explicit" / "shard-00000.tar", old.shards[0], old.layout(0))
    expected = json.loads((GOLDEN / "v1.0-explicit" / "expected.json").read_text())["shards"][0]["epochs"]
    assert reader.priors is None
    assert [records.index_aug.tolist() for records in reader.all_records()] == [e["index_aug"] for e in expected]
