"""Tables of the headline comparisons, for the terminal and for docs/fidelity.md."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import product
from statistics import fmean, median

from grids import Grid
from headline_pairs import (
    COST,
    GPU_HOURS,
    GPU_SECONDS,
    MEAN,
    MEASURES,
    MET_OF_ALL,
    MET_OF_COMPLETED,
    P95,
    THROUGHPUT,
    Measure,
    Pair,
    RecordedPair,
    Spread,
    advantage,
    counted,
    grid_pairs,
    recorded_pairs,
    spread,
    winner,
)
from headline_plan import HeadlinePlan
from headline_rows import GRID, AchievedRow

_OF_GRID = (MEAN, P95, THROUGHPUT, COST, GPU_HOURS, GPU_SECONDS)
_NONE = "-"
_MARKS = {"stable": "", "backlogged": " b", "overloaded": " o"}


def headline_grids(rows: Sequence[AchievedRow], plan: HeadlinePlan) -> Iterator[Grid]:
    """Yield the tables of the page."""
    pairs = list(recorded_pairs(rows, plan))
    yield _recorded(pairs, plan)
    yield _ratios(pairs, plan)
    simulated = [row for row in rows if row.source == GRID]
    for model_set in plan.grid.model_sets:
        yield _against(model_set, simulated, plan)
    yield _intents(simulated, plan)
    yield _attainment(simulated, plan)
    yield _losses(simulated, plan)


def _recorded(pairs: Iterable[RecordedPair], plan: HeadlinePlan) -> Grid:
    return Grid(
        name="headline recorded",
        title="How many times MaverIQ is better: recorded / simulated blind",
        columns=("load", "MaverIQ", "against", "served, %", *(_label(measure) for measure in MEASURES)),
        rows=tuple(
            (
                *_compared_policies(pair.recorded),
                " / ".join(f"{100 * row.completed / row.scheduled:.0f}" for row in pair.recorded),
                *(_two(measure, pair, plan.even) for measure in MEASURES),
            )
            for pair in pairs
        ),
    )


def _compared_policies(pair: Pair) -> tuple[str, ...]:
    """Return the load with the SLO that judges both, and both policies with the SLO that each planned for."""
    ours = pair[0]
    names = (
        row.policy.removeprefix("MaverIQ ")
        + ("" if row.planned_slo_scale in (0, row.slo_scale) else f" (for SLO {row.planned_slo_scale:g})")
        + _MARKS[row.verdict]
        for row in pair
    )
    return (f"{ours.load}, SLO {ours.slo_scale:g}", *names)


def _two(measure: Measure, pair: RecordedPair, even: float) -> str:
    found = pair.both(measure)
    if found is None:
        return _NONE
    return " / ".join(_bold(_value(measure, value), on=winner(measure, value, even) < 0) for value in found)


def _ratios(pairs: Sequence[RecordedPair], plan: HeadlinePlan) -> Grid:
    return Grid(
        name="headline ratios",
        title="Does the simulation give the recorded comparison?",
        columns=("figure", "pairs", "recorded", "simulated", "off in the median", "off at worst", "the same winner"),
        rows=tuple(row for measure in MEASURES for row in _ratio_row(measure, pairs, plan.even)),
    )


def _ratio_row(measure: Measure, pairs: Sequence[RecordedPair], even: float) -> Iterator[tuple[str, ...]]:
    found = [two for two in (pair.both(measure) for pair in pairs) if two is not None]
    if not found:
        return
    off = [blind - recorded if measure.shares else 100 * (blind / recorded - 1) for recorded, blind in found]
    unit = "points" if measure.shares else "%"
    same = sum(winner(measure, recorded, even) == winner(measure, blind, even) for recorded, blind in found)
    yield (
        _label(measure),
        str(len(found)),
        _spread(measure, spread(measure, [pair.recorded for pair in pairs])),
        _spread(measure, spread(measure, [pair.blind for pair in pairs])),
        f"{median(map(abs, off)):.1f} {unit}",
        f"{max(off, key=abs):+.1f} {unit}",
        f"{same} of {len(found)}",
    )


def _against(model_set: str, rows: Sequence[AchievedRow], plan: HeadlinePlan) -> Grid:
    return Grid(
        name=f"headline {model_set}",
        title=f"{model_set}: how many times MaverIQ is better, simulated; geometric mean (lowest to highest)",
        columns=("MaverIQ", "against", "loads", *(measure.label for measure in _OF_GRID)),
        rows=tuple(
            (_short(ours), _short(theirs), *_advantages(rows, ours, theirs, model_set, plan))
            for ours, theirs in plan.against_baselines()
        ),
    )


def _intents(rows: Sequence[AchievedRow], plan: HeadlinePlan) -> Grid:
    ours = plan.contenders[0]
    return Grid(
        name="headline intents",
        title=f"How many times {ours} is better than other intents, simulated",
        columns=("models", "against", "loads", *(measure.label for measure in _OF_GRID)),
        rows=tuple(
            (model_set, _short(theirs), *_advantages(rows, ours, theirs, model_set, plan))
            for model_set, theirs in product(plan.grid.model_sets, plan.intents)
        ),
    )


def _advantages(
    rows: Sequence[AchievedRow], ours: str, theirs: str, model_set: str, plan: HeadlinePlan
) -> Iterator[str]:
    """Yield the number of loads that count for latency, and the spread of each measure over its counted loads."""
    pairs = grid_pairs(rows, ours, theirs, model_set=model_set, slo_scale=plan.slo_scale)
    yield f"{len(counted(MEAN, pairs))} of {len(pairs)}"
    yield from (_spread(measure, spread(measure, counted(measure, pairs))) for measure in _OF_GRID)


def _attainment(rows: Sequence[AchievedRow], plan: HeadlinePlan) -> Grid:
    under = list(product(plan.grid.model_sets, plan.judged_by))
    lines = []
    for policy in plan.order:
        cells = []
        for model_set, slo_scale in under:
            chosen = [
                row for row in rows if (row.policy, row.model_set, row.slo_scale) == (policy, model_set, slo_scale)
            ]
            of_all, of_completed = (
                [value for value in map(measure.value, chosen) if value is not None]
                for measure in (MET_OF_ALL, MET_OF_COMPLETED)
            )
            cells.append(f"{_mean(of_all)} ({_mean(of_completed)})")
        lines.append((policy, *cells))
    return Grid(
        name="headline attainment",
        title="SLO met, % of all scheduled requests (of completed ones), simulated; plain mean over loads",
        columns=("policy", *(f"{model_set}, SLO {slo_scale:g}" for model_set, slo_scale in under)),
        rows=tuple(lines),
    )


def _losses(rows: Sequence[AchievedRow], plan: HeadlinePlan) -> Grid:
    lines = []
    for model_set, (ours, theirs) in product(plan.grid.model_sets, plan.against_baselines()):
        pairs = grid_pairs(rows, ours, theirs, model_set=model_set, slo_scale=plan.slo_scale)
        lost = [text for measure in MEASURES for text in _lost(measure, pairs, plan.even)]
        if lost:
            lines.append((model_set, _short(ours), _short(theirs), ", ".join(lost)))
    return Grid(
        name="headline losses",
        title="Where MaverIQ loses, simulated: in how many loads (and the worst of them)",
        columns=("models", "MaverIQ", "against", "loses by"),
        rows=tuple(lines),
    )


def _lost(measure: Measure, pairs: Sequence[Pair], even: float) -> Iterator[str]:
    found = [value for value in (advantage(measure, pair) for pair in counted(measure, pairs)) if value is not None]
    lost = [value for value in found if winner(measure, value, even) < 0]
    if lost:
        yield f"{measure.label} {len(lost)} of {len(found)} ({_value(measure, min(lost))})"


def _label(measure: Measure) -> str:
    return f"{measure.label}, points" if measure.shares else measure.label


def _short(policy: str) -> str:
    return policy.removeprefix("MaverIQ ")


def _value(measure: Measure, value: float) -> str:
    if measure.shares:
        return f"{value:+.1f}"
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _spread(measure: Measure, found: Spread | None) -> str:
    if found is None:
        return _NONE
    mean, low, high = (_value(measure, value) for value in (found.mean, found.low, found.high))
    return f"{mean} ({low} to {high})"


def _mean(values: Sequence[float]) -> str:
    return f"{fmean(values):.1f}" if values else _NONE


def _bold(text: str, *, on: bool) -> str:
    return f"**{text}**" if on else text
