"""The commands for a GPU in the Makefile: most machines never run them, so at least their options are checked."""

from __future__ import annotations

import importlib
import os
import re
import shlex
import subprocess
from argparse import ArgumentParser
from pathlib import Path

import pytest

import benchmarks.cli
import builders.cli

COMMAND = re.compile(r"\.venv/bin/(python -m \S+|\S+) (.*?)(?: \|\| exit.*| &&|;|$)", re.MULTILINE)


@pytest.fixture(scope="module")
def commands(repository: Path) -> list[tuple[str, list[str]]]:
    """What `make gpu` would run, as programs and their arguments."""
    makes = {"MAKEFLAGS": "", "MAKELEVEL": "", "MFLAGS": ""}  # this may itself run under make
    planned = subprocess.run(
        ["make", "--dry-run", "--always-make", "gpu"],
        cwd=repository,
        env=os.environ | makes,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    lines = re.sub(r"\\\n\s*", "", planned).replace("$network", "conv3").replace("$ipc", "10")
    found = [(program, shlex.split(arguments)) for program, arguments in COMMAND.findall(lines)]
    return [(program, arguments) for program, arguments in found if program not in ("uv", "python -m pip")]


def _parser(program: str) -> ArgumentParser:
    if program == "nrrdd":
        return benchmarks.cli.make_parser()
    if program == "build-distilled":
        return builders.cli.make_parser()
    parser: ArgumentParser = importlib.import_module(program.removeprefix("python -m ")).make_parser()
    return parser


def test_programs_take_the_options_that_make_gives_them(commands: list[tuple[str, list[str]]]) -> None:
    programs = [program for program, _ in commands]
    for program, arguments in commands:
        if program != "python -m pytest":
            _parser(program).parse_args(arguments)
    assert {"nrrdd", "build-distilled", "python -m pytest", "python -m benchmarks.accuracy"} <= set(programs)
    assert {"python -m benchmarks.builder_throughput", "python -m benchmarks.loader_wait"} <= set(programs)
