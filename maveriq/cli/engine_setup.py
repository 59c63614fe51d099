"""`maveriq engines setup`: makes an environment for an engine."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from maveriq.cli.output import echo
from maveriq.exec.engine_environments import default_folder, set_up
from maveriq.exec.interrupt import InterruptHandler


def setup(
    engine: Annotated[str, typer.Argument(metavar="vllm|trtllm|torch", help="The engine.")],
    *,
    into: Annotated[
        Path | None,
        typer.Option(help="Folder for the environment.", show_default="~/.local/share/maveriq/engines/ENGINE"),
    ] = None,
    python: Annotated[
        str | None, typer.Option(help="Interpreter to make it with.", show_default="this one, or one on PATH")
    ] = None,
    replace: Annotated[bool, typer.Option("--replace", help="Make the environment in the folder anew.")] = False,
) -> None:
    """Make an environment for an engine.

    Installs the engine's packages with pip, which takes gigabytes and minutes.
    pip's own settings apply, such as PIP_EXTRA_INDEX_URL. In the default folder,
    maveriq run and serve find it by themselves; elsewhere --engine-python
    names it.
    """
    folder = into or default_folder(engine)
    with InterruptHandler() as interrupt, interrupt.calling(_stop):  # SIGTERM and SIGHUP remove the folder too
        made = set_up(
            engine, folder=folder, python=python, replace=replace, report=lambda line: echo(f"{line} ...", err=True)
        )
    packages = ", ".join(f"{name} {version}" for name, version in made.packages.items())
    echo(f"environment: {made.path.parent.parent} (Python {made.version}; {packages})")
    echo(f"use it: --engine-python {shlex.quote(f'{engine}={made.path}')}" + _default_note(into))


def _stop() -> None:
    raise KeyboardInterrupt


def _default_note(into: Path | None) -> str:
    return "" if into is not None else " (maveriq run, serve and profile use it without the option)"
