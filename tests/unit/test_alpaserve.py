"""AlpaServe's simulator, heuristics, candidates, buckets and rules on small cases."""

import math
from dataclasses import replace

import numpy as np
import pytest
from placement_fixtures import demand, problem, profile

from maveriq.domain.cluster import Cluster, Gpu
from maveriq.errors import InputError, InvariantError
from maveriq.policy.alpaserve.problem import (
    Group,
    GroupShape,
    ModelProfile,
    PlacementPolicy,
    SearchSettings,
    SimulatorSettings,
    StarRule,
    candidate_shapes,
    normal_form,
    problem_for_cluster,
    qualifies,
    verify,
)
from maveriq.policy.alpaserve.search import (
    SearchProgress,
    beam_search,
    bucket_models,
    device_splits,
    fast_greedy,
    round_robin,
    search,
    sub_problem,
)
from maveriq.policy.alpaserve.simulator import PlacementSimulator, simulate
from maveriq.units import BYTES_PER_GIB

ONE, PIPE2 = GroupShape(1, 1), GroupShape(1, 2)
EXACT = SimulatorSettings(penalty_per_stage=0, overhead_s=0, single_precision=False)


def test_candidates_of_eight_gpus_are_the_ten_of_the_published_search() -> None:
    cuts = list(candidate_shapes(8, 8, max_pp=8, max_tp=8))
    assert [(*cut[0], len(cut)) for cut in cuts] == [
        (1, 1, 8), (2, 1, 4), (1, 2, 4), (4, 1, 2), (2, 2, 2), (1, 4, 2), (8, 1, 1), (4, 2, 1), (2, 4, 1), (1, 8, 1),
    ]  # fmt: skip
    assert len(list(candidate_shapes(8, 8, max_pp=8, max_tp=4))) == 9
    assert len(list(candidate_shapes(64, 8, max_pp=8, max_tp=8))) == 16


def test_remaining_gpus_become_pipelines_and_groups_stay_within_nodes() -> None:
    assert list(candidate_shapes(7, 8, max_pp=1, max_tp=4))[-1] == (
        GroupShape(4, 1),
        GroupShape(1, 1),
        GroupShape(1, 2),
    )
    sizes = {cut[0].gpus for cut in candidate_shapes(12, 6, max_pp=8, max_tp=8)}
    assert sizes == {1, 2, 4}  # a group of eight is larger than a node and not a whole number of nodes


def test_normal_form_sorts_models_then_groups_and_keeps_equal_groups_in_order() -> None:
    groups = (Group(PIPE2, (2, 0)), Group(ONE, ()), Group(GroupShape(2, 1), ()), Group(ONE, (0, 1)))
    assert normal_form(groups) == (
        Group(ONE, ()), Group(GroupShape(2, 1), ()), Group(ONE, (0, 1)), Group(PIPE2, (0, 2)),
    )  # fmt: skip


@pytest.mark.parametrize(
    "broken",
    [(Group(ONE, (0, 0)),), (Group(ONE, (0, 1)),), (Group(ONE, ()), Group(PIPE2, ()))],
    ids=["a model twice", "too much memory", "too many GPUs"],
)
def test_verify_refuses_invalid_placements(broken) -> None:
    small = problem([profile(size_gib=1.5)] * 2, [(0, 0, 1)], gpus=2, memory_gib=2)
    with pytest.raises(InvariantError):
        verify(broken, small)


def test_a_request_is_served_within_its_slo_or_dropped_when_it_arrives() -> None:
    """Service 0.5 s, SLO 0.6 s: the second would end after 0.9 s and is dropped, the third just fits."""
    case = problem([profile(0.5)], [(0, 0, 0.6), (0.1, 0, 0.6), (0.4, 0, 0.6), (0.5, -1, 9)])
    stats = simulate(case, (Group(ONE, (0,)),), EXACT)
    assert stats.ok.tolist() == [True, False, True, False]
    assert stats.finish_s.tolist() == [0.5, 0.1, 1.0, 0.5]
    assert (stats.requests.tolist(), stats.served.tolist(), stats.dispatched.tolist()) == ([3], [2], [3])
    assert stats.attainment == 0.5
    assert stats.mean_latency_s == pytest.approx((0.5 + 0.6) / 4)
    assert stats.score == pytest.approx(0.5 - 1.1 / 4 / 10_000 + 1e-6)


