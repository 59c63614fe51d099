"""`maveriq sim`: replays a workload on a simulated cluster."""

from __future__ import annotations

from maveriq.api import simulate
from maveriq.cli.options import OutputOptions, with_options
from maveriq.runs import save_run
from maveriq.scenario.options import Options


@with_options(Options, OutputOptions)
def sim(options: Options, output: OutputOptions) -> None:
    """Replay a workload on a simulated GPU cluster.

    Without any option: the Azure code trace at scale 0.4, the large model set,
    eight A6000 GPUs, policy hybrid, lowest cost. Writes its records to a folder.
    """
    from maveriq.cli.results import choose_folder, default_folder, live_view, show_run

    folder = choose_folder(output, default_folder(options))
    with live_view(output) as view:
        run = simulate(options, slo_ttft_ms=output.slo_ttft_ms, slo_tpot_ms=output.slo_tpot_ms, watcher=view)
    show_run(run, output, save_run(run, folder, overwrite=output.overwrite))
