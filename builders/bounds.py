"""The bounds of options, and of the environment's numbers: what lies outside is refused in one line that names it."""

from __future__ import annotations

import math
import os

from nrrdd_format.errors import ConfigError, shown
from nrrdd_format.json_checks import is_text
from nrrdd_format.limits import MAX_TEXT

MAX_SEED = 2**63 - 1
MAX_IPC, MAX_STEPS, MAX_THREADS = 100_000, 1_000_000, 1024
"""Far beyond what a class has images, a training takes or a machine has; where more is asked for, a digit slipped."""


def at_least(option: str, value: float, low: float) -> None:
    """Raises ConfigError unless the value is finite and `low` or more."""
    if not low <= value < math.inf:
        raise ConfigError(f"{option}: found {value}, expected {low} or more")


def between(option: str, value: float, low: float, high: float) -> None:
    """Raises ConfigError unless the value lies in [low, high]."""
    if not low <= value <= high:
        raise ConfigError(f"{option}: found {value}, expected a value from {low} to {high}")


def positive(option: str, value: float) -> None:
    """Raises ConfigError unless the value is finite and more than 0."""
    if not (value > 0 and math.isfinite(value)):
        raise ConfigError(f"{option}: found {value}, expected a positive number")


def environment_number(name: str, low: int) -> int | None:
    """The whole number that a variable of the environment holds; None: it is not set, or set to nothing.

    Raises:
        ConfigError: it holds anything else than a number from `low` on.
    """
    text = os.environ.get(name, "").strip()
    if not text:
        return None
    # Nine digits are enough for any place; int() itself refuses thousands with an error of its own.
    if not text.isdecimal() or len(text) > 9 or int(text) < low:
        raise ConfigError(f"{name}: found {shown(text)}, expected a whole number, {low} or more, or no such variable")
    return int(text)


def manifest_text(option: str, value: str | None) -> None:
    """Raises ConfigError unless the value is None or a text that a manifest can hold."""
    if value is not None and not is_text(value):
        raise ConfigError(f"{option}: found {shown(value)}, expected 1 to {MAX_TEXT} characters in one line")
