"""`maveriq place`: searches AlpaServe's placement for a problem from a file."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated

import typer

from maveriq import api
from maveriq.cli.options import JsonFlag
from maveriq.cli.output import echo
from maveriq.policy.alpaserve.search import SearchProgress
from maveriq.report.placements import placement_view, progress_line
from maveriq.report.terminal import open_console

_FIRST_LINE_S = 1.0
_LINE_EVERY_S = 5.0
_REFRESH_EVERY_S = 0.1


def place(
    problem: Annotated[
        Path, typer.Argument(metavar="PROBLEM.json", help="GPUs, models, profiles, requests, and how to search.")
    ],
    *,
    profile: Annotated[
        str | None,
        typer.Option(
            help="Hardware profile that estimates models without one: a name, or what maveriq profile wrote.",
            show_default="physics on the problem's kind of GPU",
        ),
    ] = None,
    float64: Annotated[
        bool, typer.Option("--float64", help="Do not round stage times and SLOs to float32, as AlpaServe does.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress on long searches.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Search the best placement of models on GPUs, as AlpaServe does.

    Shows the groups of GPUs with the models on each, and every way of dividing
    the cluster that was tried. Where AlpaServe* cannot keep every model, the
    answer is "infeasible" and the exit code 0.
    """
    with _progress(quiet=quiet or as_json) as progress:
        result = api.place(problem, profile=profile, float64=float64, progress=progress)
    for note in result.notes:
        echo(f"maveriq: {note}", err=True)
    if as_json:
        typer.echo(json.dumps(result.to_dict(), indent=2, allow_nan=False))
    else:
        console = open_console()
        console.print(placement_view(result.problem, result.settings, result.solution, width=console.width))


@contextlib.contextmanager
def _progress(*, quiet: bool) -> Iterator[Callable[[SearchProgress], None] | None]:
    """Show the progress of a long search on stderr: one changing line, or in a file a line every few seconds."""
    if quiet:
        yield None
        return
    console = open_console(stderr=True)
    started_s = time.monotonic()
    with console.status("searching") if console.is_terminal else contextlib.nullcontext() as status:
        interval_s = _REFRESH_EVERY_S if status else _LINE_EVERY_S
        due_s = started_s + (0 if status else _FIRST_LINE_S)

        def show(progress: SearchProgress) -> None:
            nonlocal due_s
            now_s = time.monotonic()
            if now_s < due_s:
                return
            due_s = now_s + interval_s
            line = progress_line(progress, now_s - started_s)
            if status:
                status.update(line)
            else:
                console.print(line, soft_wrap=True, highlight=False)

        yield show
