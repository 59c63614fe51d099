"""The console: parsing of commands, and a session against a real server."""

import contextlib
import dataclasses
import io
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from running import MODEL, Running, running, until

from maveriq.cli.console import ConsoleSession, WaitProgress, run_console
from maveriq.cli.console_commands import (
    USAGE,
    CancelProfile,
    DeployModel,
    Infer,
    Register,
    RemoveModel,
    Show,
    ShowModel,
    completions,
    parse,
)
from maveriq.errors import InputError, MaveriqError
from maveriq.serve.client import ServiceClient
from maveriq.serve.settings import ServeSettings

TOKEN = "abc"  # noqa: S105
DEPLOY = DeployModel(model_id=1, model="m", output_tokens=20, intent="min-cost")


@pytest.mark.parametrize(
    ("line", "command"),
    [
        ("", None),
        ("   # a comment", None),
        ("register llama-2-7b", Register("llama-2-7b")),
        ("register llama-2-7b no", Register("llama-2-7b", profile=False)),
        ("7 cancel_profile", CancelProfile(7)),
        ("1 deploy m 20 min-cost - - - - - no", dataclasses.replace(DEPLOY, wait_for_profile=False)),
        ("models", Show("models")),
        ("exit", Show("quit")),
        ("1 deploy m 20 min_cost", DEPLOY),
        ("1 deploy m 20 min-cost 500ms", dataclasses.replace(DEPLOY, slo_ms=500)),
        ("1 deploy m 20 min-cost 1.5s yes", dataclasses.replace(DEPLOY, slo_ms=1500, float16_only=True)),
        ("1 deploy m 20 min-cost 0 no llf", dataclasses.replace(DEPLOY, placement="llf")),
        (
            "1 deploy m 20 min-cost 80 - - 4 95%",
            dataclasses.replace(DEPLOY, slo_ms=80, assumed_ms=True, batch_size=4, min_accuracy=95.0),
        ),
        ("7 inference  Once upon  a time \n", Infer(model_id=7, text="Once upon  a time ", priority=False)),
        ("7 prior_inference now", Infer(model_id=7, text="now", priority=True)),
        ("7 status", ShowModel(7)),
        ("7 remove", RemoveModel(7)),
    ],
)
def test_parse(line: str, command: object) -> None:
    assert parse(line) == command


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("regster x", "did you mean 'register MODEL [PROFILE]'"),
        ("register", USAGE["register"]),
        ("register m maybe", "PROFILE must be yes or no, not 'maybe'"),
        ("deploy m 20 min-cost", "needs a model ID in front"),
        ("1", "a command is missing after model ID 1"),
        ("1 deplyo m", "did you mean 'ID deploy"),
        ("1 deploy m", USAGE["deploy"]),
        ("1 deploy m x min-cost", "LEN must be a whole number of tokens, not 'x'"),
        ("1 deploy m 20 min-cots", "did you mean 'min-cost'"),
        ("1 deploy m 20 min-cost soon", "SLO must be a time like 500ms or 2s, not 'soon'"),
        ("1 deploy m 20 min-cost nan", "SLO"),
        ("1 deploy m 20 min-cost 1s perhaps", "FP16 must be yes or no"),
        ("1 deploy m 20 min-cost 1s yes llf many", "BATCH"),
        ("1 deploy m 20 min-cost 1s yes llf 1 good", "ACCURACY"),
        ("1 inference", "needs a text"),
        ("1 remove all", "takes no more arguments, not 'all'"),
        ("models please", "takes no more arguments"),
        ("frobnicate", "known: register"),
        ("1 inference caf\udcff", "not UTF-8 text"),
    ],
)
def test_parse_errors_show_the_syntax(line: str, words: str) -> None:
    with pytest.raises(InputError) as error:
        parse(line)
    assert words in str(error.value)


@given(st.text() | st.lists(st.sampled_from(["1", "deploy", "m", "20", "min-cost", "-", "²", "9" * 30])).map(" ".join))
def test_any_line_is_a_command_or_an_error(line: str) -> None:
    with contextlib.suppress(InputError):
        parse(line)


@pytest.mark.parametrize(
    ("before", "found"),
    [
        ("reg", ["register"]),
        ("", ["1", "endpoints", "health", "help", "models", "quit", "register"]),
        ("register lla", ["llama-2-7b"]),
        ("1 ", ["cancel_profile", "deploy", "inference", "prior_inference", "remove", "status"]),
        ("1 deploy ll", ["llama-2-7b"]),
        ("1 deploy llama-2-7b 20 min-l", ["min-latency"]),
        ("1 deploy llama-2-7b 20 min-cost 1s y", ["yes"]),
        ("1 deploy llama-2-7b 20 min-cost 1s yes h", ["hybrid"]),
        ("1 inference lla", []),
        ("models ", []),
    ],
)
def test_tab_completion(before: str, found: list[str]) -> None:
    assert completions(before, models=["llama-2-7b", "gptj-6b"], model_ids=[1], placements=["hybrid", "llf"]) == found


