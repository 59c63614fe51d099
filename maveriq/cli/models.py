"""`maveriq models`: lists the models that maveriq knows by name, and shows what is read of one."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from maveriq.cli.options import complete_model
from maveriq.domain.models import catalogue, known_models, load_model
from maveriq.report.models import catalogue_json, catalogue_table, model_json, model_table
from maveriq.report.terminal import open_console


def models(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="[MODEL]",
            help="A model's name, or the path of a Hugging Face config.json or of its folder.",
            autocompletion=complete_model,
        ),
    ] = None,
    *,
    as_json: Annotated[bool, typer.Option("--json", help="Print only JSON, with every detail.")] = False,
) -> None:
    """List the models known by name, or show what is read of one.

    Parameters, the bytes of a token in the KV cache, and weights as stored and in
    other formats. What is not counted is named.
    """
    if model is None:
        known = known_models()
        if as_json:
            typer.echo(json.dumps(catalogue_json(known, catalogue()), indent=2, allow_nan=False))
        else:
            open_console().print(catalogue_table(known))
        return
    spec = load_model(model)
    if as_json:
        typer.echo(json.dumps({"model": spec.name, **model_json(spec)}, indent=2, allow_nan=False))
    else:
        open_console().print(model_table(spec))
