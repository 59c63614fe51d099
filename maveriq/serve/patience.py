"""Connections on which nothing comes: they are closed before they can use up what there is for others."""

from __future__ import annotations

import asyncio

from uvicorn.protocols.http.h11_impl import H11Protocol, RequestResponseCycle

HEAD_S = 15.0
"""A request's head must be there so long after its connection, or after its first byte."""


class PatientProtocol(H11Protocol):
    """Uvicorn's HTTP/1.1, which waits for the head of a request for a bounded time.

    Uvicorn itself bounds only how long a connection stays open between two requests; the time for a body is the
    gate's business (`maveriq.serve.gate`).
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
