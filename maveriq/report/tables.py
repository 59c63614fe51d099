"""Tables of results for a terminal; they choose their columns by its width."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from rich import box
from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from maveriq.domain.records import NOT_YET, DeploymentRecord
from maveriq.report.formatting import NONE, figure, gpu_list, layer_list, share
from maveriq.report.metrics import Figures, Metrics, Summary
from maveriq.report.saturation import Saturation, SaturationLabel
from maveriq.units import gib, seconds

_WIDE = 116

STATUS_STYLES = {
    "up": "green",
    "loading": "yellow",
    "waiting": "yellow",
    "down": "bold red",
    "rejected": "red",
    "removed": "dim",
}
VERDICT_STYLES = {
    SaturationLabel.STABLE: "green",
    SaturationLabel.BACKLOGGED: "yellow",
    SaturationLabel.OVERLOADED: "red",
}


def results_view(
    summary: Summary, verdict: Saturation, deployments: Sequence[DeploymentRecord], *, width: int
) -> Group:
    """Return all that a run's end shows: deployments, tables per model, verdict, notices."""
    return Group(
        deployments_table(deployments, width=width),
        "",
        summary_tables(summary, width=width),
        verdict_panel(verdict, summary, width=width),
        *notices(deployments),
    )


def new_table(title: str = "") -> Table:
    """Return an empty table in the style that all of them share."""
    return Table(
        title=title or None,
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        header_style="dim",
        show_edge=False,
        pad_edge=False,
        padding=(0, 1),
    )


def deployments_table(deployments: Sequence[DeploymentRecord], *, width: int) -> Table:
    """Return what was deployed and where; on wide terminals also the intent and the times."""
    wide = width >= _WIDE
    table = new_table("Deployments")
    table.add_column("#", justify="right", style="dim")
    table.add_column("model", no_wrap=True)
    table.add_column("configuration", no_wrap=True)
    if wide:
        table.add_column("layers", no_wrap=True)
    table.add_column("GPUs", no_wrap=True)
    table.add_column("GiB", justify="right", no_wrap=True)
    if wide:
        table.add_column("intent", no_wrap=True)
        table.add_column("asked s", justify="right", no_wrap=True)
        table.add_column("ready s", justify="right", no_wrap=True)
    table.add_column("status", no_wrap=True)
    for deployment in deployments:
        table.add_row(*_deployment_cells(deployment, wide=wide))
    return table


