"""Authentication and HTTP limits: the first thing that every request passes.

The token comes from a file or the environment, never from the command line, where other users could see it.
Without a token the server answers only to requests addressed to a loopback name.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import hashlib
import hmac
import ipaddress
import json
import os
from collections import Counter
from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import Any, TypeAlias

from maveriq.errors import InputError
from maveriq.input_files import read_text
from maveriq.serve.errors import ApiError, bad_request
from maveriq.serve.settings import MAX_HEAD_BYTES, ServeSettings

TOKEN_VARIABLE = "MAVERIQ_TOKEN"  # noqa: S105  (its name, not its value)
BROWSER_PATHS = ("/dashboard", "/dashboard/data")
"""The paths that also take the token as the password of Basic authentication, which browsers ask their users for."""

Scope: TypeAlias = MutableMapping[str, Any]
Message: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[Message]]
Send: TypeAlias = Callable[[Message], Awaitable[None]]
App: TypeAlias = Callable[[Scope, Receive, Send], Awaitable[None]]

_SINGLE_HEADERS = frozenset(
    {
        b"authorization", b"content-encoding", b"content-length", b"content-type", b"host", b"origin",
        b"transfer-encoding", b"x-priority", b"x-request-id", b"x-slo-ms",
    }
)  # fmt: skip
_METHODS_WITH_BODY = frozenset({"POST", "PUT", "PATCH"})


def read_token(file: Path | None) -> str | None:
    """Return the token from a file, else from the environment, else None.

    Raises:
        InputError: the file cannot be read or is empty, or the token cannot be sent in a header.
    """
    if file is None:
        source, text = f"environment variable {TOKEN_VARIABLE}", os.environ.get(TOKEN_VARIABLE, "")
    else:
        source, text = f"token file {str(file)!r}", read_text(file, what="token file")
    token = text.strip()
    if not token:
        if file is None:
            return None
        raise InputError(f"{source} is empty; write the token into it")
    if not (token.isascii() and token.isprintable()) or " " in token:
        raise InputError(f"{source}: a token is one word of printable ASCII characters")
    return token


def is_loopback(host: str) -> bool:
    """Return whether a host name or address is a loopback one."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host.lower() == "localhost"


class AuthMiddleware:
    """ASGI middleware that checks the token or host, and the size and type of the body.

    It reads the whole body, up to a size and a time limit, before the app sees the request: chunked bodies have no
    other limit.
    """

    def __init__(self, app: App, settings: ServeSettings, on_rejected: Callable[[str], None]) -> None:
        """Wrap an app; `on_rejected` is called with the error code of each rejected request."""
        self._app = app
        self._settings = settings
        self._on_rejected = on_rejected
        self._token_digest = None if settings.token is None else _digest(settings.token.encode())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one ASGI connection."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        is_body_read = False
        try:
            _check_head(scope, headers)
            self._check_sender(scope, headers)
            body = await self._read_body(headers, receive)
            is_body_read = True
            _check_content_type(scope, headers, body)
        except ApiError as error:
            self._on_rejected(error.code)
            await _send_error(error, send, close=not is_body_read)
            return
        if body is not None:
            await self._app(scope, _replay_body(body, receive), send)

    def _check_sender(self, scope: Scope, headers: dict[bytes, bytes]) -> None:
        if self._token_digest is not None:
            scheme, _, credentials = headers.get(b"authorization", b"").partition(b" ")
            is_for_browsers = scope["path"] in BROWSER_PATHS and scope["method"] in ("GET", "HEAD")
            if scheme.lower() == b"basic" and is_for_browsers:
                token = _password(credentials)
                _check_origin(scope, headers)  # browsers send a password that they know with the requests of any page
            else:
                token = credentials.strip() if scheme.lower() == b"bearer" else b""
            if not hmac.compare_digest(_digest(token), self._token_digest):
                message = "a valid token is needed: Authorization: Bearer TOKEN"
                challenge = (
                    'Basic realm="maveriq: the token is the password", charset="UTF-8"' if is_for_browsers else "Bearer"
                )
                raise ApiError(401, message, code="invalid_api_key", challenge=challenge)
        else:
            # The Host check stops web pages that point their own name at this address (DNS rebinding).
            if not is_loopback(_host_name(headers.get(b"host", b""))):
                raise ApiError(403, "without a token this server only answers as localhost", code="wrong_host")
            _check_origin(scope, headers)
        connection = scope.get("state", {}).get("connection")
        if connection is not None:  # None in tests without a server
            connection.mark_authenticated()

    async def _read_body(self, headers: dict[bytes, bytes], receive: Receive) -> bytes | None:
        """Return the whole body, or None if the client disconnected."""
        max_bytes = self._settings.max_body_bytes
        too_large = ApiError(413, f"the body is longer than {max_bytes} bytes", code="body_too_large")
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and (len(length) > 18 or int(length) > max_bytes):
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
                    if size > max_bytes:
                        raise too_large
                    parts.append(part)
                    more = message.get("more_body", False)
        except TimeoutError:
            raise ApiError(408, "the body did not arrive in time", code="body_too_slow") from None
        return b"".join(parts)


