"""Flags that several commands have: of engines, and of what comes out."""

from __future__ import annotations

from typing import Annotated, TypeAlias

import typer

_ENGINES, _OUTPUT = "Engines", "Output"

Backend: TypeAlias = Annotated[
    str | None,
    typer.Option(help="What engines are made of: emulated, torch, vllm or trtllm.", rich_help_panel=_ENGINES),
]
Real: TypeAlias = Annotated[bool, typer.Option("--real", help="TensorRT-LLM on GPUs.", rich_help_panel=_ENGINES)]
TimeScale: TypeAlias = Annotated[
    float, typer.Option(help="Real seconds per second of the run (emulated alone).", rich_help_panel=_ENGINES)
]
StartTimeout: TypeAlias = Annotated[
    float, typer.Option(help="An engine that does not serve by then has failed.", rich_help_panel=_ENGINES)
]
Hang: TypeAlias = Annotated[
    float, typer.Option(help="An engine that is not heard for so long hangs.", rich_help_panel=_ENGINES)
]
MostFailures: TypeAlias = Annotated[
    int, typer.Option(help="Failures in a row after which an engine is given up.", rich_help_panel=_ENGINES)
]

SloTtft: TypeAlias = Annotated[
    float | None, typer.Option(help="Count goodput under this time to first token.", rich_help_panel=_OUTPUT)
]
SloTpot: TypeAlias = Annotated[
    float | None, typer.Option(help="Count goodput under this time per output token.", rich_help_panel=_OUTPUT)
]
AsJson: TypeAlias = Annotated[bool, typer.Option("--json", help="Print JSON alone.", rich_help_panel=_OUTPUT)]
Quiet: TypeAlias = Annotated[
    bool, typer.Option("--quiet", "-q", help="No live view and no tables.", rich_help_panel=_OUTPUT)
]
