"""How many requests a second each endpoint got over the last minutes."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from maveriq.units import MICROS_PER_SECOND, Micros

if TYPE_CHECKING:
    import numpy as np

WINDOW_US: Micros = 300 * MICROS_PER_SECOND
"""How far back requests count."""

_SLOT_US: Micros = 10 * MICROS_PER_SECOND


@dataclass(slots=True)
class _Arrivals:
    """The requests of an endpoint: when the first one came, and how many in each slot of time that counts."""

    first_us: Micros
    total: int = 0
    slots: deque[list[int]] = field(default_factory=deque)  # number of the slot, and requests


class ArrivalRates:
    """Counts the requests of each endpoint (mutable). Times never go back."""

    def __init__(self) -> None:
        self._arrivals: dict[int, _Arrivals] = {}

    def arrived(self, endpoint_id: int, now_us: Micros) -> None:
        """Count a request."""
        arrivals = self._arrivals.get(endpoint_id)
        if arrivals is None:
            arrivals = self._arrivals[endpoint_id] = _Arrivals(now_us)
        slot = now_us // _SLOT_US
        if arrivals.slots and arrivals.slots[-1][0] == slot:
            arrivals.slots[-1][1] += 1
        else:
            arrivals.slots.append([slot, 1])
            self._forget(arrivals, now_us)
        arrivals.total += 1

    def arrived_together(self, endpoint_id: int, times_us: np.ndarray[Any, Any]) -> None:
        """Count requests that came at some times, in order."""
        import numpy as np

        _, firsts, counts = np.unique(times_us // _SLOT_US, return_index=True, return_counts=True)
        for first_us, count in zip(times_us[firsts].tolist(), counts.tolist(), strict=True):
            self.arrived(endpoint_id, first_us)
            arrivals = self._arrivals[endpoint_id]
            arrivals.slots[-1][1] += count - 1
            arrivals.total += count - 1

    def rps(self, endpoint_id: int, now_us: Micros) -> float | None:
        """Return the mean rate over the last minutes, or since the first request; None where there was none."""
        arrivals = self._arrivals.get(endpoint_id)
        if arrivals is None:
            return None
        self._forget(arrivals, now_us)
        span_us = min(WINDOW_US, max(_SLOT_US, now_us - arrivals.first_us))
        return arrivals.total * MICROS_PER_SECOND / span_us if arrivals.total else None

    @staticmethod
    def _forget(arrivals: _Arrivals, now_us: Micros) -> None:
        """Forget slots that ended before the window."""
        while arrivals.slots and (arrivals.slots[0][0] + 1) * _SLOT_US <= now_us - WINDOW_US:
            arrivals.total -= arrivals.slots.popleft()[1]
