"""Comparisons of two policies by each measure: recorded pairs with their simulations, and pairs of the grid."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import exp, log
from operator import attrgetter
from statistics import fmean

from headline_plan import HeadlinePlan
from headline_rows import BLIND, RECORDED, AchievedRow

from maveriq.report.saturation import SaturationLabel

Pair = tuple[AchievedRow, AchievedRow]
"""The rows of two policies under the same load and SLO."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measure:
    """A figure by which policies are compared.

    Args:
        label: its name in tables.
        value: returns the figure of a row; None if it does not apply.
        shares: the figure is in percent and compared by differences in points; otherwise by ratios.
        more_is_better: larger is better, as for throughput.
    """

    label: str
    value: Callable[[AchievedRow], float | None]
    shares: bool = False
    more_is_better: bool = False


MEAN = Measure(label="mean latency", value=attrgetter("mean_s"))
P50 = Measure(label="p50", value=attrgetter("p50_s"))
P95 = Measure(label="p95", value=attrgetter("p95_s"))
P99 = Measure(label="p99", value=attrgetter("p99_s"))
THROUGHPUT = Measure(label="throughput", value=attrgetter("throughput_per_s"), more_is_better=True)
COST = Measure(label="cost", value=attrgetter("cost_gib_s"))
GPU_HOURS = Measure(label="GPU-hours", value=attrgetter("gpu_hours"))
GPU_SECONDS = Measure(label="GPU s of a request", value=attrgetter("gpu_s_of_a_request"))
MET_OF_COMPLETED = Measure(label="SLO of completed", value=attrgetter("met_of_completed"), shares=True)
MET_OF_ALL = Measure(label="SLO of all", value=attrgetter("met_of_scheduled"), shares=True)
MEASURES = (MEAN, P50, P95, P99, THROUGHPUT, COST, GPU_HOURS, GPU_SECONDS, MET_OF_COMPLETED, MET_OF_ALL)


def advantage(measure: Measure, pair: Pair) -> float | None:
    """Return by which factor or how many points the first of a pair is better; None if the measure does not apply."""
    ours, theirs = map(measure.value, pair)
    if ours is None or theirs is None:
        return None
    if measure.shares:
        return ours - theirs
    better, worse = (theirs, ours) if measure.more_is_better else (ours, theirs)
    return worse / better if better > 0 else None


def winner(measure: Measure, found: float, even: float) -> int:
    """Return 1 if the advantage means that the first of a pair is better, -1 if it is worse, 0 for a tie.

    Args:
        measure: the measure.
        found: the advantage.
        even: ratios within this many percent of 1, and shares within this many points, are ties.
    """
    distance = found if measure.shares else 100 * log(found) if found > 0 else -float("inf")
    return 0 if abs(distance) <= even else 1 if distance > 0 else -1


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """The mean (geometric for ratios), lowest and highest of the advantages over some pairs."""

    count: int
    mean: float
    low: float
    high: float


def spread(measure: Measure, pairs: Iterable[Pair]) -> Spread | None:
    """Return the spread of the advantages; None without any."""
    found = [value for value in (advantage(measure, pair) for pair in pairs) if value is not None]
    if not found:
        return None
    mean = fmean(found) if measure.shares else exp(fmean(map(log, found)))
    return Spread(count=len(found), mean=mean, low=min(found), high=max(found))


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordedPair:
    """Two recorded runs under the same load, and their blind simulations."""

    recorded: Pair
    blind: Pair

    def both(self, measure: Measure) -> tuple[float, float] | None:
        """Return the recorded and the simulated advantage; None if one does not apply."""
        recorded, blind = advantage(measure, self.recorded), advantage(measure, self.blind)
        return None if recorded is None or blind is None else (recorded, blind)


def recorded_pairs(rows: Sequence[AchievedRow], plan: HeadlinePlan) -> Iterator[RecordedPair]:
    """Yield MaverIQ's recorded runs against those of other policies under the same load.

    Both are judged by the SLO of the other policy's run, or else of MaverIQ's run, or else of the plan.
    """
    order = plan.order
    at = {(row.source, row.run, row.slo_scale): row for row in rows}
    runs = list({row.run: row for row in rows if row.source == RECORDED}.values())
    pairs = [
        (ours, theirs)
        for ours in runs
        for theirs in runs
        if ours.load == theirs.load
        and ours.policy in plan.by_intent
        and order[ours.policy] < order.get(theirs.policy, len(order))
    ]
    # Runs of the same policy and load differ by the SLO that they planned for.
    pairs.sort(key=lambda pair: [(row.load, order.get(row.policy, len(order)), row.planned_slo_scale) for row in pair])
    for ours, theirs in pairs:
        slo_scale = theirs.planned_slo_scale or ours.planned_slo_scale or plan.slo_scale
        recorded, blind = (
            (at[source, ours.run, slo_scale], at[source, theirs.run, slo_scale]) for source in (RECORDED, BLIND)
        )
        yield RecordedPair(recorded=recorded, blind=blind)


def grid_pairs(
    rows: Iterable[AchievedRow], ours: str, theirs: str, *, model_set: str, slo_scale: float
) -> Sequence[Pair]:
    """Return the rows of two policies as pairs, one per load of a model set under one SLO scale."""
    chosen = [row for row in rows if (row.model_set, row.slo_scale) == (model_set, slo_scale)]
    others = {row.load: row for row in chosen if row.policy == theirs}
    return [(row, others[row.load]) for row in chosen if row.policy == ours]


def counted(measure: Measure, pairs: Iterable[Pair]) -> Sequence[Pair]:
    """Return the pairs that count for a measure.

    All pairs count for shares and throughput. For other measures, neither policy may be overloaded or complete no
    request: the mean latency of an overloaded run grows with the length of the run.
    """
    if measure.shares or measure is THROUGHPUT:
        return list(pairs)
    return [pair for pair in pairs if all(row.completed and row.verdict != SaturationLabel.OVERLOADED for row in pair)]
