"""What a run records of its GPUs: memory and work over time, and energy."""

from __future__ import annotations

from collections.abc import Sequence

from maveriq.control.fleet import Fleet
from maveriq.domain.records import GpuSample
from maveriq.errors import MaveriqError
from maveriq.exec.gpus import GpuMeter, GpuReading
from maveriq.exec.sampling import read_aside
from maveriq.units import Micros


class GpuRecord:
    """Samples of a cluster's GPUs; memory as its devices tell it where each GPU has its own, else as it was reserved.

    Args:
        fleet: what is deployed on them.
        count: how many they are.
        meter: reads real GPUs, None where there are none.
        own_devices: whether each GPU has a device of its own.
    """

    def __init__(self, fleet: Fleet, count: int, meter: GpuMeter | None, *, own_devices: bool) -> None:
        self.samples: list[GpuSample] = []
        self.notes: list[str] = []
        self._fleet = fleet
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
