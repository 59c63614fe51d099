"""The controller: events and the actions that it returns."""

from dataclasses import replace

import pytest
from fixtures import arrivals, cluster, endpoint_spec, make_controller, plan, run, scenario

from maveriq.control.controller import Controller, ControllerSettings, OnFailure, OnLoss
from maveriq.control.deployment_manager import MAX_REPLACEMENTS
from maveriq.control.events import (
    EndpointAdded,
    EndpointRemoved,
    EngineDown,
    EngineRepaired,
    EngineUp,
    Execute,
    ExecutionFailed,
    ExecutionFinished,
    GpuDown,
    GpuUp,
    RequestArrived,
    RequestCancelled,
    StartEngine,
    StopEngine,
)
from maveriq.control.queues import QueueDiscipline
from maveriq.control.routing_policies import RoutingRule
from maveriq.domain.cluster import DispatchTiming
from maveriq.domain.faults import Fault, FaultTarget, parse_fault
from maveriq.domain.requests import Request, RequestStatus
from maveriq.errors import InvariantError
from maveriq.policy.policy import Deploy
from maveriq.sim.simulator import simulate
from maveriq.units import MICROS_PER_SECOND


def request(number: int, endpoint: int = 1, at_us: int = 0, **more) -> Request:
    return Request(
        request_id=number,
        endpoint_id=endpoint,
        arrival_us=at_us,
        prompt_tokens=1,
        output_tokens=more.pop("tokens", 10),
        **more,
    )


def up(gpus_of, **settings) -> Controller:
    """A controller whose endpoints are all up at time 0."""
    controller = make_controller(gpus_of, **settings)
    for endpoint in gpus_of:
        for start in controller.handle(0, [EndpointAdded(endpoint_spec(endpoint))]):
            assert controller.handle(0, [EngineUp(start.deployment_id, start.generation)]) == []
    return controller


def ids(actions) -> list[int]:
    return [request.request_id for action in actions if isinstance(action, Execute) for request in action.requests]


def statuses(controller: Controller) -> list[str]:
    return [RequestStatus(value).label for value in controller.tracker.close().status]


def test_a_deployment_loads_registers_and_serves() -> None:
    controller = make_controller({1: [(0, 1)]})
    (start,) = controller.handle(0, [EndpointAdded(endpoint_spec(1))])
    assert start == StartEngine(1, 1, plan((0, 1)))
    assert controller.handle(5, [EngineUp(1, 1)]) == []
    (execute,) = controller.handle(7, [RequestArrived(request(1, at_us=7))])
    assert (execute.deployment_id, ids([execute])) == (1, [1])
    assert controller.handle(9, [ExecutionFinished(1, execute.execution_id, 8)]) == []
    table = controller.tracker.close()
    assert (table.start_us[0], table.first_token_us[0], table.finish_us[0]) == (7, 8, 9)


@pytest.mark.parametrize(
    ("prepare", "reason"),
    [
        (lambda controller: None, "nothing was deployed for endpoint 1"),
        (
            lambda controller: controller.handle(0, [EndpointAdded(endpoint_spec(1))]),
            "deployment 1 (tiny) is still loading",
        ),
    ],
)
def test_requests_to_a_deployment_that_is_not_up_are_refused(prepare, reason: str) -> None:
    controller = make_controller({1: [(0,)]})
    prepare(controller)
    controller.handle(1, [RequestArrived(request(1, at_us=1))])
    table = controller.tracker.close()
    assert table.status[0] == RequestStatus.REFUSED
    assert table.reasons[table.reason[0]] == reason


def test_a_rejected_endpoint_is_recorded_and_refuses_requests() -> None:
    controller = make_controller({1: []})
    assert controller.handle(0, [EndpointAdded(endpoint_spec(1))]) == []
    controller.handle(1, [RequestArrived(request(1, at_us=1))])
    table = controller.tracker.close()
    assert table.reasons[table.reason[0]] == "deployment 1 (tiny) was rejected"
    assert controller.manager.deployments[1].record().reason == "rejected by the test policy"


