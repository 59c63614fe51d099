"""`maveriq testbed`: writes recorded runs of the published testbed as run folders, as they are or replayed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from maveriq.cli.options import JsonFlag, OverwriteFlag
from maveriq.cli.output import echo
from maveriq.domain.records import RunRecord
from maveriq.domain.requests import RequestStatus
from maveriq.errors import InputError
from maveriq.report.run_folder import check_writable
from maveriq.runs import Run
from maveriq.testbed.recorded_runs import load_recorded_runs, meta_of_recorded, testbed_profile
from maveriq.testbed.replay import replay

app = typer.Typer(rich_markup_mode=None, help="Import the recorded runs of the testbed, and replay them.")

RunNames = Annotated[list[str] | None, typer.Argument(metavar="[RUN]...", help="Names of recorded runs.")]
AllFlag = Annotated[bool, typer.Option("--all", help="Every recorded run.")]
OutOption = Annotated[Path, typer.Option(metavar="DIR", help="Receives a run folder named after each run.")]
DataOption = Annotated[
    Path | None, typer.Option(metavar="FOLDER", help="The folder of recordings.", show_default="MAVERIQ_DATA")
]


@app.callback(invoke_without_command=True)
def root(ctx: typer.Context) -> None:
    """Import the recorded runs of the testbed, and replay them."""
    if ctx.invoked_subcommand is None:
        typer.echo(ctx.get_help())


@app.command("import")
def import_runs(
    runs: RunNames = None,
    *,
    out: OutOption,
    every: AllFlag = False,
    data: DataOption = None,
    overwrite: OverwriteFlag = False,
    as_json: JsonFlag = False,
) -> None:
    """Turn recorded tables into run folders like those of simulated runs."""
    _write_runs(_names(runs, every=every), out, data, replayed=False, overwrite=overwrite, as_json=as_json)


@app.command("replay")
def replay_runs(
    runs: RunNames = None,
    *,
    out: OutOption,
    every: AllFlag = False,
    data: DataOption = None,
    overwrite: OverwriteFlag = False,
    as_json: JsonFlag = False,
) -> None:
    """Replay recorded arrivals, service times and plans through maveriq's queue and dispatcher.

    Nothing is fitted: a comparison with the recorded run shows how accurate the queue is.
    """
    _write_runs(_names(runs, every=every), out, data, replayed=True, overwrite=overwrite, as_json=as_json)


def _names(runs: list[str] | None, *, every: bool) -> list[str] | None:
    """Return the names of the runs to read, None for all."""
    if bool(runs) == every:
        raise InputError("name the recorded runs, or give --all" + ("; not both" if every else ""))
    return runs or None


def _write_runs(
    names: list[str] | None, out: Path, data: Path | None, *, replayed: bool, overwrite: bool, as_json: bool
) -> None:
    """Write a run folder for each run, and print its counts.

    Raises:
        InputError: a run or a folder that cannot be used.
    """
    loaded = load_recorded_runs(names, data)
    for recorded in loaded:
        check_writable(out / recorded.run.name, overwrite=overwrite)
    profile, summaries = testbed_profile(), []
    for recorded in loaded:
        folder = out / recorded.run.name
        record = replay(recorded.record, profile) if replayed else recorded.record
        run = Run(record=record, meta=meta_of_recorded(recorded.run, replayed=replayed), options=None)
        run.save(folder, overwrite=overwrite)
        counts = {status.label: count for status, count in record.requests.counts().items()}
        summaries.append({"folder": str(folder), **counts})
        if not as_json:
            echo(_counts_line(record, folder))
    if as_json:
        typer.echo(json.dumps(summaries, indent=2))


def _counts_line(record: RunRecord, folder: Path) -> str:
    counts = record.requests.counts()
    parts = [f"{counts[RequestStatus.COMPLETED]:,} of {len(record.requests):,} requests completed"]
    parts += [f"{count:,} {status.label}" for status, count in counts.items() if count and status.label != "completed"]
    return f"{folder}: {', '.join(parts)}"
