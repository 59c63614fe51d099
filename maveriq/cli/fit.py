"""`maveriq fit`: how far an estimator is from measurements, and fitting the calibrated one to new hardware."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from maveriq.errors import InputError


def fit(
    data: Annotated[
        Path | None,
        typer.Argument(metavar="[DATA]", help="Fit the calibrated estimator to this table, or folder of tables."),
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
            min=1,
            max=1_000_000,
            help="Length of a table's prompts, where it has no column for it.",
            show_default="found out; to fit: as published",
        ),
    ] = None,
    runs: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Fit the live system's figures too: to the run folders in it, or to recordings of the testbed.",
        ),
    ] = None,
    gpus_per_socket: Annotated[
        int, typer.Option(min=1, max=10_000, help="GPUs at one socket of the host that --runs were recorded on.")
    ] = 4,
    out: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Where a fit writes its files.", show_default="nowhere")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON alone.")] = False,
) -> None:
    """Show how far an estimator is from measurements, or fit the calibrated one to other hardware."""
    if (data is None) == (table is None):
        raise InputError("give --evaluate TABLE to compare an estimator, or a folder DATA to fit one; not both")
    if table is not None:
        if (out, runs) != (None, None):
            raise InputError("--out and --runs belong to a fit; leave them away with --evaluate")
        from maveriq.cli.fitting import show_errors

        show_errors(table, profile, estimator, leave_out, prompt_tokens, as_json=as_json)
    elif data is not None:
        if (profile, estimator, leave_out) != (None, None, None):
            raise InputError("--profile, --estimator and --leave-out belong to --evaluate; leave them away")
        from maveriq.cli.refitting import FitQuestion, show_fit

        show_fit(
            FitQuestion(
                data=data,
                prompt_tokens=prompt_tokens,
                runs=runs,
                gpus_per_socket=gpus_per_socket,
                out=out,
                as_json=as_json,
            )
        )