def test_fifo_blocks_behind_its_first_request() -> None:
    controller = up({1: [(0, 1)], 2: [(2,)], 3: [(0,)]})
    assert ids(controller.handle(1, [RequestArrived(request(1, 3, 1))])) == [1]
    assert ids(controller.handle(2, [RequestArrived(request(2, 1, 2))])) == []  # GPU 0 is busy
    assert ids(controller.handle(3, [RequestArrived(request(3, 2, 3))])) == []  # GPU 2 is idle, but 2 comes first
    assert ids(controller.handle(4, [ExecutionFinished(3, 1, 4)])) == [2, 3]


def test_fifo_per_model_does_not_block_other_models() -> None:
    controller = up({1: [(0, 1)], 2: [(2,)], 3: [(0,)]}, discipline=QueueDiscipline.FIFO_PER_MODEL)
    controller.handle(1, [RequestArrived(request(1, 3, 1))])
    controller.handle(2, [RequestArrived(request(2, 1, 2))])
    assert ids(controller.handle(3, [RequestArrived(request(3, 2, 3))])) == [3]


def test_priority_requests_go_first_latest_first() -> None:
    controller = up({1: [(0,)]})
    controller.handle(1, [RequestArrived(request(1, at_us=1))])
    controller.handle(2, [RequestArrived(request(2, at_us=2))])
    controller.handle(3, [RequestArrived(request(3, at_us=3, priority=True))])
    controller.handle(4, [RequestArrived(request(4, at_us=4, priority=True))])
    served = []
    for execution in range(1, 5):
        served += ids(controller.handle(10 * execution, [ExecutionFinished(1, execution, 10 * execution)]))
    assert served == [4, 3, 2]


def test_shortest_first_and_earliest_deadline_first() -> None:
    for discipline, expected in ((QueueDiscipline.SJF, [4, 3, 2]), (QueueDiscipline.EDF, [3, 2, 4])):
        controller = up({1: [(0,)]}, discipline=discipline)
        controller.handle(1, [RequestArrived(request(1, at_us=1))])
        controller.handle(2, [RequestArrived(request(2, at_us=2, tokens=90, slo_us=900))])
        controller.handle(3, [RequestArrived(request(3, at_us=3, tokens=50, slo_us=100))])
        controller.handle(4, [RequestArrived(request(4, at_us=4, tokens=10))])  # without an SLO: last of all for EDF
        served = []
        for execution in range(1, 4):
            served += ids(controller.handle(10 * execution, [ExecutionFinished(1, execution, 10 * execution)]))
        assert served == expected, discipline


def test_a_batch_takes_waiting_requests_without_delay() -> None:
    requests = arrivals([10, 11, 12, 13, 14], [1] * 5, [1, 7, 5, 3, 2])
    table = run(requests, {1: [(0,)]}, gpus=1, batch_size=3).requests
    assert table.start_us.tolist() == [10, 1_010, 1_010, 1_010, 8_010]
    assert table.finish_us.tolist() == [1_010, 8_010, 8_010, 8_010, 10_010]  # the longest request determines the time


def served_by(controller: Controller, count: int, tokens=lambda number: 10) -> list[int]:
    """Send requests, of which none finishes; return the replica of each."""
    for number in range(1, count + 1):
        controller.handle(number, [RequestArrived(request(number, at_us=number, tokens=tokens(number)))])
    return controller.tracker.close().deployment_id.tolist()


def test_least_work_counts_committed_requests() -> None:
    controller = up({1: [(0,), (1,)]}, router=RoutingRule.LEAST_WORK)
    assert served_by(controller, 5, tokens=lambda number: 100 if number == 1 else 10) == [1, 2, 2, 2, 2]


def test_exclusive_engines_are_routed_to_at_random_which_depends_only_on_the_seed() -> None:
    three = {1: [(0,), (1,), (2,)]}
    given = served_by(up(three, seed=1), 3_000)
    assert all(abs(given.count(replica) - 1_000) < 100 for replica in (1, 2, 3))
    assert given[:50] != served_by(up(three, seed=2), 50)
    assert given[:50] == served_by(up(three, seed=1), 50)


@pytest.mark.parametrize("choice", RoutingRule)
def test_a_replica_that_is_up_is_preferred_to_one_that_is_down(choice: RoutingRule) -> None:
    controller = up({1: [(0,), (1,)]}, router=choice)
    controller.handle(0, [EngineDown(1, returns=True)])
    assert set(served_by(controller, 20)) == {2}


