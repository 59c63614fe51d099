"""Laws of clients: what is sent when, whatever the requests, their sessions, the loop and the limit in flight."""

from dataclasses import replace
from itertools import pairwise

import hypothesis.strategies as st
import numpy as np
import pytest
from fixtures import arrivals, scenario
from hypothesis import given, settings

from maveriq.domain.faults import Fault, FaultTarget
from maveriq.domain.records import NOT_YET
from maveriq.domain.requests import RequestStatus
from maveriq.sim.simulator import simulate
from maveriq.units import MICROS_PER_SECOND
from maveriq.workload.client import Client
from maveriq.workload.requests import Arrivals

HOUR_US = 3_600 * MICROS_PER_SECOND


@st.composite
def requests(draw) -> Arrivals:
    """Draw requests, of which some are turns of sessions, with think times."""
    count = draw(st.integers(1, 40))
    times_us = sorted(draw(st.lists(st.integers(0, 2_000_000), min_size=count, max_size=count)))
    plain = arrivals(
        times_us,
        draw(st.lists(st.integers(1, 3), min_size=count, max_size=count)),
        draw(st.lists(st.integers(1, 300), min_size=count, max_size=count)),
    )
    sessions = draw(st.lists(st.integers(0, 4), min_size=count, max_size=count))
    think_us = draw(st.none() | st.lists(st.sampled_from([0, 1, 50_000, 900_000]), min_size=count, max_size=count))
    return replace(
        plain,
        session_id=np.array(sessions, np.int64),
        think_us=None if think_us is None else np.array(think_us, np.int64),
        # A row is known again by its prompt, whatever its number.
        prompt_tokens=np.arange(1, count + 1),
    )


def run(rows: Arrivals, *, concurrency: int | None = None, max_in_flight: int | None = None, deployed: int = 3):
    """Run requests of endpoints 1 to 3, of which the first so many are deployed, on two GPUs."""
    gpus_of = {1: [(0,)], 2: [(1,)], 3: [(0, 1)]}
    system = scenario(rows, {number: gpus_of[number] for number in range(1, deployed + 1)}, gpus=2, drain_us=HOUR_US)
    workload = replace(system.workload, concurrency=concurrency)
    return simulate(replace(system, workload=workload, max_in_flight=max_in_flight))


def ends_us(table) -> np.ndarray:
    """Return when each request ended; one that was refused ended when it arrived."""
    return np.where(table.finish_us == NOT_YET, table.arrival_us, table.finish_us)


def row_of(table) -> np.ndarray:
    """Return the row of the workload that each request of a table is."""
    return table.prompt_tokens - 1


LIMITS = st.none() | st.integers(1, 5)


@given(requests(), LIMITS, st.integers(1, 3))
@settings(max_examples=80, deadline=None)
def test_an_open_loop_sends_each_request_once_and_not_before_its_time(rows, limit, deployed):
    table = run(rows, max_in_flight=limit, deployed=deployed).requests
    assert sorted(row_of(table)) == list(range(len(rows)))
    assert (table.arrival_us >= rows.arrival_us[row_of(table)]).all()
    assert (np.diff(table.arrival_us) >= 0).all()


@given(requests(), LIMITS, st.none() | st.integers(1, 6), st.integers(1, 3))
@settings(max_examples=80, deadline=None)
def test_a_turn_waits_for_the_end_of_the_turn_before_and_the_think_time(rows, limit, concurrency, deployed):
    closed = concurrency is not None
    given_rows = rows.by_session() if closed else rows
    table = run(given_rows, concurrency=concurrency, max_in_flight=limit, deployed=deployed).requests
    at = {int(row): number for number, row in enumerate(row_of(table))}
    end_us = ends_us(table)
    for session in range(1, 5):
        turns = [int(prompt) - 1 for prompt in given_rows.prompt_tokens[given_rows.session_id == session]]
        for earlier, later in pairwise(turns):
            think_us = 0 if rows.think_us is None else rows.think_us[later]
            assert table.arrival_us[at[later]] >= end_us[at[earlier]] + think_us


@given(requests())
@settings(max_examples=60, deadline=None)
def test_without_a_limit_a_turn_is_sent_as_soon_as_it_may(rows):
    table = run(rows).requests
    at = {int(row): number for number, row in enumerate(row_of(table))}
    end_us = ends_us(table)
    for row in range(len(rows)):
        before = [other for other in range(row) if rows.session_id[other] == rows.session_id[row] > 0]
        earliest_us = int(rows.arrival_us[row])
        if before:
            think_us = 0 if rows.think_us is None else int(rows.think_us[row])
            earliest_us = max(earliest_us, int(end_us[at[before[-1]]]) + think_us)
        assert table.arrival_us[at[row]] == earliest_us


