"""How a command ends: whatever went wrong becomes one line on stderr and an exit code (docs/errors.md)."""

from __future__ import annotations

import contextlib
import os
import sys
import traceback
from collections.abc import Callable
from typing import Any

import typer

from maveriq.errors import InvariantError, MaveriqError

_FAILED = 1
_USAGE = 2
_INTERRUPTED = 130  # 128 + SIGINT, as shells have it
_TRACEBACK = "MAVERIQ_TRACEBACK"

# Typer has moved its usage errors from click into itself. `BadParameter` is public in both, and
# derives from the one that all usage errors derive from.
_UsageError: Any = typer.BadParameter.__mro__[1]


def prepare_streams() -> None:
    """Let output go nowhere where there is none, and never fail for a character that has no code there."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by the caller
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: PTH123, SIM115  (lives to the end)
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")


def ending(command: Callable[[], object]) -> int:
    """Run a command of typer's, without its standalone mode, and return the exit code.

    Raises:
        SystemExit: a library asked for it, as for a pipe that nobody reads.
    """
    try:
        code = command()
        sys.stdout.flush()
    except BrokenPipeError:  # who read has seen enough
        _silence_stdout()
        return _FAILED
    except (Exception, KeyboardInterrupt) as error:  # nothing may leave as a traceback
        return _end(error)
    if code == _INTERRUPTED:  # typer turns Ctrl-C into this code
        return _end(KeyboardInterrupt())
    return code if isinstance(code, int) else 0


def _end(error: BaseException) -> int:
    """Say in one line what went wrong."""
    if os.environ.get(_TRACEBACK):
        traceback.print_exception(error)
    message, code = _explain(error)
    with contextlib.suppress(OSError):
        print(f"maveriq: {' '.join(message.split())}", file=sys.stderr)  # noqa: T201
    try:
        sys.stdout.flush()
    except OSError:
        _silence_stdout()
    return code


def _explain(error: BaseException) -> tuple[str, int]:
    """Return the message and the exit code of an error."""
    if isinstance(error, MaveriqError) and not isinstance(error, InvariantError):
        return str(error), error.exit_code
    if isinstance(error, _UsageError):
        return _usage(error), _USAGE
    if isinstance(error, (KeyboardInterrupt, typer.Abort)):
        return "stopped; no file is left half-written", _INTERRUPTED
    if isinstance(error, MemoryError):
        return "not enough memory for this; give a lower scale, a shorter trace or fewer GPUs", _FAILED
    if isinstance(error, OSError):
        what = "the output" if error.filename is None else repr(error.filename)
        return f"cannot read or write {what}: {error.strerror or error}", _FAILED
    told = str(error) if isinstance(error, InvariantError) else f"{type(error).__name__}: {error}"
    return f"this is a bug in maveriq ({told}); {_TRACEBACK}=1 shows where, please report it", _FAILED


def _usage(error: Any) -> str:
    """Return a usage error as a clause with the value and where to read more."""
    told = error.format_message().strip().rstrip(".")
    # Typer's validator keeps the value that it refused, but does not say it.
    refused: list[dict[str, Any]] = getattr(error.__cause__, "errors", list)()
    if refused:
        told = told.replace("Input should", "it must").partition(", unable to parse")[0]
    given = f" (given: {refused[0]['input']!r})" if refused else ""
    command = "maveriq" if error.ctx is None else error.ctx.command_path
    return f"{told[:1].lower()}{told[1:]}{given}; see {command} --help"


def _silence_stdout() -> None:
    """Drop what stdout still holds: nobody can take it, and Python would complain when it exits."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
