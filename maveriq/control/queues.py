"""The request queue and its disciplines.

`fifo` is the published one (SPEC 6): one line for all, whose head holds everybody behind it
until all GPUs of its deployment are idle. The others keep a line per deployment, and a blocked
head holds its own line only: `fifo-per-model` by arrival, `sjf` by estimated service, `edf` by
deadline. With them a request that has waited longer than `max_wait_us` goes next, in order of
arrival, and until it goes nothing starts on its GPUs: that bound keeps all from starving.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from dataclasses import dataclass, field
from enum import StrEnum
from typing import assert_never

from maveriq.domain.requests import Request
from maveriq.units import MICROS_PER_SECOND, Micros

DEFAULT_MAX_WAIT_US = 60 * MICROS_PER_SECOND


class Discipline(StrEnum):
    """Who goes next."""

    FIFO = "fifo"
    FIFO_PER_MODEL = "fifo-per-model"
    SJF = "sjf"
    EDF = "edf"


@dataclass(slots=True)
class Line:
    """The requests that wait for one deployment.

    `gpu_mask` has a bit for each GPU of the deployment; a parked line (its engine is down, but
    will return) is passed over. The heap holds (urgency, rank, sequence, request): urgency 0
    for priority requests, the latest first, and 1 for the rest. Where there is a bound on
    waiting, `by_arrival` holds the same requests in order of arrival; one that was taken from
    either is skipped in the other when it comes up there (`taken_by_rank`, `taken_by_arrival`).
    """

    deployment_id: int
    gpu_mask: int
    parked: bool = False
    heap: list[tuple[int, float, int, Request]] = field(default_factory=list)
    by_arrival: deque[tuple[int, Request]] = field(default_factory=deque)
    taken_by_rank: set[int] = field(default_factory=set)
    taken_by_arrival: set[int] = field(default_factory=set)

    def __len__(self) -> int:
        return len(self.heap) - len(self.taken_by_arrival)

    def head(self) -> tuple[int, float, int, Request] | None:
        """Return the entry that goes first by rank."""
        while self.heap and self.heap[0][2] in self.taken_by_arrival:
            self.taken_by_arrival.discard(heapq.heappop(self.heap)[2])
        return self.heap[0] if self.heap else None

    def oldest(self) -> tuple[int, Request] | None:
        """Return the sequence and the request that has waited longest."""
        while self.by_arrival and self.by_arrival[0][0] in self.taken_by_rank:
            self.taken_by_rank.discard(self.by_arrival.popleft()[0])
        return self.by_arrival[0] if self.by_arrival else None


@dataclass(slots=True)
class Head:
    """Who may go next: a request, its line, and whether it goes because it waited too long."""

    line: Line
    request: Request
    overdue: bool


class RequestQueue:
    """All waiting requests, and the choice of the next one."""

    __slots__ = ("_discipline", "_front", "_lines", "_max_wait_us", "_sequence", "_single_line", "_waiting")

    def __init__(self, discipline: Discipline, max_wait_us: Micros = DEFAULT_MAX_WAIT_US) -> None:
        self._discipline = discipline
        self._single_line = discipline is Discipline.FIFO
        self._max_wait_us = max_wait_us
        self._lines: dict[int, Line] = {}
        self._front: Line | None = None  # whose head is first of all under fifo; None: not known
        self._sequence = 0
        self._waiting = 0

    def __len__(self) -> int:
        return self._waiting

    def open_line(self, deployment_id: int, gpu_mask: int) -> None:
        """Let requests wait for a deployment."""
        self._lines[deployment_id] = Line(deployment_id, gpu_mask)

    def has_line(self, deployment_id: int) -> bool:
        """Say whether requests can wait for a deployment."""
        return deployment_id in self._lines

    def park(self, deployment_id: int, *, parked: bool) -> None:
        """Pass over a deployment's requests while its engine is down, or take them up again."""
        self._lines[deployment_id].parked = parked
        self._front = None

    def close_line(self, deployment_id: int) -> list[Request]:
        """Drop a deployment's line and return the requests that waited in it, in order of arrival."""
        line = self._lines.pop(deployment_id)
        self._front = None
        self._waiting -= len(line)
        left = (entry[3] for entry in line.heap if entry[2] not in line.taken_by_arrival)
        return sorted(left, key=lambda request: request.request_id)

    def waiting(self, deployment_id: int) -> int:
        """Return how many requests wait for a deployment."""
        line = self._lines.get(deployment_id)
        return len(line) if line else 0

    def push(self, request: Request, deployment_id: int, service_us: Micros = 0) -> None:
        """Let a request wait; `service_us` is its estimated service, used by `sjf` alone."""
        self._sequence += 1
        sequence = self._sequence
        urgency = 0 if request.priority else 1
        rank = -sequence if request.priority else self._rank(request, sequence, service_us)
        self._add(self._lines[deployment_id], (urgency, rank, sequence, request))

    def push_back(self, request: Request, deployment_id: int) -> None:
        """Return a request that was already taken to the very front, because its engine failed."""
        # Rank minus infinity: whoever was being served stays first, even of priority requests.
        self._sequence += 1
        self._add(self._lines[deployment_id], (0, -math.inf, self._sequence, request))

    def _add(self, line: Line, entry: tuple[int, float, int, Request]) -> None:
        heapq.heappush(line.heap, entry)
        if entry[0] == 0:
            self._front = None
        if not self._single_line:
            line.by_arrival.append((entry[2], entry[3]))
        self._waiting += 1

    def _rank(self, request: Request, sequence: int, service_us: Micros) -> float:
        match self._discipline:
            case Discipline.FIFO | Discipline.FIFO_PER_MODEL:
                return sequence
            case Discipline.SJF:
                return service_us
            case Discipline.EDF:
                return request.arrival_us + request.slo_us if request.slo_us else math.inf
            case _ as never:
                assert_never(never)

    def next(self, now_us: Micros, busy_mask: int) -> Head | None:
        """Return who may go next, None if nobody may or waits.

        Args:
            now_us: the present, for the bound on waiting.
            busy_mask: a bit for each GPU that is executing.
        """
        if not self._waiting:
            return None
        if self._single_line:
            if self._front is None:
                self._front = self._first(0)
            line = self._front
            return None if line is None or line.gpu_mask & busy_mask else Head(line, line.heap[0][3], overdue=False)
        overdue, held_mask = self._overdue(now_us, busy_mask)
        if overdue:
            return overdue
        line = self._first(busy_mask | held_mask)
        return Head(line, line.heap[0][3], overdue=False) if line else None

    def _first(self, blocked_mask: int) -> Line | None:
        """Return the line with the first head among those that use no blocked GPU."""
        best: Line | None = None
        best_entry: tuple[int, float, int, Request] | None = None
        for line in self._lines.values():
            if not line.heap or line.parked or line.gpu_mask & blocked_mask:
                continue
            entry = line.head()
            if entry is not None and (best_entry is None or entry < best_entry):
                best, best_entry = line, entry
        return best

    def _overdue(self, now_us: Micros, busy_mask: int) -> tuple[Head | None, int]:
        """Return the first overdue request that can go, and the GPUs held for others."""
        latest_us = now_us - self._max_wait_us
        late = []
        for line in self._lines.values():
            oldest = line.oldest()
            if oldest and not line.parked and oldest[1].arrival_us < latest_us:
                late.append((oldest[1].arrival_us, oldest[0], Head(line, oldest[1], overdue=True)))
        held_mask = 0
        for _, _, head in sorted(late, key=lambda one: one[:2]):
            if not head.line.gpu_mask & (busy_mask | held_mask):
                return head, held_mask
            held_mask |= head.line.gpu_mask
        return None, held_mask

    def take(self, head: Head, most: int) -> tuple[Request, ...]:
        """Take the head, and after it up to `most - 1` more of its line by rank."""
        line = head.line
        taken = []
        if head.overdue:
            sequence, request = line.by_arrival.popleft()
            line.taken_by_arrival.add(sequence)
            taken.append(request)
        while len(taken) < most and line.head():
            _, _, sequence, request = heapq.heappop(line.heap)
            if not self._single_line:
                line.taken_by_rank.add(sequence)
            taken.append(request)
        self._waiting -= len(taken)
        self._front = None
        return tuple(taken)
