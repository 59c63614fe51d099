"""Accepts connections for the server: a few per turn of the event loop, each with a place or with an error."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import Callable

from maveriq.serve.connections import FULL, Connection, Connections
from maveriq.serve.errors import raw_response

_LOG = logging.getLogger(__name__)
_ACCEPTS_PER_TURN = 16  # of the event loop, so that a flood of connections does not stop it
_SWEEP_S = 0.25
_RETRY_S = 0.25  # after the system is out of descriptors or memory


class Acceptor:
    """Accepts connections on a listening socket, and closes those that are too slow."""

    def __init__(
        self, listener: socket.socket, connections: Connections, new_protocol: Callable[[str], Connection]
    ) -> None:
        """Create an acceptor; `start` makes it work.

        Args:
            listener: the socket; `close` does not close it.
            connections: gets every accepted connection.
            new_protocol: called with the address of the client.
        """
        self._loop = asyncio.get_running_loop()
        self._listener = listener
        self._connections = connections
        self._new_protocol = new_protocol
        self._opening: set[asyncio.Task[None]] = set()
        self._timers: dict[str, asyncio.TimerHandle] = {}
        self._is_open = True

    def start(self) -> None:
        """Start to accept connections."""
        self._listener.settimeout(0)
        self._listen()
        self._sweep()

    def close(self) -> None:
        """Stop to accept connections; open ones stay."""
        self._is_open = False
        self._loop.remove_reader(self._listener)
        for timer in self._timers.values():
            timer.cancel()

    def _listen(self) -> None:
        self._loop.add_reader(self._listener, self._accept)

    def _accept(self) -> None:
        for _ in range(_ACCEPTS_PER_TURN):
            try:
                accepted, address = self._listener.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:  # out of descriptors or memory
                _LOG.error("no connection can be accepted: %s", error.strerror)
                self._loop.remove_reader(self._listener)
                self._connections.close_one()
                self._timers["listen"] = self._loop.call_later(_RETRY_S, self._listen)
                return
            accepted.settimeout(0)
            protocol = self._new_protocol(str(address[0]))
            if self._connections.add(protocol):
                task = self._loop.create_task(self._open(protocol, accepted))
                self._opening.add(task)
                task.add_done_callback(self._opening.discard)
            else:
                _refuse(accepted)

    async def _open(self, protocol: Connection, accepted: socket.socket) -> None:
        try:
            await self._loop.connect_accepted_socket(lambda: protocol, accepted)
        except OSError:  # the client is gone
            self._connections.remove(protocol)
            accepted.close()

    def _sweep(self) -> None:
        if self._is_open:
            self._timers["sweep"] = self._loop.call_later(_SWEEP_S, self._sweep)
            self._connections.close_expired()


def _refuse(accepted: socket.socket) -> None:
    """Send `FULL` and close."""
    with contextlib.suppress(OSError):
        accepted.send(raw_response(FULL))
    accepted.close()
