"""The request queue chooses as a plain search over all waiting requests does, whatever happened before."""

import math

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from maveriq.control.queues import QueueDiscipline, RequestQueue, rank_of
from maveriq.domain.requests import Request

MAX_WAIT_US = 30
DEPLOYMENTS = {1: 0b0001, 2: 0b0011, 3: 0b0100, 4: 0b1100, 5: 0b1000}


class PlainQueue:
    """Looks at every waiting request."""

    def __init__(self, discipline):
        self._discipline = discipline
        self._waiting = {number: [] for number in DEPLOYMENTS}
        self._paused = set()
        self._serial = 0

    def push(self, request, deployment, service_us):
        rank = -request.request_id if request.priority else rank_of(self._discipline, request, service_us)
        self._add(deployment, 0 if request.priority else 1, rank, request)

    def push_front(self, request, deployment):
        self._add(deployment, 0, -math.inf, request)

    def _add(self, deployment, urgency, rank, request):
        self._serial += 1
        self._waiting[deployment].append((urgency, rank, request.request_id, self._serial, request))

    def pause(self, deployment):
        self._paused.add(deployment)

    def resume(self, deployment):
        self._paused.discard(deployment)

    def remove(self, request_id, deployment):
        before = self._waiting[deployment]
        self._waiting[deployment] = [entry for entry in before if entry[2] != request_id]
        return len(before) > len(self._waiting[deployment])

    def take(self, now_us, blocked, maximum):
        ready = {number: entries for number, entries in self._waiting.items() if entries and number not in self._paused}
        if self._discipline is QueueDiscipline.FIFO:
            first = min(ready, key=lambda number: min(ready[number]), default=None)
            return [] if first is None or DEPLOYMENTS[first] & blocked else self._taken(first, None, maximum)
        oldest = sorted((min(entry[2:] for entry in entries)[0], number) for number, entries in ready.items())
        for request_id, number in oldest:
            arrival_us = next(entry[4].arrival_us for entry in ready[number] if entry[2] == request_id)
            if arrival_us < now_us - MAX_WAIT_US:
                if not DEPLOYMENTS[number] & blocked:
                    return self._taken(number, request_id, maximum)
                blocked |= DEPLOYMENTS[number]
        free = [number for number in ready if not DEPLOYMENTS[number] & blocked]
        return self._taken(min(free, key=lambda number: min(ready[number])), None, maximum) if free else []

    def _taken(self, number, overdue_id, maximum):
        entries = sorted(self._waiting[number], key=lambda entry: (entry[2] != overdue_id, entry[:4]))
        self._waiting[number] = entries[maximum:]
        return [entry[2] for entry in entries[:maximum]]


OPERATIONS = st.lists(
    st.tuples(
        st.sampled_from(["push", "push", "push", "front", "take", "take", "take", "pause", "resume", "remove"]),
        st.sampled_from(sorted(DEPLOYMENTS)),
        st.integers(0, 15),
        st.integers(1, 3),
        st.booleans(),
    ),
    max_size=50,
)


@settings(max_examples=30)
@pytest.mark.parametrize("discipline", QueueDiscipline)
@given(operations=OPERATIONS)
def test_it_chooses_as_a_search_over_all_requests_does(discipline, operations):
    queue, plain = RequestQueue(discipline, MAX_WAIT_US), PlainQueue(discipline)
    for number, gpu_mask in DEPLOYMENTS.items():
        queue.open_queue(number, gpu_mask)
    for step, (what, deployment, number, count, flag) in enumerate(operations, start=1):
        now_us = 5 * step
        request = Request(
            request_id=step, endpoint_id=1, arrival_us=now_us, prompt_tokens=1, output_tokens=1, slo_us=10 * number,
            priority=flag and number < 3,
        )  # fmt: skip
        if what == "push":
            queue.push(request, deployment, service_us=number)
            plain.push(request, deployment, number)
        elif what == "front":
            queue.push_front(request, deployment)
            plain.push_front(request, deployment)
        elif what == "take":
            head = queue.next(now_us, number)
            taken = queue.take(head, count) if head else ()
            assert [request.request_id for request in taken] == plain.take(now_us, number, count)
        elif what == "remove":
            assert queue.remove(step - number, deployment) == plain.remove(step - number, deployment)
        else:
            for each in (queue, plain):
                getattr(each, what)(deployment)
