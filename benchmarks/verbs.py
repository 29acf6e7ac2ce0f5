"""How the verbs of `nrrdd` are added to its parser, and the argument most of them have."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import TypeAlias

from benchmarks.command import local_folder

Verb = Callable[[argparse.Namespace], int]
Verbs: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


def add_verb(verbs: Verbs, name: str, verb: Verb, summary: str, epilog: str) -> argparse.ArgumentParser:
    """Adds a verb and returns its parser. `summary` is a phrase without a capital or a full stop."""
    parser = verbs.add_parser(
        name,
        help=summary,
        description=summary[0].upper() + summary[1:] + ".",
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(verb=verb)
    return parser


def add_dataset(parser: argparse.ArgumentParser) -> None:
    """Adds the positional argument DATASET."""
    parser.add_argument("path", type=local_folder, metavar="DATASET", help="a built dataset's folder")


def add_json(parser: argparse.ArgumentParser) -> None:
    """Adds --json."""
    parser.add_argument("--json", action="store_true", help="print JSON")
