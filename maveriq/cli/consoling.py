"""The work behind `maveriq console`: read, do, print."""

from __future__ import annotations

import contextlib
import io
import sys
import textwrap
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any, assert_never

import typer

from maveriq.cli.console_words import (
    TOLD,
    USAGE,
    Command,
    DeployModel,
    Infer,
    Register,
    RemoveModel,
    Show,
    ShowModel,
    completions,
    parse,
)
from maveriq.cli.extras import extra
from maveriq.domain.models import known_models
from maveriq.errors import InputError, MaveriqError
from maveriq.policy.registry import RULES

with extra("serve", for_whom="maveriq console"):
    from maveriq.serve.auth import read_token
    from maveriq.serve.client import ServiceClient

_PROMPT = "maveriq> "
_HELP_WIDTH, _TOLD_AT = 80, 25


def run_console(url: str, token_file: Path | None, commands: list[str]) -> None:
    """Do the commands given, else those that are typed or piped in.

    Raises:
        MaveriqError: the first error, where nobody is typing.
    """
    if isinstance(sys.stdin, io.TextIOWrapper):  # what is no text costs its line alone
        sys.stdin.reconfigure(errors="surrogateescape")
    with ServiceClient(url, read_token(token_file)) as client:
        talk = Talk(client)
        if commands:
            _do_all(talk, commands)
        elif sys.stdin is not None and sys.stdin.isatty():
            _typed(talk)
        else:
            _do_all(talk, sys.stdin or ())


def _do_all(talk: Talk, lines: Iterable[str]) -> None:
    for number, line in enumerate(lines, 1):
        try:
            if not talk.do(line):
                return
        except MaveriqError as error:
            kind = InputError if isinstance(error, InputError) else MaveriqError
            raise kind(f"command {number} {line.strip()[:60]!r}: {error}") from None


def _typed(talk: Talk) -> None:
    """Read lines from a terminal until the user leaves; an error costs only its line."""
    _complete_with(talk.completions)
    typer.echo(f"{talk.greeting()} help lists the commands, Tab completes them.")
    while True:
        try:
            if not talk.do(input(_PROMPT)):
                return
        except EOFError:
            typer.echo()
            return
        except KeyboardInterrupt:
            typer.echo()
        except MaveriqError as error:
            typer.echo(f"maveriq: {error}", file=sys.stderr)


def _complete_with(candidates: Callable[[str], list[str]]) -> None:
    """Let Tab complete, where this Python can."""
    try:
        import readline
    except ImportError:
        return
    found: list[str] = []

    def complete(_word: str, state: int) -> str | None:
        if state == 0:
            found[:] = candidates(readline.get_line_buffer()[: readline.get_endidx()])
        return f"{found[state]} " if state < len(found) else None

    readline.set_completer_delims(" \t")
    readline.set_completer(complete)
    # libedit, which some Pythons have instead, is told in other words.
    libedit = "libedit" in (readline.__doc__ or "")
    readline.parse_and_bind("bind ^I rl_complete" if libedit else "tab: complete")


