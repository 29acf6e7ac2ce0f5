"""Ctrl-C in the first seconds of a command, while it imports torch and none of its own code can catch it."""

from __future__ import annotations

import os
import sys
from types import TracebackType

COMMANDS = ("-m", "build-distilled", "nrrdd")
"""What Python calls a program whose modules it is importing: `python -m …`, as torchrun starts it, and the commands."""


def end_without_traceback() -> None:
    """In a command, makes an interrupt that nobody catches one line and exit status 130; elsewhere does nothing."""
    if os.path.basename(sys.argv[0]) in COMMANDS:
        sys.excepthook = _end


def _end(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if not issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, trace)
        return
    print("interrupted", file=sys.stderr)
    sys.exit(130)
