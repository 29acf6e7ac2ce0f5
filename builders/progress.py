"""Progress bars with rate and ETA on long work; silent where standard error is not a terminal."""

from __future__ import annotations

from types import TracebackType
from typing import NoReturn

from tqdm import tqdm


class Progress:
    """A bar that counts `total` units of one stage (None: nobody knows how many). Bytes (`B`) are shown as MB or GB.

    Use as a context manager; call `advance` after each unit.
    """

    def __init__(self, total: int | None, description: str, unit: str) -> None:
        # disable=None is tqdm's own rule: no output where stderr is not a terminal.
        self._bar: tqdm[NoReturn] = tqdm(
            total=total, desc=description, unit=unit, unit_scale=unit == "B", disable=None, dynamic_ncols=True
        )

    def advance(self, count: int = 1, **facts: float) -> None:
        """Counts `count` more units; `facts` (a loss, a rate) are shown behind the bar."""
        if facts:
            self._bar.set_postfix({name: f"{value:.3g}" for name, value in facts.items()}, refresh=False)
        self._bar.update(count)

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()
