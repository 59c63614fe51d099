"""The page of the dashboard: the live state of a service, with the charts of reports (`maveriq.report.page`)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from maveriq.domain.progress import DeploymentStatus, Progress
from maveriq.domain.records import RequestTable, RunRecord
from maveriq.report.formatting import NONE, figure, gpu_list, layer_list, share
from maveriq.report.metrics import Figures, Metrics, Summary, summarise
from maveriq.report.page.charts import TIME_LABEL, Axis, Chart, GanttChart, Line, LineChart, Span, on_clock
from maveriq.report.page.cluster_charts import engine_charts, gpu_charts
from maveriq.report.page.page import Card, Page, Section, Verdict
from maveriq.report.page.run_charts import distribution_charts, latency_over_time_chart, slo_charts, styles_of
from maveriq.report.page.run_page import counts_text, figures_card
from maveriq.report.results import STATUS_STYLES
from maveriq.report.view import Column, Row, Table, Text, number_column, row
from maveriq.serve.history import SAMPLE_EVERY_S, Samples, StatusSpan
from maveriq.units import BYTES_PER_GIB, MICROS_PER_SECOND, Micros

Array: TypeAlias = npt.NDArray[Any]

TITLE = "maveriq serve"
MAX_ROWS = 256
"""Rows of the tables of deployments and models; the API has all."""

_MAX_SENTENCES = 12
_MAX_BARS = 60
_TABLE_PARTS = 20
_THROUGHPUT_PARTS = 120
_RECENT_SAMPLES = 12
_TONES = {"ready": "good", "degraded": "poor", "stopping": "fair"}


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceState:
    """What the dashboard shows.

    Args:
        status: ready, degraded or stopping.
        problems: what is wrong, a sentence each.
        endpoints: the statuses of all endpoints.
        in_flight: accepted requests that have not ended.
        progress: the state of the cluster.
        samples: of the last hour.
        requests: that arrived and ended since the first sample, with times counted from it.
        models: of their endpoints.
    """

    status: str
    problems: Sequence[str]
    endpoints: Sequence[str]
    in_flight: int
    progress: Progress
    samples: Samples
    requests: RequestTable
    models: Mapping[int, str]

    @property
    def window_us(self) -> Micros:
        """The time from the first sample to the last."""
        return max(1, int(self.samples.times_us[-1]))


def dashboard_page(state: ServiceState) -> Page:
    """Return the page of a service."""
    record = RunRecord(
        requests=state.requests, deployments=(), gpu_samples=(), models=dict(state.models), ended_us=state.window_us
    )
    styles, summary = styles_of(record), summarise(record)
    begin_s, scale = float(state.samples.wall_s[0]), state.samples.clock_scale
    names = {deployment.deployment_id: deployment.model for deployment in state.progress.deployments}
    has_ended = len(state.requests) > 0
    sections = [
        Section(
            section_id="slos",
            title="SLOs and figures by model",
            note=_window_text(state),
            charts=list(slo_charts(summary, styles)),
            tables=[_models_table(summary)] if has_ended else [],
        ),
        Section(
            section_id="latency",
            title="Latency",
            charts=[*distribution_charts(record, summary, styles), *latency_over_time_chart(record)],
        ),
        Section(
            section_id="load",
            title="Requests over time",
            charts=[_requests_chart(state.samples), *_throughput_chart(state.samples)],
        ),
        Section(
            section_id="cluster",
            title="GPUs and deployments over time",
            charts=[*_deployments_chart(state, styles), *_gpu_charts(state.samples)],
        ),
        Section(
            section_id="engines",
            title="Engines over time",
            charts=list(engine_charts(state.samples.engines, names, styles)),
        ),
        Section(section_id="deployments", title="Deployments", tables=[_deployments_table(state.progress)]),
    ]
    return Page(
        title=TITLE,
        subtitle=_subtitle(state),
        kind="live",
        verdicts=[_verdict(state)],
        cards=list(_cards(state, summary)),
        sections=[_on_clock(section, begin_s, scale) for section in sections if section.charts or section.tables],
    )


def _on_clock(section: Section, begin_s: float, scale: float) -> Section:
    return Section(
        section_id=section.section_id,
        title=section.title,
        charts=[on_clock(chart, begin_s, scale=scale) for chart in section.charts],
        tables=section.tables,
        note=section.note,
    )


def clock_text(unix_s: float) -> str:
    """Return the time of day, UTC, of a Unix time."""
    return f"{datetime.fromtimestamp(unix_s, tz=UTC):%H:%M:%S} UTC"


def _subtitle(state: ServiceState) -> str:
    gpus, endpoints = len(state.progress.gpus), len(state.endpoints)
    return f"{gpus:,} GPU{'s' * (gpus != 1)} · {endpoints:,} endpoint{'s' * (endpoints != 1)}"


def _window_text(state: ServiceState) -> str:
    since = clock_text(float(state.samples.wall_s[0]))
    count = len(state.requests)
    return (
        f"Of {count:,} request{'s' * (count != 1)} that arrived since {since} and ended. Tables count time from then; "
        "durations are on the cluster's clock."
    )


def _verdict(state: ServiceState) -> Verdict:
    up = sum(status == "up" for status in state.endpoints)
    count = len(state.endpoints)
    what = f"{up:,} of {count:,} endpoints are up" if count else "there is no endpoint yet"
    problems = list(state.problems)
    more = len(problems) - _MAX_SENTENCES
    sentences = problems[:_MAX_SENTENCES] + ([f"{more:,} more problems are in GET /health."] if more > 0 else [])
    waiting = state.samples.waiting
    sentences.append(
        f"{state.progress.waiting:,} requests wait now; at most {int(waiting.max()):,} did in the last hour."
    )
    return Verdict(headline=f"{state.status.capitalize()}: {what}", sentences=sentences, tone=_TONES[state.status])


def _cards(state: ServiceState, summary: Summary) -> Iterator[Card]:
    progress, overall = state.progress, summary.overall
    yield Card(
        label="Requests in flight",
        value=f"{state.in_flight:,}",
        detail=f"{progress.running:,} running, {progress.waiting:,} waiting",
    )
    yield Card(
        label="Throughput",
        value=NONE if (rate := _recent_rate(state.samples)) is None else f"{figure(rate)} /s",
        detail=f"completed requests per second, the last {SAMPLE_EVERY_S * _RECENT_SAMPLES:.0f} s",
    )
    yield figures_card("Latency, p95", overall.latency_s, "s")
    yield figures_card("TTFT, p95", overall.ttft_s, "s")
    yield figures_card("TPOT, p95", overall.tpot_s, "ms", factor=1e3)
    if overall.slo:
        yield Card(label="SLO attainment", value=share(overall.slo.over_scheduled), detail="of requests with an SLO")
    gpus = [gpu for gpu in progress.gpus if not gpu.down]
    if gpus:
        used, capacity = sum(gpu.used_bytes for gpu in gpus), sum(gpu.capacity_bytes for gpu in gpus)
        yield Card(
            label="GPU load",
            value=share(sum(gpu.load for gpu in gpus) / len(gpus)),
            detail=f"{len(gpus):,} of {len(progress.gpus):,} GPUs are up; {figure(used / BYTES_PER_GIB)} of "
            f"{figure(capacity / BYTES_PER_GIB)} GiB of memory in use",
        )
    yield Card(label="Requests ended", value=f"{overall.counts.scheduled:,}", detail=counts_text(overall.counts))


def _recent_rate(samples: Samples) -> float | None:
    """Return completions per second of wall time over the last minute; None before the second sample."""
    first = max(0, len(samples.wall_s) - 1 - _RECENT_SAMPLES)
    span_s = float(samples.wall_s[-1] - samples.wall_s[first])
    return float(samples.completed[-1] - samples.completed[first]) / span_s if span_s > 0 else None


def _models_table(summary: Summary) -> Table:
    headers = (
        "requests", "completed", "latency p50 s", "p95", "p99", "TTFT p95 s", "TPOT p95 ms", "SLO attainment",
    )  # fmt: skip
    named = {"all": summary.overall, **dict(list(summary.models.items())[:MAX_ROWS])}
    rows = [_metrics_row(name, metrics) for name, metrics in named.items() if metrics.counts.scheduled]
    return Table("Requests by model", [Column("model"), *map(number_column, headers)], rows)


def _metrics_row(name: str, metrics: Metrics) -> Row:
    def value(figures: Figures | None, which: str = "p95", factor: float = 1.0) -> str:
        return figure(None if figures is None else factor * getattr(figures, which))

    return row(
        name,
        f"{metrics.counts.scheduled:,}",
        f"{metrics.counts.completed:,}",
        *(value(metrics.latency_s, which) for which in ("p50", "p95", "p99")),
        value(metrics.ttft_s),
        value(metrics.tpot_s, factor=1e3),
        share(metrics.slo.over_scheduled if metrics.slo else None),
    )


def _seconds(times_us: Array) -> Array:
    return times_us / MICROS_PER_SECOND


def _parts(count: int, parts: int) -> Array:
    """Return where each of so many equal parts of the samples begins; fewer parts where there are fewer samples."""
    parts = min(parts, count)
    return np.arange(parts) * count // parts


def _requests_chart(samples: Samples) -> LineChart:
    times_s, starts = _seconds(samples.times_us), _parts(len(samples.times_us), _TABLE_PARTS)
    found = {"waiting": samples.waiting, "running": samples.running}
    most = {name: np.maximum.reduceat(values, starts) for name, values in found.items()}
    rows = [
        row(figure(float(times_s[start])), *(f"{int(values[at]):,}" for values in most.values()))
        for at, start in enumerate(starts.tolist())
    ]
    peaks = ", ".join(f"at most {int(values.max()):,} {name}" for name, values in found.items())
    return LineChart(
        chart_id="requests",
        title="Requests waiting and running",
        summary=f"Sampled each {SAMPLE_EVERY_S:g} s: {peaks}.",
        table=Table("Most requests at once", [*map(number_column, ("from, s", *found))], rows),
        x=Axis(label=TIME_LABEL),
        y=Axis(label="requests", low=0),
        lines=[
            Line(name=name, x=times_s, y=values, style=style, is_step=True)
            for style, (name, values) in enumerate(found.items(), start=1)
        ],
        is_over_time=True,
    )


def _throughput_chart(samples: Samples) -> Iterator[LineChart]:
    """Yield requests that completed, and that were refused or failed, per second of wall time."""
    count = len(samples.wall_s) - 1
    if count < 1:
        return
    edges = np.append(_parts(count, _THROUGHPUT_PARTS), count)
    spans_s = np.maximum(np.diff(samples.wall_s[edges]), 1e-9)
    found = {
        "completed": np.diff(samples.completed[edges]) / spans_s,
        "refused or failed": np.diff(samples.unserved[edges]) / spans_s,
    }
    times_s = _seconds(samples.times_us[edges])
    picked = _parts(len(spans_s), _TABLE_PARTS)
    weights = np.add.reduceat(spans_s, picked)
    means = {name: np.add.reduceat(values * spans_s, picked) / weights for name, values in found.items()}
    rows = [
        row(figure(float(times_s[start])), *(figure(float(values[at])) for values in means.values()))
        for at, start in enumerate(picked.tolist())
    ]
    yield LineChart(
        chart_id="throughput",
        title="Throughput",
        summary=f"Requests per second that completed, at most {figure(float(found['completed'].max()))}, and that were "
        "refused or failed.",
        table=Table("Requests per second, means", [*map(number_column, ("from, s", *found))], rows),
        x=Axis(label=TIME_LABEL),
        y=Axis(label="requests/s", low=0),
        lines=[
            Line(name=name, x=times_s, y=np.append(values, values[-1]), style=style, is_step=True)
            for style, (name, values) in enumerate(found.items(), start=1)
        ],
        is_over_time=True,
    )


def _gpu_charts(samples: Samples) -> Iterator[Chart]:
    if samples.gpus.names and len(samples.times_us) > 1:
        yield from gpu_charts(samples.gpus)


def _deployments_chart(state: ServiceState, styles: Mapping[str, int]) -> Iterator[GanttChart]:
    """Yield when deployments loaded and were up, in the last hour."""
    pasts = [past for past in state.samples.deployments if past.last.gpu_ids]
    if not pasts or len(state.samples.times_us) < 2:
        return
    first_us = state.samples.since_us
    spans, rows = [], []
    for at, past in enumerate(pasts):
        model = past.last.model
        text = f"{past.last.configuration} on GPUs {gpu_list(past.last.gpu_ids)}"
        rows.append(_past_row(past.last, past.spans))
        ends_us = [*(span.since_us for span in past.spans[1:]), first_us + state.window_us]
        for span, end_us in zip(past.spans, ends_us, strict=True):
            since_us = max(span.since_us, first_us)
            if at < _MAX_BARS and span.status in ("loading", "up") and end_us > since_us:
                spans.append(
                    Span(
                        row=at,
                        start_s=(since_us - first_us) / MICROS_PER_SECOND,
                        end_s=(end_us - first_us) / MICROS_PER_SECOND,
                        text=f"{span.status}: {text}",
                        style=styles.get(model, 0),
                        model=model if model in styles else "",
                        is_pale=span.status == "loading",
                    )
                )
    more = f" The first {_MAX_BARS} of {len(pasts):,}; all are in the table." if len(pasts) > _MAX_BARS else ""
    columns = [Column("#", align="right"), Column("model"), Column("GPUs", wrap="words")]
    yield GanttChart(
        chart_id="deployments-over-time",
        title="Deployments",
        summary="When each deployment loaded (hatched) and was up (filled), sampled each "
        f"{SAMPLE_EVERY_S:g} s; there are {len(pasts):,}.{more}",
        table=Table("Deployments over time", [*columns, Column("status"), number_column("changes")], rows),
        rows=[f"{past.last.deployment_id}: {past.last.model}" for past in pasts[:_MAX_BARS]],
        spans=spans,
    )


def _past_row(last: DeploymentStatus, spans: Sequence[StatusSpan]) -> Row:
    number, status = str(last.deployment_id), Text(last.status, STATUS_STYLES.get(last.status, ""))
    return row(number, last.model, gpu_list(last.gpu_ids), status, f"{len(spans) - 1:,}")


def _deployments_table(progress: Progress) -> Table:
    deployments = [deployment for deployment in progress.deployments if deployment.status != "removed"]
    columns = [
        Column("#", align="right"),
        number_column("endpoint"),
        Column("model"),
        Column("configuration"),
        Column("layers", wrap="words"),
        Column("GPUs", wrap="words"),
        Column("status"),
        *map(number_column, ("running", "waiting", "completed", "restarts", "KV in use")),
        Column("reason", wrap="words"),
    ]
    more = f", the first {MAX_ROWS} of {len(deployments):,}" if len(deployments) > MAX_ROWS else ""
    rows = [_deployment_row(deployment) for deployment in deployments[:MAX_ROWS]]
    return Table(f"Deployments{more}", columns, rows or [row(NONE, *[""] * (len(columns) - 1))])


def _deployment_row(deployment: DeploymentStatus) -> Row:
    return row(
        str(deployment.deployment_id),
        str(deployment.endpoint_id),
        deployment.model,
        deployment.configuration or NONE,
        layer_list(deployment.layer_split) or NONE,
        gpu_list(deployment.gpu_ids) or NONE,
        Text(deployment.status, STATUS_STYLES.get(deployment.status, "")),
        NONE if deployment.running is None else f"{deployment.running:,}",
        f"{deployment.waiting:,}",
        f"{deployment.completed:,}",
        f"{deployment.restarts:,}",
        share(deployment.kv_use),
        deployment.reason,
    )