def test_penalty_and_overhead_are_the_published_ones() -> None:
    """Each stage adds 0.9 %, and 11 ms are added at the end without occupying a GPU."""
    case = problem([profile(1.0)], [(0, 0, 9), (0, 0, 9)], gpus=2)
    stats = simulate(case, (Group(PIPE2, (0,)),), SimulatorSettings(single_precision=False))
    assert stats.finish_s.tolist() == pytest.approx([1.018 + 0.011, 1.5 * 1.018 + 0.011])
    assert simulate(case, (Group(PIPE2, (0,)),)).finish_s.tolist() == pytest.approx(stats.finish_s.tolist(), rel=1e-6)


def test_float32_decides_for_a_request_at_its_deadline() -> None:
    """0.1 rounds up in float32 as a stage time and as an SLO, but the clock starts at a float64 time."""
    case = problem([profile(0.7)], [(0, 0, math.nextafter(0.7, 0))])
    rounded = replace(EXACT, single_precision=True)
    assert simulate(case, (Group(ONE, (0,)),), EXACT).attainment == 0
    assert simulate(case, (Group(ONE, (0,)),), rounded).attainment == 1


def test_dispatch_takes_the_group_that_is_free_first_and_the_first_on_a_tie() -> None:
    groups = (Group(ONE, (0,)), Group(ONE, (0,)), Group(ONE, ()))
    case = problem([profile(1.0)], [(0, 0, 9), (0, 0, 9), (5, 0, 9), (5, 0, 9), (5, 0, 9)], gpus=3)
    stats = simulate(case, groups, EXACT)
    # At 5 s both have been idle since 1 s; their clocks are compared without an update.
    assert stats.dispatched.tolist() == [3, 2, 0]


def test_a_model_that_cannot_run_on_its_group_serves_nothing() -> None:
    case = problem([profile(shapes=[PIPE2])], [(0, 0, 9)])
    stats = simulate(case, (Group(ONE, (0,)),), EXACT)
    assert (stats.attainment, stats.dispatched.tolist()) == (0, [1])


def test_greedy_starts_with_the_last_of_equal_models_and_the_first_of_equal_groups() -> None:
    case = problem([profile()] * 3, [(0, 0, 1), (0, 1, 1), (0, 2, 1)], gpus=2, memory_gib=2)
    placement = fast_greedy(PlacementSimulator(case), (ONE, ONE))
    assert [group.models for group in placement] == [(1,), (2,)]


def test_greedy_fills_memory_up_to_the_last_byte_and_beam_stops_short_of_it() -> None:
    case = problem([profile(size_gib=2)] * 2, [(0, 0, 1), (0, 1, 1)], memory_gib=4)
    assert fast_greedy(PlacementSimulator(case), (ONE,)) == (Group(ONE, (0, 1)),)
    assert beam_search(PlacementSimulator(case), (ONE,)) == (Group(ONE, (0,)),)


def test_greedy_replicates_a_model_while_another_is_not_placed() -> None:
    """AlpaServe* fixes this defect: nothing forces greedy to cover all models."""
    case = problem([profile(), profile(size_gib=5)], [(0, 0, 1), (0, 1, 1)], gpus=2, memory_gib=4)
    assert [group.models for group in fast_greedy(PlacementSimulator(case), (ONE, ONE))] == [(0,), (0,)]


def test_beam_returns_the_empty_placement_if_nothing_fits() -> None:
    case = problem([profile(size_gib=9)], [(0, 0, 1)])
    assert beam_search(PlacementSimulator(case), (ONE,)) == (Group(ONE),)


