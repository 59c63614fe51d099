"""A controller with continuous engines: every request ends once, whatever is cancelled or removed."""

from dataclasses import replace
from heapq import heappop, heappush
from itertools import count

import hypothesis.strategies as st
from clocked_engines import request, stepped
from fixtures import FixedPlacement, cluster, endpoint_spec, predict_service_time
from hypothesis import given, settings

from maveriq.control.controller import CLIENT_GONE, Controller, ControllerSettings
from maveriq.control.events import (
    Abort,
    Action,
    EndpointAdded,
    EndpointRemoved,
    EngineUp,
    Event,
    RequestArrived,
    RequestCancelled,
    StartEngine,
    StopEngine,
    Submit,
)
from maveriq.domain.deployments import Batching
from maveriq.domain.requests import RequestStatus
from maveriq.scenario.stepped_engine import SteppedEngine

SETTINGS = {"kind": "vllm", "max_num_seqs": 4, "max_num_batched_tokens": 64}


def carry_out(action: Action, engines: dict[int, SteppedEngine], now_us: int) -> None:
    match action:
        case StartEngine(deployment_id, _, _):
            engines[deployment_id] = stepped(SETTINGS, 24, deployment_id=deployment_id)
        case Submit(deployment_id, asked):
            engines[deployment_id].submit(now_us, asked)
        case Abort(deployment_id, request_id):
            engines[deployment_id].abort(now_us, request_id)
        case StopEngine(deployment_id):
            del engines[deployment_id]


def run(events: list[tuple[int, Event]]) -> Controller:
    """Run one endpoint with two engines until nothing is left to do."""
    policy = FixedPlacement({1: [(0,), (1,)]})
    controller = Controller(cluster(2), policy, ControllerSettings(), predict_service_time)
    engines: dict[int, SteppedEngine] = {}
    numbers = count()
    agenda: list[tuple[int, int, Event | None]] = []
    for at_us, event in events:
        heappush(agenda, (at_us, next(numbers), event))
    while agenda:
        now_us, inbox = agenda[0][0], []
        while agenda and agenda[0][0] == now_us:
            event = heappop(agenda)[2]
            inbox += [event] if event is not None else []
        inbox += filter(None, [engine.finish(now_us) for engine in engines.values()])
        for action in controller.handle(now_us, inbox):
            if isinstance(action, StartEngine):
                heappush(agenda, (now_us, next(numbers), EngineUp(action.deployment_id, action.generation)))
            carry_out(action, engines, now_us)
        for engine in engines.values():
            engine.compose(now_us)
            if engine.next_us is not None:
                heappush(agenda, (engine.next_us, next(numbers), None))
    return controller


def added() -> EndpointAdded:
    return EndpointAdded(replace(endpoint_spec(1), batching=Batching.CONTINUOUS))


@st.composite
def loads(draw):
    """Requests, and cancellations of some of them."""
    number = draw(st.integers(1, 15))
    arrivals_us = sorted(draw(st.lists(st.integers(1, 60_000), min_size=number, max_size=number)))
    requests = [
        request(at, when, draw(st.integers(1, 120)), draw(st.integers(1, 120)))
        for at, when in enumerate(arrivals_us, start=1)
    ]
    cancelled = draw(st.lists(st.sampled_from(requests), unique_by=lambda each: each.request_id, max_size=6))
    return requests, {each.request_id: each.arrival_us + draw(st.integers(0, 90_000)) for each in cancelled}


@settings(max_examples=40)
@given(loads())
def test_every_request_ends_once_whatever_is_cancelled(load):
    requests, cancelled = load
    controller = run(
        [
            (0, added()),
            *((each.arrival_us, RequestArrived(each)) for each in requests),
            *((at_us, RequestCancelled(request_id)) for request_id, at_us in cancelled.items()),
        ]
    )
    for each in requests:
        row = controller.tracker.row(each.request_id)
        cancelled_us = cancelled.get(each.request_id)
        if row.status is RequestStatus.FAILED:
            assert (cancelled_us is not None, row.reason) == (True, CLIENT_GONE)
        else:
            assert row.status is RequestStatus.COMPLETED
            assert each.arrival_us <= row.start_us < row.first_token_us <= row.finish_us
            assert cancelled_us is None or row.finish_us <= cancelled_us
    assert not any(deployment.is_busy for deployment in controller.manager.deployments.values())


def test_a_request_that_is_cancelled_makes_room_at_once():
    """Both engines have four seats, and eight long requests take them all."""
    long, last = [request(number, 1, 8, 120) for number in range(1, 9)], request(9, 2, 8, 2)
    arrived = [(each.arrival_us, RequestArrived(each)) for each in (*long, last)]
    waiting = run([(0, added()), *arrived]).tracker.row(9)
    cancelled = [(10_000, RequestCancelled(each.request_id)) for each in long]
    served = run([(0, added()), *arrived, *cancelled]).tracker.row(9)
    assert waiting.start_us > 30_000
    assert 10_000 < served.start_us < 12_000


@settings(max_examples=15)
@given(loads(), st.integers(1, 90_000))
def test_an_endpoint_that_is_removed_finishes_what_its_engines_have(load, removed_us):
    requests, _ = load
    controller = run(
        [
            (0, added()),
            (removed_us, EndpointRemoved(1)),
            *((each.arrival_us, RequestArrived(each)) for each in requests),
        ]
    )
    for each in requests:
        expected = RequestStatus.REFUSED if each.arrival_us >= removed_us else RequestStatus.COMPLETED
        assert controller.tracker.row(each.request_id).status is expected
    assert not any(map(controller.manager.holds_memory, controller.manager.deployments.values()))
