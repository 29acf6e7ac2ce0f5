"""Whether this machine can compile for its CPU."""

from __future__ import annotations

import os
import shutil

import pytest

COMPILER = os.environ.get("CXX", "g++")
needs_compiler = pytest.mark.skipif(
    shutil.which(COMPILER) is None, reason=f"{COMPILER}, with which torch compiles for a CPU, is not installed"
)
