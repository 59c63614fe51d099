"""Laws of the controller under events in any order, as real engines may cause them: late, repeated, or unknown."""

import hypothesis.strategies as st
from fixtures import endpoint_spec, make_controller
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
STEPS = st.sampled_from(
    ["arrive", "finish", "finish", "fail", "up", "up", "down", "lost", "repair", "cancel", "remove", "no gpu", "gpu"]
)


class _ScriptedExecutor:
    """Sends scripted events to a controller and keeps the actions that it returns."""

    def __init__(self, **settings) -> None:
        self.ended: list[int] = []
        self.controller = make_controller(ENDPOINTS, on_request_end=self.ended.append, **settings)
        self.now_us = 0
        self.arrived = 0
        self.started: dict[int, StartEngine] = {}
        self.executions: dict[int, Execute] = {}
        for endpoint in ENDPOINTS:
            self.send_events(EndpointAdded(endpoint_spec(endpoint)))

    def send_events(self, *events: Event) -> None:
        self.now_us += 1
        for action in self.controller.handle(self.now_us, events):
            self._keep(action)

    def _keep(self, action: Action) -> None:
        match action:
            case StartEngine():
                self.started[action.deployment_id] = action
            case Execute():
                self.executions[action.deployment_id] = action

    def perform(self, what: str, deployment_id: int, number: int) -> None:
        execution = self.executions.get(deployment_id)
        execution_id = execution.execution_id if execution else number
        match what:
            case "arrive":
                self.arrived += 1
                self.send_events(RequestArrived(self._request(number)))
            case "finish":
                # Sometimes this reports the execution before, too late.
                counts = tuple(1 for _ in execution.requests) if execution and number % 2 else None
                self.send_events(ExecutionFinished(deployment_id, execution_id - number % 5 // 4, self.now_us, counts))
            case "fail":
                self.send_events(ExecutionFailed(deployment_id, execution_id, "no room"))
            case "cancel":
                self.send_events(RequestCancelled(number))
            case "remove":
                if number == 1:
                    self.send_events(EndpointRemoved(deployment_id))
            case _:
                self._perform_on_machines(what, deployment_id, number)

    def _perform_on_machines(self, what: str, deployment_id: int, number: int) -> None:
        match what:
            case "up":
                start = self.started.get(deployment_id)
                self.send_events(EngineUp(deployment_id, start.generation if start else number))
            case "down" | "lost":
                self.send_events(EngineDown(deployment_id, returns=what == "down"))
            case "repair":
                self.send_events(EngineRepaired(deployment_id))
            case "no gpu":
                self.send_events(GpuDown(number % 4, returns=number % 3 > 0))
            case "gpu":
                self.send_events(GpuUp(number % 4))

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
    st.lists(st.tuples(STEPS, DEPLOYMENTS, st.integers(1, 30)), max_size=120),
    st.sampled_from(QueueDiscipline),
    st.sampled_from(OnFailure),
)
@settings(max_examples=250, deadline=None)
def test_requests_end_once_and_none_is_lost_under_any_events(script, discipline, on_failure) -> None:
    executor = _ScriptedExecutor(discipline=discipline, on_failure=on_failure, max_wait_us=20)
    controller = executor.controller
    for what, deployment_id, number in script:
        executor.perform(what, deployment_id, number)
        waiting, running = (
            controller.tracker.count(status) for status in (RequestStatus.WAITING, RequestStatus.RUNNING)
        )
        assert len(controller.queue) == waiting
        assert sum(len(deployment.running) for deployment in controller.manager.deployments.values()) == running
        assert len(executor.ended) + waiting + running == executor.arrived
        assert all(map(controller.tracker.is_running, controller._cancelled_ids))
    assert len(set(executor.ended)) == len(executor.ended)
    table = controller.tracker.close()
    assert set(table.status.tolist()) <= {status.value for status in FINAL_STATUSES}
    assert sum(table.counts().values()) == executor.arrived
