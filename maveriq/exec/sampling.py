"""How busy GPUs were of late, as their driver tells it: what placement looks at (SPEC 5)."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence

from maveriq.domain.hardware import LoadWindow
from maveriq.errors import MaveriqError
from maveriq.exec.gpus import GpuMeter, GpuReading
from maveriq.units import MICROS_PER_SECOND


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
