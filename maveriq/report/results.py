"""The results of a run as a view: deployments, metrics per model, saturation and notices."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from maveriq.domain.records import NOT_YET, DeploymentRecord
from maveriq.report.formatting import NONE, figure, gpu_list, layer_list, share
from maveriq.report.metrics import Figures, Metrics, Summary
from maveriq.report.saturation import Saturation, SaturationLabel
from maveriq.report.view import (
    BLANK,
    Cell,
    Column,
    Facts,
    Panel,
    Row,
    Table,
    Text,
    View,
    fit_width,
    number_column,
    row,
    spaced,
)
from maveriq.units import gib, seconds

WIDE = 116
"""From this width in characters on, tables have all their columns."""

STATUS_STYLES = {
    "up": "green",
    "loading": "yellow",
    "waiting": "yellow",
    "down": "bold red",
    "rejected": "red",
    "removed": "dim",
}
SATURATION_STYLES = {
    SaturationLabel.STABLE: "green",
    SaturationLabel.BACKLOGGED: "yellow",
    SaturationLabel.OVERLOADED: "red",
}


def results_view(
    summary: Summary, saturation: Saturation, deployments: Sequence[DeploymentRecord], *, width: int = WIDE
) -> View:
    """Return what is shown at the end of a run.

    Args:
        summary: the metrics.
        saturation: whether the cluster kept up.
        deployments: all that were requested.
        width: in characters; from `WIDE` on, tables have all their columns.
    """
    wide = width >= WIDE
    return View(
        [
            deployments_table(deployments, wide=wide),
            BLANK,
            *spaced(summary_tables(summary, wide=wide, width=width)),
            saturation_panel(saturation, summary, width=width),
            *notices(deployments),
        ]
    )


def deployments_table(deployments: Sequence[DeploymentRecord], *, wide: bool) -> Table:
    """Return what was deployed where; if wide, also layers, intents and times."""
    columns = [
        Column("#", align="right", style="dim", wrap="words"),
        Column("model"),
        Column("configuration", wrap="words"),
        *([Column("layers", wrap="words")] if wide else []),
        Column("GPUs", wrap="words"),
        number_column("GiB"),
        *([Column("intent"), number_column("requested s"), number_column("ready s")] if wide else []),
        Column("status"),
    ]
    return Table("Deployments", columns, [Row(_deployment_cells(record, wide=wide)) for record in deployments])


def _deployment_cells(deployment: DeploymentRecord, *, wide: bool) -> tuple[Cell, ...]:
    endpoint, plan = deployment.endpoint, deployment.plan
    layers = [layer_list(plan.layer_split) if plan else NONE]
    ready = NONE if deployment.ready_us == NOT_YET else f"{seconds(deployment.ready_us):,.1f}"
    requested = [endpoint.intent.objective.value, f"{seconds(endpoint.requested_us):,.1f}", ready]
    return (
        str(deployment.deployment_id),
        endpoint.model.name,
        str(plan.configuration) if plan else NONE,
        *(layers if wide else []),
        gpu_list(plan.gpu_ids) if plan else NONE,
        f"{gib(plan.memory_bytes):.1f}" if plan else NONE,
        *(requested if wide else []),
        Text(deployment.status, STATUS_STYLES.get(deployment.status, "")),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _MetricColumn:
    header: str
    cell: Callable[[Metrics], str]


def summary_tables(summary: Summary, *, wide: bool, width: int = WIDE) -> list[Table]:
    """Return requests with their SLOs, latency, and cost, a row per model; if wide, with more columns.

    Tables wider than `width` are split, so that no model's name is broken.
    """
    requests = [*_count_columns(summary, wide=wide), *_slo_columns(summary)]
    latency, tokens, cost = _latency_columns(wide=wide), _token_columns(summary, wide=wide), _cost_columns()
    if wide:
        parts = {"Requests and cost": [*requests, *cost], "Latency": [*latency, *tokens]}
    else:
        parts = {"Requests": requests, "Latency": latency, "Tokens and cost": [*tokens, *cost]}
    tables = (_summary_table(title, summary, columns) for title, columns in parts.items())
    return [part for table in tables for part in fit_width(table, width)]


def _summary_table(title: str, summary: Summary, columns: Sequence[_MetricColumn]) -> Table:
    rows = [row(model, *(column.cell(metrics) for column in columns)) for model, metrics in summary.models.items()]
    if len(summary.models) > 1:
        cells = (column.cell(summary.overall) for column in columns)
        rows.append(row("all", *cells, style="bold", starts_section=True))
    return Table(title, [Column("\nmodel"), *(number_column(column.header) for column in columns)], rows)


def _count_columns(summary: Summary, *, wide: bool) -> list[_MetricColumn]:
    """Return counts; if wide, requests that did not complete are counted by status."""
    counts = summary.overall.counts
    columns = [
        _MetricColumn(header="\nrequests", cell=lambda m: f"{m.counts.scheduled:,}"),
        _MetricColumn(header="\ncompleted", cell=lambda m: f"{m.counts.completed:,}"),
    ]
    if not wide:
        lost = _MetricColumn(header="not\ncompleted", cell=lambda m: f"{m.counts.scheduled - m.counts.completed:,}")
        return [*columns, lost]
    if counts.refused:
        columns.append(_MetricColumn(header="\nrefused", cell=lambda m: f"{m.counts.refused:,}"))
    if counts.failed:
        columns.append(_MetricColumn(header="\nfailed", cell=lambda m: f"{m.counts.failed:,}"))
    if counts.unfinished:
        columns.append(_MetricColumn(header="un-\nfinished", cell=lambda m: f"{m.counts.unfinished:,}"))
    return columns


def _slo_columns(summary: Summary) -> list[_MetricColumn]:
    columns = []
    if summary.overall.slo:
        columns += [
            _MetricColumn(
                header="SLO met\nof completed", cell=lambda m: share(m.slo.over_completed if m.slo else None)
            ),
            _MetricColumn(header="SLO met\nof all", cell=lambda m: share(m.slo.over_scheduled if m.slo else None)),
        ]
    if summary.overall.goodput:
        columns.append(_MetricColumn(header="good-\nput", cell=lambda m: share(m.goodput.share if m.goodput else None)))
    return columns


def _latency_columns(*, wide: bool) -> list[_MetricColumn]:
    columns = [
        _figure_column("latency s\nmean", "latency_s", "mean"),
        _figure_column("\np50", "latency_s", "p50"),
        _figure_column("\np95", "latency_s", "p95"),
        _figure_column("\np99", "latency_s", "p99"),
        _figure_column("queue s\nmean", "queue_s", "mean"),
    ]
    if wide:
        columns.append(_figure_column("\np95", "queue_s", "p95"))
    return [*columns, _figure_column("service s\nmean", "service_s", "mean")]


def _token_columns(summary: Summary, *, wide: bool) -> list[_MetricColumn]:
    """Return times of tokens; of engines that batch continuously also those between two tokens, and preemptions."""
    columns = [
        _figure_column("1st token s\nmean", "ttft_s", "mean"),
        _figure_column("\np95", "ttft_s", "p95"),
        _figure_column("TPOT ms\nmean", "tpot_s", "mean", factor=1e3),
    ]
    if summary.overall.itl_s is None:
        return columns
    percentiles = ("p50", "p95", "p99") if wide else ("p95", "p99")
    for which in percentiles:
        header = f"ITL ms\n{which}" if which == percentiles[0] else f"\n{which}"
        columns.append(_figure_column(header, "itl_s", which, factor=1e3))
    if summary.overall.preemptions:
        columns.append(_MetricColumn(header="pre-\nempted", cell=lambda m: f"{m.preemptions:,}"))
    if summary.overall.cached_share:
        columns.append(_MetricColumn(header="prompt\ncached", cell=lambda m: share(m.cached_share)))
    return columns


def _cost_columns() -> list[_MetricColumn]:
    return [
        _figure_column("GiB s\nmean", "cost_gib_s", "mean"),
        _MetricColumn(header="GPU h\nsum", cell=lambda m: figure(m.operational_cost_gpu_hours)),
        _MetricColumn(header="requests\nper s", cell=lambda m: figure(m.throughput_per_s)),
    ]


def _figure_column(header: str, metric: str, which: str, *, factor: float = 1.0) -> _MetricColumn:
    """Return a column of a figure, multiplied by `factor` to the unit of the header."""

    def cell(metrics: Metrics) -> str:
        figures: Figures | None = getattr(metrics, metric)
        return figure(factor * getattr(figures, which) if figures else None)

    return _MetricColumn(header=header, cell=cell)


def saturation_panel(saturation: Saturation, summary: Summary, *, width: int) -> Panel:
    """Return the saturation with the figures of the whole run beneath it."""
    found = map(Text, (saturation.sentence, *saturation.bottlenecks.sentences()))
    return Panel(
        saturation.label.value,
        [*found, BLANK, Facts(list(_run_figures(summary)))],
        style=SATURATION_STYLES[saturation.label],
        width=min(width, WIDE),
    )


def _run_figures(summary: Summary) -> Iterator[tuple[str, str]]:
    overall, gpus = summary.overall, summary.gpus
    yield "throughput", f"{figure(overall.throughput_per_s)} requests/s"
    if overall.goodput:
        yield "goodput", f"{figure(overall.goodput.per_s)} requests/s within the SLOs on TTFT and TPOT"
    yield "GPU hours", figure(overall.operational_cost_gpu_hours)
    if gpus:
        yield "GPUs busy", f"{figure(gpus.mean_gpus)} on average, {figure(gpus.peak_gpus)} at most"
        yield (
            "memory held",
            f"{figure(gpus.mean_memory_gib)} GiB on average, {figure(gpus.peak_memory_gib)} GiB at most",
        )


def notices(deployments: Iterable[DeploymentRecord]) -> list[Text]:
    """Return a line for each deployment that was rejected, is down, or has a note."""
    return [line for deployment in deployments if (line := _notice(deployment))]


def _notice(deployment: DeploymentRecord) -> Text | None:
    name = f"{deployment.endpoint.model.name} (deployment {deployment.deployment_id})"
    if deployment.plan is None:
        return Text.of(("rejected ", "bold red"), f"{name}: {deployment.reason}")
    if deployment.status == "down":
        return Text.of(("down ", "bold red"), f"{name}: {deployment.reason}")
    note = "; ".join(filter(None, (deployment.reason, deployment.plan.note)))
    return Text.of(("note ", "bold yellow"), f"{name}: {note}") if note else None
