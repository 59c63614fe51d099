"""Turns every error of a command into one line on stderr and an exit code (docs/errors.md)."""

from __future__ import annotations

import contextlib
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import typer

from maveriq.cli.output import echo
from maveriq.errors import InputError, InvariantError, MaveriqError

_FAILED = 1
_USAGE = 2
_INTERRUPTED = 130  # 128 + SIGINT, as in shells
_TRACEBACK = "MAVERIQ_TRACEBACK"

# Typer moved click's usage errors into itself. `BadParameter` is public in both versions, and its base class
# is the base of all usage errors.
_UsageError: Any = typer.BadParameter.__mro__[1]


def prepare_streams() -> None:
    """Open the null device for closed streams, and replace characters that stdout cannot encode."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by the caller
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: PTH123, SIM115  (stays open)
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")


def run_command(command: Callable[[], object]) -> int:
    """Run a Typer command without its standalone mode, and return the exit code.

    Raises:
        SystemExit: a library exits, for example because the reader of a pipe is gone.
    """
    try:
        code = command()
        sys.stdout.flush()
    except BrokenPipeError:  # the reader closed the pipe
        _discard_stdout()
        return _FAILED
    except (Exception, KeyboardInterrupt) as error:  # no traceback may reach the user
        return _report(error)
    if code == _INTERRUPTED:  # Typer turns Ctrl-C into this code
        return _report(KeyboardInterrupt())
    return code if isinstance(code, int) else 0


@contextlib.contextmanager
def extra(name: str, *, needed_by: str) -> Iterator[None]:
    """Turn a missing package into an error that names the pip command which installs it.

    Raises:
        InputError: a package imported within the block is missing.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] == "maveriq":
            raise  # a bug, not a missing package
        raise InputError(
            f"{needed_by} needs the package {error.name}; install it with pip install 'maveriq[{name}]'"
        ) from None


def _report(error: BaseException) -> int:
    """Print one line about an error, and return the exit code."""
    if os.environ.get(_TRACEBACK):
        traceback.print_exception(error)
    message, code = _message_and_code(error)
    with contextlib.suppress(OSError):
        echo(f"maveriq: {' '.join(message.split())}", err=True)
    try:
        sys.stdout.flush()
    except OSError:
        _discard_stdout()
    return code


def _message_and_code(error: BaseException) -> tuple[str, int]:
    if isinstance(error, MaveriqError) and not isinstance(error, InvariantError):
        return str(error), error.exit_code
    if isinstance(error, _UsageError):
        return _usage_message(error), _USAGE
    if isinstance(error, (KeyboardInterrupt, typer.Abort)):
        return "stopped; no file is left half-written", _INTERRUPTED
    if isinstance(error, MemoryError):
        return "not enough memory for this; give a lower scale, a shorter trace or fewer GPUs", _FAILED
    if isinstance(error, OSError):
        what = "the output" if error.filename is None else repr(error.filename)
        return f"cannot read or write {what}: {error.strerror or error}", _FAILED
    detail = str(error) if isinstance(error, InvariantError) else f"{type(error).__name__}: {error}"
    return f"this is a bug in maveriq ({detail}); {_TRACEBACK}=1 shows where, please report it", _FAILED


def _usage_message(error: Any) -> str:
    """Return a usage error as one clause with the given value and the command whose help explains it."""
    message = error.format_message().strip().rstrip(".")
    # Typer's validator keeps the refused value, but leaves it out of the message.
    refused: list[dict[str, Any]] = getattr(error.__cause__, "errors", list)()
    if refused:
        message = message.replace("Input should", "it must").partition(", unable to parse")[0]
    given = f" (given: {refused[0]['input']!r})" if refused else ""
    command = "maveriq" if error.ctx is None else error.ctx.command_path
    return f"{message[:1].lower()}{message[1:]}{given}; see {command} --help"


def _discard_stdout() -> None:
    """Send what stdout still buffers to the null device; otherwise Python complains at exit."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
