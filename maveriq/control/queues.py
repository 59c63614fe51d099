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
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TypeAlias, assert_never

from maveriq.domain.requests import Request
from maveriq.units import MICROS_PER_SECOND, Micros

DEFAULT_MAX_WAIT_US = 60 * MICROS_PER_SECOND


class QueueDiscipline(StrEnum):
    """Who goes next."""

    FIFO = "fifo"
    FIFO_PER_MODEL = "fifo-per-model"
    SJF = "sjf"
    EDF = "edf"


Entry: TypeAlias = tuple[int, float, int, int, Request]
"""Urgency, rank, request id, serial, request; compared in this order, and never as far as the request."""


@dataclass(slots=True)
class DeploymentQueue:
    """The requests that wait for one deployment.

    `gpu_mask` has a bit for each GPU of the deployment; a parked line (its engine is down, but
    will return) is passed over. The heap is ordered by urgency (0 for priority requests, 1 for
    the rest), then by rank. Where there is a bound on waiting, `by_arrival` holds the same
    requests in order of arrival; one that was taken from either is skipped in the other when it
    comes up there (`taken_by_rank`, `taken_by_arrival`: serials).
    """

    deployment_id: int
    gpu_mask: int
    paused: bool = False
    heap: list[Entry] = field(default_factory=list)
    by_arrival: list[tuple[int, int, Request]] = field(default_factory=list)
    taken_by_rank: set[int] = field(default_factory=set)
    taken_by_arrival: set[int] = field(default_factory=set)

    def __len__(self) -> int:
        return len(self.heap) - len(self.taken_by_arrival)

    def head(self) -> Entry | None:
        """Return the entry that goes first by rank."""
        while self.heap and self.heap[0][3] in self.taken_by_arrival:
            self.taken_by_arrival.discard(heapq.heappop(self.heap)[3])
        return self.heap[0] if self.heap else None

    def oldest(self) -> Request | None:
        """Return the request that arrived first."""
        while self.by_arrival and self.by_arrival[0][1] in self.taken_by_rank:
            self.taken_by_rank.discard(heapq.heappop(self.by_arrival)[1])
        return self.by_arrival[0][2] if self.by_arrival else None


@dataclass(slots=True)
class Head:
    """Who may go next: a request, its line, and whether it goes because it waited too long."""

    line: DeploymentQueue
    request: Request
    overdue: bool


