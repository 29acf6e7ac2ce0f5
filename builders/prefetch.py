"""Does ahead of the consumer what would make it wait: reading images in processes, asking servers in threads.

Images are read in processes, since threads take turns in all that is not decoding: sixteen read fewer small images a
second than two.
"""

from __future__ import annotations

import multiprocessing
import signal
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from builders.cores import reading_threads, usable_cores
from builders.parent import end_with_parent
from builders.workdir import uninterrupted
from nrrdd_format.errors import DataError

Item = TypeVar("Item")
Result = TypeVar("Result")

AHEAD = 16
"""Results that may wait for each thread."""
CHUNK = 16
"""Items that a process takes at a time, and at most two times as many results of it wait: at 224 px 5 MB."""
WORTH = 500
"""Items below which starting processes takes longer than they save."""


def in_threads(
    function: Callable[[Item], Result], items: Iterable[Item], threads: int
) -> Generator[Result, None, None]:
    """`function` of every item, in order, computed in `threads` threads that are at most AHEAD · threads items ahead.

    An exception comes where its result would have come. Closing the iterator gives up what was begun.
    """
    waiting: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(threads, thread_name_prefix="ahead") as pool:
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) == AHEAD * threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def in_processes(
    function: Callable[[int], Result], items: Sequence[int] | NDArray[np.int64], processes: int
) -> Generator[Result, None, None]:
    """`function` of every item, in order, computed ahead in `processes` processes; one computes here, as it is asked.

    A `DataError` comes where its result would have come; other errors in a process come as torch words them.

    Args:
        function: from an item to a result; where processes are not forked, it is pickled, and a script that comes here
            needs the guard `if __name__ == "__main__":`.
        items: integers.
        processes: see `reading_processes`.

    Raises:
        DataError: raised by `function`, or a process has died.
    """
    if processes == 1:
        yield from map(function, np.asarray(items, np.int64).tolist())
        return
    for results in from_processes(_Chunks(function=function, items=np.asarray(items, np.int64)), processes):
        for result in results:
            if isinstance(result, _Raised):
                raise result.error
            yield result


def from_processes(dataset: Dataset[Result], processes: int, *, option: str = "--threads") -> Iterator[Result]:
    """The items of a dataset, in order, made ahead in so many processes (0: in this one, as they are asked for).

    Raises:
        DataError: a process has died; it names the option that says how many there are.
    """
    loader: DataLoader[Result] = DataLoader(
        dataset,
        batch_size=None,
        num_workers=processes,
        collate_fn=_as_it_is,
        generator=torch.Generator(),  # otherwise the loader would draw from torch's global one
        worker_init_fn=_begin_reading,
    )
    with named_deaths(option):
        yield from _started(loader)  # by no name, which an error's traceback would keep, and the processes with it


def _started(loader: DataLoader[Result]) -> Iterator[Result]:
    # Python drops what a signal raises in its callbacks around a fork. Processes that are started in another way may be
    # ended by a terminal's Ctrl-C before they can ignore it, so there it must not wait until they have started.
    forks = multiprocessing.get_start_method() == "fork"
    with uninterrupted() if forks else nullcontext():
        return iter(loader)


@contextmanager
def named_deaths(option: str = "--threads") -> Iterator[None]:
    """For the work between two results, too: torch tells of a process's death wherever the caller is at that moment.

    Raises:
        DataError: a process of `from_processes` has died; it names the option that says how many there are.
    """
    try:
        yield
    except RuntimeError as error:
        if "DataLoader worker (pid" not in str(error):
            raise
        raise DataError(f"a process that reads images has died; if memory ran out, lower {option}") from error


def reading_processes(threads: int | None, items: int) -> int:
    """Processes that read so many images for one rank: one for a few, else one a thread, no more than cores."""
    return min(reading_threads(threads), usable_cores()) if items >= WORTH else 1


@dataclass(frozen=True, kw_only=True)
class _Raised:
    """An error on its way to the caller; torch would make a traceback in words of it."""

    error: DataError


@dataclass(frozen=True, kw_only=True, eq=False)
class _Chunks(Dataset[list[Any]], Generic[Result]):
    """The results of CHUNK items at a time; the first error ends its chunk."""

    function: Callable[[int], Result]
    items: NDArray[np.int64]

    def __len__(self) -> int:
        return -(-len(self.items) // CHUNK)

    def __getitem__(self, position: int) -> list[Result | _Raised]:
        results: list[Result | _Raised] = []
        for item in self.items[position * CHUNK : (position + 1) * CHUNK].tolist():
            try:
                results.append(self.function(item))
            except DataError as error:
                return [*results, _Raised(error=error)]
        return results


def _begin_reading(number: int) -> None:
    """torch's own watch waits for ever where nobody takes large results any more.

    A terminal's Ctrl-C comes to this process too; the one that started it ends it.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with_parent()


def _as_it_is(result: Result) -> Result:
    return result
