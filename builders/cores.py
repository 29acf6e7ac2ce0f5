"""How many of the machine's cores a process may compute with."""

from __future__ import annotations

import os


def usable_cores() -> int:
    """Processor cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def reading_threads(threads: int | None) -> int:
    """What one rank computes and reads with; by default its share of the machine's cores."""
    return max(1, usable_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))) if threads is None else threads