def _deployment_cells(deployment: DeploymentRecord, *, wide: bool) -> list[RenderableType]:
    endpoint, plan = deployment.endpoint, deployment.plan
    layers = [layer_list(plan.layer_split) if plan else NONE]
    ready = NONE if deployment.ready_us == NOT_YET else f"{seconds(deployment.ready_us):,.1f}"
    asked = [endpoint.intent.objective.value, f"{seconds(endpoint.requested_us):,.1f}", ready]
    return [
        str(deployment.deployment_id),
        Text(endpoint.model.name),
        str(plan.configuration) if plan else NONE,
        *(layers if wide else []),
        gpu_list(plan.gpu_ids) if plan else NONE,
        f"{gib(plan.memory_bytes):.1f}" if plan else NONE,
        *(asked if wide else []),
        Text(deployment.status, style=STATUS_STYLES.get(deployment.status, "")),
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Column:
    header: str
    cell: Callable[[Metrics], str]


def summary_tables(summary: Summary, *, width: int) -> Group:
    """Return requests with their SLOs, latency, and cost, a row per model; wide terminals show more."""
    wide = width >= _WIDE
    requests = [*_count_columns(summary, wide=wide), *_slo_columns(summary)]
    latency, tokens, cost = _latency_columns(wide=wide), _token_columns(), _cost_columns()
    if wide:
        parts = {"Requests and cost": [*requests, *cost], "Latency": [*latency, *tokens]}
    else:
        parts = {"Requests": requests, "Latency": latency, "Tokens and cost": [*tokens, *cost]}
    tables = [_summary_table(title, summary, columns) for title, columns in parts.items()]
    return Group(*(piece for table in tables for piece in (table, "")))


def _summary_table(title: str, summary: Summary, columns: Sequence[_Column]) -> Table:
    table = new_table(title)
    table.add_column("\nmodel", overflow="fold")  # the only column that gives way
    for column in columns:
        table.add_column(column.header, justify="right", no_wrap=True)
    for model, metrics in summary.models.items():
        table.add_row(Text(model), *(column.cell(metrics) for column in columns))
    if len(summary.models) > 1:
        table.add_section()
        table.add_row("all", *(column.cell(summary.overall) for column in columns), style="bold")
    return table


def _count_columns(summary: Summary, *, wide: bool) -> list[_Column]:
    """Return counts; those that did not complete as one sum, or on wide terminals by status."""
    counts = summary.overall.counts
    columns = [
        _Column(header="\nrequests", cell=lambda m: f"{m.counts.scheduled:,}"),
        _Column(header="\ncompleted", cell=lambda m: f"{m.counts.completed:,}"),
    ]
    if not wide:
        lost = _Column(header="not\ncompl.", cell=lambda m: f"{m.counts.scheduled - m.counts.completed:,}")
        return [*columns, lost]
    if counts.refused:
        columns.append(_Column(header="\nrefused", cell=lambda m: f"{m.counts.refused:,}"))
    if counts.failed:
        columns.append(_Column(header="\nfailed", cell=lambda m: f"{m.counts.failed:,}"))
    if counts.unfinished:
        columns.append(_Column(header="un-\nfinished", cell=lambda m: f"{m.counts.unfinished:,}"))
    return columns


def _slo_columns(summary: Summary) -> list[_Column]:
    columns = []
    if summary.overall.slo:
        columns += [
            _Column(header="SLO met\nof compl.", cell=lambda m: share(m.slo.over_completed if m.slo else None)),
            _Column(header="SLO met\nof all", cell=lambda m: share(m.slo.over_scheduled if m.slo else None)),
        ]
    if summary.overall.goodput:
        columns.append(_Column(header="good-\nput", cell=lambda m: share(m.goodput.share if m.goodput else None)))
    return columns


def _latency_columns(*, wide: bool) -> list[_Column]:
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


def _token_columns() -> list[_Column]:
    return [
        _figure_column("1st token s\nmean", "user_ttft_s", "mean"),
        _figure_column("\np95", "user_ttft_s", "p95"),
        _figure_column("TPOT s\nmean", "tpot_s", "mean"),
    ]


def _cost_columns() -> list[_Column]:
    return [
        _figure_column("GiB s\nmean", "cost_gib_s", "mean"),
        _Column(header="GPU h\nsum", cell=lambda m: figure(m.operational_cost_gpu_hours)),
        _Column(header="compl.\nper s", cell=lambda m: figure(m.throughput_per_s)),
    ]


def _figure_column(header: str, metric: str, which: str) -> _Column:
    def cell(metrics: Metrics) -> str:
        figures: Figures | None = getattr(metrics, metric)
        return figure(getattr(figures, which) if figures else None)

    return _Column(header=header, cell=cell)


def verdict_panel(verdict: Saturation, summary: Summary, *, width: int) -> Panel:
    """Return the verdict with the figures of the whole run beneath it."""
    style = VERDICT_STYLES[verdict.label]
    figures = Table.grid(padding=(0, 2))
    for name, value in _run_figures(summary):
        figures.add_row(Text(name, style="dim"), value)
    return Panel(
        Group(Text(verdict.sentence), "", figures),
        title=Text(verdict.label.value, style=f"bold {style}"),
        title_align="left",
        border_style=style,
        box=box.ROUNDED,
        padding=(0, 1),
        width=min(width, _WIDE),
    )


def _run_figures(summary: Summary) -> Iterable[tuple[str, str]]:
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
    """Return a line for each deployment that was rejected, failed, or plans to miss its SLO."""
    return [line for deployment in deployments if (line := _notice(deployment))]


def _notice(deployment: DeploymentRecord) -> Text | None:
    who = f"{deployment.endpoint.model.name} (deployment {deployment.deployment_id})"
    if deployment.plan is None:
        return Text.assemble(("rejected ", "bold red"), f"{who}: {deployment.reason}")
    if deployment.status == "down":
        return Text.assemble(("down ", "bold red"), f"{who}: {deployment.reason}")
    told = "; ".join(filter(None, (deployment.reason, deployment.plan.note)))
    return Text.assemble(("note ", "bold yellow"), f"{who}: {told}") if told else None
