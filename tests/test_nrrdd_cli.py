"""The `nrrdd` command as users meet it, and the grid behind the accuracy benchmark and the demo."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import pytest
from make_dataset import make_tiny_dataset
from matplotlib.figure import Figure

from benchmarks import accuracy, cli, demo, student, teachers
from benchmarks.command import run
from benchmarks.grid import Cell, Grid, build_config, cell_path, dataset_path, student_config
from benchmarks.results_io import Picture, command_line, markdown_table, provenance, write_json, write_report
from benchmarks.spread import interval, spread
from benchmarks.student import StudentConfig, StudentResult
from benchmarks.teacher import TeacherConfig
from builders import cli as build_cli
from nrrdd_format.errors import ConfigError, OutputError

VERBS = (
    *("teacher", "student", "preview", "inspect", "verify", "repair", "split", "merge", "reshard"),
    *("export", "import-fkd"),
)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny dataset; its source is not to be had."""
    return make_tiny_dataset(tmp_path_factory.mktemp("cli") / "data")


def _nrrdd(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)


def _error(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line on standard error."""
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    return error


def test_help_names_every_verb_and_loads_nothing_heavy() -> None:
    code = (
        "import sys, benchmarks.cli as cli\n"
        "try: cli.main(['--help'])\n"
        "except SystemExit: pass\n"
        "print(sorted({'torch', 'torchvision', 'matplotlib', 'sklearn'} & set(sys.modules)))\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240, check=True)
    assert all(verb in result.stdout for verb in VERBS)
    assert result.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("verb", VERBS)
def test_every_verbs_help_has_an_example(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main([verb, "--help"])
    assert ended.value.code == 0
    assert f"nrrdd {verb} " in capsys.readouterr().out.partition("example")[2]


def test_verify_ends_with_0_for_a_sound_dataset(dataset: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["verify", str(dataset)]) == 0
    assert "no problems" in capsys.readouterr().out


def test_verify_prints_every_problem_and_ends_with_1(tmp_path: Path) -> None:
    path = make_tiny_dataset(tmp_path / "data")
    for shard in path.glob("*.tar"):
        content = bytearray(shard.read_bytes())
        content[-3000] ^= 0xFF
        shard.write_bytes(content)
    result = _nrrdd("verify", path)
    assert result.returncode == 1
    assert "shard-00000.tar" in result.stdout and "shard-00001.tar" in result.stdout
    assert "problems" in result.stdout.splitlines()[-1]
    assert result.stderr == ""


def test_inspect_prints_text_or_json(dataset: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["inspect", str(dataset)]) == 0
    assert "tiny" in capsys.readouterr().out
    assert cli.main(["inspect", str(dataset), "--json", "--record", "1:2:3"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["images"] == 12 and facts["record"]["pair"] == 3


@pytest.mark.parametrize("record", ["1:2", "a:b:c", "1:2:3:4", "-1:0:0"])
def test_a_record_of_another_form_is_refused(dataset: Path, record: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["inspect", str(dataset), f"--record={record}"])
    assert ended.value.code == 2
    assert "SHARD:EPOCH:PAIR" in capsys.readouterr().err


def test_a_record_outside_the_dataset_is_refused(dataset: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["inspect", str(dataset), "--record", "0:99:0"]) == 2
    assert "epoch" in _error(capsys)


def test_preview_writes_both_pictures(dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["preview", str(dataset), "--out", str(tmp_path / "pictures")]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert all(Path(line).stat().st_size > 0 for line in printed) and len(printed) == 2


@pytest.mark.parametrize("verb", ["inspect", "student", "preview"])
def test_a_missing_dataset_is_the_users_mistake(verb: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([verb, str(tmp_path / "none")]) == 2
    assert "none" in _error(capsys)


def test_a_student_of_an_unknown_source_is_refused(dataset: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["student", str(dataset)]) == 2
    assert "'tiny'" in _error(capsys)


def test_a_student_of_another_source_is_refused(dataset: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["student", str(dataset), "--dataset", "digits"]) == 2
    assert "class 0 of the source is '0', expected 'class 0'" in _error(capsys)


def test_interrupts_and_closed_pipes_end_without_a_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted() -> int:
        raise KeyboardInterrupt

    assert run(interrupted) == 130
    assert capsys.readouterr().err.count("\n") == 1
    code = "from benchmarks.command import run; import sys\nsys.exit(run(lambda: print('x' * 200000) or 0))"
    command = f'{sys.executable} -c "{code}" | head -c 1'
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=240, check=False)
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("module", ["torch", "numpy"])
@pytest.mark.parametrize(
    "command",
    [
        "-m builders --dataset digits --ipc 1",
        "{folder}/build-distilled --dataset digits --ipc 1",
        "-m benchmarks.cli teacher --dataset digits --out {folder}/t.pt",
        "{folder}/nrrdd teacher --dataset digits --out {folder}/t.pt",
        "-m benchmarks.accuracy --help",
        "-m benchmarks.storage_footprint --help",
    ],
)
def test_an_interrupt_during_imports_ends_without_a_traceback(
    command: str, module: str, tmp_path: Path, repository: Path
) -> None:
    """Ctrl-C comes as soon as a command asks for the module."""
    (tmp_path / f"{module}.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\nwhile True: pass\n")
    for script, package in (("build-distilled", "builders"), ("nrrdd", "benchmarks")):
        (tmp_path / script).write_text(f"import sys\nfrom {package}.cli import main\nsys.exit(main())\n")
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{repository}"}
    arguments = command.format(folder=tmp_path).split()
    done = subprocess.run(
        [sys.executable, *arguments],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    (line,) = done.stderr.splitlines()
    assert (done.returncode, line.partition(":")[0]) == (130, "interrupted")


def test_errors_during_imports_keep_their_traceback(tmp_path: Path, repository: Path) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('libcudart is missing')\n")
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{repository}"}
    command = [sys.executable, "-m", "benchmarks.accuracy", "--help"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 1 and "Traceback" in done.stderr and "libcudart is missing" in done.stderr


def test_errors_that_are_not_the_users_keep_their_traceback() -> None:
    def broken() -> int:
        raise ValueError("a bug")

    with pytest.raises(ValueError, match="a bug"):
        run(broken)


def test_a_teacher_and_a_student_of_digits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Teacher, build and student through their commands, as the help shows them."""
    pytest.importorskip("sklearn")
    teacher, distilled = tmp_path / "sub" / "teacher.pt", tmp_path / "distilled"
    assert cli.main(f"teacher --dataset digits --architecture conv2-w8 --epochs 2 --out {teacher}".split()) == 0
    assert "test top-1" in capsys.readouterr().out
    log = json.loads((tmp_path / "sub" / "teacher.pt.json").read_text())
    assert log["architecture"] == "conv2-w8" and log["epochs"] == 2 and 0 <= log["test_top1"] <= 1
    assert {path.name for path in teacher.parent.iterdir()} == {"teacher.pt", "teacher.pt.json"}
    built = build_cli.main(
        f"--dataset digits --ipc 1 --teacher-checkpoint {teacher} --min-teacher-top1 0 --iterations 1 --epochs 2 "
        f"--out {distilled}".split()
    )
    assert built == 0
    capsys.readouterr()
    student = f"student {distilled} --labels soft --teacher-checkpoint {teacher} --student conv2-w8 --epochs 2 --json"
    assert cli.main([*student.split(), "--log", str(tmp_path / "log.json")]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((tmp_path / "log.json").read_text())
    assert printed["settings"]["labels"] == "soft" and printed["settings"]["batch_size"] == 10


TEACHER = "teacher --dataset digits --architecture conv2-w8 --epochs 1 --out"


def test_a_teacher_is_not_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("sklearn")
    out = tmp_path / "t.pt"
    assert cli.main([*TEACHER.split(), str(out)]) == 0
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    capsys.readouterr()
    assert cli.main([*TEACHER.split(), str(out), "--workers", "1"]) == 0
    printed = capsys.readouterr()
    assert "trained already" in printed.err and "test top-1" in printed.out
    for more, other in (("--seed 1", "seed: 0 there, 1 here"), ("--classes 0 1", "class_names: ")):
        assert cli.main([*TEACHER.split(), str(out), *more.split()]) == 2
        error = _error(capsys)
        assert other in error and "choose another --out, or remove the file" in error
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    (tmp_path / "t.pt.json").unlink()
    assert cli.main([*TEACHER.split(), str(out)]) == 2
    assert "no t.pt.json says how it was trained" in _error(capsys)
    assert out.read_bytes() == before[out]


def test_a_file_that_cannot_be_written_is_found_before_any_work(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither source is to be had, so any work would end in another error."""
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    long = "x" * 300
    for name, message in (("file/x", "cannot make"), ("folder", "found a folder"), (long, "cannot write")):
        for command in (["teacher", "--dataset", "cifar10", "--out"], ["student", str(dataset), "--log"]):
            assert cli.main([*command, str(tmp_path / name)]) == 2
            assert message in _error(capsys)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]


def test_a_students_result_is_told_though_its_log_cannot_be_written(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    result = StudentResult(
        settings={"architecture": "conv3"},
        top1=0.5,
        test_images=8,
        skipped_test_images=[{"image": "x.png", "reason": "is not an image"}],
        loss=1.0,
        clipped_share=None,
        seconds=1.0,
    )

    def train(path: object, source: object, config: StudentConfig) -> StudentResult:
        assert (config.labels, config.alpha_dbr) == ("dbr-completed", 0.25)
        (tmp_path / "log.json").mkdir()  # in the way since training began
        return result

    monkeypatch.setattr(student, "train_student", train)
    monkeypatch.setattr(student, "load_matching_source", lambda *arguments, **options: SimpleNamespace(test=None))
    options = ["--labels", "dbr-completed", "--alpha-dbr", "0.25"]
    assert cli.main(["student", str(dataset), *options, "--log", str(tmp_path / "log.json")]) == 2
    printed = capsys.readouterr()
    assert "top-1 50.00% of 8 test images" in printed.out and "log.json: cannot write" in printed.err
    assert printed.err.startswith("1 unusable test image left out: x.png\n")


@pytest.mark.parametrize("command", ["teacher --dataset x --out y", "student x", "inspect x", "merge x y --out z"])
def test_an_unknown_option_is_answered_by_its_verb(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main([*command.split(), "--no-such-option"])
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith(f"usage: nrrdd {command.split()[0]} ")
    assert error.endswith("unrecognized arguments: --no-such-option\n")


GRID = Grid(
    dataset="digits",
    out=Path("out"),
    teacher_checkpoint=Path("teacher.pt"),
    teacher=TeacherConfig(),
    ipcs=(1, 2),
    images=("random-real", "nrr+lr"),
    labels=("one-hot", "dbr"),
    seeds=(0, 1),
    student="conv2-w8",
    epochs=3,
    iterations=7,
)


def test_a_grid_has_every_cell_once_in_order() -> None:
    cells = list(GRID.cells())
    assert len(set(cells)) == len(cells) == 16
    assert cells[:2] == [
        Cell(ipc=1, images="random-real", labels="one-hot", seed=0),
        Cell(ipc=1, images="random-real", labels="dbr", seed=0),
    ]


@pytest.mark.parametrize(
    ("images", "changes"),
    [
        ("random-real", {"init": "real", "iterations": 0}),
        ("discovery", {"confidence": "lowest", "iterations": 0}),
        ("rded", {"iterations": 0}),
        ("random-patches", {"confidence": "random", "iterations": 0}),
        ("nrr", {"alpha_lr": 0.0}),
        ("discovery+nrr+lr", {"confidence": "lowest"}),
        ("real+nrr", {"init": "real", "alpha_lr": 0.0}),
        ("noise+all-pixels", {"init": "noise", "mask": "all", "alpha_lr": 0.0}),
        ("nrr+lr", {}),
    ],
)
def test_kinds_of_images_are_builds_that_differ_in_their_own_settings(
    images: str, changes: dict[str, object], tmp_path: Path
) -> None:
    grid = _grid(tmp_path)
    config = build_config(grid, Cell(ipc=1, images=images, labels="dbr", seed=1))
    plain: dict[str, object] = {"init": "cidd", "confidence": "highest", "mask": "non-critical", "alpha_lr": 1.0}
    plain["iterations"] = 7
    if changes.get("iterations") == 0:
        changes = changes | {"alpha_lr": 0.0}
    assert {name: getattr(config, name) for name in plain} == plain | changes
    assert (config.seed, config.epochs, config.work_dir) == (1, 3, tmp_path / "work" / "seed1")


def test_kinds_of_labels_are_students_that_differ_in_their_own_options() -> None:
    def options(labels: str) -> tuple[str, float]:
        config = student_config(GRID, Cell(ipc=1, images="nrr", labels=labels, seed=0))
        return config.labels, config.soft_temperature

    assert [options(labels) for labels in ("soft", "soft-t20", "fkd-top5", "dbr")] == [
        ("soft", 1.0),
        ("soft", 20.0),
        ("soft-top5", 1.0),
        ("dbr", 1.0),
    ]


def _grid(folder: Path) -> Grid:
    (folder / "teacher.pt").write_bytes(b"weights")
    return replace(GRID, out=folder, teacher_checkpoint=folder / "teacher.pt")


def test_results_are_kept_apart_by_all_that_determines_them(tmp_path: Path) -> None:
    grid = _grid(tmp_path)
    cell = Cell(ipc=1, images="nrr", labels="dbr", seed=0)
    soft, warm = replace(cell, labels="soft"), replace(cell, labels="soft-t20")
    path, folder = cell_path(grid, cell), dataset_path(grid, cell)
    assert dataset_path(grid, soft) == folder
    assert dataset_path(grid, warm) == folder
    assert len({cell_path(grid, each) for each in (cell, soft, warm)}) == 3
    changed = replace(cell, student=(("radius", 0.1),))
    assert dataset_path(grid, changed) == folder and cell_path(grid, changed) != path
    assert dataset_path(grid, replace(cell, build=(("epsilon", 0.1),))) != folder
    assert dataset_path(replace(grid, data_dir=Path("elsewhere"), device="cuda"), cell) == folder
    assert cell_path(replace(grid, student="conv3"), cell) != path
    assert dataset_path(replace(grid, student="conv3"), cell) == folder
    assert dataset_path(replace(grid, iterations=8), cell) != folder
    assert dataset_path(replace(grid, epochs=4), cell) != folder
    (tmp_path / "teacher.pt").write_bytes(b"other weights")
    assert dataset_path(grid, cell) != folder


@pytest.mark.slow
def test_the_accuracy_benchmark_goes_on_where_it_was(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("sklearn")
    out, results = tmp_path / "out", tmp_path / "results"
    command = (
        f"--dataset digits --out {out} --results {results} --seeds 0 1 --ipc 1 --epochs 2 --iterations 1 "
        "--images random-real nrr+lr --labels one-hot dbr dbr-further1 soft --student conv2-w8 --teacher conv2-w8 "
        "--teacher-epochs 3"
    ).split()
    assert accuracy.main(command) == 0
    cells = sorted((out / "cells").iterdir())
    assert len(cells) == 16
    assert accuracy.main([*command, "--collect"]) == 0
    assert "Incomplete" not in capsys.readouterr().out
    cells[0].unlink()
    assert accuracy.main([*command, "--collect"]) == 0
    assert "Incomplete: 15 of 16 students" in capsys.readouterr().out and not cells[0].is_file()
    changed = [path.stat().st_mtime_ns for path in cells[1:]]
    assert accuracy.main(command) == 0
    assert [path.stat().st_mtime_ns for path in cells[1:]] == changed and cells[0].is_file()
    printed = capsys.readouterr().out
    assert "IPC 1, nrr+lr" in printed and "dbr − one-hot" in printed and "recover, in %" in printed
    assert {path.suffix for path in results.iterdir()} == {".json", ".md", ".png"}
    record = json.loads(next(results.glob("*.json")).read_text())
    assert len(record["cells"]) == 16 and record["seeds"] == [0, 1]
    labels = {cell["labels"]: cell["bytes_labels"] for cell in record["cells"]}
    assert labels["one-hot"] == 0 and 0 < labels["dbr"] < labels["dbr-further1"] and labels["soft"] > 0
    assert str(tmp_path) not in json.dumps(record)


@pytest.mark.slow
def test_teachers_side_by_side(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("sklearn")
    for epochs in (1, 3):
        made = f"teacher --dataset digits --architecture conv2-w8 --epochs {epochs} --device cpu"
        assert cli.main([*made.split(), "--out", f"{tmp_path}/{epochs}.pt"]) == 0
    command = (
        f"--dataset digits --out {tmp_path}/out --results {tmp_path}/results --ipc 1 --epochs 2 --iterations 1 "
        f"--images random-real --labels one-hot dbr soft --student conv2-w8 --device cpu "
        f"--teacher-checkpoint {tmp_path}/1.pt {tmp_path}/3.pt"
    ).split()
    assert teachers.main([*command, "--collect"]) == 2
    assert "holds no cell of these grids" in capsys.readouterr().err
    assert teachers.main(command) == 0
    (page,) = (tmp_path / "results").glob("*-teachers-digits.md")
    lines = [line for line in page.read_text().splitlines() if line.startswith("| IPC 1, random-real")]
    one, three = "conv2-w8, 1 epoch", "conv2-w8, 3 epochs"
    assert [line.split("|")[3].strip() for line in lines] == [one, three, three, one, three]  # top-1, gains, recovery
    assert len(list((tmp_path / "out" / "cells").iterdir())) == 6
    assert page.with_suffix(".png").stat().st_size > 10_000
    assert teachers.main([*command, "--student", "conv2-w8", "conv1-w8"]) == 0  # the teachers' own network, and another
    lines = [line for line in page.read_text().splitlines() if line.startswith("| IPC 1, random-real")]
    of = [tuple(cell.strip() for cell in line.split("|")[2:4]) for line in lines[:6]]
    both = ("conv2-w8", "conv1-w8")
    assert of == [*product(both, (one, three)), *product(both, (three,))]  # top-1, gains
    assert len(list((tmp_path / "out" / "datasets").iterdir())) == 2  # students share them
    assert teachers.main([*command, "--student", "conv2-w8", "conv9000"]) == 2
    assert "conv9000" in capsys.readouterr().err
    assert teachers.main([*command, f"{tmp_path}/none.pt"]) == 2
    assert f"found no file {tmp_path}/none.pt" in capsys.readouterr().err


def test_statistics_of_seeds() -> None:
    assert spread([50.0]) == "50.00"
    assert spread([1.0, 3.0]) == "2.00 ± 1.41"
    assert interval([1.0, 3.0], [2.0, 6.0]) == "+2.00 ± 12.71"
    assert interval([2.0], [1.0]) == "-1.00"
    assert accuracy.recovery({0: 20.0}, {0: 50.0}, {0: 80.0}) == "50"
    assert accuracy.recovery({0: 20.0}, {0: 50.0}, {0: 20.0}) == "-"
    assert accuracy.recovery({0: 20.0}, {0: 50.0}, {}) == "-"
    assert accuracy.recovery({0: 20.0, 1: 30.0}, {0: 90.0, 1: 50.0}, {1: 80.0}) == "40"  # seed 1 alone has all three
    assert accuracy.paired({0: 1.0, 1: 3.0, 2: 9.0}, {1: 6.0, 0: 2.0}) == "+2.00 ± 12.71"
    assert accuracy.paired({0: 1.0}, {1: 6.0}) == "-"


def test_the_demo_is_three_students_on_one_dataset(tmp_path: Path) -> None:
    grid = demo.make_grid(tmp_path, "cpu")
    (tmp_path / "teacher.pt").write_bytes(b"weights")
    cells = list(grid.cells())
    assert [cell.labels for cell in cells] == ["one-hot", "dbr", "soft"]
    assert len({dataset_path(grid, cell) for cell in cells}) == 1
    assert grid.epochs == 300


def test_tables_are_aligned_markdown() -> None:
    assert markdown_table(["name", "n"], [["a", "1,000"], ["longer", "2"]]).splitlines() == [
        "| name   |     n |",
        "| ------ | ----: |",
        "| a      | 1,000 |",
        "| longer |     2 |",
    ]


def test_a_published_command_holds_no_absolute_path() -> None:
    arguments = ["/home/someone/data set", "--out=/tmp/x/y", "relative/path", "two words"]
    assert command_line("m", arguments) == "python -m m …/data set --out=…/y relative/path 'two words'"


def test_a_published_command_holds_no_secret_of_a_url() -> None:
    arguments = ["https://me:word@host/x?token=y=z", "--test-dir=s3://key:word@bucket/test", "--a=file:///home/me/data"]
    assert command_line("m", [*arguments, "file://me:word@host/home/data"]) == (
        "python -m m 'https://...@host/x?...' --test-dir=s3://...@bucket/test --a=…/data …/data"
    )


def test_pictures_are_linked_whatever_the_name(tmp_path: Path) -> None:
    facts = provenance("benchmarks.accuracy", seeds=[0])
    name = "of Bob's (new)/ten images"
    write_report(tmp_path, name, facts, {}, title="Title", text="", pictures=[Picture("one", Figure())])
    (page,) = tmp_path.glob("*/*.md")
    assert page.with_suffix(".png").is_file()
    assert page.read_text().endswith("![one](ten%20images.png)\n")


def test_reports_say_what_ran_where(tmp_path: Path) -> None:
    facts = provenance("benchmarks.accuracy", seeds=[0, 1])
    assert facts["seeds"] == [0, 1] and facts["versions"]["torch"] and facts["hardware"]["cores"] >= 1
    pictures = [Picture("one", Figure()), Picture("two", Figure(), "-more")]
    write_report(tmp_path / "new", "name", facts, {"rows": [1]}, title="Title", text="| a |\n", pictures=pictures)
    stem = tmp_path / "new" / f"{facts['date']}-name"
    text = stem.with_suffix(".md").read_text()
    assert text.startswith(f"# Title\n\n{facts['date']}, on ") and facts["command"] in text
    assert text.endswith(f"\n\n| a |\n\n![one]({stem.name}.png)\n\n![two]({stem.name}-more.png)\n")
    assert json.loads(stem.with_suffix(".json").read_text()) == facts | {"rows": [1]}
    assert sorted(path.suffix for path in stem.parent.iterdir()) == [".json", ".md", ".png", ".png"]


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot make the folder"):
        write_json(tmp_path / "file" / "deeper" / "x.json", {})


def test_teacher_settings_that_cannot_work_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("sklearn")
    assert cli.main(["teacher", "--dataset", "digits", "--epochs", "0", "--out", str(tmp_path / "t.pt")]) == 2
    assert "epochs" in _error(capsys)
    assert cli.main(["teacher", "--dataset", "nothing", "--out", str(tmp_path / "t.pt")]) == 2
    assert "'nothing'" in _error(capsys)


def test_config_errors_are_the_users() -> None:
    def wrong() -> int:
        raise ConfigError("--x: found 1, expected 2")

    assert run(wrong) == 2
