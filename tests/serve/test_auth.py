"""Authentication and HTTP limits."""

import json
import logging
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from running import MODEL, TIMEOUT_S, Running, running, until

from maveriq.errors import InputError
from maveriq.serve import http_protocol
from maveriq.serve.auth import is_loopback, read_token
from maveriq.serve.server import listen
from maveriq.serve.settings import ServeSettings

TOKEN = "s3cret-of-the-test"  # noqa: S105
EVERYWHERE = "0.0.0.0"  # noqa: S104
ROUTES = ["/health", "/metrics", "/v1/models", "/models", "/endpoints", "/requests", "/openapi.json", "/nowhere"]


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server with a token."""
    with running(tmp_path_factory.mktemp("guarded") / "s.db", ServeSettings(token=TOKEN)) as running_server:
        yield running_server


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server with low limits and slow engines."""
    limits = ServeSettings(max_in_flight=1, max_body_bytes=2_000, body_timeout_s=1.0, grace_period_s=0.05)
    with running(tmp_path_factory.mktemp("narrow") / "s.db", limits, token_s=0.05) as running_server:
        running_server.deploy()
        yield running_server


@pytest.mark.parametrize("path", ROUTES)
@pytest.mark.parametrize(
    "authorization",
    [{}, {"Authorization": "Bearer wrong"}, {"Authorization": TOKEN}, {"Authorization": f"Basic {TOKEN}"}],
)
def test_without_the_token_every_route_is_401(guarded: Running, path: str, authorization: dict[str, str]) -> None:
    with guarded.client(headers=authorization) as http:
        answer = http.get(path)
    assert answer.status_code == 401
    assert answer.headers["www-authenticate"] == "Bearer"
    assert answer.json()["error"]["code"] == "invalid_api_key"


@pytest.mark.parametrize("authorization", [f"Bearer {TOKEN}", f"bearer   {TOKEN}"])
def test_with_the_token(guarded: Running, authorization: str) -> None:
    with guarded.client(headers={"Authorization": authorization, "Host": "models.example"}) as http:
        assert http.get("/health").json()["status"] == "ready"
        assert http.get("/nowhere").status_code == 404


def test_the_token_is_never_shown(guarded: Running, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG), guarded.client(headers={"Authorization": f"Bearer {TOKEN}"}) as http:
        shown = http.get("/openapi.json").text + http.get("/metrics").text + http.post("/models", json={}).text
    assert TOKEN not in shown + caplog.text + repr(guarded.service.settings)


@pytest.mark.parametrize("host", [EVERYWHERE, "::"])
def test_other_addresses_need_a_token(host: str) -> None:
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
def test_without_a_token_other_host_names_are_refused(server: Running, host: str) -> None:
    with server.client(headers={"Host": host}) as http:
        assert http.get("/health").status_code == 403


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:8000", "127.0.0.1:1", "[::1]:8000", "127.9.9.9"])
def test_without_a_token_loopback_names_are_served(server: Running, host: str) -> None:
    with server.client(headers={"Host": host}) as http:
        assert http.get("/health").status_code == 200


def test_is_loopback() -> None:
    assert [is_loopback(host) for host in ("127.0.0.1", "::1", "[::1]", "localhost")] == [True] * 4
    assert [is_loopback(host) for host in (EVERYWHERE, "::", "example.com", "")] == [False] * 4


def test_port_in_use() -> None:
    taken = listen("127.0.0.1", 0, ServeSettings())
    with pytest.raises(InputError, match=r"port \d+: Address already in use; choose another with --port"):
        listen("127.0.0.1", taken.getsockname()[1], ServeSettings())
    taken.close()
    with pytest.raises(InputError, match="cannot be found"):
        listen("no.such.host.invalid", 0, ServeSettings())


def test_body_too_large(narrow: Running) -> None:
    with narrow.client() as http:
        answer = http.post("/v1/completions", json={"model": MODEL, "prompt": "x" * 2_000})
        assert (answer.status_code, answer.json()["error"]["code"]) == (413, "body_too_large")
        chunks = (b"x" * 500 for _ in range(1_000))
        answer = http.post("/models", content=chunks, headers={"Content-Type": "application/json"})
        assert answer.status_code == 413, "nor in pieces of unsaid number"


