"""`maveriq compare`: how far a simulated run is from a real one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


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
            help="Largest errors allowed of the whole run; exit code 1 where one is missed.",
        ),
    ] = None,
    plot: Annotated[Path | None, typer.Option(metavar="FILE.png|svg", help="Draw both runs into a file.")] = None,
    data: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Where recorded runs lie.", show_default="MAVERIQ_DATA")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON alone.")] = False,
) -> None:
    """Show how far a simulated run is from a real one.

    Signed errors of the whole run and by model: latency, queue delay,
    service time, SLOs, throughput, cost; plans side by side; latency
    distributions and queues over one another.

    Tolerances in %: mean, p50, p95, p99, the same with queue- or service-,
    throughput, cost, gpu-hours, request (median error of a request); in pt:
    slo, slo-all, ks.
    """
    from maveriq.cli.comparing import Question, show_comparison

    show_comparison(Question(sim=sim, real=real, tolerance=tolerance, plot=plot, data=data, as_json=as_json))