def _check_head(scope: Scope, headers: dict[bytes, bytes]) -> None:
    """Reject a head that is too long, or that two programs could read in two ways.

    The HTTP parser has a limit of its own for heads that never end.
    """
    size = len(scope["query_string"]) + len(scope["path"])
    size += sum(len(name) + len(value) for name, value in scope["headers"])
    if size > MAX_HEAD_BYTES:
        raise ApiError(431, f"URL and headers are longer than {MAX_HEAD_BYTES} bytes", code="headers_too_large")
    counts = Counter(name for name, _ in scope["headers"] if name in _SINGLE_HEADERS)
    for name, count in counts.items():
        if count > 1:
            header = name.decode().title()
            raise bad_request(f"header {header} is given {count} times; give it once", header, code="duplicate_header")
    if b"content-length" in headers and b"transfer-encoding" in headers:
        message = "give Content-Length or Transfer-Encoding, not both"
        raise bad_request(message, "Transfer-Encoding", code="ambiguous_length")


def _check_origin(scope: Scope, headers: dict[bytes, bytes]) -> None:
    """Reject what a web page of another origin sends; a link to a page of this server is harmless."""
    origin = headers.get(b"origin")
    site = headers.get(b"sec-fetch-site", b"none")
    is_link = scope["method"] == "GET" and headers.get(b"sec-fetch-mode") == b"navigate"
    is_foreign = origin is not None and origin.lower().partition(b"://")[2] != headers.get(b"host", b"").lower()
    if is_foreign or (site not in (b"none", b"same-origin") and not is_link):
        raise ApiError(403, "this server does not answer other web pages", code="wrong_origin")


def _check_content_type(scope: Scope, headers: dict[bytes, bytes], body: bytes | None) -> None:
    """Reject a body that is not JSON; browsers send other types across origins without a preflight request."""
    if not body or scope["method"] not in _METHODS_WITH_BODY:
        return
    if headers.get(b"content-encoding", b"identity").lower() != b"identity":
        raise ApiError(415, "the body must not be compressed; leave out Content-Encoding", code="not_json")
    if headers.get(b"content-type", b"").partition(b";")[0].strip().lower() != b"application/json":
        raise ApiError(415, "the body must be JSON with Content-Type: application/json", code="not_json")


def _host_name(header: bytes) -> str:
    """Return the name in a Host header, without its port."""
    host = header.decode("latin-1")
    name, colon, port = host.rpartition(":")
    return name if colon and port.isdigit() else host


def _password(credentials: bytes) -> bytes:
    """Return the password in the credentials of Basic authentication, b"" where there is none."""
    try:
        return base64.b64decode(credentials.strip(), validate=True).partition(b":")[2]
    except binascii.Error:
        return b""


def _digest(secret: bytes) -> bytes:
    """Return a hash of fixed length, so that comparing takes the same time for every secret."""
    return hashlib.sha256(secret).digest()


def _replay_body(body: bytes, receive: Receive) -> Receive:
    """Return a `receive` that gives the body once, then the server's further messages (the disconnect)."""
    replayed = False

    async def replay() -> Message:
        nonlocal replayed
        if replayed:
            return await receive()
        replayed = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay


async def _send_error(error: ApiError, send: Send, *, close: bool) -> None:
    body = json.dumps(error.to_json()).encode()
    headers = {"Content-Type": "application/json", "Content-Length": str(len(body)), **error.headers()}
    if close:
        headers["Connection"] = "close"  # the rest of the body is not read
    raw_headers = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": raw_headers})
    await send({"type": "http.response.body", "body": body})
