"""The work behind `maveriq compare`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import msgspec
import typer
from rich.console import Console

from maveriq.cli.recordings import recorded
from maveriq.domain.records import RunRecord
from maveriq.errors import InputError, MaveriqError
from maveriq.files import exists, measured_data_path
from maveriq.report.compare import Check, Comparison, check, compare, parse_tolerances
from maveriq.report.compare_plot import POINTS, check_plot_name, write_plot
from maveriq.report.compare_view import comparison_view, matching_line
from maveriq.report.curves import Curves, latency_curves, queue_curves
from maveriq.report.reading import read_run
from maveriq.report.text_plot import dots_across


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """What a user asks of `maveriq compare`; fields as its options."""

    sim: str
    real: str
    tolerance: str | None
    plot: Path | None
    data: Path | None
    as_json: bool


def show_comparison(question: Question) -> None:
    """Compare, draw, print.

    Raises:
        InputError: a run or an option that cannot be used.
        MaveriqError: a tolerance is missed.
    """
    tolerances = parse_tolerances(question.tolerance) if question.tolerance is not None else ()
    if question.plot is not None:
        check_plot_name(question.plot)
    sim, real = (_run(named, question.data) for named in (question.sim, question.real))
    comparison = compare(sim, real)
    checks = check(comparison, tolerances)
    if question.plot is not None:
        title = f"{Path(question.sim).name} against {Path(question.real).name}"
        write_plot(question.plot, comparison, _curves(sim, real, POINTS), title=title)
    if question.as_json:
        typer.echo(json.dumps(_plain(question, comparison, checks), indent=2, allow_nan=False))
    else:
        _show(question, comparison, checks, sim, real)
    missed = [one.name for one in checks if not one.met]
    if missed:
        raise MaveriqError(f"out of tolerance: {', '.join(missed)}")


def _run(named: str, data: Path | None) -> RunRecord:
    """Read a run folder, or a recorded run by its name where there is no such folder."""
    if exists(Path(named)):
        return read_run(Path(named))
    if data is None and measured_data_path() is None:
        raise InputError(
            f"run {named!r} is no folder; name one, or the folder of recorded runs with --data or MAVERIQ_DATA"
        )
    (run,) = recorded([named], data, hint="or give the folder of a run")
    return run.record


def _curves(sim: RunRecord, real: RunRecord, points: int) -> list[Curves]:
    latencies = latency_curves(sim, real, points=points)
    return [*([latencies] if latencies else []), queue_curves(sim, real, points=points)]


def _show(
    question: Question, comparison: Comparison, checks: tuple[Check, ...], sim: RunRecord, real: RunRecord
) -> None:
    console = Console()
    console.print(f"simulated {question.sim}\nreal      {question.real}\n", markup=False, highlight=False)
    curves = _curves(sim, real, dots_across(console.width))
    console.print(
        comparison_view(comparison, curves, checks, width=console.width, ascii_only=console.options.ascii_only)
    )
    if question.plot is not None:
        console.print(f"plot: {question.plot}", markup=False, highlight=False, soft_wrap=True)


def _plain(question: Question, comparison: Comparison, checks: tuple[Check, ...]) -> dict[str, object]:
    """Return the comparison in plain values, named as in its classes."""
    return {
        "sim": question.sim,
        "real": question.real,
        "within_tolerance": all(one.met for one in checks) if checks else None,
        "checks": msgspec.to_builtins(checks),
        "matching": matching_line(comparison),
        **msgspec.to_builtins(comparison),
    }
