"""When a request may go: the dispatcher's tick, delays and pauses (SPEC 6)."""

from __future__ import annotations

from maveriq.domain.hardware import DispatchTiming
from maveriq.units import Micros


class DispatchClock:
    """Turns "could go from then on" into the instant at which the dispatcher sends it."""

    __slots__ = ("_closed_until_us", "_timing")

    def __init__(self, timing: DispatchTiming) -> None:
        self._timing = timing
        self._closed_until_us = 0

    def pause(self, now_us: Micros) -> None:
        """Send nothing for a while: an engine just registered."""
        self._closed_until_us = max(self._closed_until_us, now_us + self._timing.pause_us)

    def earliest_us(self, arrival_us: Micros, release_us: Micros) -> Micros:
        """Return when a request may go.

        Args:
            arrival_us: when it arrived.
            release_us: when the last of its GPUs became free.
        """
        timing = self._timing
        ready_us = max(
            arrival_us + timing.after_arrival_us, release_us + timing.after_release_us, self._closed_until_us
        )
        tick_us = timing.tick_us
        return -(-ready_us // tick_us) * tick_us if tick_us else ready_us

    def sent(self, now_us: Micros) -> None:
        """Note a dispatch, at an instant at which it was allowed: until the next tick there is no other."""
        tick_us = self._timing.tick_us
        if tick_us:
            self._closed_until_us = (now_us // tick_us + 1) * tick_us