@pytest.fixture
def say(state: Path, capsys: pytest.CaptureFixture[str]) -> Iterator[Callable[[str], str]]:
    """Type a line into a console on a fresh server and return what it prints."""
    with running(state) as server, ServiceClient(server.url, None) as client:
        session = ConsoleSession(client)

        def do(line: str) -> str:
            assert session.run(line)
            return capsys.readouterr().out

        yield do


def test_a_session(say: Callable[[str], str]) -> None:
    assert say(f"register {MODEL}") == f"1  {MODEL}\n"
    assert say("register gptj-6b") == "2  gptj-6b\n"
    assert say("models") == f"1  {MODEL}\n2  gptj-6b\n"
    shown = say(f"1 deploy {MODEL} 20 min-cost 2s no last 2")
    assert shown.startswith(f"endpoint 1  {MODEL} (ID 1)  ")
    assert "TP 1 x PP 1 float16 b2 on GPU 3" in shown
    until(lambda: " up " in say("1 status"))
    assert say("1 status") == say("endpoints")
    assert len(say("1 inference Once upon a time")) == 21
    assert say("1 inference Once upon a time") == say("1 prior_inference Once upon a time")
    assert say("health") == "ready\n"
    assert say("1 remove") == f"endpoint 1 ({MODEL}) removed\n"
    assert say("endpoints") == ""
    assert all(usage in say("help") for usage in USAGE.values())


def test_a_second_deploy_says_that_there_are_two_endpoints(say: Callable[[str], str]) -> None:
    say(f"register {MODEL}")
    assert len(say(f"1 deploy {MODEL} 20 min-cost").splitlines()) == 1
    _, note = say(f"1 deploy {MODEL} 20 min-cost").splitlines()
    assert note.startswith(f"{MODEL} had endpoint 1 already, and has another one now; {MODEL} addresses the least busy")
    assert note.endswith(f"{MODEL}@2 this one")
    _, note = say(f"1 deploy {MODEL} 20 min-cost").splitlines()
    assert f"{MODEL} had endpoint 1 and 2 already" in note


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("register lama-2-7b", "did you mean 'llama-2-7b'"),
        ("1 inference x", "there is no model with ID 1 (none is registered); register MODEL"),
    ],
)
def test_server_errors_are_raised(say: Callable[[str], str], line: str, words: str) -> None:
    with pytest.raises(MaveriqError) as error:
        say(line)
    assert words in str(error.value)


def test_failed_commands_leave_no_endpoint(say: Callable[[str], str]) -> None:
    say("register llama-2-70b")
    with pytest.raises(MaveriqError, match="cannot be deployed: llama-2-70b needs"):
        say("1 deploy llama-2-70b 20 min-cost")
    assert say("endpoints") == ""
    with pytest.raises(InputError, match="model ID 1 is llama-2-70b, not 'gptj-6b'"):
        say("1 deploy gptj-6b 20 min-cost")
    for line in ("1 remove", "1 status"):
        with pytest.raises(MaveriqError, match="llama-2-70b has no endpoint; create one with: 1 deploy llama-2-70b"):
            say(line)
    with pytest.raises(MaveriqError, match="not deployed"):
        say("1 inference x")


def test_commands_from_a_pipe_end_at_the_first_error(
    server: Running, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("models\n\nmodles\nhealth\n"))
    with pytest.raises(InputError, match=r"command 3 'modles': unknown command 'modles'; did you mean 'models'"):
        run_console(server.url, None, [])
    assert capsys.readouterr().out == f"1  {MODEL}\n"
    run_console(server.url, None, ["health", "quit", "models"])
    assert capsys.readouterr().out == "ready\n"


def test_bytes_that_are_not_utf8_are_an_error_of_their_line(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"models\n1 inference caf\xff\n"), encoding="utf-8"))
    with pytest.raises(InputError, match=r"command 2 .* not UTF-8 text"):
        run_console(server.url, None, [])


