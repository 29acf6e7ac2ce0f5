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
NO_MAKE = {"MAKEFLAGS": "", "MAKELEVEL": "", "MFLAGS": ""}
"""These tests may themselves run under make."""


@pytest.fixture(scope="module")
def commands(repository: Path) -> list[tuple[str, list[str]]]:
    """What `make gpu` would run, as programs and their arguments."""
    planned = subprocess.run(
        ["make", "--dry-run", "--always-make", "gpu"],
        cwd=repository,
        env=os.environ | NO_MAKE,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    lines = re.sub(r"\\\n\s*", "", planned)
    for variable, value in (("$network", "conv3"), ("$ipc", "10"), ("$images", "rded")):
        lines = lines.replace(variable, value)
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
    assert {"python -m benchmarks.scale_factors", "python -m benchmarks.teachers"} <= set(programs)


def test_one_command_at_a_time_has_the_gpu(repository: Path, tmp_path: Path) -> None:
    """Of many jobs (-j, or MAKEFLAGS of the user's) `gpu-speed` would time the others."""
    log = tmp_path / "log"
    for name in ("python", "nrrdd", "build-distilled"):
        (tmp_path / name).write_text(f"#!/bin/sh\necho begin >> {log}; sleep 0.05; echo end >> {log}\n")
        (tmp_path / name).chmod(0o755)
    command = ["make", "--silent", "--jobs=4", "--old-file=.venv", f"BIN={tmp_path}", "gpu"]
    subprocess.run(command, cwd=repository, env=os.environ | NO_MAKE, check=True)
    lines = log.read_text().split()
    assert len(lines) > 10 and lines == ["begin", "end"] * (len(lines) // 2)
