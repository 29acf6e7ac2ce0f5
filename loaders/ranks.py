"""What the processes that train together agree on, so that none goes on, or waits, alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

import torch
import torch.distributed as dist

from nrrdd_format.errors import ConfigError, NrrddError

T = TypeVar("T")


def distributed_ranks() -> tuple[int, int]:
    """(rank, world size) as torch.distributed says; alone where it is not initialised."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


class Agreement:
    """Exchanges between the ranks, through a group of its own on the CPU. Every rank makes the same calls."""

    def __init__(self) -> None:
        self._group: dist.ProcessGroup | None = None

    def gathered(self, mine: T) -> list[T]:
        """What each rank brings, by rank."""
        world_size = distributed_ranks()[1]
        if world_size == 1:
            return [mine]
        all_ranks: list[T] = [mine] * world_size
        try:
            dist.all_gather_object(all_ranks, mine, group=self._own_group())
        except RuntimeError as error:
            raise _lost(error) from error
        return all_ranks

    def require_same(self, what: str, mine: Mapping[str, object]) -> None:
        """Raises ConfigError on every rank, naming the first value that differs."""
        for rank, other in enumerate(self.gathered(mine)):
            for key, value in mine.items():
                if other[key] != value:
                    raise ConfigError(
                        f"{what}: {key} is {value!r} here, {other[key]!r} on rank {rank}; expected the same"
                    )

    def any_error(self, mine: NrrddError | None) -> NrrddError | None:
        """The error of this rank, or else that of another. One number goes round where there is none."""
        if distributed_ranks()[1] == 1:
            return mine
        errors = torch.tensor([mine is not None], dtype=torch.int32)
        try:
            dist.all_reduce(errors, group=self._own_group())
        except RuntimeError as error:
            raise _lost(error) from error
        if not errors.item():
            return None
        texts = self.gathered("" if mine is None else str(mine))
        rank, text = next((rank, text) for rank, text in enumerate(texts) if text)
        return NrrddError(f"rank {rank} cannot go on: {text}") if mine is None else mine

    def _own_group(self) -> dist.ProcessGroup:
        if self._group is None:
            group = dist.new_group(backend="gloo")
            assert isinstance(group, dist.ProcessGroup)  # not the mark of a rank outside the group
            self._group = group
        return self._group


def _lost(error: RuntimeError) -> NrrddError:
    reason = str(error).partition("\n")[0]
    return NrrddError(f"the ranks cannot agree on the next batch ({reason}); has another rank ended?")
