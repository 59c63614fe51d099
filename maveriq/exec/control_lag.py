"""How late the control plane of a run was, and whether that distorts the results.

A simulated controller acts at once. A real one shares a processor with engines and the operating system: arrivals are
handled late, and the time from a dispatch to the message of its end is longer than the execution itself. At a time
scale below 1 the run's seconds are shorter, and the same lag is a larger part of them.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass

import numpy as np

from maveriq.units import MICROS_PER_SECOND, Micros

DISTORTS_FROM = 0.02
"""Share of a mean service time that the lag of a request must reach to be reported as a distortion.

Queues magnify errors of service times: 4 % shorter ones were measured to halve a queue (docs/comparing.md).
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class LagSummary:
    """The lag of a run, in seconds of the run; times `time_scale` it is in real seconds.

    Args:
        time_scale: real seconds per second of the run.
        arrival_mean_s: how late an arrival was handled, on average.
        arrival_p99_s: its 99th percentile.
        execution_mean_s: how much longer an execution took than its engine, on average.
        execution_p99_s: its 99th percentile.
        service_mean_s: how long an execution should take, on average.
    """

    time_scale: float
    arrival_mean_s: float
    arrival_p99_s: float
    execution_mean_s: float
    execution_p99_s: float
    service_mean_s: float

    @property
    def share(self) -> float:
        """The mean lag of a request as a share of the mean service time."""
        return (self.arrival_mean_s + self.execution_mean_s) / self.service_mean_s if self.service_mean_s else 0.0

    @property
    def distorts(self) -> bool:
        """Whether the lag is too large to be ignored."""
        return self.share >= DISTORTS_FROM

    def note(self) -> str:
        """Return a sentence with the figures, and a warning where they distort the results."""
        real_ms = 1e3 * self.time_scale
        figures = (
            f"control plane lag: arrivals {real_ms * self.arrival_mean_s:.1f} ms late "
            f"(p99 {real_ms * self.arrival_p99_s:.1f}), executions {real_ms * self.execution_mean_s:.1f} ms longer "
            f"(p99 {real_ms * self.execution_p99_s:.1f}) in real time, {100 * self.share:.1f} % of a mean service time"
        )
        if not self.distorts:
            return figures
        remedy = "a larger --time-scale or a less busy host" if self.time_scale < 1 else "a less busy host"
        return f"WARNING: {figures}; this distorts latencies, and queues magnify it; use {remedy}"


class ControlLag:
    """Collects the lag of a run.

    Args:
        time_scale: real seconds per second of the run.
        planned: engines are emulated and should take exactly the planned time; else each engine's own measurement
            of an execution counts.
    """

    def __init__(self, time_scale: float, *, planned: bool) -> None:
        self._time_scale = time_scale
        self._planned = planned
        self._running: dict[int, tuple[Micros, Micros]] = {}  # by deployment: start and planned duration
        self._arrivals_us = array("q")
        self._executions_us = array("q")
        self._services_us = array("q")

    def arrived(self, due_us: Micros, now_us: Micros) -> None:
        """Record when an arrival was due, and when it is handled."""
        self._arrivals_us.append(max(0, now_us - due_us))

    def execution_started(self, deployment_id: int, now_us: Micros, planned_us: Micros) -> None:
        """Record that an execution is dispatched."""
        self._running[deployment_id] = (now_us, planned_us)

    def execution_ended(self, deployment_id: int, now_us: Micros, engine_s: float) -> None:
        """Record that the end of an execution is known; `engine_s` is its duration by its engine, in real seconds."""
        started_us, planned_us = self._running.pop(deployment_id, (now_us, 0))
        service_us = planned_us if self._planned else round(engine_s / self._time_scale * MICROS_PER_SECOND)
        self._executions_us.append(max(0, now_us - started_us - service_us))
        self._services_us.append(service_us)

    def request_finished(self, late_us: Micros, service_us: Micros) -> None:
        """Record how late the last token of a request of a continuous engine is known, and how long it was computed."""
        self._executions_us.append(late_us)
        self._services_us.append(service_us)

    def summary(self) -> LagSummary | None:
        """Return the lag of the run; None where nothing was executed."""
        if not self._executions_us:
            return None
        return LagSummary(
            time_scale=self._time_scale,
            arrival_mean_s=_mean_s(self._arrivals_us),
            arrival_p99_s=_p99_s(self._arrivals_us),
            execution_mean_s=_mean_s(self._executions_us),
            execution_p99_s=_p99_s(self._executions_us),
            service_mean_s=_mean_s(self._services_us),
        )


def _mean_s(durations_us: array[int]) -> float:
    return float(np.mean(durations_us)) / MICROS_PER_SECOND if durations_us else 0.0


def _p99_s(durations_us: array[int]) -> float:
    return float(np.percentile(durations_us, 99)) / MICROS_PER_SECOND if durations_us else 0.0
