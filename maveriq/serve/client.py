"""HTTP client of a `maveriq serve` process; `maveriq console` uses it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from types import TracebackType
from typing import Any, Self

import httpx

from maveriq.errors import InputError, MaveriqError

_CONNECT_TIMEOUT_S = 5.0


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
        headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        self._http = httpx.Client(
            base_url=_base_url(url),
            headers=headers,
            transport=transport,
            trust_env=False,
            timeout=httpx.Timeout(None, connect=_CONNECT_TIMEOUT_S),
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, _type: type[BaseException] | None, _error: BaseException | None, _traceback: TracebackType | None
    ) -> None:
        self._http.close()

    def get(self, path: str) -> Any:
        """Return the JSON of a GET route."""
        content = self._call("GET", path)
        if not _is_expected(path, content):
            raise self._wrong_server()
        return content

    def register(self, model: str) -> dict[str, Any]:
        """Register a model and return its `ModelView`."""
        view: dict[str, Any] = self._call("POST", "/models", {"model": model})
        return view

    def create_endpoint(self, request: dict[str, Any]) -> dict[str, Any]:
        """Create an endpoint from the fields of `CreateEndpoint` and return its `EndpointView`."""
        view: dict[str, Any] = self._call("POST", "/endpoints", request)
        return view

    def remove_endpoint(self, endpoint_id: int) -> None:
        """Remove an endpoint."""
        self._call("DELETE", f"/endpoints/{endpoint_id}")

    def complete(self, model: str, prompt: str, *, priority: bool) -> Iterator[str]:
        """Stream a completion: yield its text piece by piece."""
        body = {"model": model, "prompt": prompt, "stream": True, "priority": priority}
        try:
            with self._http.stream("POST", "/v1/completions", json=body) as response:
                if response.is_error:
                    response.read()
                    raise _api_error(response)
                for line in response.iter_lines():
                    if not line.startswith("data: ") or line == "data: [DONE]":
                        continue
                    chunk = json.loads(line.removeprefix("data: "))
                    if "error" in chunk:
                        raise MaveriqError(chunk["error"]["message"])
                    yield from (choice["text"] for choice in chunk["choices"])
        except httpx.HTTPError as error:
            raise self._connection_error(error) from None

    def _call(self, method: str, path: str, body: Any = None) -> Any:
        try:
            response = self._http.request(method, path, json=body)
        except httpx.HTTPError as error:
            raise self._connection_error(error) from None
        if response.is_error and path != "/health":
            raise _api_error(response)
        try:
            return response.json() if response.content else None
        except ValueError:
            raise self._wrong_server() from None

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


def _is_expected(path: str, content: Any) -> bool:
    """Return whether the content of a route has the shape that `maveriq serve` gives it."""
    if path == "/health":
        return isinstance(content, dict) and "problems" in content
    return path not in ("/models", "/endpoints") or isinstance(content, list)


def _api_error(response: httpx.Response) -> MaveriqError:
    """Return the server's error message, or at least its status."""
    try:
        message = response.json()["error"]["message"]
    except (ValueError, KeyError, TypeError):
        message = f"the server answers {response.status_code} {response.reason_phrase}"
    if response.status_code == 401:
        message += "; set MAVERIQ_TOKEN in the environment or give --token-file"
    return (InputError if response.status_code < 429 else MaveriqError)(message)
