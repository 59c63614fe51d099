"""The figures of a run by which experiments compare systems: names, units, and which direction is better."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from maveriq.errors import UnknownNameError


@dataclass(frozen=True, slots=True, kw_only=True)
class Measure:
    """A figure of a run.

    Args:
        name: its column in `Run.metrics` (the row "all").
        label: what tables and plots call it.
        unit: of the shown value, which is `factor` times that of the column.
        factor: see `unit`.
        more_is_better: for throughput and SLO attainment.
        in_points: a share; two systems are compared by their difference in points.
        is_queued: depends on how long requests wait.
        log: drawn over a logarithmic axis, since overloaded systems differ by orders of magnitude.
    """

    name: str
    label: str
    unit: str
    factor: float = 1.0
    more_is_better: bool = False
    in_points: bool = False
    is_queued: bool = True
    log: bool = False

    def improvement(self, ours: float, theirs: float) -> float | None:
        """Return by how much ours is better, in percent of theirs, or in points; None without a finite answer.

        A latency of 1 s against 4 s is 75 % better, a throughput of 3 against 2 requests a second 50 %.
        """
        if self.in_points:
            return 100 * (ours - theirs) * (1 if self.more_is_better else -1)
        if not theirs:
            return None
        change = 100 * (ours / theirs - 1)
        found = change if self.more_is_better else -change
        return found if math.isfinite(found) else None


MEASURES: Mapping[str, Measure] = MappingProxyType(
    {
        measure.name: measure
        for measure in (
            Measure(name="latency_mean_s", label="mean latency", unit="s", log=True),
            Measure(name="latency_p50_s", label="p50 latency", unit="s", log=True),
            Measure(name="latency_p95_s", label="p95 latency", unit="s", log=True),
            Measure(name="latency_p99_s", label="p99 latency", unit="s", log=True),
            Measure(name="throughput_per_s", label="throughput", unit="requests/s", more_is_better=True),
            Measure(name="cost_gib_s_mean", label="cost of a request", unit="GiB s", log=True),
            Measure(name="memory_mean_gib", label="memory held", unit="GiB", is_queued=False),
            Measure(name="gpu_hours", label="GPU-hours", unit="GPU h"),
            Measure(name="gpus_busy_mean", label="GPUs busy, mean", unit="GPUs"),
            Measure(name="gpus_busy_peak", label="GPUs busy, peak", unit="GPUs"),
            Measure(name="gpus_used", label="GPUs with models", unit="GPUs", is_queued=False),
            Measure(
                name="slo_attainment_of_completed", label="SLO met, of completed", unit="%", factor=100.0,
                more_is_better=True, in_points=True,
            ),
            Measure(
                name="slo_attainment", label="SLO met, of all", unit="%", factor=100.0, more_is_better=True,
                in_points=True,
            ),
            Measure(
                name="completed_share", label="served", unit="%", factor=100.0, more_is_better=True, in_points=True,
            ),
        )
    }
)  # fmt: skip
"""The measures by name."""


def measure_of(name: str) -> Measure:
    """Return a measure.

    Raises:
        UnknownNameError: there is none of this name.
    """
    if name not in MEASURES:
        raise UnknownNameError("figure", name, MEASURES)
    return MEASURES[name]
