"""Connections: who has a place, how many there are, and what clients that wait or send too slowly can do."""

import asyncio
import contextlib
import errno
import json
import logging
import os
import re
import resource
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from running import MODEL, TIMEOUT_S, Running, running, until

from maveriq.errors import InputError
from maveriq.serve import connections as connections_module
from maveriq.serve import http_protocol
from maveriq.serve.connections import Connection, Connections, connection_limit
from maveriq.serve.log_limit import LogLimit
from maveriq.serve.settings import ServeSettings

TOKEN = "s3cret-of-the-test"  # noqa: S105
AUTHORIZED = {"Authorization": f"Bearer {TOKEN}"}
HEAD = b"Host: localhost\r\nAuthorization: Bearer " + TOKEN.encode() + b"\r\n"


class FakeConnection(Connection):
    def __init__(self, peer: str) -> None:
        self._peer = peer
        self.idle = True
        self.closed = False

    @property
    def peer(self) -> str:
        return self._peer

    @property
    def waits_for_client(self) -> bool:
        return self.idle

    def make_room(self) -> None:
        self.closed = True

    def close_if_expired(self, *, crowded: bool) -> bool:
        return crowded


def new_connections(limit: int) -> tuple[Connections, list[str]]:
    reasons: list[str] = []
    return Connections(limit, reasons.append), reasons


def test_guests_have_half_of_the_places() -> None:
    connections, reasons = new_connections(8)
    guests = [FakeConnection("a") for _ in range(6)]
    assert all(map(connections.add, guests))
    assert [guest.closed for guest in guests] == [True, True, False, False, False, False]
    assert len(connections) == 4
    assert reasons == ["full", "full"]


def test_the_peer_with_most_guests_makes_room() -> None:
    connections, _ = new_connections(8)
    quiet = FakeConnection("b")
    loud = [FakeConnection("a") for _ in range(10)]
    connections.add(loud[0])
    connections.add(quiet)
    for guest in loud[1:]:
        connections.add(guest)
    assert not quiet.closed
    assert sum(guest.closed for guest in loud) == 7


def test_guests_make_room_before_authenticated_connections() -> None:
    connections, _ = new_connections(4)
    known = [FakeConnection("a") for _ in range(3)]
    for connection in known:
        connections.add(connection)
        connections.authenticate(connection)
    guest, late, later = (FakeConnection("a") for _ in range(3))
    assert connections.add(guest)
    assert connections.add(late)
    assert guest.closed
    connections.authenticate(late)
    connections.authenticate(known[0])  # used again, so `known[1]` has been idle longest
    assert connections.add(later)
    assert [connection.closed for connection in (*known, late)] == [False, True, False, False]


def test_no_busy_connection_makes_room() -> None:
    connections, reasons = new_connections(2)
    for _ in range(2):
        connection = FakeConnection("a")
        connection.idle = False
        connections.add(connection)
        connections.authenticate(connection)
    assert not connections.add(FakeConnection("a"))
    assert reasons == ["full"]
    assert len(connections) == 2


def test_forgotten_connections_take_no_place() -> None:
    connections, _ = new_connections(8)
    connection = FakeConnection("a")
    connections.add(connection)
    connections.remove(connection)
    connections.remove(connection)
    connections.authenticate(connection)
    assert len(connections) == 0
    assert list(connections) == []


def test_the_soft_limit_of_open_files_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = [64, 4_096]
    monkeypatch.setattr(resource, "getrlimit", lambda _kind: tuple(limits))
    monkeypatch.setattr(resource, "setrlimit", lambda _kind, new: limits.__setitem__(slice(None), new))
    monkeypatch.setattr(connections_module, "_open_descriptors", lambda: 20)
    assert connection_limit(768) == 768
    assert limits == [916, 4_096]


@pytest.mark.parametrize(("hard", "expected"), [(900, 752), (256, 172), (64, 28)])
def test_a_low_hard_limit_means_fewer_connections(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, hard: int, expected: int
) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _kind: (hard, hard))
    monkeypatch.setattr(resource, "setrlimit", lambda _kind, _new: pytest.fail("the limit cannot be raised"))
    monkeypatch.setattr(connections_module, "_open_descriptors", lambda: 20)
    assert connection_limit(768) == expected
    assert f"(ulimit -n) is {hard}; 916 would be enough for 768" in caplog.text


def test_a_limit_that_is_too_low_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _kind: (40, 40))
    monkeypatch.setattr(resource, "setrlimit", lambda _kind, _new: pytest.fail("the limit cannot be raised"))
    monkeypatch.setattr(connections_module, "_open_descriptors", lambda: 20)
    with pytest.raises(InputError, match=r"\(ulimit -n\) is 40; maveriq serve needs at least 44, and 916 for 768"):
        connection_limit(768)


