"""Functions through torch.compile, where a build asks for it: the same function, faster, and rounded otherwise.

Compiling goes through the whole function or fails (`fullgraph`): a part left out would be slow and not be noticed.
Shapes are compiled as they are, since a build has at most two sizes of batches.
"""

from __future__ import annotations

import atexit
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import ParamSpec, TypeVar

import torch

from nrrdd_format.errors import ConfigError, first_line

P = ParamSpec("P")
R = TypeVar("R")


def compiled(function: Callable[P, R], wanted: bool) -> Callable[P, R]:
    """The function itself, or if `wanted` one that compiles it when it is first called."""
    return torch.compile(function, fullgraph=True, dynamic=False) if wanted else function


@contextmanager
def in_one_order(wanted: bool) -> Iterator[None]:
    """If `wanted`, compiled code with several threads adds up what belongs to one place in the same order every time.

    It is compiled, called and followed back inside: otherwise the sums of a gradient come in any order.
    """
    if not wanted or torch.are_deterministic_algorithms_enabled():
        yield
        return
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def compile_apart() -> None:
    """From here on this process's temporary files lie in a folder of its own, which goes when it ends.

    Among them is what torch compiles (unless $TORCHINDUCTOR_CACHE_DIR says otherwise). All processes of a user share
    those otherwise, and one killed while it writes leaves half a file, at which later ones fail.
    """
    folder = tempfile.TemporaryDirectory(prefix="nrrdd-compiled-", ignore_cleanup_errors=True)
    os.environ["TMPDIR"] = tempfile.tempdir = folder.name
    atexit.register(folder.cleanup)


@contextmanager
def compile_errors() -> Iterator[None]:
    """Turns a failure to compile into one line.

    Raises:
        ConfigError: torch could not compile what ran inside.
    """
    try:
        yield
    except RuntimeError as error:
        from torch._dynamo.exc import TorchDynamoException  # loads the compiler, which most builds do not need

        if not isinstance(error, TorchDynamoException):
            raise
        raise ConfigError(
            f"--compile: torch cannot compile the teacher's passes ({first_line(error)}); it needs a C++ compiler "
            f"(g++ or clang++, or $CXX) on a CPU and Triton on a GPU, and a process killed while it compiled may have "
            f"left half a file in torch's cache ($TORCHINDUCTOR_CACHE_DIR); without the option nothing is compiled"
        ) from error
