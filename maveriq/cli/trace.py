"""`maveriq trace`: look at a workload, write it as a schedule, check a file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from maveriq.cli.flags import with_options
from maveriq.scenario.options import Options

if TYPE_CHECKING:
    from maveriq.report.view import Part
    from maveriq.workload.requests import Workload
    from maveriq.workload.summary import WorkloadSummary

app = typer.Typer(rich_markup_mode=None, help="Look at workloads, export and check them.")

TraceArgument = Annotated[
    str,
    typer.Argument(
        metavar="TRACE", help="code, conversation, poisson, or the CSV file of an Azure trace or a schedule."
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON alone.")]

_SHAPING = (
    "scale", "models", "prompt_tokens", "output_tokens", "poisson_as_published", "seed", "slo_scale", "profile",
)  # fmt: skip
"""The options of a run that shape its workload, beside the trace itself."""

_PLOT_ROWS = 8
_EIGHTHS = " ▁▂▃▄▅▆▇█"


@app.callback(invoke_without_command=True)
def root(ctx: typer.Context) -> None:
    """Look at workloads, export and check them."""
    if ctx.invoked_subcommand is None:
        typer.echo(ctx.get_help())


@app.command()
@with_options(Options, only=_SHAPING)
def show(options: Options, *, trace: TraceArgument = "code", as_json: JsonOption = False) -> None:
    """Show a workload: counts, rate over time, models, lengths."""
    from maveriq.workload.summary import summarise

    summary = summarise(_workload(options, trace))
    if as_json:
        from dataclasses import asdict

        _print_json(asdict(summary) | {"mean_rate_per_s": summary.mean_rate_per_s})
        return
    from rich.console import Console

    console = Console()
    for part in _view(summary, console.width):
        console.print(part)


@app.command()
@with_options(Options, only=_SHAPING)
def export(
    options: Options,
    *,
    trace: TraceArgument = "code",
    out: Annotated[
        Path, typer.Option(metavar="FILE.csv", help="The schedule to write; it appears whole or not at all.")
    ],
    as_json: JsonOption = False,
) -> None:
    """Write a workload as a schedule, one request a row, which --trace can replay."""
    from maveriq.workload.traces import write_schedule

    workload = _workload(options, trace)
    write_schedule(workload.arrivals, out)
    if as_json:
        _print_json({"file": str(out), "requests": len(workload.arrivals)})
    else:
        typer.echo(f"{out}: {len(workload.arrivals):,} requests of {workload.name}")


@app.command()
def check(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The CSV file of an Azure trace or a schedule.")],
    *,
    as_json: JsonOption = False,
) -> None:
    """Check a trace file; the first thing that is wrong is named with its line."""
    from maveriq.workload.traces import AzureTrace, read_trace

    trace = read_trace(file)
    if isinstance(trace, AzureTrace):
        kind, requests = "Azure trace", int(trace.requests_per_minute.sum())
        span = f"{len(trace.requests_per_minute):,} minutes"
    else:
        kind, requests = "schedule", len(trace.arrivals)
        span = f"{trace.arrivals.arrival_us[-1] / 1e6:,.0f} s"
    if as_json:
        _print_json({"file": str(file), "kind": kind, "requests": requests, "span": span})
    else:
        typer.echo(f"OK {file}: {kind}, {requests:,} requests in {span}")


def _workload(options: Options, trace: str) -> Workload:
    from dataclasses import replace

    from maveriq.estimate.hardware_profile import load_profile
    from maveriq.scenario.workload import workload_for

    profile = load_profile(options.profile)
    return workload_for(replace(options, trace=trace), profile, slo_scale=options.slo_scale)


def _print_json(value: dict[str, object]) -> None:
    import json

    typer.echo(json.dumps(value, indent=2, allow_nan=False))


def _view(summary: WorkloadSummary, width: int) -> list[Part]:
    from maveriq.report.view import BLANK, Column, Table, Text, number_column, row

    models = Table(
        "Models",
        [Column("#", align="right"), Column("model"), number_column("asked at s"), number_column("requests")],
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
        width: characters to fit into; neighbouring bins share a column where there are too many.
    """
    per_column = -(-len(requests_per_bin) // max(1, width - 10))
    starts = range(0, len(requests_per_bin), per_column)
    rates = [sum(requests_per_bin[start : start + per_column]) / (per_column * bin_s) for start in starts]
    highest = max(rates)
    lines = []
    for row in reversed(range(_PLOT_ROWS)):
        # Each column has eight steps a row; this row shows those between its floor and its ceiling.
        steps = (round(rate / highest * _PLOT_ROWS * 8) - row * 8 for rate in rates)
        label = f"{highest * (row + 1) / _PLOT_ROWS:6.2f}/s" if row % 2 else " " * 8
        lines.append(f"{label} " + "".join(_EIGHTHS[min(8, max(0, step))] for step in steps))
    end = f"{len(requests_per_bin) * bin_s:,} s"
    lines.append(" " * 9 + "0 s" + end.rjust(max(len(end) + 1, len(rates) - 3)))
    return "\n".join(lines)