def test_removal_refuses_waiting_requests_and_finishes_running_ones() -> None:
    controller = up({1: [(0,)]})
    controller.handle(1, [RequestArrived(request(1, at_us=1))])
    controller.handle(2, [RequestArrived(request(2, at_us=2))])
    assert controller.handle(3, [EndpointRemoved(1)]) == []
    assert controller.manager.used_bytes(0) > 0
    controller.handle(4, [RequestArrived(request(3, at_us=4))])
    assert controller.handle(5, [ExecutionFinished(1, 1, 5)]) == [StopEngine(1)]
    assert controller.manager.used_bytes(0) == 0
    assert statuses(controller) == ["completed", "refused", "refused"]
    assert controller.manager.deployments[1].record().removed_us == 5


def test_removal_of_an_idle_deployment_stops_it_at_once() -> None:
    assert up({1: [(0,)]}).handle(3, [EndpointRemoved(1)]) == [StopEngine(1)]


@pytest.mark.parametrize("returns", [True, False])
@pytest.mark.parametrize("on_failure", OnFailure)
def test_requests_of_a_failed_engine(on_failure: OnFailure, *, returns: bool) -> None:
    controller = up({1: [(0,)]}, on_failure=on_failure)
    controller.handle(1, [RequestArrived(request(1, at_us=1))])
    controller.handle(2, [RequestArrived(request(2, at_us=2))])
    controller.handle(3, [EngineDown(1, returns)])
    controller.handle(4, [RequestArrived(request(3, at_us=4))])
    assert controller.handle(5, [ExecutionFinished(1, 1, 5)]) == []  # a late message of the dead engine
    if not returns:
        lost = "refused" if on_failure is OnFailure.REQUEUE else "failed"
        assert controller.manager.used_bytes(0) == 0
        assert statuses(controller) == [lost, "refused", "refused"]
        return
    (start,) = controller.handle(6, [EngineRepaired(1)])
    assert start.generation == 2
    assert controller.handle(7, [EngineUp(1, 1)]) == []  # a late message of the first engine
    served = ids(controller.handle(8, [EngineUp(1, 2)]))
    assert served == ([1] if on_failure is OnFailure.REQUEUE else [2])


def test_a_request_is_requeued_once_then_failed() -> None:
    controller = up({1: [(0,)]})
    controller.handle(1, [RequestArrived(request(1, at_us=1))])
    for generation in (2, 3):
        controller.handle(10 * generation, [EngineDown(1, returns=True)])
        controller.handle(10 * generation + 1, [EngineRepaired(1)])
        controller.handle(10 * generation + 2, [EngineUp(1, generation)])
    table = controller.tracker.close()
    assert statuses_of(table) == ["failed"]
    assert table.reasons[table.reason[0]] == "deployment 1 (tiny): its engine failed"


def statuses_of(table) -> list[str]:
    return [RequestStatus(value).label for value in table.status]


def test_a_failed_gpu_takes_its_deployments_down_and_brings_them_back() -> None:
    controller = up({1: [(0, 1)], 2: [(1,)], 3: [(2,)]})
    controller.handle(1, [GpuDown(1, returns=True)])
    assert [deployment.state for deployment in controller.manager.deployments.values()] == ["down", "down", "up"]
    controller.handle(2, [RequestArrived(request(1, 1, 2))])
    assert ids(controller.handle(3, [RequestArrived(request(2, 3, 3))])) == [
        2
    ]  # a deployment that is down blocks no other
    assert [start.deployment_id for start in controller.handle(4, [GpuUp(1)])] == [1, 2]
    assert ids(controller.handle(5, [EngineUp(1, 2)])) == [1]


def test_requests_of_a_lost_replica_go_to_the_other() -> None:
    controller = up({1: [(0,), (1,)]}, router=RoutingRule.LEAST_WORK)
    for at in (1, 2, 3):
        controller.handle(at, [RequestArrived(request(at, at_us=at))])
    controller.handle(4, [EngineDown(1, returns=False)])
    assert ids(controller.handle(5, [ExecutionFinished(2, 1, 5)])) in ([1], [3])
    assert ids(controller.handle(6, [ExecutionFinished(2, 2, 6)])) in ([1], [3])
    assert statuses(controller).count("refused") == 0


