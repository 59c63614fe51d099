"""`maveriq report`: one self-contained HTML file for runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from maveriq.cli.options import OverwriteFlag
from maveriq.cli.output import echo
from maveriq.errors import InputError
from maveriq.files import check_file_writable
from maveriq.runs import load_run


def report(
    sources: Annotated[
        list[str],
        typer.Argument(metavar="DIR...", help="The folder of a run, or the name of a recorded run."),
    ],
    *,
    out: Annotated[Path, typer.Option(metavar="FILE.html", help="The file to write.")] = Path("report.html"),
    overwrite: OverwriteFlag = False,
    data: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="The folder of recorded runs.", show_default="MAVERIQ_DATA"),
    ] = None,
) -> None:
    """Write one HTML file that shows a run.

    It holds everything that it shows, loads nothing, and works without a
    network: verdict, figures, distributions, requests, GPUs and deployments
    over time, and the options as resolved. Needs maveriq[report].
    """
    check_file_writable(out, what="report", overwrite=overwrite)
    if len(sources) > 1:
        raise InputError("report takes one run")
    load_run(sources[0], data=data).to_html(out, overwrite=overwrite)
    echo(f"report: {out}")
