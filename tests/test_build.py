"""The build through its real command line: result, kill and resume, ranks, users' mistakes."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from closed import closed_folder
from PIL import Image

from builders import cores, discovery, measurements, pipeline
from builders.cam import ClassActivation
from builders.card import dataset_card
from builders.cli import main, parse
from builders.config import BuildConfig
from builders.job import Job, prepare
from builders.models import create_model
from builders.pipeline import build, discover, scan
from builders.plan import plan
from builders.ranks import RUNS, Ranks, ranks_of_environment
from builders.teacher import save_checkpoint
from nrrdd_format.dataset import open_dataset
from nrrdd_format.decoding import decode_image
from nrrdd_format.errors import ConfigError, DataError, OutputError, TeacherError
from nrrdd_format.repair import repair_dataset
from nrrdd_format.replay import plan_batch, replay, stack_images
from nrrdd_format.verify import verify_dataset

SIZE = 16
CLASSES = ("ape", "bee", "cat")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve generated images in each of three classes, and an untrained teacher."""
    root = tmp_path_factory.mktemp("source")
    rng = np.random.default_rng(0)
    for label, name in enumerate(CLASSES):
        (root / "train" / name).mkdir(parents=True)
        for number in range(12):
            noise = rng.integers(0, 120, (SIZE, SIZE, 3), np.uint8)
            noise[..., label] += 120
            Image.fromarray(noise).save(root / "train" / name / f"{number:02d}.png")
    torch.manual_seed(0)
    save_checkpoint(root / "teacher.pt", create_model("conv2-w8", 3, SIZE), "conv2-w8", CLASSES)
    return root


def _config(source: Path, out: Path, **changes: object) -> BuildConfig:
    base = BuildConfig(
        dataset="imagefolder",
        data_dir=source / "train",
        out=out,
        ipc=2,
        size=SIZE,
        teacher_checkpoint=source / "teacher.pt",
        min_teacher_top1=0.0,
        iterations=3,
        batch_size=3,
        epochs=4,
        shard_images=3,
        cycle=2,
        mix_group=2,
        priors=2,
        further=1,
        threads=1,
        device="cpu",
    )
    return replace(base, **changes)  # type: ignore[arg-type]


def _options(source: Path, out: Path) -> list[str]:
    """The command line of `_config`."""
    return (
        f"--dataset imagefolder --data-dir {source}/train --out {out} --ipc 2 --size {SIZE} --iterations 3 "
        f"--batch-size 3 --epochs 4 --shard-images 3 --cycle 2 --mix-group 2 --priors 2 --further 1 --threads 1 "
        f"--device cpu --teacher-checkpoint {source}/teacher.pt --min-teacher-top1 0"
    ).split()


def _run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=240, check=False)


