"""Starts one build as several processes that can be killed one by one: as torchrun would, but nobody watches over them.

The processes are forked from one that has imported everything, so a start takes a tenth of a second instead of several.
Each runs the command line's own `main`.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
import time
from collections.abc import Sequence
from multiprocessing.context import ForkServerProcess
from pathlib import Path

PRELOADED = ["builders.cli", "builders.pipeline", "builders.preview", "sklearn.datasets", "matplotlib.figure"]


class BuildRanks:
    """The running processes of one build.

    Attributes:
        processes: one for each rank.
        logs: each rank's standard error, beside `log_folder`.
    """

    def __init__(self, arguments: Sequence[str], world_size: int, log_folder: Path) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        log_folder.mkdir(parents=True, exist_ok=True)
        self.logs = [log_folder / f"rank-{rank}.txt" for rank in range(world_size)]
        port = _free_port()
        self.processes: list[ForkServerProcess] = []
        for rank, log in enumerate(self.logs):
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "MASTER_PORT": port}
            environment = {name: str(value) for name, value in place.items()} | {"MASTER_ADDR": "127.0.0.1"}
            self.processes.append(context.Process(target=_run, args=(list(arguments), environment, log)))
        for process in self.processes:
            process.start()

    def running(self) -> bool:
        """Whether any rank still runs."""
        return any(process.is_alive() for process in self.processes)

    def wait(self, seconds: float) -> list[int] | None:
        """Exit status of every rank; None where some rank runs on after so many seconds (they are killed then)."""
        deadline = time.monotonic() + seconds
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))
        statuses = [process.exitcode for process in self.processes]
        for process in self.processes:
            process.kill()
            process.join()
        return None if None in statuses else [status for status in statuses if status is not None]

    def messages(self) -> list[str]:
        """What every rank wrote."""
        return [log.read_text() if log.is_file() else "" for log in self.logs]


def _run(arguments: list[str], environment: dict[str, str], log: Path) -> None:
    """The process of one rank."""
    os.environ.update(environment)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    from builders.cli import main

    sys.exit(main(arguments))


def _free_port() -> int:
    """A port that nobody listens on at this moment."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port
