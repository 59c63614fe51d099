"""Laws of placements, of the simulator, and of the search."""

from dataclasses import replace
from unittest import mock

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings
from placement_fixtures import all_placements, placements, problems
from placement_reference import plain_loop

from maveriq.policy.alpaserve.problem import (
    Fill,
    PlacementPolicy,
    PlacementProblem,
    SearchSettings,
    SimulatorSettings,
    StarRule,
    gpu_bytes,
)
from maveriq.policy.alpaserve.search import search
from maveriq.policy.alpaserve.simulator import PlacementSimulator, simulate

POLICIES = [
    SearchSettings(max_tp=8),
    SearchSettings(fill=Fill.BEAM),
    SearchSettings(policy=PlacementPolicy.SELECTIVE_REPLICATION),
    SearchSettings(policy=PlacementPolicy.SELECTIVE_REPLICATION, fill=Fill.BEAM, beam=2),
    SearchSettings(policy=PlacementPolicy.MODEL_PARALLELISM, group_size=1),
    SearchSettings(policy=PlacementPolicy.ROUND_ROBIN),
    *(SearchSettings(policy=PlacementPolicy.ALPASERVE_STAR, star_rule=rule) for rule in StarRule),
]


@pytest.mark.parametrize("single_precision", [True, False])
@given(data=st.data())
@settings(max_examples=100, deadline=None)
def test_the_compiled_loop_agrees_with_plain_python(single_precision, data: st.DataObject) -> None:
    problem = data.draw(problems())
    placement = data.draw(placements(problem))
    constants = SimulatorSettings(single_precision=single_precision)
    compiled = simulate(problem, placement, constants)
    with mock.patch("maveriq.policy.alpaserve.kernel.simulate_requests", plain_loop):
        plain = simulate(problem, placement, constants)
    for field in ("ok", "finish_s", "requests", "served", "dispatched"):
        np.testing.assert_array_equal(getattr(compiled, field), getattr(plain, field))
    assert (compiled.attainment, compiled.mean_latency_s) == (plain.attainment, plain.mean_latency_s)


@given(st.data())
@settings(max_examples=80, deadline=None)
def test_served_requests_meet_their_slo(data: st.DataObject) -> None:
    problem = data.draw(problems())
    placement = data.draw(placements(problem))
    stats = simulate(problem, placement)
    latency_s = stats.finish_s - problem.demand.arrival_s
    hosted = {model for group in placement for model in group.models}
    # SLOs are rounded to float32.
    assert (latency_s <= problem.demand.slo_s * (1 + 1e-7)).all()
    assert (latency_s[~stats.ok] == 0).all()
    assert stats.served.sum() == stats.ok.sum()
    assert stats.dispatched.sum() == sum(stats.requests[model] for model in hosted)
    assert (stats.served <= stats.requests).all()
    counts = PlacementSimulator(problem).count(placement)
    np.testing.assert_array_equal(counts.served, stats.served)
    np.testing.assert_array_equal(counts.dispatched, stats.dispatched)


@pytest.mark.parametrize("how", POLICIES, ids=lambda how: f"{how.policy}-{how.fill}-{how.star_rule}")
@given(problem=problems(max_gpus=4, max_models=4, max_requests=15))
@settings(max_examples=25, deadline=None)
def test_a_placement_fits_and_hosts_no_model_twice(how: SearchSettings, problem: PlacementProblem) -> None:
    solution = search(problem, how)
    if solution.best is None:
        assert how.policy is PlacementPolicy.ALPASERVE_STAR
        assert solution.reason
        assert solution.groups == ()
        return
    for group in solution.best.placement:
        assert len(set(group.models)) == len(group.models)
        assert gpu_bytes(group, problem) <= problem.memory_bytes
    assert sum(group.tp * group.pp for group in solution.groups) <= problem.gpus
    stats = simulate(problem, solution.best.placement)
    assert (stats.attainment, stats.score) == (solution.best.attainment, solution.best.score)
    if how.policy is PlacementPolicy.ALPASERVE_STAR:
        assert {model for group in solution.groups for model in group.model_indices} == set(range(len(problem.models)))


@given(problem=problems(max_gpus=2, max_models=3, max_requests=15))
@settings(max_examples=60, deadline=None)
def test_more_memory_never_lowers_the_best_score(problem: PlacementProblem) -> None:
    """With more memory per GPU, the exhaustive search scores at least as well, and no heuristic beats it."""
    best = _best_score(problem)
    richer = replace(problem, memory_bytes=2 * problem.memory_bytes)
    assert _best_score(richer) >= best
    for fill in Fill:
        found = search(problem, SearchSettings(fill=fill, max_tp=8))
        assert found.best is not None
        assert found.best.score <= best


def _best_score(problem: PlacementProblem) -> float:
    simulator = PlacementSimulator(problem)
    return max(simulator.run(placement).score for placement in all_placements(problem))


@given(problem=problems())
@settings(max_examples=20, deadline=None)
def test_threads_do_not_change_the_answer(problem: PlacementProblem) -> None:
    alone, together = (search(problem, SearchSettings(workers=workers)) for workers in (1, 3))
    assert replace(alone, search_s=0) == replace(together, search_s=0)
