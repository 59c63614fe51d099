"""Uvicorn's HTTP/1.1 protocol with bounds: on the time of heads and of readers, and on the work per turn."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol, RequestResponseCycle
from uvicorn.server import ServerState

from maveriq.serve.connections import FULL, Connection, Connections
from maveriq.serve.errors import ApiError, raw_response
from maveriq.serve.settings import MAX_HEAD_BYTES

HEAD_TIMEOUT_S = 15.0
"""Time for a request's head to arrive, from the connection or from its first byte."""
CROWDED_HEAD_TIMEOUT_S = 3.0
"""The same for connections without an authenticated request, while there are many of them."""
READ_TIMEOUT_S = 30.0
"""Time for a client to read what has been written for it."""
MAX_CHUNKS = 2_048
"""Chunks of a body with Transfer-Encoding: chunked."""

_EVENTS_PER_TURN = 64


class HttpProtocol(H11Protocol, Connection):
    """One connection. `maveriq.serve.auth` limits the time for the body of a request."""

    def __init__(
        self,
        config: uvicorn.Config,
        server_state: ServerState,
        connections: Connections,
        peer: str,
        on_refused: Callable[[str], None],
    ) -> None:
        """Create the protocol of an accepted connection.

        Args:
            config: of the server.
            server_state: of the server.
            connections: has this connection until it is lost.
            peer: address of the client.
            on_refused: called with the code of each error that does not come from the app.
        """
        super().__init__(config, server_state, {"connection": self})
        self.conn: _BoundedParser = _BoundedParser()
        self._peer = peer
        self._connections = connections
        self._on_refused = on_refused
        self._is_authenticated = False
        self._is_parse_scheduled = False
        self._has_place = True
        self._is_made = False
        self._head_since_s: float | None = self.loop.time()  # None: no head is awaited
        self._unread_since_s: float | None = None  # None: the client reads what is written

    # What `Connections` needs

    @property
    def peer(self) -> str:
        """The address of the client."""
        return self._peer

    @property
    def waits_for_client(self) -> bool:
        """Whether the client has to act next: to send the rest of a request, or another one."""
        cycle = self._cycle
        return cycle is None or cycle.response_complete or (cycle.more_body and not cycle.response_started)

    def make_room(self) -> None:
        """Close the connection, with an error unless the client is idle between two requests."""
        self._has_place = False
        if self._is_made:
            self._refuse(FULL)
            if self.transport.get_write_buffer_size():  # the client reads nothing
                self.transport.abort()

    def close_if_expired(self, *, crowded: bool) -> bool:
        """Close the connection if the client sends a head, or reads, too slowly."""
        if not self._is_made:
            return False
        now_s = self.loop.time()
        if self._unread_since_s is None and self.transport.is_closing():
            self._unread_since_s = now_s
        if self._unread_since_s is not None and now_s - self._unread_since_s > READ_TIMEOUT_S:
            self.transport.abort()
            return True
        timeout_s = CROWDED_HEAD_TIMEOUT_S if crowded and not self._is_authenticated else HEAD_TIMEOUT_S
        if self._head_since_s is None or now_s - self._head_since_s <= min(timeout_s, HEAD_TIMEOUT_S):
            return False
        self._head_since_s = None
        self.transport.close()
        return True

    def mark_authenticated(self) -> None:
        """Note that a request has passed the checks of `maveriq.serve.auth`."""
        self._is_authenticated = True
        self._connections.authenticate(self)

    # Events of the transport

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as in uvicorn
        """Start to serve the connection."""
        super().connection_made(transport)
        self._is_made = True
        if not self._has_place:
            self._refuse(FULL)

    def data_received(self, data: bytes) -> None:
        """Parse what has arrived."""
        if self.transport.is_closing():
            return
        if self._head_since_s is None and not self._is_handling_request:
            self._head_since_s = self.loop.time()
        super().data_received(data)

    def handle_events(self) -> None:
        """Handle some of the events; the rest has to wait for the other connections."""
        self.conn.start_turn()
        super().handle_events()
        if self._is_handling_request:
            self._head_since_s = None
        if self.conn.is_turn_over and not self._is_parse_scheduled:
            self._is_parse_scheduled = True
            self.loop.call_soon(self._continue_parsing)

    def eof_received(self) -> None:
        """Answer a client that has ended a request too early."""
        cycle = self._cycle
        if cycle is not None and cycle.more_body and not cycle.response_started and not self.conn.is_turn_over:
            self._refuse(ApiError(400, "the connection ended before the body did", code="body_incomplete"))

    def pause_writing(self) -> None:
        """Start the timeout for the client to read."""
        super().pause_writing()
        self._unread_since_s = self.loop.time()

    def resume_writing(self) -> None:
        """Stop the timeout for the client to read."""
        super().resume_writing()
        self._unread_since_s = None

    def connection_lost(self, exc: Exception | None) -> None:
        """Give the place of the connection to others."""
        self._connections.remove(self)
        super().connection_lost(exc)
        # Without these references to itself the protocol is freed now, and not by a long garbage collection.
        self.app_state.clear()
        if self._cycle is not None:
            self._cycle.scope["state"].clear()

    def send_400_response(self, msg: str) -> None:
        """Answer a request that cannot be parsed."""
        self._refuse(self.conn.error or ApiError(400, msg, code="invalid_http"))

    @property
    def _cycle(self) -> RequestResponseCycle | None:
        cycle: RequestResponseCycle | None = self.cycle  # None before the first request, despite uvicorn's annotation
        return cycle

    @property
    def _is_handling_request(self) -> bool:
        return self._cycle is not None and not self._cycle.response_complete

    def _continue_parsing(self) -> None:
        self._is_parse_scheduled = False
        if not self.transport.is_closing():
            self.handle_events()

    def _refuse(self, error: ApiError) -> None:
        """Send an error, if a response is due, and close the connection."""
        cycle = self._cycle
        is_idle = cycle is not None and cycle.response_complete and self._head_since_s is None
        is_answered = cycle is not None and cycle.response_started and not cycle.response_complete
        if not (self.transport.is_closing() or is_idle or is_answered):
            self._on_refused(error.code)
            self.transport.write(raw_response(error))
        if cycle is not None and not cycle.response_complete:
            cycle.disconnected = True  # the app must not respond as well
            cycle.message_event.set()
        self.transport.close()


