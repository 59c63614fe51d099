"""`maveriq plan`: ranks the configurations of a model for an intent, without a workload."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from maveriq.cli.options import JsonFlag, complete_model, with_options
from maveriq.errors import MaveriqError
from maveriq.planning import PlanOptions, rank_configurations


@with_options(PlanOptions)
def plan(
    options: PlanOptions,
    *,
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="A model's name, or the path of a Hugging Face config.json.",
            autocompletion=complete_model,
        ),
    ],
    top: Annotated[int, typer.Option(min=1, help="How many configurations to show.")] = 10,
    explain: Annotated[bool, typer.Option("--explain", help="Name every rejected configuration.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Rank a model's configurations for an intent.

    The cluster is taken as empty. Shows the estimates of each configuration, and
    why the others were rejected. Exits with 1 where none fits or meets the SLO;
    then --explain shows the others.
    """
    ranked = rank_configurations(model, options)
    ranking, name = ranked.ranking, ranked.endpoint.model.name
    if ranked.failure and not explain:
        raise MaveriqError(f"{name}: {ranked.failure}; --explain names every configuration")
    if as_json:
        typer.echo(json.dumps(ranked.to_dict(), indent=2, allow_nan=False))
    else:
        from maveriq.report.plans import ranking_table, rejected_table, surprise_notes
        from maveriq.report.terminal import open_console

        console = open_console()
        if ranking.candidates:
            console.print(ranking_table(ranked.endpoint, ranking, ranked.cluster, top=top, width=console.width))
            for note in surprise_notes(ranking, top=top):
                console.print(note)
        console.print(rejected_table(ranking, every=explain))
        if ranked.summary and not ranked.failure:
            console.print(ranked.summary, highlight=False, markup=False, soft_wrap=True)
        if ranked.note:
            console.print(ranked.note, highlight=False, markup=False)
    if ranked.failure:
        raise MaveriqError(f"{name}: {ranked.failure}")
