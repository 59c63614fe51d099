"""Samples of GPUs during a run on real engines.

`GpuSampler` measures the recent load of real GPUs, which placement policies use (SPEC 5). `GpuRecorder` records memory
and busy share over time, and energy, for the results of a run.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence

from maveriq.control.deployment_manager import DeploymentManager
from maveriq.domain.cluster import LoadWindow
from maveriq.domain.records import GpuSample
from maveriq.errors import MaveriqError
from maveriq.exec.gpus import GpuMeter, GpuReading
from maveriq.units import MICROS_PER_SECOND, Micros


async def read_meter(meter: GpuMeter) -> Sequence[GpuReading]:
    """Return a reading of all GPUs; a slow meter is read in a thread so that it does not block the event loop."""
    return await asyncio.to_thread(meter.read) if meter.slow else meter.read()


class GpuSampler:
    """Samples real GPUs at regular intervals and keeps the samples of the load window.

    Args:
        meter: reads the GPUs.
        window: its length, the interval between samples, and the busy share from which a GPU counts as busy.
    """

    def __init__(self, meter: GpuMeter, window: LoadWindow | None = None) -> None:
        self._meter = meter
        self._window = window or LoadWindow()
        self._recent: deque[Sequence[GpuReading]] = deque(maxlen=self._window.samples)

    async def run(self) -> None:
        """Sample at every interval until cancelled. A slow reading delays the next sample; none are made up for."""
        loop = asyncio.get_running_loop()
        interval_s = self._window.sample_us / MICROS_PER_SECOND
        due_s = loop.time()
        while True:
            try:
                self.add(await read_meter(self._meter))
            except MaveriqError:  # no answer counts as idle
                self.add(())
            due_s = max(due_s + interval_s, loop.time())
            await asyncio.sleep(due_s - loop.time())

    def add(self, readings: Sequence[GpuReading]) -> None:
        """Add a sample."""
        self._recent.append(readings)

    def loads(self) -> list[float]:
        """Return the load of each GPU: the share of the window's samples in which it was busy (SPEC 5).

        Samples that are not taken yet, or whose busy share is unknown, count as idle, as in simulation.
        """
        threshold = self._window.busy_share
        busy = [0] * len(self._meter.gpus)
        for readings in self._recent:
            for gpu_id, reading in enumerate(readings):
                busy[gpu_id] += reading.busy_share is not None and reading.busy_share > threshold
        return [count / self._window.samples for count in busy]


class GpuRecorder:
    """Records samples of a cluster's GPUs. Memory is measured if each GPU has its own device, else the reserved memory.

    Args:
        manager: the deployments on the GPUs.
        count: number of GPUs.
        meter: reads real GPUs, None without GPUs.
        own_devices: whether each GPU of the cluster has its own device.
    """

    def __init__(self, manager: DeploymentManager, count: int, meter: GpuMeter | None, *, own_devices: bool) -> None:
        self.samples: list[GpuSample] = []
        self.notes: list[str] = []
        self._manager = manager
        self._meter = meter
        self._own_devices = own_devices
        self._first: Sequence[GpuReading] = ()
        self._last: Sequence[GpuReading] = ()
        self._sampled_us: Micros = 0
        self._busy_us = [0] * count

    @property
    def sampled_us(self) -> Micros:
        """The time of the last sample."""
        return self._sampled_us

    async def read(self) -> None:
        """Read the devices. If they no longer answer, add a note; the run goes on with reserved memory."""
        if self._meter is None:
            return
        try:
            self._last = await read_meter(self._meter)
        except MaveriqError as error:
            self._last = ()
            note = f"GPU memory is not measured throughout; some samples give reserved memory: {error}"
            self.notes = self.notes or [note]
        else:
            self._first = self._first or self._last

    def sample(self, now_us: Micros) -> None:
        """Add a sample with the last reading."""
        measured = self._own_devices and bool(self._last)
        for gpu_id, busy_before_us in enumerate(self._busy_us):
            busy_us = self._manager.busy_us(gpu_id, now_us)
            self._busy_us[gpu_id] = busy_us
            self.samples.append(
                GpuSample(
                    time_us=now_us,
                    gpu_id=gpu_id,
                    memory_bytes=self._last[gpu_id].used_bytes if measured else self._manager.used_bytes(gpu_id),
                    busy_share=(busy_us - busy_before_us) / (now_us - self._sampled_us),
                )
            )
        self._sampled_us = now_us

    def energy_j(self) -> tuple[float | None, ...]:
        """Return the energy of each device from the first reading to the last, None where it is unknown."""
        if not self._first or not self._last:
            return ()
        return tuple(_energy_used_j(first, last) for first, last in zip(self._first, self._last, strict=True))


def _energy_used_j(before: GpuReading, after: GpuReading) -> float | None:
    return None if before.energy_j is None or after.energy_j is None else after.energy_j - before.energy_j