def test_log_limit() -> None:
    now_s = [0.0]
    log_limit = LogLimit(lambda: now_s[0])

    def record(line: int = 1) -> logging.LogRecord:
        return logging.LogRecord("name", logging.WARNING, "file.py", line, "message %d", (7,), None)

    assert [log_limit.filter(record()) for _ in range(8)] == [True] * 5 + [False] * 3
    assert log_limit.filter(record(line=2)), "another message"
    now_s[0] = 61.0
    first = record()
    assert log_limit.filter(first)
    assert first.getMessage() == "message 7 (3 more like this in the last minute)"
    for line in range(1_000):
        log_limit.filter(record(line))
    assert len(log_limit._windows) <= 256


@contextlib.contextmanager
def limited_process(folder: Path, files: int) -> Iterator[tuple[str, Path]]:
    """Give the URL and the log of a server with a token that may open so many files."""
    errors = folder / "errors.txt"
    script = Path(__file__).with_name("live.py")
    limit = f"import resource; resource.setrlimit(resource.RLIMIT_NOFILE, ({files}, {files}))"
    code = f"{limit}; import runpy; runpy.run_path({str(script)!r}, run_name='__main__')"
    command = [sys.executable, "-c", code, str(folder / "s.db"), "0.0", "1"]
    environment = os.environ | {"MAVERIQ_TOKEN": TOKEN, "PYTHONPATH": os.pathsep.join([str(script.parent), *sys.path])}
    with errors.open("wb") as stderr:
        server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, text=True, env=environment)
        try:
            assert server.stdout is not None
            yield server.stdout.readline().strip(), errors
        finally:
            server.terminate()
            assert server.wait(TIMEOUT_S) == 0
            server.communicate()


@pytest.mark.heavy
@pytest.mark.parametrize(("files", "sent"), [(1_024, b""), (64, b"POST /v1/completions HTTP/1.1\r\nHost: localh")])
def test_idle_connections_do_not_stop_an_authorized_client(tmp_path: Path, files: int, sent: bytes) -> None:
    _need_descriptors(1_300)
    with limited_process(tmp_path, files) as (url, errors), contextlib.ExitStack() as idle:
        with httpx.Client(base_url=url, timeout=TIMEOUT_S, headers=AUTHORIZED) as http:
            assert http.post("/endpoints", json={"model": MODEL}).status_code == 201
            until(lambda: http.get("/endpoints/1").json()["status"] == "up")
            for _ in range(1_200):
                connection = idle.enter_context(_connected(url))
                with contextlib.suppress(OSError):  # it has made room for another one
                    connection.sendall(sent)
            for _ in range(5):
                with httpx.Client(base_url=url, timeout=TIMEOUT_S, headers=AUTHORIZED) as late:
                    body = {"model": MODEL, "prompt": "a", "max_tokens": 1}
                    assert late.post("/v1/completions", json=body).status_code == 200
            assert http.get("/health").status_code == 200, "nor is an open connection closed"
            shown = http.get("/metrics").text
            closed = float(re.findall(r'maveriq_connections_closed_total\{reason="full"\} (\S+)', shown)[0])
            assert closed >= 1_200 - files
        assert errors.stat().st_size < 4_096, errors.read_text()


def _need_descriptors(count: int) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < count:
        if hard != resource.RLIM_INFINITY and hard < count:
            pytest.skip(f"needs {count} open files")
        resource.setrlimit(resource.RLIMIT_NOFILE, (count, hard))