def test_requests_of_a_lost_replica_keep_their_place_in_the_queue() -> None:
    controller = up({1: [(0,), (1,)], 2: [(1,)]}, router=RoutingRule.LEAST_WORK)
    controller.handle(1, [RequestArrived(request(1, 1, 1))])  # runs on GPU 0
    controller.handle(2, [RequestArrived(request(2, 2, 2))])  # runs on GPU 1
    controller.handle(3, [RequestArrived(request(3, 1, 3, tokens=50))])  # waits for the replica on GPU 1
    controller.handle(4, [RequestArrived(request(4, 1, 4))])  # waits for the replica on GPU 0
    controller.handle(5, [RequestArrived(request(5, 2, 5))])
    controller.handle(6, [EngineDown(1, returns=False)])
    served = []
    for at, finished in ((7, 3), (8, 2), (9, 2), (10, 2)):
        served += ids(
            controller.handle(
                at, [ExecutionFinished(finished, controller.manager.deployments[finished].execution_id, at)]
            )
        )
    assert served == [1, 3, 4, 5]


@pytest.mark.parametrize("discipline", [QueueDiscipline.FIFO_PER_MODEL, QueueDiscipline.SJF, QueueDiscipline.EDF])
def test_a_request_within_a_dispatch_delay_does_not_block_other_gpus(discipline: QueueDiscipline) -> None:
    controller = up({1: [(0,)], 2: [(1,)]}, discipline=discipline, timing=DispatchTiming(after_release_us=1_000))
    controller.handle(2_000, [RequestArrived(request(1, 1, 2_000))])
    controller.handle(2_001, [RequestArrived(request(2, 1, 2_001))])
    controller.handle(2_500, [ExecutionFinished(1, 1, 2_500)])
    assert controller.wake_us == 3_500
    assert ids(controller.handle(2_600, [RequestArrived(request(3, 2, 2_600))])) == [3]
    assert controller.wake_us == 3_500
    assert ids(controller.handle(3_500, [])) == [2]


def test_stop_actions_are_sent_only_for_existing_engines() -> None:
    controller = up({1: [(0, 1)]})
    assert controller.handle(1, [GpuDown(1, returns=True)]) == [StopEngine(1)]  # its rank on GPU 0 still runs
    assert controller.handle(2, [EndpointRemoved(1)]) == []
    assert up({1: [(0,)]}).handle(1, [EngineDown(1, returns=True)]) == []  # it is already dead
    leaving = up({1: [(0,)]})
    leaving.handle(1, [RequestArrived(request(1, at_us=1))])
    assert leaving.handle(2, [EndpointRemoved(1)]) == []  # its request may finish
    assert leaving.handle(3, [EngineDown(1, returns=False)]) == []  # it died before it could be stopped
    assert leaving.manager.used_bytes(0) == 0
    loading = make_controller({1: [(0,)]})
    loading.handle(0, [EndpointAdded(endpoint_spec(1))])
    assert loading.handle(1, [EndpointRemoved(1)]) == [StopEngine(1)]


