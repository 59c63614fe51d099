"""`maveriq run`: replays a workload on engines that really run."""

from __future__ import annotations

import glob
import shlex
from dataclasses import asdict
from pathlib import Path

from maveriq import api
from maveriq.cli.options import OutputOptions, with_options
from maveriq.cli.results import changed_options, choose_folder, default_folder, live_view, show_run
from maveriq.domain.records import NOT_YET
from maveriq.errors import MaveriqError
from maveriq.exec.local_machine import EngineOptions
from maveriq.report.reading import read_meta
from maveriq.report.run_folder import free_folder
from maveriq.runs import Run
from maveriq.scenario.options import Options, flag


@with_options(Options, EngineOptions, OutputOptions)
def run(options: Options, engines: EngineOptions, output: OutputOptions) -> None:
    """Replay a workload on engines that really run.

    Takes the options of `maveriq sim`, and writes the same records, so that the
    two can be compared. The emulated engine needs no GPU: a process that takes
    the estimated time. Ctrl-C ends the run early, with its records.
    """
    wanted = choose_folder(output, default_folder(options, engines))
    quiet = output.quiet or output.as_json
    with live_view(output) as view:
        finished = api.run(
            options,
            out=wanted,
            overwrite=output.overwrite,
            slo_ttft_ms=output.slo_ttft_ms,
            slo_tpot_ms=output.slo_tpot_ms,
            watcher=None if quiet else view,
            **asdict(engines),
        )
    folder = finished.folder or wanted
    show_run(finished, output, folder, last_line=_suggestion(options, finished, folder))
    if finished.interrupted:
        raise KeyboardInterrupt
    planned = [deployment for deployment in finished.record.deployments if deployment.plan is not None]
    if planned and all(deployment.ready_us == NOT_YET and deployment.status == "down" for deployment in planned):
        raise MaveriqError(f"no engine came up: {planned[0].reason}; records: {folder}")


def _suggestion(options: Options, finished: Run, folder: Path) -> str:
    """Return the command that compares the run with a simulated one, after the one that simulates it if needed."""
    name = default_folder(options)
    known = [name, *sorted(name.parent.glob(f"{glob.escape(name.name)}-[0-9]*"))]
    simulated = next((found for found in known if _is_simulation_of(finished, found)), None)
    compare = shlex.join(["maveriq", "compare", str(simulated or free_folder(name)), str(folder)])
    if simulated is None:
        given = [part for name, value in changed_options(options) for part in (flag(name), value) if part]
        compare = f"{shlex.join(['maveriq', 'sim', '--quiet', *given])} && {compare}"
    return f"compare with the simulator: {compare}"


def _is_simulation_of(finished: Run, folder: Path) -> bool:
    """Return whether a folder holds a simulation with the options of a run."""
    try:
        meta = read_meta(folder)
    except MaveriqError:
        return False
    options = finished.meta["options"]
    as_read = {name: list(value) if isinstance(value, tuple) else value for name, value in options.items()}
    return meta.get("kind") == "simulated" and meta.get("options") == as_read
