"""The work behind `maveriq sim`: build, run, measure, write, show."""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import typer
from rich.console import Console

from maveriq import __version__
from maveriq.cli.local_gpus import cluster_here
from maveriq.domain.records import RunRecord
from maveriq.errors import InputError, MaveriqError
from maveriq.report.live import make_view
from maveriq.report.metrics import summarise
from maveriq.report.results import results_view
from maveriq.report.run_folder import check_writable, summary_to_json, write_run
from maveriq.report.saturation import assess_saturation
from maveriq.scenario.build import build_system
from maveriq.scenario.options import Options
from maveriq.scenario.system import ReplaySystem
from maveriq.sim.simulator import simulate
from maveriq.workload.build import DEFAULT_SCALE


@dataclass(frozen=True, slots=True, kw_only=True)
class Output:
    """What to count besides, and where the results go.

    Raises:
        InputError: a limit that is not positive.
    """

    folder: Path | None
    slo_ttft_ms: float | None
    slo_tpot_ms: float | None
    as_json: bool
    quiet: bool

    def __post_init__(self) -> None:
        for name in ("slo_ttft_ms", "slo_tpot_ms"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise InputError(f"--{name.replace('_', '-')} must be a positive number of milliseconds, not {value}")


def run_simulation(options: Options, output: Output) -> None:
    """Simulate, write the run folder, show the results.

    Raises:
        InputError: bad input, or a folder that cannot be written.
        MaveriqError: the disk is full, or nothing could be deployed (the records are there all the same).
    """
    scenario = build_system(options, make_cluster=cluster_here)
    folder = output.folder or default_folder(options)
    check_writable(folder)
    interactive = sys.stdout.isatty() and sys.stderr.isatty()
    with make_view(Console(stderr=True), quiet=output.quiet or output.as_json, interactive=interactive) as view:
        run = simulate(scenario, view)
    report(run, output, folder, meta_of(options, scenario, kind="simulated", libraries=("numpy", "simpy")))


def report(
    run: RunRecord,
    output: Output,
    folder: Path,
    meta: Mapping[str, Any],
    *,
    more: Callable[[Path], None] | None = None,
    last_line: str = "",
) -> None:
    """Write the run folder and show the results.

    Args:
        run: what happened.
        output: how to show it.
        folder: where the records go.
        meta: what led to it; its notes are shown.
        more: writes more files into the folder.
        last_line: what to say last on a terminal.

    Raises:
        MaveriqError: the disk is full, or nothing could be deployed (the records are there all the same).
    """
    summary = summarise(run, slo_ttft_s=_seconds(output.slo_ttft_ms), slo_tpot_s=_seconds(output.slo_tpot_ms))
    verdict = assess_saturation(run)
    results = summary_to_json(summary, verdict, run.deployments)
    write_run(folder, run, results, meta, more=more)
    if run.deployments and all(deployment.plan is None for deployment in run.deployments):
        raise MaveriqError(f"nothing could be deployed: {run.deployments[0].reason}; records: {folder}")
    if output.as_json:
        typer.echo(json.dumps({"folder": str(folder), "notes": meta["notes"], **results}, indent=2, allow_nan=False))
    elif not output.quiet:
        console = Console()
        console.print(results_view(summary, verdict, run.deployments, width=console.width))
        for line in (*meta["notes"], f"records: {folder}", *([last_line] if last_line else [])):
            console.print(line, highlight=False, markup=False, soft_wrap=True)


def default_folder(options: Options) -> Path:
    """Return where a run goes that nobody gave a folder: `runs/` and what tells it from others."""
    parts = [options.policy, options.intent, Path(options.models).stem, Path(options.trace).stem]
    if options.scale is not None or not options.trace.endswith((".csv", ".gz")):
        parts.append(f"{DEFAULT_SCALE if options.scale is None else options.scale:g}")
    return Path("runs") / "-".join(part.replace("/", "_").replace(":", "_") for part in parts)


def _seconds(milliseconds: float | None) -> float | None:
    return None if milliseconds is None else milliseconds / 1e3


def _resolved(scenario: ReplaySystem) -> dict[str, str]:
    """Return the options whose default depends on the profile, as they turned out."""
    return {"estimator": scenario.estimator, "service_times": scenario.service_times.name}


def meta_of(options: Options, scenario: ReplaySystem, *, kind: str, libraries: Iterable[str]) -> dict[str, Any]:
    """Return what led to the results: enough to run the same again."""
    return {
        "kind": kind,
        "workload": scenario.workload.name,
        "notes": list(scenario.notes),
        "options": asdict(options) | _resolved(scenario),
        "seed": options.seed,
        "versions": {
            "maveriq": __version__,
            "python": platform.python_version(),
            **{library: version(library) for library in libraries},
        },
    }