def _content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def reference(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The dataset, built once through the command line without interruption."""
    out = tmp_path_factory.mktemp("reference") / "distilled"
    result = _run("-m", "builders", *_options(source, out))
    assert result.returncode == 0, result.stderr
    return out


def test_a_build_leaves_a_sound_dataset_with_card_and_pictures(reference: Path) -> None:
    assert verify_dataset(reference) == []
    names = {path.name for path in reference.iterdir()}
    expected = {"dataset.json", "README.md", "contact-sheet.png", "distances.png", "shard-00000.tar", "shard-00001.tar"}
    assert names == expected
    manifest = open_dataset(reference).manifest
    assert manifest.dataset.class_names == CLASSES
    assert (manifest.images.count, manifest.images.ipc, manifest.records.epochs) == (6, 2, 4)
    assert manifest.method["refinement"]["iterations"] == 3
    card = (reference / "README.md").read_text()
    assert "DBRLoader" in card and "not stated" in card and "2503.18267" in card
    for temperature, priors, loss in ((1.0, None, "DBRLoss()"), (4.0, 1, "CompletedDBRLoss(temperature=4)")):
        records = replace(manifest.records, temperature=temperature, priors=priors, further=None)
        assert f", {loss}\n" in dataset_card(replace(manifest, records=records))


def test_shards_are_class_balanced(reference: Path) -> None:
    with open_dataset(reference) as dataset:
        for shard in dataset.shards:
            assert sorted(shard.labels.tolist()) == [0, 1, 2]


def test_stored_distances_are_the_teachers_on_what_a_student_will_see(source: Path, reference: Path) -> None:
    """Decodes, replays and asks the teacher anew: the stored level is the nearest to what it says."""
    content = torch.load(source / "teacher.pt", weights_only=True)
    model = create_model("conv2-w8", 3, SIZE)
    model.load_state_dict(content["state_dict"])
    with open_dataset(reference) as dataset, torch.no_grad():
        manifest = dataset.manifest
        levels = manifest.codebooks.distances.astype(np.float64)
        for shard in dataset.shards:
            images = stack_images([decode_image(shard.image_bytes(i), SIZE) for i in range(shard.images)])
            for epoch in range(4):
                records = shard.records(epoch)
                plan = plan_batch([(0, records)])
                seen = plan.with_images(images[torch.from_numpy(plan.image)])
                mixed = replay(seen, mean=manifest.images.mean, std=manifest.images.std)
                log_p = model.eval()(mixed).log_softmax(1).numpy()
                row = np.arange(len(records))
                for index, stored in (
                    (records.index_org, records.distance_org),
                    (records.index_aug, records.distance_aug),
                ):
                    exact = -log_p[row, shard.labels[index]]
                    nearest = levels[np.abs(levels[:, None] - exact).argmin(0)]
                    np.testing.assert_allclose(stored, nearest, rtol=1e-6)
                assert records.further_classes is not None and records.further_distances is not None
                for index in (records.index_org, records.index_aug):
                    log_p[row, shard.labels[index]] = -np.inf
                assert records.further_classes[:, 0].tolist() == log_p.argmax(1).tolist()
                nearest = levels[np.abs(levels[:, None] + log_p.max(1)).argmin(0)]
                np.testing.assert_allclose(records.further_distances[:, 0], nearest, rtol=1e-6)


def test_the_log_says_what_was_resolved(reference: Path) -> None:
    (log,) = (reference.parent / "distilled.work").glob("build-*.json")
    content = json.loads(log.read_text())
    assert content["options"]["ipc"] == 2
    assert content["settings"]["discovery"]["beta"] == 1
    assert content["skipped_images"] == []


def test_building_again_says_so_and_changes_nothing(source: Path, reference: Path) -> None:
    before = _content(reference)
    result = _run("-m", "builders", *_options(source, reference))
    assert result.returncode == 0 and "already built" in result.stderr
    assert _content(reference) == before


@pytest.mark.parametrize("files", [2, 5, 8, 11, 20, 38])
def test_killed_and_resumed_gives_the_same_bytes(source: Path, reference: Path, tmp_path: Path, files: int) -> None:
    """SIGKILL once so many files stand in the work folder, which falls into every stage; then the same command."""
    out = tmp_path / "distilled"
    work = tmp_path / "distilled.work"
    command = [sys.executable, "-m", "builders", *_options(source, out)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while process.poll() is None and sum(path.is_file() for path in work.rglob("*")) < files:
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
    assert not (out.exists() and verify_dataset(out)), "a half-written dataset has the final name"
    result = _run("-m", "builders", *_options(source, out))
    assert result.returncode == 0, result.stderr
    assert _content(out) == _content(reference)


def test_two_ranks_give_the_same_bytes(source: Path, reference: Path, tmp_path: Path) -> None:
    out = tmp_path / "distilled"
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "builders"]
    result = _run(*torchrun, *_options(source, out))
    assert result.returncode == 0, result.stderr
    assert _content(out) == _content(reference)


def test_flat_maps_are_counted_over_all_ranks_and_runs(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """To a teacher whose classifier sees nothing, in groups of one class each."""
    monkeypatch.setattr(discovery, "GROUP_IMAGES", 1)
    model = create_model("conv2-w8", 3, SIZE)
    torch.nn.init.zeros_(model.get_parameter("classifier.weight"))
    save_checkpoint(tmp_path / "teacher.pt", model, "conv2-w8", CLASSES)
    changes = {"teacher_checkpoint": tmp_path / "teacher.pt", "work_dir": tmp_path / "work"}
    jobs = [prepare(_config(source, tmp_path / "out", **changes), Ranks(rank, 2, 0)) for rank in (1, 0, 0)]
    jobs[0].scan.make()
    jobs[0].discovery.make()
    alone = prepare(_config(source, tmp_path / "out", **changes), Ranks(0, 1, 0))
    usable = scan(alone)
    for job in jobs:
        discover(job, usable)
    said = [line for line in capsys.readouterr().err.splitlines() if "flat activation map" in line]
    assert [line.split()[0] for line in said] == ["18", "18"]


def test_derived_records_give_the_same_pairs_in_fewer_bytes(source: Path, reference: Path, tmp_path: Path) -> None:
    out = build(_config(source, tmp_path / "derived", records="derived"))
    assert verify_dataset(out) == []
    with open_dataset(out) as derived, open_dataset(reference) as explicit:
        for a, b in zip(derived.shards, explicit.shards, strict=True):
            for epoch in range(4):
                for name, column in vars(a.records(epoch)).items():
                    np.testing.assert_array_equal(column, getattr(b.records(epoch), name), err_msg=name)
        sizes = [sum(s.record_bytes for s in d.manifest.shards) for d in (derived, explicit)]
    assert sizes[0] < sizes[1]


def test_more_epochs_keep_all_finished_work(source: Path, tmp_path: Path) -> None:
    """Only the new epochs are relabeled: files of earlier stages and epochs are not written again."""
    work = tmp_path / "work"
    build(_config(source, tmp_path / "few", epochs=2, work_dir=work))
    before = {path: path.stat().st_mtime_ns for path in work.rglob("*.npy")}
    build(_config(source, tmp_path / "more", epochs=4, work_dir=work))
    after = {path: path.stat().st_mtime_ns for path in work.rglob("*.npy")}
    assert before.items() <= after.items()
    with open_dataset(tmp_path / "more") as dataset:
        assert dataset.manifest.records.epochs == 4


def test_the_teachers_own_normalisation_is_used(source: Path, tmp_path: Path) -> None:
    """What it was trained with goes before what the source's name suggests, down to the manifest a student follows."""
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)
    model = create_model("conv2-w8", 3, SIZE)
    save_checkpoint(tmp_path / "teacher.pt", model, "conv2-w8", CLASSES, (mean, std))
    changes = {"teacher_checkpoint": tmp_path / "teacher.pt", "iterations": 0, "epochs": 1}
    out = build(_config(source, tmp_path / "out", **changes))
    with open_dataset(out) as dataset:
        images = dataset.manifest.images
    assert (images.mean, images.std) == (mean, std)