@given(requests(), LIMITS, st.none() | st.integers(1, 6), st.integers(1, 3))
@settings(max_examples=80, deadline=None)
def test_never_more_are_in_flight_than_the_limit_and_the_clients_allow(rows, limit, concurrency, deployed):
    given_rows = rows if concurrency is None else rows.by_session()
    table = run(given_rows, concurrency=concurrency, max_in_flight=limit, deployed=deployed).requests
    allowed = min(limit or len(rows), concurrency or len(rows))
    end_us = ends_us(table)
    for number, sent_us in enumerate(table.arrival_us):
        # One that ends at this instant has made room; one that was refused took no time.
        others = (table.arrival_us <= sent_us) & (end_us > sent_us)
        others[number:] = False
        assert others.sum() < allowed


@given(requests(), st.integers(1, 6), st.integers(1, 3))
@settings(max_examples=60, deadline=None)
def test_a_closed_loop_sends_the_next_request_when_one_has_ended(rows, concurrency, deployed):
    """Without sessions and think times every request beyond the first ones is sent at the end of another."""
    plain = replace(rows, session_id=None, think_us=None, arrival_us=np.full(len(rows), 7))
    table = run(plain, concurrency=concurrency, deployed=deployed).requests
    assert row_of(table).tolist() == list(range(len(rows)))
    assert (table.arrival_us[:concurrency] == 7).all()
    ends = np.sort(ends_us(table))
    assert table.arrival_us[concurrency:].tolist() == ends[: max(0, len(rows) - concurrency)].tolist()


@given(requests(), LIMITS, st.none() | st.integers(1, 6))
@settings(max_examples=30, deadline=None)
def test_the_same_workload_gives_the_same_run(rows, limit, concurrency):
    given_rows = rows if concurrency is None else rows.by_session()
    one, other = (run(given_rows, concurrency=concurrency, max_in_flight=limit) for _ in range(2))
    for name in ("request_id", "prompt_tokens", "arrival_us", "start_us", "finish_us", "status"):
        assert getattr(one.requests, name).tolist() == getattr(other.requests, name).tolist()


def test_the_drain_time_counts_from_the_last_request_that_was_sent():
    """Ten requests of 0.1 s each, one in flight: the last one is sent long after its time."""
    rows = arrivals([7] * 10, [1] * 10, [100] * 10)
    system = scenario(rows, {1: [(0,)]}, gpus=1, drain_us=200_000)
    held = simulate(replace(system, max_in_flight=1)).requests
    assert held.finish_us.tolist() == [7 + 100_000 * number for number in range(1, 11)]
    cut = simulate(system).requests
    assert cut.counts()[RequestStatus.COMPLETED] == 2


def test_a_run_in_which_nothing_can_happen_any_more_ends():
    """The only GPU fails for good while clients wait for each other: what was not sent is unfinished."""
    rows = arrivals([0] * 6, [1] * 6, [1_000] * 6)
    lost = Fault(target=FaultTarget.GPU, target_id=0, at_us=1_500_000, for_us=None)
    system = scenario(rows, {1: [(0,)]}, gpus=1, faults=(lost,))
    table = simulate(replace(system, workload=replace(system.workload, concurrency=2))).requests
    assert len(table) == 6
    assert set(table.status.tolist()) <= {status.value for status in RequestStatus if status >= RequestStatus.COMPLETED}


@pytest.mark.parametrize("start_us", [1, 1_000_000, 2_000_000])
def test_clients_may_start_when_gpus_are_sampled(start_us):
    rows = arrivals([start_us] * 4, [1] * 4, [1_000] * 4)
    system = scenario(rows, {1: [(0,)]}, gpus=1)
    table = simulate(replace(system, workload=replace(system.workload, concurrency=2))).requests
    assert table.counts()[RequestStatus.COMPLETED] == 4


def test_little_s_law_in_a_closed_loop():
    """N = X (R + Z): clients, throughput, response and think time, over the middle of a long run."""
    rng = np.random.default_rng(1)
    count, clients, think_us = 4_000, 12, 40_000
    rows = arrivals([0] * count, rng.integers(1, 3, count), rng.integers(1, 20, count))
    rows = replace(rows, think_us=np.full(count, think_us), prompt_tokens=np.arange(1, count + 1))
    table = run(rows, concurrency=clients).requests
    response_us = (table.finish_us - table.arrival_us)[200:-200].mean()
    middle = table.arrival_us[200:-200]
    throughput_per_us = (len(middle) - 1) / (middle[-1] - middle[0])
    assert throughput_per_us * (response_us + think_us) == pytest.approx(clients, rel=0.02)


@given(requests(), LIMITS, st.none() | st.integers(1, 6))
@settings(max_examples=60, deadline=None)
def test_whatever_was_not_sent_is_left_and_numbered_on(rows, limit, concurrency):
    """A client that is told of no end sends what it may, and has all else left."""
    given_rows = rows if concurrency is None else rows.by_session()
    client = Client(given_rows, concurrency=concurrency, max_in_flight=limit)
    sent = []
    while (due_us := client.next_us) is not None and len(sent) < 3:
        sent += client.send(due_us)
        if client.next_us == due_us:
            break
    left = list(client.left(HOUR_US))
    assert [request.request_id for request in (*sent, *left)] == list(range(1, len(rows) + 1))
    assert sorted(request.prompt_tokens for request in (*sent, *left)) == list(range(1, len(rows) + 1))
    assert all(request.arrival_us == HOUR_US for request in left)
