"""Draws the panels of a study. Marks, dashes and hatches differ as colours do, so plots read in black and white."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from maveriq.report.compare_plot import figure_at, tidy
from maveriq.study.result import Mark, Panel, Series

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis

# The palette by Okabe and Ito, which colour-blind readers tell apart, from dark to light.
COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#999999")
MARKERS = "osD^vPX*"
DASHES: tuple[Any, ...] = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1)), (0, (7, 3)))
HATCHES = ("", "///", "...", "\\\\\\", "xxx", "---", "ooo", "+++")
_INCHES_WIDE, _INCHES_OF_PANEL = 8.0, 3.4
_MAX_NAMES_LEVEL = 6  # more names below bars are turned


def draw(path: Path, title: str, panels: Sequence[Panel]) -> None:
    """Draw the panels one below the other, as PNG or SVG by the name of the file; replaces a file that is there.

    Raises:
        InputError: neither PNG nor SVG, or the place cannot be written to.
        MaveriqError: the disk is full.
    """
    inches = (_INCHES_WIDE, 0.5 + _INCHES_OF_PANEL * len(panels))
    with figure_at(path, inches=inches, overwrite=True) as figure:
        figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold", parse_math=False)
        for axes, panel in zip(figure.subplots(len(panels), squeeze=False)[:, 0], panels, strict=True):
            _draw_panel(axes, panel)


def _draw_panel(axes: Axes, panel: Panel) -> None:
    bars = [series for series in panel.series if series.mark is Mark.BARS]
    for number, series in enumerate(panel.series):
        if series.mark is Mark.BARS:
            _draw_bars(axes, series, number, len(bars))
        else:
            _draw_values(axes, series, number)
    if panel.level is not None:
        axes.axhline(panel.level, color="#666666", linestyle=(0, (4, 4)), linewidth=0.9, zorder=1)
    if panel.log_x:
        axes.set_xscale("log")
        _write_round_numbers(axes.xaxis)
    if panel.log_y:
        axes.set_yscale("log")
        _write_round_numbers(axes.yaxis)
    elif all(value >= 0 for series in panel.series for value in series.y):
        axes.set_ylim(bottom=0)
    axes.set_title(panel.title, loc="left", fontsize=10, fontweight="bold", parse_math=False)
    axes.set_xlabel(panel.x_label)
    axes.set_ylabel(panel.y_label)
    tidy(axes)
    if len(panel.series) > 1:
        axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))


def _write_round_numbers(axis: Axis) -> None:
    """Label a logarithmic axis with 1, 2 and 5 of each decade, as plain numbers."""
    from matplotlib.ticker import LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter(_plain)
    axis.set_minor_formatter(NullFormatter())


def _plain(value: float, _: object) -> str:
    return f"{value:,g}"


def _draw_values(axes: Axes, series: Series, number: int) -> None:
    look: dict[str, Any] = {"marker": MARKERS[number % len(MARKERS)], "color": COLOURS[number % len(COLOURS)]}
    look["linestyle"] = DASHES[number % len(DASHES)] if series.mark is Mark.LINE else "none"
    # An empty mark is seen where another lies on it.
    axes.plot(series.x, series.y, label=series.label, linewidth=1.2, markersize=5.5, markerfacecolor="none", **look)


def _draw_bars(axes: Axes, series: Series, number: int, of: int) -> None:
    width = 0.8 / of
    places = np.arange(len(series.x)) + (number - (of - 1) / 2) * width
    colour = COLOURS[1:][number % (len(COLOURS) - 1)]
    axes.bar(
        places, series.y, width, label=series.label, color=colour, edgecolor="black", linewidth=0.6,
        hatch=HATCHES[number % len(HATCHES)],
    )  # fmt: skip
    turned = len(series.x) > _MAX_NAMES_LEVEL
    axes.set_xticks(
        range(len(series.x)), list(_names(series)), rotation=30 if turned else 0, ha="right" if turned else "center"
    )


def _names(series: Series) -> Iterator[str]:
    return map(str, series.x)
