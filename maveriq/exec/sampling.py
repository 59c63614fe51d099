"""Watching GPUs over time: samples once a second, their recent load and energy, and memory that is to come back."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Mapping, Sequence

from maveriq.domain.cluster import ClusterView, GpuView
from maveriq.domain.hardware import Cluster, LoadWindow
from maveriq.exec.gpus import GpuMeter, GpuReading
from maveriq.units import MICROS_PER_SECOND, Bytes

_SLACK_BYTES = 256 << 20  # what drivers keep of a process for a while, and other processes' ups and downs
_POLL_S = 0.2


async def read_aside(meter: GpuMeter) -> Sequence[GpuReading]:
    """Return a reading without holding up the event loop; a fast meter is read at once."""
    return await asyncio.to_thread(meter.read) if meter.slow else meter.read()


class GpuSampler:
    """Takes samples of GPUs, and remembers as many as the load window looks back.

    Args:
        meter: reads the GPUs.
        window: how load is measured; also says how often to sample.
        heard: called with each sample, once it counts.
    """

    def __init__(
        self,
        meter: GpuMeter,
        window: LoadWindow | None = None,
        *,
        heard: Callable[[Sequence[GpuReading]], None] | None = None,
    ) -> None:
        self._meter = meter
        self._window = window or LoadWindow()
        self._heard = heard
        self._recent: deque[Sequence[GpuReading]] = deque(maxlen=self._window.samples)
        self._first: Sequence[GpuReading] = ()

    async def run(self) -> None:
        """Sample on the beat until cancelled; a reading that takes long makes the next one late, not doubled."""
        loop = asyncio.get_running_loop()
        beat_s = self._window.sample_us / MICROS_PER_SECOND
        due_s = loop.time()
        while True:
            self.add(await read_aside(self._meter))
            due_s = max(due_s + beat_s, loop.time())
            await asyncio.sleep(due_s - loop.time())

    def add(self, readings: Sequence[GpuReading]) -> None:
        """Note a sample."""
        self._first = self._first or readings
        self._recent.append(readings)
        if self._heard is not None:
            self._heard(readings)

    def loads(self) -> list[float]:
        """Return the load of each GPU: the share of the window's samples in which it was busy (SPEC 5).

        Samples that were not taken yet, or that could not tell, count as idle, as they do in simulation.
        """
        threshold = self._window.busy_share
        busy = [0] * len(self._meter.gpus)
        for readings in self._recent:
            for gpu_id, reading in enumerate(readings):
                busy[gpu_id] += reading.busy_share is not None and reading.busy_share > threshold
        return [count / self._window.samples for count in busy]

    def energy_j(self) -> list[float | None]:
        """Return the joules that each GPU took from the first sample to the last, None where it cannot tell."""
        if not self._recent:
            return [None] * len(self._meter.gpus)
        return [
            None if first.energy_j is None or last.energy_j is None else last.energy_j - first.energy_j
            for first, last in zip(self._first, self._recent[-1], strict=True)
        ]

    def view(self, cluster: Cluster) -> ClusterView:
        """Return the cluster as the last sample saw it; before the first one as it was when it was set up.

        Free memory is what nobody uses, so what others than maveriq take is missing from it.
        """
        if self._recent:
            used = [reading.used_bytes for reading in self._recent[-1]]
        else:
            used = [gpu.idle_bytes for gpu in cluster.gpus]
        return ClusterView(
            gpus=tuple(
                GpuView(
                    gpu_id=gpu.gpu_id,
                    node=gpu.node,
                    capacity_bytes=gpu.capacity_bytes,
                    free_bytes=max(0, gpu.capacity_bytes - used_bytes),
                    load=load,
                )
                for gpu, used_bytes, load in zip(cluster.gpus, used, self.loads(), strict=True)
            )
        )


class MemoryWatch:
    """Looks at memory that engines leave, and waits until it is back to what it was.

    Args:
        meter: reads the GPUs.
        slack_bytes: so much more than before still counts as back.
        poll_s: time between looks.
    """

    def __init__(self, meter: GpuMeter, *, slack_bytes: Bytes = _SLACK_BYTES, poll_s: float = _POLL_S) -> None:
        self._meter = meter
        self._slack_bytes = slack_bytes
        self._poll_s = poll_s

    def free_bytes(self, gpu_id: int) -> Bytes:
        """Return what is really free on a GPU now."""
        return max(0, self._meter.gpus[gpu_id].memory_bytes - self._meter.read()[gpu_id].used_bytes)

    async def used(self, gpu_ids: Sequence[int]) -> dict[int, Bytes]:
        """Return the memory in use on these GPUs now, to be remembered before an engine starts."""
        readings = await read_aside(self._meter)
        return {gpu_id: readings[gpu_id].used_bytes for gpu_id in gpu_ids}

    async def back(self, before: Mapping[int, Bytes], *, within_s: float) -> dict[int, Bytes]:
        """Wait until no GPU uses more than before.

        Args:
            before: memory in use to come back to, by GPU.
            within_s: how long to wait at most.

        Returns:
            By how much GPUs are still above it when time is up, slack left out; empty where all is back.
        """
        loop = asyncio.get_running_loop()
        until_s = loop.time() + within_s
        while True:
            now = await self.used(list(before))
            above = {
                gpu_id: now[gpu_id] - most for gpu_id, most in before.items() if now[gpu_id] - most > self._slack_bytes
            }
            if not above or loop.time() >= until_s:
                return above
            await asyncio.sleep(min(self._poll_s, max(0.0, until_s - loop.time())))
