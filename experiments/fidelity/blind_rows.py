"""What is kept of a blind run: rows of the results."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class BlindRow:
    """A run: errors in percent of the recording, of SLO attainment in points; None where it had no SLO.

    Args:
        run: its name.
        busiest_percent: of the time to the last arrival that the busiest GPU was busy, as recorded.
        sim_busiest_percent: likewise, simulated.
        recorded_verdict: that of `maveriq sim` on the recording.
        sim_verdict: on the simulation.
        recorded_completed: requests.
        sim_completed: requests.
        recorded_mean_s: latency.
        sim_mean_s: latency.
        mean_error: of it.
        mean_moves: by how many percent the simulated mean moves when service is stretched.
        recorded_p95_s: latency.
        sim_p95_s: latency.
        p95_error: of it.
        p95_moves: likewise.
        slo_error: attainment over completed requests.
        slo_all_error: over scheduled ones.
        deployments: that either has.
        same_configuration: of these, those that both have alike.
        same_gpus: of these, those on the recorded GPUs.
        placed_mean_error: of a simulation with the recorded GPUs, which is not blind: what is left is not placement's.
        placed_p95_error: likewise.
    """

    run: str
    busiest_percent: float
    sim_busiest_percent: float
    recorded_verdict: str
    sim_verdict: str
    recorded_completed: int
    sim_completed: int
    recorded_mean_s: float
    sim_mean_s: float
    mean_error: float
    mean_moves: float
    recorded_p95_s: float
    sim_p95_s: float
    p95_error: float
    p95_moves: float
    slo_error: float | None
    slo_all_error: float | None
    deployments: int
    same_configuration: int
    same_gpus: int
    placed_mean_error: float
    placed_p95_error: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceRow:
    """The median service time of a model in a run; `placed_error` with the recorded GPUs."""

    run: str
    model: str
    requests: int
    recorded_s: float
    sim_s: float
    error: float
    placed_error: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ElsewhereRow:
    """A deployment that went to other GPUs than the recorded one, or has another configuration."""

    run: str
    endpoint_id: int
    model: str
    recorded: str
    recorded_gpus: str
    sim: str
    sim_gpus: str


@dataclass(frozen=True, slots=True, kw_only=True)
class TossRow:
    """Errors of a run of MaverIQ over random orders of equally busy GPUs: from lowest to highest.

    `service_worst_*` is the largest error of a model's median service time in a toss, without its sign.
    """

    run: str
    tosses: int
    mean_error_low: float
    mean_error_high: float
    p95_error_low: float
    p95_error_high: float
    service_worst_low: float
    service_worst_high: float


@dataclass(frozen=True, slots=True, kw_only=True)
class GainRow:
    """A run of MaverIQ simulated with the plans of one estimator, and by how many percent those of another change it.

    `slo_gain` is in points of all scheduled requests; `other_plans` counts deployments that differ.
    """

    run: str
    other_plans: int
    mean_s: float
    mean_change: float
    p95_s: float
    p95_change: float
    cost_change: float
    gpu_hours_change: float
    slo_gain: float | None
