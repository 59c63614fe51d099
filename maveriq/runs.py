"""`Run`: what one run did, as tables, metrics, a plot and a folder; `load_run` reads a folder back."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from html import escape
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from maveriq.errors import InputError
from maveriq.files import as_path
from maveriq.scenario.options import Options, options_from

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from maveriq.domain.records import RunRecord
    from maveriq.report.metrics import Summary
    from maveriq.report.page.run_page import RunResults
    from maveriq.report.saturation import Saturation


ENGINE_PROCESSES_FILE = "engine_processes.csv"


@dataclass(frozen=True, kw_only=True, repr=False, eq=False)
class Run:
    """What one run did, simulated or real. Pickles; `save` and `load_run` keep it in a folder.

    Args:
        record: every request, deployment and GPU sample.
        meta: what led to it, as in run.json: kind, workload, notes, options, seed, versions.
        options: the options with their defaults resolved; None where another version of maveriq wrote the folder.
        slo_ttft_ms: time to first token within which a request counts as goodput.
        slo_tpot_ms: time per output token within which a request counts as goodput.
        engine_processes_csv: engine_processes.csv of a run on engines, "" without one.
        interrupted: Ctrl-C, SIGTERM or SIGHUP ended the run early.
        folder: where `maveriq.run` has saved it, None if it has not.
    """

    record: RunRecord
    meta: Mapping[str, Any]
    options: Options | None
    slo_ttft_ms: float | None = None
    slo_tpot_ms: float | None = None
    engine_processes_csv: str = ""
    interrupted: bool = False
    folder: Path | None = None

    @cached_property
    def requests(self) -> pd.DataFrame:
        """One row per request, with the columns of requests.csv."""
        from maveriq.report.frames import requests_frame

        return requests_frame(self.record)

    @cached_property
    def deployments(self) -> pd.DataFrame:
        """One row per deployment, with the columns of deployments.csv."""
        from maveriq.report.frames import deployments_frame

        return deployments_frame(self.record)

    @cached_property
    def gpus(self) -> pd.DataFrame:
        """One row per GPU and sample, with the columns of gpus.csv."""
        from maveriq.report.frames import gpus_frame

        return gpus_frame(self.record)

    @cached_property
    def engines(self) -> pd.DataFrame:
        """One row per engine and interval, with the columns of engines.csv; no row without continuous engines."""
        from maveriq.report.frames import engines_frame

        return engines_frame(self.record)

    @cached_property
    def metrics(self) -> pd.DataFrame:
        """One row for the whole run ("all") and one per model; seconds, shares and GiB s as the columns say."""
        import pandas as pd

        rows = {name: _metrics_row(metrics) for name, metrics in self.summary.models.items()}
        return pd.DataFrame({"all": whole_run_figures(self.summary), **rows}).T

    @cached_property
    def summary(self) -> Summary:
        """Latency, SLO attainment, goodput, throughput and cost, of the run and of each model."""
        from maveriq.report.metrics import summarise

        return summarise(self.record, slo_ttft_s=_seconds(self.slo_ttft_ms), slo_tpot_s=_seconds(self.slo_tpot_ms))

    @cached_property
    def saturation(self) -> Saturation:
        """Whether the cluster kept up with the requests, and the evidence."""
        from maveriq.report.saturation import assess_saturation

        return assess_saturation(self.record, options=self.options)

    @property
    def notes(self) -> tuple[str, ...]:
        """What a reader of the results must know."""
        return tuple(self.meta["notes"])

    def to_dict(self) -> dict[str, Any]:
        """Return saturation, summary and deployments in plain values, as `--json` prints them."""
        from maveriq.report.run_folder import summary_to_json

        return summary_to_json(self.summary, self.saturation, self.record.deployments)

    def save(self, path: str | Path, *, records: str = "csv", overwrite: bool = False) -> Path:
        """Write a run folder, whole or not at all, and return where it is.

        Args:
            path: the folder; it may exist if it is empty.
            records: "parquet" for a table of requests in Parquet, which is faster and smaller than "csv".
            overwrite: replace a run that is there.

        The logs of engines are not part of a `Run`; `maveriq.run(out=...)` keeps them.

        Raises:
            InputError: the folder cannot be written, holds a run and `overwrite` is false, or holds something else.
            MaveriqError: the disk is full.
        """
        from maveriq.report.run_folder import check_writable

        folder = as_path(path, "path")
        check_writable(folder, overwrite=overwrite)
        return save_run(self, folder, records=records, overwrite=overwrite)

    def plot(self) -> Figure:
        """Return a matplotlib figure: the latency of each request, and the requests waiting, over time."""
        from maveriq.report.run_plot import run_figure

        return run_figure(self.record, title=str(self.meta["workload"]))

    def to_html(self, path: str | Path, *, overwrite: bool = False) -> Path:
        """Write a report of the run as one HTML file that loads nothing, and return where it is.

        Args:
            path: the file to write.
            overwrite: replace a file that is there.

        Raises:
            InputError: the file is there already and `overwrite` is false, or it cannot be written.
            MaveriqError: the extra `maveriq[report]` is not installed; the disk is full.
        """
        from maveriq.report.page.render import write_page
        from maveriq.report.page.run_page import run_page

        page = run_page(self.results(self.folder.name if self.folder else ""))
        return write_page(page, path, overwrite=overwrite)

    def results(self, name: str = "") -> RunResults:
        """Return what reports show of the run; `name` is what they call it, "" for its workload."""
        from maveriq.report.page.run_page import RunResults

        return RunResults(
            name=name or str(self.meta["workload"]),
            record=self.record,
            summary=self.summary,
            saturation=self.saturation,
            meta=self.meta,
        )

    def __repr__(self) -> str:
        counts = self.summary.overall.counts
        return (
            f"<Run {self.meta['kind']}: {self.meta['workload']}, {counts.completed:,} of {counts.scheduled:,} requests "
            f"completed, {self.saturation.label.value}>"
        )

    def _repr_html_(self) -> str:
        """Return the metrics of the run as HTML, for notebooks."""
        heading = f"<p><b>{escape(str(self.meta['workload']))}</b>: {escape(self.saturation.sentence)}</p>"
        table: str = self.metrics.to_html(float_format="{:.3f}".format, na_rep="", border=0)
        return heading + table

    def __getstate__(self) -> dict[str, Any]:
        """Leave the computed tables out of pickles."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