def test_beam_finds_a_placement_that_greedy_misses() -> None:
    """Greedy gives the only free memory to the busiest model, whose requests no placement can serve."""
    requests = [(0.1 * k, 0, 0.01) for k in range(5)] + [(1, 1, 1.0)]
    case = problem([profile(1.0), profile(0.1)], requests, memory_gib=2.5)
    greedy, beam = (fill(PlacementSimulator(case), (ONE,)) for fill in (fast_greedy, beam_search))
    assert ([group.models for group in greedy], [group.models for group in beam]) == ([(0,)], [(1,)])


def test_round_robin_ends_at_the_first_full_group() -> None:
    small, large = profile(size_gib=1), profile(size_gib=3)
    case = problem([large, small, small, small], [(0, 0, 1)], gpus=2, memory_gib=3)
    # Group 0 is full at once; its next turn ends the placement, although group 1 has memory left.
    assert [group.models for group in round_robin(case, (ONE, ONE))] == [(0,), (1,)]


@pytest.mark.parametrize(
    ("rule", "hosted", "answer"),
    [
        (StarRule.A, [(0, 1), (1,)], True),
        (StarRule.A, [(1,), (1,)], False),
        (StarRule.B, [(0, 1)], True),
        (StarRule.B, [(0,), (1,)], False),
        (StarRule.C, [(0,), (1,)], True),
        (StarRule.C, [(0, 1), (1,)], False),
        (StarRule.F, [(0, 1), (0, 1)], True),
        (StarRule.F, [(0, 1), (1,)], False),
    ],
)
def test_star_rules(rule, hosted, answer) -> None:
    assert qualifies(rule, tuple(Group(ONE, models) for models in hosted), 2) is answer


def test_star_gives_the_reason_of_infeasibility() -> None:
    case = problem([profile(size_gib=3)] * 2, [(0, 0, 1)], gpus=1, memory_gib=4)
    solution = search(case, SearchSettings(policy=PlacementPolicy.ALPASERVE_STAR))
    assert not solution.feasible
    assert solution.reason == "none of 1 candidates hosts every model in every group within the memory of the GPUs"
    assert len(solution.candidates) == 1


def test_a_bucket_contains_models_with_latencies_near_its_first() -> None:
    case = problem([profile(latency) for latency in (1.0, 1.3, 0.5, 1.7, 0.6)], [(0, 0, 1)])
    assert bucket_models(case) == [(0, 1), (2, 4), (3,)]


def test_splits_of_gpus_follow_the_load() -> None:
    fast_and_slow = [profile(1.0), profile(4.0)]
    case = problem(fast_and_slow, [(0, 0, 1)], gpus=8, rates=[1.0, 1.0])
    assert device_splits(case, [(0,), (1,)]) == [(8 - k, k) for k in range(1, 8)]
    many = problem([profile(1.0), profile(4.0), profile(9.0)], [(0, 0, 1)], gpus=16, rates=[1.0, 1.0, 1.0])
    splits = device_splits(many, [(0,), (1,), (2,)])
    assert 0 < len(splits) < 100
    assert all(sum(split) == 16 and min(split) >= 1 for split in splits)


def test_a_bucket_marks_requests_of_other_models_as_unknown() -> None:
    case = problem([profile()] * 3, [(0, 0, 1), (1, 1, 1), (2, 2, 1), (3, -1, 1)], gpus=4)
    part = sub_problem(case, (0, 2), 2)
    assert part.demand.model_index.tolist() == [0, -1, 1, -1]
    assert (part.gpus, [model.name for model in part.models]) == (2, ["m0", "m2"])