@pytest.mark.parametrize("mean", [[0.1, 0.2], [0.1, 0.2, float("nan")], ["a", "b", "c"], None])
def test_a_checkpoint_with_a_broken_normalisation_is_refused(source: Path, tmp_path: Path, mean: object) -> None:
    content = torch.load(source / "teacher.pt", weights_only=True)
    torch.save(content | {"mean": mean, "std": [0.1, 0.1, 0.1]}, tmp_path / "teacher.pt")
    with pytest.raises(TeacherError, match="mean is"):
        build(_config(source, tmp_path / "out", teacher_checkpoint=tmp_path / "teacher.pt"))


def test_the_precision_is_settled_by_the_device_and_recorded(source: Path, tmp_path: Path) -> None:
    """Another precision gives other images, so its work is kept apart."""
    work, found = tmp_path / "work", {}
    for precision in ("auto", "fp32", "bf16"):
        out = build(_config(source, tmp_path / precision, work_dir=work, precision=precision))
        with open_dataset(out) as dataset:
            found[precision] = dataset.manifest.method["refinement"]["precision"]
    assert found == {"auto": "fp32", "fp32": "fp32", "bf16": "bf16"}
    assert _content(tmp_path / "auto") == _content(tmp_path / "fp32")
    assert len(list(work.glob("discovery-*"))) == 1 and len(list(work.glob("refinement-*"))) == 2


def test_compiled_refinement_is_kept_apart(source: Path, tmp_path: Path) -> None:
    """It rounds otherwise, so its images are not taken for the others'."""
    alone = Ranks(rank=0, world_size=1, local_rank=0)
    plain, fast = (prepare(_config(source, tmp_path / "out", compile=compile), alone) for compile in (False, True))
    assert fast.settings.refinement.compile and not plain.settings.refinement.compile
    assert fast.refinement.path != plain.refinement.path and fast.discovery.path == plain.discovery.path


