"""`maveriq trace`: shows a workload, exports it as a schedule, and checks and converts trace files."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated

import typer

from maveriq.cli.options import JsonFlag, OverwriteFlag, with_options
from maveriq.cli.output import echo
from maveriq.cli.trace_convert import convert
from maveriq.estimate.fitted_profile import load_any_profile
from maveriq.files import check_file_writable
from maveriq.report.terminal import open_console
from maveriq.report.view import BLANK, Column, Part, Table, Text, number_column, row
from maveriq.scenario.options import Options
from maveriq.scenario.workload import workload_for
from maveriq.workload.requests import Workload
from maveriq.workload.schedules import SCHEDULE, write_schedule
from maveriq.workload.summary import WorkloadSummary, summarise
from maveriq.workload.trace_formats import RequestTrace, counted, remarks_on
from maveriq.workload.traces import read_trace

app = typer.Typer(rich_markup_mode=None, help="Show, export, check and convert workloads.")
app.command()(convert)

TraceArgument = Annotated[
    str | None,
    typer.Argument(
        metavar="TRACE",
        help="code, conversation, poisson, constant, synthetic, or a file of requests (traces/README.md).",
        show_default="code; poisson with --rate; synthetic with --concurrency",
    ),
]

_WORKLOAD_OPTIONS = (
    "scale", "arrivals", "rate", "duration_s", "limit", "num_prompts", "concurrency", "think_s", "turns",
    "prefix_tokens", "prefixes", "models", "prompt_tokens", "output_tokens", "poisson_as_published", "seed",
    "slo_scale", "profile",
)  # fmt: skip
"""The options of a run that shape its workload, in addition to the trace itself."""

_PLOT_ROWS = 8
_EIGHTHS = " ▁▂▃▄▅▆▇█"


@app.callback(invoke_without_command=True)
def root(ctx: typer.Context) -> None:
    """Show, export, check and convert workloads."""
    if ctx.invoked_subcommand is None:
        typer.echo(ctx.get_help())


@app.command()
@with_options((Options, _WORKLOAD_OPTIONS))
def show(options: Options, *, trace: TraceArgument = None, as_json: JsonFlag = False) -> None:
    """Show a workload: counts, rate over time, models, lengths."""
    workload = _workload(options, trace)
    summary, source = summarise(workload), workload.source
    if as_json:
        made_of = {} if source is None else {"trace": source.to_dict()}
        _print_json(asdict(summary) | {"mean_rate_per_s": summary.mean_rate_per_s} | made_of)
        return

    console = open_console()
    for part in _view(summary, console.width, workload.concurrency):
        console.print(part)
    if source is not None:
        console.print(source.describe(), highlight=False, markup=False, soft_wrap=True)


@app.command()
@with_options((Options, _WORKLOAD_OPTIONS))
def export(
    options: Options,
    *,
    trace: TraceArgument = None,
    out: Annotated[Path, typer.Option(metavar="FILE.csv", help="The schedule to write, whole or not at all.")],
    overwrite: OverwriteFlag = False,
    as_json: JsonFlag = False,
) -> None:
    """Write a workload as a schedule: one request per row, for --trace to replay."""
    check_file_writable(out, what=SCHEDULE, overwrite=overwrite)
    workload = _workload(options, trace)
    write_schedule(workload.arrivals, out, overwrite=overwrite)
    if as_json:
        _print_json({"file": str(out), "requests": len(workload.arrivals)})
    else:
        echo(f"{out}: {len(workload.arrivals):,} requests of {workload.name}")


@app.command()
def check(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A file of requests: a trace or a schedule.")],
    *,
    as_json: JsonFlag = False,
) -> None:
    """Check a trace file: say what it was recognised as, or report the first error with its line."""
    trace = read_trace(file)
    answer: dict[str, object] = {"file": str(file)}
    if isinstance(trace, RequestTrace):
        minutes = counted(len(trace.requests_per_minute), "minute")
        span = minutes if trace.has_dates else f"{trace.arrival_us[-1] / 1e6:,.0f} s"
        answer |= {
            "kind": trace.format_name,
            "requests": len(trace),
            "span": span if trace.has_times else "no times",
            "requests_without_tokens": trace.requests_without_tokens,
            "ignored_columns": list(trace.ignored_columns),
        }
    else:
        span = f"{trace.arrivals.arrival_us[-1] / 1e6:,.0f} s"
        answer |= {"kind": "schedule", "requests": len(trace.arrivals), "span": span}
    if as_json:
        _print_json(answer)
        return
    more = "; ".join(remarks_on(trace)) if isinstance(trace, RequestTrace) else ""
    requests = counted(len(trace if isinstance(trace, RequestTrace) else trace.arrivals), "request")
    span = "" if answer["span"] == "no times" else f" in {answer['span']}"
    echo(f"OK {file}: {answer['kind']}, {requests}{span}{'; ' if more else ''}{more}")


def _workload(options: Options, trace: str | None) -> Workload:
    profile = load_any_profile(options.profile)
    chosen = options if trace is None else replace(options, trace=trace)
    return workload_for(chosen, profile, slo_scale=options.slo_scale)


def _print_json(value: dict[str, object]) -> None:
    typer.echo(json.dumps(value, indent=2, allow_nan=False))


def _view(summary: WorkloadSummary, width: int, concurrency: int | None) -> list[Part]:
    """Return the parts of a workload; a closed loop has no rate before it runs."""
    models = Table(
        "Models",
        [Column("#", align="right"), Column("model"), number_column("requested s"), number_column("requests")],
        [
            row(str(endpoint.endpoint), endpoint.model, f"{endpoint.requested_s:,.0f}", f"{endpoint.requests:,}")
            for endpoint in summary.endpoints
        ],
    )
    quantiles = ("minimum", "p25", "median", "p75", "p90", "p99", "maximum")
    lengths = Table(
        "Lengths in tokens",
        [Column(""), *map(number_column, (*quantiles, "mean"))],
        [
            row(name, *(f"{getattr(tokens, quantile):,}" for quantile in quantiles), f"{tokens.mean:,.1f}")
            for name, tokens in (("prompt", summary.prompt_tokens), ("output", summary.output_tokens))
        ],
    )
    if concurrency is not None:
        headline = f"{summary.name}: {summary.requests:,} requests of {counted(concurrency, 'client')} in a closed loop"
        return [Text(headline), models, BLANK, lengths]
    headline = (
        f"{summary.name}: {summary.requests:,} requests from {summary.first_arrival_s:,.1f} s"
        f" to {summary.last_arrival_s:,.1f} s, {summary.mean_rate_per_s:.2f} a second"
    )
    return [Text(headline), Text(rate_plot(summary.requests_per_bin, summary.bin_s, width)), models, BLANK, lengths]


def rate_plot(requests_per_bin: tuple[int, ...], bin_s: int, width: int) -> str:
    """Return a bar chart of requests a second over time, in block characters.

    Args:
        requests_per_bin: arrivals in each bin.
        bin_s: seconds of a bin.
        width: characters to fit into; adjacent bins share a column where there are too many.
    """
    per_column = -(-len(requests_per_bin) // max(1, width - 10))
    starts = range(0, len(requests_per_bin), per_column)
    rates = [sum(requests_per_bin[start : start + per_column]) / (per_column * bin_s) for start in starts]
    highest = max(rates)
    lines = []
    for level in reversed(range(_PLOT_ROWS)):
        # Each column has eight steps a level; this level shows those between its floor and its ceiling.
        steps = (round(rate / highest * _PLOT_ROWS * 8) - level * 8 for rate in rates)
        label = f"{highest * (level + 1) / _PLOT_ROWS:6.2f}/s" if level % 2 else " " * 8
        lines.append(f"{label} " + "".join(_EIGHTHS[min(8, max(0, step))] for step in steps))
    end = f"{len(requests_per_bin) * bin_s:,} s"
    lines.append(" " * 9 + "0 s" + end.rjust(max(len(end) + 1, len(rates) - 3)))
    return "\n".join(lines)
