"""Contention of engines that share a host process: examples and laws."""

from dataclasses import replace

import hypothesis.strategies as st
import pytest
from fixtures import TokenSeconds, arrivals, scenario
from hypothesis import given

from maveriq.domain.cluster import Cluster
from maveriq.domain.faults import Fault, FaultTarget
from maveriq.scenario.service_times import EstimatedServiceTimes
from maveriq.sim.simulator import simulate

READY = 1_000


class Sociable(TokenSeconds):
    """An estimator: a token takes 1 ms, and `delay_s` more per other busy engine on one GPU."""

    def __init__(self, delay_s: float = 0.001) -> None:
        super().__init__()
        self.delay_per_engine_s = delay_s

    def shares_process(self, configuration) -> bool:
        return configuration.gpus == 1

    def contention_delay_s(self, model, configuration, *, co_located: int) -> float:
        return co_located * self.delay_per_engine_s


def contended_system(requests, gpus_of, *, estimator=None, **options):
    return replace(scenario(requests, gpus_of, **options), service_times=EstimatedServiceTimes(estimator or Sociable()))


def run(times_ms, endpoints, tokens, gpus_of, **options):
    """Return starts and finishes in milliseconds after engines are ready."""
    requests = arrivals([READY + 1_000 * at for at in times_ms], endpoints, tokens)
    table = simulate(contended_system(requests, gpus_of, **options)).requests
    return ((table.start_us - READY) / 1e3).tolist(), ((table.finish_us - READY) / 1e3).tolist()


THREE = {1: [(0,)], 2: [(1,)], 3: [(2,)]}


def test_two_co_located_engines_take_twice_as_long() -> None:
    assert run([0, 0], [1, 2], [10, 10], THREE)[1] == [20, 20]


def test_a_later_execution_slows_an_earlier_one() -> None:
    # The first generates 10 of 20 tokens alone, 5 in 10 ms with the second, and the last 5 alone again.
    starts, finishes = run([0, 10], [1, 2], [20, 5], THREE)
    assert starts == [0, 10]
    assert finishes == [25, 20]


def test_each_of_three_waits_for_two() -> None:
    assert run([0, 0, 0], [1, 2, 3], [10, 10, 10], THREE)[1] == [30, 30, 30]


def test_engines_on_several_gpus_cause_no_contention() -> None:
    assert run([0, 0], [1, 2], [10, 10], {1: [(0, 1)], 2: [(2,)]})[1] == [10, 10]


def test_engines_on_different_nodes_do_not_contend() -> None:
    requests = arrivals([READY, READY], [1, 2], [10, 10])
    system = contended_system(requests, THREE)
    nodes = Cluster(name="two nodes", gpus=tuple(replace(gpu, node=gpu.gpu_id) for gpu in system.cluster.gpus))
    table = simulate(replace(system, cluster=nodes)).requests
    assert (table.finish_us - table.start_us).tolist() == [10_000, 10_000]


def test_contention_delays_the_first_token() -> None:
    requests = arrivals([READY, READY], [1, 2], [10, 10])
    table = simulate(contended_system(requests, THREE)).requests
    assert (table.first_token_us - table.start_us).tolist() == [2_000, 2_000]


def test_contention_does_not_move_a_past_first_token() -> None:
    requests = arrivals([READY, READY + 5_000], [1, 2], [10, 10])
    table = simulate(contended_system(requests, THREE)).requests
    assert (table.first_token_us - READY).tolist() == [1_000, 7_000]


def test_a_failed_engine_causes_no_contention() -> None:
    fault = Fault(target=FaultTarget.GPU, target_id=1, at_us=READY + 10_000, for_us=None)
    # The first generates five tokens in ten milliseconds with the second, and five alone.
    _, finishes = run([0, 0], [1, 2], [10, 10], THREE, faults=(fault,))
    assert finishes[0] == 15


def test_an_estimator_without_contention_causes_none() -> None:
    assert run([0, 0], [1, 2], [10, 10], THREE, estimator=TokenSeconds())[1] == [10, 10]


@given(
    st.lists(st.tuples(st.integers(0, 60), st.integers(1, 3), st.integers(1, 30)), min_size=1, max_size=12),
    st.floats(0, 0.005),
)
def test_slowdown_is_between_none_and_full_contention(requests, wait_s: float) -> None:
    requests.sort()
    times_ms, endpoints, tokens = zip(*requests, strict=True)
    starts, finishes = run(times_ms, endpoints, tokens, THREE, estimator=Sociable(wait_s))
    for start, finish, count in zip(starts, finishes, tokens, strict=True):
        rounding = 0.001 * 2 * len(requests)
        assert count - rounding <= finish - start <= count * (1 + 2_000 * wait_s) + rounding


@given(st.lists(st.tuples(st.integers(0, 60), st.integers(1, 3), st.integers(1, 30)), min_size=1, max_size=12))
def test_contention_of_zero_changes_nothing(requests) -> None:
    requests.sort()
    times_ms, endpoints, tokens = zip(*requests, strict=True)
    polite = run(times_ms, endpoints, tokens, THREE, estimator=Sociable(0.0))
    assert polite == run(times_ms, endpoints, tokens, THREE, estimator=TokenSeconds())


@pytest.mark.parametrize("wait_s", [0.0, 0.0007])
def test_a_contended_run_is_repeatable(wait_s: float) -> None:
    requested = ([0, 3, 3, 9, 9], [1, 2, 3, 1, 2], [7, 9, 4, 4, 4], THREE)
    assert run(*requested, estimator=Sociable(wait_s)) == run(*requested, estimator=Sociable(wait_s))
