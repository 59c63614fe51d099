"""Who may come in, and how much they may bring."""

import json
import logging
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from running import MODEL, TIMEOUT_S, Running, running, until

from maveriq.errors import InputError
from maveriq.serve import server
from maveriq.serve.auth import is_loopback, read_token
from maveriq.serve.server import listen
from maveriq.serve.settings import ServeSettings

TOKEN = "s3cret-of-the-test"  # noqa: S105
EVERYWHERE = "0.0.0.0"  # noqa: S104
ROUTES = ["/health", "/metrics", "/v1/models", "/models", "/endpoints", "/requests", "/openapi.json", "/nowhere"]


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server that wants a token."""
    with running(tmp_path_factory.mktemp("guarded") / "s.db", ServeSettings(token=TOKEN)) as one:
        yield one


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server with low limits and slow engines."""
    limits = ServeSettings(max_in_flight=1, max_body_bytes=2_000, body_timeout_s=1.0, grace_period_s=0.05)
    with running(tmp_path_factory.mktemp("narrow") / "s.db", limits, token_s=0.05) as one:
        one.deploy()
        yield one


@pytest.mark.parametrize("path", ROUTES)
@pytest.mark.parametrize(
    "said", [{}, {"Authorization": "Bearer wrong"}, {"Authorization": TOKEN}, {"Authorization": f"Basic {TOKEN}"}]
)
def test_without_the_token_nothing_is_shown(guarded: Running, path: str, said: dict[str, str]) -> None:
    with guarded.client(headers=said) as http:
        answer = http.get(path)
    assert answer.status_code == 401
    assert answer.headers["www-authenticate"] == "Bearer"
    assert answer.json()["error"]["code"] == "invalid_api_key"


@pytest.mark.parametrize("said", [f"Bearer {TOKEN}", f"bearer   {TOKEN}"])
def test_with_the_token_all_is_as_usual(guarded: Running, said: str) -> None:
    with guarded.client(headers={"Authorization": said, "Host": "models.example"}) as http:
        assert http.get("/health").json()["status"] == "ready"
        assert http.get("/nowhere").status_code == 404


def test_the_token_is_nowhere_to_be_read(guarded: Running, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG), guarded.client(headers={"Authorization": f"Bearer {TOKEN}"}) as http:
        shown = http.get("/openapi.json").text + http.get("/metrics").text + http.post("/models", json={}).text
    assert TOKEN not in shown + caplog.text + repr(guarded.service.settings)


@pytest.mark.parametrize("host", [EVERYWHERE, "::"])
def test_others_may_come_only_with_a_token(host: str) -> None:
    with pytest.raises(InputError, match="MAVERIQ_TOKEN"):
        listen(host, 0, ServeSettings())
    if host == EVERYWHERE:  # not every machine has IPv6
        listen(host, 0, ServeSettings(token=TOKEN)).close()


def test_a_token_comes_from_a_file_or_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MAVERIQ_TOKEN", raising=False)
    assert read_token(None) is None
    monkeypatch.setenv("MAVERIQ_TOKEN", " abc ")
    assert read_token(None) == "abc"
    file = tmp_path / "token"
    file.write_text("from-the-file\n")
    assert read_token(file) == "from-the-file"
    for text in ("", "two words", "naïve"):
        file.write_text(text)
        with pytest.raises(InputError, match="token"):
            read_token(file)
    with pytest.raises(InputError, match="gone"):
        read_token(tmp_path / "gone")


@pytest.mark.parametrize("host", ["evil.example", "localhost.evil.example", "10.0.0.1:8000", "", "[::2]:80"])
def test_a_server_without_token_answers_as_localhost_alone(server: Running, host: str) -> None:
    with server.client(headers={"Host": host}) as http:
        assert http.get("/health").status_code == 403


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:8000", "127.0.0.1:1", "[::1]:8000", "127.9.9.9"])
def test_all_names_of_localhost_will_do(server: Running, host: str) -> None:
    with server.client(headers={"Host": host}) as http:
        assert http.get("/health").status_code == 200


def test_what_is_loopback() -> None:
    assert [is_loopback(one) for one in ("127.0.0.1", "::1", "[::1]", "localhost")] == [True] * 4
    assert [is_loopback(one) for one in (EVERYWHERE, "::", "example.com", "")] == [False] * 4


