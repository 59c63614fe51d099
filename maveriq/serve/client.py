"""A client of the service's own API, for the console."""

from __future__ import annotations

import json
from collections.abc import Iterator
from types import TracebackType
from typing import Any, Self

import httpx

from maveriq.errors import InputError, MaveriqError

_CONNECT_S = 5.0


class ServiceClient:
    """Speaks to one server. Every method raises MaveriqError where it is not reached or says no."""

    def __init__(self, url: str, token: str | None, *, transport: httpx.BaseTransport | None = None) -> None:
        """Make a client.

        Args:
            url: of the server, as `maveriq serve` prints it, or with /v1 after it, as OpenAI's clients have it.
            token: None where the server wants none.
            transport: how to get there, for tests.

        Raises:
            InputError: not a URL.
        """
        self._url = url
        headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        self._http = httpx.Client(
            base_url=_checked(url),
            headers=headers,
            transport=transport,
            trust_env=False,
            timeout=httpx.Timeout(None, connect=_CONNECT_S),
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self._http.close()

    def get(self, path: str) -> Any:
        """Return what a route shows."""
        found = self._call("GET", path)
        if not _is_ours(path, found):
            raise self._stranger()
        return found

    def register(self, model: str) -> dict[str, Any]:
        """Make a model known."""
        found: dict[str, Any] = self._call("POST", "/models", {"model": model})
        return found

    def create_endpoint(self, request: dict[str, Any]) -> dict[str, Any]:
        """Create an endpoint; fields as in `CreateEndpoint`."""
        made: dict[str, Any] = self._call("POST", "/endpoints", request)
        return made

    def remove_endpoint(self, endpoint_id: int) -> None:
        """Remove an endpoint."""
        self._call("DELETE", f"/endpoints/{endpoint_id}")

    def infer(self, model: str, text: str, *, priority: bool) -> Iterator[str]:
        """Yield a model's continuation of a text as it comes."""
        body = {"model": model, "prompt": text, "stream": True, "priority": priority}
        try:
            with self._http.stream("POST", "/v1/completions", json=body) as answer:
                if answer.is_error:
                    answer.read()
                    raise _refused(answer)
                for line in answer.iter_lines():
                    if not line.startswith("data: ") or line == "data: [DONE]":
                        continue
                    chunk = json.loads(line.removeprefix("data: "))
                    if "error" in chunk:
                        raise MaveriqError(chunk["error"]["message"])
                    yield from (choice["text"] for choice in chunk["choices"])
        except httpx.HTTPError as error:
            raise self._unreached(error) from None

    def _call(self, method: str, path: str, body: Any = None) -> Any:
        try:
            answer = self._http.request(method, path, json=body)
        except httpx.HTTPError as error:
            raise self._unreached(error) from None
        if answer.is_error and path != "/health":
            raise _refused(answer)
        try:
            return answer.json() if answer.content else None
        except ValueError:
            raise self._stranger() from None

    def _stranger(self) -> MaveriqError:
        return MaveriqError(f"what answers at {self._url} is no maveriq serve; name the right one with --url")

    def _unreached(self, error: httpx.HTTPError) -> MaveriqError:
        if isinstance(error, httpx.ConnectError | httpx.ConnectTimeout):
            return MaveriqError(f"no server answers at {self._url}; start one with maveriq serve, or give its --url")
        return MaveriqError(f"the server at {self._url} went away: {str(error) or type(error).__name__}")


def _is_ours(path: str, found: Any) -> bool:
    """Say whether this is what `maveriq serve` shows there, as far as the console leans on it."""
    if path == "/health":
        return isinstance(found, dict) and "problems" in found
    return path not in ("/models", "/endpoints") or isinstance(found, list)


def _checked(url: str) -> httpx.URL:
    try:
        parsed = httpx.URL(url.rstrip("/").removesuffix("/v1"))
    except (httpx.InvalidURL, UnicodeError):
        parsed = httpx.URL()
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise InputError(f"--url {url!r} is no URL of a server; give one like http://127.0.0.1:8000")
    return parsed


def _refused(answer: httpx.Response) -> MaveriqError:
    """Return the server's own words, or at least its status."""
    try:
        said = answer.json()["error"]["message"]
    except (ValueError, KeyError, TypeError):
        said = f"the server answers {answer.status_code} {answer.reason_phrase}"
    if answer.status_code == 401:
        said += "; put it into the environment as MAVERIQ_TOKEN or give --token-file"
    return (InputError if answer.status_code < 429 else MaveriqError)(said)
