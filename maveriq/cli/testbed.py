"""`maveriq testbed`: recorded runs of the real system as run folders, and replayed through the queue."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(rich_markup_mode=None, help="Import the recorded runs of the testbed, and replay them.")

RunsArgument = Annotated[list[str] | None, typer.Argument(metavar="[RUN]...", help="Names of recorded runs.")]
AllOption = Annotated[bool, typer.Option("--all", help="Every run that there is.")]
OutOption = Annotated[Path, typer.Option(metavar="DIR", help="Gets a run folder of each run's name.")]
DataOption = Annotated[
    Path | None, typer.Option(metavar="FOLDER", help="Where the recordings lie.", show_default="MAVERIQ_DATA")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON alone.")]


@app.callback(invoke_without_command=True)
def root(ctx: typer.Context) -> None:
    """Import the recorded runs of the testbed, and replay them."""
    if ctx.invoked_subcommand is None:
        typer.echo(ctx.get_help())


@app.command("import")
def import_runs(
    runs: RunsArgument = None,
    *,
    out: OutOption,
    every: AllOption = False,
    data: DataOption = None,
    as_json: JsonOption = False,
) -> None:
    """Turn recorded tables into run folders, as simulated runs have them."""
    from maveriq.cli.recordings import Request, write_runs

    write_runs(Request(runs=runs or [], every=every, out=out, data=data, as_json=as_json), replayed=False)


@app.command("replay")
def replay_runs(
    runs: RunsArgument = None,
    *,
    out: OutOption,
    every: AllOption = False,
    data: DataOption = None,
    as_json: JsonOption = False,
) -> None:
    """Replay recorded arrivals, service times and plans through maveriq's queue and dispatcher.

    Nothing is fitted: compare with the recorded run to see how right the queue is.
    """
    from maveriq.cli.recordings import Request, write_runs

    write_runs(Request(runs=runs or [], every=every, out=out, data=data, as_json=as_json), replayed=True)
