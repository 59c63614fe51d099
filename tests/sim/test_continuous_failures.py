"""Laws of simulations with continuous engines that fail, are removed, and have several replicas."""

from dataclasses import replace

import hypothesis.strategies as st
import numpy as np
import pytest
from clocked_engines import SmallEngines, system
from fixtures import arrivals
from hypothesis import given, settings

from maveriq.control.controller import ControllerSettings, OnFailure, OnLoss
from maveriq.control.routing_policies import RoutingRule
from maveriq.domain.faults import Fault, FaultTarget, Removal
from maveriq.domain.records import NOT_YET, RequestTable
from maveriq.domain.requests import RequestStatus
from maveriq.scenario.system import ReplaySystem
from maveriq.sim.simulator import simulate

GPUS = 4
ENGINES = SmallEngines({"kind": "vllm", "max_num_seqs": 4, "max_num_batched_tokens": 64}, blocks=24, context=256)
CONTINUOUS = [rule for rule in RoutingRule if not rule.predicts_service_time]


@st.composite
def faults(draw):
    target = draw(st.sampled_from(FaultTarget))
    return Fault(
        target=target,
        target_id=draw(st.integers(0, GPUS - 1) if target is FaultTarget.GPU else st.integers(1, 6)),
        at_us=draw(st.integers(0, 60_000)),
        for_us=draw(st.none() | st.integers(0, 40_000)),
    )


@st.composite
def systems(draw, *, on_failure: OnFailure | None = None) -> ReplaySystem:
    """Draw two endpoints with up to three replicas, on GPUs that they may share, and up to 40 requests in 60 ms."""
    placements = st.lists(st.integers(0, GPUS - 1), min_size=1, max_size=2, unique=True).map(tuple)
    gpus_of = {endpoint: draw(st.lists(placements, max_size=3)) for endpoint in (1, 2)}
    count = draw(st.integers(1, 40))
    lengths = st.lists(st.integers(1, 120), min_size=count, max_size=count)
    times_us = sorted(draw(st.lists(st.integers(0, 60_000), min_size=count, max_size=count)))
    requests = arrivals(times_us, draw(st.lists(st.integers(1, 2), min_size=count, max_size=count)), draw(lengths))
    made = system(
        replace(requests, prompt_tokens=np.asarray(draw(lengths), dtype=np.int64)),
        gpus_of,
        gpus=GPUS,
        engines=ENGINES,
        settings=ControllerSettings(
            router=draw(st.none() | st.sampled_from(CONTINUOUS)),
            on_failure=on_failure or draw(st.sampled_from(OnFailure)),
            on_loss=draw(st.sampled_from(OnLoss)),
            refuse_beyond_context=False,
        ),
        faults=tuple(draw(st.lists(faults(), max_size=4))),
        load_us=draw(st.sampled_from([0, 1, 20_000])),
        drain_us=draw(st.sampled_from([0, 50_000, 3_600_000_000])),
    )
    removed = draw(st.none() | st.tuples(st.sampled_from([1, 2]), st.integers(1, 70_000)))
    removals = (Removal(endpoint_id=removed[0], at_us=removed[1]),) if removed else ()
    ready = draw(st.booleans())
    endpoints = tuple(replace(endpoint, ready_at_start=ready) for endpoint in made.workload.endpoints)
    return replace(made, removals=removals, workload=replace(made.workload, endpoints=endpoints))


def rows(table: RequestTable, status: RequestStatus) -> np.ndarray:
    return table.status == status.value


@given(systems())
@settings(max_examples=120, deadline=None)
def test_every_request_ends_in_one_status_and_causes_come_before_effects(system: ReplaySystem) -> None:
    record = simulate(system)
    table = record.requests
    assert len(table) == sum(table.counts().values()) == len(system.workload.arrivals)
    done, refused, failed = (
        rows(table, status) for status in (RequestStatus.COMPLETED, RequestStatus.REFUSED, RequestStatus.FAILED)
    )
    assert (table.arrival_us[done] <= table.start_us[done]).all()
    assert (table.start_us[done] < table.first_token_us[done]).all()
    assert (table.first_token_us[done] <= table.finish_us[done]).all()
    assert (table.output_tokens[done] == system.workload.arrivals.output_tokens[done]).all()
    assert (table.finish_us[~done] == NOT_YET).all()
    assert (table.start_us[refused] == NOT_YET).all()
    assert (table.reason[refused | failed] > 0).all()
    assert not failed.any() or system.faults


@given(systems())
@settings(max_examples=80, deadline=None)
def test_nothing_runs_while_its_gpu_or_its_engine_is_down(system: ReplaySystem) -> None:
    record = simulate(system)
    table = record.requests
    done = rows(table, RequestStatus.COMPLETED)
    gpus_of = {each.deployment_id: each.plan.gpu_ids for each in record.deployments if each.plan}
    ready_us = {each.deployment_id: each.ready_us for each in record.deployments}
    for fault in system.faults:
        end_us = np.inf if fault.for_us is None else fault.at_us + fault.for_us
        if fault.target is FaultTarget.GPU:
            hit = [number for number, gpus in gpus_of.items() if fault.target_id in gpus]
        else:
            hit = [fault.target_id]
        hit = [number for number in hit if 0 <= ready_us.get(number, -1) <= fault.at_us]
        mine = done & np.isin(table.deployment_id, hit)
        assert ((table.finish_us[mine] <= fault.at_us) | (table.start_us[mine] >= end_us)).all()


