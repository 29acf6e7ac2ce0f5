"""A process that ends with the one that started it, also where that one is killed and can say nothing."""

from __future__ import annotations

import multiprocessing
import os
import threading
from multiprocessing.connection import wait

LOOK_SECONDS = 0.5
"""Between two looks at the process that started this one."""


def end_with_parent() -> None:
    """In a new process: ends it, at once and without cleaning up, when the process that started it is gone.

    A forked process sees that its parent is another. Of one that a fork server started the parent is the server, but it
    holds the end of a pipe that only the process that asked for it has open.
    """
    parent, asked_by = os.getppid(), multiprocessing.parent_process()
    sentinels = [] if asked_by is None else [asked_by.sentinel]

    def watch() -> None:
        while os.getppid() == parent and not wait(sentinels, LOOK_SECONDS):
            pass
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
