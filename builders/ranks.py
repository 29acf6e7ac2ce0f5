"""Work shared by the processes of one `torchrun`: each rank takes whole units, and all meet after every stage."""

from __future__ import annotations

import datetime
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
import torch.distributed as dist
from tqdm import tqdm

from builders.bounds import environment_number
from nrrdd_format.errors import ConfigError, RankError, first_line

Unit = TypeVar("Unit")

RUNS = 4
"""Of units, for each rank."""
JOINING_TIMEOUT = datetime.timedelta(minutes=10)
"""By then every process of the run has started, or one never will."""
MEETING_TIMEOUT = datetime.timedelta(days=30)
"""One rank may be busy for days after the others are done; that one has died shows at once."""


@dataclass(frozen=True)
class Ranks:
    """This process's place among the processes of the build."""

    rank: int
    world_size: int
    local_rank: int | None
    """Its number on its machine; None: not said."""
    group: dist.ProcessGroup | None = None
    """What they meet in; None for one process alone."""

    @property
    def is_first(self) -> bool:
        """Whether this process does what must be done once."""
        return self.rank == 0

    def share(self, units: Sequence[Unit]) -> Sequence[Unit]:
        """The units this rank takes: every `world_size`-th, so that neighbours in cost are spread."""
        return units[self.rank :: self.world_size]

    def share_runs(self, units: Sequence[Unit]) -> list[Unit]:
        """The units this rank takes where neighbours have much in common: every `world_size`-th run of them.

        A rank has several runs, so that what a stopped build has done, with however many ranks, is spared to all alike.
        """
        runs = min(len(units), RUNS * self.world_size)
        bounds = [len(units) * run // runs for run in range(runs + 1)] if runs else [0]
        mine = range(self.rank, runs, self.world_size)
        return [unit for run in mine for unit in units[bounds[run] : bounds[run + 1]]]

    def meet(self) -> None:
        """Waits until every rank has come here.

        Raises:
            RankError: another process of the run has ended.
        """
        if self.group is None:
            return
        try:
            dist.barrier(self.group)
        except RuntimeError as error:  # gloo's words name sockets and source lines
            raise RankError(
                f"rank {self.rank} of {self.world_size}: another process of this build has ended, so it stops here; "
                f"finished work is kept, and the same command goes on from there"
            ) from error

    def say(self, message: str) -> None:
        """Prints a line for the user, once for all ranks; it goes to standard error, beside the progress bars."""
        if self.is_first:
            tqdm.write(message, file=sys.stderr)

    def device(self, name: str) -> torch.device:
        """`auto` is this rank's GPU where there is one.

        Raises:
            ConfigError: `cuda` where there is none, or of several GPUs nobody says which is this rank's.
        """
        if name == "cuda" and not torch.cuda.is_available():
            raise ConfigError("--device: found cuda, but torch sees no GPU; leave the option out or say cpu")
        if name == "cpu" or not torch.cuda.is_available():
            return torch.device("cpu")
        count = torch.cuda.device_count()
        if self.local_rank is None and count > 1:
            raise ConfigError(
                f"LOCAL_RANK: not set with WORLD_SIZE {self.world_size} and {count} GPUs, so all processes would take "
                f"the first; start them with torchrun, or number those of each machine with LOCAL_RANK from 0"
            )
        return torch.device("cuda", (self.local_rank or 0) % count)


def ranks_of_environment() -> Ranks:
    """This process's place as `torchrun`, or who starts the processes, says; alone where nobody does.

    Raises:
        ConfigError: there is no such place; it would leave out the work of another.
    """
    world_size, rank = environment_number("WORLD_SIZE", 1) or 1, environment_number("RANK", 0) or 0
    if rank >= world_size:
        raise ConfigError(
            f"RANK: found {rank} with WORLD_SIZE {world_size}, expected less; start the processes with torchrun, or "
            f"unset both for one alone"
        )
    local = environment_number("LOCAL_RANK", 0)
    return Ranks(rank=rank, world_size=world_size, local_rank=0 if local is None and world_size == 1 else local)


@contextmanager
def joined_ranks() -> Iterator[Ranks]:
    """Joins the group that `torchrun` announces in the environment; alone, no group is made.

    Only the meetings go through the group (results travel through the work folder), so gloo serves GPUs too.

    Raises:
        RankError: the processes do not find each other.
    """
    ranks = ranks_of_environment()
    if ranks.world_size == 1:
        yield ranks
        return
    group = _join(ranks)
    try:
        yield replace(ranks, group=group)
    finally:
        dist.destroy_process_group()


def _join(ranks: Ranks) -> dist.ProcessGroup:
    """Finds the other ranks. The group in which they meet is one of its own, since it waits far longer."""
    try:
        dist.init_process_group("gloo", timeout=JOINING_TIMEOUT)
        group = dist.new_group(timeout=MEETING_TIMEOUT)
    except (RuntimeError, ValueError) as error:  # a ValueError: torchrun's variables are not all there
        raise RankError(
            f"rank {ranks.rank} of {ranks.world_size}: the processes of this build did not find each other "
            f"({first_line(error)}); start all of them with torchrun, or with the same MASTER_ADDR, MASTER_PORT and "
            f"WORLD_SIZE"
        ) from error
    assert isinstance(group, dist.ProcessGroup)  # every rank belongs to it
    return group
