"""What a build with very many classes takes: `python -m benchmarks.wide_build` runs one of 1000 classes at 224 px.

The images are generated and the teacher is untrained, so the dataset is worth nothing; time, memory and disk of every
stage are what a real one of that shape takes on this machine, for as few refinement steps and stored epochs. The build
runs through the real command line in a process of its own.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from PIL import Image
from torch import nn

from benchmarks.build_watch import StageCost, watch_build
from benchmarks.command import add_device, pick_device, run, whole
from benchmarks.loader_data import picture
from benchmarks.results_io import markdown_table, provenance, write_report
from builders.cores import usable_cores
from builders.models import create_model
from builders.teacher import save_checkpoint
from nrrdd_format.errors import NrrddError
from nrrdd_format.files import make_folder
from nrrdd_format.replay import normalize
from nrrdd_format.verify import verify_dataset

MODULE = "benchmarks.wide_build"
SEED = 0
JPEG_QUALITY = 90
MEGABYTE = 1e6
SETTLING_IMAGES = 32

NOTES = """\
Seconds are wall time between the last files of two stages; processor seconds are the cores' time, which other work on
the machine stretches far less; memory is the most that the build's processes held at once, sampled; disk is what the
stage's folder holds at the end (of `writing`: the dataset as well). `start` is importing, listing the images, loading
the teacher and testing it on up to 1000 images.
"""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The build's shape; the fields are the command's options."""

    classes: int
    per_class: int
    size: int
    ipc: int
    iterations: int
    batch_size: int
    epochs: int
    architecture: str
    device: str
    threads: int
    ranks: int

    @property
    def class_names(self) -> list[str]:
        """Names of the class folders."""
        return [f"class-{label:05d}" for label in range(self.classes)]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    options = make_parser().parse_args(arguments)
    return run(lambda: report(_shape(options), options.folder, options.out))


def make_parser() -> argparse.ArgumentParser:
    """The command's parser."""
    parser = argparse.ArgumentParser(prog=f"python -m {MODULE}", description="Measure a build with very many classes.")
    parser.add_argument("--classes", type=whole(2), default=1000, metavar="C", help="classes (1000)")
    parser.add_argument("--per-class", type=whole(1), default=4, metavar="N", help="training images of each class (4)")
    parser.add_argument("--size", type=whole(8), default=224, metavar="PX", help="side of the images (224)")
    parser.add_argument("--ipc", type=whole(1), default=1, metavar="N", help="distilled images per class (1)")
    parser.add_argument("--iterations", type=whole(0), default=10, metavar="N", help="refinement steps a batch (10)")
    parser.add_argument("--batch-size", type=whole(2), default=100, metavar="N", help="images refined together (100)")
    parser.add_argument("--epochs", type=whole(1), default=3, metavar="N", help="stored epochs (3)")
    parser.add_argument("--architecture", default="resnet18", metavar="ARCH", help="the untrained teacher (resnet18)")
    parser.add_argument(
        "--threads", type=whole(1), default=usable_cores(), metavar="N", help="torch's threads (all cores)"
    )
    parser.add_argument("--ranks", type=whole(1), default=1, metavar="R", help="processes that share the work (1)")
    parser.add_argument("--folder", type=Path, metavar="DIR", help="holds images and build; default: a temporary one")
    parser.add_argument("--out", type=Path, metavar="DIR", help="write <date>-wide-build.{json,md} into this folder")
    add_device(parser)
    return parser


def _shape(options: argparse.Namespace) -> Shape:
    names = [field.name for field in fields(Shape) if field.name != "device"]
    return Shape(device=pick_device(options.device), **{name: getattr(options, name) for name in names})


def report(shape: Shape, folder: Path | None, out: Path | None) -> int:
    """Builds, prints the table and writes what was asked for; returns the exit status."""
    if folder is not None:
        costs = measure(shape, folder)
    else:
        with tempfile.TemporaryDirectory(prefix="nrrdd-wide-") as temporary:
            costs = measure(shape, Path(temporary))
    text = table(shape, costs)
    print(f"{text}\n\n{NOTES}")
    if out is not None:
        write_report(
            out,
            "wide-build",
            provenance(MODULE, seeds=[SEED]),
            {"shape": asdict(shape), "stages": [asdict(cost) for cost in costs]},
            title=f"A build of {shape.classes} classes at {shape.size} px",
            text=f"{description(shape)}\n\n{text}\n\n{NOTES}",
        )
    return 0


