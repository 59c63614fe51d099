"""The figures of a simulated case, and its row in a CSV file."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from types import MappingProxyType

from cases import Case

from maveriq.domain.records import DeploymentRecord, RunRecord
from maveriq.policy.alpaserve.policy import StaticPlacementPolicy
from maveriq.policy.policy import Policy
from maveriq.report.metrics import summarise
from maveriq.report.saturation import assess_saturation
from maveriq.scenario.build import build_system
from maveriq.sim.simulator import simulate
from maveriq.tables import Row, read_csv

_Value = str | int | float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """The figures of one run, as SPEC 9 defines them; None if nothing completed or the figure does not apply.

    Shares are from 0 to 1. `mean_cost_gib_s` is per request, `gpu_hours` is the total. `expected_met` is the share
    within the SLO in the simulator of the placement search. `placement` lists each deployment as
    `ENDPOINT:TPxPP:WEIGHTS@GPUS`, or `ENDPOINT:none` if the endpoint was rejected.
    """

    model_set: str
    trace: str
    scale: float
    slo_scale: float
    policy: str
    scheduled: int
    completed: int
    refused: int
    unfinished: int
    met_of_completed: float | None
    met_of_scheduled: float | None
    mean_latency_s: float | None
    p95_latency_s: float | None
    gpu_hours: float
    mean_cost_gib_s: float | None
    verdict: str
    expected_met: float | None
    placement: str


def outcome_of(case: Case) -> Outcome:
    """Simulate a case.

    Raises:
        InputError: options that contradict each other.
    """
    system = build_system(case.options())
    run = simulate(system)
    metrics = summarise(run).overall
    latency, cost, slo = metrics.latency_s, metrics.cost_gib_s, metrics.slo
    return Outcome(
        model_set=case.model_set,
        trace=case.trace,
        scale=case.scale,
        slo_scale=case.slo_scale,
        policy=case.variant.name,
        scheduled=metrics.counts.scheduled,
        completed=metrics.counts.completed,
        refused=metrics.counts.refused,
        unfinished=metrics.counts.unfinished,
        met_of_completed=slo.over_completed if slo else None,
        met_of_scheduled=slo.over_scheduled if slo else None,
        mean_latency_s=latency.mean if latency else None,
        p95_latency_s=latency.p95 if latency else None,
        gpu_hours=metrics.operational_cost_gpu_hours,
        mean_cost_gib_s=cost.mean if cost else None,
        verdict=assess_saturation(run).label.value,
        expected_met=_expected_met(system.policy),
        placement=_placement(run),
    )


def _expected_met(policy: Policy) -> float | None:
    if isinstance(policy, StaticPlacementPolicy) and policy.solution.best is not None:
        return policy.solution.best.attainment
    return None


def _placement(run: RunRecord) -> str:
    return " ".join(_deployed(deployment) for deployment in run.deployments)


def _deployed(deployment: DeploymentRecord) -> str:
    if deployment.plan is None:
        return f"{deployment.endpoint.endpoint_id}:none"
    shape = deployment.plan.configuration
    gpus = "+".join(map(str, deployment.plan.gpu_ids))
    return f"{deployment.endpoint.endpoint_id}:{shape.tp}x{shape.pp}:{shape.weights.value}@{gpus}"


def to_csv(outcomes: Iterable[Outcome]) -> str:
    """Return outcomes as CSV, fractions with six significant digits."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(_COLUMNS)
    for outcome in outcomes:
        writer.writerow(_cell(getattr(outcome, name)) for name in _COLUMNS)
    return text.getvalue()


def read_outcomes(path: Path) -> Sequence[Outcome]:
    """Read the CSV that `to_csv` wrote.

    Raises:
        InputError: the file is missing or invalid.
    """
    return [
        Outcome(**{name: read(row) for name, read in _READ.items()})  # type: ignore[arg-type]
        for row in read_csv(path, _COLUMNS, what="comparison results")
    ]


def _cell(value: _Value) -> str:
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _optional_number(column: str, row: Row) -> float | None:
    return row.number(column) if row.cells[column] else None


def _text(column: str, row: Row) -> str:
    return row.text(column)


def _count(column: str, row: Row) -> int:
    return row.count(column)


def _number(column: str, row: Row) -> float:
    return row.number(column)


_COLUMNS = tuple(field.name for field in fields(Outcome))
_READERS: Mapping[str, Callable[[str, Row], _Value]] = MappingProxyType(
    {"str": _text, "int": _count, "float": _number, "float | None": _optional_number}
)
_READ: Mapping[str, Callable[[Row], _Value]] = MappingProxyType(
    {field.name: partial(_READERS[str(field.type)], field.name) for field in fields(Outcome)}
)
