"""The figures of a run by which policies are compared (SPEC 9), as a row of the results."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from headline_plan import Load

from maveriq.domain.records import RunRecord
from maveriq.estimate.hardware_profile import HardwareProfile
from maveriq.report.metrics import summarise
from maveriq.report.saturation import assess_saturation
from maveriq.testbed.run_records import OUTPUT_TOKENS
from maveriq.units import duration_micros

RECORDED, BLIND, GRID = "recorded", "blind", "grid"


@dataclass(frozen=True, slots=True, kw_only=True)
class AchievedRow:
    """A run judged by one SLO; figures are None if nothing completed.

    Args:
        source: RECORDED, BLIND (its simulation) or GRID.
        run: the name of the recorded run; "" in the grid.
        policy: the name in the grid.
        model_set: the model set of the load.
        trace: the trace of the load.
        scale: the rate scale of the load.
        planned_slo_scale: the SLO scale that the policy planned for; 0 for none.
        slo_scale: the SLO scale that judges the requests.
        scheduled: scheduled requests.
        completed: completed requests.
        verdict: verdict of `maveriq sim`.
        mean_s: mean latency.
        p50_s: median latency.
        p95_s: 95th percentile of latency.
        p99_s: 99th percentile of latency.
        throughput_per_s: completed requests per second.
        cost_gib_s: mean latency times memory of a request.
        gpu_hours: GPU hours of all completed requests.
        met_of_completed: SLO attainment over completed requests, in percent.
        met_of_scheduled: SLO attainment over scheduled requests, in percent.
    """

    source: str
    run: str
    policy: str
    model_set: str
    trace: str
    scale: float
    planned_slo_scale: float
    slo_scale: float
    scheduled: int
    completed: int
    verdict: str
    mean_s: float | None
    p50_s: float | None
    p95_s: float | None
    p99_s: float | None
    throughput_per_s: float | None
    cost_gib_s: float | None
    gpu_hours: float
    met_of_completed: float | None
    met_of_scheduled: float | None

    @property
    def load(self) -> Load:
        """The workload of the run."""
        return Load(model_set=self.model_set, trace=self.trace, scale=self.scale)

    @property
    def gpu_s_of_a_request(self) -> float | None:
        """GPU seconds of a completed request."""
        return self.gpu_hours * 3600 / self.completed if self.completed else None


def achieved(
    record: RunRecord, *, source: str, run: str, policy: str, load: Load, planned_slo_scale: float, slo_scale: float
) -> AchievedRow:
    """Return the row of a run, judged by the SLOs of its requests (see `judged_by`).

    Raises:
        InvariantError: a request has no final status.
    """
    metrics = summarise(record).overall
    latency, slo = metrics.latency_s, metrics.slo
    return AchievedRow(
        source=source,
        run=run,
        policy=policy,
        model_set=load.model_set,
        trace=load.trace,
        scale=load.scale,
        planned_slo_scale=planned_slo_scale,
        slo_scale=slo_scale,
        scheduled=metrics.counts.scheduled,
        completed=metrics.counts.completed,
        verdict=assess_saturation(record).label.value,
        mean_s=latency.mean if latency else None,
        p50_s=latency.p50 if latency else None,
        p95_s=latency.p95 if latency else None,
        p99_s=latency.p99 if latency else None,
        throughput_per_s=metrics.throughput_per_s,
        cost_gib_s=metrics.cost_gib_s.mean if metrics.cost_gib_s else None,
        gpu_hours=metrics.operational_cost_gpu_hours,
        met_of_completed=_percent(slo.over_completed if slo else None),
        met_of_scheduled=_percent(slo.over_scheduled if slo else None),
    )


def judged_by(record: RunRecord, slo_scale: float, profile: HardwareProfile) -> RunRecord:
    """Return a run with another SLO for its requests (SPEC 7), so that two runs can be judged by the same SLO."""
    slo_us = np.zeros(len(record.requests), dtype=np.int64)
    for endpoint_id, model in record.models.items():
        slo_s = profile.slo_s(model, OUTPUT_TOKENS)
        if slo_s is not None:
            slo_us[record.requests.endpoint_id == endpoint_id] = duration_micros(slo_scale * slo_s)
    return replace(record, requests=replace(record.requests, slo_us=slo_us))


def _percent(share: float | None) -> float | None:
    return None if share is None else 100 * share
