"""The dataset verbs of `nrrdd` as users meet them: what they print, write, and end with."""

from __future__ import annotations

import json
import operator
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from functools import reduce
from pathlib import Path
from typing import Any

import pytest
import torch
from labelled_dataset import label_dataset
from make_dataset import make_tiny_dataset

from benchmarks import cli
from builders.card import CARD_NAME, dataset_card, write_card
from builders.import_fkd import UNKNOWN_SHA256, UNKNOWN_TEACHER
from builders.models import create_model
from builders.teacher import load_teacher, save_checkpoint
from nrrdd_format.manifest import MANIFEST_NAME, Manifest
from nrrdd_format.shards import shard_name
from nrrdd_format.verify import verify_dataset

CLASSES = ("class 0", "class 1", "class 2")
VERBS = ("inspect", "verify", "repair", "split", "merge", "reshard")


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """A tiny dataset of four shards of six images, with cycles of 3 and mix groups of 2."""
    return make_tiny_dataset(tmp_path / "data", ipc=8, shards=4)


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a dataset `data` that `teacher.pt` labelled, and `other.pt`, another teacher."""
    root = tmp_path_factory.mktemp("labelled")
    for seed, name in enumerate(("teacher.pt", "other.pt")):
        torch.manual_seed(seed)
        save_checkpoint(root / name, create_model("conv2-w8", 3, 16), "conv2-w8", CLASSES)
    teacher = load_teacher(None, root / "teacher.pt", num_classes=3, image_size=16, device="cpu", class_names=CLASSES)
    label_dataset(make_tiny_dataset(root / "data", ipc=8), teacher)
    return root


def run(*arguments: object) -> int:
    return cli.main([str(argument) for argument in arguments])


def output(capsys: pytest.CaptureFixture[str]) -> str:
    printed = capsys.readouterr()
    assert printed.err == ""
    return printed.out


def error(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line on standard error."""
    line = capsys.readouterr().err
    assert line.startswith("error: ") and line.count("\n") == 1
    return line