def _connected(url: str) -> socket.socket:
    host, _, port = url.removeprefix("http://").partition(":")
    return socket.create_connection((host, int(port)), timeout=TIMEOUT_S)


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server with a token and few places."""
    settings = ServeSettings(token=TOKEN, grace_period_s=0.5, max_in_flight=4, body_timeout_s=2.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("maveriq.serve.server._SPARE_CONNECTIONS", 4)  # with 2 per request: 12 connections
        with running(tmp_path_factory.mktemp("guarded") / "s.db", settings) as server:
            patch.undo()
            with server.client(headers=AUTHORIZED) as http:
                http.post("/endpoints", json={"model": MODEL, "output_tokens": 6})
                until(lambda: http.get("/endpoints/1").json()["status"] == "up")
            yield server


def response_of(connection: socket.socket) -> tuple[int, dict[str, str], dict[str, object]]:
    """Return status, headers and content of a response after which the connection is closed."""
    received = b""
    with contextlib.suppress(ConnectionResetError):
        while part := connection.recv(65_536):
            received += part
    head, _, body = received.partition(b"\r\n\r\n")
    status, *lines = head.decode().split("\r\n")
    return int(status.split()[1]), dict(line.lower().split(": ", 1) for line in lines), json.loads(body)


@pytest.mark.parametrize("sent", [b"", b"GET /health HT"])
def test_who_makes_room_gets_json_and_retry_after(guarded: Running, sent: bytes) -> None:
    with contextlib.ExitStack() as stack:
        first = stack.enter_context(_connected(guarded.url))
        first.sendall(sent)
        for _ in range(6):
            stack.enter_context(_connected(guarded.url))
        status, headers, content = response_of(first)
        assert (status, headers["retry-after"], headers["content-type"]) == (503, "2", "application/json")
        assert content["error"]["code"] == "too_many_connections"  # type: ignore[index]


@pytest.mark.heavy
def test_slow_bodies_make_room_for_other_clients(guarded: Running) -> None:
    with contextlib.ExitStack() as stack:
        slow = [stack.enter_context(_connected(guarded.url)) for _ in range(12)]
        for connection in slow:
            connection.sendall(b"POST /models HTTP/1.1\r\n" + HEAD + b"Content-Length: 9\r\n\r\n{")
            time.sleep(0.01)
        with guarded.client(headers=AUTHORIZED) as http:
            assert http.get("/health").status_code == 200
        assert response_of(slow[0])[0] == 503
        assert response_of(slow[-1])[0] == 408


def test_a_full_server_refuses_with_json(guarded: Running) -> None:
    guarded.hold_tokens()
    body = json.dumps({"model": MODEL, "prompt": "a", "stream": True}).encode()
    head = b"POST /v1/completions HTTP/1.1\r\n" + HEAD + b"Content-Type: application/json\r\n"
    with contextlib.ExitStack() as stack:
        for _ in range(4):
            busy = stack.enter_context(_connected(guarded.url))
            busy.sendall(head + f"Content-Length: {len(body)}\r\n\r\n".encode() + body)
        until(lambda: len(guarded.service.requests) == 4)
        with guarded.client(headers=AUTHORIZED) as http:
            answer = http.post("/v1/completions", json={"model": MODEL, "prompt": "a"})
            assert answer.status_code == 429, "the limit of requests comes before that of connections"
        guarded.release_tokens()
    until(lambda: len(guarded.service.requests) == 0)


def test_a_401_closes_its_connection(guarded: Running) -> None:
    with _connected(guarded.url) as connection:
        connection.sendall(b"POST /models HTTP/1.1\r\nHost: a\r\nContent-Length: 1000000\r\n\r\n{")
        status, headers, _ = response_of(connection)
        assert (status, headers["connection"]) == (401, "close")


@pytest.mark.parametrize(
    ("lines", "code"),
    [
        (b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n", "ambiguous_length"),
        (b"Transfer-Encoding: chunked\r\nContent-Length: 2\r\n", "ambiguous_length"),
        (b"Authorization: Bearer other\r\n", "duplicate_header"),
        (b"authorization: Bearer " + TOKEN.encode() + b"\r\n", "duplicate_header"),
        (b"Content-Type: application/json\r\ncontent-type: text/plain\r\n", "duplicate_header"),
        (b"Content-Type: application/json\r\nContent-Type: application/json\r\n", "duplicate_header"),
        (b"X-Request-Id: a\r\nX-Request-Id: b\r\n", "duplicate_header"),
        (b"Host: localhost\r\n", "invalid_http"),
        (b"Content-Length: 2\r\nContent-Length: 3\r\n", "invalid_http"),
        (b"Transfer-Encoding: gzip\r\n", "invalid_http"),
        (b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n", "invalid_http"),
        (b"Content-Length: -1\r\n", "invalid_http"),
        (b"Bad Header: 1\r\n", "invalid_http"),
    ],
)
def test_heads_that_can_be_read_in_two_ways(guarded: Running, lines: bytes, code: str) -> None:
    with _connected(guarded.url) as connection:
        connection.sendall(b"POST /models HTTP/1.1\r\n" + HEAD + lines + b"\r\n{}")
        status, headers, content = response_of(connection)
    assert (status, headers["connection"]) == (400, "close")
    assert content["error"]["code"] == code  # type: ignore[index]


def test_a_second_request_that_is_not_http(guarded: Running) -> None:
    with _connected(guarded.url) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\n" + HEAD + b"\r\n")
        received = connection.recv(65_536)
        while not received.endswith(b"}"):
            received += connection.recv(65_536)
        connection.sendall(b"nonsense\r\n\r\n")
        status, headers, content = response_of(connection)
    assert (status, headers["connection"]) == (400, "close")
    assert content["error"]["code"] == "invalid_http"  # type: ignore[index]


def test_a_body_that_ends_too_early(guarded: Running) -> None:
    with _connected(guarded.url) as connection:
        connection.sendall(b"POST /models HTTP/1.1\r\n" + HEAD + b"Content-Length: 9\r\n\r\n{")
        time.sleep(0.1)
        connection.shutdown(socket.SHUT_WR)
        status, _, content = response_of(connection)
    assert status == 400
    assert content["error"]["code"] == "body_incomplete"  # type: ignore[index]


def test_very_many_chunks(guarded: Running) -> None:
    with _connected(guarded.url) as connection, guarded.client(headers=AUTHORIZED) as http:
        http.get("/health")
        head = (
            b"POST /models HTTP/1.1\r\n"
            + HEAD
            + b"Content-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
        )
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            connection.sendall(head + b"1\r\n \r\n" * 900_000)
        begun_s = time.monotonic()
        assert http.get("/health").status_code == 200
        waited_s = time.monotonic() - begun_s
        assert waited_s < 1.0, "it was 4.3 s"  # 0.25 s on a machine that does nothing else
        until(lambda: "too_many_chunks" in http.get("/metrics").text)


def test_chunks_of_a_usual_number(guarded: Running) -> None:
    text = json.dumps({"model": MODEL}).encode()
    with guarded.client(headers=AUTHORIZED | {"Content-Type": "application/json"}) as http:
        assert http.post("/models", content=iter([text[:5], text[5:]])).status_code == 201
        padded = (b" " for _ in range(1_500))
        assert http.post("/models", content=(part for part in (text, *padded))).status_code == 201


def test_a_client_that_does_not_read(guarded: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_protocol, "READ_TIMEOUT_S", 0.3)
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_096)
        connection.settimeout(TIMEOUT_S)
        host, _, port = guarded.url.removeprefix("http://").partition(":")
        connection.connect((host, int(port)))
        before = slow_count(guarded)
        connection.sendall((b"GET /openapi.json HTTP/1.1\r\n" + HEAD + b"\r\n") * 400)
        until(lambda: slow_count(guarded) > before)


def slow_count(server: Running) -> float:
    with server.client(headers=AUTHORIZED) as http:
        return float(re.findall(r'closed_total\{reason="slow"\} (\S+)', http.get("/metrics").text)[0])


def test_pipelined_requests_are_answered_in_order(guarded: Running) -> None:
    with _connected(guarded.url) as connection:
        requests = [f"GET /models/{900 + number} HTTP/1.1\r\n".encode() + HEAD + b"\r\n" for number in range(30)]
        connection.sendall(b"".join(requests) + b"GET /health HTTP/1.1\r\n" + HEAD + b"Connection: close\r\n\r\n")
        received = b""
        while part := connection.recv(65_536):
            received += part
    assert re.findall(rb"HTTP/1.1 (\d+)", received) == [b"404"] * 30 + [b"200"]


def test_expect_100_continue(guarded: Running) -> None:
    with _connected(guarded.url) as connection:
        body = json.dumps({"model": MODEL}).encode()
        head = HEAD + b"Content-Type: application/json\r\nExpect: 100-continue\r\nConnection: close\r\n"
        connection.sendall(b"POST /models HTTP/1.1\r\n" + head + f"Content-Length: {len(body)}\r\n\r\n".encode())
        assert connection.recv(4_096).startswith(b"HTTP/1.1 100")
        connection.sendall(body)
        assert response_of(connection)[0] == 201


def test_nothing_is_left_of_many_connections(guarded: Running) -> None:
    for _ in range(100):
        with _connected(guarded.url) as connection:
            connection.sendall(b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n")
    with guarded.client(headers=AUTHORIZED) as http:
        until(lambda: "maveriq_connections 1.0" in http.get("/metrics").text)
    assert asyncio.all_tasks(guarded.loop) is not None


def test_a_system_without_descriptors_is_tried_again(guarded: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    faults = [OSError(errno.EMFILE, "Too many open files"), OSError(errno.ENOBUFS, "No buffer space available")]
    accept = socket.socket.accept

    def failing(listener: socket.socket) -> tuple[socket.socket, object]:
        if faults and listener.getsockname()[1] == int(guarded.url.rpartition(":")[2]):
            raise faults.pop()
        return accept(listener)

    monkeypatch.setattr(socket.socket, "accept", failing)
    with guarded.client(headers=AUTHORIZED) as http:
        assert http.get("/health").status_code == 200
    assert not faults
