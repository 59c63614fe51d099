"""Prints plain lines; every text that a command prints goes through here or through `maveriq.report.terminal`."""

from __future__ import annotations

import sys

import typer

from maveriq.text import escape_controls


def echo(text: str = "", *, nl: bool = True, err: bool = False) -> None:
    """Print a text with its control characters escaped."""
    typer.echo(escape_controls(text), nl=nl, file=sys.stderr if err else None)