def save_run(run: Run, folder: Path, *, logs: Path | None = None, records: str = "csv", overwrite: bool) -> Path:
    """Write a run folder, whole or not at all, and return where it is; check the folder before the run.

    Without `overwrite` a folder that another process has filled meanwhile leaves the run the next free name: it may be
    the result of hours.

    Args:
        run: what is written.
        folder: see `maveriq.report.run_folder.check_writable`.
        logs: a folder of engine logs, which moves into the run folder.
        records: the format of the table of requests, csv or parquet.
        overwrite: replace a run that is there.

    Raises:
        InputError: the folder cannot be written, or there is no such format.
        MaveriqError: the disk is full.
    """
    from maveriq.report.run_folder import RecordsFormat, write_run
    from maveriq.scenario.defaults import choice

    records_format = choice(RecordsFormat, "records", records)

    def write_engines(fresh: Path) -> None:
        if logs is not None:
            shutil.move(logs, fresh)  # a copy would need the space twice
        if run.engine_processes_csv:
            (fresh / ENGINE_PROCESSES_FILE).write_text(run.engine_processes_csv, encoding="utf-8")

    return write_run(
        folder, run.record, run.to_dict(), run.meta, more=write_engines, records=records_format, overwrite=overwrite
    )


def _metrics_row(metrics: Any) -> dict[str, float]:
    counts, row = metrics.counts, {}
    row["requests"], row["completed"] = counts.scheduled, counts.completed
    for name in _TIMES:
        figures = getattr(metrics, name)
        for which in _STATISTICS:
            column = f"{name.removesuffix('_s')}_{which}_s"
            row[column] = float("nan") if figures is None else getattr(figures, which)
    row["slo_attainment"] = float("nan") if metrics.slo is None else metrics.slo.over_scheduled
    of_completed = None if metrics.slo is None else metrics.slo.over_completed
    row["slo_attainment_of_completed"] = float("nan") if of_completed is None else of_completed
    row["goodput"] = float("nan") if metrics.goodput is None else metrics.goodput.share
    row["throughput_per_s"] = float("nan") if metrics.throughput_per_s is None else metrics.throughput_per_s
    row["cost_gib_s_mean"] = float("nan") if metrics.cost_gib_s is None else metrics.cost_gib_s.mean
    row["gpu_hours"] = metrics.operational_cost_gpu_hours
    return row