def test_no_stdin(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", None)
    run_console(server.url, None, [])


def test_help_fits_80_columns(say: Callable[[str], str]) -> None:
    assert max(map(len, say("help").splitlines())) <= 80


def test_url_with_v1_suffix(server: Running, capsys: pytest.CaptureFixture[str]) -> None:
    for suffix in ("/v1", "/v1/", "/"):
        run_console(server.url + suffix, None, ["health"])
    assert capsys.readouterr().out == "ready\n" * 3


@pytest.mark.parametrize(
    ("path", "body"),
    [(path, body) for path in ("/health", "/models") for body in ("<html>", '{"status": "ok"}', "null")],
)
def test_another_server_is_recognized(path: str, body: str) -> None:
    answers = httpx.MockTransport(lambda _request: httpx.Response(200, text=body))
    message = "the server at http://other is not maveriq serve"
    with ServiceClient("http://other", None, transport=answers) as client, pytest.raises(MaveriqError, match=message):
        client.get(path)


def test_no_server(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MaveriqError, match=r"no server answers at .* start maveriq serve"):
        run_console("http://127.0.0.1:1", None, ["health"])
    for url in ("localhost:8000", "ftp://x", "http://", ""):
        with pytest.raises(InputError, match="is not an HTTP URL"):
            run_console(url, None, ["health"])


def test_server_with_token(state: Path, tmp_path: Path) -> None:
    with running(state, ServeSettings(token=TOKEN)) as server:
        with pytest.raises(InputError, match="MAVERIQ_TOKEN in the environment or give"):
            run_console(server.url, None, ["models"])
        (tmp_path / "token").write_text(TOKEN)
        run_console(server.url, tmp_path / "token", ["models"])


def test_tab_completion_reads_models_from_the_server(server: Running) -> None:
    with ServiceClient(server.url, None) as client:
        assert ConsoleSession(client).completions("1 deploy llama-2-7b") == ["llama-2-7b"]
        assert "1" in ConsoleSession(client).completions("")
    with ServiceClient("http://127.0.0.1:1", None) as client:
        assert ConsoleSession(client).completions("reg") == ["register"]


def test_an_slo_without_a_unit_says_which_one_was_taken(say: Callable[[str], str]) -> None:
    say(f"register {MODEL}")
    assert say(f"1 deploy {MODEL} 20 min-cost 2000").startswith(
        "SLO 2000 ms: no unit was given, milliseconds are assumed\nendpoint 1"
    )
    assert say(f"1 deploy {MODEL} 20 min-cost 2s").startswith("endpoint 2")


def test_an_accuracy_below_one_percent_is_refused_with_a_hint(say: Callable[[str], str]) -> None:
    say(f"register {MODEL}")
    with pytest.raises(InputError, match=r"minimum accuracy is in percent.*write 98 for 98 %"):
        say(f"1 deploy {MODEL} 20 min-cost - - - - 0.98")


def test_wait_returns_once_the_endpoint_serves(server: Running, capsys: pytest.CaptureFixture[str]) -> None:
    run_console(server.url, None, [f"register {MODEL}", f"1 deploy {MODEL} 20 min-cost", "1 status"], wait=True)
    captured = capsys.readouterr()
    assert re.search(rf"endpoint \d+ \({MODEL}\) up after \d+\.\d s\n", captured.out)
    assert captured.out.splitlines()[-1].split("  ")[2] == "up"


def test_wait_shows_progress_and_ends_when_the_endpoint_is_gone(capsys: pytest.CaptureFixture[str]) -> None:
    answers = [
        ("GET", "/models", [{"id": 1, "name": "m"}]),
        ("POST", "/endpoints", {"id": 7, "status": "waiting"}),
        ("GET", "/endpoints", []),
        *[("GET", "/endpoints/7", {"status": status}) for status in ("waiting", "loading", "loading", "removed")],
    ]

    def answer(request: httpx.Request) -> httpx.Response:
        method, path, content = answers.pop(0)
        assert (request.method, request.url.path) == (method, path)
        full = {"model": "m", "model_id": 1, "reason": "why", "deployments": [], "waiting": 0, "completed": 0, "id": 7}
        return httpx.Response(200, json=full | content if isinstance(content, dict) else content)

    with (
        ServiceClient("http://any", None, transport=httpx.MockTransport(answer)) as client,
        pytest.raises(MaveriqError, match=r"endpoint 7 \(m\) removed: why"),
    ):
        ConsoleSession(client, wait=True).run("1 deploy m 20 min-cost")
    assert capsys.readouterr().err.splitlines() == ["endpoint 7 (m) waiting ...", "endpoint 7 (m) loading ..."]


def test_progress_rewrites_its_line_at_a_terminal() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream = Terminal()
    with WaitProgress(stream) as progress:
        progress.show("loading", 1.0)
        progress.show("up", 2.0)
    assert stream.getvalue() == "\rloading ... 1 s\rup ... 2 s     \r" + " " * 10 + "\r"
