"""A figure of one run over time: the latency of each request, and the requests waiting or what engines did."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from maveriq.domain.records import RunRecord
from maveriq.domain.requests import RequestStatus
from maveriq.report.compare_plot import SIM, tidy
from maveriq.report.engine_plot import PANELS, draw_engines
from maveriq.report.saturation import waiting_at
from maveriq.units import MICROS_PER_SECOND

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_POINTS = 1200
_INCHES = (9.0, 5.4)
_INCHES_OF_ENGINES = (9.0, 11.4)


def run_figure(run: RunRecord, *, title: str) -> Figure:
    """Return a matplotlib figure of plots over time.

    They show the latency of each completed request, and below that the requests waiting or, of engines that batch
    continuously, `maveriq.report.engine_plot.PANELS`.
    """
    from maveriq.report.figure import NotebookFigure

    if run.engines is None:
        figure = NotebookFigure(figsize=_INCHES, layout="constrained")
        latency, waiting = figure.subplots(2, sharex=True)
        _draw_latency(latency, run, title)
        _draw_waiting(waiting, run)
        return figure
    figure = NotebookFigure(figsize=_INCHES_OF_ENGINES, layout="constrained")
    latency, *panels = figure.subplots(1 + len(PANELS), sharex=True)
    _draw_latency(latency, run, title)
    draw_engines(panels, run)
    panels[-1].set_xlabel("time, s")
    return figure


def _draw_latency(axes: Axes, run: RunRecord, title: str) -> None:
    table = run.requests
    completed = table.status == RequestStatus.COMPLETED.value
    for model in dict.fromkeys(run.models.values()):
        endpoints = [endpoint_id for endpoint_id, name in run.models.items() if name == model]
        chosen = completed & np.isin(table.endpoint_id, endpoints)
        arrival_us = table.arrival_us[chosen]
        latency_s = (table.finish_us[chosen] - arrival_us) / MICROS_PER_SECOND
        axes.scatter(arrival_us / MICROS_PER_SECOND, latency_s, s=3, linewidths=0, label=model)
    axes.set_title(title, loc="left", fontsize=10, fontweight="bold", parse_math=False)
    axes.set_ylabel("latency, s")
    if len(run.models) <= 10:  # the colors of matplotlib's default cycle
        axes.legend(frameon=False, fontsize=8, markerscale=4, loc="upper left")
    tidy(axes)


def _draw_waiting(axes: Axes, run: RunRecord) -> None:
    instants_us = np.linspace(0, max(run.ended_us, 1), _POINTS)
    axes.plot(instants_us / MICROS_PER_SECOND, waiting_at(run, instants_us), color=SIM, linewidth=0.9)
    axes.set_ylabel("requests waiting")
    axes.set_xlabel("time, s")
    axes.set_ylim(bottom=0)
    tidy(axes)
