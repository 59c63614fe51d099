"""The request queue and its disciplines.

To add a discipline, add a member to `QueueDiscipline` and its rank to `rank_of`: among waiting
requests the lowest rank goes first. If the rank needs the predicted service time, add the member
to `uses_service_time`. `--queue` takes it by its value.

Priority requests go before all others, the latest first. `fifo` keeps one order over all deployments, as the
published system did (SPEC 6): the first request blocks all behind it until the GPUs of its
deployment are idle. The other disciplines order each deployment's queue by itself, so a blocked
request blocks only its own deployment. To prevent starvation they give way to requests that have
waited longer than `max_wait_us`: these go first, in order of arrival, and until one goes, nothing
else starts on its GPUs.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TypeAlias, assert_never

from maveriq.domain.requests import Request
from maveriq.units import MICROS_PER_SECOND, Micros

DEFAULT_MAX_WAIT_US = 60 * MICROS_PER_SECOND


class QueueDiscipline(StrEnum):
    """Which request goes next."""

    FIFO = "fifo"  # first in, first out, over all deployments
    FIFO_PER_MODEL = "fifo-per-model"  # first in, first out, for each deployment by itself
    SJF = "sjf"  # shortest job first, by predicted service time
    EDF = "edf"  # earliest deadline first, by SLO

    @property
    def uses_service_time(self) -> bool:
        """Whether the discipline needs the predicted service time of a request."""
        return self is QueueDiscipline.SJF


def rank_of(discipline: QueueDiscipline, request: Request, service_us: Micros) -> float:
    """Return the rank of a request; the lowest goes first, and ties go by arrival.

    Args:
        discipline: how the queue is ordered.
        request: the waiting request.
        service_us: its predicted service time; 0 unless the discipline uses it.
    """
    match discipline:
        case QueueDiscipline.FIFO | QueueDiscipline.FIFO_PER_MODEL:
            return request.request_id
        case QueueDiscipline.SJF:
            return service_us
        case QueueDiscipline.EDF:
            return request.arrival_us + request.slo_us if request.slo_us else math.inf
        case _ as never:
            assert_never(never)


Entry: TypeAlias = tuple[int, float, int, int, Request]
"""Urgency, rank, request ID, serial number, request. Compared in this order; the serial number is unique."""


@dataclass(slots=True)
class DeploymentQueue:
    """The requests that wait for one deployment.

    `gpu_mask` has a bit for each GPU of the deployment. A paused queue is skipped, because the
    deployment's engine is down but will return. One that is set aside waits for a GPU that was
    blocked. The heap is ordered by urgency (0 for priority requests, 1 for others), then by rank.
    Unless the discipline is `fifo`, `by_arrival` holds the same requests in order of arrival. A
    request taken from one heap stays in the other until it comes up there; `taken_by_rank` and
    `taken_by_arrival` hold the serial numbers of those.
    """

    deployment_id: int
    gpu_mask: int
    paused: bool = False
    is_set_aside: bool = False
    heap: list[Entry] = field(default_factory=list)
    by_arrival: list[tuple[int, int, Request]] = field(default_factory=list)
    taken_by_rank: set[int] = field(default_factory=set)
    taken_by_arrival: set[int] = field(default_factory=set)

    def __len__(self) -> int:
        return len(self.heap) - len(self.taken_by_arrival)

    def head(self) -> Entry | None:
        """Return the entry of lowest rank."""
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
    """The request that may go next, its queue, and whether it goes because it waited too long."""

    queue: DeploymentQueue
    request: Request
    overdue: bool


class RequestQueue:
    """All waiting requests, in one queue per deployment, and the choice of the next one.

    Clusters have thousands of deployments, so no choice looks at all of them. `_heads` is a heap with the first
    request of each queue; stale entries are dropped when they come up. A queue that is blocked by a busy GPU is set
    aside until that GPU is free.
    """

    __slots__ = (
        "_aside", "_aside_mask", "_by_arrival", "_discipline", "_gone", "_heads", "_max_wait_us", "_queues", "_serial",
        "_shared_order", "_waiting",
    )  # fmt: skip

    def __init__(self, discipline: QueueDiscipline, max_wait_us: Micros = DEFAULT_MAX_WAIT_US) -> None:
        self._discipline = discipline
        self._shared_order = discipline is QueueDiscipline.FIFO
        self._max_wait_us = max_wait_us
        self._queues: dict[int, DeploymentQueue] = {}
        self._heads: list[tuple[Entry, DeploymentQueue]] = []  # a heap; the serial number decides before the queue
        self._aside: dict[int, list[DeploymentQueue]] = {}  # by the bit of the GPU that each waits for
        self._aside_mask = 0
        self._by_arrival: list[tuple[Micros, int]] = []  # a heap of arrivals and serial numbers, unless `fifo`
        self._gone: set[int] = set()  # serial numbers in it of requests that wait no longer
        self._serial = 0
        self._waiting = 0

    def __len__(self) -> int:
        return self._waiting

    def waiting(self, deployment_id: int) -> int:
        """Return how many requests wait for a deployment."""
        queue = self._queues.get(deployment_id)
        return len(queue) if queue else 0

    # Queues

    def open_queue(self, deployment_id: int, gpu_mask: int) -> DeploymentQueue:
        """Add the queue of a deployment, and return it."""
        queue = self._queues[deployment_id] = DeploymentQueue(deployment_id, gpu_mask)
        return queue

    def has_queue(self, deployment_id: int) -> bool:
        """Return whether a deployment has a queue."""
        return deployment_id in self._queues

    def pause(self, deployment_id: int) -> None:
        """Skip a deployment's requests while its engine is down."""
        self._queues[deployment_id].paused = True

    def resume(self, deployment_id: int) -> None:
        """Consider a deployment's requests again."""
        queue = self._queues[deployment_id]
        queue.paused = False
        self._consider(queue)

    def close_queue(self, deployment_id: int) -> list[Request]:
        """Remove a deployment's queue, and return the requests that waited in it, in order of arrival."""
        queue = self._queues.pop(deployment_id)
        queue.paused = True  # whatever is left of it in heaps
        self._waiting -= len(queue)
        left = [entry for entry in queue.heap if entry[3] not in queue.taken_by_arrival]
        self._forget(entry[3] for entry in left)
        return sorted((entry[4] for entry in left), key=lambda request: request.request_id)

    # Requests

    def push(self, request: Request, deployment_id: int, service_us: Micros = 0) -> None:
        """Let a request wait for a deployment.

        A request that moves here from another deployment keeps its place by arrival.
        """
        if request.priority:
            self._add(self._queues[deployment_id], 0, -request.request_id, request)
        else:
            self._add(self._queues[deployment_id], 1, rank_of(self._discipline, request, service_us), request)

    def push_front(self, request: Request, deployment_id: int) -> None:
        """Let a request wait before all others, even before priority requests: its engine failed while it ran."""
        self._add(self._queues[deployment_id], 0, -math.inf, request)

    def remove(self, request_id: int, deployment_id: int) -> bool:
        """Remove a waiting request; return whether it waited for this deployment. Linear in the queue's length."""
        queue = self._queues.get(deployment_id)
        if queue is None:
            return False
        for entry in queue.heap:
            if entry[2] == request_id and entry[3] not in queue.taken_by_arrival:
                break
        else:
            return False
        queue.heap.remove(entry)
        heapq.heapify(queue.heap)
        queue.by_arrival = [other for other in queue.by_arrival if other[1] != entry[3]]
        heapq.heapify(queue.by_arrival)
        self._forget([entry[3]])
        self._waiting -= 1
        self._consider(queue)
        return True

    def _add(self, queue: DeploymentQueue, urgency: int, rank: float, request: Request) -> None:
        self._serial += 1
        entry = (urgency, rank, request.request_id, self._serial, request)
        heapq.heappush(queue.heap, entry)
        self._waiting += 1
        if not self._shared_order:
            heapq.heappush(queue.by_arrival, (request.request_id, self._serial, request))
            heapq.heappush(self._by_arrival, (request.arrival_us, self._serial))
        if queue.heap[0] is entry:
            self._consider(queue)

    def _consider(self, queue: DeploymentQueue) -> None:
        """Let the head of a queue go next, where it does."""
        if not queue.paused and not queue.is_set_aside and (entry := queue.head()) is not None:
            heapq.heappush(self._heads, (entry, queue))

    def _forget(self, serials: Iterable[int]) -> None:
        """Note that requests wait no longer."""
        if not self._shared_order:
            self._gone.update(serials)

    # The next request

    def next(self, now_us: Micros, blocked_mask: int) -> Head | None:
        """Return the request that goes next; None if none waits or all are blocked.

        Args:
            now_us: the present, for the bound on waiting.
            blocked_mask: a bit for each GPU on which nothing may start now.
        """
        if not self._waiting:
            return None
        if self._shared_order:
            queue = self._first(0)
            if queue is None or queue.gpu_mask & blocked_mask:
                return None
            return Head(queue, queue.heap[0][4], overdue=False)
        overdue, held_mask = self._overdue(now_us, blocked_mask)
        if overdue:
            return overdue
        queue = self._first(blocked_mask | held_mask)
        return Head(queue, queue.heap[0][4], overdue=False) if queue else None

    def _first(self, blocked_mask: int) -> DeploymentQueue | None:
        """Return the queue whose head goes first, among those that use no blocked GPU."""
        self._take_back(blocked_mask)
        heads = self._heads
        while heads:
            entry, queue = heads[0]
            if queue.paused or queue.is_set_aside or queue.head() is not entry:
                heapq.heappop(heads)
            elif blocking := queue.gpu_mask & blocked_mask:
                heapq.heappop(heads)
                self._set_aside(queue, blocking & -blocking)
            else:
                return queue
        return None

    def _set_aside(self, queue: DeploymentQueue, gpu_bit: int) -> None:
        queue.is_set_aside = True
        self._aside.setdefault(gpu_bit, []).append(queue)
        self._aside_mask |= gpu_bit

    def _take_back(self, blocked_mask: int) -> None:
        """Consider the queues again that wait for a GPU that is blocked no longer."""
        freed = self._aside_mask ^ (self._aside_mask & blocked_mask)
        self._aside_mask ^= freed
        while freed:
            gpu_bit = freed & -freed
            freed ^= gpu_bit
            for queue in self._aside.pop(gpu_bit):
                queue.is_set_aside = False
                self._consider(queue)

    def _overdue(self, now_us: Micros, blocked_mask: int) -> tuple[Head | None, int]:
        """Return the first overdue request that can go, and the GPUs held for others."""
        latest_us = now_us - self._max_wait_us
        while self._by_arrival and self._by_arrival[0][1] in self._gone:
            self._gone.discard(heapq.heappop(self._by_arrival)[1])
        if not self._by_arrival or self._by_arrival[0][0] >= latest_us:
            return None, 0
        late = []
        for queue in self._queues.values():
            oldest = queue.oldest()
            if oldest and not queue.paused and oldest.arrival_us < latest_us:
                late.append((oldest.request_id, Head(queue, oldest, overdue=True)))
        held_mask = 0
        for _, head in sorted(late, key=lambda item: item[0]):
            if not head.queue.gpu_mask & (blocked_mask | held_mask):
                return head, held_mask
            held_mask |= head.queue.gpu_mask
        return None, held_mask

    def take(self, head: Head, maximum: int) -> tuple[Request, ...]:
        """Take a batch: the head, and up to `maximum - 1` more requests of its queue by rank."""
        queue = head.queue
        taken = []
        if head.overdue:
            _, serial, request = heapq.heappop(queue.by_arrival)
            queue.taken_by_arrival.add(serial)
            self._forget([serial])
            taken.append(request)
        while len(taken) < maximum and queue.head():
            _, _, _, serial, request = heapq.heappop(queue.heap)
            if not self._shared_order:
                queue.taken_by_rank.add(serial)
                self._gone.add(serial)
            taken.append(request)
        self._waiting -= len(taken)
        self._consider(queue)
        return tuple(taken)
