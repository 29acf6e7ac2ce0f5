"""`nrrdd`: train a teacher or a student, draw a dataset's preview, and the verbs of the other modules for its files.

Every verb loads what it needs only when it runs, so that `nrrdd --help` answers at once.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.command import add_columns, add_device, add_source, number, pick_device, run
from benchmarks.dataset_verbs import add_dataset_verbs
from benchmarks.exchange_verbs import add_exchange_verbs
from benchmarks.verbs import Verb, add_dataset, add_verb
from nrrdd_format.errors import OutputError, counted

EPILOG = """\
a first round, with scikit-learn's digits (no download):
  nrrdd teacher --dataset digits --out digits-teacher.pt
  build-distilled --dataset digits --ipc 10 --teacher-checkpoint digits-teacher.pt --out digits-ipc10
  nrrdd inspect digits-ipc10
  nrrdd student digits-ipc10 --labels dbr
each verb has its own help: nrrdd VERB --help
"""

TEACHER_EPILOG = """\
examples:
  nrrdd teacher --dataset digits --out digits-teacher.pt
  nrrdd teacher --dataset cifar10 --data-dir data/cifar10 --architecture resnet18-small --out cifar10-teacher.pt
architectures: conv3, conv4, conv5 (also with a width: conv3-w32), resnet18-small (also resnet18-small-w16),
or any classification model of torchvision. OUT.json beside the checkpoint records the settings and the test top-1.
Interrupted, the same command goes on after the last finished epoch; finished, it changes nothing but the test top-1,
which is measured anew where the test images are others.
"""

STUDENT_EPILOG = """\
examples:
  nrrdd student digits-ipc10 --labels dbr
  nrrdd student cifar10-ipc10 --labels soft --teacher-checkpoint cifar10-teacher.pt --data-dir data/cifar10
labels: dbr            the dataset's distances, with the DBR loss
        dbr-completed  the distances and further classes, what they leave to others spread by the images' priors
        soft           the teacher's whole output; it runs beside the student in every step
        soft-top5      of that the five largest probabilities, the rest spread evenly over the other classes
        compact        the two stored distances as a two-class target
        one-hot        the two classes, weighted by their share of the image
The result is the top-1 share on the source's real test images after the last epoch.
"""

PREVIEW_EPILOG = """\
example:
  nrrdd preview digits-ipc10 --out pictures
Writes contact-sheet.png (the first image of every class, at most 50) and distances.png (both distances).
Where the build's work folder is still there, the sheet also shows the initial images and the masks.
In a folder of --out, pictures of the same dataset are drawn anew, those of another are left alone.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    options = make_parser().parse_args(arguments)
    verb: Verb = options.verb
    return run(lambda: verb(options))


