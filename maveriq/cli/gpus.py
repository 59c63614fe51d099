"""`maveriq gpus`: lists the kinds of GPU that maveriq knows by name, and shows what is known of one."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from maveriq.cli.options import complete_gpu
from maveriq.domain.gpu_kinds import gpu_sheet, gpu_sheets
from maveriq.report.gpu_kinds import gpu_catalogue_json, gpu_catalogue_table, gpu_json, gpu_table
from maveriq.report.terminal import open_console


def gpus(
    gpu: Annotated[
        str | None,
        typer.Argument(metavar="[GPU]", help="A kind of GPU, such as H100-SXM.", autocompletion=complete_gpu),
    ] = None,
    *,
    as_json: Annotated[bool, typer.Option("--json", help="Print only JSON, with every detail.")] = False,
) -> None:
    """List the kinds of GPU known by name, or show what is known of one.

    Memory, bandwidth, dense tensor speed by number format, the link between the
    GPUs of a node, power, and a list price. A cluster file may give prices of its own.
    """
    if gpu is None:
        if as_json:
            typer.echo(json.dumps(gpu_catalogue_json(gpu_sheets()), indent=2, allow_nan=False))
        else:
            open_console().print(gpu_catalogue_table(gpu_sheets()))
        return
    sheet = gpu_sheet(gpu)
    if as_json:
        typer.echo(json.dumps({"gpu": sheet.name, **gpu_json(sheet)}, indent=2, allow_nan=False))
    else:
        open_console().print(gpu_table(sheet))
