"""The charts of a report as data: lines, bars, a heat map, a Gantt chart; `page.js` draws them.

Every chart has a `summary`, which says in words what it shows, and a `table` for those who cannot see it. Lines and
bars that belong to a model name it: the reader can then hide that model in all charts.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from maveriq.report.view import Table

Array: TypeAlias = npt.NDArray[Any]

TIME_LABEL = "time, s"
CLOCK_LABEL = "time of day, UTC"


@dataclass(frozen=True, slots=True, kw_only=True)
class Axis:
    """An axis of a chart.

    Args:
        label: with the unit.
        log: whether it is logarithmic.
        low: where it begins; None for where the data do.
        high: where it ends; None likewise.
        epoch_s: the Unix time of its 0, for an axis that shows the time of day; None for one that shows its values.
    """

    label: str
    log: bool = False
    low: float | None = None
    high: float | None = None
    epoch_s: float | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the axis as plain values."""
        values = {"low": self.low, "high": self.high, "epoch": self.epoch_s}
        return {"label": self.label, "log": self.log, **{name: _plain(value) for name, value in values.items()}}


TIME_AXIS = Axis(label=TIME_LABEL)


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """A line through (x, y).

    Args:
        name: what it shows.
        x: ascending.
        y: as many; NaN interrupts the line.
        style: number of its colour, dashes and marker.
        model: the model that it belongs to, "" for none.
        low: the lower end of an area; None for no area.
        high: its upper end; None for the line itself.
        is_step: each y holds from its x to the next.
        has_markers: each point has a marker.
    """

    name: str
    x: Array
    y: Array
    style: int
    model: str = ""
    low: Array | None = None
    high: Array | None = None
    is_step: bool = False
    has_markers: bool = False

    def to_json(self) -> dict[str, Any]:
        """Return the line as plain values."""
        return {
            "name": self.name,
            "model": self.model,
            "style": self.style,
            "step": self.is_step,
            "markers": self.has_markers,
            "x": rounded(self.x),
            "y": rounded(self.y),
            "low": None if self.low is None else rounded(self.low),
            "high": None if self.high is None else rounded(self.high),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class LineChart:
    """Lines over a common x axis; `is_over_time` charts are zoomed together. `target` is a level to compare with."""

    chart_id: str
    title: str
    summary: str
    table: Table
    x: Axis
    y: Axis
    lines: Sequence[Line]
    is_over_time: bool = False
    target: float | None = None

    def to_json(self) -> dict[str, Any]:
        """Return what the script draws, as plain values."""
        return {
            "kind": "lines",
            "time": self.is_over_time,
            "x": self.x.to_json(),
            "y": self.y.to_json(),
            "target": _plain(self.target),
            "series": [line.to_json() for line in self.lines],
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Bar:
    """A bar of a chart; `low` and `high` are the ends of its 95 % interval, None where there is none."""

    name: str
    value: float
    style: int = 0
    model: str = ""
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class BarChart:
    """Horizontal bars, the first at the top."""

    chart_id: str
    title: str
    summary: str
    table: Table
    x: Axis
    bars: Sequence[Bar]
    target: float | None = None

    def to_json(self) -> dict[str, Any]:
        """Return what the script draws, as plain values."""
        return {
            "kind": "bars",
            "x": self.x.to_json(),
            "target": _plain(self.target),
            "bars": [
                {
                    "name": bar.name,
                    "model": bar.model,
                    "style": bar.style,
                    "value": _plain(bar.value),
                    "low": _plain(bar.low),
                    "high": _plain(bar.high),
                }
                for bar in self.bars
            ],
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class HeatMap:
    """Values over time for several rows, the first at the top.

    Args:
        edges: where columns begin, and where the last ends; seconds, ascending.
        rows: names.
        values: one for each row and column; NaN is left empty.
        top: the value of the darkest cell; the lightest is 0.
        unit: of the values.
        x: the axis of time.
    """

    chart_id: str
    title: str
    summary: str
    table: Table
    edges: Array
    rows: Sequence[str]
    values: Array
    top: float
    unit: str
    x: Axis = TIME_AXIS

    def to_json(self) -> dict[str, Any]:
        """Return what the script draws, as plain values."""
        return {
            "kind": "heat",
            "time": True,
            "x": self.x.to_json(),
            "edges": rounded(self.edges),
            "rows": list(self.rows),
            "values": [rounded(row, digits=3) for row in self.values],
            "top": _plain(self.top),
            "unit": self.unit,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """A stretch of time in a row of a Gantt chart; `is_pale` ones are drawn hatched."""

    row: int
    start_s: float
    end_s: float
    text: str
    style: int
    model: str
    is_pale: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class GanttChart:
    """Spans of time in rows, the first at the top."""

    chart_id: str
    title: str
    summary: str
    table: Table
    rows: Sequence[str]
    spans: Sequence[Span]
    x: Axis = TIME_AXIS

    def to_json(self) -> dict[str, Any]:
        """Return what the script draws, as plain values."""
        return {
            "kind": "gantt",
            "time": True,
            "x": self.x.to_json(),
            "rows": list(self.rows),
            "spans": [
                {
                    "row": span.row,
                    "from": _plain(span.start_s),
                    "to": _plain(span.end_s),
                    "text": span.text,
                    "style": span.style,
                    "model": span.model,
                    "pale": span.is_pale,
                }
                for span in self.spans
            ],
        }


Chart: TypeAlias = LineChart | BarChart | HeatMap | GanttChart


def rounded(values: Array, *, digits: int = 6) -> list[float | int | None]:
    """Return values to some significant digits, whole ones as integers, NaN as None: JSON stays small."""
    return [_plain(float(f"{value:.{digits}g}")) for value in np.asarray(values, dtype=float).tolist()]


def _plain(value: float | None) -> float | int | None:
    if value is None or not np.isfinite(value):
        return None
    return int(value) if value == int(value) else float(value)


def on_clock(chart: Chart, epoch_s: float, *, scale: float = 1.0) -> Chart:
    """Return a chart whose axis of time shows the time of day; one that is not over time stays as it is.

    Args:
        chart: with times in seconds.
        epoch_s: the Unix time of its 0.
        scale: seconds that pass while the chart's clock advances by one.
    """
    axis = Axis(label=CLOCK_LABEL, epoch_s=epoch_s)
    match chart:
        case LineChart(is_over_time=True):
            return replace(chart, x=axis, lines=[replace(line, x=scale * line.x) for line in chart.lines])
        case HeatMap():
            return replace(chart, x=axis, edges=scale * chart.edges)
        case GanttChart():
            spans = [replace(span, start_s=scale * span.start_s, end_s=scale * span.end_s) for span in chart.spans]
            return replace(chart, x=axis, spans=spans)
        case _:
            return chart


def models_of(charts: Iterable[Chart]) -> dict[str, int]:
    """Return the models that charts show, in their order, with their styles."""
    found: dict[str, int] = {}
    for chart in charts:
        match chart:
            case LineChart():
                parts = [(line.model, line.style) for line in chart.lines]
            case BarChart():
                parts = [(bar.model, bar.style) for bar in chart.bars]
            case GanttChart():
                parts = [(span.model, span.style) for span in chart.spans]
            case HeatMap():
                parts = []
        for model, style in parts:
            if model:
                found.setdefault(model, style)
    return found
