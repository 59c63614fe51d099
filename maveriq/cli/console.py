"""`maveriq console`: send commands to a running `maveriq serve`.

Commands come from `--command`, from a terminal, or from a pipe. `maveriq.cli.console_commands` parses them.
"""

from __future__ import annotations

import contextlib
import io
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Self, TextIO, assert_never

import typer

from maveriq.cli.console_commands import (
    USAGE,
    CancelProfile,
    Command,
    DeployModel,
    Infer,
    Register,
    RemoveModel,
    Show,
    ShowModel,
    completions,
    help_text,
    parse,
)
from maveriq.cli.output import echo
from maveriq.errors import InputError, MaveriqError

if TYPE_CHECKING:
    from maveriq.serve.client import ServiceClient

_PROMPT = "maveriq> "
_POLL_S = 0.25
_MAX_DOWN_S = 65.0  # a failed engine that is not given up starts again within 60 s


def console(
    *,
    url: Annotated[str, typer.Option(help="URL of the server.")] = "http://127.0.0.1:8000",
    token_file: Annotated[
        Path | None, typer.Option(help="File with the token; default: environment variable MAVERIQ_TOKEN.")
    ] = None,
    commands: Annotated[
        list[str] | None, typer.Option("--command", "-c", help="Run this command and exit; repeatable.")
    ] = None,
    wait: Annotated[
        bool, typer.Option("--wait", "-w", help="After each deploy, wait until the endpoint serves.")
    ] = False,
) -> None:
    """Register, deploy and query models of a running server.

    Reads commands from the terminal, with Tab completion, or from a pipe; `help`
    lists them. Commands from a pipe or -c stop at the first error.
    """
    run_console(url, token_file, commands or [], wait=wait)


def run_console(url: str, token_file: Path | None, commands: list[str], *, wait: bool = False) -> None:
    """Run the given commands, or else those from the terminal or pipe; see `console`.

    Raises:
        MaveriqError: the first error of commands that are not typed at a terminal.
    """
    from maveriq.cli.error_handler import extra
    from maveriq.serve.auth import read_token

    with extra("serve", needed_by="maveriq console"):
        from maveriq.serve.client import ServiceClient

    if isinstance(sys.stdin, io.TextIOWrapper):  # let `parse` report bytes that are not UTF-8
        sys.stdin.reconfigure(errors="surrogateescape")
    with ServiceClient(url, read_token(token_file)) as client:
        session = ConsoleSession(client, wait=wait)
        if commands:
            _run_batch(session, commands)
        elif sys.stdin is not None and sys.stdin.isatty():
            _run_interactive(session)
        else:
            _run_batch(session, sys.stdin or ())


def _run_batch(session: ConsoleSession, lines: Iterable[str]) -> None:
    for number, line in enumerate(lines, 1):
        try:
            if not session.run(line):
                return
        except MaveriqError as error:
            kind = InputError if isinstance(error, InputError) else MaveriqError
            raise kind(f"command {number} {line.strip()[:60]!r}: {error}") from None


def _run_interactive(session: ConsoleSession) -> None:
    """Read lines from a terminal until the user quits; an error does not end the session."""
    _enable_tab_completion(session.completions)
    echo(f"{session.greeting()} Type help for a list of commands; Tab completes them.")
    while True:
        try:
            if not session.run(input(_PROMPT)):
                return
        except EOFError:
            echo()
            return
        except KeyboardInterrupt:
            echo()
        except MaveriqError as error:
            echo(f"maveriq: {error}", err=True)


def _enable_tab_completion(candidates: Callable[[str], list[str]]) -> None:
    try:
        import readline
    except ImportError:  # this Python was built without it
        return
    matches: list[str] = []

    def complete(_text: str, state: int) -> str | None:
        if state == 0:
            matches[:] = candidates(readline.get_line_buffer()[: readline.get_endidx()])
        return f"{matches[state]} " if state < len(matches) else None

    readline.set_completer_delims(" \t")
    readline.set_completer(complete)
    is_libedit = "libedit" in (readline.__doc__ or "")  # some Pythons use it in place of GNU readline
    readline.parse_and_bind("bind ^I rl_complete" if is_libedit else "tab: complete")


