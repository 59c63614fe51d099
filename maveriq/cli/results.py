"""Shows the results of a run and names its folder; shared by `maveriq sim` and `maveriq run`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import typer
from rich.console import Console

from maveriq.cli.options import OutputOptions
from maveriq.errors import MaveriqError
from maveriq.report.live import ProgressView, make_view
from maveriq.report.results import results_view
from maveriq.runs import Run
from maveriq.scenario.defaults import resolved, with_cluster_defaults
from maveriq.scenario.options import Options
from maveriq.workload.build import DEFAULT_SCALE


def default_folder(options: Options) -> Path:
    """Return the folder of a run without `--out`: `runs/` and what distinguishes the run from others."""
    parts = [_policy_of(options), options.intent, Path(options.models).stem, Path(options.trace).stem]
    if options.scale is not None or not options.trace.endswith((".csv", ".gz")):
        parts.append(f"{DEFAULT_SCALE if options.scale is None else options.scale:g}")
    return Path("runs") / "-".join(part.replace("/", "_").replace(":", "_") for part in parts)


def _policy_of(options: Options) -> str:
    from maveriq.estimate.hardware_profile import load_profile
    from maveriq.exec.local_machine import local_cluster

    if options.policy is not None:
        return options.policy
    profile = load_profile(options.profile)
    return resolved(with_cluster_defaults(options, profile, local_cluster(options.gpus, profile)).policy)


def live_view(output: OutputOptions) -> ProgressView:
    """Return the view of a run's progress on stderr."""
    interactive = sys.stdout.isatty() and sys.stderr.isatty()
    return make_view(Console(stderr=True), quiet=output.quiet or output.as_json, interactive=interactive)


def show_run(run: Run, output: OutputOptions, folder: Path, *, last_line: str = "") -> None:
    """Print the results of a run that is saved in a folder.

    Raises:
        MaveriqError: nothing could be deployed.
    """
    deployments = run.record.deployments
    if deployments and all(deployment.plan is None for deployment in deployments):
        raise MaveriqError(f"nothing could be deployed: {deployments[0].reason}; records: {folder}")
    if output.as_json:
        answer = {"folder": str(folder), "notes": list(run.notes), **run.to_dict()}
        typer.echo(json.dumps(answer, indent=2, allow_nan=False))
    elif not output.quiet:
        console = Console()
        console.print(results_view(run.summary, run.saturation, deployments, width=console.width))
        for line in (*run.notes, f"records: {folder}", *([last_line] if last_line else [])):
            console.print(line, highlight=False, markup=False, soft_wrap=True)
