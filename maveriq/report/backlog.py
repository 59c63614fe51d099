"""The number of requests waiting over time, and the stretches in which they piled up."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from maveriq.domain.records import NOT_YET, RunRecord
from maveriq.domain.requests import RequestStatus
from maveriq.units import MICROS_PER_SECOND, Micros

Array: TypeAlias = npt.NDArray[Any]

_INSTANTS = 4096  # one each 0.03 % of the arrivals' time
_CALM_PERCENTILE = 10
_BEYOND_CHANCE = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Backlog:
    """A stretch with more waiting than in the calmest tenth of the time.

    Args:
        duration_us: its length; one that stands when arrivals end lasts until it has drained.
        lasted_us: its length while requests still arrived.
        peak: most requests waiting in it.
        stands: it is there when arrivals end.
        beyond_chance: its peak exceeds twice `Queue.spread` times the square root of the requests
            that arrived in it. Queues that keep up have backlogs too, but a random walk of m steps
            strays only about sqrt(m). The rule is the same for 50 requests and for a million.
    """

    duration_us: float
    lasted_us: float
    peak: int
    stands: bool
    beyond_chance: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Queue:
    """The number waiting, and the number arrived so far, at instants over the arrivals' time.

    `peak` is exact, not read off the instants. `drained_us` is when the last request stopped
    waiting, or the end of the run. `spread` is the standard deviation of a step of the random walk
    that the queue is between two arrivals, in requests: sqrt(1 + cv²) with Poisson arrivals and the
    coefficient of variation cv of the service times. Burstier arrivals than that are no chance.
    """

    instants_us: Array
    arrived: Array
    waiting: Array
    peak: int
    drained_us: Micros
    spread: float

    @property
    def span_us(self) -> float:
        """The time in which requests arrived, at least 1 µs."""
        return max(1.0, float(self.instants_us[-1] - self.instants_us[0]))

    @property
    def left(self) -> int:
        """Requests waiting when the last one had arrived."""
        return int(self.waiting[-1])

    def backlogs(self) -> list[Backlog]:
        """Return the stretches with more waiting than in the calmest tenth of the time."""
        calm = float(np.percentile(self.waiting, _CALM_PERCENTILE)) if self.span_us > 1 else 0.0
        edges = np.flatnonzero(np.diff(self.waiting > calm, prepend=False, append=False))
        pairs = zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True)
        return [self._backlog(since, until, calm) for since, until in pairs]

    def _backlog(self, since: int, until: int, calm: float) -> Backlog:
        stands = until == len(self.waiting)
        arrived = int(self.arrived[until - 1]) - (int(self.arrived[since - 1]) if since else 0)
        peak = int(self.waiting[since:until].max())
        since_us, until_us = self.instants_us[[since, min(until, len(self.waiting) - 1)]].tolist()
        return Backlog(
            duration_us=(self.drained_us if stands else until_us) - since_us,
            lasted_us=until_us - since_us,
            peak=peak,
            stands=stands,
            beyond_chance=peak - calm > _BEYOND_CHANCE * self.spread * arrived**0.5,
        )

    def later_half(self) -> tuple[float, float]:
        """Return the arrival rate and the growth of the number waiting (least squares), both per second."""
        half = len(self.waiting) // 2
        times_s = (self.instants_us[half:] - self.instants_us[half]) / MICROS_PER_SECOND
        if times_s[-1] <= 0:
            return 0.0, 0.0
        centred = times_s - times_s.mean()
        rate = (self.arrived[-1] - self.arrived[half]) / times_s[-1]
        return float(rate), float(centred @ self.waiting[half:] / (centred @ centred))


def queue_of(run: RunRecord, *, model: str | None = None) -> Queue | None:
    """Return the queue of a run, or of one model's requests in it; None where no request waited.

    Refused requests never wait. The others wait from their arrival to their start; one that never
    started, to its end, or to the end of the run.
    """
    table = run.requests
    chosen = _waits(run, model)
    if not chosen.any():
        return None
    start_us, finish_us = table.start_us[chosen], table.finish_us[chosen]
    served = (start_us != NOT_YET) & (finish_us != NOT_YET)
    return _queue(
        np.sort(table.arrival_us[chosen]),
        _departures_us(start_us, finish_us),
        ended_us=run.ended_us,
        spread=_spread((finish_us - start_us)[served]),
    )


def waiting_at(run: RunRecord, instants_us: Array) -> Array:
    """Return the number of requests waiting at each of some instants."""
    table = run.requests
    chosen = _waits(run, None)
    arrivals_us = np.sort(table.arrival_us[chosen])
    departures_us = _departures_us(table.start_us[chosen], table.finish_us[chosen])
    arrived = np.searchsorted(arrivals_us, instants_us, side="right")
    waiting: Array = arrived - np.searchsorted(departures_us, instants_us, side="right")
    return waiting


def _waits(run: RunRecord, model: str | None) -> Array:
    chosen: Array = run.requests.status != RequestStatus.REFUSED.value
    if model is None:
        return chosen
    return chosen & np.isin(run.requests.endpoint_id, [one for one, name in run.models.items() if name == model])


def _departures_us(start_us: Array, finish_us: Array) -> Array:
    """Return when requests stopped waiting, in order; never for one that neither started nor ended."""
    ended_us = np.where(finish_us != NOT_YET, finish_us, np.iinfo(np.int64).max)
    return np.sort(np.where(start_us != NOT_YET, start_us, ended_us))


def _spread(services_us: Array) -> float:
    # Sorted, so that the order of rows cannot change the last digit of a sum.
    ordered = np.sort(services_us)
    return float(np.hypot(1.0, ordered.std() / max(1.0, ordered.mean()))) if len(ordered) else 1.0


def _queue(arrivals_us: Array, departures_us: Array, *, ended_us: Micros, spread: float) -> Queue:
    instants_us = np.linspace(arrivals_us[0], arrivals_us[-1], _INSTANTS)
    arrived = np.searchsorted(arrivals_us, instants_us, side="right")
    at_arrivals = np.arange(1, len(arrivals_us) + 1) - np.searchsorted(departures_us, arrivals_us, side="right")
    return Queue(
        instants_us=instants_us,
        arrived=arrived,
        waiting=arrived - np.searchsorted(departures_us, instants_us, side="right"),
        peak=int(at_arrivals.max()),
        drained_us=max(int(arrivals_us[-1]), min(int(departures_us[-1]), ended_us)),
        spread=spread,
    )