@pytest.mark.parametrize("codec", ["jpeg", "webp", "png"])
def test_every_codec(source: Path, tmp_path: Path, codec: str) -> None:
    out = build(_config(source, tmp_path / codec, image_codec=codec, epochs=1, iterations=0))
    assert verify_dataset(out) == []
    with open_dataset(out) as dataset:
        assert dataset.manifest.images.codec == codec


def test_beta_tiles_and_real_initialisation(source: Path, tmp_path: Path) -> None:
    work = tmp_path / "work"
    tiled = build(_config(source, tmp_path / "tiled", beta=4, epochs=1, iterations=1, work_dir=work))
    real = build(_config(source, tmp_path / "real", init="real", epochs=1, iterations=0, work_dir=work))
    assert verify_dataset(tiled) == verify_dataset(real) == []
    originals = {np.asarray(Image.open(path)).tobytes() for path in (source / "train").rglob("*.png")}
    with open_dataset(real) as dataset:
        for shard in dataset.shards:
            for image in range(shard.images):
                pixels = decode_image(shard.image_bytes(image), SIZE).permute(1, 2, 0).contiguous().numpy()
                assert pixels.tobytes() in originals


def test_broken_images_are_skipped_and_listed(source: Path, tmp_path: Path) -> None:
    folder = tmp_path / "train"
    for name in CLASSES:
        (folder / name).mkdir(parents=True)
        for path in sorted((source / "train" / name).iterdir())[:4]:
            (folder / name / path.name).write_bytes(path.read_bytes())
    whole = (folder / "ape" / "00.png").read_bytes()
    (folder / "ape" / "truncated.png").write_bytes(whole[:100])
    (folder / "bee" / "text.jpg").write_text("not an image")
    (folder / "cat" / "empty.png").touch()
    out = build(_config(source, tmp_path / "out", data_dir=folder))
    assert verify_dataset(out) == []
    (log,) = (tmp_path / "out.work").glob("build-*.json")
    skipped = {Path(entry["image"]).name for entry in json.loads(log.read_text())["skipped_images"]}
    assert skipped == {"truncated.png", "text.jpg", "empty.png"}


def test_a_class_with_too_few_images_is_named_before_any_work(source: Path, tmp_path: Path) -> None:
    folder = tmp_path / "train"
    for name in CLASSES:
        (folder / name).mkdir(parents=True)
        keep = 1 if name == "bee" else 6
        for path in sorted((source / "train" / name).iterdir())[:keep]:
            (folder / name / path.name).write_bytes(path.read_bytes())
    with pytest.raises(DataError, match=r"1 of 3 classes: bee \(1\).*needs 2 or more"):
        build(_config(source, tmp_path / "out", data_dir=folder, ipc=10))
    assert not list((tmp_path / "out.work").rglob("*.npy"))


