"""The rows of the result files of blind runs."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class BlindRow:
    """A run. Errors are in percent of the recording, errors of SLO attainment in points, None without an SLO.

    Args:
        run: its name.
        busiest_percent: share of the time to the last arrival in which the busiest GPU was busy, recorded.
        sim_busiest_percent: the same, simulated.
        recorded_verdict: verdict of `maveriq sim` on the recording.
        sim_verdict: verdict on the simulation.
        recorded_completed: completed requests, recorded.
        sim_completed: completed requests, simulated.
        recorded_mean_s: mean latency, recorded.
        sim_mean_s: mean latency, simulated.
        mean_error: error of the mean latency, as the mean over draws.
        mean_moves: change of the simulated mean latency, in percent, when service times are scaled.
        recorded_p95_s: p95 latency, recorded.
        sim_p95_s: p95 latency, simulated.
        p95_error: error of the p95 latency, as the mean over draws.
        p95_moves: change of the simulated p95 latency, in percent, when service times are scaled.
        slo_error: error of SLO attainment over completed requests.
        slo_all_error: error of SLO attainment over scheduled requests.
        deployments: deployments in the recording or the simulation.
        same_configuration: deployments with equal configurations in both.
        same_gpus: deployments on the recorded GPUs, as the mean over draws.
        mean_error_low: minimum error of the mean latency over draws.
        mean_error_high: maximum error of the mean latency over draws.
        mean_error_alone: error of the mean latency of `maveriq sim` with the default seed.
        p95_error_low: minimum error of the p95 latency over draws.
        p95_error_high: maximum error of the p95 latency over draws.
        p95_error_alone: error of the p95 latency of `maveriq sim` with the default seed.
        draws: number of draws; 1 if placement does not depend on sampled loads.
        placed_mean_error: error of the mean latency of a simulation on the recorded GPUs, which is not blind.
        placed_p95_error: error of the p95 latency of that simulation.
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
    same_gpus: float
    draws: int
    mean_error_low: float
    mean_error_high: float
    mean_error_alone: float
    p95_error_low: float
    p95_error_high: float
    p95_error_alone: float
    placed_mean_error: float
    placed_p95_error: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceRow:
    """The median service time of a model in a run, as the mean over draws; `placed_error` is on the recorded GPUs."""

    run: str
    model: str
    requests: int
    recorded_s: float
    sim_s: float
    error: float
    error_low: float
    error_high: float
    placed_error: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ElsewhereRow:
    """A deployment that `maveriq sim` places on other GPUs or in another configuration than recorded.

    `draws_there` counts the draws with the recorded GPUs and configuration.
    """

    run: str
    endpoint_id: int
    model: str
    recorded: str
    recorded_gpus: str
    sim: str
    sim_gpus: str
    draws: int
    draws_there: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacementRow:
    """How often a load sampler, given the recorded executions, leads to the recorded placement.

    Args:
        max_phase_s: maximum time between readings of two GPUs; 0 reads all at one instant.
        draws: number of draws of the phases.
        deployments: recorded deployments.
        expected: deployments on the recorded GPUs, as the mean over draws.
        always: deployments on the recorded GPUs in every draw.
        never: deployments on the recorded GPUs in no draw.
    """

    max_phase_s: float
    draws: int
    deployments: int
    expected: float
    always: int
    never: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ContentionRow:
    """How many percent longer engines take while other engines are busy, in the median over engines.

    Args:
        engine: the number of GPUs of the engine.
        co_located: the other engines that were executing in the middle of a request.
        engines: recorded engines with enough requests both with such other engines and alone.
        requests: their requests with such other engines.
        recorded_longer: increase of the median service time over that of the same engine alone, recorded.
        sim_longer: the same, simulated.
    """

    engine: str
    co_located: str
    engines: int
    requests: int
    recorded_longer: float
    sim_longer: float


@dataclass(frozen=True, slots=True, kw_only=True)
class GainRow:
    """A simulated run of MaverIQ, and its changes in percent if another estimator plans it.

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
