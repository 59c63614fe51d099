"""`maveriq sweep`: simulates a grid or a sample of options, and tabulates what differs."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from maveriq.cli.options import JsonFlag, OverwriteFlag
from maveriq.cli.output import echo
from maveriq.errors import InputError, MaveriqError
from maveriq.report.formatting import clock
from maveriq.report.terminal import open_console
from maveriq.sweeps.run import LOCAL, SweepProgress, SweepResult, make_pool, run_sweep
from maveriq.sweeps.spec import cells_of, read_sweep
from maveriq.sweeps.view import sweep_view

_LINE_EVERY_S = 5.0


def sweep(
    file: Annotated[Path, typer.Argument(metavar="FILE.toml", help="What to vary (docs/sweeps.md).")],
    *,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", help="Folder of the results; an interrupted sweep goes on in it.", show_default="sweeps/FILE"
        ),
    ] = None,
    workers: Annotated[
        int | None, typer.Option("--workers", min=1, help="Processes at once.", show_default="one a core")
    ] = None,
    on: Annotated[
        str, typer.Option("--on", metavar="local|ray|ADDRESS", help="Processes here, a Ray cluster here, or one there.")
    ] = LOCAL,
    keep_runs: Annotated[bool, typer.Option("--keep-runs", help="Keep the records of each run, too.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the runs, and stop.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress and no tables.")] = False,
    overwrite: OverwriteFlag = False,
    as_json: JsonFlag = False,
) -> None:
    """Simulate every combination of chosen options, and compare them over seeds.

    Writes a row for each run to cells.csv and cells.parquet, means over seeds to
    seeds.csv, and paired comparisons to comparison.csv. Ctrl-C loses only the runs
    under way: the same command goes on from there.
    """
    spec = read_sweep(file)
    if dry_run:
        cells = cells_of(spec)
        for cell in cells:
            echo(f"{cell.number}: {cell}")
        echo(f"{len(cells):,} runs")
        return
    folder = out if out is not None else Path("sweeps") / file.stem
    with make_pool(on, workers) as pool, show_progress(quiet=quiet or as_json) as watch:
        result = run_sweep(spec, folder, pool=pool, keep_runs=keep_runs, overwrite=overwrite, watch=watch)
    if as_json:
        typer.echo(json.dumps(_as_json(result), indent=2, allow_nan=False))
    elif not quiet:
        console = open_console()
        console.print(sweep_view(result, width=console.width))
        echo(f"tables: {folder}")
    if result.failed:
        cell, reason = result.failed[0]
        kind = InputError if len(result.failed) == len({*result.cells["run"]}) else MaveriqError
        raise kind(
            f"{len(result.failed):,} of {len({*result.cells['run']}):,} runs failed; run {cell.number}: {reason}"
        )


def _as_json(result: SweepResult) -> dict[str, Any]:
    tables = {"cells": result.cells, "seeds": result.seeds, "comparison": result.comparison}
    return {
        "name": result.spec.name,
        **{name: json.loads(table.to_json(orient="records")) for name, table in tables.items()},
        "failed": [{"run": cell.number, "error": reason} for cell, reason in result.failed],
    }


@contextlib.contextmanager
def show_progress(*, quiet: bool) -> Iterator[Callable[[SweepProgress], None]]:
    """Show the progress on stderr: a bar with the time left, or in a file a line every few seconds."""
    if quiet:
        yield lambda _: None
        return
    console = open_console(stderr=True)
    if not console.is_terminal:
        yield _Lines()
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    bar = Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), console=console
    )
    with bar:
        task = bar.add_task("runs")

        def show(progress: SweepProgress) -> None:
            done = progress.resumed + progress.finished
            # Runs of before took no time, so the rate is that of the others.
            bar.update(task, total=progress.cells - progress.resumed, completed=progress.finished)
            if progress.result is not None and progress.result.error:
                bar.console.print(f"run {progress.result.number} failed: {progress.result.error}", highlight=False)
            if progress.resumed:
                bar.update(task, description=f"runs ({done:,} of {progress.cells:,} with those of before)")

        yield show


class _Lines:
    """Prints a line about the progress every few seconds."""

    def __init__(self) -> None:
        self._started_s = self._last_s = time.monotonic()

    def __call__(self, progress: SweepProgress) -> None:
        now_s, left = time.monotonic(), progress.cells - progress.resumed - progress.finished
        result = progress.result
        if result is not None and result.error:
            echo(f"run {result.number} failed: {result.error}", err=True)
        if now_s - self._last_s < _LINE_EVERY_S and left and result is not None:
            return
        self._last_s = now_s
        done = progress.resumed + progress.finished
        line = f"{done:,} of {progress.cells:,} runs"
        if progress.finished and left:
            line += f", {clock((now_s - self._started_s) / progress.finished * left)} left"
        echo(line, err=True)