def test_output_of_something_else_in_the_way_is_left_alone(source: Path, reference: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.txt").write_text("precious")
    with pytest.raises(OutputError, match=r"something else is there already \(no dataset\)"):
        build(_config(source, other))
    assert (other / "thesis.txt").read_text() == "precious"
    before = _content(reference)
    changed: list[tuple[dict[str, object], str]] = [
        ({"seed": 1}, "seed: 0 there, 1 here"),
        ({"iterations": 4, "beta": 4}, "discovery.beta: 1 there, 4 here; refinement.iterations: 3 there, 4 here"),
        ({"records": "derived"}, "records.coding: 'explicit' there, 'derived' here"),
        ({"source_license": "CC0-1.0"}, "source_license: None there, 'CC0-1.0' here"),
    ]
    for changes, difference in changed:
        message = f"something else is there already (another dataset, {difference}"
        with pytest.raises(OutputError, match=re.escape(message)):
            build(_config(source, reference, **changes))
    other_images = shutil.copytree(source, tmp_path / "source")
    (other_images / "train" / "ape" / "00.png").unlink()
    with pytest.raises(OutputError, match=r"\(a dataset built from other images\)"):
        build(_config(other_images, reference))
    assert _content(reference) == before


def test_a_dataset_that_lost_shards_is_not_taken_for_the_whole(source: Path, reference: Path, tmp_path: Path) -> None:
    part = shutil.copytree(reference, tmp_path / "part")
    (part / "shard-00001.tar").unlink()
    repair_dataset(part)
    with pytest.raises(OutputError, match=r"holds 1 of this build's 2 shards .*move it away"):
        build(_config(source, part))


@pytest.mark.parametrize("dry", [False, True])
@pytest.mark.parametrize("lost", ["missing", "cut short"])
def test_a_finished_dataset_whose_files_were_lost_is_not_called_built(
    source: Path, reference: Path, tmp_path: Path, lost: str, dry: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """The line names each file and both ways out; the second one is tried."""
    out = shutil.copytree(reference, tmp_path / "out")
    whole = (out / "shard-00001.tar").read_bytes()
    if lost == "missing":
        (out / "shard-00001.tar").unlink()
    else:
        (out / "shard-00001.tar").write_bytes(whole[:-1])
    before = _content(out)
    assert main([*_options(source, out), *(["--plan"] if dry else [])]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith(("error: ", "problem: "))]
    fault = "missing" if lost == "missing" else f"{len(whole) - 1} bytes, expected {len(whole)}"
    assert f"{out}: built from these settings, but damaged since: shard-00001.tar ({fault}); " in line
    assert "`nrrdd verify`" in line and "`nrrdd repair --from`" in line and f"{out}.work" in line
    assert _content(out) == before
    if not dry:
        shutil.rmtree(out)
        assert main(_options(source, out)) == 0
        assert _content(out) == _content(reference)


@pytest.mark.parametrize(("shards", "epochs"), [(50, 300), (1, 4), (3, 7), (1, 1), (0, 0)])
@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_ranks_take_runs_of_epochs_and_so_decode_few_shards(shards: int, epochs: int, count: int) -> None:
    """Each epoch is one rank's, all have as many but for one a run, and after half of them as much is left to each."""
    units = [(shard, epoch) for shard in range(shards) for epoch in range(epochs)]
    shares = [Ranks(rank=rank, world_size=count, local_rank=0).share_runs(units) for rank in range(count)]
    assert sorted(unit for share in shares for unit in share) == units
    assert all(share == sorted(share) for share in shares)
    left = [len([unit for unit in share if unit >= (shards // 2, 0)]) for share in shares]
    run = -(-len(units) // (RUNS * count))
    assert max(map(len, shares)) - min(map(len, shares)) <= RUNS
    assert max(left) - min(left) <= run + RUNS
    decoded = [len({shard for shard, _ in share}) for share in shares]
    assert max(decoded) <= shards / count + 2 * RUNS


def test_a_gpu_that_is_not_there_is_refused(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="--device: found cuda, but torch sees no GPU"):
        build(_config(source, tmp_path / "out", device="cuda"))


@pytest.mark.parametrize("run", [build, plan])
@pytest.mark.parametrize(("threads", "used"), [(None, 3), (2, 2)])
def test_a_rank_computes_with_its_share_of_the_cores(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Any, threads: int | None, used: int
) -> None:
    """Though torchrun tells torch to take one."""

    class TakenError(Exception):
        pass

    def take(count: int) -> None:
        raise TakenError(count)

    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(cores, "usable_cores", lambda: 6)
    monkeypatch.setattr(torch, "set_num_threads", take)
    with pytest.raises(TakenError, match=f"^{used}$"):
        run(_config(source, tmp_path / "out", threads=threads))


@pytest.mark.parametrize(
    ("local_rank", "gpus", "taken"), [(None, 1, "cuda:0"), (None, 2, None), (3, 2, "cuda:1"), (0, 2, "cuda:0")]
)
def test_ranks_do_not_all_take_the_first_of_several_gpus(
    monkeypatch: pytest.MonkeyPatch, local_rank: int | None, gpus: int, taken: str | None
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    ranks = Ranks(rank=3, world_size=4, local_rank=local_rank)
    assert ranks.device("cpu") == torch.device("cpu")
    if taken is None:
        with pytest.raises(ConfigError, match=r"^LOCAL_RANK: not set with WORLD_SIZE 4 and 2 GPUs.*torchrun"):
            ranks.device("auto")
    else:
        assert ranks.device("auto") == torch.device(taken)


@pytest.mark.parametrize(
    ("environment", "expected"), [({}, 0), ({"LOCAL_RANK": "2"}, 2), ({"WORLD_SIZE": "4", "RANK": "1"}, None)]
)
def test_the_number_on_a_machine_is_only_guessed_for_a_process_alone(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], expected: int | None
) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert ranks_of_environment().local_rank == expected


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE: found 'two', expected a whole number, 1 or more"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE: found '0', expected a whole number, 1 or more"),
        ({"RANK": "-1"}, "RANK: found '-1', expected a whole number, 0 or more"),
        ({"LOCAL_RANK": "x"}, "LOCAL_RANK: found 'x', expected a whole number, 0 or more"),
        ({"RANK": "1"}, "RANK: found 1 with WORLD_SIZE 1, expected less"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK: found 2 with WORLD_SIZE 2, expected less"),
    ],
)
def test_a_place_among_the_processes_that_cannot_be_is_refused(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], message: str
) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.setenv(name, environment.get(name, ""))  # set to nothing is not set
    with pytest.raises(ConfigError, match=f"^{message}"):
        ranks_of_environment()


def test_imagenet_without_data_says_in_one_line_what_is_missing(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "builders", "--dataset", "imagenet", "--ipc", "200"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parent.parent)},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert result.returncode == 2
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith("error: ") and "--data-dir" in line
    assert not list(tmp_path.iterdir())


def test_options_are_looked_at_before_torch_is_imported() -> None:
    code = "import sys\nfrom builders.cli import parse\nparse(['--dataset', 'digits', '--ipc', '1'])\n"
    result = _run("-c", f"{code}print(*sorted({{'torch', 'torchvision'}} & sys.modules.keys()))")
    assert (result.returncode, result.stdout) == (0, "\n"), result.stderr


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ipc": 0}, "--ipc: found 0"),
        ({"epsilon": 1.5}, "--epsilon: found 1.5"),
        ({"epochs": 0}, "--epochs: found 0"),
        ({"batch_size": 1}, "--batch-size: found 1"),
        ({"cycle": 1}, "--cycle: found 1"),
        ({"distance_levels": 300}, "--distance-levels: found 300"),
        ({"learning_rate": float("nan")}, "--learning-rate: found nan"),
        ({"view_scale": 0.0}, "--view-scale: found 0"),
        ({"temperature": 5000.0}, "--temperature: found 5000"),
        ({"seed": 2**63}, "--seed: found 9223372036854775808"),
        ({"ipc": 10**9}, "--ipc: found 1000000000, expected a value from 1 to 100000"),
        ({"iterations": 10**21}, "--iterations: found 1000000000000000000000, expected a value from 0 to 1000000"),
        ({"cam_every": 10**21}, "--cam-every: found 1000000000000000000000, expected a value from 0 to 1000000"),
        ({"batch_size": 10**21}, "--batch-size: found 1000000000000000000000, expected a value from 2 to 262144"),
        ({"threads": 100000}, "--threads: found 100000, expected a value from 1 to 1024"),
        ({"threads": 0}, "--threads: found 0, expected a value from 1 to 1024"),
        ({"source_license": ""}, "^--source-license: found '', expected 1 to 4096 characters in one line$"),
        ({"source_license": "CC0\n"}, r"^--source-license: found 'CC0\\n', expected 1 to 4096 characters in one line$"),
        ({"epochs": 70000}, "--epochs: found 70000"),
        ({"alpha_bn": float("inf")}, "--alpha-bn: found inf"),
        ({"min_teacher_top1": 85.0}, "--min-teacher-top1: found 85"),
        ({"shard_images": 20000}, "--shard-images: found 20000"),
        ({"init": "real", "confidence": "lowest"}, "--confidence: found lowest with --init real"),
        ({"init": "noise", "crop_score": "mean"}, "--crop-score: found mean with --init noise"),
    ],
)
def test_impossible_options_are_named(source: Path, tmp_path: Path, change: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        _config(source, tmp_path / "out", **change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"ipc": 50000, "shard_images": 2},
            "--ipc: 150000 images take 75000 shards of --shard-images 2, expected at most 65536; raise --shard-images",
        ),
        (
            {"ipc": 1000, "shard_images": 2, "epochs": 60000},
            "--epochs: 60000 epochs of 1500 shards are 90000000 units of work, expected at most 10000000; raise",
        ),
    ],
)
def test_more_than_a_build_can_go_through_is_refused(
    source: Path, tmp_path: Path, change: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError, match=f"^{message}"):
        build(_config(source, tmp_path / "out", init="noise", **change))


