"""`maveriq sim`: replays a workload on a simulated cluster."""

from __future__ import annotations

from dataclasses import dataclass

import typer

from maveriq.api import simulate
from maveriq.cli.options import OutputOptions, with_options
from maveriq.runs import save_run
from maveriq.scenario.options import Options, option


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulatorOptions:
    """What simulates, and how its records are written; the results are the same."""

    kernel: str = option(
        "auto",
        "What simulates: simpy, fast (compiled, with the same records; docs/performance.md), or auto.",
        "Simulator",
        choices=("auto", "fast", "simpy"),
    )
    records: str = option(
        "csv",
        "The table of requests: csv, or parquet, which is faster to write and read.",
        "Simulator",
        choices=("csv", "parquet"),
    )


@with_options(Options, OutputOptions, SimulatorOptions)
def sim(options: Options, output: OutputOptions, simulator: SimulatorOptions) -> None:
    """Replay a workload on a simulated GPU cluster.

    Without any option: the Azure code trace at scale 0.4, the large model set,
    eight A6000 GPUs, policy hybrid, lowest cost. Writes its records to a folder.
    """
    from maveriq.cli.results import choose_folder, default_folder, live_view, show_run
    from maveriq.report.run_folder import RecordsFormat
    from maveriq.scenario.defaults import choice

    choice(RecordsFormat, "--records", simulator.records)  # before long work
    folder = choose_folder(output, default_folder(options))
    with live_view(output) as view:
        run = simulate(
            options,
            slo_ttft_ms=output.slo_ttft_ms,
            slo_tpot_ms=output.slo_tpot_ms,
            kernel=simulator.kernel,
            watcher=view,
            notify=None if output.quiet or output.as_json else lambda sentence: typer.echo(sentence, err=True),
        )
    show_run(run, output, save_run(run, folder, records=simulator.records, overwrite=output.overwrite))
