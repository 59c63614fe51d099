"""Laws of the controller under any events in any order, as a real body may tell them: late, twice, of nothing."""

import hypothesis.strategies as st
from fixtures import controller, endpoint_spec
from hypothesis import given, settings

from maveriq.control.controller import OnFailure
from maveriq.control.events import (
    Action,
    EndpointAdded,
    EndpointRemoved,
    EngineDown,
    EngineRepaired,
    EngineUp,
    Event,
    Execute,
    ExecutionFailed,
    ExecutionFinished,
    GpuDown,
    GpuUp,
    RequestArrived,
    RequestCancelled,
    StartEngine,
)
from maveriq.control.queues import QueueDiscipline
from maveriq.domain.requests import FINAL_STATUSES, Request, RequestStatus

ENDPOINTS = {1: [(0,)], 2: [(0, 1)], 3: [(2,), (3,)]}
DEPLOYMENTS = st.integers(1, 4)
SOMETHING = st.sampled_from(
    ["arrive", "finish", "finish", "fail", "up", "up", "down", "lost", "repair", "cancel", "remove", "no gpu", "gpu"]
)


class _World:
    """A body that knows nothing: it tells the controller what a script says, and keeps what it is told to do."""

    def __init__(self, **settings) -> None:
        self.ended: list[int] = []
        self.brain = controller(ENDPOINTS, on_request_end=self.ended.append, **settings)
        self.now_us = 0
        self.arrived = 0
        self.started: dict[int, StartEngine] = {}
        self.executions: dict[int, Execute] = {}
        for endpoint in ENDPOINTS:
            self.tell(EndpointAdded(endpoint_spec(endpoint)))

    def tell(self, *events: Event) -> None:
        self.now_us += 1
        for action in self.brain.handle(self.now_us, events):
            self._keep(action)

    def _keep(self, action: Action) -> None:
        match action:
            case StartEngine():
                self.started[action.deployment_id] = action
            case Execute():
                self.executions[action.deployment_id] = action

    def happen(self, what: str, deployment_id: int, number: int) -> None:
        execution = self.executions.get(deployment_id)
        execution_id = execution.execution_id if execution else number
        match what:
            case "arrive":
                self.arrived += 1
                self.tell(RequestArrived(self._request(number)))
            case "finish":
                # Sometimes a late word of the execution before.
                counts = tuple(1 for _ in execution.requests) if execution and number % 2 else None
                self.tell(ExecutionFinished(deployment_id, execution_id - number % 5 // 4, self.now_us, counts))
            case "fail":
                self.tell(ExecutionFailed(deployment_id, execution_id, "no room"))
            case "cancel":
                self.tell(RequestCancelled(number))
            case "remove":
                if number == 1:
                    self.tell(EndpointRemoved(deployment_id))
            case _:
                self._happen_to_machines(what, deployment_id, number)

    def _happen_to_machines(self, what: str, deployment_id: int, number: int) -> None:
        match what:
            case "up":
                start = self.started.get(deployment_id)
                self.tell(EngineUp(deployment_id, start.generation if start else number))
            case "down" | "lost":
                self.tell(EngineDown(deployment_id, returns=what == "down"))
            case "repair":
                self.tell(EngineRepaired(deployment_id))
            case "no gpu":
                self.tell(GpuDown(number % 4, returns=number % 3 > 0))
            case "gpu":
                self.tell(GpuUp(number % 4))

    def _request(self, number: int) -> Request:
        return Request(
            request_id=self.arrived,
            endpoint_id=1 + number % 3,
            arrival_us=self.now_us + 1,
            prompt_tokens=1,
            output_tokens=3,
            slo_us=number,
            priority=number % 7 == 0,
        )


@given(
    st.lists(st.tuples(SOMETHING, DEPLOYMENTS, st.integers(1, 30)), max_size=120),
    st.sampled_from(QueueDiscipline),
    st.sampled_from(OnFailure),
)
@settings(max_examples=250, deadline=None)
def test_whatever_is_told_requests_end_once_and_none_is_lost(script, discipline, on_failure) -> None:
    world = _World(discipline=discipline, on_failure=on_failure, max_wait_us=20)
    brain = world.brain
    for what, deployment_id, number in script:
        world.happen(what, deployment_id, number)
        waiting, running = (brain.tracker.count(one) for one in (RequestStatus.WAITING, RequestStatus.RUNNING))
        assert len(brain.queue) == waiting
        assert sum(len(one.running) for one in brain.manager.deployments.values()) == running
        assert len(world.ended) + waiting + running == world.arrived
        assert all(map(brain.tracker.is_running, brain._cancelled_ids))
    assert len(set(world.ended)) == len(world.ended)
    table = brain.tracker.close()
    assert set(table.status.tolist()) <= {status.value for status in FINAL_STATUSES}
    assert sum(table.counts().values()) == world.arrived
