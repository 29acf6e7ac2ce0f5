"""`build-distilled`: from a labelled image dataset to a folder of distilled shards."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import get_args

from builders import config as options
from builders.config import BuildConfig, check_effects, pair_teachers
from nrrdd_format.errors import NrrddError
from nrrdd_format.remote import place_of

EPILOG = """\
examples:
  build-distilled --dataset digits --ipc 10 --teacher-checkpoint digits-teacher.pt --out digits-ipc10
      the embedded dataset; its teacher: nrrdd teacher --dataset digits --out digits-teacher.pt
  build-distilled --dataset imagenet --ipc 200 --data-dir /data/imagenet --out imagenet-ipc200
      ImageNet-1k with torchvision's pretrained ResNet-18 as teacher
  torchrun --nproc-per-node 8 -m builders --dataset imagenet --ipc 200 --data-dir /data/imagenet --out imagenet-ipc200
      the same on eight GPUs
  build-distilled --dataset imagenet --from-images syn-data --images-method RDED --data-dir /data/imagenet \\
      --out imagenet-rded
      labels and stores images that were distilled before
A build can be stopped at any moment: the same command goes on where it was.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status (2: the user's mistake, 130: interrupted)."""
    try:
        config, dry = _parse(arguments)
        if config.compile:
            from builders.compiled import compile_apart

            compile_apart()
        if dry:
            from builders.plan import plan

            return 0 if plan(config) else 2
        from builders.pipeline import build  # torch is loaded only once the options are known to be sound

        build(config)
    except NrrddError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:  # where no other line has been written for it: a place that was closed or lost meanwhile
        print(f"error: {error.filename or 'build-distilled'}: {error.strerror or error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: finished work is kept; the same command goes on from there", file=sys.stderr)
        return 130
    return 0


def parse(arguments: Sequence[str] | None = None) -> BuildConfig:
    """Turns command-line arguments into a checked configuration."""
    return _parse(arguments)[0]


def _parse(arguments: Sequence[str] | None) -> tuple[BuildConfig, bool]:
    """The configuration, and whether it is only to be planned."""
    parser = make_parser()
    values = vars(parser.parse_args(arguments))
    given = values["from_images"]
    if values["ipc"] is None and given is None:
        parser.error("the following arguments are required: --ipc (or --from-images)")
    if values["out"] is None:
        images = f"ipc{values['ipc']}" if given is None else _name(given)
        values["out"] = Path(f"{values['dataset']}-{images}")
    values["ipc"] = values["ipc"] or 0
    if values["classes"] is not None:
        values["classes"] = tuple(values["classes"])
    first, *more = pair_teachers(values.pop("teacher") or (), values.pop("teacher_checkpoint") or ())
    values |= {"teacher": first.architecture, "teacher_checkpoint": first.checkpoint, "more_teachers": tuple(more)}
    dry = values.pop("plan")
    config = BuildConfig(**values)
    check_effects(config)
    return config, dry


def _name(given: Path) -> str:
    """What the default output is called after: the folder or dataset of given images."""
    return Path(str(given).removeprefix(options.HUB_PREFIX)).resolve().name


def _written_folder(text: str) -> Path:
    """The type of an option that names a folder to write to; a Path of a URL would name one that nobody meant."""
    place = place_of(text)
    if isinstance(place, str):
        scheme = text.partition(":")[0]
        raise argparse.ArgumentTypeError(f"found a URL ({scheme}:…), expected a folder of this machine")
    return place


def make_parser() -> argparse.ArgumentParser:
    """The parser; every option is a field of `BuildConfig`, which holds the defaults."""
    parser = argparse.ArgumentParser(
        prog="build-distilled",
        description="Distil a labelled image dataset with NRR-DD and write it as nrrdd shards.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_input(parser.add_argument_group("input and output"))
    _add_teacher(parser.add_argument_group("teacher"))
    _add_discovery(parser.add_argument_group("stage 1: critical-based initial data discovery"))
    _add_refinement(parser.add_argument_group("stage 2: non-critical region refinement"))
    _add_records(parser.add_argument_group("stage 3: relabeling and storage"))
    _add_run(parser.add_argument_group("running"))
    parser.set_defaults(**{field.name: field.default for field in fields(BuildConfig) if _has_default(field.name)})
    return parser


def _has_default(name: str) -> bool:
    return name not in ("dataset", "out", "ipc")


def _add_input(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--dataset",
        required=True,
        metavar="NAME",
        help="digits, cifar10, cifar100, imagenette, tiny-imagenet, imagenet, imagefolder (one folder per class), "
        "hf (a dataset of Hugging Face) or webdataset (tar shards)",
    )
    group.add_argument("--ipc", type=int, metavar="N", help="images per class to distil")
    group.add_argument("--out", type=_written_folder, metavar="DIR", help="the dataset folder to write (NAME-ipcN)")
    group.add_argument(
        "--data-dir",
        type=place_of,
        metavar="DIR",
        help="where the source images lie; hf: a name on the hub, too; webdataset: path/{000..099}.tar, too, of a URL "
        "as well (http, https, s3, gs, hf), whose shards are fetched once into --cache-dir",
    )
    group.add_argument(
        "--from-images",
        type=Path,
        metavar="DIR",
        help="label and store these distilled images (RDED's, SRe2L's, …) instead of making any: one folder per class, "
        "or hf:DIR or hf:NAME, a dataset of Hugging Face; --ipc then takes the first N of each class",
    )
    group.add_argument("--images-method", metavar="TEXT", help="what made those images, for the dataset's manifest")
    group.add_argument("--test-dir", type=place_of, metavar="DIR", help="held-out images for the teacher's check")
    group.add_argument("--classes", nargs="+", metavar="CLASS", help="only these classes (names or WNIDs)")
    group.add_argument("--size", type=int, metavar="PX", help="side of the images; imagefolder, hf and webdataset only")
    group.add_argument(
        "--image-column",
        metavar="NAME",
        help="hf (and hf: given images): the column of images; webdataset: their ending",
    )
    group.add_argument(
        "--label-column",
        metavar="NAME",
        help="hf (and hf: given images): the column of labels; webdataset: their ending or key in .json",
    )
    group.add_argument(
        "--cache-dir",
        type=_written_folder,
        metavar="DIR",
        help="webdataset: keeps shards of URLs, and where their images lie ($XDG_CACHE_HOME/nrrdd)",
    )
    group.add_argument("--source-license", metavar="TEXT", help="licence of the source images, for the dataset card")


def _add_teacher(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--teacher",
        nargs="+",
        metavar="ARCH",
        help="conv3, resnet18-small, …, a torchvision name or timm/NAME; see nrrdd teacher --help. Several label "
        "the pairs as an ensemble, the mean of their probabilities; images are made with the first",
    )
    group.add_argument(
        "--teacher-checkpoint",
        nargs="+",
        type=Path,
        metavar="FILE",
        help="state dict or nrrdd teacher's output; one for each teacher, in the same order",
    )
    group.add_argument(
        "--min-teacher-top1",
        type=float,
        metavar="SHARE",
        help="refuse a teacher below this top-1 share on real images (default: min(0.6, 20/classes))",
    )


def _add_discovery(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--init",
        choices=get_args(options.Init),
        help="cidd: the paper's; real: whole random training images; noise",
    )
    group.add_argument(
        "--confidence",
        choices=get_args(options.Confidence),
        help="patches to keep (highest); the paper's: lowest",
    )
    group.add_argument(
        "--crop-score", choices=get_args(options.CropScore), help="activation in a crop: sum (default) or mean"
    )
    group.add_argument("--beta", type=int, metavar="N", help="patches in an image (dataset's: 4 or 1)")


def _add_refinement(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--iterations", type=int, metavar="N", help="steps a batch (2000); 0: no refinement")
    group.add_argument("--batch-size", type=int, metavar="N", help="images refined together (100)")
    group.add_argument("--learning-rate", type=float, metavar="X", help="Adam's rate (0.05)")
    group.add_argument("--schedule", choices=get_args(options.Schedule), help="of the learning rate (cosine)")
    group.add_argument("--mask", choices=get_args(options.Mask), help="pixels to refine (non-critical)")
    group.add_argument("--epsilon", type=float, metavar="X", help="threshold of the mask (0.5)")
    group.add_argument("--cam-every", type=int, metavar="N", help="steps between new activation maps; 0 (default): one")
    group.add_argument("--alpha-bn", type=float, metavar="X", help="weight of the BatchNorm loss (0.01)")
    group.add_argument("--alpha-lr", type=float, metavar="X", help="weight of label refinement (1); 0: off")
    group.add_argument("--label-refinement", choices=get_args(options.LabelRefinement), help="its form (soft)")
    group.add_argument(
        "--label-refinement-views",
        action=argparse.BooleanOptionalAction,
        help="whether label refinement mixes views, as records do (default), or whole images",
    )
    group.add_argument(
        "--precision",
        choices=get_args(options.Precision),
        help="of the teacher here (auto: bf16 on a GPU that has it, else fp32)",
    )
    group.add_argument(
        "--compile", action="store_true", help="refine through torch.compile: faster, after a start of up to a minute"
    )
    group.add_argument(
        "--jitter", action="store_true", help="SRe2L's crop, roll and flip (not of digits) before each step"
    )


def _add_records(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--epochs", type=int, metavar="N", help="epochs of pairs to store (300)")
    group.add_argument("--mix", choices=get_args(options.Mix), help="how pairs are mixed (cutmix)")
    group.add_argument("--view-scale", type=float, metavar="X", help="smallest share of an image in a view")
    group.add_argument("--temperature", type=float, metavar="T", help="softmax temperature of the distances (1)")
    group.add_argument(
        "--records", choices=get_args(options.Coding), help="explicit (default): every field stored; derived: smaller"
    )
    group.add_argument("--cycle", type=int, metavar="N", help="images in a closed cycle of pairs (10)")
    group.add_argument("--mix-group", type=int, metavar="N", help="pairs that share one mix draw (10)")
    group.add_argument("--distance-levels", type=int, metavar="N", help="levels of a stored distance (16)")
    group.add_argument("--views", type=int, metavar="N", help="crops in the codebook of views (512)")
    group.add_argument("--mixes", type=int, metavar="N", help="entries in the codebook of mixes (1024)")
    group.add_argument(
        "--priors",
        type=int,
        metavar="N",
        help="other classes stored once an image, to complete its labels (0: none; best all up to about 99)",
    )
    group.add_argument(
        "--further", type=int, metavar="N", help="other classes stored with each pair, to complete its label (0: none)"
    )
    group.add_argument("--image-codec", choices=get_args(options.Codec), help="png up to 64 px, else jpeg")
    group.add_argument("--image-quality", type=int, metavar="Q", help="of JPEG and WebP (90)")
    group.add_argument("--shard-images", type=int, metavar="N", help="images aimed at in a shard (1000)")


def _add_run(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--plan",
        action="store_true",
        help="build nothing: print stages, work done and left, time, disk and memory, and check what can be checked; "
        "exit status 0 if the build could start, else 2",
    )
    group.add_argument("--seed", type=int, metavar="N", help="of every random draw (0)")
    group.add_argument("--device", choices=("auto", "cpu", "cuda"), help="auto takes a GPU where there is one")
    group.add_argument(
        "--threads",
        type=int,
        metavar="N",
        help="torch's CPU threads, and processes that read images (OMP_NUM_THREADS, or all cores; results depend on "
        "them a little)",
    )
    group.add_argument(
        "--work-dir", type=_written_folder, metavar="DIR", help="results of the stages (default: OUT.work)"
    )
