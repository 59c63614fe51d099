"""Controller and supervision under random faults, in simulated time (as FoundationDB and TigerBeetle test).

Everything is drawn from a seed: what users do, when engines crash, hang or do not start, which messages are lost,
repeated, late. A failing seed n plays again with `python scripts/soak.py --seed n`, always the same.
"""

from collections import Counter

import pytest
from cluster_sim import simulate_cluster
from fault_injection import FaultRates
from restart_sim import simulate_restarts

SEEDS = 500
RESTART_SEEDS = 40
_CHUNK = 50
_RESTART_CHUNK = 20


def quick_first(starts: range) -> list:
    """All chunks but the first are heavy."""
    return [pytest.param(start, marks=[pytest.mark.heavy] if start else []) for start in starts]


@pytest.mark.parametrize("first", quick_first(range(0, SEEDS, _CHUNK)))
def test_nothing_is_lost_whatever_fails(first: int) -> None:
    statuses: Counter[str] = Counter()
    for seed in range(first, first + _CHUNK):
        try:
            seen = simulate_cluster(seed)
        except BaseException as error:
            error.add_note(f"seed {seed}; run it again with: python scripts/soak.py --seed {seed}")
            raise
        statuses += seen.statuses
    # Not only ruins: in each chunk most requests are served, and every other end happens too.
    assert statuses["completed"] > statuses["refused"] + statuses["failed"]
    assert statuses["refused"]
    assert statuses["failed"]


def test_a_seed_plays_the_same_again() -> None:
    assert simulate_cluster(7) == simulate_cluster(7)


@pytest.mark.parametrize("seed", range(20))
def test_lost_and_late_messages_cost_time_and_no_engine(seed: int) -> None:
    bad_line = FaultRates(until_s=1000, lost=0.1, repeated=0.3, mean_delay_s=0.05, break_engines=False)
    seen = simulate_cluster(seed, bad_line)
    assert seen.engines <= seen.deployments  # fewer where one is taken away before it has a process
    assert (seen.failures, seen.statuses["failed"]) == (0, seen.reasons["the client went away"])


@pytest.mark.parametrize("seed", range(20))
def test_an_executor_that_stands_still_blames_no_engine(seed: int) -> None:
    seen = simulate_cluster(seed, FaultRates(until_s=1000, stall_rate=0.1, break_engines=False))
    assert seen.hangs == 0


@pytest.mark.parametrize("first", quick_first(range(0, RESTART_SEEDS, _RESTART_CHUNK)))
def test_what_a_service_accepted_has_an_end_however_often_it_is_killed(first: int) -> None:
    statuses: Counter[str] = Counter()
    for seed in range(first, first + _RESTART_CHUNK):
        try:
            statuses += simulate_restarts(seed).statuses
        except BaseException as error:
            error.add_note(f"seed {seed}; run it again with: python scripts/soak.py --restarts --seed {seed}")
            raise
    assert statuses["completed"] > statuses["failed"] > 0
