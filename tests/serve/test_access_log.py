"""The access log: one line per request, which no client can forge."""

import asyncio
import re
import stat
import threading
from pathlib import Path
from typing import Any

import pytest

from maveriq.errors import InputError
from maveriq.serve import access_log
from maveriq.serve.access_log import AccessLog, AccessLogMiddleware

LINE = re.compile(r'\d{4}-\d\d-\d\dT[\d:.]{12}\+00:00 (\S+) ("(?:[^"\\]|\\.)*") (\S+) (\d+)B \d+\.\dms (\S+)')


def requested(log: AccessLog, path: str, *, status: int | None = 200, request_id: str = "") -> None:
    """Pass a request through the middleware; without a status the client disconnects before the response."""

    async def app(_scope: Any, _receive: Any, send: Any) -> None:
        if status is not None:
            headers = [(b"x-request-id", request_id.encode())] if request_id else []
            await send({"type": "http.response.start", "status": status, "headers": headers})
            await send({"type": "http.response.body", "body": b"abc"})

    async def send(_message: Any) -> None:
        pass

    async def receive() -> Any:
        return {"type": "http.disconnect"}

    scope = {"type": "http", "method": "GET", "path": path, "client": ("127.0.0.1", 1)}
    asyncio.run(AccessLogMiddleware(app, log)(scope, receive, send))


def lines_of(path: Path) -> list[tuple[str, ...]]:
    matches = [LINE.fullmatch(line) for line in path.read_text().splitlines()]
    assert None not in matches, path.read_text()
    return [match.groups() for match in matches if match]


def test_a_line_per_request(tmp_path: Path) -> None:
    log = AccessLog(tmp_path / "access.log")
    requested(log, "/health")
    requested(log, "/v1/completions", status=429, request_id="req-1")
    requested(log, "/metrics", status=None)
    log.close()
    assert lines_of(tmp_path / "access.log") == [
        ("127.0.0.1", '"GET /health"', "200", "3", "-"),
        ("127.0.0.1", '"GET /v1/completions"', "429", "3", "req-1"),
        ("127.0.0.1", '"GET /metrics"', "-", "0", "-"),
    ]
    assert stat.S_IMODE((tmp_path / "access.log").stat().st_mode) == 0o600


def test_no_client_writes_a_line_of_its_own(tmp_path: Path) -> None:
    log = AccessLog(tmp_path / "access.log")
    for path in ('/a\n2026 "', "/\x1b[2J", "/\u202e", "/" + "a" * 10_000):
        requested(log, path)
    log.close()
    text = (tmp_path / "access.log").read_text()
    assert len(lines_of(tmp_path / "access.log")) == 4
    assert text.replace("\n", "").isascii()
    assert text.replace("\n", "").isprintable()
    assert len(text) < 1_000


def test_lines_are_appended_and_the_file_does_not_grow_without_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(access_log, "_MAX_FILE_BYTES", 1_000)
    for _ in range(2):
        log = AccessLog(tmp_path / "access.log")
        for _ in range(20):
            requested(log, "/health")
        log.close()
    assert {path.name for path in tmp_path.iterdir()} == {"access.log", "access.log.1"}
    assert all(path.stat().st_size <= 1_000 for path in tmp_path.iterdir())
    assert all(stat.S_IMODE(path.stat().st_mode) == 0o600 for path in tmp_path.iterdir())


def test_a_slow_disk_does_not_stop_the_service(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(access_log, "_MAX_WAITING_LINES", 5)
    log = AccessLog(tmp_path / "access.log")
    held = threading.Event()
    monkeypatch.setattr(log._handler, "emit", lambda _record: held.wait(10))
    for _ in range(100):
        requested(log, "/health")
    held.set()
    log.close()


def test_a_file_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"--access-log .* cannot be written: No such file or directory"):
        AccessLog(tmp_path / "nowhere" / "access.log")
    with pytest.raises(InputError, match="cannot be written: Is a directory"):
        AccessLog(tmp_path)
