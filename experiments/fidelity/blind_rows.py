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
        same_gpus: of these, those on the recorded GPUs, their mean over draws.
        mean_error_low: the least over draws of where chance has it; `mean_error` is their mean.
        mean_error_high: the most.
        mean_error_alone: of `maveriq sim` with the usual seed.
        p95_error_low: likewise.
        p95_error_high: likewise.
        p95_error_alone: likewise.
        draws: how many; 1 where nothing is left to chance.
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
    """The median service time of a model in a run, its mean over draws; `placed_error` with the recorded GPUs."""

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
    """A deployment that `maveriq sim` puts on other GPUs than the recorded ones, or in another configuration.

    `draws_there` counts the draws that put it there.
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
    """How often a sampler of load, given the recorded executions, places as it was recorded.

    Args:
        most_phase_s: readings of GPUs are up to so far apart; 0 sees all at one instant.
        draws: of the phases.
        deployments: that were recorded.
        expected: of these, how many lie on the recorded GPUs, in the mean over draws.
        always: how many do so in every draw.
        never: in none.
    """

    max_phase_s: float
    draws: int
    deployments: int
    expected: float
    always: int
    never: int


@dataclass(frozen=True, slots=True, kw_only=True)
class NeighbourRow:
    """How many percent longer engines take beside others, in the median over engines.

    Args:
        engine: of how many GPUs.
        beside: which others were executing in the middle of a request.
        engines: recorded ones with enough requests beside such others and alone.
        requests: of theirs, beside such others.
        recorded_longer: median service time over that of the same engine alone.
        sim_longer: likewise, simulated.
    """

    engine: str
    beside: str
    engines: int
    requests: int
    recorded_longer: float
    sim_longer: float


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
