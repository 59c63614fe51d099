"""`maveriq run`: replay a workload on engines that really run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from maveriq.cli.flags import with_options
from maveriq.cli.shared_flags import (
    AsJson,
    Backend,
    Hang,
    MostFailures,
    Quiet,
    Real,
    SloTpot,
    SloTtft,
    StartTimeout,
    TimeScale,
)
from maveriq.scenario.options import Options

_OUTPUT = "Output"


@with_options(Options)
def run(
    options: Options,
    *,
    backend: Backend = None,
    real: Real = False,
    time_scale: TimeScale = 1.0,
    start_timeout_s: StartTimeout = 900.0,
    hang_timeout_s: Hang = 30.0,
    max_restarts: MostFailures = 5,
    slo_ttft_ms: SloTtft = None,
    slo_tpot_ms: SloTpot = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for the records.", show_default="runs/NAME-BACKEND", rich_help_panel=_OUTPUT),
    ] = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Replay a workload on engines that really run.

    Takes the options of `maveriq sim`, and leaves the same records, to be
    compared with its own. The emulated engine needs no GPU: a process that
    takes the estimated time. Ctrl-C ends the run early, with its records.
    """
    from maveriq.cli.engine_site import Engines
    from maveriq.cli.running import run_for_real
    from maveriq.cli.simulating import Output

    run_for_real(
        options,
        Engines(
            backend=backend,
            real=real,
            time_scale=time_scale,
            start_timeout_s=start_timeout_s,
            hang_timeout_s=hang_timeout_s,
            max_restarts=max_restarts,
        ),
        Output(folder=out, slo_ttft_ms=slo_ttft_ms, slo_tpot_ms=slo_tpot_ms, as_json=as_json, quiet=quiet),
    )