def test_bucketing_keeps_slow_models_from_blocking_fast_ones() -> None:
    """Two slow requests block both shared GPUs; on separate GPUs the fast model never waits."""
    requests = sorted([(4.0 * (k // 2), 1, 9.0) for k in range(20)] + [(0.3 + 0.5 * k, 0, 0.12) for k in range(80)])
    case = problem([profile(0.1, 1), profile(1.8, 1)], requests, gpus=2, memory_gib=2, rates=[2.0, 0.5])
    case = replace(case, models=tuple(replace(model, profile=_only_single(model.profile)) for model in case.models))
    shared, split = (search(case, SearchSettings(bucket=bucket)) for bucket in (False, True))
    assert split.best.attainment == 1 > shared.best.attainment
    assert [group.models for group in split.groups] == [("m0",), ("m1",)]


def _only_single(of: ModelProfile) -> ModelProfile:
    return ModelProfile(shapes={ONE: of.shapes[ONE]})


@pytest.mark.parametrize(
    ("profiles", "rates", "words"),
    [
        ([profile(), profile(9.0)], None, "rate_per_s of model 'm0'"),
        ([profile(), profile(9.0)], [0.0, 0.0], "positive rate_per_s"),
        ([profile(shapes=[PIPE2])], [1.0], "'m0' has none"),
    ],
)
def test_bucketing_names_missing_shapes(profiles, rates, words) -> None:
    with pytest.raises(InputError, match=words):
        search(problem(profiles, [(0, 0, 1)], gpus=2, rates=rates), SearchSettings(bucket=True))


def test_progress_counts_candidates_and_simulations() -> None:
    reports: list[SearchProgress] = []
    case = problem([profile()] * 2, [(0, 0, 1), (1, 1, 1)], gpus=4)
    search(case, progress=reports.append)
    assert reports[-1].candidates == reports[-1].candidates_done == 6
    assert reports[-1].requests == 2 * reports[-1].simulations > 0


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"policy": PlacementPolicy.MODEL_PARALLELISM}, "needs a group_size"),
        ({"beam": 0}, "beam must be at least 1"),
        ({"policy": PlacementPolicy.ROUND_ROBIN, "bucket": True}, "bucket applies to alpaserve"),
    ],
)
def test_invalid_settings_are_refused(settings, words) -> None:
    with pytest.raises(InputError, match=words):
        SearchSettings(**settings)


def test_groups_must_divide_the_cluster() -> None:
    case = problem([profile()], [(0, 0, 1)], gpus=3)
    with pytest.raises(InputError, match="3 GPUs cannot be cut into groups of 2"):
        search(case, SearchSettings(policy=PlacementPolicy.MODEL_PARALLELISM, group_size=2))


@pytest.mark.parametrize(
    ("requests", "words"),
    [
        ([(1, 0, 1), (0, 0, 1)], "order of time"),
        ([(math.nan, 0, 1), (0, 0, 1)], "order of time"),
        ([(0, 0, 0)], "SLO must be positive"),
        ([(0, 1, 1)], "between -1 and 0"),
    ],
)
def test_invalid_forecasts_are_refused(requests, words) -> None:
    with pytest.raises(InputError, match=words):
        demand(requests, 1)


def test_a_cluster_becomes_a_problem() -> None:
    def gpu(gpu_id: int, gib: int = 48) -> Gpu:
        return Gpu(gpu_id=gpu_id, node=gpu_id // 2, kind="any", capacity_bytes=gib * BYTES_PER_GIB, idle_bytes=5)

    forecast = demand([(0, 0, 1)], 1)
    equal = Cluster(name="equal", gpus=tuple(map(gpu, range(4))))
    made = problem_for_cluster(forecast, equal, [profile()])
    assert (made.gpus, made.gpus_per_node, made.memory_bytes) == (4, 2, 48 * BYTES_PER_GIB - 5)
    assert problem_for_cluster(forecast, equal, [profile()], memory_bytes=7).memory_bytes == 7
    mixed = Cluster(name="mixed", gpus=(gpu(0), gpu(1, 24)))
    with pytest.raises(InputError, match="needs equal GPUs"):
        problem_for_cluster(forecast, mixed, [profile()])
    with pytest.raises(InputError, match="2 profiles for 1 models"):
        problem_for_cluster(forecast, equal, [profile()] * 2)


def test_read_only_arrays_are_accepted() -> None:
    case = problem([profile()], [(0, 0, 1)])
    for column in (case.demand.arrival_s, case.demand.model_index, case.demand.slo_s):
        column.flags.writeable = False
    assert simulate(case, (Group(ONE, (0,)),)).attainment == 1
    assert np.isfinite(simulate(case, (Group(ONE, (0,)),)).score)
