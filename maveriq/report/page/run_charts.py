"""Charts of one run: distributions of its latencies by model, requests over time, and SLOs by model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from maveriq.domain.records import NOT_YET, ItlTable, RequestTable, RunRecord
from maveriq.domain.requests import RequestStatus
from maveriq.report.formatting import NONE, figure, share
from maveriq.report.metrics import Attainment, Figures, Goodput, Metrics, Summary
from maveriq.report.page.charts import TIME_LABEL, Axis, Bar, BarChart, Chart, Line, LineChart
from maveriq.report.page.sampling import PARTS, by_part, distribution, level_over_time, percentiles_over_time
from maveriq.report.view import Column, Table, number_column, row
from maveriq.units import MICROS_PER_SECOND

Array: TypeAlias = npt.NDArray[Any]

MAX_MODELS = 12
"""Models that have lines of their own: those with most requests. All are in the tables."""

_LATENCY_PARTS = 150
_TABLE_PARTS = 20
_PERCENTILES = (1, 5, 10, 25, 50, 75, 90, 95, 99, 99.9, 100)


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantity:
    """A duration of requests that is shown as a distribution.

    Args:
        chart_id: of its chart.
        title: its name.
        unit: of the axis.
        factor: from microseconds to the unit.
        metric: its field of `Metrics`.
        counted: what the shares are of.
        is_log: whether its axis is logarithmic.
    """

    chart_id: str
    title: str
    unit: str
    factor: float
    metric: str
    counted: str = "Share of requests"
    is_log: bool = True

    @property
    def per_second(self) -> float:
        """The factor from seconds to the unit."""
        return self.factor * MICROS_PER_SECOND

    def figures_of(self, metrics: Metrics) -> Figures | None:
        """Return its figures, in seconds."""
        figures: Figures | None = getattr(metrics, self.metric)
        return figures


LATENCY = Quantity(chart_id="latency-all", title="Latency", unit="s", factor=1e-6, metric="latency_s")
TTFT = Quantity(chart_id="ttft", title="Time to first token (TTFT)", unit="s", factor=1e-6, metric="ttft_s")
TPOT = Quantity(chart_id="tpot", title="Time per output token (TPOT)", unit="ms", factor=1e-3, metric="tpot_s")
ITL = Quantity(
    chart_id="itl",
    title="Inter-token latency (ITL)",
    unit="ms",
    factor=1e-3,
    metric="itl_s",
    counted="Share of tokens",
)


def styles_of(record: RunRecord) -> dict[str, int]:
    """Return a style for each model that has its own lines, from 1; 0 is that of all requests together."""
    requests = np.bincount(record.requests.endpoint_id, minlength=max([0, *record.models]) + 1)
    counts: dict[str, int] = {}
    for endpoint_id, model in record.models.items():
        counts[model] = counts.get(model, 0) + int(requests[endpoint_id])
    most = set(sorted(counts, key=lambda model: -counts[model])[:MAX_MODELS])
    return {model: number for number, model in enumerate((m for m in counts if m in most), start=1)}


def rows_of_model(record: RunRecord, model: str) -> Array:
    """Return which requests are for a model."""
    endpoints = [endpoint_id for endpoint_id, name in record.models.items() if name == model]
    return np.isin(record.requests.endpoint_id, endpoints)


def durations_us(table: RequestTable, quantity: Quantity) -> Array:
    """Return a duration of each request in microseconds, NaN where it has none: only completed requests have."""
    known = table.status == RequestStatus.COMPLETED.value
    values: Array
    match quantity.metric:
        case "latency_s":
            values = table.finish_us - table.arrival_us
        case "ttft_s":
            known = known & (table.first_token_us != NOT_YET)
            values = table.first_token_us - table.arrival_us
        case "tpot_s":
            known = known & (table.first_token_us != NOT_YET) & (table.output_tokens > 1)
            values = (table.finish_us - table.first_token_us) / np.maximum(table.output_tokens - 1, 1)
        case other:
            raise ValueError(f"requests have no {other}")
    return np.where(known, values, np.nan)


def distribution_charts(record: RunRecord, summary: Summary, styles: Mapping[str, int]) -> Iterator[Chart]:
    """Yield the distributions of latency, TTFT, TPOT and, of continuous engines, ITL: of all requests, and by model."""
    named: dict[str, Metrics] = {"all": summary.overall}
    if len(summary.models) > 1:
        named |= {model: metrics for model, metrics in summary.models.items() if model in styles}
    for quantity in (LATENCY, TTFT, TPOT):
        values = durations_us(record.requests, quantity)
        parts = []
        for name, metrics in named.items():
            chosen = np.isfinite(values)
            if name in styles:
                chosen &= rows_of_model(record, name)
            parts.append(Distribution(name, values[chosen], quantity.figures_of(metrics)))
        yield from distribution_chart(quantity, parts, styles)
    if record.itl is not None and len(record.itl):
        yield from distribution_chart(ITL, list(_itl_parts(record, record.itl, named, styles)), styles)


@dataclass(frozen=True, slots=True)
class Distribution:
    """The values of one line, in microseconds, their figures in seconds, and how often each occurs (None: once)."""

    name: str
    values_us: Array
    figures: Figures | None
    counts: Array | None = None


def _itl_parts(
    record: RunRecord, itl: ItlTable, named: Mapping[str, Metrics], styles: Mapping[str, int]
) -> Iterator[Distribution]:
    for name, metrics in named.items():
        chosen = np.ones(len(itl), dtype=bool)
        if name in styles:
            chosen = np.isin(itl.endpoint_id, [number for number, model in record.models.items() if model == name])
        yield Distribution(name, itl.itl_us[chosen], metrics.itl_s, itl.tokens[chosen])


def distribution_chart(
    quantity: Quantity, parts: Sequence[Distribution], styles: Mapping[str, int], *, by_model: bool = True
) -> Iterator[LineChart]:
    """Yield a chart of distributions, or none where there are no values.

    Args:
        quantity: what is shown.
        parts: a line each.
        styles: of the lines by name, 0 for others.
        by_model: whether names, but for those without style, are models.
    """
    lines, rows, medians = [], [], []
    for part in parts:
        x, shares = distribution(part.values_us * quantity.factor, part.counts)
        if not len(x):
            continue
        name, style = part.name, styles.get(part.name, 0)
        floor = x[x > 0].min() if (x > 0).any() else 1e-6
        shown = np.maximum(x, floor) if quantity.is_log else x
        model = name if by_model and name in styles else ""
        lines.append(Line(name=name, x=shown, y=100 * shares, style=style, model=model, is_step=True))
        rows.append(row(name, *map(figure, _at_percentiles(part, quantity.factor))))
        if part.figures is not None:
            p50, p95 = (figure(quantity.per_second * value) for value in (part.figures.p50, part.figures.p95))
            medians.append(f"{name}: half within {p50} {quantity.unit}, 95 % within {p95} {quantity.unit}")
    if not lines:
        return
    columns = [Column(""), *(number_column(f"p{percent:g}" if percent < 100 else "max") for percent in _PERCENTILES)]
    yield LineChart(
        chart_id=quantity.chart_id,
        title=quantity.title,
        summary=f"{quantity.counted} up to a value. {'; '.join(medians if not by_model else medians[:1])}.",
        table=Table(f"{quantity.title}, {quantity.unit}, at percentiles", columns, rows),
        x=Axis(label=f"{quantity.title}, {quantity.unit}", log=quantity.is_log),
        y=Axis(label=f"{quantity.counted.lower()}, %", low=0, high=100),
        lines=lines,
    )


def _at_percentiles(part: Distribution, factor: float) -> list[float]:
    """Return the values at `_PERCENTILES`, as the metrics have them: linear between two values."""
    percents, values = np.array(_PERCENTILES), part.values_us * factor
    if part.counts is None:
        found: list[float] = np.percentile(values, percents).tolist()
        return found
    order = np.argsort(values, kind="stable")
    ends, values = np.cumsum(part.counts[order]), values[order]
    at: Any = np.searchsorted(ends, np.floor(percents / 100 * (ends[-1] - 1)), side="right")
    return list(values[np.minimum(at, len(values) - 1)].tolist())


def intervals_s(record: RunRecord) -> dict[str, tuple[Array, Array]]:
    """Return when requests wait and when they run, as starts and ends in seconds; what has no end lasts for ever."""
    table, never = record.requests, np.iinfo(np.int64).max
    served = table.status != RequestStatus.REFUSED.value
    arrival, start, finish = (column[served] for column in (table.arrival_us, table.start_us, table.finish_us))
    end = np.where(finish != NOT_YET, finish, never)
    ran = start != NOT_YET
    spans = {"waiting": (arrival, np.where(ran, start, end)), "running": (start[ran], end[ran])}
    return {name: (begins / MICROS_PER_SECOND, ends / MICROS_PER_SECOND) for name, (begins, ends) in spans.items()}


def requests_chart(record: RunRecord) -> LineChart:
    """Return how many requests waited and ran over time: the line is the most, the area reaches to the least."""
    until_s = max(record.ended_us, 1) / MICROS_PER_SECOND
    lines, peaks, columns = [], [], []
    for style, (name, (starts, ends)) in enumerate(intervals_s(record).items(), start=1):
        edges, low, high = level_over_time(starts, ends, until_s)
        lines.append(Line(name=name, x=edges, y=high, low=low, style=style, is_step=True))
        peaks.append(f"at most {int(high.max()):,} {name}")
        columns.append(np.maximum.reduceat(high[:-1], np.arange(0, PARTS, PARTS // _TABLE_PARTS)))
    times = np.linspace(0, until_s, _TABLE_PARTS + 1)[:-1]
    rows = [row(figure(float(time)), *(f"{int(column[at]):,}" for column in columns)) for at, time in enumerate(times)]
    headers = ["from, s", *(f"most {line.name}" for line in lines)]
    return LineChart(
        chart_id="requests",
        title="Requests waiting and running",
        summary=f"Over {figure(until_s)} s: {', '.join(peaks)}. The line is the most in each {100 / PARTS:g} % of the "
        "time, the area below it reaches down to the least.",
        table=Table("Most requests at once, in twentieths of the time", list(map(number_column, headers)), rows),
        x=Axis(label=TIME_LABEL),
        y=Axis(label="requests", low=0),
        lines=lines,
        is_over_time=True,
    )


def latency_over_time_chart(record: RunRecord) -> Iterator[LineChart]:
    """Yield the median, p95 and maximum of the latency by arrival; none where no request completed."""
    table, until_s = record.requests, max(record.ended_us, 1) / MICROS_PER_SECOND
    done = table.status == RequestStatus.COMPLETED.value
    if not done.any():
        return
    arrival_s = table.arrival_us[done] / MICROS_PER_SECOND
    latency_s = (table.finish_us - table.arrival_us)[done] / MICROS_PER_SECOND
    names, percentiles = ("median", "p95", "maximum"), (50.0, 95.0, 100.0)
    x, found = percentiles_over_time(arrival_s, latency_s, until_s, percentiles, parts=_LATENCY_PARTS)
    lines = [
        Line(name=name, x=x, y=values, style=style, has_markers=style == 1)
        for style, (name, values) in enumerate(zip(names, found, strict=True), start=1)
    ]
    x, found = percentiles_over_time(arrival_s, latency_s, until_s, percentiles, parts=_TABLE_PARTS)
    counts = np.bincount(by_part(arrival_s, until_s, _TABLE_PARTS), minlength=_TABLE_PARTS)
    rows = [
        row(figure(float(time)), f"{int(count):,}", *(figure(None if np.isnan(v[at]) else float(v[at])) for v in found))
        for at, (time, count) in enumerate(zip(x - x[0], counts, strict=True))
    ]
    headers = ["from, s", "requests", *(f"{name}, s" for name in names)]
    yield LineChart(
        chart_id="latency-over-time",
        title="Latency by arrival",
        summary=f"Latency of the completed requests that arrived in each {100 / _LATENCY_PARTS:.1g} % of the time: "
        f"median, p95 and maximum. The longest took {figure(float(latency_s.max()))} s.",
        table=Table("Latency by arrival, in twentieths of the time", list(map(number_column, headers)), rows),
        x=Axis(label=TIME_LABEL),
        y=Axis(label="latency, s", low=0),
        lines=lines,
        is_over_time=True,
    )


def slo_charts(summary: Summary, styles: Mapping[str, int]) -> Iterator[BarChart]:
    """Yield the SLO attainment and the goodput by model, where there are SLOs."""
    if summary.overall.slo:
        yield _share_chart("slo", "SLO attainment", "requests within their latency SLO", summary, styles, _attained)
    if summary.overall.goodput:
        limits = _limits(summary)
        yield _share_chart("goodput", "Goodput", f"requests within {limits}", summary, styles, _good)


def _limits(summary: Summary) -> str:
    ttft_s, tpot_s = summary.slo_ttft_s, summary.slo_tpot_s
    parts = [f"TTFT {1e3 * ttft_s:g} ms" if ttft_s else "", f"TPOT {1e3 * tpot_s:g} ms" if tpot_s else ""]
    return " and ".join(filter(None, parts))


def _attained(metrics: Metrics) -> float | None:
    slo: Attainment | None = metrics.slo
    return slo.over_scheduled if slo else None


def _good(metrics: Metrics) -> float | None:
    goodput: Goodput | None = metrics.goodput
    return goodput.share if goodput else None


def _share_chart(
    chart_id: str, title: str, what: str, summary: Summary, styles: Mapping[str, int], get: Any
) -> BarChart:
    named = {"all": summary.overall, **summary.models} if len(summary.models) > 1 else dict(summary.models)
    values = {name: get(metrics) for name, metrics in named.items()}
    rows = [row(name, f"{named[name].counts.scheduled:,}", share(value)) for name, value in values.items()]
    bars = [
        Bar(name=name, value=100 * value, style=styles.get(name, 0), model=name if name in styles else "")
        for name, value in values.items()
        if value is not None and (name in styles or name == "all")
    ]
    worst = min((bar for bar in bars if bar.name != "all"), key=lambda bar: bar.value, default=None)
    missing = len(named) - 1 - len(styles)
    more = f" {missing} models with fewer requests are in the table." if missing > 0 else ""
    least = f" Least: {worst.name} with {share(worst.value / 100)}." if worst else ""
    return BarChart(
        chart_id=chart_id,
        title=f"{title} by model",
        summary=f"Share of all {what}; what did not complete has missed.{least}{more}",
        table=Table(
            f"{title} by model", [Column("model"), number_column("requests"), number_column(title)], rows
        ) if rows else Table(title, [Column("model")], [row(NONE)]),
        x=Axis(label=f"{title}, % of requests", low=0, high=100),
        bars=bars,
    )  # fmt: skip
