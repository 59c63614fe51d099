"""`maveriq fit`: how far an estimator is from measurements."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def fit(
    table: Annotated[
        Path,
        typer.Option(
            "--evaluate", metavar="TABLE", help="A CSV file of measured latencies and memory to compare with."
        ),
    ],
    profile: Annotated[
        str, typer.Option(help="The hardware profile that the estimator is fed with: a name or a TOML file.")
    ] = "a6000-short",
    *,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON alone.")] = False,
) -> None:
    """Show how far the estimator is from measurements."""
    from maveriq.cli.fitting import show_errors

    show_errors(table, profile, as_json=as_json)
