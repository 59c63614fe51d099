"""Every recorded run, simulated from its description and compared with what was recorded."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from blind_plan import BlindPlan
from blind_rows import BlindRow, ElsewhereRow, GainRow, ServiceRow, TossRow
from blind_world import Stretched, described, on_recorded_gpus, ties_tossed

from maveriq.domain.deployment import DeploymentPlan
from maveriq.domain.records import RunRecord
from maveriq.estimate.calibrated import CalibratedEstimator
from maveriq.estimate.hardware import HardwareProfile, load_profile
from maveriq.report.compare import Comparison, compare
from maveriq.report.gpu_use import busiest_gpu
from maveriq.scenario.scenario import Scenario
from maveriq.sim.engine import simulate
from maveriq.workload.recordings import run_record
from maveriq.workload.testbed import RecordedRun, Scheduled, find_testbed, read_completed, read_runs, read_scheduled

PROFILE = "a6000-short"
"""Of the recorded system."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BlindResult:
    """A run with both records, for whoever wants to draw them; gain and toss are None for baselines."""

    recorded: RunRecord
    sim: RunRecord
    comparison: Comparison
    row: BlindRow
    services: tuple[ServiceRow, ...]
    elsewhere: tuple[ElsewhereRow, ...]
    gain: GainRow | None
    toss: TossRow | None


def blind_results(data: Path, plan: BlindPlan, *, names: Collection[str] | None = None) -> Iterator[BlindResult]:
    """Yield the result of each recorded run.

    Args:
        data: the folder of measured data.
        plan: how to simulate.
        names: of the runs to take; None for all.

    Raises:
        InputError: a file is missing or is not such a table.
    """
    testbed, profile = find_testbed(data), load_profile(PROFILE)
    scheduled, completed = read_scheduled(testbed, names), read_completed(testbed, names)
    for run in read_runs(testbed):
        if names is None or run.name in names:
            schedule = scheduled[run.name]
            recorded = run_record(run, schedule, completed[run.name], profile)
            yield _result(run, schedule, recorded, plan, profile)


def _result(
    run: RecordedRun, scheduled: Scheduled, recorded: RunRecord, plan: BlindPlan, profile: HardwareProfile
) -> BlindResult:
    serve = CalibratedEstimator.serving(profile, without_run=run.name)
    scenario = replace(described(run, scheduled, recorded, plan_with=plan.plan_with), serve=serve)
    sim = simulate(scenario)
    found = compare(sim, recorded)
    placed = compare(simulate(on_recorded_gpus(scenario, recorded)), recorded)
    stretched = compare(simulate(replace(scenario, serve=Stretched(serve, plan.service_factor))), sim)
    gain = toss = None
    if run.by_maveriq:
        other = replace(described(run, scheduled, recorded, plan_with=plan.gain_with), serve=serve)
        gain = _gain(run.name, simulate(other), sim)
        toss = _toss(run.name, scenario, recorded, plan.tosses)
    return BlindResult(
        recorded=recorded,
        sim=sim,
        comparison=found,
        row=_row(run.name, found, placed, stretched, _busiest_percent(recorded), _busiest_percent(sim)),
        services=tuple(_services(run.name, found, placed)),
        elsewhere=tuple(_elsewhere(run.name, found)),
        gain=gain,
        toss=toss,
    )


def _row(
    name: str,
    found: Comparison,
    placed: Comparison,
    stretched: Comparison,
    busiest_percent: float,
    sim_busiest_percent: float,
) -> BlindRow:
    of, moves = found.overall.differences, stretched.overall.differences
    mean, p95 = of["mean"], of["p95"]
    return BlindRow(
        run=name,
        busiest_percent=busiest_percent,
        sim_busiest_percent=sim_busiest_percent,
        recorded_verdict=found.real_verdict.label.value,
        sim_verdict=found.sim_verdict.label.value,
        recorded_completed=found.overall.real_completed,
        sim_completed=found.overall.sim_completed,
        recorded_mean_s=_known(mean.real),
        sim_mean_s=_known(mean.sim),
        mean_error=_known(mean.error),
        mean_moves=_known(moves["mean"].error),
        recorded_p95_s=_known(p95.real),
        sim_p95_s=_known(p95.sim),
        p95_error=_known(p95.error),
        p95_moves=_known(moves["p95"].error),
        slo_error=of["slo"].error,
        slo_all_error=of["slo-all"].error,
        deployments=len(found.deployments),
        same_configuration=sum(one.same_configuration for one in found.deployments),
        same_gpus=sum(one.same_configuration and one.same_gpus for one in found.deployments),
        placed_mean_error=_known(placed.overall.differences["mean"].error),
        placed_p95_error=_known(placed.overall.differences["p95"].error),
    )


def _services(name: str, found: Comparison, placed: Comparison) -> Iterator[ServiceRow]:
    for model, distance in found.models.items():
        service = distance.differences["service-p50"]
        if service.error is not None:
            yield ServiceRow(
                run=name,
                model=model,
                requests=distance.real_completed,
                recorded_s=_known(service.real),
                sim_s=_known(service.sim),
                error=service.error,
                placed_error=_known(placed.models[model].differences["service-p50"].error),
            )


def _elsewhere(name: str, found: Comparison) -> Iterator[ElsewhereRow]:
    for one in found.deployments:
        if not (one.same_configuration and one.same_gpus):
            yield ElsewhereRow(
                run=name,
                endpoint_id=one.endpoint_id,
                model=one.model,
                recorded=str(one.real.configuration) if one.real else "none",
                recorded_gpus=_gpus(one.real),
                sim=str(one.sim.configuration) if one.sim else "none",
                sim_gpus=_gpus(one.sim),
            )


def _gpus(plan: DeploymentPlan | None) -> str:
    return " ".join(map(str, sorted(plan.gpu_ids))) if plan else ""


def _gain(name: str, other: RunRecord, usual: RunRecord) -> GainRow:
    found = compare(other, usual)
    of = found.overall.differences
    return GainRow(
        run=name,
        other_plans=sum(not one.same_configuration for one in found.deployments),
        mean_s=_known(of["mean"].real),
        mean_change=_known(of["mean"].error),
        p95_s=_known(of["p95"].real),
        p95_change=_known(of["p95"].error),
        cost_change=_known(of["cost"].error),
        gpu_hours_change=_known(of["gpu-hours"].error),
        slo_gain=of["slo-all"].error,
    )


def _toss(name: str, scenario: Scenario, recorded: RunRecord, tosses: int) -> TossRow:
    found = [compare(simulate(ties_tossed(scenario, toss)), recorded) for toss in range(tosses)]
    means, p95s = ([_known(one.overall.differences[which].error) for one in found] for which in ("mean", "p95"))
    worst = [max(abs(service.error) for service in _services(name, one, one)) for one in found]
    return TossRow(
        run=name,
        tosses=tosses,
        mean_error_low=min(means),
        mean_error_high=max(means),
        p95_error_low=min(p95s),
        p95_error_high=max(p95s),
        service_worst_low=min(worst),
        service_worst_high=max(worst),
    )


def _busiest_percent(run: RunRecord) -> float:
    found = busiest_gpu(run.gpu_samples, until_us=int(run.requests.arrival_us.max()))
    return 100 * _known(found and found[1])


def _known(value: float | None) -> float:
    """Return a figure that every run has, for in each something was completed."""
    assert value is not None  # noqa: S101
    return value