class _BoundedParser(h11.Connection):
    """h11's parser, which stops after some events until the next turn, and refuses bodies in very many chunks."""

    def __init__(self) -> None:
        super().__init__(h11.SERVER, MAX_HEAD_BYTES)
        self.error: ApiError | None = None
        self.is_turn_over = False
        self._events = 0
        self._chunks = 0

    def start_turn(self) -> None:
        """Allow more events."""
        self._events = 0
        self.is_turn_over = False

    def next_event(self) -> Any:
        """Return the next event, or NEED_DATA if there were enough for a turn.

        Raises:
            h11.RemoteProtocolError: the client does not speak HTTP, or the body has too many chunks.
        """
        if self._events >= _EVENTS_PER_TURN:
            self.is_turn_over = True
            return h11.NEED_DATA
        try:
            event = super().next_event()
            self._count(event)
        except h11.RemoteProtocolError as error:
            self.error = _api_error(error)
            raise
        return event

    def _count(self, event: Any) -> None:
        self._events += 1
        if isinstance(event, h11.Request):
            self._chunks = 0
            self._events = _EVENTS_PER_TURN  # the app checks the head before the body is parsed
        elif isinstance(event, h11.Data) and event.chunk_start:
            self._chunks += 1
            if self._chunks > MAX_CHUNKS:
                raise h11.RemoteProtocolError(f"the body has more than {MAX_CHUNKS} chunks", error_status_hint=413)


def _api_error(fault: h11.RemoteProtocolError) -> ApiError:
    """Return the error that a client gets for a request that cannot be parsed."""
    if fault.error_status_hint == 431:
        return ApiError(431, f"URL and headers are longer than {MAX_HEAD_BYTES} bytes", code="headers_too_large")
    if fault.error_status_hint == 413:
        return ApiError(413, str(fault), code="too_many_chunks")
    return ApiError(400, f"the request is not valid HTTP: {fault}", code="invalid_http")
