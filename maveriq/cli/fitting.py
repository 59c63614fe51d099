"""The work behind `maveriq fit`."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from maveriq.estimate.base import Estimator
from maveriq.estimate.catalog import estimator
from maveriq.estimate.evaluate import Errors, Evaluation, Group, evaluate
from maveriq.estimate.hardware import HardwareProfile, load_profile
from maveriq.report.tables import new_table


def show_errors(table: Path, profile: str, *, as_json: bool) -> None:
    """Print the errors of the paper's estimator on a table.

    Raises:
        InputError: the table or the profile cannot be used.
    """
    hardware = load_profile(profile)
    paper = estimator("paper", hardware)
    evaluation = evaluate(table, paper, prompt_tokens=hardware.prompt_tokens)
    if as_json:
        typer.echo(
            json.dumps(
                {"estimator": paper.name, "profile": hardware.name, **asdict(evaluation)}, indent=2, allow_nan=False
            )
        )
    else:
        _show(evaluation, table, paper, hardware)


def _show(evaluation: Evaluation, table: Path, paper: Estimator, hardware: HardwareProfile) -> None:
    console = Console()
    answered = evaluation.rows - sum(reason.rows for reason in evaluation.left_out)
    console.print(
        f"{escape(str(table))}: {answered:,} of {evaluation.rows:,} rows answered by [bold]{paper.name}[/bold] with "
        f"profile {escape(hardware.name)} (prompts of {hardware.prompt_tokens} tokens)",
        soft_wrap=True,
    )
    if evaluation.groups:
        console.print(_errors_table("latency", [(group, group.latency) for group in evaluation.groups]))
        console.print(_errors_table("memory", [(group, group.memory) for group in evaluation.groups]))
    for reason in evaluation.left_out:
        console.print(
            f"left out {reason.rows:,} rows: {escape(reason.reason)} (first: {escape(reason.first)})", soft_wrap=True
        )


def _errors_table(what: str, rows: list[tuple[Group, Errors]]) -> Table:
    table = new_table(f"{what}: absolute error in percent")
    for column in ("by", "value"):
        table.add_column(column, no_wrap=True)
    for column in ("n", "median", "mean", "p90", "worst"):
        table.add_column(column, justify="right", no_wrap=True)
    shown = ""
    for group, errors in rows:
        if shown not in ("", group.by):
            table.add_section()
        table.add_row("" if group.by == shown else group.by, escape(group.value), *_figures(errors))
        shown = group.by
    return table


def _figures(errors: Errors) -> list[str]:
    return [f"{errors.n:,}", *(f"{value:.2f}" for value in (errors.median, errors.mean, errors.p90, errors.worst))]
