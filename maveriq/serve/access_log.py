"""The access log: one line per HTTP request."""

from __future__ import annotations

import json
import logging
import logging.handlers
import os
import queue
import time
from collections.abc import MutableMapping
from datetime import UTC, datetime
from io import TextIOWrapper
from pathlib import Path
from typing import Any

from maveriq.errors import InputError
from maveriq.serve.auth import App, Message, Receive, Scope, Send

_MAX_FILE_BYTES = 64 * 1024 * 1024  # then the file is renamed to FILE.1
_MAX_WAITING_LINES = 10_000
_MAX_PATH_CHARACTERS = 256


class AccessLog:
    """Writes lines to a file or to stderr, in a thread. Lines that come faster than they are written are left out."""

    def __init__(self, path: Path | None) -> None:
        """Open the log.

        Args:
            path: of the file, to which lines are appended; None for stderr.

        Raises:
            InputError: the file cannot be written.
        """
        try:
            handler = logging.StreamHandler() if path is None else _PrivateFileHandler(path)
        except OSError as error:
            raise InputError(f"--access-log {str(path)!r} cannot be written: {error.strerror}") from None
        handler.setFormatter(logging.Formatter("%(message)s"))
        self._handler = handler
        self._lines: queue.Queue[Any] = queue.Queue(_MAX_WAITING_LINES)
        self._listener = _Listener(self._lines, handler)
        self._listener.start()

    def write(self, line: str) -> None:
        """Write a line."""
        try:
            self._lines.put_nowait(logging.makeLogRecord({"msg": line, "levelno": logging.INFO}))
        except queue.Full:
            return

    def close(self) -> None:
        """Write the lines that wait, and close the file."""
        self._listener.stop()
        self._handler.close()


class AccessLogMiddleware:
    """ASGI middleware that writes a line for each response: time, client, request, status, size, duration, ID."""

    def __init__(self, app: App, log: AccessLog) -> None:
        self._app = app
        self._log = log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one ASGI connection."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begun_s, response = time.monotonic(), _Response()

        async def send_and_count(message: Message) -> None:
            response.count(message)
            await send(message)

        try:
            await self._app(scope, receive, send_and_count)
        finally:
            self._log.write(_line(scope, response, time.monotonic() - begun_s))


class _Response:
    """What has been sent of a response."""

    status = "-"  # the client disconnected before there was one
    sent_bytes = 0
    request_id = "-"

    def count(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = str(message["status"])
            headers = dict(message.get("headers", ()))
            self.request_id = headers.get(b"x-request-id", b"-").decode("latin-1")
        self.sent_bytes += len(message.get("body", b""))


def _line(scope: MutableMapping[str, Any], response: _Response, duration_s: float) -> str:
    """Return a line. What the client chose is quoted and escaped, so that it cannot look like another line."""
    client = scope.get("client")
    columns = (
        datetime.now(UTC).isoformat(timespec="milliseconds"),
        client[0] if client else "-",
        json.dumps(f"{scope['method'][:16]} {scope['path'][:_MAX_PATH_CHARACTERS]}"),
        response.status,
        f"{response.sent_bytes}B",
        f"{duration_s * 1e3:.1f}ms",
        response.request_id,
    )
    return " ".join(columns)


class _PrivateFileHandler(logging.handlers.RotatingFileHandler):
    """Creates files that only their owner can read."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, maxBytes=_MAX_FILE_BYTES, backupCount=1, encoding="utf-8")

    def _open(self) -> TextIOWrapper:
        descriptor = os.open(self.baseFilename, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        return open(descriptor, "a", encoding=self.encoding)  # noqa: PTH123  (the handler closes it)


class _Listener(logging.handlers.QueueListener):
    def __init__(self, lines: queue.Queue[Any], handler: logging.Handler) -> None:
        super().__init__(lines, handler)
        self._waiting_lines = lines

    def enqueue_sentinel(self) -> None:
        self._waiting_lines.put(None)  # the base class fails if the queue is full
