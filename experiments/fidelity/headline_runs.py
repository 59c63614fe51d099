"""The figures of MaverIQ and the baselines: recorded, simulated blind, and in a grid of simulations."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial

from blind_runs import BlindResult
from cases import Case
from headline_plan import HeadlinePlan, Load, policy_of
from headline_rows import BLIND, GRID, RECORDED, AchievedRow, achieved, judged_by

from maveriq.errors import InputError, MaveriqError
from maveriq.estimate.hardware_profile import HardwareProfile, load_profile
from maveriq.scenario.build import build_system
from maveriq.sim.simulator import simulate
from maveriq.testbed.recordings import RecordedRun

_CASES_AT_A_TIME = 8


def slo_scales(runs: Collection[RecordedRun], plan: HeadlinePlan) -> Sequence[float]:
    """Return the SLO scales that judge recorded pairs."""
    return sorted({plan.slo_scale, *(run.slo_scale for run in runs if run.slo_scale)})


def achieved_by(
    run: RecordedRun, result: BlindResult, scales: Sequence[float], profile: HardwareProfile
) -> Iterator[AchievedRow]:
    """Yield the rows of a recorded run and of its blind simulation, judged by each SLO scale."""
    load = Load(model_set=run.model_set, trace=run.trace, scale=run.scale)
    for source, record in ((RECORDED, result.recorded), (BLIND, result.sim)):
        for scale in scales:
            yield achieved(
                judged_by(record, scale, profile),
                source=source,
                run=run.name,
                policy=policy_of(run),
                load=load,
                planned_slo_scale=run.slo_scale,
                slo_scale=scale,
            )


def achieved_in_grid(plan: HeadlinePlan, cases: Iterable[Case]) -> Iterator[Sequence[AchievedRow]]:
    """Simulate cases on all cores and yield their rows in order, judged by each SLO scale of the plan.

    Raises:
        InputError: the first error of a case.
    """
    with ProcessPoolExecutor(os.cpu_count()) as workers:
        for found in workers.map(partial(_rows_or_error, plan), cases, chunksize=_CASES_AT_A_TIME):
            if isinstance(found, str):
                workers.shutdown(wait=False, cancel_futures=True)
                raise InputError(found)
            yield found


def _rows_or_error(plan: HeadlinePlan, case: Case) -> Sequence[AchievedRow] | str:
    """Return the rows, or the message of an error with its case, because not every error can be pickled."""
    try:
        return list(_rows(plan, case))
    except MaveriqError as error:
        return f"{case.variant.name}, {case.model_set}, {case.trace}: {error}"


def _rows(plan: HeadlinePlan, case: Case) -> Iterator[AchievedRow]:
    options = case.options()
    profile, record = load_profile(options.profile), simulate(build_system(options))
    for scale in plan.judged_by:
        yield achieved(
            judged_by(record, scale, profile),
            source=GRID,
            run="",
            policy=case.variant.name,
            load=Load(model_set=case.model_set, trace=case.trace, scale=case.scale),
            planned_slo_scale=case.slo_scale,
            slo_scale=scale,
        )
