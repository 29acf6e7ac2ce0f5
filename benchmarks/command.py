"""What every command of this package shares: options they have in common, and how a failure ends."""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from nrrdd_format.errors import ConfigError, NrrddError
from nrrdd_format.remote import place_of

Number = TypeVar("Number", int, float)


def run(command: Callable[[], int]) -> int:
    """Runs a command and returns its exit status (2: the user's mistake, told in one line; 130: interrupted)."""
    try:
        return command()
    except NrrddError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: files that were finished are kept", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output has gone, as in `nrrdd inspect … | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def add_source(parser: argparse.ArgumentParser, *, required: bool = False, default: str | None = None) -> None:
    """Adds the options that name the source dataset."""
    hint = "" if required else f" (default: {default or 'the one in the manifest'})"
    parser.add_argument(
        "--dataset",
        dest="source",
        metavar="NAME",
        required=required,
        default=default,
        help=f"digits, cifar10, cifar100, imagenette, tiny-imagenet, imagenet, imagefolder, hf or webdataset{hint}",
    )
    parser.add_argument("--data-dir", type=place_of, metavar="DIR", help="where the source images lie")
    parser.add_argument(
        "--test-dir", type=place_of, metavar="DIR", help="where the test images lie, if not beside them"
    )


def add_columns(parser: argparse.ArgumentParser) -> None:
    """Adds the options of sources in large files: where these keep images and labels, and where they are kept."""
    parser.add_argument("--image-column", metavar="NAME", help="hf: the column of images; webdataset: their ending")
    parser.add_argument(
        "--label-column", metavar="NAME", help="hf: the column of labels; webdataset: their ending or key in .json"
    )
    parser.add_argument(
        "--cache-dir", type=Path, metavar="DIR", help="webdataset: keeps shards of URLs ($XDG_CACHE_HOME/nrrdd)"
    )


def local_folder(text: str) -> Path:
    """The type of an argument that names a folder to read; a Path of a URL would name one that nobody meant."""
    place = place_of(text)
    if isinstance(place, str):
        scheme = text.partition(":")[0]
        raise argparse.ArgumentTypeError(
            f"found a URL ({scheme}:…), expected a folder of this machine; copy dataset.json and the shards into one "
            "(of URLs only DBRLoader reads datasets)"
        )
    return place


class Several(argparse.Action):
    """Of options that take several values: refuses one that is there twice, since it would count twice in a mean."""

    def __init__(self, *, nargs: str = "+", **options: Any) -> None:
        super().__init__(nargs=nargs, **options)

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option_string: Any = None
    ) -> None:
        for number, value in enumerate(values):
            if value in values[:number]:
                raise argparse.ArgumentError(self, f"found {value} twice, expected different values")
        setattr(namespace, self.dest, values)


def whole(least: int) -> Callable[[str], int]:
    """The type of an option that takes whole numbers from `least` on; argparse tells others with the option's name."""
    return _bounded(int, "a whole number", least)


def number(least: float) -> Callable[[str], float]:
    """The same for numbers with a fraction, which must be finite."""
    return _bounded(float, "a number", least)


def _bounded(kind: Callable[[str], Number], what: str, least: float) -> Callable[[str], Number]:
    def parse(text: str) -> Number:
        with suppress(ValueError):
            if least <= (value := kind(text)) < math.inf:
                return value
        raise argparse.ArgumentTypeError(f"found {text!r}, expected {what}, {least:g} or more")

    return parse


def add_device(parser: argparse.ArgumentParser) -> None:
    """Adds --device."""
    choices = ("auto", "cpu", "cuda")
    parser.add_argument("--device", choices=choices, default="auto", help="auto (default) takes a GPU if there is one")


def add_alpha_dbr(parser: argparse._ActionsContainer) -> None:
    """Adds --alpha-dbr."""
    parser.add_argument(
        "--alpha-dbr",
        type=number(0),
        default=0.5,
        metavar="A",
        help="of completed labels: weight of the distances' error beside the KL, divided by T² (0.5)",
    )


def pick_device(name: str) -> str:
    """Resolves `auto` to `cuda` where there is a GPU, else `cpu`.

    Raises:
        ConfigError: `cuda` without a GPU.
    """
    import torch  # here, so that --help needs no torch

    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise ConfigError("--device: found cuda, but torch sees no GPU; leave the option out or say cpu")
    return "cuda" if available and name != "cpu" else "cpu"
