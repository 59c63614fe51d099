"""The token: out of a file or the environment, never off a command line, where others could read it.

What stands before every route: who may come in, and how much they may bring.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import ipaddress
import json
import os
from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import Any, TypeAlias

from maveriq.errors import InputError
from maveriq.serve.errors import ApiError
from maveriq.serve.settings import ServeSettings
from maveriq.tables import read_text

TOKEN_VARIABLE = "MAVERIQ_TOKEN"  # noqa: S105  (its name, not its value)


def read_token(file: Path | None) -> str | None:
    """Return the token of a file, else that of the environment, else None.

    Raises:
        InputError: the file cannot be read or is empty, or the token cannot be sent in a header.
    """
    where = f"environment variable {TOKEN_VARIABLE}" if file is None else f"token file {str(file)!r}"
    said = os.environ.get(TOKEN_VARIABLE, "") if file is None else read_text(file, what="token file")
    token = said.strip()
    if not token:
        if file is None:
            return None
        raise InputError(f"{where} is empty; write the token into it")
    if not (token.isascii() and token.isprintable()) or " " in token:
        raise InputError(f"{where}: a token is one word of printable ASCII characters")
    return token


Scope: TypeAlias = MutableMapping[str, Any]
Message: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[Message]]
Send: TypeAlias = Callable[[Message], Awaitable[None]]
App: TypeAlias = Callable[[Scope, Receive, Send], Awaitable[None]]

_MAX_HEAD_BYTES = 32 * 1024
_WITH_BODY = frozenset({"POST", "PUT", "PATCH"})


class AuthMiddleware:
    """ASGI middleware: token or local name, kind and size of the body.

    The body is read here, up to its limit and in bounded time, before anything else looks at it;
    a chunked body has no other bound.
    """

    def __init__(self, app: App, settings: ServeSettings, rejected: Callable[[str], None]) -> None:
        """Stand before an app; `rejected` is told the code of each refusal."""
        self._app = app
        self._settings = settings
        self._rejected = rejected
        self._token = None if settings.token is None else _digest(settings.token.encode())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection's scope."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        try:
            _check_size(scope)
            self._check_sender(headers)
            body = await self._body(scope, headers, receive)
        except ApiError as error:
            self._rejected(error.code)
            await _answer(error, send)
            return
        if body is not None:
            await self._app(scope, _replaying(body, receive), send)

    def _check_sender(self, headers: dict[bytes, bytes]) -> None:
        if self._token is not None:
            scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
            if scheme.lower() != b"bearer" or not hmac.compare_digest(_digest(given.strip()), self._token):
                raise ApiError(401, "a valid token is needed: Authorization: Bearer TOKEN", code="invalid_api_key")
            return
        # Without a token only this machine may ask: not a web page that made its name point here.
        if not is_loopback(_host_name(headers.get(b"host", b""))):
            raise ApiError(403, "without a token this server answers as localhost alone", code="wrong_host")

    async def _body(self, scope: Scope, headers: dict[bytes, bytes], receive: Receive) -> bytes | None:
        """Return the whole body; None if who sent it went away."""
        maximum = self._settings.max_body_bytes
        too_large = ApiError(413, f"the body is longer than {maximum} bytes", code="body_too_large")
        announced = headers.get(b"content-length", b"0")
        if announced.isdigit() and (len(announced) > 18 or int(announced) > maximum):
            raise too_large
        parts, size, more = [], 0, True
        try:
            async with asyncio.timeout(self._settings.body_timeout_s):
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    part = message.get("body", b"")
                    size += len(part)
                    if size > maximum:
                        raise too_large
                    parts.append(part)
                    more = message.get("more_body", False)
        except TimeoutError:
            raise ApiError(408, "the body did not come in time", code="body_too_slow") from None
        kind = headers.get(b"content-type", b"").partition(b";")[0].strip().lower()
        if size and scope["method"] in _WITH_BODY and kind != b"application/json":
            # Also keeps away what a web page may send without asking the browser first.
            raise ApiError(415, "the body must be JSON with Content-Type: application/json", code="not_json")
        return b"".join(parts)


def _check_size(scope: Scope) -> None:
    """Refuse a head that is longer than any client's; the server's own bound is for one that never ends."""
    size = len(scope["query_string"]) + len(scope["path"])
    size += sum(len(name) + len(value) for name, value in scope["headers"])
    if size > _MAX_HEAD_BYTES:
        raise ApiError(431, f"address and headers are longer than {_MAX_HEAD_BYTES} bytes", code="headers_too_large")


def is_loopback(host: str) -> bool:
    """Say whether a name or address is this machine's own."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def _host_name(header: bytes) -> str:
    """Return the name in a Host header, without its port."""
    host = header.decode("latin-1")
    name, colon, port = host.rpartition(":")
    return name if colon and port.isdigit() else host


def _digest(secret: bytes) -> bytes:
    """Return something of equal length for any secret, so that comparing takes equally long."""
    return hashlib.sha256(secret).digest()


def _replaying(body: bytes, receive: Receive) -> Receive:
    """Give the body once, then what the server says (that the client went away)."""
    given = False

    async def replay() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay


async def _answer(error: ApiError, send: Send) -> None:
    body = json.dumps(error.body()).encode()
    headers = {"Content-Type": "application/json", "Content-Length": str(len(body)), **error.headers()}
    if error.status in (408, 413):
        headers["Connection"] = "close"  # the rest of the body is not read
    raw = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": raw})
    await send({"type": "http.response.body", "body": body})
