"""The clock of a run: the event loop's clock, in microseconds since the start of the run and scaled."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from maveriq.units import MICROS_PER_SECOND, Micros, seconds


class ScaledClock:
    """Counts microseconds of the run since it was created, but for the time in which it is held; it never goes back.

    Args:
        time_scale: real seconds per second of the run.
    """

    def __init__(self, time_scale: float) -> None:
        self.time_scale = time_scale
        self._loop = asyncio.get_running_loop()
        self._started_s = self._loop.time()
        self._now_us: Micros = 0
        self.is_held = False

    def hold(self) -> None:
        """Stand still, until `release`; nothing is scheduled meanwhile."""
        self._now_us = self.now_us
        self.is_held = True

    def release(self) -> None:
        """Go on."""
        self.is_held = False
        self._started_s = self._loop.time() - seconds(self._now_us) * self.time_scale

    @property
    def now_us(self) -> Micros:
        """The current time of the run."""
        if self.is_held:
            return self._now_us
        elapsed_s = (self._loop.time() - self._started_s) / self.time_scale
        self._now_us = max(self._now_us, int(elapsed_s * MICROS_PER_SECOND))
        return self._now_us

    def call_at(self, time_us: Micros, callback: Callable[[], None]) -> asyncio.TimerHandle:
        """Schedule a callback; `now_us` is at least `time_us` when it runs."""

        def run_callback() -> None:
            # The float arithmetic of the loop's clock may give a time just before `time_us`.
            self._now_us = max(self._now_us, time_us)
            callback()

        return self._loop.call_at(self._loop_time_s(time_us), run_callback)

    async def sleep_until(self, time_us: Micros) -> None:
        """Sleep until a time of the run."""
        await asyncio.sleep(max(0.0, self._loop_time_s(time_us) - self._loop.time()))

    def _loop_time_s(self, time_us: Micros) -> float:
        return self._started_s + seconds(time_us) * self.time_scale

    def real_s(self, time_us: Micros) -> float:
        """Convert a duration of the run to real seconds."""
        return seconds(time_us) * self.time_scale
