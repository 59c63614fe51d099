"""Laws of the controller with continuous engines under events in any order: late, repeated, or unknown."""

from dataclasses import replace

import hypothesis.strategies as st
from fixtures import endpoint_spec, make_controller
from hypothesis import given, settings

from maveriq.control.controller import OnFailure, OnLoss
from maveriq.control.deployment_manager import Deployment
from maveriq.control.events import (
    Abort,
    EndpointAdded,
    EndpointRemoved,
    EngineDown,
    EngineProgress,
    EngineRepaired,
    EngineUp,
    Event,
    Finished,
    GpuDown,
    GpuUp,
    RequestArrived,
    RequestCancelled,
    Started,
    StartEngine,
    StopEngine,
    Submit,
)
from maveriq.control.routing_policies import RoutingRule
from maveriq.domain.deployments import Batching
from maveriq.domain.requests import FINAL_STATUSES, Request, RequestStatus

ENDPOINTS = {1: [(0,), (1,)], 2: [(1, 2)], 3: [(2,), (3,), (0,)]}
DEPLOYMENTS = st.integers(1, 7)
STEPS = st.sampled_from(
    ["arrive", "arrive", "start", "start", "first", "finish", "preempt", "late", "up", "up", "down", "lost", "repair",
     "cancel", "remove", "no gpu", "gpu"]
)  # fmt: skip
ROUTERS = [None, *(rule for rule in RoutingRule if not rule.predicts_service_time)]


class _ScriptedEngines:
    """Sends scripted events to a controller, and knows what the engines were given."""

    def __init__(self, **options) -> None:
        self.ended: list[int] = []
        self.controller = make_controller(ENDPOINTS, on_request_end=self.ended.append, **options)
        self.now_us = self.arrived = 0
        self.generation: dict[int, int] = {}
        self.given_to: dict[int, dict[int, bool]] = {}  # requests of each engine, and whether it has begun them
        for number in ENDPOINTS:
            self.send(EndpointAdded(replace(endpoint_spec(number), batching=Batching.CONTINUOUS)))

    def send(self, *events: Event) -> None:
        self.now_us += 1
        for action in self.controller.handle(self.now_us, events):
            match action:
                case StartEngine(number, generation, _):
                    self.generation[number] = generation
                    self.given_to[number] = {}
                case StopEngine(number):
                    self.given_to.pop(number)
                case Submit(number, request):
                    assert request.request_id not in self.given_to[number]
                    self.given_to[number][request.request_id] = False
                case Abort(number, request_id):
                    self.given_to[number].pop(request_id)

    def report(self, number: int, request_id: int, what: str) -> None:
        """Let an engine report on a request that it has, or has not any more."""
        event = EngineProgress(number, self.generation.get(number, 1))
        begun = self.given_to.get(number, {})
        has_begun = begun.get(request_id, False)
        if what == "start" and begun.get(request_id) is False:
            begun[request_id] = True
            event.started = [Started(request_id, self.now_us + 1)]
        elif what == "first" and has_begun:
            event.first_tokens = [request_id]
        elif what == "preempt" and has_begun:
            event.preempted = [request_id]
        elif what == "finish" and has_begun:
            del begun[request_id]
            event.finished = [Finished(request_id, 3)]
        elif what == "late":  # of an engine before, or of a request that it was to abort
            event.generation -= request_id % 2
            if not has_begun and request_id not in begun:
                event.finished = [Finished(request_id, 3)]
        self.send(event)

    def perform(self, what: str, number: int, choice: int) -> None:
        match what:
            case "arrive":
                self.arrived += 1
                self.send(RequestArrived(self._request(choice)))
            case "start" | "first" | "finish" | "preempt" | "late":
                of_engine = list(self.given_to.get(number, {})) or [choice]
                self.report(number, choice if what == "late" else of_engine[choice % len(of_engine)], what)
            case "up":
                self.send(EngineUp(number, self.generation.get(number, choice), 1_000))
            case "down" | "lost":
                if self.controller.manager.deployments[number].alive:
                    self.given_to[number] = {}  # it takes its requests along
                self.send(EngineDown(number, returns=what == "down"))
            case "remove":
                if choice == 1:
                    self.send(EndpointRemoved(1 + number % 3))
            case _:
                others = {
                    "repair": EngineRepaired(number),
                    "cancel": RequestCancelled(choice),
                    "no gpu": GpuDown(choice % 4, returns=choice % 3 > 0),
                    "gpu": GpuUp(choice % 4),
                }
                self.send(others[what])

    def _request(self, choice: int) -> Request:
        return Request(
            request_id=self.arrived,
            endpoint_id=1 + choice % 3,
            arrival_us=self.now_us + 1,
            prompt_tokens=choice,
            output_tokens=3,
            prompt_id=choice % 4,
            session_id=choice % 5,
        )

    @property
    def deployments(self) -> list[Deployment]:
        return list(self.controller.manager.deployments.values())


@given(
    st.lists(st.tuples(STEPS, DEPLOYMENTS, st.integers(1, 30)), max_size=120),
    st.sampled_from(ROUTERS),
    st.sampled_from(OnFailure),
    st.sampled_from(OnLoss),
)
@settings(max_examples=250, deadline=None)
def test_requests_end_once_and_none_is_lost_under_any_events(script, router, on_failure, on_loss) -> None:
    engines = _ScriptedEngines(router=router, on_failure=on_failure, on_loss=on_loss)
    tracker, manager = engines.controller.tracker, engines.controller.manager
    for what, number, choice in script:
        if number not in manager.deployments:
            continue
        engines.perform(what, number, choice)
        waiting, running = (tracker.count(status) for status in (RequestStatus.WAITING, RequestStatus.RUNNING))
        assert sum(each.outstanding for each in engines.deployments) == waiting + running
        assert len(engines.ended) + waiting + running == engines.arrived
        for each in engines.deployments:
            assert each.in_engine.keys() == engines.given_to.get(each.deployment_id, {}).keys()
            unbegun = [asked for number, asked in each.in_engine.items() if not tracker.is_running(number)]
            assert each.unbegun_tokens == sum(asked.prompt_tokens for asked in unbegun)
    assert len(set(engines.ended)) == len(engines.ended)
    table = tracker.close()
    assert set(table.status.tolist()) <= {status.value for status in FINAL_STATUSES}
    assert sum(table.counts().values()) == engines.arrived