def test_a_port_in_use_is_said_in_a_line() -> None:
    taken = listen("127.0.0.1", 0, ServeSettings())
    with pytest.raises(InputError, match=r"port \d+: Address already in use; choose another with --port"):
        listen("127.0.0.1", taken.getsockname()[1], ServeSettings())
    taken.close()
    with pytest.raises(InputError, match="cannot be found"):
        listen("no.such.host.invalid", 0, ServeSettings())


def test_too_large_a_body(narrow: Running) -> None:
    with narrow.client() as http:
        answer = http.post("/v1/completions", json={"model": MODEL, "prompt": "x" * 2_000})
        assert (answer.status_code, answer.json()["error"]["code"]) == (413, "body_too_large")
        chunks = (b"x" * 500 for _ in range(1_000))
        answer = http.post("/models", content=chunks, headers={"Content-Type": "application/json"})
        assert answer.status_code == 413, "nor in pieces of unsaid number"


def test_a_body_that_does_not_come(narrow: Running) -> None:
    with _connected(narrow) as wire:
        wire.sendall(b"POST /models HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n{")
        assert wire.recv(4_096).startswith(b"HTTP/1.1 408")


def test_headers_without_end(narrow: Running) -> None:
    with _connected(narrow) as wire:
        wire.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\nX-Long: " + b"x" * 100_000 + b"\r\n\r\n")
        assert wire.recv(4_096).startswith(b"HTTP/1.1 431")


@pytest.mark.parametrize("before", [b"", b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"])
@pytest.mark.parametrize("begun", [b"", b"GET /health HTTP/1.1\r\nHost: local"])
def test_a_head_that_does_not_come(
    narrow: Running, monkeypatch: pytest.MonkeyPatch, before: bytes, begun: bytes
) -> None:
    monkeypatch.setattr(server, "HEAD_TIMEOUT_S", 0.5)
    with _connected(narrow) as wire:
        if before:
            wire.sendall(before)
            answered = wire.recv(4_096)
            while not answered.endswith(b"}"):
                answered += wire.recv(4_096)
            assert answered.startswith(b"HTTP/1.1 200")
        wire.sendall(begun)
        if begun or not before:  # what is idle between two requests is uvicorn's business
            assert wire.recv(4_096) == b""


def test_a_slow_answer_is_waited_for(narrow: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "HEAD_TIMEOUT_S", 0.3)
    with narrow.client() as http:
        for _ in range(2):
            answer = http.post("/v1/completions", json={"model": MODEL, "prompt": "a", "max_tokens": 12})
            assert answer.status_code == 200


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", ""])
def test_a_body_must_be_said_to_be_json(server: Running, kind: str) -> None:
    with server.client() as http:
        answer = http.post("/models", content=json.dumps({"model": MODEL}), headers={"Content-Type": kind})
    assert answer.status_code == 415


@pytest.mark.parametrize(
    "body", [b"{", b"[" * 100_000, b"\xff\xfe", b'{"model": "\\ud800"}', b'{"model": NaN}', b"null"]
)
def test_a_body_that_is_none(server: Running, body: bytes) -> None:
    with server.client() as http:
        answer = http.post("/models", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400
    assert answer.json()["error"]["type"] == "invalid_request_error"


def test_a_full_queue_says_when_to_come_back(narrow: Running) -> None:
    body = {"model": MODEL, "prompt": "a", "max_tokens": 20}
    narrow.hold_tokens()
    narrow.release_tokens(1)
    with narrow.client() as http, http.stream("POST", "/v1/completions", json=body | {"stream": True}) as running_one:
        lines = running_one.iter_lines()
        next(lines)
        with narrow.client() as late:
            refused = late.post("/v1/completions", json=body)
            assert refused.status_code == 429
            assert refused.json()["error"]["type"] == "rate_limit_error"
            assert 1 <= int(refused.headers["retry-after"]) <= 60
            assert late.get("/health").json()["in_flight"] == 1, "what is not accepted takes no place"
        narrow.release_tokens()
        assert "[DONE]" in "".join(lines)
        until(lambda: len(narrow.service.requests) == 0)
        assert http.post("/v1/completions", json=body | {"max_tokens": 1}).status_code == 200


def _connected(server: Running) -> socket.socket:
    host, _, port = server.url.removeprefix("http://").partition(":")
    return socket.create_connection((host, int(port)), timeout=TIMEOUT_S)