class WaitProgress:
    """Shows how long something has lasted: one line that is rewritten at a terminal, else a line per change."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._rewrites = stream.isatty()
        self._shown = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._rewrites and self._shown:
            self._write("\r" + " " * len(self._shown) + "\r")

    def show(self, what: str, waited_s: float) -> None:
        """Show what is waited for."""
        if self._rewrites:
            line = f"{what} ... {waited_s:.0f} s"
            self._write("\r" + line.ljust(len(self._shown)))
            self._shown = line
        elif what != self._shown:
            self._write(f"{what} ...\n")
            self._shown = what

    def _write(self, text: str) -> None:
        self._stream.write(text)
        self._stream.flush()


class ConsoleSession:
    """Runs commands against one server and prints the results."""

    def __init__(self, client: ServiceClient, *, wait: bool = False) -> None:
        self._client = client
        self._wait = wait  # after a deploy, until its endpoint serves

    def run(self, line: str) -> bool:
        """Run the command in a line; return False if the user quits.

        Raises:
            MaveriqError: the line is not a command, or the server answers with an error.
        """
        command = parse(line)
        if command == Show("quit"):
            return False
        if command is not None:
            self._run(command)
        return True

    def greeting(self) -> str:
        """Return a sentence with the health of the server."""
        return f"The server is {self._client.get('/health')['status']}."

    def completions(self, before: str) -> list[str]:
        """Return the Tab completions of a partly typed line; without a server, those that need none."""
        from maveriq.domain.models import known_models
        from maveriq.policy.registry import RULES

        models: list[Any] = []
        with contextlib.suppress(MaveriqError):
            models = self._client.get("/models")
        names = {*known_models(), *(model["name"] for model in models)}
        return completions(before, models=names, model_ids=[model["id"] for model in models], placements=RULES)

    def _run(self, command: Command) -> None:
        match command:
            case Register(model, profile):
                _print_models([self._client.register(model, profile=profile)])
            case CancelProfile(model_id):
                self._client.cancel_profile(self._model(model_id)["id"])
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
                _print_models(self._client.get("/models"))
            case "endpoints":
                _print_endpoints(self._client.get("/endpoints"))
            case "health":
                health = self._client.get("/health")
                echo("\n".join([health["status"], *health["problems"]]))
            case "help":
                echo(help_text())

    def _deploy(self, command: DeployModel) -> None:
        model = self._model(command.model_id)
        if command.model not in (model["name"], str(model["id"])):
            raise InputError(
                f"model ID {model['id']} is {model['name']}, not {command.model!r}; "
                f"register {command.model!r}, or write {model['name']}"
            )
        if command.assumed_ms:
            echo(f"SLO {command.slo_ms:g} ms: no unit was given, milliseconds are assumed")
        request = asdict(command) | {"model": model["name"]}
        del request["model_id"], request["assumed_ms"]
        endpoint = self._client.create_endpoint(request)
        if endpoint["status"] == "rejected":
            self._client.remove_endpoint(endpoint["id"])
            raise MaveriqError(f"{model['name']} cannot be deployed: {endpoint['reason']}")
        _print_endpoints([endpoint])
        others = [
            other
            for other in self._client.get("/endpoints")
            if other["model_id"] == model["id"] and other["id"] != endpoint["id"] and other["status"] != "rejected"
        ]
        if others:
            name, numbers = model["name"], " and ".join(str(other["id"]) for other in others)
            echo(
                f"{name} had endpoint {numbers} already, and has another one now; {name} addresses the least busy one, "
                f"{name}@{endpoint['id']} this one"
            )
        if self._wait:
            self._wait_until_up(endpoint["id"])

    def _wait_until_up(self, endpoint_id: int) -> None:
        """Wait until an endpoint serves, with its progress on stderr.

        Raises:
            MaveriqError: it cannot come up, or was removed.
        """
        started_s = last_not_down_s = time.monotonic()
        with WaitProgress(sys.stderr) as progress:
            while (endpoint := self._client.get(f"/endpoints/{endpoint_id}"))["status"] != "up":
                now_s, status = time.monotonic(), endpoint["status"]
                what = f"endpoint {endpoint_id} ({endpoint['model']}) {status}"
                if status != "down":
                    last_not_down_s = now_s
                if status in ("removed", "rejected") or now_s - last_not_down_s > _MAX_DOWN_S:
                    raise MaveriqError(f"{what}: {endpoint['reason']}")
                progress.show(what, now_s - started_s)
                time.sleep(_POLL_S)
        waited_s = time.monotonic() - started_s
        echo(f"endpoint {endpoint_id} ({endpoint['model']}) up after {waited_s:.1f} s")

    def _infer(self, command: Infer) -> None:
        model = self._model(command.model_id)
        for text in self._client.complete(model["name"], command.text, priority=command.priority):
            echo(text, nl=False)
        echo()

    def _remove(self, model_id: int) -> None:
        for endpoint in self._endpoints_of(model_id):
            self._client.remove_endpoint(endpoint["id"])
            echo(f"endpoint {endpoint['id']} ({endpoint['model']}) removed")

    def _endpoints_of(self, model_id: int) -> list[Any]:
        model = self._model(model_id)
        endpoints = [endpoint for endpoint in self._client.get("/endpoints") if endpoint["model_id"] == model_id]
        if not endpoints:
            usage = USAGE["deploy"].replace("ID", str(model_id), 1).replace("MODEL", model["name"])
            raise MaveriqError(f"{model['name']} has no endpoint; create one with: {usage}")
        return endpoints

    def _model(self, model_id: int) -> Any:
        models = {model["id"]: model for model in self._client.get("/models")}
        if model_id not in models:
            known = ", ".join(f"{number} is {model['name']}" for number, model in models.items())
            raise InputError(
                f"there is no model with ID {model_id} ({known or 'none is registered'}); "
                "register MODEL registers one and prints its ID"
            )
        return models[model_id]


def _print_models(models: Iterable[Any]) -> None:
    for model in models:
        profile = model.get("profile")
        echo(f"{model['id']}  {model['name']}" + (f"  {_profile_text(profile)}" if profile else ""))


def _profile_text(profile: Any) -> str:
    """Return how far a profile is and what it has cost, in one line."""
    on = f" on GPU {' '.join(map(str, profile['gpus']))}" if profile["gpus"] else ""
    cost = f"{profile['measured_s']:g} s, {profile['gpu_s']:g} GPU-s"
    if profile["usd"] is not None:
        cost += f", {profile['usd']:.4f} USD"
    parts = (f"profile {profile['status']}{on}", profile["detail"], cost if profile["measured_s"] else "")
    return ", ".join(filter(None, parts))


def _print_endpoints(endpoints: Iterable[Any]) -> None:
    for endpoint in endpoints:
        placements = "; ".join(
            f"{deployment['configuration']} on GPU {' '.join(map(str, deployment['gpus']))}"
            for deployment in endpoint["deployments"]
            if deployment["gpus"]
        )
        columns = (
            f"endpoint {endpoint['id']}",
            f"{endpoint['model']} (ID {endpoint['model_id']})",
            endpoint["status"],
            placements,
            f"waiting {endpoint['waiting']}, completed {endpoint['completed']}",
            endpoint["reason"],
        )
        echo("  ".join(filter(None, columns)))
