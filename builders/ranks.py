"""Work shared by the processes of one `torchrun`: each rank takes whole units, and all meet after every stage."""

from __future__ import annotations

import datetime
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from tqdm import tqdm

Unit = TypeVar("Unit")

# One rank may be busy for days after the others are done; a dead rank is torchrun's to notice.
MEETING_TIMEOUT = datetime.timedelta(days=30)


@dataclass(frozen=True)
class Ranks:
    """This process's place among the processes of the build."""

    rank: int
    world_size: int
    local_rank: int

    @property
    def is_first(self) -> bool:
        """Whether this process does what must be done once."""
        return self.rank == 0

    def share(self, units: Sequence[Unit]) -> Sequence[Unit]:
        """The units this rank takes: every `world_size`-th, so that neighbours in cost are spread."""
        return units[self.rank :: self.world_size]

    def meet(self) -> None:
        """Waits until every rank has come here."""
        if self.world_size > 1:
            dist.barrier()

    def say(self, message: str) -> None:
        """Prints a line for the user, once for all ranks; it goes to standard error, beside the progress bars."""
        if self.is_first:
            tqdm.write(message, file=sys.stderr)

    def device(self, name: str) -> torch.device:
        """`auto` is this rank's GPU where there is one."""
        if name == "auto":
            name = "cuda" if torch.cuda.is_available() else "cpu"
        if name == "cuda":
            return torch.device("cuda", self.local_rank % max(1, torch.cuda.device_count()))
        return torch.device(name)


@contextmanager
def joined_ranks() -> Iterator[Ranks]:
    """Joins the group that `torchrun` announces in the environment; alone, no group is made.

    Only the meetings go through the group (results travel through the work folder), so gloo serves GPUs too.
    """
    ranks = Ranks(
        rank=int(os.environ.get("RANK", "0")),
        world_size=int(os.environ.get("WORLD_SIZE", "1")),
        local_rank=int(os.environ.get("LOCAL_RANK", "0")),
    )
    if ranks.world_size == 1:
        yield ranks
        return
    dist.init_process_group("gloo", timeout=MEETING_TIMEOUT)
    try:
        yield ranks
    finally:
        dist.destroy_process_group()
