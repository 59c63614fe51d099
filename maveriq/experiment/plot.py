"""The plot of an experiment. Marks, dashes and hatches differ as colours do, so that it reads in black and white.

Each figure has a row of panels. Where systems serve several rate scales, a panel has a line for each system over the
scales; else it has bars. Filled marks are recordings.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from maveriq.experiment.definition import Definition, Load
from maveriq.experiment.evaluation import Outcome
from maveriq.experiment.measures import Measure, measure_of
from maveriq.report.compare_plot import figure_at, tidy
from maveriq.study.plot import COLOURS, DASHES, HATCHES, MARKERS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

_INCHES_OF_PANEL = (4.4, 2.3)
_INCHES_FOR_KEY, _INCHES_FOR_TITLE = 2.9, 0.6
_RECORDED = "recorded"
_DOTS_PER_INCH = 110
_PARITY_COLUMNS = 2


class _Group(NamedTuple):
    """The loads of a panel: a model set and a trace, under an SLO scale (0 where systems choose)."""

    models: str
    trace: str
    slo_scale: float

    def __str__(self) -> str:
        return f"{self.models}, {self.trace}" + (f", SLO {self.slo_scale:g}" if self.slo_scale else "")


def draw(png: Path, svg: Path, definition: Definition, outcomes: Sequence[Outcome]) -> None:
    """Draw an experiment into two files; replaces files that are there.

    Raises:
        InputError: the place cannot be written to.
        MaveriqError: the disk is full.
    """
    if definition.parity:
        _draw_parity(png, svg, definition, outcomes)
        return
    measures = [measure_of(name) for name in definition.drawn or definition.figures]
    groups = list(dict.fromkeys(_group(outcome.point.load) for outcome in outcomes))
    systems = list(dict.fromkeys(outcome.point.system for outcome in outcomes))
    width, height = _INCHES_OF_PANEL
    inches = (width * len(groups) + _INCHES_FOR_KEY, height * len(measures) + _INCHES_FOR_TITLE)
    with figure_at(png, inches=inches, dots_per_inch=_DOTS_PER_INCH, overwrite=True, also=[svg]) as figure:
        figure.suptitle(definition.title, x=0.01, ha="left", fontsize=12, fontweight="bold", parse_math=False)
        panels = figure.subplots(len(measures), len(groups), squeeze=False, sharey="row")
        for row, measure in enumerate(measures):
            for column, group in enumerate(groups):
                of_group = [outcome for outcome in outcomes if _group(outcome.point.load) == group]
                _draw_panel(panels[row, column], measure, of_group, systems)
                if row == 0:
                    panels[row, column].set_title(str(group), loc="left", fontsize=10, fontweight="bold")
            panels[row, 0].set_ylabel(f"{measure.label}\n{measure.unit}", fontsize=9)
            if not measure.log:
                panels[row, 0].set_ylim(bottom=0)  # once all panels are drawn: they share the axis
        _add_key(figure, outcomes, systems)


def _draw_parity(png: Path, svg: Path, definition: Definition, outcomes: Sequence[Outcome]) -> None:
    """Draw each figure simulated over recorded: a panel with a mark for each run that has a recording."""
    measures = [measure_of(name) for name in definition.drawn or definition.figures]
    systems = list(dict.fromkeys(outcome.point.system for outcome in outcomes if outcome.recorded is not None))
    rows = -(-len(measures) // _PARITY_COLUMNS)
    inches = (4.2 * _PARITY_COLUMNS + _INCHES_FOR_KEY, 3.4 * rows + _INCHES_FOR_TITLE)
    with figure_at(png, inches=inches, dots_per_inch=_DOTS_PER_INCH, overwrite=True, also=[svg]) as figure:
        figure.suptitle(definition.title, x=0.01, ha="left", fontsize=12, fontweight="bold", parse_math=False)
        panels = figure.subplots(rows, _PARITY_COLUMNS, squeeze=False).flat
        for axes, measure in zip(panels, measures, strict=False):
            for number, system in enumerate(systems):
                own = [outcome for outcome in outcomes if outcome.point.system == system]
                axes.plot(
                    [_published(measure, outcome) for outcome in own],
                    [measure.factor * outcome.figures.get(measure.name, np.nan) for outcome in own],
                    linestyle="none", marker=MARKERS[number % len(MARKERS)], color=COLOURS[number % len(COLOURS)],
                    markerfacecolor="none", markersize=7, label=system,
                )  # fmt: skip
            _draw_diagonal(axes, measure)
        for axes in panels:
            axes.set_axis_off()
        handles, labels = figure.axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside right upper", frameon=False, fontsize=9)


def _draw_diagonal(axes: Axes, measure: Measure) -> None:
    if measure.log:
        axes.set_xscale("log")
        axes.set_yscale("log")
        _write_decades(axes.xaxis)
        _write_decades(axes.yaxis)
    low, high = (reach(*axes.get_xlim(), *axes.get_ylim()) for reach in (min, max))
    axes.plot([low, high], [low, high], color="#666666", linewidth=0.9, zorder=1)
    axes.set_xlim(low, high)
    axes.set_ylim(low, high)
    axes.set_aspect("equal")
    axes.set_title(f"{measure.label}, {measure.unit}", loc="left", fontsize=10, fontweight="bold")
    axes.set_xlabel("recorded", fontsize=9)
    axes.set_ylabel("simulated", fontsize=9)
    tidy(axes)


def _write_decades(axis: Axis) -> None:
    """Label a logarithmic axis with plain numbers, without the ticks between decades, which take long to draw."""
    from matplotlib.ticker import NullLocator

    axis.set_major_formatter(lambda value, _: f"{value:,g}")
    axis.set_minor_locator(NullLocator())


def _group(load: Load) -> _Group:
    return _Group(load.models, load.trace, load.slo_scale)


def _is_lines(outcomes: Sequence[Outcome]) -> bool:
    return len({outcome.point.load.scale for outcome in outcomes}) > 1


def _draw_panel(axes: Axes, measure: Measure, outcomes: Sequence[Outcome], systems: Sequence[str]) -> None:
    if measure.log:
        axes.set_yscale("log")
        _write_decades(axes.yaxis)
    if _is_lines(outcomes):
        _draw_lines(axes, measure, outcomes, systems)
    else:
        _draw_bars(axes, measure, outcomes, systems)
    tidy(axes)


def _draw_lines(axes: Axes, measure: Measure, outcomes: Sequence[Outcome], systems: Sequence[str]) -> None:
    for number, system in enumerate(systems):
        own = sorted((o for o in outcomes if o.point.system == system), key=lambda outcome: outcome.point.load.scale)
        x = [outcome.point.load.scale for outcome in own]
        look: dict[str, Any] = {"marker": MARKERS[number % len(MARKERS)], "color": COLOURS[number % len(COLOURS)]}
        y = [measure.factor * outcome.figures.get(measure.name, np.nan) for outcome in own]
        # Marks of systems that behave alike lie inside each other.
        size = 9.0 - 5.0 * number / len(systems)
        axes.plot(
            x, y, linestyle=DASHES[number % len(DASHES)], linewidth=1.2, markersize=size, markerfacecolor="none", **look
        )
        recorded = [_published(measure, outcome) for outcome in own]
        axes.plot(x, recorded, linestyle="none", markersize=0.7 * size, **look)
    scales = sorted({outcome.point.load.scale for outcome in outcomes})
    axes.set_xticks(scales, [f"{scale:g}" for scale in scales])
    axes.set_xlabel("rate scale", fontsize=9)


def _draw_bars(axes: Axes, measure: Measure, outcomes: Sequence[Outcome], systems: Sequence[str]) -> None:
    for place, outcome in enumerate(outcomes):
        number = systems.index(outcome.point.system)
        value = measure.factor * outcome.figures.get(measure.name, np.nan)
        axes.bar(
            place, value, 0.75, color=_bar_colour(number), edgecolor="black", linewidth=0.6,
            hatch=HATCHES[number % len(HATCHES)],
        )  # fmt: skip
        axes.plot(place, _published(measure, outcome), marker="D", color="black", markersize=6, markeredgecolor="white")
    values = [measure.factor * outcome.figures.get(measure.name, 0.0) for outcome in outcomes]
    if measure.log and min(values) > 0:
        axes.set_ylim(bottom=10.0 ** np.floor(np.log10(0.8 * min(values))))  # bars stand on a labelled decade
    scale = outcomes[0].point.load.scale
    axes.set_xticks([])
    axes.set_xlabel(f"rate scale {scale:g}", fontsize=9)


def _bar_colour(number: int) -> str:
    return COLOURS[1:][number % (len(COLOURS) - 1)]


def _published(measure: Measure, outcome: Outcome) -> float:
    value = outcome.published(measure.name)
    return np.nan if value is None else measure.factor * value


def _add_key(figure: Figure, outcomes: Sequence[Outcome], systems: Sequence[str]) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    groups = {_group(outcome.point.load) for outcome in outcomes}
    lines = [g for g in groups if _is_lines([o for o in outcomes if _group(o.point.load) == g])]
    handles: list[Line2D | Patch] = []
    if lines:
        handles += [
            Line2D(
                [], [], label=system, linestyle=DASHES[number % len(DASHES)], color=COLOURS[number % len(COLOURS)],
                marker=MARKERS[number % len(MARKERS)], markerfacecolor="none",
            )
            for number, system in enumerate(systems)
        ]  # fmt: skip
        handles.append(Line2D([], [], label=f"{_RECORDED} (filled)", linestyle="none", marker="o", color="#666666"))
    if len(lines) < len(groups):
        handles += [
            Patch(facecolor=_bar_colour(number), edgecolor="black", hatch=HATCHES[number % len(HATCHES)], label=system)
            for number, system in enumerate(systems)
        ]
        handles.append(Line2D([], [], label=_RECORDED, linestyle="none", marker="D", color="black"))
    figure.legend(handles=handles, loc="outside right upper", frameon=False, fontsize=9)
