"""How many of the machine's cores a process may compute with."""

from __future__ import annotations

import os

from builders.bounds import environment_number


def usable_cores() -> int:
    """Processor cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def reading_threads(threads: int | None) -> int:
    """What one rank computes and reads with: `threads`, or else its share of the machine's cores.

    Outside torchrun, which sets OMP_NUM_THREADS to 1 whatever the machine has, that variable says how many.

    Raises:
        ConfigError: LOCAL_WORLD_SIZE is no number of ranks.
    """
    if threads is not None:
        return threads
    if ranks := environment_number("LOCAL_WORLD_SIZE", 1):
        return max(1, usable_cores() // ranks)
    wanted = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    return int(wanted) if wanted.isdecimal() and int(wanted) > 0 else usable_cores()