def damage(path: Path, at: int = 3000) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("verb", VERBS)
def test_every_verbs_help_has_an_example(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main([verb, "--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert f"nrrdd {verb} " in text.partition("example")[2]
    assert max(map(len, text.splitlines())) <= 120


def test_help_lists_the_verbs(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    text = capsys.readouterr().out
    assert all(f"\n    {verb} " in text for verb in VERBS)


@pytest.mark.parametrize("verb", ["repair", "split", "merge", "reshard"])
def test_verbs_that_move_files_load_no_torch(verb: str, dataset: Path, tmp_path: Path) -> None:
    arguments: dict[str, list[object]] = {
        "repair": [dataset],
        "split": [dataset, "--out", tmp_path / "a", tmp_path / "b"],
        "merge": [dataset, dataset, "--out", tmp_path / "c"],
        "reshard": [dataset, "--images", 12, "--out", tmp_path / "d"],
    }
    code = (
        "import sys; from benchmarks import cli\n"
        f"cli.main({[verb, *map(str, arguments[verb])]!r})\n"
        "print(sorted({'torch', 'matplotlib'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


# ---- inspect


def test_inspect_shows_classes_epochs_and_bytes(dataset: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("inspect", dataset) == 0
    text = output(capsys)
    assert all(word in text for word in ("class 2", "share_of_bytes", "cutmix", "median", "d_aug"))
    assert run("inspect", dataset, "--json") == 0
    facts = json.loads(output(capsys))
    assert [row["images"] for row in facts["class_table"]] == [8, 8, 8] and len(facts["epoch_table"]) == 3


def test_inspect_of_a_damaged_dataset_ends_with_2(dataset: Path, capsys: pytest.CaptureFixture[str]) -> None:
    os.truncate(dataset / shard_name(1), 4000)
    assert run("inspect", dataset) == 2
    assert shard_name(1) in error(capsys)


# ---- verify


def test_verify_as_json(dataset: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("verify", dataset, "--json") == 0
    assert json.loads(output(capsys)) == {"sound": True, "problems": [], "drift": None}
    damage(dataset / shard_name(1), -1)
    assert run("verify", dataset, "--json") == 1
    found = json.loads(output(capsys))
    assert found["sound"] is False
    assert [problem["shard"] for problem in found["problems"]] == [shard_name(1)] * 2
    assert found["problems"][1]["offset"] == (dataset / shard_name(1)).stat().st_size - 1


def test_verify_of_what_is_no_dataset_ends_with_2(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    for path, message in (
        (tmp_path / "none", "no such folder"),
        (tmp_path / ("n" * 300), "no such folder"),
        (dataset / shard_name(0), "no such folder"),
        (tmp_path / "empty", "neither dataset.json nor a shard"),
    ):
        assert run("verify", path) == 2
        assert message in error(capsys)
    (dataset / MANIFEST_NAME).unlink()
    assert run("verify", dataset) == 1
    assert "dataset.json: cannot be read" in output(capsys)


def test_verify_points_to_repair(dataset: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damage(dataset / shard_name(1))
    assert run("verify", dataset) == 1
    assert "nrrdd repair" in output(capsys).splitlines()[-1]


def test_verify_with_the_teacher(labelled: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ("verify", labelled / "data", "--teacher-checkpoint", labelled / "teacher.pt", "--device", "cpu")
    assert run(*command, "--sample", 50) == 0
    text = output(capsys)
    assert "distances of 50 pairs computed anew" in text
    assert "unexplained by rounding and device 0.00%" in text and "no problems" in text
    assert run(*command, "--json", "--seed", 1) == 0
    found = json.loads(output(capsys))
    assert found["sound"] is True and found["drift"]["explained"] is True and found["drift"]["pairs"] == 72


def test_verify_tells_distances_that_are_not_the_teachers(
    labelled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Sound in every checksum, but its distances are random numbers."""
    data = make_tiny_dataset(tmp_path / "data", ipc=8)
    manifest = Manifest.load(data / MANIFEST_NAME)
    replace(manifest, teacher=Manifest.load(labelled / "data" / MANIFEST_NAME).teacher).save(data / MANIFEST_NAME)
    command = ("verify", data, "--teacher-checkpoint", labelled / "teacher.pt", "--device", "cpu")
    assert run(*command) == 1
    text = output(capsys)
    assert "these are not the teacher's distances" in text and "no problems" not in text
    assert run(*command, "--json") == 1
    found = json.loads(output(capsys))
    assert found["sound"] is False and found["problems"] == [] and found["drift"]["unexplained_share"] > 0.2


def test_verify_refuses_another_teacher(labelled: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("verify", labelled / "data", "--teacher-checkpoint", labelled / "other.pt", "--device", "cpu") == 2
    assert "SHA-256" in error(capsys)
    assert run("verify", labelled / "data", "--teacher-checkpoint", labelled / "none.pt", "--device", "cpu") == 2
    assert "none.pt" in error(capsys)


@pytest.mark.parametrize(
    ("architecture", "classes", "size", "message"),
    [
        ("conv2-w8", CLASSES, 32, "not the weights of a conv2-w8 for 3 classes and images of 16 px"),
        ("conv1-w8", CLASSES, 16, "holds a conv1-w8, expected conv2-w8"),
        ("conv2-w8", CLASSES[:2], 16, "teacher of 2 classes, expected 3"),
        ("conv2-w8", CLASSES[::-1], 16, "class 0 of the teacher is 'class 2', expected 'class 0'"),
    ],
)
def test_a_teacher_that_does_not_fit_is_refused_in_the_verbs_own_terms(
    labelled: Path,
    tmp_path: Path,
    architecture: str,
    classes: tuple[str, ...],
    size: int,
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Neither `--teacher` nor `--size` is an option of `verify`, and nothing is trained here."""
    path = tmp_path / "misfit.pt"
    save_checkpoint(path, create_model(architecture, len(classes), size), architecture, classes)
    assert run("verify", labelled / "data", "--teacher-checkpoint", path, "--device", "cpu") == 2
    line = error(capsys)
    assert message in line and line.endswith("name the dataset's own teacher with --teacher-checkpoint\n")
    assert not any(word in line for word in ("--teacher ", "--size", "source", "train"))


@pytest.mark.parametrize(
    ("stated", "message"),
    [
        ({"architecture": UNKNOWN_TEACHER, "sha256": UNKNOWN_SHA256}, "does not say which network made its labels"),
        ({"sha256": UNKNOWN_SHA256}, "does not state those of its teacher; if these made its labels"),
    ],
)
def test_a_teacher_that_an_import_did_not_state_cannot_be_compared(
    labelled: Path, tmp_path: Path, stated: dict[str, Any], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    data = shutil.copytree(labelled / "data", tmp_path / "data")
    manifest = Manifest.load(data / MANIFEST_NAME)
    replace(manifest, teacher=replace(manifest.teacher, **stated)).save(data / MANIFEST_NAME)
    command = ("--teacher-checkpoint", labelled / "teacher.pt", "--device", "cpu")
    for verb in (("verify", data), ("export", data, "--layout", "fkd", "--to", tmp_path / "out")):
        assert run(*verb, *command) == 2
        line = error(capsys)
        assert message in line and "--teacher-sha256" in line


def test_distances_of_a_damaged_dataset_are_not_computed(
    labelled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = shutil.copytree(labelled / "data", tmp_path / "data")
    damage(data / shard_name(0))
    assert run("verify", data, "--teacher-checkpoint", labelled / "teacher.pt") == 1
    assert "not computed" in output(capsys)


@pytest.mark.parametrize("option", [("--sample", "0"), ("--seed", "-1")])
def test_numbers_of_the_sample_have_bounds(option: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        run("verify", "data", "--teacher-checkpoint", "teacher.pt", *option)
    assert ended.value.code == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert f"argument {option[0]}: found '{option[1]}', expected a whole number" in line


@pytest.mark.parametrize("option", [("--sample", "5"), ("--seed", "1"), ("--device", "cpu")])
def test_options_of_the_teacher_need_it(
    dataset: Path, option: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("verify", dataset, *option) == 2
    assert f"{option[0]}: found without --teacher-checkpoint" in error(capsys)


@pytest.mark.parametrize(
    "command",
    [
        *(f"{verb} {{url}}" for verb in ("inspect", "verify", "preview", "student", "repair")),
        "split {url} --out a",
        "repair data --from {url}",
        "merge data {url} --out out",
        "export {url} --layout imagefolder --to out",
    ],
)
@pytest.mark.parametrize("url", ["https://user:secret@host/data?token=secret", "s3://bucket/data", "file:///data"])
def test_a_url_is_no_folder(command: str, url: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        run(*(url if word == "{url}" else word for word in command.split()))
    assert ended.value.code == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert f"found a URL ({url.partition(':')[0]}:…), expected a folder of this machine; copy dataset.json" in line
    assert "secret" not in line


# ---- repair


def test_repair_from_another_copy(dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = shutil.copytree(dataset, tmp_path / "copy")
    damage(dataset / shard_name(2))
    assert run("repair", dataset, "--from", copy, "--dry-run") == 1
    text = output(capsys)
    assert f"{shard_name(2)}: would be fetched from {copy}" in text and "nothing was changed" in text
    assert run("repair", dataset, "--from", copy) == 0
    text = output(capsys)
    assert f"{shard_name(2)}: fetched from" in text and f"kept as {shard_name(2)}.damaged" in text
    assert "sound now" in text and "lost" not in text
    assert run("verify", dataset) == 0
    assert run("repair", dataset) == 0
    assert "nothing to do" in output(capsys)


def test_repair_says_what_is_lost(dataset: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damage(dataset / shard_name(2))
    (dataset / shard_name(3)).unlink()
    assert run("repair", dataset) == 0
    text = output(capsys)
    assert f"{shard_name(2)}: dropped, with 6 images and 18 pairs" in text
    assert f"{shard_name(3)}: dropped" in text and "No such file" in text
    assert "lost: 2 of 4 shards, 12 of 24 images, 36 of 72 pairs" in text
    assert f"kept as {shard_name(2)}.damaged" in text and f"kept as {shard_name(3)}" not in text
    assert verify_dataset(dataset) == []
    assert run("repair", dataset, "--json") == 0
    found = json.loads(output(capsys))
    assert (found["sound"], found["bad"], found["shards"]) == (True, [], 2)


def test_repair_keeps_the_old_manifest_and_renews_the_card(dataset: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before, manifest = Manifest.load(dataset / MANIFEST_NAME), (dataset / MANIFEST_NAME).read_bytes()
    write_card(dataset, before)
    damage(dataset / shard_name(2))
    assert run("repair", dataset, "--dry-run") == 1
    assert (dataset / CARD_NAME).read_text() == dataset_card(before)
    assert "dataset.json.before" not in output(capsys)
    assert run("repair", dataset) == 0
    assert "dataset.json before is kept as dataset.json.before; README.md: written anew" in output(capsys)
    assert (dataset / "dataset.json.before").read_bytes() == manifest
    assert (dataset / CARD_NAME).read_text() == dataset_card(Manifest.load(dataset / MANIFEST_NAME))
    (dataset / CARD_NAME).write_text("my own words")
    damage(dataset / shard_name(1))
    assert run("repair", dataset, "--json") == 0
    found = json.loads(output(capsys))
    assert (found["old_manifest"], found["card_renewed"]) == ("dataset.json.before-2", False)
    assert (dataset / CARD_NAME).read_text() == "my own words"


KILLED = """
import os, signal, sys
from benchmarks import cli
from nrrdd_format import repair

set_aside = repair._set_aside

def stop(path):
    set_aside(path)
    os.kill(os.getpid(), signal.SIGKILL)

repair._set_aside = stop
cli.main(["repair", sys.argv[1]])
"""


def test_repair_heals_the_card_that_a_killed_one_left(
    dataset: Path, repository: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_card(dataset, Manifest.load(dataset / MANIFEST_NAME))
    damage(dataset / shard_name(2))
    command = [sys.executable, "-c", KILLED, str(dataset)]
    assert subprocess.run(command, cwd=repository, check=False).returncode == -signal.SIGKILL
    now = dataset_card(Manifest.load(dataset / MANIFEST_NAME))
    assert (dataset / CARD_NAME).read_text() != now
    assert run("repair", dataset, "--dry-run") == 0
    assert (dataset / CARD_NAME).read_text() != now
    capsys.readouterr()
    assert run("repair", dataset) == 0
    text = output(capsys)
    assert "README.md: written anew, since it was of an earlier dataset.json" in text and "no problems" in text
    assert (dataset / CARD_NAME).read_text() == now
    assert run("repair", dataset) == 0
    assert "README.md" not in output(capsys)


def test_a_stale_card_is_renewed_when_more_shards_are_dropped(dataset: Path) -> None:
    write_card(dataset, Manifest.load(dataset / MANIFEST_NAME))
    stale = (dataset / CARD_NAME).read_bytes()
    damage(dataset / shard_name(2))
    assert run("repair", dataset) == 0
    (dataset / CARD_NAME).write_bytes(stale)
    damage(dataset / shard_name(1))
    assert run("repair", dataset) == 0
    assert (dataset / CARD_NAME).read_text() == dataset_card(Manifest.load(dataset / MANIFEST_NAME))


def test_a_damaged_old_manifest_does_not_stop_a_repair(dataset: Path) -> None:
    write_card(dataset, Manifest.load(dataset / MANIFEST_NAME))
    (dataset / "dataset.json.before").write_bytes(b"{")
    damage(dataset / shard_name(2))
    assert run("repair", dataset) == 0
    assert (dataset / CARD_NAME).read_text() == dataset_card(Manifest.load(dataset / MANIFEST_NAME))


def test_repair_as_json(dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = shutil.copytree(dataset, tmp_path / "copy")
    for number in (1, 2):
        damage(dataset / shard_name(number))
    damage(copy / shard_name(2))
    assert run("repair", dataset, "--from", copy, "--json") == 1
    found = json.loads(output(capsys))
    assert (found["sound"], found["fetched"], found["left"]) == (False, [shard_name(1)], [shard_name(2)])
    assert found["set_aside"] == [f"{shard_name(1)}.damaged"] and found["dropped"] == []
    assert found["bad"][1]["fault_of_copy"].startswith(shard_name(2))
    assert run("repair", dataset, "--from", copy) == 1
    text = output(capsys)
    assert "1 shard is still bad" in text and "left as it is" in text


def test_repair_takes_the_manifest_from_the_copy(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = shutil.copytree(dataset, tmp_path / "copy")
    (dataset / MANIFEST_NAME).write_bytes(b"[]")
    assert run("repair", dataset) == 2
    assert "--from" in error(capsys)
    assert run("repair", dataset, "--from", copy) == 0
    text = output(capsys)
    assert f"dataset.json: taken from {copy}" in text and "dataset.json.damaged" in text
    assert verify_dataset(dataset) == []


def test_repair_refuses_to_leave_nothing(dataset: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(4):
        damage(dataset / shard_name(number))
    assert run("repair", dataset) == 2
    assert "every shard is bad" in error(capsys)


# ---- split, merge, reshard


def test_split_and_merge(dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parts = [tmp_path / "a", tmp_path / "b"]
    assert run("split", dataset, "--out", *parts) == 0
    assert [line.partition("; ")[0] for line in output(capsys).splitlines()] == [
        f"{part}: 2 shards, 12 images, 36 pairs" for part in parts
    ]
    assert run("merge", *reversed(parts), "--out", tmp_path / "c", "--json") == 0
    assert json.loads(output(capsys))["dataset_id"] == Manifest.load(dataset / MANIFEST_NAME).dataset_id
    assert {p.name: p.read_bytes() for p in (tmp_path / "c").iterdir()} == {
        p.name: p.read_bytes() for p in dataset.iterdir()
    }
    assert run("merge", *parts, "--out", tmp_path / "c") == 2
    assert "exists already" in error(capsys)
    assert run("merge", parts[0], parts[0], "--out", tmp_path / "d") == 2
    assert "shard-00000.tar is in" in error(capsys)
    assert run("split", dataset, "--out", *(tmp_path / f"p{number}" for number in range(9)), "--json") == 2
    assert "9 folders for 4 shards" in error(capsys)


def test_reshard(dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("reshard", dataset, "--images", 12, "--out", tmp_path / "large") == 0
    text = output(capsys)
    assert "shards: 2, before 4" in text and "records: explicit, " in text and "verbatim" not in text
    assert verify_dataset(tmp_path / "large") == []
    assert run("reshard", dataset, "--images", 3, "--out", tmp_path / "small") == 2
    assert "joins no two shards" in error(capsys)


def test_reshard_says_what_verbatim_records_cost(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = make_tiny_dataset(tmp_path / "data", ipc=8, shards=4, cycle=4)
    assert run("reshard", data, "--images", 12, "--out", tmp_path / "large") == 0
    text = output(capsys)
    assert "stored verbatim, since" in text and "cycle 4" in text
    before, after = (Manifest.load(path / MANIFEST_NAME) for path in (data, tmp_path / "large"))
    for manifest in (before, after):
        assert f"{round(sum(entry.record_bytes for entry in manifest.shards) / 72, 3)} bytes a pair" in text
    assert run("reshard", data, "--images", 24, "--out", tmp_path / "one", "--json") == 0
    facts = json.loads(output(capsys))
    assert (facts["before"]["coding"], facts["after"]["coding"], facts["after"]["shards"]) == (
        "explicit",
        "verbatim",
        1,
    )


def test_a_single_shard_can_be_neither_split_nor_joined(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = make_tiny_dataset(tmp_path / "data", shards=1)
    assert run("split", data, "--out", tmp_path / "a", tmp_path / "b") == 2
    assert "has 1 shard, and shards stay whole, so it cannot be split: build it with a smaller" in error(capsys)
    assert run("reshard", data, "--images", 100, "--out", tmp_path / "c") == 2
    assert "has 1 shard, expected two or more to join" in error(capsys)


def with_manifest(folder: Path, *changes: tuple[tuple[str, ...], object]) -> Path:
    """Sets values in dataset.json."""
    content: Any = json.loads((folder / MANIFEST_NAME).read_bytes())
    for (*sections, key), value in changes:
        reduce(operator.getitem, sections, content)[key] = value
    (folder / MANIFEST_NAME).write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ((("version",), [1, 7]), "version is 1.7, this nrrdd writes 1.1 and would lose what came later"),
        ((("records", "weights"), [1]), "'records.weights' is not known to this nrrdd, which would lose it"),
        ((("shards", 1, "mirror"), "x"), "'shards[1].mirror' is not known"),
    ],
)
def test_what_a_newer_version_brought_is_not_dropped(
    dataset: Path, tmp_path: Path, change: Any, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with_manifest(dataset, change)
    out = tmp_path / "out"
    assert run("verify", dataset) == 0
    assert run("split", dataset, "--out", out, tmp_path / "b") == 2 and message in error(capsys)
    assert run("merge", dataset, dataset, "--out", out) == 2 and message in error(capsys)
    assert run("reshard", dataset, "--images", 100, "--out", out) == 2 and message in error(capsys)
    assert run("repair", dataset) == 0  # nothing is bad
    damage(dataset / shard_name(1))
    before = (dataset / MANIFEST_NAME).read_bytes()
    capsys.readouterr()
    assert run("repair", dataset) == 2 and message in error(capsys)
    assert (dataset / MANIFEST_NAME).read_bytes() == before


def test_keys_that_say_nothing_are_no_loss(dataset: Path, tmp_path: Path) -> None:
    with_manifest(dataset, (("records", "priors"), None), (("later",), None), (("method", "mine"), {"a": 1}))
    assert run("split", dataset, "--out", tmp_path / "a", tmp_path / "b") == 0
    assert Manifest.load(tmp_path / "a" / MANIFEST_NAME).method["mine"] == {"a": 1}


@pytest.mark.parametrize("verb", ["repair", "split", "merge", "reshard"])
def test_a_missing_dataset_is_the_users_mistake(verb: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    none, out = tmp_path / "none", tmp_path / "out"
    arguments: dict[str, list[object]] = {
        "repair": [none],
        "split": [none, "--out", out, tmp_path / "b"],
        "merge": [none, none, "--out", out],
        "reshard": [none, "--images", 3, "--out", out],
    }
    assert run(verb, *arguments[verb]) == 2
    assert "none" in error(capsys)
    assert list(tmp_path.iterdir()) == []