def make_parser() -> argparse.ArgumentParser:
    """The parser of all verbs."""
    parser = argparse.ArgumentParser(
        prog="nrrdd",
        description="Work with distilled datasets in the nrrdd format; build-distilled makes them.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    of_verb: type[argparse.ArgumentParser] = _VerbParser
    verbs = parser.add_subparsers(title="verbs", required=True, metavar="VERB", parser_class=of_verb)
    _add_teacher(add_verb(verbs, "teacher", run_teacher, "train a teacher on a source dataset", TEACHER_EPILOG))
    _add_student(add_verb(verbs, "student", run_student, "train a student and test it on real images", STUDENT_EPILOG))
    _add_preview(add_verb(verbs, "preview", run_preview, "draw a dataset's images and distances", PREVIEW_EPILOG))
    add_dataset_verbs(verbs)
    add_exchange_verbs(verbs)
    return parser


class _VerbParser(argparse.ArgumentParser):
    """The parser of one verb: what it does not know it refuses itself, with the verb's own usage."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        found, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return found, unknown


def run_teacher(options: argparse.Namespace) -> int:
    """`nrrdd teacher`."""
    from benchmarks.teacher import TeacherConfig, log_path, summary, train_and_save
    from builders.folders import ignored_notes
    from builders.image_sets import Columns
    from builders.sources import load_source

    device = pick_device(options.device)
    config = TeacherConfig(
        architecture=options.architecture,
        epochs=options.epochs,
        batch_size=options.batch_size,
        learning_rate=options.learning_rate,
        seed=options.seed,
        workers=options.workers,
        device=device,
        bf16=device == "cuda" if options.bf16 is None else options.bf16,
    )
    _require_writable(options.out)
    source = load_source(
        options.source,
        data_dir=options.data_dir,
        test_dir=options.test_dir,
        classes=options.classes,
        size=options.size,
        columns=Columns(image=options.image_column, label=options.label_column),
        cache_dir=options.cache_dir,
    )
    for note in ignored_notes(source.train, source.test):
        print(note, file=sys.stderr)
    log = train_and_save(source, config, options.out)
    print(f"{options.out}: {summary(log)}; log in {log_path(options.out)}")
    return 0


def run_student(options: argparse.Namespace) -> int:
    """`nrrdd student`."""
    from dataclasses import asdict

    from benchmarks.results_io import write_json
    from benchmarks.student import StudentConfig, load_matching_source, train_student
    from builders.class_names import some
    from builders.folders import ignored_notes
    from builders.image_sets import Columns
    from nrrdd_format.dataset import open_dataset

    if options.log is not None:
        _require_writable(options.log)
    manifest = open_dataset(options.path).manifest
    source = load_matching_source(
        manifest,
        name=options.source,
        data_dir=options.data_dir,
        test_dir=options.test_dir,
        columns=Columns(image=options.image_column, label=options.label_column),
        cache_dir=options.cache_dir,
    )
    config = StudentConfig(
        labels=options.labels,
        architecture=options.student,
        epochs=options.epochs,
        batch_size=options.batch_size,
        learning_rate=options.learning_rate,
        alpha_sce=options.alpha_sce,
        radius=options.radius,
        sce=options.sce,
        distance=options.distance,
        soft_temperature=options.soft_temperature,
        alpha_dbr=options.alpha_dbr,
        teacher_checkpoint=None if options.teacher_checkpoint is None else tuple(options.teacher_checkpoint),
        seed=options.seed,
        device=pick_device(options.device),
    )
    for note in ignored_notes(source.test):
        print(note, file=sys.stderr)
    result = train_student(options.path, source, config)
    record = asdict(result) | {"dataset_id": manifest.dataset_id}
    if result.skipped_test_images:
        names = [image["image"] for image in result.skipped_test_images]
        print(f"{counted(len(names), 'unusable test image')} left out: {some(names)}", file=sys.stderr)
    if options.json:
        print(json.dumps(record, indent=2), flush=True)
    else:
        print(
            f"{result.settings['architecture']} on {options.labels} labels: "
            f"top-1 {result.top1:.2%} of {result.test_images} test images",
            flush=True,
        )
    if options.log is not None:  # last: where it cannot be written, the result has been told
        write_json(options.log, record)
    return 0


def _require_writable(path: Path) -> None:
    """Finds out before hours of work that a file cannot be written after them; makes its folder.

    Raises:
        OutputError: the folder cannot be made or written to, or `path` is a folder.
    """
    from nrrdd_format.files import make_folder

    make_folder(path.parent)
    if os.path.isdir(path):  # False, too, of names that no file can have
        raise OutputError(f"{path}: found a folder, expected the name of a file to write")
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}."):
            pass
    except OSError as error:
        raise OutputError(f"{path}: cannot write ({error.strerror}); choose a writable place") from error


def run_preview(options: argparse.Namespace) -> int:
    """`nrrdd preview`."""
    from builders.preview import redraw

    written = redraw(options.path, options.out, work=options.work_dir)
    print(written.contact_sheet)
    print(written.histogram)
    return 0


def _add_teacher(parser: argparse.ArgumentParser) -> None:
    add_source(parser, required=True)
    add_columns(parser)
    parser.add_argument("--classes", nargs="+", metavar="CLASS", help="only these classes (names or WNIDs)")
    parser.add_argument(
        "--size", type=int, metavar="PX", help="side of the images; imagefolder, hf and webdataset only"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the checkpoint to write")
    parser.add_argument("--architecture", metavar="ARCH", help="the network (default: the dataset's convD or resnet18)")
    parser.add_argument(
        "--epochs",
        type=int,
        default=100,
        metavar="N",
        help="passes over the training images (100; one of 8 taught students more: docs/results.md)",
    )
    parser.add_argument("--batch-size", type=int, default=128, metavar="N", help="images a step (128)")
    parser.add_argument("--learning-rate", type=float, default=0.1, metavar="X", help="highest rate of the cycle (0.1)")
    parser.add_argument("--workers", type=int, default=0, metavar="N", help="processes that read large images (0)")
    parser.add_argument(
        "--bf16",
        action=argparse.BooleanOptionalAction,
        help="compute in bfloat16: on a processor with such instructions about twice as fast (default: on a GPU only)",
    )
    _add_run(parser)


def _add_student(parser: argparse.ArgumentParser) -> None:
    add_dataset(parser)
    parser.add_argument(
        "--labels",
        choices=("dbr", "dbr-completed", "soft", "soft-top5", "compact", "one-hot"),
        default="dbr",
        help="what to learn from (dbr)",
    )
    add_source(parser)
    add_columns(parser)
    parser.add_argument("--student", metavar="ARCH", help="the network (default: the dataset's convD or resnet18)")
    parser.add_argument(
        "--teacher-checkpoint", nargs="+", type=Path, metavar="FILE", help="the teacher, for soft labels"
    )
    parser.add_argument("--epochs", type=int, default=300, metavar="N", help="passes over the dataset (300)")
    parser.add_argument("--batch-size", type=int, metavar="N", help="pairs a step (10, 50 or 100, by images per class)")
    parser.add_argument("--learning-rate", type=float, default=1e-3, metavar="X", help="AdamW's first rate (0.001)")
    _add_loss(parser.add_argument_group("loss"))
    parser.add_argument("--log", type=Path, metavar="FILE", help="write settings and result to this JSON file")
    parser.add_argument("--json", action="store_true", help="print settings and result as JSON")
    _add_run(parser)


def _add_loss(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--radius", type=float, default=0.4, metavar="R", help="of dbr: free cross-entropy (0.4)")
    group.add_argument(
        "--sce", choices=("sample", "batch", "target", "entropy"), default="sample", help="of dbr: form of that bound"
    )
    group.add_argument(
        "--distance", choices=("l1", "huber", "squared"), default="l1", help="of dbr: how distances are compared"
    )
    group.add_argument(
        "--soft-temperature",
        type=float,
        default=1.0,
        metavar="T",
        help="of soft and completed labels: temperature of the KL (1; RDED: 20)",
    )
    group.add_argument(
        "--alpha-sce", type=number(0), default=1.0, metavar="A", help="of dbr: weight of the bounded cross-entropy (1)"
    )
    group.add_argument(
        "--alpha-dbr",
        type=number(0),
        metavar="A",
        help="of dbr and completed labels: weight of the distances' error (dbr: 1; completed: 0.5, divided by T²)",
    )


def _add_preview(parser: argparse.ArgumentParser) -> None:
    add_dataset(parser)
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder for the pictures (default: DATASET.preview)")
    parser.add_argument("--work-dir", type=Path, metavar="DIR", help="the build's work folder (default: DATASET.work)")


def _add_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of every random draw (0)")
    add_device(parser)


if __name__ == "__main__":
    raise SystemExit(main())
