"""Runs the HTTP application on a socket: listening, signals, and graceful shutdown.

`maveriq.serve.acceptor` accepts the connections, `maveriq.serve.http_protocol` serves them.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import ipaddress
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from types import FrameType

import uvicorn
from fastapi import FastAPI

from maveriq.errors import InputError
from maveriq.exec.interrupt import stop_signals
from maveriq.serve.acceptor import Acceptor
from maveriq.serve.connections import Connections, connection_limit
from maveriq.serve.http_protocol import HttpProtocol
from maveriq.serve.log_limit import limit_logs
from maveriq.serve.service import Service
from maveriq.serve.settings import ServeSettings

_BACKLOG = 256
_FINAL_RESPONSES_S = 10  # to send responses after the grace period
_KEEP_ALIVE_S = 30
_SPARE_CONNECTIONS = 256  # for metrics, health and idle clients, in addition to requests in flight
_LIMITED_LOGS = ("asyncio", "uvicorn.error", "maveriq.serve.acceptor", "maveriq.serve.connections")
_HEADERS = (("X-Content-Type-Options", "nosniff"), ("Cross-Origin-Resource-Policy", "same-origin"))


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
    """Serve until SIGINT, SIGTERM or SIGHUP, then end requests within the grace period and stop the engines.

    Args:
        app: from `create_app`.
        listener: closed at the end.
        on_ready: called when the server accepts requests.
        fault: when it is done, the server stops without a grace period.

    Raises:
        InputError: the limit of open files is too low.
    """
    service: Service = app.state.service
    settings = service.settings
    limit_logs(*_LIMITED_LOGS)
    config = uvicorn.Config(
        app,
        http="h11",
        ws="none",
        lifespan="off",  # `service` is started and stopped here, where its errors can be reported in one line
        log_config=None,
        log_level="error",
        access_log=False,
        server_header=False,
        headers=list(_HEADERS),
        timeout_keep_alive=_KEEP_ALIVE_S,
        timeout_graceful_shutdown=int(settings.grace_period_s) + _FINAL_RESPONSES_S,
    )
    try:
        limit = connection_limit(2 * settings.max_in_flight + _SPARE_CONNECTIONS)
        connections = Connections(limit, lambda reason: service.metrics.connections_closed.labels(reason).inc())
        service.metrics.add_connections(connections.__len__)
        await service.start()
        gc.collect()
        gc.freeze()  # collections leave out what exists now; they took up to 250 ms with it
        server = _Server(config, service, connections, on_ready)
        if fault is not None:
            fault.add_done_callback(lambda _fault: server.stop_now())
        await server.serve(sockets=[listener])
    finally:
        gc.unfreeze()
        listener.close()
        await service.stop()
        await service.models.close()  # last: responses need the tokenizers


class _Server(uvicorn.Server):
    """Uvicorn with bounded connections, and with a shutdown that ends requests, not only connections."""

    def __init__(
        self, config: uvicorn.Config, service: Service, connections: Connections, on_ready: Callable[[], None]
    ) -> None:
        super().__init__(config)
        self._service = service
        self._connections = connections
        self._on_ready = on_ready
        self._acceptors: list[Acceptor] = []

    def stop_now(self) -> None:
        """Stop without a grace period."""
        self._service.end_grace_period()
        self.should_exit = True

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        def new_protocol(peer: str) -> HttpProtocol:
            def count_error(code: str) -> None:
                self._service.metrics.http_errors.labels(code).inc()

            return HttpProtocol(self.config, self.server_state, self._connections, peer, count_error)

        self.servers = []  # uvicorn's own accept without a limit
        self._acceptors = [Acceptor(listener, self._connections, new_protocol) for listener in sockets or ()]
        for acceptor in self._acceptors:
            acceptor.start()
        self.started = True
        self._on_ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        # Concurrently: open connections wait for requests, which the service ends within the grace period.
        stopping = asyncio.create_task(self._service.stop())
        for acceptor in self._acceptors:
            acceptor.close()
        await super().shutdown(sockets)
        await stopping

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.should_exit and sig != signal.SIGHUP:  # the second signal; a closed terminal sends SIGHUP twice
            self._service.end_grace_period()
        super().handle_exit(sig, frame)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield  # only the main thread can handle signals
            return
        # Uvicorn's own version raises the signal again at the end, which would interrupt the rest of the shutdown.
        loop = asyncio.get_running_loop()
        signals = stop_signals()
        for signal_number in signals:
            loop.add_signal_handler(signal_number, self.handle_exit, signal_number, None)
        try:
            yield
        finally:
            for signal_number in signals:
                loop.remove_signal_handler(signal_number)
