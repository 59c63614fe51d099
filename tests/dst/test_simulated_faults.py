"""Controller and supervision under random faults, in simulated time (as FoundationDB and TigerBeetle test).

A seed decides what users do, when engines crash, hang or do not start, and which messages are lost, repeated or late.
`python scripts/soak.py --seed n` repeats a failing seed n exactly.
"""

from collections import Counter

import pytest
from cluster_sim import simulate_cluster
from fault_injection import FaultRates
from restart_sim import simulate_restarts

from maveriq.domain.deployments import Batching

SEEDS = 500
RESTART_SEEDS = 40
_CHUNK = 50
_RESTART_CHUNK = 20


def quick_first(starts: range) -> list:
    """Mark all chunks but the first as heavy."""
    return [pytest.param(start, marks=[pytest.mark.heavy] if start else []) for start in starts]


@pytest.mark.parametrize("first", quick_first(range(0, SEEDS, _CHUNK)))
def test_no_request_is_lost_under_any_faults(first: int) -> None:
    statuses: Counter[str] = Counter()
    for seed in range(first, first + _CHUNK):
        try:
            seen = simulate_cluster(seed)
        except BaseException as error:
            error.add_note(f"seed {seed}; run it again with: python scripts/soak.py --seed {seed}")
            raise
        statuses += seen.statuses
    # In each chunk most requests complete, and every other status occurs too.
    assert statuses["completed"] > statuses["refused"] + statuses["failed"]
    assert statuses["refused"]
    assert statuses["failed"]


def test_an_engine_that_says_too_early_that_it_has_loaded_keeps_its_memory() -> None:
    """Believed, its message gave the memory that it had yet to allocate to another engine (found by the soak test)."""
    simulate_cluster(7835)


@pytest.mark.parametrize("first", quick_first(range(0, SEEDS, _CHUNK)))
def test_no_request_of_a_continuous_engine_is_lost_under_any_faults(first: int) -> None:
    statuses: Counter[str] = Counter()
    for seed in range(first, first + _CHUNK):
        try:
            statuses += simulate_cluster(seed, batching=Batching.CONTINUOUS).statuses
        except BaseException as error:
            error.add_note(f"seed {seed} with continuous engines")
            raise
    assert statuses["completed"] > statuses["refused"] + statuses["failed"]
    assert statuses["refused"]
    assert statuses["failed"]


@pytest.mark.parametrize("batching", Batching)
def test_equal_seeds_give_equal_runs(batching: Batching) -> None:
    assert simulate_cluster(7, batching=batching) == simulate_cluster(7, batching=batching)


@pytest.mark.parametrize("batching", Batching)
@pytest.mark.parametrize("seed", range(20))
def test_lost_and_late_messages_fail_no_engine(seed: int, batching: Batching) -> None:
    faults = FaultRates(until_s=1000, lost=0.1, repeated=0.3, mean_delay_s=0.05, break_engines=False)
    seen = simulate_cluster(seed, faults, batching=batching)
    assert seen.engines <= seen.deployments  # fewer if an endpoint is removed before its engine starts
    assert (seen.failures, seen.statuses["failed"]) == (0, seen.reasons["the client went away"])


@pytest.mark.parametrize("batching", Batching)
@pytest.mark.parametrize("seed", range(20))
def test_a_stalled_executor_reports_no_hangs(seed: int, batching: Batching) -> None:
    faults = FaultRates(until_s=1000, stall_rate=0.1, break_engines=False)
    seen = simulate_cluster(seed, faults, batching=batching)
    assert seen.hangs == 0


@pytest.mark.parametrize("first", quick_first(range(0, RESTART_SEEDS, _RESTART_CHUNK)))
def test_accepted_requests_end_across_restarts(first: int) -> None:
    statuses: Counter[str] = Counter()
    for seed in range(first, first + _RESTART_CHUNK):
        try:
            statuses += simulate_restarts(seed).statuses
        except BaseException as error:
            error.add_note(f"seed {seed}; run it again with: python scripts/soak.py --restarts --seed {seed}")
            raise
    assert statuses["completed"] > statuses["failed"] > 0
