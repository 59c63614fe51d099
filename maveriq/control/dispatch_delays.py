"""When the dispatcher of exclusive engines may send a request (SPEC 6)."""

from __future__ import annotations

from maveriq.domain.cluster import DispatchTiming
from maveriq.units import Micros


class DispatchDelays:
    """Computes when a request may be dispatched: tick, delays and pauses of the dispatcher (SPEC 6)."""

    __slots__ = ("_closed_until_us", "_timing")

    def __init__(self, timing: DispatchTiming) -> None:
        self._timing = timing
        self._closed_until_us = 0

    @property
    def closed_until_us(self) -> Micros:
        """The time before which nothing is dispatched."""
        return self._closed_until_us

    def pause(self, now_us: Micros) -> None:
        """Dispatch nothing for a while, because an engine just registered."""
        self._closed_until_us = max(self._closed_until_us, now_us + self._timing.registration_delay_us)

    def earliest_us(self, arrival_us: Micros, release_us: Micros) -> Micros:
        """Return the earliest dispatch time of a request.

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
        """Record a dispatch; the next one is possible at the next tick."""
        tick_us = self._timing.tick_us
        if tick_us:
            self._closed_until_us = (now_us // tick_us + 1) * tick_us