def measure(shape: Shape, folder: Path) -> list[StageCost]:
    """Writes images and teacher where they are missing, builds, and checks that the dataset is sound."""
    data, checkpoint = folder / "images", folder / "teacher.pt"
    write_images(data, shape.class_names, shape.per_class, shape.size)
    if not checkpoint.is_file():
        teacher = untrained(shape.architecture, shape.classes, shape.size)
        save_checkpoint(checkpoint, teacher, shape.architecture, shape.class_names)
    dataset, work = folder / "dataset", folder / "work"
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={shape.ranks}"]
    launcher = torchrun if shape.ranks > 1 else []
    costs = watch_build(build_arguments(shape, data, checkpoint, dataset, work), dataset, work, launcher=launcher)
    if problems := verify_dataset(dataset):
        raise NrrddError(f"the built dataset is not sound: {problems[0]}")
    return costs


def build_arguments(shape: Shape, data: Path, checkpoint: Path, dataset: Path, work: Path) -> list[str]:
    """The options of `build-distilled`."""
    values = {
        "dataset": "imagefolder",
        "data-dir": data,
        "out": dataset,
        "work-dir": work,
        "teacher-checkpoint": checkpoint,
        "min-teacher-top1": 0,
        "size": shape.size,
        "ipc": shape.ipc,
        "iterations": shape.iterations,
        "batch-size": shape.batch_size,
        "epochs": shape.epochs,
        "device": shape.device,
        "threads": shape.threads,
    }
    return [part for name, value in values.items() for part in (f"--{name}", str(value))]


def write_images(root: Path, class_names: Sequence[str], per_class: int, size: int) -> None:
    """Writes generated JPEGs as class folders; those that are there already are taken as they are."""
    for label, name in enumerate(class_names):
        make_folder(root / name)
        for number in range(per_class):
            path = root / name / f"{number:05d}.jpg"
            if not path.is_file():
                pixels = picture(label * per_class + number, size)
                Image.fromarray(pixels).save(path, "JPEG", quality=JPEG_QUALITY)


def untrained(architecture: str, classes: int, size: int) -> nn.Module:
    """A network of random weights, and BatchNorm statistics that fit them: its signals neither die nor blow up."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(SEED)
        model = create_model(architecture, classes, size)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = None  # running statistics become plain means
        pixels = torch.stack([torch.from_numpy(picture(number, size)) for number in range(SETTLING_IMAGES)])
        model.train()(normalize(pixels.permute(0, 3, 1, 2), (0.5,) * 3, (0.25,) * 3))
    return model.eval()


def description(shape: Shape) -> str:
    """The build in a sentence."""
    return (
        f"{shape.classes} classes of {shape.per_class} generated images, untrained {shape.architecture}, "
        f"IPC {shape.ipc}, {shape.iterations} iterations in batches of {shape.batch_size}, {shape.epochs} stored "
        f"epochs, {shape.ranks} ranks of {shape.threads} threads."
    )


def table(shape: Shape, costs: Sequence[StageCost]) -> str:
    """Stages by time, memory and disk, and their sum."""
    images = shape.classes * shape.ipc
    header = [
        "stage",
        "seconds",
        "processor s",
        "processor ms a distilled image",
        "peak memory, MB",
        "disk, MB",
        "files",
    ]
    total = StageCost(
        stage="all",
        seconds=sum(cost.seconds for cost in costs),
        processor_seconds=sum(cost.processor_seconds for cost in costs),
        peak_rss=max(cost.peak_rss for cost in costs),
        disk=sum(cost.disk for cost in costs),
        units=sum(cost.units for cost in costs),
    )
    rows = [
        [
            cost.stage,
            f"{cost.seconds:.1f}",
            f"{cost.processor_seconds:.1f}",
            f"{1000 * cost.processor_seconds / images:.1f}",
            f"{cost.peak_rss / MEGABYTE:,.0f}",
            f"{cost.disk / MEGABYTE:,.1f}",
            f"{cost.units:,}",
        ]
        for cost in [*costs, total]
    ]
    return markdown_table(header, rows)


if __name__ == "__main__":
    raise SystemExit(main())
