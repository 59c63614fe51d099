"""Charts of the cluster over time: load and memory of each GPU, deployments, and engines that batch continuously."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from maveriq.domain.records import NOT_YET, DeploymentRecord, EngineTable, GpuSample, RunRecord
from maveriq.report.formatting import NONE, figure, gpu_list, share
from maveriq.report.page.charts import TIME_LABEL, Axis, Chart, GanttChart, HeatMap, Line, LineChart, Span
from maveriq.report.page.sampling import means_over_spans
from maveriq.report.view import Column, Table, number_column, row
from maveriq.units import BYTES_PER_GIB, MICROS_PER_SECOND, seconds

Array: TypeAlias = npt.NDArray[Any]

_MAX_COLUMNS = 160
_MAX_GPU_ROWS = 64
_MAX_DEPLOYMENTS = 60
_MAX_ENGINES = 6
_ENGINE_POINTS = 240


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuHistory:
    """Load and memory over time, a row for each GPU, or for each group of neighbours where there are many.

    Args:
        names: of the rows.
        times_us: of the samples, ascending; each covers the time since the one before.
        load: percent, (row, sample); the mean of a group; NaN where it is not known.
        memory_gib: GiB likewise.
        most_gib: of the fullest GPU of a group.
        load_is: what the load is, for the caption.
    """

    names: Sequence[str]
    times_us: Array
    load: Array
    memory_gib: Array
    most_gib: Array
    load_is: str = "Share of the time that each GPU was busy"


def gpu_groups(gpu_ids: Sequence[int]) -> tuple[list[str], Array]:
    """Return the names of the rows, and where each of them begins in the ascending GPUs.

    A row is a GPU, or so many neighbours that 64 rows are enough: a power of two, as machines have GPUs.
    """
    size = 1
    while len(gpu_ids) > size * _MAX_GPU_ROWS:
        size *= 2
    starts = np.arange(0, len(gpu_ids), size)
    if size == 1:
        return [f"GPU {gpu_id}" for gpu_id in gpu_ids], starts
    return [f"GPUs {gpu_list(gpu_ids[start : start + size])}" for start in starts.tolist()], starts


def gpu_history(samples: Sequence[GpuSample]) -> GpuHistory:
    """Return the samples of a run, of which there is at least one."""
    times_us, at = np.unique([sample.time_us for sample in samples], return_inverse=True)
    gpu_ids, which = np.unique([sample.gpu_id for sample in samples], return_inverse=True)
    names, starts = gpu_groups(gpu_ids.tolist())
    busy, memory_gib = (np.full((len(gpu_ids), len(times_us)), np.nan) for _ in range(2))
    busy[which, at] = [100 * sample.busy_share for sample in samples]
    memory_gib[which, at] = [sample.memory_bytes / BYTES_PER_GIB for sample in samples]
    known = np.maximum(np.add.reduceat(np.isfinite(busy), starts, axis=0), 1)
    is_known = np.add.reduceat(np.isfinite(busy), starts, axis=0) > 0

    def mean(values: Array) -> Array:
        return np.where(is_known, np.add.reduceat(np.nan_to_num(values), starts, axis=0) / known, np.nan)

    return GpuHistory(
        names=names,
        times_us=times_us,
        load=mean(busy),
        memory_gib=mean(memory_gib),
        most_gib=np.fmax.reduceat(memory_gib, starts, axis=0),
    )


def gpu_charts(history: GpuHistory) -> Iterator[HeatMap]:
    """Yield the load and the memory of each GPU, or group of GPUs, over time."""
    times_us = history.times_us
    spans_s = np.diff(times_us, prepend=min(0, int(times_us[0]))) / MICROS_PER_SECOND
    group = np.arange(len(times_us)) * min(_MAX_COLUMNS, len(times_us)) // len(times_us)
    edges_s = np.concatenate(
        [[0.0], times_us[np.flatnonzero(np.diff(group, append=group[-1] + 1))] / MICROS_PER_SECOND]
    )
    edges_s[1:] = np.maximum(edges_s[1:], edges_s[:-1] + 1e-6)
    columns = len(edges_s) - 1
    table = _gpu_table(history, spans_s)
    mean_load = float(np.average(np.nan_to_num(history.load).mean(axis=0), weights=spans_s + 1e-12))
    rows_are = "" if history.names[0].startswith("GPU ") else " A row is the mean of neighbouring GPUs."
    most_gib = float(np.nanmax(history.most_gib))
    yield HeatMap(
        chart_id="gpu-load",
        title="GPU load",
        summary=f"{history.load_is}; {mean_load:.0f} % on average over GPUs and time.{rows_are}",
        table=table,
        edges=edges_s,
        rows=history.names,
        values=np.stack([means_over_spans(row_, spans_s, group, columns) for row_ in history.load]),
        top=100.0,
        unit="%",
    )
    yield HeatMap(
        chart_id="gpu-memory",
        title="GPU memory",
        summary=f"Memory in use on each GPU, at most {figure(most_gib)} GiB.{rows_are}",
        table=table,
        edges=edges_s,
        rows=history.names,
        values=np.stack([_most(row_, group, columns) for row_ in history.memory_gib]),
        top=float(np.nanmax(history.memory_gib)) or 1.0,
        unit="GiB",
    )


def _most(values: Array, group: Array, count: int) -> Array:
    most = np.full(count, -np.inf)
    known = np.isfinite(values)
    np.maximum.at(most, group[known], values[known])
    return np.where(np.isfinite(most), most, np.nan)


def _gpu_table(history: GpuHistory, spans_s: Array) -> Table:
    weights = (spans_s if spans_s.any() else np.ones(len(spans_s))) + 1e-12
    rows = []
    for name, load, memory, most in zip(history.names, history.load, history.memory_gib, history.most_gib, strict=True):
        known = np.isfinite(load)
        if not known.any():
            rows.append(row(name, NONE, NONE, NONE))
            continue
        mean, held = (float(np.average(values[known], weights=weights[known])) for values in (load, memory))
        rows.append(row(name, share(mean / 100), figure(held), figure(float(np.nanmax(most)))))
    headers = ("busy, mean", "memory GiB, mean", "memory GiB, most")
    return Table("Load and memory by GPU", [Column("GPU"), *map(number_column, headers)], rows)


def deployments_chart(record: RunRecord, styles: Mapping[str, int]) -> Iterator[GanttChart]:
    """Yield when each deployment loaded and served; nothing where there is no deployment with a plan."""
    placed = [deployment for deployment in record.deployments if deployment.plan is not None]
    if not placed:
        return
    ended_s = seconds(max(record.ended_us, 1))
    rows, spans = [], []
    for at, deployment in enumerate(placed[:_MAX_DEPLOYMENTS]):
        model = deployment.endpoint.model.name
        rows.append(f"{deployment.deployment_id}: {model}")
        for start_s, end_s, is_loading in _spans_of(deployment, ended_s):
            plan = deployment.plan
            where = f"{plan.configuration} on GPUs {gpu_list(plan.gpu_ids)}" if plan else ""
            what = "loading" if is_loading else "up"
            spans.append(
                Span(
                    row=at,
                    start_s=start_s,
                    end_s=end_s,
                    text=f"{what}: {where}",
                    style=styles.get(model, 0),
                    model=model if model in styles else "",
                    is_pale=is_loading,
                )
            )
    cells = [_lifetime_row(deployment, ended_s) for deployment in placed]
    headers = ("requested s", "ready s", "until s")
    more = f" The first {_MAX_DEPLOYMENTS} of {len(placed)}; all are in the table." if len(placed) > len(rows) else ""
    yield GanttChart(
        chart_id="deployments-over-time",
        title="Deployments",
        summary=f"When each deployment loaded (hatched) and was up (filled); there are {len(placed):,}.{more}",
        table=Table(
            "Deployments over time",
            [
                Column("#", align="right"),
                Column("model"),
                Column("GPUs"),
                *map(number_column, headers),
                Column("status"),
            ],
            cells,
        ),
        rows=rows,
        spans=spans,
    )


def _spans_of(deployment: DeploymentRecord, ended_s: float) -> Iterator[tuple[float, float, bool]]:
    """Yield the start and the end of loading, and of serving."""
    requested_s = seconds(deployment.endpoint.requested_us)
    end_s = ended_s if deployment.removed_us == NOT_YET else seconds(deployment.removed_us)
    is_ready = deployment.ready_us != NOT_YET
    ready_s = seconds(deployment.ready_us) if is_ready else end_s
    # Recordings do not say when an engine was ready that no request waited for.
    never_loaded = not is_ready and deployment.status == "up"
    if never_loaded:
        ready_s = requested_s
    if ready_s > requested_s:
        yield requested_s, ready_s, True
    if (is_ready or never_loaded) and end_s > ready_s:
        yield ready_s, end_s, False


def _lifetime_row(deployment: DeploymentRecord, ended_s: float) -> Any:
    plan = deployment.plan
    ready = NONE if deployment.ready_us == NOT_YET else f"{seconds(deployment.ready_us):,.1f}"
    removed = ended_s if deployment.removed_us == NOT_YET else seconds(deployment.removed_us)
    return row(
        str(deployment.deployment_id),
        deployment.endpoint.model.name,
        gpu_list(plan.gpu_ids) if plan else NONE,
        f"{seconds(deployment.endpoint.requested_us):,.1f}",
        ready,
        f"{removed:,.1f}",
        deployment.status,
    )


class _Panel(NamedTuple):
    chart_id: str
    title: str
    label: str
    column: str
    factor: float


_PANELS = (
    _Panel("kv-use", "KV cache in use", "KV blocks, %", "kv_use", 100.0),
    _Panel("engine-running", "Requests running by engine", "requests", "running", 1.0),
    _Panel("engine-waiting", "Requests waiting by engine", "requests", "waiting", 1.0),
)


def engine_charts(table: EngineTable | None, names: Mapping[int, str], styles: Mapping[str, int]) -> Iterator[Chart]:
    """Yield KV use and requests of each engine that batches continuously; of many, their mean and range.

    Args:
        table: the engines over time; None without any.
        names: the models of deployments.
        styles: of models.
    """
    if table is None or not len(table):
        return
    engines = np.unique(table.deployment_id).tolist()
    for panel in _PANELS:
        values = getattr(table, panel.column) * panel.factor
        if len(engines) > _MAX_ENGINES:
            lines = _range_lines(table, values)
        else:
            lines = [
                _engine_line(table, values, engine, number, names.get(engine, ""), styles)
                for number, engine in enumerate(engines, start=1)
            ]
        rows = [_engine_row(table, values, engine, names.get(engine, "")) for engine in engines]
        peak = float(np.nanmax(values)) if np.isfinite(values).any() else 0.0
        yield LineChart(
            chart_id=panel.chart_id,
            title=panel.title,
            summary=f"Means over intervals of {figure(_interval_s(table))} s or longer, at most {figure(peak)} "
            f"({panel.label}).",
            table=Table(
                f"{panel.title}: {panel.label}",
                [Column("#", align="right"), Column("model"), number_column("mean"), number_column("most")],
                rows,
            ),
            x=Axis(label=TIME_LABEL),
            y=Axis(label=panel.label, low=0),
            lines=lines,
            is_over_time=True,
        )


def _interval_s(table: EngineTable) -> float:
    times = np.unique(table.time_us)
    return float(np.diff(times).min()) / MICROS_PER_SECOND if len(times) > 1 else float(times[0]) / MICROS_PER_SECOND


def _spans_s(table: EngineTable, rows: Array) -> Array:
    ends_s = table.time_us[rows] / MICROS_PER_SECOND
    first = max(0.0, 2 * ends_s[0] - ends_s[1]) if len(rows) > 1 else 0.0
    return np.diff(ends_s, prepend=first)


def _engine_line(
    table: EngineTable, values: Array, engine: int, number: int, model: str, styles: Mapping[str, int]
) -> Line:
    rows = np.flatnonzero(table.deployment_id == engine)
    spans_s, ends_s = _spans_s(table, rows), table.time_us[rows] / MICROS_PER_SECOND
    count = min(_ENGINE_POINTS, len(rows))
    group = np.arange(len(rows)) * count // len(rows)
    means = means_over_spans(values[rows], spans_s, group, count)
    edges_s = np.concatenate([[ends_s[0] - spans_s[0]], ends_s[np.flatnonzero(np.diff(group, append=count))]])
    return Line(
        name=f"{engine}: {model}",
        x=edges_s,
        y=np.append(means, means[-1]),
        style=number,
        model=model if model in styles else "",
        is_step=True,
    )


def _range_lines(table: EngineTable, values: Array) -> list[Line]:
    """Return the highest, the mean and the lowest of many engines over time."""
    times_us, at = np.unique(table.time_us, return_inverse=True)
    columns = np.arange(len(times_us)) * min(_ENGINE_POINTS, len(times_us)) // len(times_us)
    count = int(columns[-1]) + 1
    group, known = columns[at], np.isfinite(values)
    low, high = np.full(count, np.inf), np.full(count, -np.inf)
    np.minimum.at(low, group[known], values[known])
    np.maximum.at(high, group[known], values[known])
    means = means_over_spans(values, np.ones(len(values)), group, count)
    ends_s = times_us[np.flatnonzero(np.diff(columns, append=count))] / MICROS_PER_SECOND
    parts = {"highest": high, "mean": means, "lowest": low}
    return [
        Line(name=f"{name} of the engines", x=ends_s, y=np.where(np.isfinite(part), part, np.nan), style=style)
        for style, (name, part) in enumerate(parts.items(), start=1)
    ]


def _engine_row(table: EngineTable, values: Array, engine: int, model: str) -> Any:
    rows = np.flatnonzero(table.deployment_id == engine)
    known = np.isfinite(values[rows])
    spans_s = _spans_s(table, rows)[known] + 1e-12
    mean = float(np.average(values[rows][known], weights=spans_s)) if known.any() else None
    most = float(values[rows][known].max()) if known.any() else None
    return row(str(engine), model, figure(mean), figure(most))
