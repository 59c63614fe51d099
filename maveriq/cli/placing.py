"""The work behind `maveriq place`."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import typer
from rich.console import Console

from maveriq.policy.alpaserve.search import SearchProgress, search
from maveriq.policy.alpaserve.simulator import warm_up
from maveriq.report.placements import placement_json, placement_view, progress_line
from maveriq.scenario.placement_problems import load_problem

_FIRST_AFTER_S = 1.0
_EVERY_S = 5.0


def show_placement(path: Path, *, single_precision: bool, quiet: bool, as_json: bool) -> None:
    """Search and print.

    Raises:
        InputError: the problem cannot be used.
    """
    file = load_problem(path)
    settings = replace(file.settings, simulator=replace(file.settings.simulator, single_precision=single_precision))
    for key in file.without_effect:
        typer.echo(f"maveriq: search.{key} has no effect on {settings.policy}", err=True)
    warm_up()  # so that the time shown is that of the search, not of the compiler
    with _progress(quiet=quiet) as listener:
        solution = search(file.problem, settings, progress=listener)
    if as_json:
        typer.echo(json.dumps(placement_json(solution), indent=2, allow_nan=False))
    else:
        console = Console()
        console.print(placement_view(file.problem, settings, solution, width=console.width))


@contextlib.contextmanager
def _progress(*, quiet: bool) -> Iterator[Callable[[SearchProgress], None] | None]:
    """Show on stderr how far a long search is: one line that changes, or on a file a line now and then."""
    if quiet:
        yield None
        return
    console = Console(stderr=True)
    started = time.monotonic()
    with console.status("searching") if console.is_terminal else contextlib.nullcontext() as status:
        wait_s = 0.1 if status else _EVERY_S
        due = started + (0 if status else _FIRST_AFTER_S)

        def listener(progress: SearchProgress) -> None:
            nonlocal due
            now = time.monotonic()
            if now < due:
                return
            due = now + wait_s
            line = progress_line(progress, now - started)
            if status:
                status.update(line)
            else:
                console.print(line, soft_wrap=True, highlight=False)

        yield listener
