"""How busy GPUs were: the recent history that placement looks at (SPEC 5)."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

from maveriq.units import MICROS_PER_SECOND, Micros


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadWindow:
    """A GPU's load is the share of the last `samples` whole seconds in which it was busy.

    A second counts as busy when more than `busy_share` of it was (the testbed: utilisation over 1 %).
    """

    samples: int = 120
    busy_share: float = 0.01


class BusyHistory:
    """When a deployment was executing, as far back as the window reaches, and for how long in all."""

    __slots__ = ("_horizon_us", "_spans", "_total_us")

    def __init__(self, window: LoadWindow) -> None:
        self._horizon_us = (window.samples + 1) * MICROS_PER_SECOND
        self._spans: deque[tuple[Micros, Micros]] = deque()
        self._total_us = 0

    def add(self, start_us: Micros, end_us: Micros) -> None:
        """Note an execution that just ended; ends must not go back."""
        spans = self._spans
        spans.append((start_us, end_us))
        self._total_us += end_us - start_us
        while spans[0][1] < end_us - self._horizon_us:
            spans.popleft()

    @property
    def total_us(self) -> Micros:
        """All time spent executing since the start."""
        return self._total_us

    @property
    def spans(self) -> Iterable[tuple[Micros, Micros]]:
        """Recent executions (start, end), oldest first; some may lie before the window."""
        return self._spans


def recent_load(spans: Iterable[tuple[Micros, Micros]], now_us: Micros, window: LoadWindow) -> float:
    """Return the share of the last whole seconds before `now_us` in which a GPU was busy.

    Args:
        spans: when the GPU was executing; spans must not overlap, their order plays no part.
        now_us: the present; an execution under way ends here.
        window: how far to look back, and what counts as busy.
    """
    last_second = now_us // MICROS_PER_SECOND
    first_second = last_second - window.samples
    busy_us = [0] * window.samples
    for start_us, end_us in spans:
        for second in range(
            max(start_us // MICROS_PER_SECOND, first_second), min(-(-end_us // MICROS_PER_SECOND), last_second)
        ):
            begin = second * MICROS_PER_SECOND
            overlap = min(end_us, begin + MICROS_PER_SECOND) - max(start_us, begin)
            busy_us[second - first_second] += overlap
    threshold_us = window.busy_share * MICROS_PER_SECOND
    return sum(amount > threshold_us for amount in busy_us) / window.samples
