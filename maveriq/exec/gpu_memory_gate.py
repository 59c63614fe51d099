"""The ground that engines stand on: which GPUs are still being left by an engine that was stopped.

For the controller the memory of a stopped engine is free at once, as in the simulator. Real memory comes back
a little later, and the next engine on a GPU is held back until it is seen to be there.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Protocol

from maveriq.units import Bytes, gib

_LOOK_EVERY_S = 0.1


class MemoryWatch(Protocol):
    """Somebody who can see how much memory is really free on the devices behind a cluster's GPUs."""

    def device_of(self, gpu_id: int) -> int:
        """Return the device behind a GPU; several GPUs may share one."""

    def free_bytes(self, device: int) -> Bytes | None:
        """Return what is free on a device, None where nobody can tell."""


class NoMemoryWatch:
    """For GPUs that are only thought of: their memory comes back at once."""

    def device_of(self, gpu_id: int) -> int:
        """Return the GPU itself."""
        return gpu_id

    def free_bytes(self, device: int) -> Bytes | None:  # noqa: ARG002
        """Return None."""
        return None


class GpuMemoryGate:
    """Who is still leaving which GPU, and who has been let in and has not taken its memory yet."""

    def __init__(self, watch: MemoryWatch) -> None:
        self._watch = watch
        self._leaving: Counter[int] = Counter()
        self._coming: Counter[int] = Counter()  # bytes by device
        self._changed = asyncio.Condition()

    def leave(self, gpu_ids: Sequence[int]) -> None:
        """Note that an engine is being stopped."""
        self._leaving.update(gpu_ids)

    async def gone(self, gpu_ids: Sequence[int]) -> None:
        """Note that its processes are gone."""
        async with self._changed:
            self._leaving.subtract(gpu_ids)
            self._changed.notify_all()

    async def clear(self, needed: Mapping[int, Bytes], within_s: float) -> str:
        """Wait until nobody is leaving these GPUs, and what an engine needs on each is seen to be free; let it in.

        Whoever is let in says `settled` later on.

        Args:
            needed: memory by GPU.
            within_s: how long to wait for memory.

        Returns:
            A warning if it was not seen in time, else nothing.
        """
        loop = asyncio.get_running_loop()
        latest_s = loop.time() + within_s
        while True:
            async with self._changed:  # also after a while: somebody else may have begun to leave
                await self._changed.wait_for(lambda: not any(self._leaving[gpu_id] for gpu_id in needed))
            lacking = self._lacking(needed)
            if not lacking or loop.time() >= latest_s:
                self._coming.update(self._by_device(needed))
                return f"{lacking} after {within_s:g} s" if lacking else ""
            await asyncio.sleep(_LOOK_EVERY_S)

    def settled(self, needed: Mapping[int, Bytes]) -> None:
        """Note that an engine has taken the memory that it was let in for, or will not do so any more."""
        self._coming.subtract(self._by_device(needed))

    def _by_device(self, needed: Mapping[int, Bytes]) -> Counter[int]:
        """Return memory by device: of two GPUs that share one it must hold both parts."""
        total: Counter[int] = Counter()
        for gpu_id, amount in needed.items():
            total[self._watch.device_of(gpu_id)] += amount
        return total

    def _lacking(self, needed: Mapping[int, Bytes]) -> str:
        """Say what is not free yet of what an engine needs beside those that were let in before; empty if nothing."""
        for device, amount in self._by_device(needed).items():
            free = self._watch.free_bytes(device)
            wanted = amount + self._coming[device]
            if free is not None and free < wanted:
                told = f"{gib(free):.2f} GiB free, not the {gib(wanted):.2f} GiB that are to be loaded,"
                return f"GPU {device} of this machine has {told}"
        return ""
