"""The client of the console against servers that are not, or only pretend to be, maveriq serve."""

import contextlib
import gzip
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator

import httpx
import pytest

from maveriq.cli.console import ConsoleSession
from maveriq.cli.error_handler import run_command
from maveriq.errors import MaveriqError
from maveriq.serve import client as client_module
from maveriq.serve.client import ServiceClient

ESCAPE = "\x1b]0;owned\x07"
MODEL = {"id": 1, "name": "m"}


@contextlib.contextmanager
def client_of(answer: Callable[[socket.socket], None]) -> Iterator[ServiceClient]:
    """Give a client of a server that answers every connection with a function."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = listener.accept()
                    with connection, contextlib.suppress(OSError):
                        connection.recv(65_536)
                        answer(connection)

        thread = threading.Thread(target=serve)
        thread.start()
        with ServiceClient(f"http://127.0.0.1:{listener.getsockname()[1]}", None) as client:
            yield client
        listener.shutdown(socket.SHUT_RDWR)
    thread.join(10)


def endless(head: str, part: bytes) -> Callable[[socket.socket], None]:
    def answer(connection: socket.socket) -> None:
        connection.sendall(f"HTTP/1.1 200 OK\r\n{head}\r\n\r\n".encode())
        while True:
            connection.sendall(part)

    return answer


def session(answers: Callable[[httpx.Request], httpx.Response]) -> ConsoleSession:
    return ConsoleSession(ServiceClient("http://other", None, transport=httpx.MockTransport(answers)))


@pytest.mark.parametrize("path", ["/models", "/endpoints", "/health"])
def test_an_endless_answer(monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    monkeypatch.setattr(client_module, "_MAX_ANSWER_BYTES", 100_000)
    with (
        client_of(endless("Connection: close", b"[" * 10_000)) as client,
        pytest.raises(MaveriqError, match="sends more than 100,000 bytes"),
    ):
        client.get(path)


def test_a_slow_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "_ANSWER_TIMEOUT_S", 0.0)
    with (
        client_of(endless("Connection: close", b" ")) as client,
        pytest.raises(MaveriqError, match="has sent for more than 0 s"),
    ):
        client.get("/models")


def test_an_answer_that_stops(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "_READ_TIMEOUT_S", 0.2)

    def answer(connection: socket.socket) -> None:
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n[")
        time.sleep(1)

    with client_of(answer) as client, pytest.raises(MaveriqError, match="lost the connection"):
        client.get("/models")


def test_an_endless_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    event = b'data: {"choices": [{"text": "a"}]}\n\n'
    monkeypatch.setattr(client_module, "_MAX_STREAM_BYTES", 10_000)
    with (
        client_of(endless("Connection: close", event)) as client,
        pytest.raises(MaveriqError, match="sends more than 10,000 bytes"),
    ):
        list(client.complete("m", "a", priority=False))
    monkeypatch.setattr(client_module, "_MAX_STREAM_BYTES", 10_000_000)
    with (
        client_of(endless("Connection: close", b"data: " + b"a" * 65_536)) as client,
        pytest.raises(MaveriqError, match="a line of more than"),
    ):
        list(client.complete("m", "a", priority=False))


def test_compressed_answers_are_not_unpacked() -> None:
    bomb = gzip.compress(b"[" + b" " * 50_000_000 + b"]")

    def answer(connection: socket.socket) -> None:
        head = f"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: {len(bomb)}\r\n\r\n"
        connection.sendall(head.encode() + bomb)

    with client_of(answer) as client, pytest.raises(MaveriqError, match="is not maveriq serve"):
        client.get("/models")


@pytest.mark.parametrize(
    "answer", [b"", b"SSH-2.0-OpenSSH_9.6\r\n", b"HTTP/1.1 200 OK\r\nX: " + b"a" * 500_000, b"HTTP/9.9 999 x\r\n\r\n"]
)
def test_answers_that_are_not_http(answer: bytes) -> None:
    with client_of(lambda connection: connection.sendall(answer)) as client, pytest.raises(MaveriqError):
        client.get("/models")


CONTENTS = [
    None, 5, "a", [], {}, [1], [None], [[]], [{}], {"id": 1}, [{"id": "1", "name": "m"}], [{"id": 1, "name": None}],
    [MODEL | {"id": 2**70}], {"status": 5, "problems": []}, {"status": "a", "problems": [5]}, {"error": []},
    {"error": {"message": 5}}, {"choices": [{}]}, {"choices": {"text": 5}},
    [{"id": 1, "model": "m", "model_id": 1, "status": "up", "reason": "", "waiting": 0, "completed": 0,
      "deployments": [{"configuration": "c", "gpus": "0"}]}],
]  # fmt: skip
COMMANDS = [
    "models",
    "endpoints",
    "health",
    "register m",
    "1 deploy m 20 min-cost",
    "1 status",
    "1 remove",
    "1 inference a",
]


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("status", [200, 201, 204, 302, 404, 500])
def test_answers_of_any_shape_are_one_error(command: str, status: int) -> None:
    for content in CONTENTS:
        for first in ([MODEL], content):

            def answer(request: httpx.Request, first: object = first, content: object = content) -> httpx.Response:
                is_model_list = request.method == "GET" and request.url.path == "/models"
                return httpx.Response(status, json=first if is_model_list else content)

            with contextlib.suppress(MaveriqError):
                session(answer).run(command)


def test_a_deep_answer() -> None:
    with pytest.raises(MaveriqError, match="is not maveriq serve"):
        session(lambda _request: httpx.Response(200, content=b"[" * 200_000)).run("models")


def test_a_redirect_is_not_followed() -> None:
    asked: list[str] = []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(str(request.url))
        return httpx.Response(307, headers={"Location": "http://elsewhere/models"})

    with pytest.raises(MaveriqError, match="the server answers 307"):
        session(answer).run("models")
    assert asked == ["http://other/models"]


def test_long_messages_are_cut() -> None:
    with pytest.raises(MaveriqError) as error:
        session(lambda _request: httpx.Response(404, json={"error": {"message": "a" * 1_000_000}})).run("models")
    assert len(str(error.value)) == 2_000


EVIL = f"m{ESCAPE}"
EVIL_ENDPOINT = {
    "id": 1, "model": EVIL, "model_id": 1, "status": EVIL, "reason": EVIL, "waiting": 0, "completed": 0,
    "deployments": [{"configuration": EVIL, "gpus": [0]}],
}  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("status", [200, 500])
def test_control_characters_never_reach_the_terminal(
    capfd: pytest.CaptureFixture[str], command: str, status: int
) -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        path = request.url.path
        if status != 200:
            return httpx.Response(status, json={"error": {"message": EVIL}})
        if path == "/v1/completions":
            return httpx.Response(200, text=f'data: {{"choices": [{{"text": {json.dumps(EVIL)}}}]}}\n\n')
        if path == "/health":
            return httpx.Response(200, json={"status": EVIL, "problems": [EVIL]})
        content = {"id": 1, "name": EVIL} if path == "/models" else EVIL_ENDPOINT
        is_list = request.method == "GET" and path in ("/models", "/endpoints")
        return httpx.Response(200, json=[content] if is_list else content)

    run_command(lambda: session(answer).run(command))
    shown = capfd.readouterr()
    assert "\x1b" not in shown.out + shown.err
    assert "\x07" not in shown.out + shown.err
    if status == 200 and command in ("models", "endpoints", "health", "1 inference a"):
        assert "\\x1b]0;owned" in shown.out
