"""Whether the cluster kept up with its requests, judged by the requests waiting over time.

The mean latency of an overloaded run grows with the length of the run, so it is read together with
the saturation. Only backlogs beyond chance count (`Backlog.beyond_chance`). A run is

- overloaded, if such a backlog stands when arrivals end, has lasted for a quarter of the arrivals'
  time or longer, is still at least half of its peak, and in the later half of that time the number
  waiting grew by over 1 % of the arrival rate;
- backlogged, if not, but such backlogs filled a tenth of the arrivals' time or more. Those shorter
  than a fiftieth of it do not count: the pause after a deploy, say, that drains at once;
- stable otherwise, and always in a closed loop, whose clients wait for their answers.

On simulated M/D/1 and M/M/1 queues of 50, 200 and 1,000 requests, 94 % or more of the runs at load
0.9 are called stable, and all at load 0.5. At load 1.3 all runs of 1,000 requests are called
overloaded; of 200 requests 95 % and 69 %, of 50 only 53 % and 31 %: chance can do as much there.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, TypeAlias, assert_never

import numpy as np
import numpy.typing as npt

from maveriq.domain.records import NOT_YET, RunRecord
from maveriq.domain.requests import RequestStatus
from maveriq.report.bottlenecks import Bottlenecks, find_bottlenecks
from maveriq.report.formatting import share
from maveriq.report.metrics import busiest_gpu
from maveriq.scenario.options import Options
from maveriq.units import MICROS_PER_SECOND, Micros

Array: TypeAlias = npt.NDArray[Any]

_INSTANTS = 4096  # one each 0.03 % of the arrivals' time
_BASELINE_PERCENTILE = 10
_BEYOND_CHANCE = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Backlog:
    """A stretch with more waiting than in the quietest tenth of the time.

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
        """Return the stretches with more waiting than in the quietest tenth of the time."""
        baseline = float(np.percentile(self.waiting, _BASELINE_PERCENTILE)) if self.span_us > 1 else 0.0
        edges = np.flatnonzero(np.diff(self.waiting > baseline, prepend=False, append=False))
        pairs = zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True)
        return [self._backlog(since, until, baseline) for since, until in pairs]

    def _backlog(self, since: int, until: int, baseline: float) -> Backlog:
        stands = until == len(self.waiting)
        arrived = int(self.arrived[until - 1]) - (int(self.arrived[since - 1]) if since else 0)
        peak = int(self.waiting[since:until].max())
        since_us, until_us = self.instants_us[[since, min(until, len(self.waiting) - 1)]].tolist()
        return Backlog(
            duration_us=(self.drained_us if stands else until_us) - since_us,
            lasted_us=until_us - since_us,
            peak=peak,
            stands=stands,
            beyond_chance=peak - baseline > _BEYOND_CHANCE * self.spread * arrived**0.5,
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
    return chosen & np.isin(
        run.requests.endpoint_id, [endpoint_id for endpoint_id, name in run.models.items() if name == model]
    )


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


_BRIEF_SHARE = 0.02
_BACKLOGGED_SHARE = 0.1
_LASTING_SHARE = 0.25
_GROWING_SHARE = 0.01
_STANDING_SHARE = 0.5


class SaturationLabel(StrEnum):
    """Whether the cluster kept up with its requests."""

    STABLE = "stable"
    BACKLOGGED = "backlogged"
    OVERLOADED = "overloaded"


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """The numbers that the saturation follows from.

    Args:
        arrival_rate_per_s: requests arriving per second in the later half of the arrivals' time.
        drift_per_s: growth of the number waiting in that half (least-squares slope).
        drift_share: that growth as a share of the arrival rate, by which the cluster fell behind.
        peak_waiting: most requests waiting at once while requests arrived.
        left_waiting: requests waiting when the last one had arrived.
        backlog_share: share of the arrivals' time with a backlog that counts, at most 1.
        worst_backlog_s: how long the longest backlog beyond chance lasted, until it had drained.
        busiest_gpu: the GPU that was busy longest while requests arrived; None if not sampled.
        busiest_gpu_share: its share of that time.
    """

    arrival_rate_per_s: float
    drift_per_s: float
    drift_share: float
    peak_waiting: int
    left_waiting: int
    backlog_share: float
    worst_backlog_s: float
    busiest_gpu: int | None
    busiest_gpu_share: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Saturation:
    """The load state, a sentence with its numbers, the evidence, and what held the run back.

    `evidence` is None if no request was served. `bottlenecks` is of whole runs only.
    """

    label: SaturationLabel
    sentence: str
    evidence: Evidence | None
    bottlenecks: Bottlenecks = field(default_factory=Bottlenecks)


def assess_saturation(run: RunRecord, *, model: str | None = None, options: Options | None = None) -> Saturation:
    """Return the saturation of a run, or of one model's requests in it. Refused requests do not count.

    Args:
        run: its records.
        model: judge the requests of this model alone.
        options: the options of the run as resolved, for advice; None gives none.
    """
    queue = queue_of(run, model=model)
    if queue is None:
        return Saturation(
            label=SaturationLabel.STABLE, sentence="No request was served: all were refused.", evidence=None
        )
    backlogs = [backlog for backlog in queue.backlogs() if backlog.beyond_chance]
    evidence = _evidence(run, queue, backlogs)
    label = _label(queue, backlogs, evidence)
    sentence = _sentence(label, evidence)
    if options is not None and options.concurrency is not None:
        label = SaturationLabel.STABLE
        sentence = _sentence_of_closed_loop(evidence, options.concurrency)
    refused = int((run.requests.status == RequestStatus.REFUSED.value).sum()) if model is None else 0
    note = f" {refused:,} of {len(run.requests):,} requests were refused and count for nothing here." if refused else ""
    return Saturation(
        label=label,
        sentence=sentence + note,
        evidence=evidence,
        bottlenecks=(
            find_bottlenecks(run, options, keeps_up=label is SaturationLabel.STABLE) if model is None else Bottlenecks()
        ),
    )


def _evidence(run: RunRecord, queue: Queue, backlogs: list[Backlog]) -> Evidence:
    rate, drift = queue.later_half()
    counted_us = sum(b.duration_us for b in backlogs if b.duration_us >= _BRIEF_SHARE * queue.span_us)
    gpu_id, gpu_share = busiest_gpu(run.gpu_samples, until_us=int(queue.instants_us[-1])) or (None, None)
    return Evidence(
        arrival_rate_per_s=rate,
        drift_per_s=drift,
        drift_share=drift / rate if rate else 0.0,
        peak_waiting=queue.peak,
        left_waiting=queue.left,
        backlog_share=min(1.0, counted_us / queue.span_us),
        worst_backlog_s=max((b.duration_us for b in backlogs), default=0.0) / MICROS_PER_SECOND,
        busiest_gpu=gpu_id,
        busiest_gpu_share=gpu_share,
    )


def _label(queue: Queue, backlogs: list[Backlog], evidence: Evidence) -> SaturationLabel:
    unabated = any(
        backlog.stands
        and backlog.lasted_us >= _LASTING_SHARE * queue.span_us
        and queue.left >= _STANDING_SHARE * backlog.peak
        for backlog in backlogs
    )
    if unabated and evidence.drift_share > _GROWING_SHARE:
        return SaturationLabel.OVERLOADED
    return SaturationLabel.BACKLOGGED if evidence.backlog_share >= _BACKLOGGED_SHARE else SaturationLabel.STABLE


def _sentence(label: SaturationLabel, evidence: Evidence) -> str:
    others = max(0, evidence.left_waiting - 1)  # the last arrival itself waits at that instant
    left = f"{others:,} still waited" if others else "none still waited"
    match label:
        case SaturationLabel.STABLE:
            found = f"No backlog beyond chance: at most {evidence.peak_waiting:,} waited at once"
        case SaturationLabel.BACKLOGGED:
            found = (
                f"The cluster fell behind for {share(evidence.backlog_share)} of the time, at worst for "
                f"{evidence.worst_backlog_s:,.0f} s with up to {evidence.peak_waiting:,} waiting"
            )
        case SaturationLabel.OVERLOADED:
            found = (
                f"The cluster cannot keep up: of {evidence.arrival_rate_per_s:.3g} requests/s, "
                f"{evidence.drift_per_s:.3g}/s ({share(evidence.drift_share)}) were left waiting, "
                f"so latencies grow with the length of the run"
            )
        case _ as never:
            assert_never(never)
    return f"{found}; {left} when the last arrived.{_busiest(evidence)}"


def _sentence_of_closed_loop(evidence: Evidence, clients: int) -> str:
    """Say what waited where clients wait for their answers, so that no backlog can grow."""
    return (
        f"A closed loop cannot fall behind: its {clients:,} clients have at most {clients:,} requests in flight, of "
        f"which up to {evidence.peak_waiting:,} waited at once.{_busiest(evidence)}"
    )


def _busiest(evidence: Evidence) -> str:
    if evidence.busiest_gpu is None:
        return ""
    return f" The busiest GPU, {evidence.busiest_gpu}, worked {share(evidence.busiest_gpu_share)} of the time."
