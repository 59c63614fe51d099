"""Continuous engines that share a GPU: each takes its turn, and skipping steps still changes nothing."""

from dataclasses import replace
from functools import partial
from unittest.mock import patch

import hypothesis.strategies as st
import pytest
from clocked_engines import SmallEngines, system
from fixtures import arrivals
from hypothesis import given, settings

from maveriq.domain.faults import Fault, FaultTarget
from maveriq.domain.records import RunRecord
from maveriq.domain.requests import RequestStatus
from maveriq.scenario import clocked_engine
from maveriq.scenario.stepped_engine import SteppedEngine
from maveriq.scenario.system import ReplaySystem
from maveriq.sim.simulator import simulate

ENGINES = SmallEngines({"kind": "vllm", "max_num_seqs": 4, "max_num_batched_tokens": 64}, blocks=24, context=256)
FIELDS = ("deployment_id", "start_us", "first_token_us", "finish_us", "status", "preemptions")


@st.composite
def systems(draw) -> ReplaySystem:
    """Draw three endpoints on up to three GPUs, which they share, and up to 20 requests."""
    placements = st.lists(st.integers(0, 2), min_size=1, max_size=2, unique=True).map(tuple)
    gpus_of = {endpoint: [draw(placements)] for endpoint in (1, 2, 3)}
    count = draw(st.integers(1, 20))
    requests = arrivals(
        sorted(draw(st.lists(st.integers(0, 40_000), min_size=count, max_size=count))),
        draw(st.lists(st.integers(1, 3), min_size=count, max_size=count)),
        draw(st.lists(st.integers(1, 120), min_size=count, max_size=count)),
    )
    fault = Fault(target=FaultTarget.DEPLOYMENT, target_id=1, at_us=draw(st.integers(0, 50_000)), for_us=5_000)
    faults = (fault,) if draw(st.booleans()) else ()
    # An engine that loads in no time is up after steps of that instant have been composed.
    return ready(system(requests, gpus_of, gpus=3, engines=ENGINES, load_us=1, faults=faults))


def ready(made: ReplaySystem) -> ReplaySystem:
    endpoints = tuple(replace(endpoint, ready_at_start=True) for endpoint in made.workload.endpoints)
    return replace(made, workload=replace(made.workload, endpoints=endpoints))


@settings(max_examples=60, deadline=None)
@given(systems())
def test_skipping_steps_changes_nothing_to_the_microsecond(made):
    with patch.object(clocked_engine, "SteppedEngine", partial(SteppedEngine, skips_steps=False)):
        plain = simulate(made).requests
    skipping = simulate(made).requests
    for name in FIELDS:
        assert getattr(skipping, name).tolist() == getattr(plain, name).tolist()


@settings(max_examples=40, deadline=None)
@given(systems())
def test_a_gpu_is_busy_at_most_all_the_time_and_every_request_completes(made):
    record = simulate(made)
    assert all(0 <= sample.busy_share <= 1 for sample in record.gpu_samples)
    assert (record.requests.status == RequestStatus.COMPLETED.value).all() or made.faults


def both(gpus_of: dict[int, list[tuple[int, ...]]], *, second: int = 0) -> RunRecord:
    """Simulate four long requests for each endpoint; those for the second arrive at `second` µs."""
    times_us, endpoints = [0] * 4 + [second] * 4, [1] * 4 + [2] * 4
    made = system(arrivals(times_us, endpoints, [120] * 8), gpus_of, gpus=2, engines=ENGINES)
    return simulate(ready(made))


def finish_us(record: RunRecord, endpoint: int) -> int:
    return int(record.requests.finish_us[record.requests.endpoint_id == endpoint].max())


def test_two_engines_on_a_gpu_are_half_as_fast_while_both_have_requests():
    apart, shared = both({1: [(0,)], 2: [(1,)]}), both({1: [(0,)], 2: [(0,)]})
    for endpoint in (1, 2):
        assert finish_us(shared, endpoint) == pytest.approx(2 * finish_us(apart, endpoint), rel=1e-3)
    alone_us = finish_us(apart, 1)
    later = both({1: [(0,)], 2: [(0,)]}, second=10 * alone_us)
    assert finish_us(later, 1) == alone_us
    assert finish_us(later, 2) - 10 * alone_us == pytest.approx(alone_us, abs=2)


def test_work_is_conserved_where_one_joins_halfway():
    """The GPU is never idle: both together take as long as one after the other."""
    alone_us = finish_us(both({1: [(0,)], 2: [(1,)]}), 1)
    shared = both({1: [(0,)], 2: [(0,)]}, second=alone_us // 2)
    step_us = alone_us / 120
    assert finish_us(shared, 1) == pytest.approx(1.5 * alone_us, abs=3 * step_us)
    assert finish_us(shared, 2) == pytest.approx(2 * alone_us, abs=3 * step_us)


def test_an_engine_on_two_gpus_waits_for_the_one_that_more_share():
    apart_us = finish_us(both({1: [(0,)], 2: [(1,)]}), 1)
    assert finish_us(both({1: [(0, 1)], 2: [(1,)]}), 1) == pytest.approx(2 * apart_us, rel=1e-3)
