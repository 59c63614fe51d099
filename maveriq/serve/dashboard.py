"""The routes under /dashboard: a page without data, and the data, which its script asks for every few seconds.

Both are cheap to serve. The page is made once, is compressed once, and is not sent again to a browser that has it. The
data are made in the background, at most once in `EVERY_S` for all clients together.
"""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import hashlib
import json
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass

from fastapi import APIRouter, Request
from fastapi.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from maveriq.report.page.page import Page
from maveriq.report.page.render import live_update, to_live_shell
from maveriq.serve.auth import BROWSER_PATHS
from maveriq.serve.background import in_background
from maveriq.serve.dashboard_page import TITLE, ServiceState, clock_text, dashboard_page
from maveriq.serve.errors import ApiError
from maveriq.serve.service import Service

PAGE_PATH, DATA_PATH = BROWSER_PATHS
EVERY_S = 5.0
"""How old data are at most when the script asks for others."""
MAX_SENDING = 8
"""Pages and data that are being sent at a time; more get 503."""

_EARLY_S = 0.5  # a script that asks each EVERY_S gets new data each time
_CHUNK_BYTES = 64 * 1024  # the server buffers no more than about this for a client that reads slowly
_HEADERS = {
    "Cache-Control": "private, no-cache",
    "Referrer-Policy": "no-referrer",
    "Vary": "Accept-Encoding",
    "X-Frame-Options": "DENY",
}


@dataclass(frozen=True, slots=True)
class _Content:
    """What a route sends, as it is and compressed, and its own headers."""

    plain: bytes
    compressed: bytes
    media_type: str
    headers: dict[str, str]

    @classmethod
    def of(cls, text: str, media_type: str, headers: dict[str, str]) -> _Content:
        plain = text.encode("utf-8", errors="replace")
        return cls(plain, gzip.compress(plain, compresslevel=6, mtime=0), media_type, headers)


class Dashboard:
    """Makes and keeps what the routes send (mutable)."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._page: asyncio.Task[_Content] | None = None
        self._data: asyncio.Task[_Content] | None = None
        self._data_due_s = 0.0
        self._sending = 0

    async def page(self, request: Request) -> Response:
        """Return the page, or 304 to a browser that has it.

        Raises:
            ApiError: too many are being sent.
            MaveriqError: Bokeh or Jinja2 is not installed.
        """
        if self._page is None or _has_failed(self._page):
            self._page = asyncio.create_task(in_background(_make_page))
        content = await asyncio.shield(self._page)
        if content.headers["ETag"] in request.headers.get("if-none-match", ""):
            return Response(status_code=304, headers=_HEADERS | content.headers)
        return self._send(content, request)

    async def data(self, request: Request) -> Response:
        """Return what the page shows now, at most `EVERY_S` old.

        Raises:
            ApiError: too many are being sent.
            MaveriqError: Jinja2 is not installed.
        """
        now_s = asyncio.get_running_loop().time()
        if self._data is None or _has_failed(self._data) or (self._data.done() and now_s >= self._data_due_s):
            self._data_due_s = now_s + EVERY_S - _EARLY_S
            self._data = asyncio.create_task(in_background(_make_data, self._state()))
        return self._send(await asyncio.shield(self._data), request)

    def _send(self, content: _Content, request: Request) -> Response:
        if self._sending >= MAX_SENDING:
            message = f"the dashboard is being sent to {MAX_SENDING} clients, which is the maximum; try again later"
            raise ApiError(503, message, code="dashboard_busy", retry_after_s=2)
        is_compressed = "gzip" in request.headers.get("accept-encoding", "")
        body = content.compressed if is_compressed else content.plain
        encoding = {"Content-Encoding": "gzip"} if is_compressed else {}
        headers = _HEADERS | content.headers | encoding | {"Content-Length": str(len(body))}
        return _Chunked(body, self._counted, headers=headers, media_type=content.media_type)

    @contextlib.contextmanager
    def _counted(self) -> Iterator[None]:
        self._sending += 1
        try:
            yield
        finally:
            self._sending -= 1

    def _state(self) -> ServiceState:
        """Return what the page shows; called in the event loop, while nothing changes."""
        service, samples = self._service, self._service.history.samples()
        return ServiceState(
            status=service.status,
            problems=service.problems(),
            endpoints=[endpoint.status for endpoint in service.endpoints()],
            in_flight=len(service.requests),
            progress=service.cluster.progress(),
            samples=samples,
            requests=service.recent.table(samples.since_us),
            models=service.recent.models,
        )


class _Chunked(StreamingResponse):
    """A body that is sent in chunks, so that little of it is buffered for a client that reads slowly."""

    def __init__(
        self,
        body: bytes,
        while_sending: Callable[[], AbstractContextManager[None]],
        *,
        headers: dict[str, str],
        media_type: str,
    ) -> None:
        super().__init__(_chunks(body), headers=headers, media_type=media_type)
        self._while_sending = while_sending

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._while_sending():
            await super().__call__(scope, receive, send)


async def _chunks(body: bytes) -> AsyncIterator[bytes]:
    for start in range(0, len(body), _CHUNK_BYTES):
        yield body[start : start + _CHUNK_BYTES]


def _has_failed(task: asyncio.Task[_Content]) -> bool:
    return task.done() and (task.cancelled() or task.exception() is not None)


def _make_page() -> _Content:
    """Return the page, which is the same for everybody."""
    page = Page(title=TITLE, subtitle="", kind="live", verdicts=[], cards=[], sections=[])
    shell = to_live_shell(page, data_path=DATA_PATH)
    etag = f'"{hashlib.sha256(shell.html.encode()).hexdigest()[:32]}"'
    return _Content.of(shell.html, "text/html; charset=utf-8", {"Content-Security-Policy": shell.policy, "ETag": etag})


def _make_data(state: ServiceState) -> _Content:
    """Return what the page shows of a state."""
    taken = clock_text(float(state.samples.wall_s[-1]))
    update = live_update(dashboard_page(state)) | {"time": taken, "every_s": EVERY_S}
    text = json.dumps(update, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return _Content.of(text, "application/json", {"Cache-Control": "no-store"})


def dashboard_routes(service: Service) -> APIRouter:
    """Return the routes under /dashboard."""
    router, dashboard = APIRouter(include_in_schema=False), Dashboard(service)

    @router.get(PAGE_PATH)
    async def dashboard_page(request: Request) -> Response:
        """Return the page of the dashboard."""
        return await dashboard.page(request)

    @router.get(DATA_PATH)
    async def dashboard_data(request: Request) -> Response:
        """Return what the page shows now; its format may change with any version."""
        return await dashboard.data(request)

    return router
