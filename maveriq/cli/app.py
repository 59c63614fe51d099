"""The `maveriq` command: a table of subcommands, each loaded from its module when it is used."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from maveriq import __version__
from maveriq.cli.error_handler import prepare_streams, run_command
from maveriq.cli.output import echo

COMMANDS: Mapping[str, str] = MappingProxyType(
    {
        "sim": "Replay a workload on a simulated GPU cluster.",
        "run": "Replay a workload on engines that really run.",
        "plan": "Rank a model's configurations for an intent.",
        "place": "Search the best placement of models on GPUs, as AlpaServe does.",
        "experiment": "Simulate tables and figures of the published evaluation, beside the published ones.",
        "sweep": "Simulate every combination of chosen options, and compare them over seeds.",
        "size": "Find the fewest GPUs that serve a workload within its SLOs.",
        "models": "List the models known by name, or show what is read of one.",
        "gpus": "List the kinds of GPU known by name, or show what is known of one.",
        "profile": "Measure models on this machine's engines.",
        "fingerprint": "Write a model with a few of another one's layers, that is measured in its place.",
        "study": "Study how models scale, and what measuring them costs.",
        "accuracy": "Measure what weight formats cost a model in accuracy.",
        "fit": "Evaluate an estimator on measurements, or fit the calibrated estimator to them.",
        "compare": "Show how far a simulated run is from a real one.",
        "report": "Write one HTML file that shows a run, a comparison, a sweep or a sizing.",
        "engines": "Show what engines can do, and which can start here.",
        "serve": "Serve many models on one cluster over HTTP.",
        "console": "Register, deploy and query models of a running service.",
        "trace": "Show, export and check workloads.",
        "data": "Say which public data is here, and where the rest comes from.",
        "testbed": "Import the recorded runs of the testbed, and replay them.",
    }
)
"""Each subcommand with the first line of its help, so that `maveriq --help` loads none of them."""


class _LazyGroup(TyperGroup):
    """Lists the commands from the table, and imports `maveriq.cli.NAME` only to run a command."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        for name, summary in COMMANDS.items():
            self.add_command(TyperCommand(name, help=summary))

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name, command, rest = super().resolve_command(ctx, args)
        return name, load_command(name) if command is not None and name else command, rest


def load_command(name: str) -> Any:
    """Return a subcommand, with its options, from the function or the Typer app that its module defines."""
    module = importlib.import_module(f"maveriq.cli.{name}")
    command_app = getattr(module, "app", None)
    if command_app is None:
        command_app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="rich")
        command_app.command(name)(getattr(module, name))
    return typer.main.get_command(command_app)


app = typer.Typer(
    name="maveriq",
    cls=_LazyGroup,
    help="Serve many LLMs on one GPU cluster by intent: plan, simulate, run, and serve.",
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain help: drawing panels doubles the time until `maveriq --help` answers
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(requested: bool) -> None:  # noqa: FBT001  (Typer calls it with a positional argument)
    if requested:
        echo(f"maveriq {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def root(
    ctx: typer.Context,
    version: bool = typer.Option(  # noqa: ARG001, FBT001  (handled by the callback)
        False,  # noqa: FBT003
        "--version",
        callback=_print_version,
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
    if os.environ.get("NO_COLOR"):  # Typer's help keeps bold and dim otherwise
        os.environ.setdefault("_TYPER_FORCE_DISABLE_TERMINAL", "1")
    sys.exit(run_command(lambda: app(prog_name="maveriq", standalone_mode=False)))
