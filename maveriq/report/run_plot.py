"""A figure of one run: the latency of each request and the number of requests waiting, over time."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from maveriq.domain.records import RunRecord
from maveriq.domain.requests import RequestStatus
from maveriq.report.compare_plot import SIM, tidy
from maveriq.report.saturation import waiting_at
from maveriq.units import MICROS_PER_SECOND

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_POINTS = 1200
_INCHES = (9.0, 5.4)


def run_figure(run: RunRecord, *, title: str) -> Figure:
    """Return a matplotlib figure with two plots over time: latency per completed request, requests waiting."""
    from maveriq.report.figure import NotebookFigure

    figure = NotebookFigure(figsize=_INCHES, layout="constrained")
    latency, waiting = figure.subplots(2, sharex=True)
    table = run.requests
    completed = table.status == RequestStatus.COMPLETED.value
    for model in dict.fromkeys(run.models.values()):
        endpoints = [endpoint_id for endpoint_id, name in run.models.items() if name == model]
        chosen = completed & np.isin(table.endpoint_id, endpoints)
        arrival_us = table.arrival_us[chosen]
        latency_s = (table.finish_us[chosen] - arrival_us) / MICROS_PER_SECOND
        latency.scatter(arrival_us / MICROS_PER_SECOND, latency_s, s=3, linewidths=0, label=model)
    latency.set_title(title, loc="left", fontsize=10, fontweight="bold", parse_math=False)
    latency.set_ylabel("latency, s")
    if len(run.models) <= 10:  # the colors of matplotlib's default cycle
        latency.legend(frameon=False, fontsize=8, markerscale=4, loc="upper left")
    instants_us = np.linspace(0, max(run.ended_us, 1), _POINTS)
    waiting.plot(instants_us / MICROS_PER_SECOND, waiting_at(run, instants_us), color=SIM, linewidth=0.9)
    waiting.set_ylabel("requests waiting")
    waiting.set_xlabel("time, s")
    waiting.set_ylim(bottom=0)
    for axes in (latency, waiting):
        tidy(axes)
    return figure
