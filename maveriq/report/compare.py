"""The errors of a run, usually simulated, against another run, usually real; and tolerances on them.

Errors are signed: positive where the first run has more. Errors of durations, rates and costs are
percent of the second run; errors of shares are percentage points. Swapping the runs flips every
sign. Users write tolerances as `mean=10%,p95=15%,slo=3pt`.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, TypeAlias

import msgspec
import numpy as np
import numpy.typing as npt

from maveriq.domain.parallel import DeploymentPlan
from maveriq.domain.records import RunRecord
from maveriq.domain.requests import RequestStatus
from maveriq.errors import InputError, UnknownNameError
from maveriq.report.metrics import Metrics, Summary, summarise
from maveriq.report.run_labels import UNNAMED, RunLabel
from maveriq.report.saturation import Saturation, assess_saturation
from maveriq.units import MICROS_PER_SECOND

if TYPE_CHECKING:
    from pathlib import Path

    from matplotlib.figure import Figure

    from maveriq.report.curves import Curves
    from maveriq.report.page.run_page import ReportableRun

Array: TypeAlias = npt.NDArray[Any]

PERCENT, POINTS = "%", "pt"

_SAME_ARRIVAL_US = MICROS_PER_SECOND  # recorded arrivals stray from their schedule by up to 0.1 s


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantity:
    """A figure of a run that is compared.

    Args:
        name: by which tolerances and JSON know it.
        label: for tables, with the unit of its values.
        unit: of its error, PERCENT or POINTS.
        value: the figure of some metrics; None where it does not apply.
    """

    name: str
    label: str
    unit: str
    value: Callable[[Metrics], float | None]


def _figure_of(metric: str, which: str, factor: float = 1.0) -> Callable[[Metrics], float | None]:
    def value(metrics: Metrics) -> float | None:
        figures = getattr(metrics, metric)
        return None if figures is None else factor * float(getattr(figures, which))

    return value


def _quantities() -> Iterator[Quantity]:
    for prefix, label, metric, factor in (
        ("", "latency s", "latency_s", 1.0),
        ("queue-", "queue s", "queue_s", 1.0),
        ("service-", "service s", "service_s", 1.0),
        ("ttft-", "TTFT s", "ttft_s", 1.0),
        ("tpot-", "TPOT ms", "tpot_s", 1e3),
        ("itl-", "ITL ms", "itl_s", 1e3),
    ):
        for which in ("mean", "p50", "p95", "p99"):
            value = _figure_of(metric, which, factor)
            yield Quantity(name=prefix + which, label=f"{label}, {which}", unit=PERCENT, value=value)
    yield Quantity(
        name="slo", label="SLO met of completed", unit=POINTS, value=lambda m: m.slo.over_completed if m.slo else None
    )
    yield Quantity(
        name="slo-all", label="SLO met of all", unit=POINTS, value=lambda m: m.slo.over_scheduled if m.slo else None
    )
    yield Quantity(name="throughput", label="throughput per s", unit=PERCENT, value=lambda m: m.throughput_per_s)
    yield Quantity(name="cached", label="prompt tokens cached", unit=POINTS, value=lambda metrics: metrics.cached_share)
    yield Quantity(name="preemptions", label="preemptions", unit=PERCENT, value=_preemptions)
    yield Quantity(name="cost", label="cost GiB s, mean", unit=PERCENT, value=_figure_of("cost_gib_s", "mean"))
    yield Quantity(name="gpu-hours", label="GPU hours, sum", unit=PERCENT, value=lambda m: m.operational_cost_gpu_hours)


def _preemptions(metrics: Metrics) -> float | None:
    """Return how many there were; None where engines do not batch continuously, so that none can be."""
    return None if metrics.cached_share is None else float(metrics.preemptions)


QUANTITIES = tuple(_quantities())


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """One quantity in both runs; `error` in percent or points, None where it does not apply."""

    sim: float | None
    real: float | None
    error: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Distance:
    """How far apart the runs are, as a whole or for one model.

    Args:
        sim_completed: requests that the first run completed.
        real_completed: likewise of the second.
        differences: by the name of their `Quantity`.
        ks: the Kolmogorov-Smirnov distance of the latencies of completed requests, 0 to 1: the
            largest vertical gap between the two distribution functions. None if one is empty.
        request_error: median over requests completed in both of the absolute error of their
            latency, in percent; None where requests are not matched.
    """

    sim_completed: int
    real_completed: int
    differences: dict[str, Difference]
    ks: float | None
    request_error: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanPair:
    """What an endpoint got in both runs; None where it got nothing.

    `same_configuration` covers parallelism, types, batch size and layer split; `same_gpus` the
    set of GPUs, in whatever order.
    """

    endpoint_id: int
    model: str
    sim: DeploymentPlan | None
    real: DeploymentPlan | None
    same_configuration: bool
    same_gpus: bool


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Comparison:
    """Two runs compared; `unmatched` says why requests could not be matched, "" where they are.

    `sim` in the names of fields is the first run, the one to judge; `real` is the second, by which it is measured.
    `reported` are the runs as reports show them, empty where only their records were compared.
    """

    unmatched: str
    overall: Distance
    models: dict[str, Distance]
    deployments: tuple[PlanPair, ...]
    sim_saturation: Saturation
    real_saturation: Saturation
    labels: tuple[RunLabel, RunLabel] = UNNAMED
    runs: tuple[RunRecord, RunRecord] = field(compare=False)
    reported: tuple[ReportableRun, ...] = field(default=(), compare=False)

    def to_dict(self) -> dict[str, Any]:
        """Return the comparison as plain values for JSON; a figure that does not apply is None."""
        return {
            part.name: msgspec.to_builtins(getattr(self, part.name))
            for part in fields(self)
            if part.name not in ("runs", "reported")
        }

    def curves(self, points: int) -> list[Curves]:
        """Return latency distributions, where requests completed, and queues over time, with so many points each."""
        from maveriq.report.curves import latency_curves, queue_curves

        latencies = latency_curves(*self.runs, points=points)
        return [*([latencies] if latencies else []), queue_curves(*self.runs, points=points)]

    def plot(self, title: str = "") -> Figure:
        """Return a matplotlib figure of the curves; the title is by default the names of the runs."""
        from maveriq.report.compare_plot import POINTS, comparison_figure

        return comparison_figure(self, self.curves(POINTS), title=title or " against ".join(map(str, self.labels)))

    def to_html(self, path: str | Path, *, overwrite: bool = False) -> Path:
        """Write a report of the comparison as one HTML file that loads nothing, and return where it is.

        Args:
            path: the file to write.
            overwrite: replace a file that is there.

        Raises:
            InputError: the file is there already and `overwrite` is false, or it cannot be written.
            MaveriqError: the extra `maveriq[report]` is not installed; the disk is full.
        """
        from maveriq.report.page.comparison_page import write_comparison

        return write_comparison(self.reported, self.labels, path, overwrite=overwrite)

    def _repr_html_(self) -> str:
        """Return the tables of the comparison for a notebook."""
        from maveriq.report.compare_view import comparison_view
        from maveriq.report.html import to_html

        return to_html(comparison_view(self))

    def __repr__(self) -> str:
        first, second = self.labels
        mean = self.overall.differences["mean"]
        error = "" if mean.error is None else f" ({mean.error:+.1f} %)"
        latencies = f"{_seconds(mean.sim)} against {_seconds(mean.real)}{error}"
        return f"<Comparison: {first} against {second}, mean latency {latencies}>"


def _seconds(value: float | None) -> str:
    return "none" if value is None else f"{value:.3g} s"


def compare(sim: RunRecord, real: RunRecord, *, labels: tuple[RunLabel, RunLabel] = UNNAMED) -> Comparison:
    """Compare two runs.

    Args:
        sim: the run to judge.
        real: what it is measured by.
        labels: the names and kinds of both.

    Raises:
        InvariantError: a request has no final status.
    """
    sides = _Side.of(sim), _Side.of(real)
    unmatched = _why_not_matched(*sides)
    names = list(dict.fromkeys([*real.models.values(), *sim.models.values()]))
    return Comparison(
        unmatched=unmatched,
        overall=_distance(*sides, None, matched=not unmatched),
        models={name: _distance(*sides, name, matched=not unmatched) for name in names},
        deployments=tuple(_pairs(sim, real)),
        sim_saturation=assess_saturation(sim),
        real_saturation=assess_saturation(real),
        labels=labels,
        runs=(sim, real),
    )


def ks_distance(sample: Array, other: Array) -> float | None:
    """Return the Kolmogorov-Smirnov distance of two samples, None if one is empty."""
    if not len(sample) or not len(other):
        return None
    sample, other = np.sort(sample), np.sort(other)
    both = np.concatenate((sample, other))
    shares = (np.searchsorted(values, both, side="right") / len(values) for values in (sample, other))
    return float(np.abs(np.subtract(*shares)).max())


@dataclass(frozen=True, slots=True, kw_only=True)
class _Side:
    """A run with its summary; requests in order of their ids, `model` as an index into all names."""

    summary: Summary
    request_id: Array
    model: Array
    arrival_us: Array
    latency_us: Array
    completed: Array

    @classmethod
    def of(cls, run: RunRecord) -> _Side:
        table = run.requests
        order = np.argsort(table.request_id, kind="stable")
        endpoints, which = np.unique(table.endpoint_id, return_inverse=True)
        names = np.array([run.models[endpoint_id] for endpoint_id in endpoints.tolist()], dtype=object)
        return cls(
            summary=summarise(run),
            request_id=table.request_id[order],
            model=names[which][order],
            arrival_us=table.arrival_us[order],
            latency_us=(table.finish_us - table.arrival_us)[order],
            completed=(table.status == RequestStatus.COMPLETED.value)[order],
        )

    def metrics(self, model: str | None) -> Metrics | None:
        return self.summary.overall if model is None else self.summary.models.get(model)

    def chosen(self, model: str | None) -> Array:
        """Return which requests are of a model; None for any."""
        return np.ones(len(self.model), dtype=bool) if model is None else self.model == model


def _why_not_matched(sim: _Side, real: _Side) -> str:
    if len(sim.request_id) != len(real.request_id):
        return f"{len(sim.request_id):,} requests against {len(real.request_id):,}"
    if (sim.request_id != real.request_id).any():
        return "their ids differ"
    if (sim.model != real.model).any():
        return "they ask for other models"
    if (np.abs(sim.arrival_us - real.arrival_us) > _SAME_ARRIVAL_US).any():
        return "they arrive at other times"
    return ""


def _distance(sim: _Side, real: _Side, model: str | None, *, matched: bool) -> Distance:
    ours, theirs = sim.chosen(model) & sim.completed, real.chosen(model) & real.completed
    return Distance(
        sim_completed=int(ours.sum()),
        real_completed=int(theirs.sum()),
        differences={
            quantity.name: _difference(quantity, sim.metrics(model), real.metrics(model)) for quantity in QUANTITIES
        },
        ks=ks_distance(sim.latency_us[ours], real.latency_us[theirs]),
        request_error=_request_error(sim, real, ours & theirs) if matched else None,
    )


def _difference(quantity: Quantity, sim: Metrics | None, real: Metrics | None) -> Difference:
    ours, theirs = (None if metrics is None else quantity.value(metrics) for metrics in (sim, real))
    return Difference(sim=ours, real=theirs, error=_error(ours, theirs, quantity.unit))


def _error(ours: float | None, theirs: float | None, unit: str) -> float | None:
    if ours is None or theirs is None:
        return None
    if unit == POINTS:
        return 100 * (ours - theirs)
    if ours == theirs:
        return 0.0
    return 100 * (ours - theirs) / theirs if theirs else None


def _request_error(sim: _Side, real: _Side, both: Array) -> float | None:
    both = both & (real.latency_us > 0)
    if not both.any():
        return None
    return 100 * float(np.median(np.abs(sim.latency_us[both] / real.latency_us[both] - 1)))


def _pairs(sim: RunRecord, real: RunRecord) -> Iterator[PlanPair]:
    """Yield the plans of each endpoint side by side, its replicas in the order of their deployment."""
    ours, theirs = _plans(sim), _plans(real)
    for key in sorted(ours.keys() | theirs.keys()):
        sim_plan, real_plan = ours.get(key), theirs.get(key)
        yield PlanPair(
            endpoint_id=key[0],
            model=next(plan.model.name for plan in (real_plan, sim_plan) if plan),
            sim=sim_plan,
            real=real_plan,
            same_configuration=_compared_configuration(sim_plan) == _compared_configuration(real_plan),
            same_gpus=_gpus(sim_plan) == _gpus(real_plan),
        )


def _plans(run: RunRecord) -> dict[tuple[int, int], DeploymentPlan]:
    """Return the plans by endpoint and number of the replica."""
    replicas: Counter[int] = Counter()
    plans: dict[tuple[int, int], DeploymentPlan] = {}
    for deployment in run.deployments:
        if deployment.plan:
            endpoint_id = deployment.endpoint.endpoint_id
            replicas[endpoint_id] += 1
            plans[endpoint_id, replicas[endpoint_id]] = deployment.plan
    return plans


def _compared_configuration(plan: DeploymentPlan | None) -> object:
    return plan and (plan.model.name, plan.configuration, plan.layer_split)


def _gpus(plan: DeploymentPlan | None) -> object:
    return plan and frozenset(plan.gpu_ids)


_KS, _REQUEST = "ks", "request"
UNITS = {quantity.name: quantity.unit for quantity in QUANTITIES} | {_KS: POINTS, _REQUEST: PERCENT}
"""The unit of every error that can be bounded; `ks` is a distance (0 to 100 points), `request` the
median error over requests."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tolerance:
    """The largest error allowed of one quantity, either way; in percent or points."""

    name: str
    limit: float

    @property
    def unit(self) -> str:
        """PERCENT or POINTS."""
        return UNITS[self.name]


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """A tolerance and the error of the whole run; `error` is None where there is none to judge.

    It is met where neither run has such a figure (no SLO, say), and missed where only one has it.
    """

    name: str
    limit: float
    unit: str
    error: float | None
    met: bool


