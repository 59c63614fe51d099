"""How busy GPUs were of late, as their driver tells it: what placement looks at (SPEC 5).

What a run records of its GPUs: memory and work over time, and energy.
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


async def read_aside(meter: GpuMeter) -> Sequence[GpuReading]:
    """Return a reading without holding up the event loop; a fast meter is read at once."""
    return await asyncio.to_thread(meter.read) if meter.slow else meter.read()


class GpuSampler:
    """Takes samples of GPUs, and remembers as many as the load window looks back.

    Args:
        meter: reads the GPUs.
        window: how load is measured; also says how often to sample.
    """

    def __init__(self, meter: GpuMeter, window: LoadWindow | None = None) -> None:
        self._meter = meter
        self._window = window or LoadWindow()
        self._recent: deque[Sequence[GpuReading]] = deque(maxlen=self._window.samples)

    async def run(self) -> None:
        """Sample on the beat until cancelled; a reading that takes long makes the next one late, not doubled."""
        loop = asyncio.get_running_loop()
        beat_s = self._window.sample_us / MICROS_PER_SECOND
        due_s = loop.time()
        while True:
            try:
                self.add(await read_aside(self._meter))
            except MaveriqError:  # a GPU that does not answer is not known to be busy
                self.add(())
            due_s = max(due_s + beat_s, loop.time())
            await asyncio.sleep(due_s - loop.time())

    def add(self, readings: Sequence[GpuReading]) -> None:
        """Note a sample."""
        self._recent.append(readings)

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


class GpuRecorder:
    """Samples of a cluster's GPUs; memory as its devices tell it where each GPU has its own, else as it was reserved.

    Args:
        manager: what is deployed on them.
        count: how many they are.
        meter: reads real GPUs, None where there are none.
        own_devices: whether each GPU has a device of its own.
    """

    def __init__(self, manager: DeploymentManager, count: int, meter: GpuMeter | None, *, own_devices: bool) -> None:
        self.samples: list[GpuSample] = []
        self.notes: list[str] = []
        self._fleet = manager
        self._meter = meter
        self._own_devices = own_devices
        self._first: Sequence[GpuReading] = ()
        self._last: Sequence[GpuReading] = ()
        self._sampled_us: Micros = 0
        self._busy_us = [0] * count

    @property
    def sampled_us(self) -> Micros:
        """When the last sample was taken."""
        return self._sampled_us

    async def read(self) -> None:
        """Read the devices anew; one that does not answer any more is a loss for the records, and not for the run."""
        if self._meter is None:
            return
        try:
            self._last = await read_aside(self._meter)
        except MaveriqError as error:
            self._last = ()
            note = f"from some time on memory is as reserved, not as measured: {error}"
            self.notes = self.notes or [note]
        else:
            self._first = self._first or self._last

    def sample(self, now_us: Micros) -> None:
        """Take a sample, by the last reading."""
        measured = self._own_devices and bool(self._last)
        for gpu_id, busy_before_us in enumerate(self._busy_us):
            busy_us = self._fleet.busy_us(gpu_id, now_us)
            self._busy_us[gpu_id] = busy_us
            self.samples.append(
                GpuSample(
                    time_us=now_us,
                    gpu_id=gpu_id,
                    memory_bytes=self._last[gpu_id].used_bytes if measured else self._fleet.used_bytes(gpu_id),
                    busy_share=(busy_us - busy_before_us) / (now_us - self._sampled_us),
                )
            )
        self._sampled_us = now_us

    def energy_j(self) -> tuple[float | None, ...]:
        """Return the joules of each device from the first reading to the last, None where it cannot tell."""
        if not self._first or not self._last:
            return ()
        return tuple(_energy_j(*both) for both in zip(self._first, self._last, strict=True))


def _energy_j(before: GpuReading, after: GpuReading) -> float | None:
    return None if before.energy_j is None or after.energy_j is None else after.energy_j - before.energy_j
