"""`maveriq place`: AlpaServe's placement search on a problem of one's own."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def place(
    problem: Annotated[
        Path, typer.Argument(metavar="PROBLEM.json", help="GPUs, models, profiles, requests, and how to search.")
    ],
    *,
    float64: Annotated[
        bool, typer.Option("--float64", help="Do not round stage times and SLOs to float32, as AlpaServe does.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress on long searches.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON alone.")] = False,
) -> None:
    """Search the best placement of models on GPUs, as AlpaServe does.

    Shows the groups of GPUs with the models that each hosts, and every way of
    cutting the cluster that was tried. Where AlpaServe* cannot keep every model,
    it says so: that is an answer, and exits with 0.
    """
    from maveriq.cli.placing import show_placement

    show_placement(problem, single_precision=not float64, quiet=quiet or as_json, as_json=as_json)
