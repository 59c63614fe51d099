"""`maveriq fingerprint`: writes the model of a few layers that stands for a whole one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from maveriq.cli.options import OverwriteFlag, complete_model
from maveriq.profiling.fingerprint import write_fingerprint
from maveriq.profiling.fingerprint_report import fingerprint_json, fingerprint_notes, fingerprint_table
from maveriq.report.terminal import open_console


def fingerprint(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="A model's name, or the path of a Hugging Face config.json or of its folder.",
            autocompletion=complete_model,
        ),
    ],
    *,
    layers: Annotated[int, typer.Option(min=1, help="Layers to keep, at least one of each kind.")],
    out: Annotated[Path, typer.Option(help="Folder for the fingerprint.")],
    seed: Annotated[int, typer.Option(min=0, help="Seed of random weights.")] = 1,
    overwrite: OverwriteFlag = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print only JSON, with every detail.")] = False,
) -> None:
    """Write a model with a few of another one's layers, that is measured in its place.

    It keeps at least one layer of each kind, and says how many layers each stands
    for. Weights are copied from the model's safetensors files, of which no more is
    read than needed; without such files they are random. Engines load the folder as
    any other model.
    """
    written = write_fingerprint(model, layers=layers, out=out, seed=seed, overwrite=overwrite)
    if as_json:
        typer.echo(json.dumps(fingerprint_json(written), indent=2, allow_nan=False))
    else:
        console = open_console()
        console.print(fingerprint_table(written))
        lines = [*fingerprint_notes(written), f"fingerprint: {written.folder}"]
        console.print("\n".join(lines), highlight=False, markup=False, soft_wrap=True)