class RequestQueue:
    """All waiting requests, and the choice of the next one."""

    __slots__ = ("_discipline", "_front", "_lines", "_max_wait_us", "_serial", "_single_line", "_waiting")

    def __init__(self, discipline: QueueDiscipline, max_wait_us: Micros = DEFAULT_MAX_WAIT_US) -> None:
        self._discipline = discipline
        self._single_line = discipline is QueueDiscipline.FIFO
        self._max_wait_us = max_wait_us
        self._lines: dict[int, DeploymentQueue] = {}
        self._front: DeploymentQueue | None = None  # whose head is first of all under fifo; None: not known
        self._serial = 0
        self._waiting = 0

    def __len__(self) -> int:
        return self._waiting

    def open_queue(self, deployment_id: int, gpu_mask: int) -> None:
        """Let requests wait for a deployment."""
        self._lines[deployment_id] = DeploymentQueue(deployment_id, gpu_mask)

    def has_queue(self, deployment_id: int) -> bool:
        """Say whether requests can wait for a deployment."""
        return deployment_id in self._lines

    def pause(self, deployment_id: int, *, paused: bool) -> None:
        """Pass over a deployment's requests while its engine is down, or take them up again."""
        self._lines[deployment_id].paused = paused
        self._front = None

    def close_queue(self, deployment_id: int) -> list[Request]:
        """Drop a deployment's line and return the requests that waited in it, in order of arrival."""
        line = self._lines.pop(deployment_id)
        self._front = None
        self._waiting -= len(line)
        left = (entry[4] for entry in line.heap if entry[3] not in line.taken_by_arrival)
        return sorted(left, key=lambda request: request.request_id)

    def withdraw(self, request_id: int, deployment_id: int) -> bool:
        """Take a request out of a deployment's line; says whether it waited there. Takes time in proportion to it."""
        line = self._lines.get(deployment_id)
        if line is None:
            return False
        for entry in line.heap:
            if entry[2] == request_id and entry[3] not in line.taken_by_arrival:
                break
        else:
            return False
        line.heap.remove(entry)
        heapq.heapify(line.heap)
        line.by_arrival = [one for one in line.by_arrival if one[1] != entry[3]]
        heapq.heapify(line.by_arrival)
        self._front = None
        self._waiting -= 1
        return True

    def waiting(self, deployment_id: int) -> int:
        """Return how many requests wait for a deployment."""
        line = self._lines.get(deployment_id)
        return len(line) if line else 0

    def push(self, request: Request, deployment_id: int, service_us: Micros = 0) -> None:
        """Let a request wait; `service_us` is its estimated service, used by `sjf` alone.

        A request keeps its place by its number, also when it comes late because its replica was lost.
        """
        if request.priority:
            self._add(self._lines[deployment_id], 0, -request.request_id, request)
        else:
            self._add(self._lines[deployment_id], 1, self._rank(request, service_us), request)

    def push_back(self, request: Request, deployment_id: int) -> None:
        """Return a request that was already taken to the very front, because its engine failed."""
        # Rank minus infinity: whoever was being served stays first, even of priority requests.
        self._add(self._lines[deployment_id], 0, -math.inf, request)

    def _add(self, line: DeploymentQueue, urgency: int, rank: float, request: Request) -> None:
        self._serial += 1
        entry = (urgency, rank, request.request_id, self._serial, request)
        heapq.heappush(line.heap, entry)
        self._waiting += 1
        if not self._single_line:
            heapq.heappush(line.by_arrival, (request.request_id, self._serial, request))
        elif self._front and entry < self._front.heap[0]:
            self._front = None  # it goes before the front that was known

    def _rank(self, request: Request, service_us: Micros) -> float:
        match self._discipline:
            case QueueDiscipline.FIFO | QueueDiscipline.FIFO_PER_MODEL:
                return request.request_id
            case QueueDiscipline.SJF:
                return service_us
            case QueueDiscipline.EDF:
                return request.arrival_us + request.slo_us if request.slo_us else math.inf
            case _ as never:
                assert_never(never)

    def next(self, now_us: Micros, blocked_mask: int) -> Head | None:
        """Return who may go next, None if nobody may or waits.

        Args:
            now_us: the present, for the bound on waiting.
            blocked_mask: a bit for each GPU on which nothing may start now.
        """
        if not self._waiting:
            return None
        if self._single_line:
            if self._front is None:
                self._front = self._first(0)
            line = self._front
            return None if line is None or line.gpu_mask & blocked_mask else Head(line, line.heap[0][4], overdue=False)
        overdue, held_mask = self._overdue(now_us, blocked_mask)
        if overdue:
            return overdue
        line = self._first(blocked_mask | held_mask)
        return Head(line, line.heap[0][4], overdue=False) if line else None

    def _first(self, blocked_mask: int) -> DeploymentQueue | None:
        """Return the line with the first head among those that use no blocked GPU."""
        best: DeploymentQueue | None = None
        best_entry: Entry | None = None
        for line in self._lines.values():
            if not line.heap or line.paused or line.gpu_mask & blocked_mask:
                continue
            entry = line.head()
            if entry is not None and (best_entry is None or entry < best_entry):
                best, best_entry = line, entry
        return best

    def _overdue(self, now_us: Micros, blocked_mask: int) -> tuple[Head | None, int]:
        """Return the first overdue request that can go, and the GPUs held for others."""
        latest_us = now_us - self._max_wait_us
        late = []
        for line in self._lines.values():
            oldest = line.oldest()
            if oldest and not line.paused and oldest.arrival_us < latest_us:
                late.append((oldest.request_id, Head(line, oldest, overdue=True)))
        held_mask = 0
        for _, head in sorted(late, key=lambda one: one[0]):
            if not head.line.gpu_mask & (blocked_mask | held_mask):
                return head, held_mask
            held_mask |= head.line.gpu_mask
        return None, held_mask

    def take(self, head: Head, maximum: int) -> tuple[Request, ...]:
        """Take the head, and after it up to `most - 1` more of its line by rank."""
        line = head.line
        taken = []
        if head.overdue:
            _, serial, request = heapq.heappop(line.by_arrival)
            line.taken_by_arrival.add(serial)
            taken.append(request)
        while len(taken) < maximum and line.head():
            _, _, _, serial, request = heapq.heappop(line.heap)
            if not self._single_line:
                line.taken_by_rank.add(serial)
            taken.append(request)
        self._waiting -= len(taken)
        self._front = None
        return tuple(taken)
