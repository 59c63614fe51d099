"""What the ranks of a model say to each other while it runs: tensors only."""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path
from typing import Protocol

import torch

from maveriq.exec.engines.torch.config import RankSlice

_TIMEOUT = timedelta(minutes=30)
"""A rank that waits longer gives up. The engine sees a dead one at once, its executor one that hangs well before."""


class Collectives(Protocol):
    """One rank's ends of them. Every rank of the group concerned must make the same call."""

    def add_up(self, x: torch.Tensor) -> torch.Tensor:
        """Return the sum over the ranks of a stage; may change `x`."""

    def gather(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Return the tensors of all ranks of a stage, in their order."""

    def pass_on(self, x: torch.Tensor) -> None:
        """Give a tensor to the same place of the next stage."""

    def take(self, like: torch.Tensor) -> torch.Tensor:
        """Take a tensor of this shape from the same place of the stage before; may fill `like`."""

    def tell_tokens(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return the last stage's tokens to all ranks; may fill `tokens`."""

    def agree(self, *, well: bool) -> bool:
        """Return whether all ranks say that all is well."""


class SingleRank:
    """The links of a model in one process."""

    def add_up(self, x: torch.Tensor) -> torch.Tensor:
        """There is nothing to add."""
        return x

    def gather(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Return what is here."""
        return [x]

    def pass_on(self, x: torch.Tensor) -> None:
        """Never needed."""

    def take(self, like: torch.Tensor) -> torch.Tensor:
        """Never needed."""
        return like

    def tell_tokens(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return what is here."""
        return tokens

    def agree(self, *, well: bool) -> bool:
        """Return its own word."""
        return well


class DistributedRanks:
    """Links over torch.distributed: gloo between CPUs, nccl between GPUs.

    nccl cannot have two ranks on one GPU; then gloo carries what lies there, by way of the CPU.

    Args:
        part: what this rank holds.
        rank: its number.
        meeting_point: a file that all ranks can write, in a private folder.
        devices: those of all ranks.
    """

    def __init__(self, part: RankSlice, rank: int, *, meeting_point: Path, devices: tuple[str, ...]) -> None:
        from torch import distributed

        direct = devices[0].startswith("cuda") and len(set(devices)) == len(devices)
        self._over_cpu = devices[0].startswith("cuda") and not direct
        self._device = torch.device(devices[rank])
        self._dist = distributed
        self._part = part
        self._rank = rank
        world = part.tp * part.pp
        distributed.init_process_group(
            backend="nccl" if direct else "gloo",
            store=distributed.FileStore(os.fspath(meeting_point), world),
            rank=rank,
            world_size=world,
            timeout=_TIMEOUT,
        )
        # Every rank takes part in making every stage's group.
        stages = [list(range(first, first + part.tp)) for first in range(0, world, part.tp)]
        groups = [distributed.new_group(ranks, timeout=_TIMEOUT) for ranks in stages] if part.tp > 1 else []
        self._stage = groups[part.stage] if groups else None

    def add_up(self, x: torch.Tensor) -> torch.Tensor:
        """Sum over the stage."""
        if self._stage is None:
            return x
        moved = self._there(x.contiguous())
        self._dist.all_reduce(moved, group=self._stage)
        return self._back(moved, x)

    def gather(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Gather over the stage."""
        if self._stage is None:
            return [x]
        moved = self._there(x.contiguous())
        parts = [torch.empty_like(moved) for _ in range(self._part.tp)]
        self._dist.all_gather(parts, moved, group=self._stage)
        return [self._back(part, x) for part in parts]

    def pass_on(self, x: torch.Tensor) -> None:
        """Send to the next stage."""
        self._dist.send(self._there(x.contiguous()), self._rank + self._part.tp)

    def take(self, like: torch.Tensor) -> torch.Tensor:
        """Receive from the stage before."""
        moved = self._there(like)
        self._dist.recv(moved, self._rank - self._part.tp)
        return self._back(moved, like)

    def tell_tokens(self, tokens: torch.Tensor) -> torch.Tensor:
        """Broadcast from the last stage's first rank."""
        moved = self._there(tokens)
        self._dist.broadcast(moved, (self._part.pp - 1) * self._part.tp)
        return self._back(moved, tokens)

    def agree(self, *, well: bool) -> bool:
        """Take the least word of all ranks."""
        word = torch.tensor([int(well)], device="cpu" if self._over_cpu else self._device)
        self._dist.all_reduce(word, op=self._dist.ReduceOp.MIN)
        return bool(word.item())

    def _there(self, x: torch.Tensor) -> torch.Tensor:
        return x.cpu() if self._over_cpu else x

    def _back(self, moved: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return moved.to(x.device) if self._over_cpu else moved