_TIMES = ("latency_s", "queue_s", "service_s", "ttft_s", "tpot_s", "itl_s")
_STATISTICS = ("mean", "p50", "p95", "p99")
METRIC_COLUMNS: Mapping[str, str] = MappingProxyType(
    {
        "requests": "counts",
        "completed": "counts",
        **{f"{name.removesuffix('_s')}_{which}_s": name for name in _TIMES for which in _STATISTICS},
        "slo_attainment": "slo",
        "slo_attainment_of_completed": "slo",
        "goodput": "goodput",
        "throughput_per_s": "throughput_per_s",
        "cost_gib_s_mean": "cost_gib_s",
        "gpu_hours": "operational_cost_gpu_hours",
    }
)
"""The columns of `Run.metrics`, and which field of `Metrics` each is of."""


def whole_run_figures(summary: Summary) -> dict[str, float]:
    """Return the row "all" of `Run.metrics`, by column; with the use of the cluster where it was sampled."""
    use, row = summary.gpus, _metrics_row(summary.overall)
    if use is None:
        return row
    return row | {
        "gpus_busy_mean": use.mean_gpus,
        "gpus_busy_peak": use.peak_gpus,
        "memory_mean_gib": use.mean_memory_gib,
        "memory_peak_gib": use.peak_memory_gib,
    }


def _seconds(milliseconds: float | None) -> float | None:
    return None if milliseconds is None else milliseconds / 1e3


def _milliseconds(seconds: float | None) -> float | None:
    return None if seconds is None else seconds * 1e3


def load_run(path: str | Path, *, data: str | Path | None = None) -> Run:
    """Read a run folder, or a recorded run of the published testbed by its name.

    Args:
        path: the folder, or the name of a recorded run.
        data: the folder of recordings; None takes MAVERIQ_DATA.

    Raises:
        InputError: the folder holds no run, or its files do not belong together.
    """
    from maveriq.files import exists, measured_data_path
    from maveriq.report.reading import read_meta, read_run

    folder = as_path(path, "path")
    if not exists(folder):
        no_recordings = data is None and measured_data_path() is None
        if no_recordings or folder.name != str(path):  # names of recorded runs have no slash
            others = ", or give the folder of recorded runs with --data or MAVERIQ_DATA" if no_recordings else ""
            raise InputError(f"run folder {str(path)!r} does not exist; check the path{others}")
        return _recorded_run(str(path), data)
    record, meta = read_run(folder), read_meta(folder)
    summary = meta.pop("summary", {})
    meta = {"kind": "", "workload": folder.name, "notes": []} | meta
    return Run(
        record=record,
        meta=meta,
        options=_options_of(meta),
        slo_ttft_ms=_milliseconds(summary.get("slo_ttft_s")),
        slo_tpot_ms=_milliseconds(summary.get("slo_tpot_s")),
        engine_processes_csv=_read_engine_processes(folder),
        interrupted=meta.get("interrupted") is True,
    )


def _read_engine_processes(folder: Path) -> str:
    """Return engine_processes.csv of a run on engines, "" for another run."""
    from maveriq.input_files import read_text

    path = folder / ENGINE_PROCESSES_FILE
    return read_text(path, what="table of engine processes") if path.exists() else ""


def _recorded_run(name: str, data: str | Path | None) -> Run:
    from maveriq.testbed.recorded_runs import load_recorded_runs, meta_of_recorded

    (recorded,) = load_recorded_runs([name], None if data is None else Path(data), hint="or give the folder of a run")
    meta = meta_of_recorded(recorded.run, replayed=False)
    return Run(record=recorded.record, meta=meta, options=_options_of(meta))


def _options_of(meta: Mapping[str, Any]) -> Options | None:
    try:
        return options_from(Options, meta["options"])
    except (InputError, KeyError, TypeError):  # written by another version
        return None
