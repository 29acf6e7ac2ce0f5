"""Holds out part of a training split, to choose settings by: the test split is for what is reported.

`python -m benchmarks.hold_out --data-dir data/cifar10 --out data/cifar10-held-out` makes a folder whose `test` holds
some training images of every class and whose `train` holds the others. The files are links, which take no room. Every
benchmark takes the folder as --data-dir.
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.command import run, whole
from builders.folders import class_folders, image_names
from nrrdd_format import draws
from nrrdd_format.errors import DataError, OutputError
from nrrdd_format.files import make_folder

MODULE = "benchmarks.hold_out"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    options = make_parser().parse_args(arguments)
    return run(lambda: _hold_out(options))


def make_parser() -> argparse.ArgumentParser:
    """The command's parser."""
    parser = argparse.ArgumentParser(
        prog=f"python -m {MODULE}",
        description="Hold out part of a training split, to choose settings by.",
        epilog=f"example:\n  python -m {MODULE} --data-dir data/cifar10 --out data/cifar10-held-out",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--data-dir", type=Path, required=True, metavar="DIR", help="a folder with 'train' inside")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the folder to make")
    parser.add_argument(
        "--per-class", type=whole(1), default=500, metavar="N", help="images of a class to hold out (500)"
    )
    parser.add_argument("--seed", type=whole(0), default=0, metavar="N", help="of the choice (0)")
    return parser


def _hold_out(options: argparse.Namespace) -> int:
    held, kept = hold_out(options.data_dir / "train", options.out, per_class=options.per_class, seed=options.seed)
    print(f"{options.out}: {held} images held out as 'test', {kept} left in 'train'")
    return 0


def hold_out(train: Path, out: Path, *, per_class: int, seed: int) -> tuple[int, int]:
    """Makes the folder `out`, whole or not at all; returns how many images it holds out and how many are left.

    Raises:
        DataError: no folder for each class, or a class that would be left without images.
        OutputError: `out` is there already, or cannot be written.
    """
    if out.exists():
        raise OutputError(f"{out}: is there already; remove it or choose another --out")
    held, kept = 0, 0
    make_folder(out.parent)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as scratch:
        whole = Path(scratch) / out.name
        for number, folder in enumerate(class_folders(train)):
            names = image_names(train, folder)
            if not 1 <= per_class < len(names):
                raise DataError(
                    f"{train / folder}: {len(names)} images, of which --per-class {per_class} are to be held out; "
                    f"expected 1 to {len(names) - 1}"
                )
            order = draws.permutation(seed, "hold-out", number, count=len(names))
            for place, index in enumerate(order.tolist()):
                split = "test" if place < per_class else "train"
                _link(train / names[index], whole / split / names[index])
            held, kept = held + per_class, kept + len(names) - per_class
        whole.rename(out)
    return held, kept


def _link(source: Path, target: Path) -> None:
    """A hard link, or a copy where the file system has none."""
    make_folder(target.parent)
    try:
        os.link(source, target)
    except OSError:
        try:
            shutil.copyfile(source, target)
        except OSError as error:
            raise OutputError(f"{target}: cannot be written ({error.strerror}); choose another --out") from error


if __name__ == "__main__":
    raise SystemExit(main())
