"""`maveriq run`: replay a workload on engines that really run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from maveriq.cli.flags import with_options
from maveriq.scenario.options import Options

_ENGINES, _OUTPUT = "Engines", "Output"


@with_options(Options)
def run(
    options: Options,
    *,
    backend: Annotated[
        str | None,
        typer.Option(metavar="emulated|torch|vllm|trtllm", help="What engines are made of.", rich_help_panel=_ENGINES),
    ] = None,
    real: Annotated[bool, typer.Option("--real", help="TensorRT-LLM on GPUs.", rich_help_panel=_ENGINES)] = False,
    time_scale: Annotated[
        float, typer.Option(help="Real seconds per second of the run (emulated alone).", rich_help_panel=_ENGINES)
    ] = 1.0,
    start_timeout_s: Annotated[
        float, typer.Option(help="An engine that does not serve by then has failed.", rich_help_panel=_ENGINES)
    ] = 900.0,
    hang_s: Annotated[
        float, typer.Option(help="An engine that is not heard for so long hangs.", rich_help_panel=_ENGINES)
    ] = 30.0,
    most_failures: Annotated[
        int, typer.Option(help="Failures in a row after which an engine is given up.", rich_help_panel=_ENGINES)
    ] = 5,
    slo_ttft_ms: Annotated[
        float | None, typer.Option(help="Count goodput under this time to first token.", rich_help_panel=_OUTPUT)
    ] = None,
    slo_tpot_ms: Annotated[
        float | None, typer.Option(help="Count goodput under this time per output token.", rich_help_panel=_OUTPUT)
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for the records.", show_default="runs/NAME-BACKEND", rich_help_panel=_OUTPUT),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON alone.", rich_help_panel=_OUTPUT)] = False,
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="No live view and no tables.", rich_help_panel=_OUTPUT)
    ] = False,
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
            hang_s=hang_s,
            most_failures=most_failures,
        ),
        Output(folder=out, slo_ttft_ms=slo_ttft_ms, slo_tpot_ms=slo_tpot_ms, as_json=as_json, quiet=quiet),
    )
