"""Simulates each recorded run from its description, and compares it with the recording."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean

from blind_draws import Draws, draw
from blind_plan import BlindPlan
from blind_rows import BlindRow, ElsewhereRow, GainRow, ServiceRow
from blind_systems import ScaledEstimator, described_system, with_plans_of

from maveriq.domain.parallel import DeploymentPlan
from maveriq.domain.records import RunRecord
from maveriq.estimate.calibrated import CalibratedEstimator
from maveriq.estimate.calibration_file import online_by_excluded_run, require
from maveriq.estimate.hardware_profile import HardwareProfile, load_profile
from maveriq.report.compare import Comparison, compare
from maveriq.report.metrics import busiest_gpu
from maveriq.scenario.service_times import EstimatedServiceTimes
from maveriq.sim.simulator import simulate
from maveriq.testbed.recordings import RecordedRun, Scheduled, find_testbed, read_requests, read_runs
from maveriq.testbed.run_records import run_record

PROFILE = "a6000-short"
"""The profile of the recorded system."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BlindResult:
    """The result of a run, with both records for plots. `sim` has the default seed; baselines have no gain."""

    recorded: RunRecord
    sim: RunRecord
    comparison: Comparison
    row: BlindRow
    services: tuple[ServiceRow, ...]
    elsewhere: tuple[ElsewhereRow, ...]
    gain: GainRow | None


def blind_results(data: Path, plan: BlindPlan, *, names: Collection[str] | None = None) -> Iterator[BlindResult]:
    """Yield the result of each recorded run.

    Args:
        data: the folder of measured data.
        plan: how to simulate.
        names: the runs to simulate; None for all.

    Raises:
        InputError: a file is missing or invalid.
    """
    testbed, profile = find_testbed(data), load_profile(PROFILE)
    runs = [run for run in read_runs(testbed) if names is None or run.name in names]
    scheduled, completed = read_requests(testbed, [run.name for run in runs])
    for run in runs:
        schedule = scheduled[run.name]
        recorded = run_record(run, schedule, completed[run.name], profile)
        yield _result(run, schedule, recorded, plan, profile)


def _result(
    run: RecordedRun, scheduled: Scheduled, recorded: RunRecord, plan: BlindPlan, profile: HardwareProfile
) -> BlindResult:
    estimator = unseen(run.name, profile)
    service_times = EstimatedServiceTimes(estimator)
    system = replace(described_system(run, scheduled, recorded, estimator=plan.estimator), service_times=service_times)
    sim = simulate(system)
    # Baselines place everything in advance, without sampled loads.
    draws = draw(system, sim, recorded, plan.draws if run.by_maveriq else 1)
    found = draws.found[0]
    placed = compare(simulate(with_plans_of(recorded, system)), recorded)
    scaled_system = replace(
        with_plans_of(sim, system),
        service_times=EstimatedServiceTimes(ScaledEstimator(estimator, plan.service_factor)),
    )
    scaled = compare(simulate(scaled_system), sim)
    gain = None
    if run.by_maveriq:
        other = replace(
            described_system(run, scheduled, recorded, estimator=plan.gain_with), service_times=service_times
        )
        gain = _gain(run.name, simulate(other), sim)
    return BlindResult(
        recorded=recorded,
        sim=sim,
        comparison=found,
        row=_row(run.name, draws, placed, scaled, _busiest_percent(recorded), _busiest_percent(sim)),
        services=tuple(_services(run.name, draws, placed)),
        elsewhere=tuple(_elsewhere(run.name, draws)),
        gain=gain,
    )


def unseen(run: str, profile: HardwareProfile) -> CalibratedEstimator:
    """Return the estimator that is fitted without a run: the default one if the run never entered the fit."""
    entered_fit = run in online_by_excluded_run(require(profile.calibrated, profile.name))
    return CalibratedEstimator.serving(profile, without_run=run if entered_fit else None)


