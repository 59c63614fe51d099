"""The client of a run: when each request of a workload is sent.

Open loop sends requests at their times. Closed loop has a number of clients, each of which sends a request when the
one before has ended. In both, a turn of a session waits for the end of the turn before it, and a limit on requests in
flight holds back what is due. `Client` has no clock: its driver tells it the time and which requests have ended.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from heapq import heappop, heappush

import numpy as np

from maveriq.domain.requests import Request
from maveriq.units import Micros
from maveriq.workload.requests import Arrivals, requests_of


@dataclass(slots=True)
class _Session:
    """A session that has begun: turns that wait for the one before, and when that ended, None while it has not."""

    waiting: deque[Request] = field(default_factory=deque)
    ended_us: Micros | None = None


class Client:
    """Sends the requests of a workload (mutable).

    Requests are numbered 1, 2, ... as they are sent.

    Args:
        arrivals: the requests; in a closed loop the turns of a session follow each other.
        concurrency: clients of a closed loop; None for an open one.
        max_in_flight: how many requests may be in flight; None for any number.
    """

    def __init__(self, arrivals: Arrivals, *, concurrency: int | None = None, max_in_flight: int | None = None) -> None:
        self.unsent = len(arrivals)
        self.may_send = False
        """Whether the end of a request has made others due, or room for them; `send` answers it."""
        self._sent = 0
        self._in_flight = 0
        self._max_in_flight = max_in_flight
        self._is_closed = concurrency is not None
        self._idle = concurrency or 0  # clients that have not begun
        self._arrivals = arrivals
        self._rows = requests_of(arrivals)
        self._think_us = arrivals.think_us
        self._next = next(self._rows, None)
        self._held: deque[Request] = deque()  # due, and held back by the limit
        self._timed: list[tuple[Micros, int, Request]] = []  # heap of those that are due later
        self._pushed = 0
        self._sessions: dict[int, _Session] = {}
        self._session_of: dict[int, int] = {}  # by the number of a request in flight
        self._turns_left: list[int] = []
        if arrivals.has_turns and arrivals.session_id is not None:
            self._turns_left = np.bincount(arrivals.session_id).tolist()

    @property
    def next_us(self) -> Micros | None:
        """When the next request is due, as far as that is known; None if it waits for another to end, or none is left.

        After `send` this is later than its time.
        """
        due_us = None
        if self._next is not None and (self._idle or not self._is_closed):
            due_us = self._next.arrival_us
        if self._timed and (due_us is None or self._timed[0][0] < due_us):
            due_us = self._timed[0][0]
        return due_us

    def send(self, now_us: Micros) -> list[Request]:
        """Return the requests that are sent now; their arrival is now."""
        self.may_send = False
        self._take_due(now_us)
        held, limit, sent = self._held, self._max_in_flight, []
        while held and (limit is None or self._in_flight < limit):
            request = held.popleft()
            self._sent += 1
            self._in_flight += 1
            request.request_id, request.arrival_us = self._sent, now_us  # nobody else has it yet
            if request.session_id and self._turns_left:
                self._session_of[self._sent] = request.session_id
            sent.append(request)
        self.unsent -= len(sent)
        return sent

    def skip(self, sent: int, ended: int) -> None:
        """Take note that the driver of an open loop sent the next requests itself, and that some have ended.

        Args:
            sent: how many, in order; they keep their times and numbers.
            ended: how many of those that were ever sent.
        """
        self._in_flight += sent - ended
        if sent:
            self._sent += sent
            self.unsent -= sent
            self._rows = requests_of(self._arrivals, first=self._sent)
            self._next = next(self._rows, None)

    @property
    def sent(self) -> int:
        """How many requests were sent."""
        return self._sent

    def ended(self, request_id: int, now_us: Micros) -> None:
        """Take note that a request that was sent has ended, whatever its status; `send` may then send others."""
        self._in_flight -= 1
        if self._held:
            self.may_send = True
        session_id = self._session_of.pop(request_id, 0) if self._session_of else 0
        if session_id:
            session = self._sessions[session_id]
            if session.waiting:
                turn = session.waiting.popleft()
                self._push(turn, max(turn.arrival_us, now_us + self._think_of(turn)))
                return
            if self._turns_left[session_id]:
                session.ended_us = now_us
            else:
                del self._sessions[session_id]
        if self._is_closed and self._next is not None:
            request = self._take_unit()
            self._push(request, max(request.arrival_us, now_us + self._think_of(request)))

    def left(self, now_us: Micros) -> Iterator[Request]:
        """Yield the requests that were never sent, as if they arrived now; nothing is sent afterwards."""
        waiting = (turn for session in self._sessions.values() for turn in session.waiting)
        timed = (request for _, _, request in sorted(self._timed))
        ahead = () if self._next is None else (self._next,)
        for part in (self._held, timed, waiting, ahead, self._rows):
            for request in part:
                self._sent += 1
                request.request_id, request.arrival_us = self._sent, now_us
                yield request

    def _take_due(self, now_us: Micros) -> None:
        """Move what is due to those that the limit may hold back."""
        while self._timed and self._timed[0][0] <= now_us:
            self._held.append(heappop(self._timed)[2])
        if self._is_closed:
            while self._idle and self._next is not None and self._next.arrival_us <= now_us:
                self._idle -= 1
                self._held.append(self._take_unit())
            return
        while (request := self._next) is not None and request.arrival_us <= now_us:
            self._next = next(self._rows, None)
            if request.session_id and self._turns_left:
                self._take_turn(request, now_us)
            else:
                self._held.append(request)

    def _take_turn(self, turn: Request, now_us: Micros) -> None:
        """Take a turn whose time has come in an open loop."""
        self._turns_left[turn.session_id] -= 1
        session = self._sessions.get(turn.session_id)
        if session is None:
            self._sessions[turn.session_id] = _Session()
            self._held.append(turn)
        elif session.ended_us is None:
            session.waiting.append(turn)
        else:
            due_us = session.ended_us + self._think_of(turn)
            session.ended_us = None
            if due_us <= now_us:
                self._held.append(turn)
            else:
                self._push(turn, due_us)

    def _take_unit(self) -> Request:
        """Take what a client of a closed loop does next: a request, with the later turns of its session."""
        request = self._next
        assert request is not None  # noqa: S101
        self._next = next(self._rows, None)
        if request.session_id and self._turns_left:
            session = self._sessions[request.session_id] = _Session()
            while self._next is not None and self._next.session_id == request.session_id:
                session.waiting.append(self._next)
                self._next = next(self._rows, None)
            self._turns_left[request.session_id] = 0
        return request

    def _push(self, request: Request, due_us: Micros) -> None:
        self._pushed += 1
        self.may_send = True
        heappush(self._timed, (due_us, self._pushed, request))

    def _think_of(self, request: Request) -> Micros:
        """Return the think time before a request that has not been sent; its number is still that of its row."""
        return 0 if self._think_us is None else int(self._think_us[request.request_id - 1])