def parse_tolerances(text: str) -> tuple[Tolerance, ...]:
    """Return tolerances from a text such as `mean=10%,p95=15%,slo=3pt`; `%` and `pt` may be left out.

    Raises:
        InputError: not that form, a unit that does not fit, a limit that is negative, a name twice.
        UnknownNameError: no such quantity.
    """
    found = [_tolerance(part.strip()) for part in text.split(",")]
    names = [tolerance.name for tolerance in found]
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"tolerance on {name} stands twice in {text!r}; leave one")
    return tuple(found)


def _tolerance(part: str) -> Tolerance:
    name, equals, bound = (piece.strip() for piece in part.partition("="))
    if not equals:
        raise InputError(f"tolerance must be written as NAME=LIMIT, for example mean=10%, not {part!r}")
    name = name.replace("_", "-")
    if name not in UNITS:
        raise UnknownNameError("tolerance", name, UNITS)
    number = re.fullmatch(r"([0-9.eE+-]+) *(%|pt)?", bound)
    try:
        limit = float(number[1]) if number else math.nan
    except ValueError:
        limit = math.nan
    if number is None or not math.isfinite(limit) or limit < 0:
        raise InputError(f"tolerance on {name} must be a number from 0 with {UNITS[name]}, not {bound!r}")
    if number[2] not in (None, UNITS[name]):
        raise InputError(f"tolerance on {name} must be in {UNITS[name]}, not in {number[2]}")
    return Tolerance(name=name, limit=limit)


def check(comparison: Comparison, tolerances: Iterable[Tolerance]) -> tuple[Check, ...]:
    """Return how the errors of the whole run stand against tolerances."""
    return tuple(_check(comparison, tolerance) for tolerance in tolerances)


def _check(comparison: Comparison, tolerance: Tolerance) -> Check:
    error, applies = _tolerated_error(comparison, tolerance.name)
    met = not applies if error is None else abs(error) <= tolerance.limit
    return Check(name=tolerance.name, limit=tolerance.limit, unit=tolerance.unit, error=error, met=met)


def _tolerated_error(comparison: Comparison, name: str) -> tuple[float | None, bool]:
    """Return an error of the whole run, and whether at least one of the runs has such a figure."""
    overall = comparison.overall
    if name == _KS:
        return (None if overall.ks is None else 100 * overall.ks), bool(overall.sim_completed or overall.real_completed)
    if name == _REQUEST:
        return overall.request_error, True
    difference = overall.differences[name]
    return difference.error, difference.sim is not None or difference.real is not None
