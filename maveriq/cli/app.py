"""The `maveriq` command: registers the commands, turns errors into one line and an exit code."""

from __future__ import annotations

import sys

import typer

from maveriq import __version__
from maveriq.cli.fit import fit
from maveriq.cli.plan import plan
from maveriq.cli.sim import sim
from maveriq.cli.trace import app as trace_app
from maveriq.errors import MaveriqError

_INTERRUPTED = 130  # 128 + SIGINT, as shells have it

app = typer.Typer(
    name="maveriq",
    help="Serve many LLMs on one GPU cluster by intent: plan, simulate, and check the estimates.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(sim)
app.command()(plan)
app.command()(fit)
app.add_typer(trace_app, name="trace")


def _version(asked: bool) -> None:  # noqa: FBT001  (typer calls it so)
    if asked:
        typer.echo(f"maveriq {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: bool = typer.Option(  # noqa: FBT001  (its callback answers)
        False,  # noqa: FBT003
        "--version",
        callback=_version,
        is_eager=True,
        help="Print the version and exit.",
    ),
) -> None:
    """Serve many LLMs on one GPU cluster by intent."""


def main() -> None:
    """Run the command line; the only place that exits."""
    try:
        app()
    except MaveriqError as error:
        print(f"maveriq: {' '.join(str(error).split())}", file=sys.stderr)  # noqa: T201
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("maveriq: stopped; nothing was written", file=sys.stderr)  # noqa: T201
        sys.exit(_INTERRUPTED)
