"""The `maveriq` command: registers the commands, turns errors into one line and an exit code."""

from __future__ import annotations

import sys
from typing import Any

import typer
from typer.core import TyperCommand

from maveriq import __version__
from maveriq.cli.compare import compare
from maveriq.cli.console import console
from maveriq.cli.ending import ending, prepare_streams
from maveriq.cli.engines import engines
from maveriq.cli.fit import fit
from maveriq.cli.place import place
from maveriq.cli.plan import plan
from maveriq.cli.profile import profile
from maveriq.cli.run import run
from maveriq.cli.serve import serve
from maveriq.cli.sim import sim
from maveriq.cli.testbed import app as testbed_app
from maveriq.cli.trace import app as trace_app


class _Command(TyperCommand):
    """A command whose own help is set in panels.

    The list of commands is set plainly: what it takes to draw panels doubles the time until
    `maveriq --help` answers.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs | {"rich_markup_mode": "rich"})


app = typer.Typer(
    name="maveriq",
    help="Serve many LLMs on one GPU cluster by intent: plan, simulate, run, and serve.",
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command(cls=_Command)(sim)
app.command(cls=_Command)(run)
app.command(cls=_Command)(plan)
app.command(cls=_Command)(place)
app.command(cls=_Command)(profile)
app.command(cls=_Command)(fit)
app.command(cls=_Command)(compare)
app.command(cls=_Command)(engines)
app.command(cls=_Command)(serve)
app.command(cls=_Command)(console)
app.add_typer(trace_app, name="trace")
app.add_typer(testbed_app, name="testbed")


def _version(asked: bool) -> None:  # noqa: FBT001  (typer calls it so)
    if asked:
        typer.echo(f"maveriq {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def root(
    ctx: typer.Context,
    version: bool = typer.Option(  # noqa: ARG001, FBT001  (its callback answers)
        False,  # noqa: FBT003
        "--version",
        callback=_version,
        is_eager=True,
        help="Print the version and exit.",
    ),
) -> None:
    """Serve many LLMs on one GPU cluster by intent: plan, simulate, run, and serve."""
    if ctx.invoked_subcommand is None:
        typer.echo(ctx.get_help())


def main() -> None:
    """Run the command line; the only place that exits."""
    prepare_streams()
    sys.exit(ending(lambda: app(prog_name="maveriq", standalone_mode=False)))
