"""Prints plain lines; every text that a command prints goes through here or through `maveriq.report.terminal`."""

from __future__ import annotations

import logging
import sys
from typing import Any

import typer

from maveriq.text import escape_controls


def echo(text: str = "", *, nl: bool = True, err: bool = False) -> None:
    """Print a text with its control characters escaped."""
    typer.echo(escape_controls(text), nl=nl, file=sys.stderr if err else None)


class EscapingFormatter(logging.Formatter):
    """Formats a log record with control characters escaped, and its message on one line."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the text of a record."""
        return escape_controls(super().format(record))

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802  (as in logging)
        """Return the line of a record without its traceback."""
        return super().formatMessage(record).replace("\n", "\\n")


def log_to_stderr(level: int) -> None:
    """Let the root logger write to stderr."""
    handler: logging.Handler = logging.StreamHandler()
    handler.setFormatter(EscapingFormatter("maveriq: %(message)s"))
    options: dict[str, Any] = {"level": level, "handlers": [handler]}
    logging.basicConfig(**options)