@given(systems(on_failure=OnFailure.FAIL))
@settings(max_examples=40, deadline=None)
def test_where_nothing_is_retried_what_an_engine_had_fails_with_it(system: ReplaySystem) -> None:
    table = simulate(system).requests
    failed = rows(table, RequestStatus.FAILED)
    ends_us = {fault.at_us for fault in system.faults}
    for reason in {table.reasons[index] for index in table.reason[failed]}:
        assert "failed" in reason
    assert (table.arrival_us[failed] < max(ends_us, default=0)).all()


@given(systems(), st.randoms(use_true_random=False))
@settings(max_examples=40, deadline=None)
def test_the_order_of_simultaneous_events_changes_nothing(system: ReplaySystem, random) -> None:
    faults_ = list(system.faults)
    random.shuffle(faults_)
    run, other = simulate(system), simulate(replace(system, faults=tuple(faults_)))
    for name in ("deployment_id", "start_us", "first_token_us", "finish_us", "status", "preemptions", "cached_tokens"):
        assert getattr(run.requests, name).tolist() == getattr(other.requests, name).tolist()


def one(gpus_of, *, faults=(), settings=None, count=6, output=100, removals=(), **options):
    """Simulate requests that all arrive at 1 ms and take about 30 ms."""
    made = system(
        arrivals([1_000] * count, [1] * count, [output] * count), gpus_of, gpus=GPUS, engines=ENGINES,
        settings=settings, faults=faults, **options,
    )  # fmt: skip
    endpoints = tuple(replace(endpoint, ready_at_start=True) for endpoint in made.workload.endpoints)
    return simulate(replace(made, removals=removals, workload=replace(made.workload, endpoints=endpoints)))


def failure(at_us: int, for_us: int | None, *, gpu: int | None = None) -> Fault:
    if gpu is None:
        return Fault(target=FaultTarget.DEPLOYMENT, target_id=1, at_us=at_us, for_us=for_us)
    return Fault(target=FaultTarget.GPU, target_id=gpu, at_us=at_us, for_us=for_us)


@pytest.mark.parametrize("gpu", [None, 0])
def test_requests_wait_for_an_engine_that_will_be_back_and_begin_anew(gpu):
    table = one({1: [(0,)]}, faults=(failure(5_000, 20_000, gpu=gpu),), load_us=10_000).requests
    assert rows(table, RequestStatus.COMPLETED).all()
    assert (table.start_us >= 35_000).all()
    assert (table.first_token_us > table.start_us).all()


@pytest.mark.parametrize("gpu", [None, 0])
@pytest.mark.parametrize("for_us", [None, 500_000])
def test_requests_go_to_a_replica_that_is_up(gpu, for_us):
    table = one({1: [(0,), (1,)]}, faults=(failure(5_000, for_us, gpu=gpu),)).requests
    assert rows(table, RequestStatus.COMPLETED).all()
    assert (table.deployment_id == 2).all()
    assert table.finish_us.max() < 200_000


def test_a_request_whose_engine_fails_twice_fails():
    twice = (failure(5_000, 1_000), failure(9_000, 1_000))
    table = one({1: [(0,)]}, faults=twice).requests
    failed, done = rows(table, RequestStatus.FAILED), rows(table, RequestStatus.COMPLETED)
    assert (failed.sum(), done.sum()) == (4, 2)  # two waited for a seat both times
    assert {table.reasons[index] for index in table.reason[failed]} == {"deployment 1 (tiny): its engine failed"}


def test_what_is_lost_for_good_is_refused_or_replaced():
    lost = (failure(5_000, None, gpu=0),)
    kept = one({1: [(0,)]}, faults=lost)
    assert rows(kept.requests, RequestStatus.REFUSED).all()
    both = {1: [(1,)], 2: [(0,)]}
    settings = ControllerSettings(on_loss=OnLoss.REPLACE)
    replaced = one(both, faults=(failure(5_000, None),), settings=settings).requests
    assert rows(replaced, RequestStatus.REFUSED).all() or rows(replaced, RequestStatus.COMPLETED).all()


def test_with_on_failure_fail_running_and_queued_requests_of_the_engine_fail():
    table = one({1: [(0,)]}, faults=(failure(5_000, 1_000),), settings=ControllerSettings(on_failure=OnFailure.FAIL))
    assert rows(table.requests, RequestStatus.FAILED).all()


def test_requests_that_wait_for_an_engine_are_refused_when_their_endpoint_is_removed():
    removal = Removal(endpoint_id=1, at_us=8_000)
    table = one({1: [(0,)]}, faults=(failure(5_000, 100_000),), removals=(removal,)).requests
    assert rows(table, RequestStatus.REFUSED).all()
    drained = one({1: [(0,)]}, removals=(removal,)).requests
    assert rows(drained, RequestStatus.COMPLETED).all()
    down = one({1: [(0,)]}, faults=(failure(9_000, 100_000),), removals=(removal,)).requests
    assert rows(down, RequestStatus.FAILED).all()


def test_requests_with_priority_go_first_where_the_engine_schedules_by_priority():
    for policy, goes_first in (("priority", True), ("fcfs", False)):
        engines = SmallEngines({**ENGINES.settings, "scheduling_policy": policy}, blocks=24, context=256)
        requests = replace(
            arrivals([1_000] * 12 + [2_000], [1] * 13, [40] * 13), priority=np.asarray([0] * 12 + [1], dtype=np.int64)
        )
        made = system(requests, {1: [(0,)]}, gpus=1, engines=engines, load_us=0)
        start_us = simulate(made).requests.start_us
        assert (start_us[12] < np.sort(start_us)[-4]) == goes_first
