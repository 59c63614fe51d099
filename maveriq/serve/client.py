"""HTTP client of a `maveriq serve` process; `maveriq console` uses it.

The server is not trusted: the size and the time of its answers are bounded, and their shape is checked.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from types import TracebackType
from typing import Any, NotRequired, Self, TypedDict

import httpx
import msgspec

from maveriq.errors import InputError, MaveriqError

_CONNECT_TIMEOUT_S = 5.0
_READ_TIMEOUT_S = 60.0  # between two parts of an answer
_ANSWER_TIMEOUT_S = 300.0
_MAX_ANSWER_BYTES = 16 * 1024 * 1024
_FIRST_TOKEN_TIMEOUT_S = 3_600.0  # a request may wait in a long queue
_STREAM_TIMEOUT_S = 24 * 3_600.0
_MAX_STREAM_BYTES = 256 * 1024 * 1024
_MAX_EVENT_BYTES = 1024 * 1024
_MAX_MESSAGE_CHARACTERS = 2_000


class ProfileJson(TypedDict):
    """What is used of the profile of a model."""

    status: str
    detail: str
    gpus: list[int]
    measured_s: float
    gpu_s: float
    usd: float | None


class ModelJson(TypedDict):
    """What is used of a model."""

    id: int
    name: str
    profile: NotRequired[ProfileJson | None]


class DeploymentJson(TypedDict):
    """What is used of a deployment."""

    configuration: str
    gpus: list[int]


class EndpointJson(TypedDict):
    """What is used of an endpoint."""

    id: int
    model: str
    model_id: int
    status: str
    reason: str
    waiting: int
    completed: int
    deployments: list[DeploymentJson]


class HealthJson(TypedDict):
    """What is used of the health."""

    status: str
    problems: list[str]


class _Choice(TypedDict):
    text: str


class _Chunk(TypedDict):
    choices: list[_Choice]


_SHAPES = {"/models": list[ModelJson], "/endpoints": list[EndpointJson], "/health": HealthJson}


class ServiceClient:
    """Calls one server. Every method raises MaveriqError if the server cannot be reached or answers with an error."""

    def __init__(self, url: str, token: str | None, *, transport: httpx.BaseTransport | None = None) -> None:
        """Create a client; it connects on the first call.

        Args:
            url: base URL of the server, with or without the `/v1` that OpenAI clients need.
            token: None if the server needs none.
            transport: replaces the network, for tests.

        Raises:
            InputError: `url` is not an HTTP URL.
        """
        self._url = url
        headers = {"Accept-Encoding": "identity"}  # what is small on the network stays small in memory
        if token is not None:
            headers["Authorization"] = f"Bearer {token}"
        self._http = httpx.Client(
            base_url=_base_url(url),
            headers=headers,
            transport=transport,
            trust_env=False,
            timeout=httpx.Timeout(_READ_TIMEOUT_S, connect=_CONNECT_TIMEOUT_S),
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, _type: type[BaseException] | None, _error: BaseException | None, _traceback: TracebackType | None
    ) -> None:
        self._http.close()

    def get(self, path: str) -> Any:
        """Return the JSON of a GET route."""
        return self._checked(self._call("GET", path), _SHAPES.get(path, Any))

    def register(self, model: str, *, profile: bool | None = None) -> dict[str, Any]:
        """Register a model and return its `ModelView`; `profile` says whether it is measured, None by the server."""
        body = {"model": model, "profile": profile}
        view: dict[str, Any] = self._checked(self._call("POST", "/models", body), ModelJson)
        return view

    def cancel_profile(self, model_id: int) -> None:
        """Cancel the profile of a model."""
        self._call("DELETE", f"/models/{model_id}/profile")

    def create_endpoint(self, request: dict[str, Any]) -> dict[str, Any]:
        """Create an endpoint from the fields of `CreateEndpoint` and return its `EndpointView`."""
        view: dict[str, Any] = self._checked(self._call("POST", "/endpoints", request), EndpointJson)
        return view

    def remove_endpoint(self, endpoint_id: int) -> None:
        """Remove an endpoint."""
        self._call("DELETE", f"/endpoints/{endpoint_id}")

    def complete(self, model: str, prompt: str, *, priority: bool) -> Iterator[str]:
        """Stream a completion: yield its text piece by piece."""
        body = {"model": model, "prompt": prompt, "stream": True, "priority": priority}
        timeout = httpx.Timeout(_FIRST_TOKEN_TIMEOUT_S, connect=_CONNECT_TIMEOUT_S)
        with (
            self._connection_errors(),
            self._http.stream("POST", "/v1/completions", json=body, timeout=timeout) as response,
        ):
            if not response.is_success:
                raise self._error(response.status_code, self._read(response))
            for line in self._lines(response):
                if not line.startswith(b"data: ") or line == b"data: [DONE]":
                    continue
                chunk = self._decoded(line.removeprefix(b"data: "))
                if isinstance(chunk, dict) and "error" in chunk:
                    raise MaveriqError(_message(chunk) or "the request failed")
                for choice in self._checked(chunk, _Chunk)["choices"]:
                    yield choice["text"]

    def _call(self, method: str, path: str, body: Any = None) -> Any:
        with self._connection_errors(), self._http.stream(method, path, json=body) as response:
            content = self._read(response)
        if not response.is_success and path != "/health":
            raise self._error(response.status_code, content)
        return self._decoded(content) if content else None

    def _read(self, response: httpx.Response) -> bytes:
        """Return the body of a response."""
        parts = self._parts(response, max_bytes=_MAX_ANSWER_BYTES, timeout_s=_ANSWER_TIMEOUT_S)
        return b"".join(parts)

    def _lines(self, response: httpx.Response) -> Iterator[bytes]:
        """Yield the lines of a stream."""
        rest = b""
        for part in self._parts(response, max_bytes=_MAX_STREAM_BYTES, timeout_s=_STREAM_TIMEOUT_S):
            *lines, rest = (rest + part).split(b"\n")
            if len(rest) > _MAX_EVENT_BYTES:
                raise MaveriqError(f"the server at {self._url} sends a line of more than {_MAX_EVENT_BYTES:,} bytes")
            yield from (line.rstrip(b"\r") for line in lines)

    def _parts(self, response: httpx.Response, *, max_bytes: int, timeout_s: float) -> Iterator[bytes]:
        """Yield the parts of a body as they arrive."""
        if response.headers.get("Content-Encoding", "identity") != "identity":
            raise self._wrong_server()
        latest_s, size = time.monotonic() + timeout_s, 0
        for part in response.iter_bytes():
            size += len(part)
            if size > max_bytes:
                raise MaveriqError(f"the server at {self._url} sends more than {max_bytes:,} bytes")
            if time.monotonic() > latest_s:
                raise MaveriqError(f"the server at {self._url} has sent for more than {timeout_s:,.0f} s")
            yield part

    def _decoded(self, content: bytes) -> Any:
        try:
            return json.loads(content)
        except (ValueError, RecursionError):
            raise self._wrong_server() from None

    def _checked(self, content: Any, shape: Any) -> Any:
        """Return the content if it has the shape that `maveriq serve` gives it."""
        try:
            msgspec.convert(content, shape)
        except msgspec.ValidationError:
            raise self._wrong_server() from None
        return content

    @contextlib.contextmanager
    def _connection_errors(self) -> Iterator[None]:
        try:
            yield
        except httpx.HTTPError as error:
            raise self._connection_error(error) from None

    def _error(self, status: int, content: bytes) -> MaveriqError:
        """Return the server's error message, or at least its status."""
        message = None
        with contextlib.suppress(MaveriqError):
            message = _message(self._decoded(content))
        if message is None:
            message = f"the server answers {status}"
        if status == 401:
            message += "; set MAVERIQ_TOKEN in the environment or give --token-file"
        return (InputError if status < 429 else MaveriqError)(message)

    def _wrong_server(self) -> MaveriqError:
        return MaveriqError(f"the server at {self._url} is not maveriq serve; give the right address with --url")

    def _connection_error(self, error: httpx.HTTPError) -> MaveriqError:
        if isinstance(error, httpx.ConnectError | httpx.ConnectTimeout):
            return MaveriqError(f"no server answers at {self._url}; start maveriq serve, or give its URL with --url")
        return MaveriqError(f"lost the connection to {self._url}: {str(error) or type(error).__name__}")


def _base_url(url: str) -> httpx.URL:
    try:
        parsed = httpx.URL(url.rstrip("/").removesuffix("/v1"))
    except (httpx.InvalidURL, UnicodeError):
        parsed = httpx.URL()
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise InputError(f"--url {url!r} is not an HTTP URL; give one like http://127.0.0.1:8000")
    return parsed


def _message(content: Any) -> str | None:
    """Return the message of an error in OpenAI's shape."""
    error = content.get("error") if isinstance(content, dict) else None
    message = error.get("message") if isinstance(error, dict) else None
    return message[:_MAX_MESSAGE_CHARACTERS] if isinstance(message, str) else None