@pytest.mark.parametrize(
    ("faults", "back_s"),
    [
        (["gpu=0@100s,for=200s", "gpu=0@150s,for=10s"], 300),
        (["gpu=0@100s,for=50s", "gpu=0@150s,for=50s"], 200),
        (["deployment=1@100s,for=200s", "deployment=1@150s,for=10s"], 300),
        (["gpu=0@100s,for=200s", "deployment=1@150s,for=10s"], 300),
        (["gpu=0@100s,for=10s", "deployment=1@105s,for=100s"], 205),
        (["gpu=0@100s", "gpu=0@50s,for=100s"], None),
        (["gpu=0@50s,for=0s"], 50),
    ],
)
def test_overlapping_faults_end_with_the_last(faults: list[str], back_s: int | None) -> None:
    times_us = [second * MICROS_PER_SECOND for second in range(10, 400)]
    table = run(
        arrivals(times_us, [1] * len(times_us), [100] * len(times_us)),
        {1: [(0,)]},
        faults=tuple(map(parse_fault, faults)),
    ).requests
    down_from_us = min(parse_fault(text).at_us for text in faults)
    later = table.start_us[table.start_us > down_from_us]
    assert (int(later[0]) // MICROS_PER_SECOND if len(later) else None) == back_s


def test_a_deployment_waits_until_all_its_gpus_are_idle() -> None:
    controller = up({1: [(0,)], 2: [(1,)]})
    controller.handle(1, [RequestArrived(request(1, 1, 1))])
    controller.handle(2, [RequestArrived(request(2, 2, 2))])
    late = controller.manager._policy.gpus_of
    late[3] = [(0, 1)]
    assert controller.handle(3, [EndpointAdded(endpoint_spec(3))]) == []
    assert controller.handle(4, [ExecutionFinished(1, 1, 4)]) == []
    (start,) = controller.handle(5, [ExecutionFinished(2, 1, 5)])
    assert isinstance(start, StartEngine)


def test_a_policy_that_overfills_a_gpu_is_an_error() -> None:
    class Greedy:
        name = "greedy"

        def decide(self, endpoint, view):
            return Deploy(plans=(plan((0,)),))

    controller = make_controller({})
    controller.manager._policy = Greedy()
    for endpoint in range(1, 9):  # eight times 1 GiB fill the GPU
        controller.handle(endpoint, [EndpointAdded(endpoint_spec(endpoint))])
    with pytest.raises(InvariantError, match=r"wants 1\.000 GiB on GPU 0, which has 0\.000 GiB free"):
        controller.handle(9, [EndpointAdded(endpoint_spec(9))])


def test_dispatch_tick_delays_and_registration_delay() -> None:
    timing = DispatchTiming(tick_us=100, after_arrival_us=14, after_release_us=22, registration_delay_us=1_000)
    controller = up({1: [(0,)], 2: [(1,)]}, timing=timing)
    assert controller.handle(950, [RequestArrived(request(1, 1, 950))]) == []
    assert controller.wake_us == 1_000  # the registration delay ends at a tick
    assert ids(controller.handle(1_000, [])) == [1]
    assert controller.handle(1_085, [RequestArrived(request(2, 2, 1_085)), RequestArrived(request(3, 1, 1_085))]) == []
    assert controller.wake_us == 1_100  # 1,099 is the first possible moment
    assert ids(controller.handle(1_100, [])) == [2]
    assert controller.wake_us is None  # request 3 waits for a GPU, not for a tick
    assert controller.handle(1_190, [ExecutionFinished(1, 1, 1_190)]) == []
    assert controller.wake_us == 1_300  # 1,212 rounded up
    assert ids(controller.handle(1_300, [])) == [3]


def test_one_dispatch_a_tick() -> None:
    controller = up({1: [(0,)], 2: [(1,)]}, timing=DispatchTiming(tick_us=100))
    controller.handle(50, [RequestArrived(request(1, 1, 50)), RequestArrived(request(2, 2, 50))])
    assert ids(controller.handle(100, [])) == [1]
    assert controller.wake_us == 200
    assert ids(controller.handle(200, [])) == [2]


def test_a_fault_is_recorded() -> None:
    record = run(
        arrivals([10, 20, 5_000_000], [1, 1, 1], [2_000, 10, 10]),
        {1: [(0,)]},
        faults=(Fault(target=FaultTarget.GPU, target_id=0, at_us=1_000_000, for_us=500_000),),
        load_us=0,
    )
    table = record.requests
    assert statuses_of(table) == ["completed"] * 3
    assert table.start_us.tolist() == [1_500_000, 3_500_000, 5_000_000]
    assert record.deployments[0].reason == "up again after: GPU 0 failed"


def test_placement_sees_the_load_history() -> None:
    """A GPU that was busy for 30 of the last 120 seconds has load 0.25 when the next model is requested."""
    seen = []

    class Looking:
        name = "looking"

        def decide(self, endpoint, view):
            seen.append([gpu.load for gpu in view.gpus])
            return Deploy(plans=(plan((endpoint.endpoint_id - 1,)),))

    system = scenario(
        arrivals([10 * MICROS_PER_SECOND], [1], [30_000]),
        {1: [], 2: []},
        gpus=2,
        requested_us={2: 100 * MICROS_PER_SECOND},
    )
    simulate(replace(system, policy=Looking()))
    assert seen == [[0.0, 0.0], [0.25, 0.0]]


def test_a_failed_execution_fails_its_requests_and_keeps_the_engine() -> None:
    controller = up({1: [(0,)]})
    controller.handle(1, [RequestArrived(request(1, at_us=1))])
    controller.handle(2, [RequestArrived(request(2, at_us=2))])
    assert ids(controller.handle(3, [ExecutionFailed(1, 1, "no room")])) == [2]
    assert controller.handle(4, [ExecutionFailed(1, 1, "reported twice")]) == []
    controller.handle(5, [ExecutionFinished(1, 2, 5)])
    table = controller.tracker.close()
    assert [RequestStatus(value).label for value in table.status] == ["failed", "completed"]
    assert table.reasons[table.reason[0]] == "deployment 1 (tiny): no room"


def test_a_failed_execution_after_removal_stops_the_engine() -> None:
    controller = up({1: [(0,)]})
    controller.handle(1, [RequestArrived(request(1, at_us=1))])
    assert controller.handle(2, [EndpointRemoved(1)]) == []
    assert controller.handle(3, [ExecutionFailed(1, 1, "no room")]) == [StopEngine(1)]


@pytest.mark.parametrize("discipline", list(QueueDiscipline))
def test_cancelling_a_waiting_request_keeps_the_order_of_others(discipline: QueueDiscipline) -> None:
    controller = up({1: [(0,)], 2: [(1,)]}, discipline=discipline, max_wait_us=10)
    controller.handle(1, [RequestArrived(request(1, at_us=1))])
    for number in (2, 3, 4):
        controller.handle(number, [RequestArrived(request(number, at_us=number))])
    assert controller.handle(5, [RequestCancelled(2)]) == []
    assert controller.handle(6, [RequestCancelled(2), RequestCancelled(1), RequestCancelled(99)]) == []
    assert controller.queue.waiting(1) == len(controller.queue) == 2
    served = []
    for execution in (1, 2, 3):
        served += ids(controller.handle(10 * execution, [ExecutionFinished(1, execution, 10 * execution)]))
    assert served == [3, 4]
    table = controller.tracker.close()
    assert [RequestStatus(value).label for value in table.status] == ["completed", "failed", "completed", "completed"]
    assert table.reasons[table.reason[1]] == "the client went away"
    assert (table.start_us[1], table.finish_us[1]) == (-1, -1)


def test_a_request_waiting_for_a_down_engine_can_be_cancelled() -> None:
    controller = up({1: [(0,)]})
    controller.handle(1, [RequestArrived(request(1, at_us=1))])
    controller.handle(2, [EngineDown(1, returns=True)])
    controller.handle(3, [RequestCancelled(1)])
    assert statuses(controller) == ["failed"]


@pytest.mark.parametrize("failure", [EngineDown(1, returns=True, reason="it crashed"), GpuDown(0, returns=True)])
def test_a_cancelled_request_is_not_retried(failure) -> None:
    controller = up({1: [(0,)]}, timing=DispatchTiming())
    controller.handle(1, [RequestArrived(request(1, at_us=1)), RequestArrived(request(2, at_us=1))])
    controller.handle(2, [RequestCancelled(1)])
    assert controller.tracker.row(1).status is RequestStatus.RUNNING
    controller.handle(3, [failure])
    row = controller.tracker.row(1)
    assert row.status is RequestStatus.FAILED
    assert row.reason.endswith("; the client went away")
    assert controller.tracker.row(2).status is RequestStatus.WAITING
    assert not controller._cancelled_ids


@pytest.mark.parametrize("end", [ExecutionFinished(1, 1, 3), ExecutionFailed(1, 1, "no room")])
def test_a_cancelled_running_request_completes(end) -> None:
    controller = up({1: [(0,)]})
    controller.handle(1, [RequestArrived(request(1, at_us=1))])
    controller.handle(2, [RequestCancelled(1)])
    controller.handle(3, [end])
    assert controller.tracker.row(1).reason in ("", "deployment 1 (tiny): no room")
    assert not controller._cancelled_ids


def test_tokens_are_counted_and_the_end_is_reported() -> None:
    ended: list[int] = []
    controller = up({1: [(0,)]}, on_request_end=ended.append)
    controller.handle(1, [RequestArrived(request(1, at_us=1, tokens=10)), RequestArrived(request(2, 7, 1))])
    assert ended == [2]
    controller.handle(2, [ExecutionFinished(1, 1, 2, output_tokens=(4,))])
    assert ended == [2, 1]
    assert controller.tracker.row(1).finish_us == 2
    assert controller.tracker.row(2).reason == "nothing was deployed for endpoint 7"
    assert controller.tracker.close().output_tokens.tolist() == [4, 10]


def test_the_reason_of_an_engine_failure_is_recorded() -> None:
    controller = up({1: [(0,)]})
    controller.handle(1, [EngineDown(1, returns=False, reason="out of memory")])
    assert controller.manager.deployments[1].record().reason == "out of memory"


class OnTheFirstGpu:
    """A policy that puts an endpoint on the first GPU that it sees."""

    name = "on-the-first-gpu"

    def decide(self, endpoint, view):
        return Deploy(plans=(plan((view.gpus[0].gpu_id,)),))


def replacing(gpus: int = 4) -> Controller:
    """A controller with endpoint 1 up on GPU 0, which replaces deployments that are lost."""
    settings = ControllerSettings(on_loss=OnLoss.REPLACE)
    controller = Controller(cluster(gpus), OnTheFirstGpu(), settings, lambda deployment, request: 1)
    (start,) = controller.handle(0, [EndpointAdded(endpoint_spec(1))])
    assert controller.handle(0, [EngineUp(start.deployment_id, start.generation)]) == []
    return controller


@pytest.mark.parametrize("loss", [EngineDown(1, returns=False, reason="it crashed"), GpuDown(0, returns=False)])
def test_a_deployment_that_is_lost_is_placed_on_another_gpu(loss) -> None:
    controller = replacing()
    (running,) = controller.handle(1, [RequestArrived(request(1, at_us=1))])
    controller.handle(2, [RequestArrived(request(2, at_us=2))])
    actions = controller.handle(3, [loss])
    assert actions[-1] == StartEngine(2, 1, plan((1,)))
    assert "; replaced by deployment 2" in controller.manager.deployments[1].reason
    controller.handle(4, [RequestArrived(request(3, at_us=4))])
    (again,) = controller.handle(5, [EngineUp(2, 1)])
    assert (again.deployment_id, ids([again])) == (2, [1])  # the interrupted request goes first
    served = [again]
    for now_us in (6, 7):
        served += controller.handle(now_us, [ExecutionFinished(2, served[-1].execution_id, now_us)])
    assert ids(served) == [1, 2, 3]
    controller.handle(8, [ExecutionFinished(2, served[-1].execution_id, 8)])
    assert statuses(controller) == ["completed"] * 3
    assert running.deployment_id == 1


def test_what_fails_everywhere_is_placed_anew_a_few_times() -> None:
    controller = replacing(gpus=8)
    for number in range(1, MAX_REPLACEMENTS + 2):
        assert controller.manager.deployments[number].gpu_ids == (number - 1,)
        controller.handle(number, [EngineDown(number, returns=False)])
    assert len(controller.manager.deployments) == MAX_REPLACEMENTS + 1
    controller.handle(90, [RequestArrived(request(1, at_us=90))])
    assert statuses(controller) == ["refused"]


def test_a_deployment_is_not_replaced_where_nothing_is_left() -> None:
    controller = replacing(gpus=1)
    assert controller.handle(1, [EngineDown(1, returns=False)]) == []
    assert len(controller.manager.deployments) == 1


def test_a_replacement_that_waits_can_be_removed() -> None:
    controller = replacing()
    controller.handle(1, [RequestArrived(request(1, at_us=1))])
    controller.handle(2, [EngineDown(1, returns=False)])
    controller.handle(3, [EndpointRemoved(1)])
    assert statuses(controller) == ["refused"]
    assert not any(map(controller.manager.holds_memory, controller.manager.deployments.values()))


def test_deployments_stay_down_by_default() -> None:
    controller = up({1: [(0,)]})
    assert controller.handle(1, [EngineDown(1, returns=False)]) == []
    assert len(controller.manager.deployments) == 1