class Talk:
    """Does one command after the other and prints what comes of it."""

    def __init__(self, client: ServiceClient) -> None:
        self._client = client

    def do(self, line: str) -> bool:
        """Do a line's command; False when the user wants to leave.

        Raises:
            MaveriqError: it is no command, or the server says no.
        """
        command = parse(line)
        if command == Show("quit"):
            return False
        if command is not None:
            self._do(command)
        return True

    def greeting(self) -> str:
        """Return how the server is, in a sentence."""
        return f"The server is {self._client.get('/health')['status']}."

    def completions(self, before: str) -> list[str]:
        """Return what the last word may become; nothing where the server cannot be asked."""
        models: list[Any] = []
        with contextlib.suppress(MaveriqError):
            models = self._client.get("/models")
        names = {*known_models(), *(model["name"] for model in models)}
        return completions(before, models=names, ids=[model["id"] for model in models], placements=RULES)

    def _do(self, command: Command) -> None:
        match command:
            case Register(model):
                found = self._client.register(model)
                typer.echo(f"{found['id']}  {found['name']}")
            case Show(what):
                self._show(what)
            case DeployModel():
                self._deploy(command)
            case Infer():
                self._infer(command)
            case ShowModel(model_id):
                _print_endpoints(self._endpoints_of(model_id))
            case RemoveModel(model_id):
                self._remove(model_id)
            case _ as never:
                assert_never(never)

    def _show(self, what: str) -> None:
        match what:
            case "models":
                for model in self._client.get("/models"):
                    typer.echo(f"{model['id']}  {model['name']}")
            case "endpoints":
                _print_endpoints(self._client.get("/endpoints"))
            case "health":
                health = self._client.get("/health")
                typer.echo("\n".join([health["status"], *health["problems"]]))
            case "help":
                typer.echo("\n".join(map(_help, USAGE)))

    def _deploy(self, command: DeployModel) -> None:
        model = self._model(command.model_id)
        if command.model not in (model["name"], str(model["id"])):
            raise InputError(
                f"ID {model['id']} is {model['name']}, not {command.model!r}; register that one, or say {model['name']}"
            )
        ask = asdict(command) | {"model": model["name"]}
        del ask["model_id"]
        made = self._client.create_endpoint(ask)
        if made["status"] == "rejected":
            self._client.remove_endpoint(made["id"])
            raise MaveriqError(f"{model['name']} cannot be deployed: {made['reason']}")
        _print_endpoints([made])

    def _infer(self, command: Infer) -> None:
        for text in self._client.infer(self._model(command.model_id)["name"], command.text, priority=command.priority):
            typer.echo(text, nl=False)
        typer.echo()

    def _remove(self, model_id: int) -> None:
        for endpoint in self._endpoints_of(model_id):
            self._client.remove_endpoint(endpoint["id"])
            typer.echo(f"endpoint {endpoint['id']} ({endpoint['model']}) removed")

    def _endpoints_of(self, model_id: int) -> list[Any]:
        model = self._model(model_id)
        found = [one for one in self._client.get("/endpoints") if one["model_id"] == model_id]
        if not found:
            usage = USAGE["deploy"].replace("ID", str(model_id), 1).replace("MODEL", model["name"])
            raise MaveriqError(f"{model['name']} is not deployed; deploy it with: {usage}")
        return found

    def _model(self, model_id: int) -> Any:
        models = {model["id"]: model for model in self._client.get("/models")}
        if model_id not in models:
            known = ", ".join(f"{number} is {model['name']}" for number, model in models.items())
            raise InputError(f"no model has ID {model_id} ({known or 'none is registered'}); register MODEL gives one")
        return models[model_id]


def _help(name: str) -> str:
    """Return how a command is written and what it does, within 80 columns."""
    usage, told = USAGE[name], textwrap.wrap(TOLD[name], _HELP_WIDTH - _TOLD_AT)
    lines = [f"{usage:{_TOLD_AT}}{told.pop(0)}" if len(usage) < _TOLD_AT else usage]
    return "\n".join([*lines, *(" " * _TOLD_AT + line for line in told)])


def _print_endpoints(endpoints: Iterable[Any]) -> None:
    for endpoint in endpoints:
        configurations = "; ".join(
            f"{deployment['configuration']} on GPU {' '.join(map(str, deployment['gpus']))}"
            for deployment in endpoint["deployments"]
            if deployment["gpus"]
        )
        parts = [
            f"endpoint {endpoint['id']}",
            f"{endpoint['model']} (ID {endpoint['model_id']})",
            endpoint["status"],
            configurations,
        ]
        parts += [f"waiting {endpoint['waiting']}, completed {endpoint['completed']}", endpoint["reason"]]
        typer.echo("  ".join(filter(None, parts)))
