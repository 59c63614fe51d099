"""`maveriq console`: type commands to a running service."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def console(
    *,
    url: Annotated[str, typer.Option(help="Where maveriq serve listens.")] = "http://127.0.0.1:8000",
    token_file: Annotated[
        Path | None, typer.Option(help="File with the token; or MAVERIQ_TOKEN in the environment.")
    ] = None,
    commands: Annotated[list[str] | None, typer.Option("--command", "-c", help="Do this and end; repeatable.")] = None,
) -> None:
    """Register, deploy and ask models of a running service.

    Reads commands from the terminal, with Tab to complete them, or from a pipe;
    help lists them. What is not typed ends at the first error.
    """
    from maveriq.cli.consoling import run_console

    run_console(url, token_file, commands or [])
