"""When a request may go: the dispatcher's tick, delays and pauses (SPEC 6)."""

from __future__ import annotations

from maveriq.domain.hardware import DispatchTiming
from maveriq.units import Micros


class DispatchClock:
    """Turns "could go from then on" into the instant at which the dispatcher sends it."""

    __slots__ = ("_last_tick", "_paused_until_us", "_timing")

    def __init__(self, timing: DispatchTiming) -> None:
        self._timing = timing
        self._last_tick = -1
        self._paused_until_us = 0

    def pause(self, now_us: Micros) -> None:
        """Send nothing for a while: an engine just registered."""
        self._paused_until_us = max(self._paused_until_us, now_us + self._timing.pause_us)

    def earliest_us(self, arrival_us: Micros, release_us: Micros) -> Micros:
        """Return when a request may go.

        Args:
            arrival_us: when it arrived.
            release_us: when the last of its GPUs became free.
        """
        timing = self._timing
        ready_us = max(
            arrival_us + timing.after_arrival_us, release_us + timing.after_release_us, self._paused_until_us
        )
        if not timing.tick_us:
            return ready_us
        return max(-(-ready_us // timing.tick_us), self._last_tick + 1) * timing.tick_us

    def sent(self, now_us: Micros) -> None:
        """Note a dispatch: the tick is used up."""
        if self._timing.tick_us:
            self._last_tick = now_us // self._timing.tick_us
