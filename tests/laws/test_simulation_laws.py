"""Laws of every simulation: random requests, deployments that share GPUs, faults, queue disciplines."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from unittest.mock import patch

import hypothesis.strategies as st
import numpy as np
import pytest
from fixtures import arrivals, run, scenario
from hypothesis import example, given, settings

from maveriq.control.controller import Controller, ControllerSettings, OnFailure
from maveriq.control.deployment_manager import DeploymentState
from maveriq.control.events import Action, Event, Execute
from maveriq.control.queues import QueueDiscipline
from maveriq.domain.cluster import DispatchTiming
from maveriq.domain.faults import Fault, FaultTarget
from maveriq.domain.records import NOT_YET, RunRecord
from maveriq.domain.requests import RequestStatus
from maveriq.scenario.system import ReplaySystem
from maveriq.sim.simulator import simulate
from maveriq.units import MICROS_PER_SECOND, seconds

GPUS = 4
TIMINGS = (
    DispatchTiming(),
    DispatchTiming(tick_us=10_300, after_arrival_us=1_400, after_release_us=2_200, registration_delay_us=200_000),
)


@st.composite
def faults(draw):
    target = draw(st.sampled_from(FaultTarget))
    return Fault(
        target=target,
        target_id=draw(st.integers(0 if target is FaultTarget.GPU else 1, 3)),
        at_us=draw(st.integers(0, 3_000_000)),
        for_us=draw(st.none() | st.integers(0, 1_000_000)),
    )


@st.composite
def systems(
    draw, *, with_faults: bool = True, discipline: QueueDiscipline | None = None, batch_size: int | None = None
) -> ReplaySystem:
    """Draw systems with a few endpoints on overlapping GPUs and up to 60 requests within three seconds."""
    placements = st.lists(st.integers(0, GPUS - 1), min_size=1, max_size=3, unique=True).map(tuple)
    gpus_of = {
        endpoint_id: draw(st.lists(placements, max_size=2)) for endpoint_id in range(1, draw(st.integers(1, 3)) + 1)
    }
    count = draw(st.integers(1, 60))
    times_us = sorted(draw(st.lists(st.integers(0, 3_000_000), min_size=count, max_size=count)))
    return scenario(
        arrivals(
            times_us,
            draw(st.lists(st.integers(1, 3), min_size=count, max_size=count)),
            draw(st.lists(st.integers(1, 400), min_size=count, max_size=count)),
            slo_us=draw(st.sampled_from([0, 300_000])),
        ),
        gpus_of,
        gpus=GPUS,
        settings=ControllerSettings(
            timing=draw(st.sampled_from(TIMINGS)),
            discipline=discipline or draw(st.sampled_from(QueueDiscipline)),
            max_wait_us=draw(st.sampled_from([100_000, 10_000_000])),
            on_failure=draw(st.sampled_from(OnFailure)),
        ),
        faults=tuple(draw(st.lists(faults(), max_size=3))) if with_faults else (),
        load_us=draw(st.sampled_from([0, 1, 400_000])),
        batch_size=batch_size or draw(st.sampled_from([1, 3])),
        drain_us=draw(st.sampled_from([0, 1_000_000, 3_600 * MICROS_PER_SECOND])),
    )


@given(systems())
@settings(max_examples=150, deadline=None)
def test_every_request_ends_in_one_status_and_causes_come_before_effects(system: ReplaySystem) -> None:
    record = simulate(system)
    table = record.requests
    assert len(table) == sum(table.counts().values()) == len(system.workload.arrivals)
    started = table.start_us != NOT_YET
    assert (table.start_us[started] >= table.arrival_us[started]).all()
    completed = table.status == RequestStatus.COMPLETED
    assert (table.start_us[completed] < table.finish_us[completed]).all()
    assert (table.first_token_us[completed] <= table.finish_us[completed]).all()
    assert (table.finish_us[~completed] == NOT_YET).all()
    assert (table.finish_us[completed] <= record.ended_us).all()
    refused = table.status == RequestStatus.REFUSED
    assert (table.reason[refused] > 0).all()
    assert not started[refused].any()


@given(systems(with_faults=False))
@settings(max_examples=150, deadline=None)
def test_no_request_starts_before_its_engine_is_up(system: ReplaySystem) -> None:
    record = simulate(system)
    ready_us = {deployment.deployment_id: deployment.ready_us for deployment in record.deployments}
    for deployment_id, start_us in zip(record.requests.deployment_id, record.requests.start_us, strict=True):
        if start_us != NOT_YET:
            assert start_us >= ready_us[deployment_id] + system.settings.timing.registration_delay_us


@given(systems())
@settings(max_examples=150, deadline=None)
def test_a_gpu_runs_one_execution_at_a_time(system: ReplaySystem) -> None:
    record = simulate(system)
    table = record.requests
    gpus_of = gpus_by_deployment(record)
    spans = {
        (int(deployment_id), int(start_us), int(finish_us))  # a batch is one execution
        for deployment_id, start_us, finish_us in zip(table.deployment_id, table.start_us, table.finish_us, strict=True)
        if finish_us != NOT_YET
    }
    for gpu_id in range(GPUS):
        mine = sorted((start, finish) for deployment, start, finish in spans if gpu_id in gpus_of[deployment])
        assert all(earlier[1] <= later[0] for earlier, later in pairwise(mine))


@given(systems())
@settings(max_examples=100, deadline=None)
def test_memory_never_exceeds_capacity_and_gpus_are_busy_at_most_all_the_time(system: ReplaySystem) -> None:
    for sample in simulate(system).gpu_samples:
        assert 0 <= sample.memory_bytes <= system.cluster.gpus[sample.gpu_id].capacity_bytes
        assert 0 <= sample.busy_share <= 1


def gpus_by_deployment(record: RunRecord) -> dict[int, tuple[int, ...]]:
    return {deployment.deployment_id: deployment.plan.gpu_ids for deployment in record.deployments if deployment.plan}


def overtaken(system: ReplaySystem) -> list[tuple[int, int]]:
    """Simulate, and return each (later, earlier) arrival of which the later started while the earlier waited.

    Only requests that wait for a deployment that is up count. A request that an engine failure interrupted may
    overtake: it goes to the front.
    """
    pairs = []
    handle = Controller.handle

    def watched(controller: Controller, now_us: int, events: Sequence[Event]) -> list[Action]:
        actions = handle(controller, now_us, events)
        tracker, deployments = controller.tracker, controller.manager.deployments
        started = [request for action in actions if isinstance(action, Execute) for request in action.requests]
        first_runs = [request.request_id for request in started if tracker.attempts(request) == 1]
        pairs.extend(pair for pair in pairwise(first_runs) if pair[0] > pair[1])
        if first_runs:
            pairs.extend(
                (max(first_runs), earlier)
                for earlier in range(1, max(first_runs))
                if tracker.row(earlier).status is RequestStatus.WAITING
                and deployments[tracker.deployment_of(earlier)].state is DeploymentState.UP
            )
        return actions

    with patch.object(Controller, "handle", watched):
        simulate(system)
    return pairs


def lost_replica() -> ReplaySystem:
    """Two replicas on GPUs (0, 1) and (0); GPU 1 fails for no time at 2 us and for good at 3 us.

    At 2 us, requests 1 and 2 wait for the first replica, and the second starts request 3. At 3 us both move.
    """
    return scenario(
        arrivals([1, 1, 2], [1, 1, 1], [1, 1, 1]),
        {1: [(0, 1), (0,)]},
        faults=(
            Fault(target=FaultTarget.GPU, target_id=1, at_us=2, for_us=0),
            Fault(target=FaultTarget.GPU, target_id=1, at_us=3, for_us=None),
        ),
    )


@given(systems(discipline=QueueDiscipline.FIFO, batch_size=1))
@example(lost_replica())
@settings(max_examples=200, deadline=None)
def test_fifo_starts_the_earliest_arrival_that_waits(system: ReplaySystem) -> None:
    """Whenever a request starts, no earlier arrival waits for a deployment that is up.

    A request that moves because its replica was lost for good takes its place by arrival at its new deployment, from
    the instant of the move on: starts before that stand.
    """
    assert overtaken(system) == []


def test_a_move_does_not_undo_earlier_starts() -> None:
    table = simulate(lost_replica()).requests
    assert table.deployment_id.tolist() == [2, 2, 2]
    assert table.start_us.tolist() == [1_002, 2_002, 2]


@given(systems(discipline=QueueDiscipline.FIFO, batch_size=1, with_faults=False))
@settings(max_examples=100, deadline=None)
def test_without_faults_fifo_starts_in_order_of_arrival(system: ReplaySystem) -> None:
    table = simulate(system).requests
    assert (np.diff(table.start_us[table.start_us != NOT_YET]) >= 0).all()


@given(systems())
@settings(max_examples=200, deadline=None)
def test_nothing_runs_on_a_gpu_that_is_down(system: ReplaySystem) -> None:
    record = simulate(system)
    gpus_of = gpus_by_deployment(record)
    table = record.requests
    completed = table.status == RequestStatus.COMPLETED
    for fault in system.faults:
        end_us = np.inf if fault.for_us is None else fault.at_us + fault.for_us
        if fault.target is FaultTarget.GPU:
            hit = [deployment_id for deployment_id, gpus in gpus_of.items() if fault.target_id in gpus]
        else:
            hit = [fault.target_id]
        mine = completed & np.isin(table.deployment_id, hit)
        assert ((table.finish_us[mine] <= fault.at_us) | (table.start_us[mine] >= end_us)).all()


@given(systems(), st.randoms(use_true_random=False))
@settings(max_examples=100, deadline=None)
def test_the_order_of_simultaneous_events_changes_nothing(system: ReplaySystem, random) -> None:
    endpoints, faults_ = list(system.workload.endpoints), list(system.faults)
    random.shuffle(endpoints)
    random.shuffle(faults_)
    shuffled = replace(system, workload=replace(system.workload, endpoints=tuple(endpoints)), faults=tuple(faults_))
    run_, other = simulate(system), simulate(shuffled)
    for name in ("deployment_id", "start_us", "first_token_us", "finish_us", "status"):
        assert getattr(run_.requests, name).tolist() == getattr(other.requests, name).tolist()
    assert run_.gpu_samples == other.gpu_samples


@given(systems(with_faults=False))
@settings(max_examples=100, deadline=None)
def test_doubling_every_time_scale_doubles_every_time(system: ReplaySystem) -> None:
    """Without dispatch overhead no time in the system is fixed: this law finds hidden constants."""
    no_dispatch_overhead = replace(
        system,
        settings=replace(system.settings, timing=DispatchTiming(), discipline=QueueDiscipline.FIFO_PER_MODEL),
        load_time=lambda _plan: 1_000,
        drain_us=3_600 * MICROS_PER_SECOND,
    )
    slow_arrivals = replace(
        system.workload.arrivals,
        arrival_us=2 * system.workload.arrivals.arrival_us,
        output_tokens=2 * system.workload.arrivals.output_tokens,
    )
    slow = replace(
        no_dispatch_overhead,
        settings=replace(no_dispatch_overhead.settings, max_wait_us=2 * no_dispatch_overhead.settings.max_wait_us),
        load_time=lambda _plan: 2_000,
        workload=replace(system.workload, arrivals=slow_arrivals),
    )
    fast_table, slow_table = simulate(no_dispatch_overhead).requests, simulate(slow).requests
    started = fast_table.start_us != NOT_YET
    assert (2 * fast_table.start_us[started] == slow_table.start_us[started]).all()
    assert (fast_table.status == slow_table.status).all()


@pytest.mark.parametrize("discipline", [QueueDiscipline.FIFO_PER_MODEL, QueueDiscipline.SJF, QueueDiscipline.EDF])
def test_a_wide_deployment_does_not_starve_behind_narrow_ones(discipline: QueueDiscipline) -> None:
    """Two single-GPU models are busy 99 % of the time, alternately, and one request needs both GPUs."""
    times_us = [1_000 * i for i in range(1_000, 9_000, 45)]
    endpoints = [1 + i % 2 for i in range(len(times_us))]
    times_us.insert(10, times_us[10])
    endpoints.insert(10, 3)

    def waited_s(bound_s: int) -> float:
        table = run(
            arrivals(times_us, endpoints, [89] * len(times_us)),
            {1: [(0,)], 2: [(1,)], 3: [(0, 1)]},
            settings=ControllerSettings(discipline=discipline, max_wait_us=bound_s * MICROS_PER_SECOND),
        ).requests
        return seconds(int((table.start_us - table.arrival_us)[10]))

    assert waited_s(1) <= 1.2  # the limit, and the time until running requests end
    assert 3 < waited_s(3) <= 3.2
    assert waited_s(10**6) > 5  # without the limit it waits longer
