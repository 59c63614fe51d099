"""Delays a starting engine until the memory of stopped engines on its GPUs is free.

The controller counts the memory of a stopped engine as free at once, as in the simulator. On a real GPU it becomes free
when the processes have exited, a little later.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Mapping, Sequence
from typing import Protocol

from maveriq.errors import MaveriqError
from maveriq.units import Bytes, gib

_POLL_INTERVAL_S = 0.1


class GpuHeldError(MaveriqError):
    """A GPU is held by an engine that has been stopped but does not end."""


class MemoryProbe(Protocol):
    """Reads how much memory is free on the devices behind a cluster's GPUs."""

    def device_of(self, gpu_id: int) -> int:
        """Return the device behind a GPU; several GPUs may share one."""

    def free_bytes(self, device: int) -> Bytes | None:
        """Return the free memory of a device, None if unknown.

        Raises:
            GpuLostError: the device is lost.
        """


class NoMemoryProbe:
    """For virtual GPUs, whose memory is free at once."""

    def device_of(self, gpu_id: int) -> int:
        """Return the GPU itself."""
        return gpu_id

    def free_bytes(self, device: int) -> Bytes | None:  # noqa: ARG002
        """Return None."""
        return None


class GpuMemoryGate:
    """Tracks GPUs that stopping engines still hold, and memory that starting engines have claimed."""

    def __init__(self, probe: MemoryProbe) -> None:
        self._probe = probe
        self._stopping: Counter[int] = Counter()  # engines by GPU
        self._claimed: Counter[int] = Counter()  # bytes by device
        self._changed = asyncio.Condition()
        self._unkillable: set[asyncio.Task[None]] = set()

    def engine_stopping(self, gpu_ids: Sequence[int]) -> None:
        """Record that an engine on these GPUs is being terminated."""
        self._stopping.update(gpu_ids)

    async def engine_gone(self, gpu_ids: Sequence[int]) -> None:
        """Record that the processes of a stopping engine have ended."""
        async with self._changed:
            self._stopping.subtract(gpu_ids)
            self._changed.notify_all()

    def engine_unkillable(self, gpu_ids: Sequence[int], gone: Awaitable[None]) -> None:
        """Record that a stopping engine cannot be killed; its GPUs stay taken until it is `gone` all the same."""

        async def wait() -> None:
            await gone
            await self.engine_gone(gpu_ids)

        task = asyncio.get_running_loop().create_task(wait())
        self._unkillable.add(task)
        task.add_done_callback(self._unkillable.discard)

    async def claim(self, needed: Mapping[int, Bytes], timeout_s: float) -> str:
        """Wait until no engine is stopping on these GPUs and the needed memory is free, then claim it.

        The caller must call `release_claim` once the engine has allocated the memory, or has failed.

        Args:
            needed: memory by GPU.
            timeout_s: how long to wait. If memory is still short then, the claim is granted with a warning: others
                may use the GPU too.

        Returns:
            The warning, or "" if the memory is free.

        Raises:
            GpuHeldError: an engine of ours still holds one of the GPUs after the timeout.
            GpuLostError: one of the devices is lost.
        """
        loop = asyncio.get_running_loop()
        deadline_s = loop.time() + timeout_s
        while True:
            try:
                async with asyncio.timeout_at(max(deadline_s, loop.time() + _POLL_INTERVAL_S)), self._changed:
                    # In every round: another engine may have begun to stop.
                    await self._changed.wait_for(lambda: not any(self._stopping[gpu_id] for gpu_id in needed))
            except TimeoutError:
                held = ", ".join(str(gpu_id) for gpu_id in needed if self._stopping[gpu_id])
                message = f"GPU {held} is held by an engine that was stopped {timeout_s:g} s ago and does not end"
                raise GpuHeldError(message) from None
            shortage = self._shortage(needed)
            if not shortage or loop.time() >= deadline_s:
                self._claimed.update(self._by_device(needed))
                return f"{shortage} after {timeout_s:g} s" if shortage else ""
            await asyncio.sleep(_POLL_INTERVAL_S)

    def release_claim(self, needed: Mapping[int, Bytes]) -> None:
        """Drop a claim: the engine has allocated its memory, or has failed."""
        self._claimed.subtract(self._by_device(needed))

    def tightest(self, needed: Mapping[int, Bytes]) -> str:
        """Return which GPU has the least memory to spare for an engine, and how much; "" if none is known.

        Args:
            needed: memory by GPU; those that share a device add up.

        Raises:
            GpuLostError: one of the devices is lost.
        """
        by_device = self._by_device(needed)
        free = {device: self._probe.free_bytes(device) for device in by_device}
        known = {device: amount for device, amount in free.items() if amount is not None}
        if not known:
            return ""
        device = min(known, key=lambda device: known[device] - by_device[device])
        gpu_id = next(gpu_id for gpu_id in needed if self._probe.device_of(gpu_id) == device)
        return f"GPU {gpu_id} had {gib(known[device]):.2f} GiB free for the planned {gib(by_device[device]):.2f} GiB"

    def _by_device(self, needed: Mapping[int, Bytes]) -> Counter[int]:
        """Return memory by device; GPUs that share a device add up."""
        total: Counter[int] = Counter()
        for gpu_id, amount in needed.items():
            total[self._probe.device_of(gpu_id)] += amount
        return total

    def _shortage(self, needed: Mapping[int, Bytes]) -> str:
        """Return which device lacks memory for an engine and all earlier claims, or "" if none does."""
        for device, amount in self._by_device(needed).items():
            free = self._probe.free_bytes(device)
            claimed = amount + self._claimed[device]
            if free is not None and free < claimed:
                return (
                    f"GPU {device} of this machine has {gib(free):.2f} GiB free, "
                    f"not the {gib(claimed):.2f} GiB that are to be loaded,"
                )
        return ""