def _row(
    name: str,
    draws: Draws,
    placed: Comparison,
    scaled: Comparison,
    busiest_percent: float,
    sim_busiest_percent: float,
) -> BlindRow:
    found = draws.found[0]
    of, moves = found.overall.differences, scaled.overall.differences
    means, p95s = draws.errors("mean"), draws.errors("p95")
    return BlindRow(
        run=name,
        busiest_percent=busiest_percent,
        sim_busiest_percent=sim_busiest_percent,
        recorded_verdict=found.real_saturation.label.value,
        sim_verdict=found.sim_saturation.label.value,
        recorded_completed=found.overall.real_completed,
        sim_completed=found.overall.sim_completed,
        recorded_mean_s=_known(of["mean"].real),
        sim_mean_s=draws.sim("mean"),
        mean_error=fmean(means),
        mean_moves=_known(moves["mean"].error),
        recorded_p95_s=_known(of["p95"].real),
        sim_p95_s=draws.sim("p95"),
        p95_error=fmean(p95s),
        p95_moves=_known(moves["p95"].error),
        slo_error=_mean(draws.errors("slo")),
        slo_all_error=_mean(draws.errors("slo-all")),
        deployments=len(found.deployments),
        same_configuration=sum(deployment.same_configuration for deployment in found.deployments),
        same_gpus=sum(draws.on_recorded_gpus(deployment.endpoint_id) for deployment in found.deployments)
        / len(draws.found),
        draws=len(draws.found),
        mean_error_low=min(means),
        mean_error_high=max(means),
        mean_error_alone=means[0],
        p95_error_low=min(p95s),
        p95_error_high=max(p95s),
        p95_error_alone=p95s[0],
        placed_mean_error=_known(placed.overall.differences["mean"].error),
        placed_p95_error=_known(placed.overall.differences["p95"].error),
    )


def _services(name: str, draws: Draws, placed: Comparison) -> Iterator[ServiceRow]:
    for model, distance in draws.found[0].models.items():
        service, errors = distance.differences["service-p50"], draws.service_errors(model)
        if errors:
            recorded_s = _known(service.real)
            yield ServiceRow(
                run=name,
                model=model,
                requests=distance.real_completed,
                recorded_s=recorded_s,
                sim_s=recorded_s * (1 + fmean(errors) / 100),
                error=fmean(errors),
                error_low=min(errors),
                error_high=max(errors),
                placed_error=_known(placed.models[model].differences["service-p50"].error),
            )


def _elsewhere(name: str, draws: Draws) -> Iterator[ElsewhereRow]:
    for deployment in draws.found[0].deployments:
        if not (deployment.same_configuration and deployment.same_gpus):
            yield ElsewhereRow(
                run=name,
                endpoint_id=deployment.endpoint_id,
                model=deployment.model,
                recorded=str(deployment.real.configuration) if deployment.real else "none",
                recorded_gpus=_gpus(deployment.real),
                sim=str(deployment.sim.configuration) if deployment.sim else "none",
                sim_gpus=_gpus(deployment.sim),
                draws=len(draws.found),
                draws_there=draws.on_recorded_gpus(deployment.endpoint_id),
            )


def _gpus(plan: DeploymentPlan | None) -> str:
    return " ".join(map(str, sorted(plan.gpu_ids))) if plan else ""


def _gain(name: str, other: RunRecord, default: RunRecord) -> GainRow:
    found = compare(other, default)
    of = found.overall.differences
    return GainRow(
        run=name,
        other_plans=sum(not deployment.same_configuration for deployment in found.deployments),
        mean_s=_known(of["mean"].real),
        mean_change=_known(of["mean"].error),
        p95_s=_known(of["p95"].real),
        p95_change=_known(of["p95"].error),
        cost_change=_known(of["cost"].error),
        gpu_hours_change=_known(of["gpu-hours"].error),
        slo_gain=of["slo-all"].error,
    )


def _busiest_percent(run: RunRecord) -> float:
    found = busiest_gpu(run.gpu_samples, until_us=int(run.requests.arrival_us.max()))
    return 100 * _known(found and found[1])


def _mean(errors: list[float]) -> float | None:
    return fmean(errors) if errors else None


def _known(value: float | None) -> float:
    """Return a figure that every run has, because each run completed requests."""
    assert value is not None  # noqa: S101
    return value