def test_body_timeout(narrow: Running) -> None:
    with _connected(narrow) as connection:
        connection.sendall(b"POST /models HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n{")
        assert connection.recv(4_096).startswith(b"HTTP/1.1 408")


def test_headers_too_long(narrow: Running) -> None:
    with _connected(narrow) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\nX-Long: " + b"x" * 100_000 + b"\r\n\r\n")
        assert connection.recv(4_096).startswith(b"HTTP/1.1 431")


@pytest.mark.parametrize("before", [b"", b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"])
@pytest.mark.parametrize("begun", [b"", b"GET /health HTTP/1.1\r\nHost: local"])
def test_head_timeout(narrow: Running, monkeypatch: pytest.MonkeyPatch, before: bytes, begun: bytes) -> None:
    monkeypatch.setattr(http_protocol, "HEAD_TIMEOUT_S", 0.5)
    with _connected(narrow) as connection:
        if before:
            connection.sendall(before)
            answered = connection.recv(4_096)
            while not answered.endswith(b"}"):
                answered += connection.recv(4_096)
            assert answered.startswith(b"HTTP/1.1 200")
        connection.sendall(begun)
        if begun or not before:  # what is idle between two requests is uvicorn's business
            assert connection.recv(4_096) == b""


def test_head_timeout_does_not_end_slow_responses(narrow: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_protocol, "HEAD_TIMEOUT_S", 0.3)
    with narrow.client() as http:
        for _ in range(2):
            answer = http.post("/v1/completions", json={"model": MODEL, "prompt": "a", "max_tokens": 12})
            assert answer.status_code == 200


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", ""])
def test_other_content_types_are_refused(server: Running, kind: str) -> None:
    with server.client() as http:
        answer = http.post("/models", content=json.dumps({"model": MODEL}), headers={"Content-Type": kind})
    assert answer.status_code == 415


@pytest.mark.parametrize(
    "body", [b"{", b"[" * 100_000, b"\xff\xfe", b'{"model": "\\ud800"}', b'{"model": NaN}', b"null"]
)
def test_invalid_json(server: Running, body: bytes) -> None:
    with server.client() as http:
        answer = http.post("/models", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400
    assert answer.json()["error"]["type"] == "invalid_request_error"


def test_full_queue_gives_retry_after(narrow: Running) -> None:
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


PAGE = "http://127.0.0.1:9999"


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Origin": PAGE},
        {"Origin": "http://localhost"},
        {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors"},
        {"Sec-Fetch-Site": "same-site", "Sec-Fetch-Mode": "cors", "Origin": PAGE},
    ],
)
@pytest.mark.parametrize("method", ["GET", "POST", "OPTIONS", "DELETE"])
def test_without_a_token_other_web_pages_are_refused(server: Running, method: str, headers: dict[str, str]) -> None:
    before = len(server.cluster.submitted)
    with server.client() as http:
        content = json.dumps({"model": MODEL, "prompt": "a"})
        preflight = {"Access-Control-Request-Method": "POST", "Content-Type": "application/json"}
        answer = http.request(method, "/v1/completions", content=content, headers=preflight | headers)
        assert answer.status_code == 403
        assert answer.json()["error"]["code"] == "wrong_origin"
        assert not any(name.startswith("access-control") for name in answer.headers)
        assert answer.headers["cross-origin-resource-policy"] == "same-origin"
    assert len(server.cluster.submitted) == before


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""])
def test_a_form_of_another_page_is_refused_without_its_headers(server: Running, kind: str) -> None:
    with server.client() as http:
        content = json.dumps({"model": MODEL, "prompt": "a"})
        answer = http.post("/v1/completions", content=content, headers={"Content-Type": kind})
    assert answer.status_code == 415


def test_own_pages_and_links_are_served(server: Running) -> None:
    with server.client() as http:
        same = {"Origin": server.url, "Sec-Fetch-Site": "same-origin", "Sec-Fetch-Mode": "cors"}
        assert http.post("/models", json={"model": MODEL}, headers=same).status_code == 201
        link = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}
        assert http.get("/", headers=link).status_code == 200
        assert http.delete("/endpoints/99", headers=link).status_code == 403


def test_with_a_token_the_origin_does_not_matter(guarded: Running) -> None:
    headers = {"Authorization": f"Bearer {TOKEN}", "Origin": "https://ui.example", "Host": "models.example"}
    with guarded.client(headers=headers) as http:
        assert http.get("/health").status_code == 200
