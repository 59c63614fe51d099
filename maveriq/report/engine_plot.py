"""Plots of engines that batch continuously, over time: requests, KV cache, tokens of a step and time of a step.

Up to six engines have a line each, which differ in colour (Okabe and Ito) and in dashes, which black and white
keeps too. Of more, the mean is drawn, and an area from the lowest to the highest.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from maveriq.domain.records import EngineTable, RunRecord
from maveriq.report.compare_plot import AREA, REAL, SIM, tidy
from maveriq.units import MICROS_PER_SECOND

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Array: TypeAlias = npt.NDArray[Any]

MAX_LINES = 6
STYLES = (
    ("#0072B2", "solid"),
    ("#D55E00", (0, (5, 1.5))),
    ("#009E73", (0, (1.5, 1))),
    ("#000000", (0, (6, 1.5, 1.5, 1.5))),
    ("#CC79A7", (0, (3, 1, 1, 1, 1, 1))),
    ("#56B4E9", (0, (9, 2))),
)
_POINTS = 240


class _Panel(NamedTuple):
    """What a panel shows: its label, and a column of `EngineTable` with the factor to the label's unit."""

    label: str
    column: str
    factor: float


PANELS = (
    _Panel("requests running", "running", 1.0),
    _Panel("requests waiting", "waiting", 1.0),
    _Panel("KV blocks used, %", "kv_use", 100.0),
    _Panel("tokens a step", "batch_tokens", 1.0),
    _Panel("step time, ms", "step_us", 1e-3),
)


class _Line(NamedTuple):
    """One engine: its name, and its rows of the table."""

    name: str
    rows: Array


def draw_engines(panels: list[Axes], run: RunRecord) -> None:
    """Draw `PANELS`, one into each of some axes that share their time; the engines are named in the first."""
    table = run.engines
    if table is None:
        return
    lines = list(_lines(table, run))
    for axes, panel in zip(panels, PANELS, strict=True):
        if len(lines) > MAX_LINES:
            _draw_range(axes, panel, table, lines)
        else:
            for line, (colour, dashes) in zip(lines, STYLES, strict=False):
                x, y = _steps(table, line.rows, panel)
                axes.plot(x, y, color=colour, linestyle=dashes, linewidth=1.1, label=line.name)
        axes.set_ylabel(panel.label)
        axes.set_ylim(bottom=0)
        tidy(axes)
    panels[0].legend(frameon=False, fontsize=8, loc="upper left", ncols=3, handlelength=3.5)
    panels[0].set_ylim(top=1.3 * panels[0].get_ylim()[1])  # room for the legend


def _lines(table: EngineTable, run: RunRecord) -> Iterator[_Line]:
    models = {deployment.deployment_id: deployment.endpoint.model.name for deployment in run.deployments}
    for deployment_id in np.unique(table.deployment_id).tolist():
        name = f"{deployment_id}: {models.get(deployment_id, '')}"
        yield _Line(name, np.flatnonzero(table.deployment_id == deployment_id))


def _steps(table: EngineTable, rows: Array, panel: _Panel) -> tuple[Array, Array]:
    """Return at most `_POINTS` means over time, as the corners of a line that is level over each span."""
    values = getattr(table, panel.column)[rows] * panel.factor
    ends_us = table.time_us[rows]
    spans_us = np.diff(ends_us, prepend=max(0, 2 * int(ends_us[0]) - int(ends_us[1])) if len(rows) > 1 else 0)
    weights = np.where(np.isfinite(values), spans_us * (table.busy_share[rows] if _is_of_steps(panel) else 1.0), 0.0)
    group = np.arange(len(rows)) * min(_POINTS, len(rows)) // max(1, len(rows))
    totals = np.bincount(group, weights=weights)
    with np.errstate(invalid="ignore", divide="ignore"):
        means = np.bincount(group, weights=np.nan_to_num(values) * weights) / totals
    last = np.flatnonzero(np.diff(group, append=group[-1] + 1))
    edges_s = np.concatenate([[ends_us[0] - spans_us[0]], ends_us[last]]) / MICROS_PER_SECOND
    return np.repeat(edges_s, 2)[1:-1], np.repeat(means, 2)


def _is_of_steps(panel: _Panel) -> bool:
    return panel.column in ("batch_tokens", "step_us")


def _draw_range(axes: Axes, panel: _Panel, table: EngineTable, lines: list[_Line]) -> None:
    """Draw the mean of many engines, and the range from the lowest to the highest."""
    times_us, at = np.unique(table.time_us, return_inverse=True)
    values = getattr(table, panel.column) * panel.factor
    known = np.isfinite(values)
    low, high = np.full(len(times_us), np.inf), np.full(len(times_us), -np.inf)
    np.minimum.at(low, at[known], values[known])
    np.maximum.at(high, at[known], values[known])
    counts = np.bincount(at[known], minlength=len(times_us))
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = np.bincount(at[known], weights=values[known], minlength=len(times_us)) / counts
    none = counts == 0
    low[none] = high[none] = np.nan
    x: Any = times_us / MICROS_PER_SECOND
    axes.fill_between(x, low, high, facecolor=AREA, edgecolor=REAL, linewidth=0.5, label="lowest to highest")
    axes.plot(x, mean, color=SIM, linewidth=1.2, label=f"mean of {len(lines)} engines")
