"""Collective operations and point-to-point transfers between the ranks of one model."""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path
from typing import Protocol

import torch

from maveriq.exec.engines.torch.config import Shard

_TIMEOUT = timedelta(minutes=30)
"""Last resort. The engine notices a dead rank at once, and the executor's watchdog ends a hanging engine earlier."""


class Collectives(Protocol):
    """One rank's collective operations. All ranks of the group concerned must make the same call."""

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """Return the sum over the ranks of this stage; may change `x`."""

    def all_gather(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Return the tensors of all ranks of this stage, in rank order."""

    def send(self, x: torch.Tensor) -> None:
        """Send a tensor to the rank with the same `tp_rank` in the next stage."""

    def recv(self, like: torch.Tensor) -> torch.Tensor:
        """Receive a tensor of the shape of `like` from the previous stage; may overwrite `like`."""

    def broadcast_tokens(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return the last stage's tokens on every rank; may overwrite `tokens`."""

    def all_ok(self, *, ok: bool) -> bool:
        """Return whether every rank of the model passes `ok=True`."""


class SingleRank:
    """`Collectives` of a model in one process: no communication."""

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """Return `x`."""
        return x

    def all_gather(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Return `x` alone."""
        return [x]

    def send(self, x: torch.Tensor) -> None:
        """Never called: there is one stage."""

    def recv(self, like: torch.Tensor) -> torch.Tensor:
        """Never called: there is one stage."""
        return like

    def broadcast_tokens(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return `tokens`."""
        return tokens

    def all_ok(self, *, ok: bool) -> bool:
        """Return `ok`."""
        return ok


class DistributedRanks:
    """`Collectives` over torch.distributed: gloo between CPUs, NCCL between GPUs.

    NCCL does not support two ranks on one GPU. Such ranks use gloo and copy tensors through the CPU.

    Args:
        shard: the part of the model that this rank holds.
        rank: this rank's number.
        rendezvous_file: a file in a private folder that all ranks can write.
        devices: the devices of all ranks.
    """

    def __init__(self, shard: Shard, rank: int, *, rendezvous_file: Path, devices: tuple[str, ...]) -> None:
        from torch import distributed

        use_nccl = devices[0].startswith("cuda") and len(set(devices)) == len(devices)
        self._over_cpu = devices[0].startswith("cuda") and not use_nccl
        self._device = torch.device(devices[rank])
        self._dist = distributed
        self._shard = shard
        self._rank = rank
        world_size = shard.tp * shard.pp
        distributed.init_process_group(
            backend="nccl" if use_nccl else "gloo",
            store=distributed.FileStore(os.fspath(rendezvous_file), world_size),
            rank=rank,
            world_size=world_size,
            timeout=_TIMEOUT,
        )
        # new_group is collective: every rank creates the groups of all stages.
        stages = [list(range(first, first + shard.tp)) for first in range(0, world_size, shard.tp)]
        groups = [distributed.new_group(ranks, timeout=_TIMEOUT) for ranks in stages] if shard.tp > 1 else []
        self._stage_group = groups[shard.stage] if groups else None

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """Sum over the stage."""
        if self._stage_group is None:
            return x
        moved = self._to_transport(x.contiguous())
        self._dist.all_reduce(moved, group=self._stage_group)
        return self._from_transport(moved, x)

    def all_gather(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Gather over the stage."""
        if self._stage_group is None:
            return [x]
        moved = self._to_transport(x.contiguous())
        parts = [torch.empty_like(moved) for _ in range(self._shard.tp)]
        self._dist.all_gather(parts, moved, group=self._stage_group)
        return [self._from_transport(part, x) for part in parts]

    def send(self, x: torch.Tensor) -> None:
        """Send to the next stage."""
        self._dist.send(self._to_transport(x.contiguous()), self._rank + self._shard.tp)

    def recv(self, like: torch.Tensor) -> torch.Tensor:
        """Receive from the previous stage."""
        moved = self._to_transport(like)
        self._dist.recv(moved, self._rank - self._shard.tp)
        return self._from_transport(moved, like)

    def broadcast_tokens(self, tokens: torch.Tensor) -> torch.Tensor:
        """Broadcast from the last stage's first rank."""
        moved = self._to_transport(tokens)
        self._dist.broadcast(moved, (self._shard.pp - 1) * self._shard.tp)
        return self._from_transport(moved, tokens)

    def all_ok(self, *, ok: bool) -> bool:
        """Reduce to the minimum over all ranks."""
        flag = torch.tensor([int(ok)], device="cpu" if self._over_cpu else self._device)
        self._dist.all_reduce(flag, op=self._dist.ReduceOp.MIN)
        return bool(flag.item())

    def _to_transport(self, x: torch.Tensor) -> torch.Tensor:
        return x.cpu() if self._over_cpu else x

    def _from_transport(self, moved: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return moved.to(x.device) if self._over_cpu else moved