@pytest.mark.parametrize("dry", [False, True])
@pytest.mark.parametrize(
    ("more", "told"),
    [
        ("--out {closed}/out", "{closed}/out: cannot be looked at (Permission denied); choose another --out"),
        ("--out {name}", "{name}: cannot be looked at (File name too long); choose another --out"),
        ("--data-dir {closed}/x", "{closed}/x: cannot be read (Permission denied)"),
        ("--data-dir {closed}", "Permission denied"),
        ("--dataset imagenet --data-dir {closed}/x", "Permission denied"),
        ("--dataset webdataset --data-dir {closed}", "Permission denied"),
        ("--test-dir {closed}/x", "{closed}/x: cannot be read (Permission denied)"),
        ("--data-dir {name}", "{name}: cannot be read (File name too long)"),
        ("--work-dir {closed}/w", "{closed}"),
        ("--teacher-checkpoint {closed}/t.pt", "{closed}/t.pt: cannot be read (Permission denied)"),
    ],
)
def test_a_place_that_must_not_be_looked_at_is_named_in_one_line(
    source: Path,
    tmp_path: Path,
    more: str,
    told: str,
    dry: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(os, "access", partial(os.access, effective_ids=True))  # root may do all, but for `closed`
    closed, name = tmp_path / "closed", tmp_path / ("n" * 300)
    options = [*_options(source, tmp_path / "out"), *more.format(closed=closed, name=name).split()]
    if "imagenet" in more or "webdataset" in more:
        options.remove("--size")
        options.remove(str(SIZE))
    with closed_folder(closed):
        assert main([*options, *(["--plan"] if dry else [])]) == 2
    line, *others = [line for line in capsys.readouterr().err.splitlines() if line.startswith(("error: ", "problem: "))]
    assert told.format(closed=closed, name=name) in line
    assert dry or not others  # a plan finds that nothing can be written there, too
    assert not list(tmp_path.rglob("*.npy"))


@pytest.mark.parametrize("place", ["{closed}", "{closed}/x", "hf:{closed}/x"])
def test_given_images_that_must_not_be_looked_at_are_named_in_one_line(
    source: Path, tmp_path: Path, place: str, capsys: pytest.CaptureFixture[str]
) -> None:
    closed = tmp_path / "closed"
    options = f"--dataset imagefolder --from-images {place.format(closed=closed)} --out {tmp_path}/out".split()
    with closed_folder(closed):
        assert main(options) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and str(closed) in line


@pytest.mark.parametrize("dry", [False, True])
def test_a_gpu_without_room_is_one_line(
    source: Path, tmp_path: Path, dry: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fill(*arguments: object, **more: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of …")

    monkeypatch.setattr(measurements, "refine_batch", fill)
    monkeypatch.setattr(pipeline, "refine_batch", fill)
    assert main([*_options(source, tmp_path / "out"), *(["--plan"] if dry else [])]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert "(CUDA out of memory. Tried to allocate 2.00 GiB.); lower --batch-size or --size" in line


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (MemoryError("Unable to allocate 72.8 TiB"), "Unable to allocate 72.8 TiB"),
        (RuntimeError("[enforce …] DefaultCPUAllocator: can't allocate memory: 4 bytes"), "can't allocate memory"),
    ],
)
def test_a_machine_without_room_is_one_line(
    source: Path, tmp_path: Path, error: Exception, told: str, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def fill(*arguments: object, **more: object) -> None:
        raise error

    monkeypatch.setattr(pipeline, "refine_batch", fill)
    assert main(_options(source, tmp_path / "out")) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert line.startswith(f"error: this machine has too little memory ({told}") and "lower --ipc" in line


def test_what_the_system_refuses_elsewhere_is_one_line_too(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(job: Job) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO), "shard")

    monkeypatch.setattr(pipeline, "encode", refuse)
    assert main(_options(source, tmp_path / "out")) == 2
    assert capsys.readouterr().err.splitlines()[-1] == "error: shard: Input/output error"


@pytest.mark.parametrize("dry", [False, True])
@pytest.mark.parametrize(
    ("work", "message"),
    [
        ("out", "which is --out or lies in it"),
        ("out/work", "which is --out or lies in it"),
        ("other/../out", "which is --out or lies in it"),
        ("link", "which is --data-dir"),
    ],
)
def test_a_work_folder_that_would_be_in_the_way_is_refused_before_any_work(
    source: Path, tmp_path: Path, work: str, message: str, dry: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "link").symlink_to(source / "train")
    before = _content(source)
    options = [*_options(source, tmp_path / "out"), "--work-dir", str(tmp_path / work), *(["--plan"] if dry else [])]
    assert main(options) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: --work-dir: found ") and message in line
    assert _content(source) == before and [path.name for path in tmp_path.iterdir()] == ["link"]


@pytest.mark.parametrize("out", ["", ".", "/", "..", "other/.."])
def test_an_output_without_a_name_of_its_own_is_refused(
    source: Path, tmp_path: Path, out: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(_options(source, Path(out))) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: --out: found {Path(out)}, expected a folder with a name of its own")
    assert not list(tmp_path.iterdir())


def test_a_work_folder_may_hold_the_output(source: Path, reference: Path, tmp_path: Path) -> None:
    assert _content(build(_config(source, tmp_path / "out", work_dir=tmp_path))) == _content(reference)


def test_a_name_that_was_taken_during_the_build_loses_nothing(
    source: Path, reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"

    def check_and_take(job: Job) -> bool:
        (out / "thesis").mkdir(parents=True)
        return False

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "is_built", check_and_take)
        with pytest.raises(OutputError, match=r"out: cannot take the dataset's folder .*out\.partial-.*move away"):
            build(_config(source, out))
    (out / "thesis").rmdir()
    out.rmdir()
    assert _content(build(_config(source, out))) == _content(reference)


@pytest.mark.parametrize("option", ["--out", "--work-dir", "--cache-dir"])
def test_folders_to_write_to_are_not_urls(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["--dataset", "digits", "--ipc", "1", option, "s3://bucket/set"])
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.endswith(f"argument {option}: found a URL (s3:…), expected a folder of this machine")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"priors": 3}, "--priors: found 3, expected at most 2"),
        ({"further": 2}, "--further: found 2, expected at most 1"),
    ],
)
def test_more_other_classes_than_there_are_are_refused(
    source: Path, tmp_path: Path, change: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        build(_config(source, tmp_path / "out", **change))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--mask all --epsilon 0.3", "--epsilon: found with --mask all"),
        ("--mask all --cam-every 5", "--cam-every: found with --mask all"),
        ("--iterations 2000 --cam-every 2000", "--cam-every: found 2000 with --iterations 2000"),
        ("--alpha-lr 0 --label-refinement pair", "--label-refinement: found with --alpha-lr 0"),
        ("--alpha-lr 0 --no-label-refinement-views", "--label-refinement-views: found with --alpha-lr 0"),
        ("--iterations 0 --learning-rate 0.1", "--learning-rate: found with --iterations 0"),
        ("--iterations 0 --compile", "--compile: found with --iterations 0"),
    ],
)
def test_options_that_others_make_idle_are_refused(
    options: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["--dataset", "digits", "--ipc", "1"]
    assert main([*command, *options.split()]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {message}, where it has no effect")
    half = options.split(" --")[0]
    assert parse([*command, *half.split()]).iterations in (0, 2000)


@pytest.mark.parametrize(("beta", "message"), [(3, "expected a square number"), (9, "do not tile an image of 16 px")])
def test_a_beta_that_does_not_tile_is_refused(source: Path, tmp_path: Path, beta: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(_config(source, tmp_path / "out", beta=beta))


def test_batches_and_shards_are_even_and_never_of_one_image(source: Path, tmp_path: Path) -> None:
    ranks = Ranks(rank=0, world_size=1, local_rank=0)

    def job(**changes: object) -> Job:
        return prepare(_config(source, tmp_path / "out", work_dir=tmp_path / "work", **changes), ranks)

    assert [len(batch) for batch in job(ipc=1, batch_size=2).batches] == [3]
    assert [len(batch) for batch in job(ipc=3, batch_size=4).batches] == [3, 3, 3]
    assert [len(shard) for shard in job(ipc=1, shard_images=2).shards] == [3]
    assert [len(shard) for shard in job(ipc=4, shard_images=6).shards] == [6, 6]
    assert isinstance(job().eyes.activation, ClassActivation)
