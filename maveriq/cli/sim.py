"""`maveriq sim`: replay a workload on a simulated cluster."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from maveriq.cli.flags import with_options
from maveriq.cli.shared_flags import AsJson, Quiet, SloTpot, SloTtft
from maveriq.scenario.options import Options

_OUTPUT = "Output"


@with_options(Options)
def sim(
    options: Options,
    *,
    slo_ttft_ms: SloTtft = None,
    slo_tpot_ms: SloTpot = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for the records.", show_default="runs/NAME", rich_help_panel=_OUTPUT),
    ] = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Replay a workload on a simulated GPU cluster.

    Without any option: the Azure code trace at scale 0.4, the large model set,
    eight A6000 GPUs, policy hybrid, lowest cost. Leaves its records in a folder.
    """
    from maveriq.cli.simulating import Output, run_simulation

    run_simulation(
        options,
        Output(folder=out, slo_ttft_ms=slo_ttft_ms, slo_tpot_ms=slo_tpot_ms, as_json=as_json, quiet=quiet),
    )
