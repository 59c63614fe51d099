"""A picture of the headline comparisons: recorded pairs with their simulations, and the spread over the grid."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headline_pairs import (
    COST,
    GPU_HOURS,
    MEAN,
    MET_OF_ALL,
    P95,
    THROUGHPUT,
    Measure,
    RecordedPair,
    counted,
    grid_pairs,
    recorded_pairs,
    spread,
)
from headline_plan import HeadlinePlan
from headline_rows import GRID, AchievedRow

from maveriq.report.compare_plot import REAL, SIM, TEXT, figure_at, tidy
from maveriq.report.saturation import SaturationLabel

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_SHOWN = (MEAN, P95, THROUGHPUT, COST, GPU_HOURS, MET_OF_ALL)
_INCHES_PER_ROW = 0.25
_APART = 0.25
_FEW_DECADES = 100
_MAX_TICKS = 12
_COLOURS = (SIM, "#009E73", "#7F7F7F")
_EXPLAINED = (
    "How many times MaverIQ is better than others under the same load (SLO: by how many points). "
    "Left of the line it loses."
)


def draw_headline(path: Path, rows: Sequence[AchievedRow], plan: HeadlinePlan) -> None:
    """Draw the advantages of recorded pairs (top) and of the contenders in the grid (bottom)."""
    pairs = list(recorded_pairs(rows, plan))
    simulated = [row for row in rows if row.source == GRID]
    against = list(product(plan.grid.model_sets, plan.baselines))
    heights = 3 * max(1, len(pairs)), 4 * len(against)
    size = (14.0, _INCHES_PER_ROW * sum(heights) / 3 + 1.8)
    with figure_at(path, inches=size, dots_per_inch=95, overwrite=True) as figure:
        panels = figure.subplots(2, len(_SHOWN), sharex="col", sharey="row", gridspec_kw={"height_ratios": heights})
        for column, measure in enumerate(_SHOWN):
            _recorded(panels[0, column], measure, pairs)
            _simulated(panels[1, column], measure, simulated, against, plan)
            _axis(panels[:, column], measure)
        _names(panels[0, 0], [_recorded_name(pair) for pair in pairs])
        _names(panels[1, 0], [f"{model_set}: {theirs}" for model_set, theirs in against])
        figure.suptitle(_EXPLAINED, x=0.01, ha="left", fontsize=11, fontweight="bold")
        figure.legend(handles=_key(plan), loc="outside lower right", ncols=5, frameon=False)


def _key(plan: HeadlinePlan) -> list[Any]:
    from matplotlib.lines import Line2D

    contenders = zip(plan.contenders, _COLOURS, strict=False)
    return [
        Line2D([], [], linestyle="", marker="D", color=REAL, label="recorded pair"),
        Line2D([], [], linestyle="", marker="o", color=SIM, label="simulated blind"),
        *(Line2D([], [], marker="|", color=colour, label=f"grid: {name}") for name, colour in contenders),
    ]


def _recorded(axes: Axes, measure: Measure, pairs: Sequence[RecordedPair]) -> None:
    both = [pair.both(measure) for pair in pairs]
    places = [place for place, found in enumerate(both) if found]
    recorded, blind = ([found[side] for found in both if found] for side in (0, 1))
    axes.scatter(recorded, places, marker="D", color=REAL, s=34, zorder=3)
    axes.scatter(blind, places, marker="o", color=SIM, s=13, zorder=4)
    label = f"{measure.label}, points" if measure.shares else measure.label
    axes.set_title(label, loc="left", fontsize=10, fontweight="bold")


def _simulated(
    axes: Axes,
    measure: Measure,
    rows: Sequence[AchievedRow],
    against: Sequence[tuple[str, str]],
    plan: HeadlinePlan,
) -> None:
    """Draw, for each baseline, a line from the lowest to the highest advantage of each contender."""
    held = set(plan.against_baselines())
    for place, (model_set, theirs) in enumerate(against):
        for nth, (ours, colour) in enumerate(zip(plan.contenders, _COLOURS, strict=False)):
            pairs = grid_pairs(rows, ours, theirs, model_set=model_set, slo_scale=plan.slo_scale)
            found = spread(measure, counted(measure, pairs)) if (ours, theirs) in held else None
            if found:
                at = place + _APART * (nth - (len(plan.contenders) - 1) / 2)
                axes.hlines(at, found.low, found.high, color=colour, linewidth=1.2, zorder=3)
                axes.scatter([found.mean], [at], marker="|", color=colour, s=36, linewidths=2.2, zorder=4)


def _axis(panels: Sequence[Axes], measure: Measure) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter

    for axes in panels:
        if not measure.shares:
            axes.set_xscale("log")
            low, high = axes.get_xlim()
            axes.xaxis.set_major_locator(
                LogLocator(subs=(1, 2, 5) if high < _FEW_DECADES * low else (1,), numticks=_MAX_TICKS)
            )
            axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
            axes.xaxis.set_minor_formatter(NullFormatter())
        axes.axvline(0 if measure.shares else 1, color=TEXT, linewidth=0.9, zorder=2)
        tidy(axes)


def _names(axes: Axes, names: Sequence[str]) -> None:
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.set_ylim(max(1, len(names)) - 0.5, -0.5)


def _recorded_name(pair: RecordedPair) -> str:
    ours, theirs = pair.recorded
    known = "" if ours.planned_slo_scale in (0, ours.slo_scale) else f" for SLO {ours.planned_slo_scale:g}"
    overloaded = " (overloaded)" if theirs.verdict == SaturationLabel.OVERLOADED else ""
    return f"{ours.load}: {_short(ours.policy)}{known} / {_short(theirs.policy)}{overloaded}"


def _short(policy: str) -> str:
    return policy.removeprefix("MaverIQ ")
