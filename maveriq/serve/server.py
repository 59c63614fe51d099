"""Runs the HTTP application on a socket: listening, signals, graceful shutdown, and connection timeouts."""

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

HEAD_TIMEOUT_S = 15.0
"""Time for a request's head to arrive, from the connection or from its first byte."""

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_BACKLOG = 1_024
_FINAL_RESPONSES_S = 10  # to send responses after the grace period
_KEEP_ALIVE_S = 30
_MAX_HEADER_BYTES = 32 * 1024
_SPARE_CONNECTIONS = 256  # for metrics, health and idle clients, in addition to requests in flight


def listen(host: str, port: int, settings: ServeSettings) -> socket.socket:
    """Return a listening socket; port 0 picks a free port.

    Raises:
        InputError: the address is unknown, the port is taken or not allowed, or others could connect without a token.
    """
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError) as error:
        raise InputError(f"--host {host!r} cannot be found: {error}") from None
    if settings.token is None and not ipaddress.ip_address(str(address[0]).partition("%")[0]).is_loopback:
        raise InputError(
            f"on {host!r} other machines could use this server: set MAVERIQ_TOKEN in the environment, "
            "or give --token-file; or leave --host out"
        )
    listener = socket.socket(family, kind)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        raise InputError(f"cannot listen on {host} port {port}: {error.strerror}; choose another with --port") from None
    return listener


def url_of(listener: socket.socket) -> str:
    """Return the URL of a listening socket."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


async def serve(
    app: FastAPI, listener: socket.socket, on_ready: Callable[[], None], *, fault: asyncio.Future[None] | None = None
) -> None:
    """Serve until SIGINT or SIGTERM, then end requests within the grace period and stop the engines.

    Args:
        app: from `create_app`.
        listener: closed at the end.
        on_ready: called when the server accepts requests.
        fault: when it is done, the server stops without a grace period.
    """
    service: Service = app.state.service
    settings = service.settings
    config = uvicorn.Config(
        app,
        http=HeadTimeoutProtocol,
        ws="none",
        lifespan="off",  # `service` is started and stopped here, where its errors can be reported in one line
        log_config=None,
        log_level="warning",
        access_log=False,
        server_header=False,
        h11_max_incomplete_event_size=_MAX_HEADER_BYTES,
        timeout_keep_alive=_KEEP_ALIVE_S,
        limit_concurrency=2 * settings.max_in_flight + _SPARE_CONNECTIONS,
        timeout_graceful_shutdown=int(settings.grace_period_s) + _FINAL_RESPONSES_S,
    )
    try:
        await service.start()
        server = _Server(config, service, on_ready)
        if fault is not None:
            fault.add_done_callback(lambda _fault: server.stop_now())
        await server.serve(sockets=[listener])
    finally:
        listener.close()
        await service.stop()


class _Server(uvicorn.Server):
    """Uvicorn with a shutdown that ends requests, not only connections."""

    def __init__(self, config: uvicorn.Config, service: Service, on_ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._service = service
        self._on_ready = on_ready

    def stop_now(self) -> None:
        """Stop without a grace period."""
        self._service.end_grace_period()
        self.should_exit = True

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._on_ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        # Concurrently: open connections wait for requests, which the service ends within the grace period.
        stopping = asyncio.create_task(self._service.stop())
        await super().shutdown(sockets)
        await stopping

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.should_exit:  # the second signal
            self._service.end_grace_period()
        super().handle_exit(sig, frame)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield  # only the main thread can handle signals
            return
        # Uvicorn's own version raises the signal again at the end, which would interrupt the rest of the shutdown.
        loop = asyncio.get_running_loop()
        for signal_number in _SIGNALS:
            loop.add_signal_handler(signal_number, self.handle_exit, signal_number, None)
        try:
            yield
        finally:
            for signal_number in _SIGNALS:
                loop.remove_signal_handler(signal_number)


class HeadTimeoutProtocol(H11Protocol):
    """Uvicorn's HTTP/1.1 protocol, with a timeout for the head of a request.

    Without it, idle connections could use up the connection limit. Uvicorn itself only limits the time between two
    requests on one connection; `maveriq.serve.auth` limits the time for the body.
    """

    _head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as in uvicorn
        """Start the timeout for the first request."""
        super().connection_made(transport)
        self._start_timer()

    def data_received(self, data: bytes) -> None:
        """Stop the timeout once the head is complete; else start it if it is not running."""
        super().data_received(data)
        if self._is_handling_request:
            self._stop_timer()
        elif self._head_timer is None:
            self._start_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the timeout."""
        self._stop_timer()
        super().connection_lost(exc)

    @property
    def _is_handling_request(self) -> bool:
        cycle: RequestResponseCycle | None = self.cycle  # None before the first request, despite uvicorn's annotation
        return cycle is not None and not cycle.response_complete

    def _start_timer(self) -> None:
        self._head_timer = asyncio.get_running_loop().call_later(HEAD_TIMEOUT_S, self._on_timeout)

    def _stop_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _on_timeout(self) -> None:
        self._head_timer = None
        if not self._is_handling_request:
            self.transport.close()
