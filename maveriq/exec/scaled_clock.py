"""The clock of a run: the event loop's, at the run's pace."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from maveriq.units import MICROS_PER_SECOND, Micros, seconds


class ScaledClock:
    """Tells microseconds since it was made; it never goes back.

    Args:
        time_scale: real seconds per second of the run.
    """

    def __init__(self, time_scale: float) -> None:
        self.time_scale = time_scale
        self._loop = asyncio.get_running_loop()
        self._started_s = self._loop.time()
        self._now_us: Micros = 0

    @property
    def now_us(self) -> Micros:
        """The instant of the run."""
        passed_s = (self._loop.time() - self._started_s) / self.time_scale
        self._now_us = max(self._now_us, int(passed_s * MICROS_PER_SECOND))
        return self._now_us

    def call_at(self, time_us: Micros, what: Callable[[], None]) -> asyncio.TimerHandle:
        """Let something happen at an instant of the run."""

        def due() -> None:
            # It is that time, though a clock that is read in fractions may fall just short.
            self._now_us = max(self._now_us, time_us)
            what()

        return self._loop.call_at(self._loop_time_s(time_us), due)

    async def sleep_until(self, time_us: Micros) -> None:
        """Wait for an instant of the run."""
        await asyncio.sleep(max(0.0, self._loop_time_s(time_us) - self._loop.time()))

    def _loop_time_s(self, time_us: Micros) -> float:
        return self._started_s + seconds(time_us) * self.time_scale

    def real_s(self, time_us: Micros) -> float:
        """Return how many real seconds a duration of the run takes."""
        return seconds(time_us) * self.time_scale
