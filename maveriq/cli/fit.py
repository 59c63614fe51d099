"""`maveriq fit`: how far an estimator is from measurements, and fitting the calibrated one to new hardware."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from maveriq.errors import InputError


def fit(
    data: Annotated[
        Path | None,
        typer.Argument(metavar="[DATA]", help="Fit the calibrated estimator to this folder of measured tables."),
    ] = None,
    *,
    table: Annotated[
        Path | None,
        typer.Option(
            "--evaluate", metavar="TABLE", help="A CSV file of measured latencies and memory to compare with."
        ),
    ] = None,
    profile: Annotated[
        str | None,
        typer.Option(
            help="The hardware profile that the estimator is fed with: a name or a TOML file.",
            show_default="the one with prompts like the table's",
        ),
    ] = None,
    estimator: Annotated[
        str | None, typer.Option(help="Whom to compare: calibrated or paper.", show_default="calibrated")
    ] = None,
    leave_out: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="Take the calibration fitted without this model's ground truth; each: without the one asked about.",
        ),
    ] = None,
    prompt_tokens: Annotated[
        int | None,
        typer.Option(
            min=1, max=1_000_000, help="Length of the table's prompts.", show_default="its own, or the profile's"
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Where a fit writes its files.", show_default="nowhere")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON alone.")] = False,
) -> None:
    """Show how far an estimator is from measurements, or fit the calibrated one to other hardware."""
    from maveriq.cli import fitting

    if (data is None) == (table is None):
        raise InputError("give --evaluate TABLE to compare an estimator, or a folder DATA to fit one; not both")
    if table is not None:
        if out is not None:
            raise InputError("--out belongs to a fit; leave it away with --evaluate")
        fitting.show_errors(table, profile, estimator, leave_out, prompt_tokens, as_json=as_json)
    elif data is not None:
        if (profile, estimator, leave_out, prompt_tokens) != (None, None, None, None):
            raise InputError(
                "--profile, --estimator, --leave-out and --prompt-tokens belong to --evaluate; leave them away"
            )
        fitting.show_fit(data, out, as_json=as_json)
