"""The curves that show two runs at a glance: latency distributions, and requests waiting over time."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from maveriq.domain.records import RunRecord
from maveriq.domain.requests import RequestStatus
from maveriq.report.saturation import waiting_at
from maveriq.units import MICROS_PER_SECOND

Array: TypeAlias = npt.NDArray[Any]

_MIN_S = 1e-6
_LOOKS_PER_POINT = 16
_FEW = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class Curves:
    """One quantity of both runs at the same places; `x` ascends, on a logarithmic axis if `log_x`."""

    title: str
    x_label: str
    x: Array
    sim: Array
    real: Array
    top: float
    log_x: bool

    def ticks(self) -> list[float]:
        """Return round numbers on the axis: of each decade 1, or 1, 2 and 5; or some six equal steps."""
        low, high = float(self.x[0]), float(self.x[-1])
        if self.log_x:
            decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
            steps = (1, 2, 5) if high < 1000 * low else (1,)
            return [tick for decade in decades for tick in (10.0**decade * k for k in steps) if low <= tick <= high]
        step = 10.0 ** math.floor(math.log10(high / 6))
        step = next(step * k for k in (1, 2, 5, 10) if high / (step * k) <= 7)
        return [step * k for k in range(int(high / step) + 1)]


def latency_curves(sim: RunRecord, real: RunRecord, *, points: int) -> Curves | None:
    """Return the distribution functions of latency over completed requests; None where a run completed none."""
    ours, theirs = _latencies_s(sim), _latencies_s(real)
    if not len(ours) or not len(theirs):
        return None
    # The few shortest would stretch a logarithmic axis; the longest are what matters.
    low = min(latencies[len(latencies) // _FEW] for latencies in (ours, theirs))
    high = max(ours[-1], theirs[-1])
    x = np.geomspace(max(low, _MIN_S) / 1.05, max(high, _MIN_S) * 1.05, points)
    return Curves(
        title="Share of completed requests up to a latency",
        x_label="s",
        x=x,
        sim=_share_up_to(ours, x),
        real=_share_up_to(theirs, x),
        top=1.0,
        log_x=True,
    )


def queue_curves(sim: RunRecord, real: RunRecord, *, points: int) -> Curves:
    """Return how many requests waited over time, from the start to the end of the longer run.

    Each point is the most that waited in its share of the time: short peaks show.
    """
    ended_us = max(sim.ended_us, real.ended_us, 1)
    instants_us = np.linspace(0, ended_us, points)
    closely_us = np.linspace(0, ended_us, points * _LOOKS_PER_POINT)
    ours, theirs = (waiting_at(run, closely_us).reshape(points, -1).max(axis=1) for run in (sim, real))
    return Curves(
        title="Requests waiting over time",
        x_label="s",
        x=instants_us / MICROS_PER_SECOND,
        sim=ours,
        real=theirs,
        top=float(max(ours.max(), theirs.max(), 1)),
        log_x=False,
    )


def _latencies_s(run: RunRecord) -> Array:
    table = run.requests
    done = table.status == RequestStatus.COMPLETED.value
    return np.sort((table.finish_us - table.arrival_us)[done]) / MICROS_PER_SECOND


def _share_up_to(ordered: Array, x: Array) -> Array:
    shares: Array = np.searchsorted(ordered, x, side="right") / len(ordered)
    return shares
