"""`maveriq compare`: shows how far a simulated run is from a real one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import msgspec
import typer
from rich.console import Console

from maveriq import api
from maveriq.cli.options import JsonFlag
from maveriq.errors import MaveriqError
from maveriq.report.compare import check, parse_tolerances
from maveriq.report.compare_plot import POINTS, check_plot_name, write_plot
from maveriq.report.compare_view import comparison_view, matching_line
from maveriq.report.text_plot import dots_across
from maveriq.runs import load_run


def compare(
    sim: Annotated[str, typer.Argument(metavar="SIM", help="Folder of the run to judge.")],
    real: Annotated[
        str, typer.Argument(metavar="REAL", help="Folder of the run to measure it by, or a recorded testbed run.")
    ],
    *,
    tolerance: Annotated[
        str | None,
        typer.Option(
            metavar="mean=10%,slo=3pt,...",
            help="Largest errors allowed of the whole run; exit code 1 where one is exceeded.",
        ),
    ] = None,
    plot: Annotated[Path | None, typer.Option(metavar="FILE.png|svg", help="Draw both runs into a file.")] = None,
    data: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="The folder of recorded runs.", show_default="MAVERIQ_DATA"),
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Show how far a simulated run is from a real one.

    Signed errors of the whole run and by model: latency, queueing delay,
    service time, SLOs, throughput, cost; plans side by side; latency
    distributions and queues over one another.

    Tolerances in %: mean, p50, p95, p99, the same with queue- or service-,
    throughput, cost, gpu-hours, request (median error of a request); in pt:
    slo, slo-all, ks.
    """
    tolerances = parse_tolerances(tolerance) if tolerance is not None else ()
    if plot is not None:
        check_plot_name(plot)
    sim_run, real_run = (load_run(name, data=data) for name in (sim, real))
    comparison = api.compare(sim_run, real_run)
    checks = check(comparison, tolerances)
    if plot is not None:
        title = f"{Path(sim).name} against {Path(real).name}"
        write_plot(plot, comparison, comparison.curves(POINTS), title=title)
    if as_json:
        answer = {
            "sim": sim,
            "real": real,
            "within_tolerance": all(result.met for result in checks) if checks else None,
            "checks": msgspec.to_builtins(checks),
            "matching": matching_line(comparison),
            **comparison.to_dict(),
        }
        typer.echo(json.dumps(answer, indent=2, allow_nan=False))
    else:
        console = Console()
        console.print(f"simulated {sim}\nreal      {real}\n", markup=False, highlight=False)
        curves = comparison.curves(dots_across(console.width))
        ascii_only = console.options.ascii_only
        console.print(comparison_view(comparison, curves, checks, width=console.width, ascii_only=ascii_only))
        if plot is not None:
            console.print(f"plot: {plot}", markup=False, highlight=False, soft_wrap=True)
    missed = [result.name for result in checks if not result.met]
    if missed:
        raise MaveriqError(f"out of tolerance: {', '.join(missed)}")
