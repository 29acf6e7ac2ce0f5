"""Reads ahead of the consumer, in threads: Pillow lets go of the interpreter while it decodes."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

AHEAD = 16
"""Results that may wait for each thread: two threads and images of 224 px hold 5 MB."""


def read_ahead(read: Callable[[Item], Result], items: Iterable[Item], threads: int) -> Generator[Result, None, None]:
    """`read` of every item, in order, computed in `threads` threads that are at most AHEAD · threads items ahead.

    An exception comes where its result would have come. Closing the iterator gives up what was read ahead.
    """
    waiting: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(threads, thread_name_prefix="read-ahead") as pool:
        try:
            for item in items:
                waiting.append(pool.submit(read, item))
                if len(waiting) == AHEAD * threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def reading_threads(threads: int | None) -> int:
    """Threads that read for one process: as many as it computes with; by default its share of the machine's cores."""
    if threads is not None:
        return threads
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
