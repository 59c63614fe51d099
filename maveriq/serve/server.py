"""Connections on which nothing comes: they are closed before they can use up what there is for others.

Running the application: the socket it listens on, and how it comes up and goes down.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from types import FrameType

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol, RequestResponseCycle

from maveriq.errors import InputError
from maveriq.serve.service import Service
from maveriq.serve.settings import ServeSettings

HEAD_S = 15.0
"""A request's head must be there so long after its connection, or after its first byte."""


class HeadTimeoutProtocol(H11Protocol):
    """Uvicorn's HTTP/1.1, which waits for the head of a request for a bounded time.

    Uvicorn itself bounds only how long a connection stays open between two requests; the time for a body is the
    gate's business (`maveriq.serve.auth`).
    """

    _head_due: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn has it
        """Begin to wait for the first request."""
        super().connection_made(transport)
        self._expect_head()

    def data_received(self, data: bytes) -> None:
        """Stop waiting where a request has begun, wait for the rest of its head where it has not."""
        super().data_received(data)
        if self._serves:
            self._stop_waiting()
        elif self._head_due is None:
            self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """Wait no longer."""
        self._stop_waiting()
        super().connection_lost(exc)

    @property
    def _serves(self) -> bool:
        cycle: RequestResponseCycle | None = self.cycle  # None before the first request, whatever uvicorn says
        return cycle is not None and not cycle.response_complete

    def _expect_head(self) -> None:
        self._head_due = asyncio.get_running_loop().call_later(HEAD_S, self._too_slow)

    def _stop_waiting(self) -> None:
        if self._head_due is not None:
            self._head_due.cancel()
            self._head_due = None

    def _too_slow(self) -> None:
        self._head_due = None
        if not self._serves:
            self.transport.close()


_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_BACKLOG = 1_024
_LAST_ANSWERS_S = 10
_IDLE_CONNECTION_S = 30
_MAX_HEADER_BYTES = 32 * 1024
_SPARE_CONNECTIONS = 256  # beside those of requests in flight: metrics, health, idle ones


def listen(host: str, port: int, settings: ServeSettings) -> socket.socket:
    """Return a socket that listens; port 0 takes any that is free.

    Raises:
        InputError: no such address, the port is taken or needs rights, or others could reach it without a token.
    """
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError) as error:
        raise InputError(f"--host {host!r} cannot be found: {error}") from None
    if settings.token is None and not ipaddress.ip_address(str(address[0]).partition("%")[0]).is_loopback:
        raise InputError(
            f"on {host!r} others could use this server: put a token into the environment as MAVERIQ_TOKEN, "
            "or into a file and name it with --token-file; or leave --host out"
        )
    listening = socket.socket(family, kind)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind(address)
        listening.listen(_BACKLOG)
    except OSError as error:
        listening.close()
        raise InputError(f"cannot listen on {host} port {port}: {error.strerror}; name another with --port") from None
    return listening


def url_of(listening: socket.socket) -> str:
    """Return the address of a listening socket as a URL."""
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


async def serve(
    app: FastAPI, listening: socket.socket, ready: Callable[[], None], *, fault: asyncio.Future[None] | None = None
) -> None:
    """Serve until SIGINT or SIGTERM, then end what runs within the service's time and stop its engines.

    Args:
        app: from `create_app`.
        listening: is closed at the end.
        ready: called once the service answers.
        fault: when this is done the service ends at once.
    """
    service: Service = app.state.service
    limits = service.settings
    config = uvicorn.Config(
        app,
        http=HeadTimeoutProtocol,
        ws="none",
        lifespan="off",  # begun and ended here, where an error can be told in one line
        log_config=None,
        log_level="warning",
        access_log=False,
        server_header=False,
        h11_max_incomplete_event_size=_MAX_HEADER_BYTES,
        timeout_keep_alive=_IDLE_CONNECTION_S,
        limit_concurrency=2 * limits.max_in_flight + _SPARE_CONNECTIONS,
        timeout_graceful_shutdown=int(limits.grace_period_s) + _LAST_ANSWERS_S,
    )
    try:
        await service.start()
        server = _Server(config, service, ready)
        if fault is not None:
            fault.add_done_callback(lambda _fault: server.end_at_once())
        await server.serve(sockets=[listening])
    finally:
        listening.close()
        await service.stop()


class _Server(uvicorn.Server):
    """Uvicorn, with a way down on which requests end rather than connections."""

    def __init__(self, config: uvicorn.Config, service: Service, ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._service = service
        self._ready = ready

    def end_at_once(self) -> None:
        """End without waiting for what runs."""
        self._service.end_grace_period()
        self.should_exit = True

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        # Both at once: handlers wait for requests, which the service ends in bounded time.
        stopping = asyncio.create_task(self._service.stop())
        await super().shutdown(sockets)
        await stopping

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.should_exit:
            self._service.end_grace_period()
        super().handle_exit(sig, frame)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield  # signals are not for a server inside another program
            return
        # Uvicorn would raise the signal again at the end, which would cut short what comes after it.
        loop = asyncio.get_running_loop()
        for one in _SIGNALS:
            loop.add_signal_handler(one, self.handle_exit, one, None)
        try:
            yield
        finally:
            for one in _SIGNALS:
                loop.remove_signal_handler(one)
