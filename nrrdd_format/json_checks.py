"""Typed, bounded access to parsed JSON that notes every fault with its path, not just the first."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable
from typing import Any, TypeVar, cast

from nrrdd_format.errors import FormatError, shown
from nrrdd_format.limits import MAX_DEPTH, MAX_TEXT, MAX_VALUES

T = TypeVar("T")
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff]")  # controls, and what UTF-8 cannot hold
_HEX = re.compile(r"[0-9a-f]{64}")


def parse_json(text: bytes) -> dict[str, Any]:
    """A JSON object without NaN, infinities or repeated keys. Raises FormatError."""
    values = sum(map(text.count, (b",", b"[", b"{")))
    if values > MAX_VALUES:  # a short text of millions of empty lists would fill gigabytes
        raise FormatError(f"holds about {values} values, expected at most {MAX_VALUES}")
    try:
        value = json.loads(
            text.decode("utf-8"),
            parse_constant=_no_constant,
            parse_float=_finite,
            parse_int=_whole,
            object_pairs_hook=_unique,
        )
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else error
        raise FormatError(f"is not valid JSON: {reason}") from None
    if not isinstance(value, dict):
        raise FormatError(f"holds a JSON {type(value).__name__}, expected an object")
    _check_depth(value)
    return value


def _check_depth(value: dict[str, Any]) -> None:
    """Bounds the nesting, since writing a value takes a frame of the stack for each level."""
    level: list[Any] = [value]
    for _ in range(MAX_DEPTH):
        level = [entry for each in level for entry in (each.values() if isinstance(each, dict) else each)]
        level = [entry for entry in level if isinstance(entry, dict | list)]
        if not level:
            return
    raise FormatError(f"values are nested deeper than {MAX_DEPTH} levels")


def _finite(text: str) -> float:
    number = float(text)
    if math.isinf(number):
        raise ValueError(f"{text:.40} is too large a number")
    return number


def _whole(text: str) -> int:
    _finite(text)
    return int(text)


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        (name, _), *_ = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"key {shown(name)} appears twice")
    return result


class Fields:
    """One JSON object. A getter that cannot return a value of its type notes why and returns a stand-in."""

    def __init__(self, value: object, path: str, problems: list[str]) -> None:
        self.path = path
        self.problems = problems
        self._values: dict[str, Any] = value if isinstance(value, dict) else {}
        if not isinstance(value, dict):
            self._note("", value, "an object")
            self.problems = []  # that every key is missing need not be said

    def section(self, key: str) -> Fields:
        """A nested object."""
        return Fields(self._values.get(key), self._at(key), self.problems)

    def sections(self, key: str, high: int) -> list[Fields]:
        """A list of nested objects."""
        rows = self.rows(key, 0, high)
        return [Fields(row, f"{self._at(key)}[{i}]", self.problems) for i, row in enumerate(rows)]

    def text(self, key: str) -> str:
        """A string of 1..MAX_TEXT characters."""
        return self._get(key, is_text, f"a text of 1..{MAX_TEXT} characters", "")

    def choice(self, key: str, names: tuple[str, ...]) -> str:
        """One of the given strings."""
        return self._get(key, lambda v: v in names, f"one of {', '.join(names)}", names[0])

    def sha256(self, key: str) -> str:
        """A SHA-256 in lower-case hex."""
        return self._get(key, lambda v: isinstance(v, str) and bool(_HEX.fullmatch(v)), "64 hex digits", "0" * 64)

    def integer(self, key: str, low: int, high: int) -> int:
        """An integer in [low, high]."""
        return self._get(key, lambda v: type(v) is int and low <= v <= high, f"an integer in {low}..{high}", low)

    def number(self, key: str, low: float, high: float) -> float:
        """A finite number in [low, high]."""
        return float(self._get(key, lambda v: is_number(v, low, high), f"a number in {low}..{high}", low))

    def flag(self, key: str) -> bool:
        """True or false."""
        return self._get(key, lambda v: isinstance(v, bool), "true or false", False)

    def mapping(self, key: str) -> dict[str, Any]:
        """Any JSON object."""
        return self._get(key, lambda v: isinstance(v, dict), "an object", {})

    def rows(self, key: str, low: int, high: int) -> list[Any]:
        """A list with low..high entries of any type."""
        return self._get(key, lambda v: isinstance(v, list) and low <= len(v) <= high, f"a list of {low}..{high}", [])

    def texts(self, key: str, low: int, high: int) -> tuple[str, ...]:
        """A list with low..high strings."""
        return tuple(self._each(key, self.rows(key, low, high), is_text, f"a text of 1..{MAX_TEXT} characters"))

    def numbers(self, key: str, count: int, low: float, high: float) -> tuple[float, ...]:
        """A list of exactly `count` finite numbers in [low, high]."""
        rows = self._each(key, self.rows(key, count, count), lambda v: is_number(v, low, high), f"{low}..{high}")
        return tuple(map(float, rows))

    def entries(self, key: str, low: int, high: int, test: Callable[[Any], bool], expected: str) -> list[Any]:
        """A list with low..high entries that pass `test`."""
        return self._each(key, self.rows(key, low, high), test, expected)

    def optional(self, key: str, get: Callable[[str], T]) -> T | None:
        """`get(key)`, or None where the key is absent or null."""
        return None if self._values.get(key) is None else get(key)

    def _each(self, key: str, rows: list[Any], test: Callable[[Any], bool], expected: str) -> list[Any]:
        wrong = next((i for i, row in enumerate(rows) if not test(row)), None)
        if wrong is None:
            return rows
        self._note(f"{key}[{wrong}]", rows[wrong], expected)
        return []

    def _get(self, key: str, test: Callable[[Any], bool], expected: str, default: T) -> T:
        value: Any = self._values.get(key)
        if test(value):
            return cast(T, value)
        if key not in self._values:
            self.problems.append(f"{self._at(key)} is missing, expected {expected}")
        else:
            self._note(key, value, expected)
        return default

    def _note(self, key: str, value: object, expected: str) -> None:
        found = f"a list of {len(value)}" if isinstance(value, list) else shown(value)
        self.problems.append(f"{self._at(key)} is {found}, expected {expected}")

    def _at(self, key: str) -> str:
        return f"{self.path}.{key}" if key and self.path else key or self.path


def is_number(value: Any, low: float, high: float) -> bool:
    """Whether `value` is a finite JSON number (not a boolean) in [low, high]."""
    return type(value) in (int, float) and bool(low <= value <= high)


def is_text(value: object) -> bool:
    """Whether `value` is a string as a manifest may hold it: not empty, bounded, and all in one line."""
    return isinstance(value, str) and 1 <= len(value) <= MAX_TEXT and not _UNPRINTABLE.search(value)
