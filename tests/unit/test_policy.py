"""Policies: configurations, layer splits, and placement of shards."""

from dataclasses import replace
from itertools import permutations

import hypothesis.strategies as st
import pytest
from hypothesis import given

from maveriq.domain.cluster import ClusterState, ClusterView, GpuView
from maveriq.domain.deployments import EndpointSpec, Intent, Objective
from maveriq.domain.models import KvType, WeightType, load_model
from maveriq.domain.parallel import deal_layers, max_layers_per_stage, shard_bytes
from maveriq.errors import InputError, UnknownNameError
from maveriq.estimate.cluster_spec import cluster_from
from maveriq.estimate.hardware_profile import load_profile
from maveriq.estimate.registry import make_estimator
from maveriq.policy.configuration import Ranking, best_candidate, enumerate_configurations, rank
from maveriq.policy.maveriq import hybrid, least_loaded_first, packing, place_shards
from maveriq.policy.policy import Deploy, Rejection
from maveriq.policy.registry import make_policy
from maveriq.units import BYTES_PER_GIB, bytes_from_gib

PROFILE = load_profile("a6000-short")
PAPER = make_estimator("paper", PROFILE)


def gpus(*loads: float, free_gib: float = 48.0) -> tuple[GpuView, ...]:
    return tuple(
        GpuView(
            gpu_id=index,
            node=0,
            capacity_bytes=48 * BYTES_PER_GIB,
            free_bytes=bytes_from_gib(free_gib),
            load=load,
        )
        for index, load in enumerate(loads)
    )


def view_with_free(*free_gib: float) -> ClusterView:
    views = gpus(*[0.0] * len(free_gib))
    return ClusterView(
        gpus=tuple(replace(gpu, free_bytes=bytes_from_gib(gib)) for gpu, gib in zip(views, free_gib, strict=True))
    )


def endpoint(model: str = "llama-2-7b", objective: Objective = Objective.MIN_COST, **intent) -> EndpointSpec:
    return EndpointSpec(
        endpoint_id=1,
        model=load_model(model),
        intent=Intent(objective=objective, **intent),
        requested_us=0,
        prompt_tokens=10,
        output_tokens=20,
    )


def ranked(requested: EndpointSpec, view: ClusterView | None = None) -> Ranking:
    empty = ClusterState(cluster_from("8xA6000")).view([0.0] * 8)
    return rank(requested, view or empty, PAPER, PROFILE.accuracy, cost=PROFILE.min_cost)


# Layer splits


@given(st.integers(1, 100), st.lists(st.integers(0, 60), min_size=1, max_size=8))
def test_layer_splits_fill_every_stage_within_its_memory(layers: int, room: list[int]) -> None:
    split = deal_layers(layers, room)
    if split is None:
        assert sum(room) < layers or min(room) == 0 or layers < len(room)
        return
    assert sum(split) == layers
    assert all(1 <= held <= maximum for held, maximum in zip(split, room, strict=True))
    # Layers are added in turns: a stage with two fewer layers than another has no memory left.
    for held, maximum in zip(split, room, strict=True):
        assert held == maximum or held >= max(split) - 1


@pytest.mark.parametrize(
    ("layers", "room", "split"),
    [(80, [80], (80,)), (32, [99, 99, 99], (11, 11, 10)), (10, [2, 99, 3], (2, 5, 3)), (3, [9, 9, 9, 9], None)],
)
def test_layer_splits_by_example(layers: int, room: list[int], split: tuple[int, ...] | None) -> None:
    assert deal_layers(layers, room) == split


def test_a_stage_is_limited_by_its_fullest_gpu() -> None:
    # Two layers of 8 bytes over TP 2: 4 bytes a layer on each GPU.
    assert max_layers_per_stage([9, 8, 100, 3], tp=2, layers=2, memory_bytes=16) == [2, 0]
    assert shard_bytes((1, 1), tp=2, layers=2, memory_bytes=15) == (4, 4, 4, 4)


# Placing


def test_orders_of_the_rules() -> None:
    loads = gpus(0.2, 1.0, 0.7, 0.0, 0.69, 0.9)

    def order(rule) -> list[int]:
        return [gpu.gpu_id for gpu in rule(loads)]

    assert order(least_loaded_first) == [3, 0, 4, 2, 5, 1]
    assert order(packing) == [5, 2, 4, 0, 3, 1]
    assert order(hybrid(0.7)) == [4, 0, 3, 2, 5, 1]
    assert order(hybrid(0.0)) == order(least_loaded_first)


@pytest.mark.parametrize("rule", [least_loaded_first, packing, hybrid(0.7)])
def test_ties_keep_the_order_of_ids(rule) -> None:
    assert [gpu.gpu_id for gpu in rule(gpus(*[0.3] * 5))] == [0, 1, 2, 3, 4]


@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=4),
    st.lists(st.integers(1, 9), min_size=1, max_size=5),
    st.randoms(use_true_random=False),
)
def test_shards_are_placed_in_any_order_of_gpus_if_possible(shards, free, random) -> None:
    order = [
        GpuView(gpu_id=index, node=0, capacity_bytes=9, free_bytes=amount, load=0.0)
        for index, amount in enumerate(free)
    ]
    random.shuffle(order)
    placed = place_shards(shards, order)
    possible = any(
        all(size <= free[gpu] for size, gpu in zip(shards, choice, strict=True))
        for choice in permutations(range(len(free)), len(shards))
    )
    assert (placed is not None) == possible
    if placed is not None:
        assert len(set(placed)) == len(shards)
        assert all(size <= free[gpu] for size, gpu in zip(shards, placed, strict=True))


# Choosing


def test_enumeration_order_breaks_ties() -> None:
    configurations = list(enumerate_configurations(load_model("llama-2-7b"), 4))
    keys = [
        (config.tp, config.pp, list(WeightType).index(config.weights), list(KvType).index(config.kv))
        for config in configurations
    ]
    assert keys == sorted(keys)
    assert {(config.tp, config.pp) for config in configurations} == {
        (1, 1), (1, 2), (1, 3), (1, 4), (2, 1), (2, 2), (4, 1),
    }  # fmt: skip
    assert {configuration.tp for configuration in enumerate_configurations(load_model("falcon-7b"), 8)} == {
        1
    }  # 71 heads


@pytest.mark.parametrize("objective", Objective)
def test_candidates_are_in_the_order_of_the_objective(objective: Objective) -> None:
    scores = [candidate.score for candidate in ranked(endpoint("falcon-40b", objective)).candidates]
    assert scores == sorted(scores)
    assert len(scores) > 10


def test_everything_enumerated_is_ranked_or_rejected() -> None:
    requested = endpoint("llama-2-70b", slo_s=3.0, min_accuracy=95.0)
    ranking = ranked(requested)
    everything = list(enumerate_configurations(requested.model, 8))
    listed = [option.configuration for option in (*ranking.candidates, *ranking.rejected)]
    assert sorted(map(str, listed)) == sorted(map(str, everything))
    assert all(candidate.service.latency_s < 3.0 for candidate in ranking.candidates)
    assert all(candidate.accuracy >= 95.0 for candidate in ranking.candidates)


def test_an_unreachable_slo_falls_back_to_the_fastest() -> None:
    unmet, free = ranked(endpoint(slo_s=0.001)), ranked(endpoint(objective=Objective.MIN_LATENCY))
    assert unmet.candidates[0].configuration == free.candidates[0].configuration
    assert unmet.note.startswith("misses its SLO of 0.001 s: the fastest that fits takes 0.")
    floor = ranked(endpoint(slo_s=0.001, min_accuracy=99.9, float16_only=True))
    assert {candidate.configuration.weights for candidate in floor.candidates} == {WeightType.FLOAT16}


def test_float16_only_does_not_restrict_the_kv_dtype() -> None:
    kinds = {
        (candidate.configuration.weights, candidate.configuration.kv)
        for candidate in ranked(endpoint(float16_only=True)).candidates
    }
    assert kinds == {(WeightType.FLOAT16, KvType.INT8), (WeightType.FLOAT16, KvType.NATIVE)}


def test_an_unmeasured_accuracy_fails_only_an_accuracy_floor() -> None:
    def unknown(model: str, weights: WeightType, kv: KvType) -> float | None:
        return None

    view = view_with_free(*[47.5] * 8)
    assert rank(endpoint(), view, PAPER, unknown).candidates
    floor = rank(endpoint(min_accuracy=1.0), view, PAPER, unknown)
    assert not floor.candidates
    assert "its accuracy was never measured" in floor.why_empty()


def test_layers_follow_free_memory() -> None:
    """With three small GPUs and a large one, the split is uneven and fits."""
    view = view_with_free(3.0, 3.0, 12.0, 3.0)
    split = {
        candidate.configuration.pp: candidate for candidate in ranked(endpoint(float16_only=True), view).candidates
    }[4]
    assert split.gpu_ids == (2, 0, 1, 3)
    assert split.layer_split[0] > split.layer_split[1] >= 1
    assert sum(split.layer_split) == 32


def test_an_endpoint_that_fits_nowhere_is_rejected_with_the_reason() -> None:
    policy = make_policy("hybrid", estimator=PAPER, accuracy=PROFILE.accuracy, packing_threshold=0.7)
    decision = policy.decide(endpoint("llama-2-70b"), view_with_free(1.0, 0.5))
    assert isinstance(decision, Rejection)
    assert "does not fit the free memory" in decision.reason
    assert decision.reason.endswith("(free GiB: 1.0 0.5)")


@pytest.mark.parametrize("name", ["hybrid", "packing", "llf", "none"])
def test_every_rule_places_the_same_configuration(name: str) -> None:
    policy = make_policy(name, estimator=PAPER, accuracy=PROFILE.accuracy, packing_threshold=0.7)
    view = ClusterView(gpus=tuple(replace(gpu, load=0.1 * gpu.gpu_id) for gpu in view_with_free(*[40.0] * 8).gpus))
    decision = policy.decide(endpoint(), view)
    assert isinstance(decision, Deploy)
    (plan,) = decision.plans
    assert plan.configuration == ranked(endpoint()).candidates[0].configuration
    assert plan.gpu_ids == {"hybrid": (6,), "packing": (7,), "llf": (0,), "none": (0,)}[name]


def test_policies_by_name() -> None:
    with pytest.raises(UnknownNameError, match="unknown policy 'hybird'; did you mean 'hybrid'"):
        make_policy("hybird", estimator=PAPER, accuracy=PROFILE.accuracy, packing_threshold=0.7)
    with pytest.raises(InputError, match=r"packing threshold must lie between 0 and 1, not 1\.5"):
        make_policy("llf", estimator=PAPER, accuracy=PROFILE.accuracy, packing_threshold=1.5)


# Surprises


CALIBRATED = make_estimator("calibrated", PROFILE)


def surprising(model: str, objective: Objective, **changes) -> Ranking:
    empty = ClusterState(cluster_from("8xA6000")).view([0.0] * 8)
    asked = replace(endpoint(model, objective), **changes)
    return rank(asked, empty, CALIBRATED, PROFILE.accuracy, evidence=PROFILE.full_models.ratio)


def test_a_pipeline_that_wins_says_that_it_was_measured_and_on_what() -> None:
    best = surprising("falcon-7b", Objective.MIN_LATENCY).candidates[0]
    assert best.configuration.pp > 1
    claim, basis = best.note.rstrip(")").split(" (")
    assert claim.startswith(f"PP {best.configuration.pp} is faster than PP 1 by ")
    assert basis.startswith("measured: ")
    assert basis.endswith(
        f"faster on the whole model, {best.configuration.weights}, prompts of 923 tokens, not of 10, 20 output tokens"
    )
    same_prompt = surprising("falcon-7b", Objective.MIN_LATENCY, prompt_tokens=923).candidates[0]
    assert ", not of" not in same_prompt.note


def test_a_model_that_was_not_measured_says_so() -> None:
    notes = [candidate.note for candidate in surprising("llama-2-13b", Objective.MIN_LATENCY).candidates]
    assert any("an estimate: llama-2-13b was not measured with both" in note for note in notes)
    assert not any("measured: " in note for note in notes)


def test_less_tensor_parallelism_is_noted_where_latency_decides() -> None:
    by_latency, by_cost = (
        surprising("llama-2-7b", objective, prompt_tokens=923).candidates
        for objective in (Objective.MIN_LATENCY, Objective.MIN_COST)
    )
    noted = [candidate for candidate in by_latency if "is faster than TP" in candidate.note]
    assert noted
    for candidate in noted:
        tp = candidate.configuration.tp
        assert f"TP {tp} is faster than TP {2 * tp} by " in candidate.note
    assert not any("is faster than TP" in candidate.note for candidate in by_cost)
    assert by_cost[0].note == ""


def test_a_decision_carries_the_note_of_its_configuration() -> None:
    policy = make_policy(
        "llf",
        estimator=CALIBRATED,
        accuracy=PROFILE.accuracy,
        packing_threshold=0.7,
        evidence=PROFILE.full_models.ratio,
    )
    view = ClusterState(cluster_from("8xA6000")).view([0.0] * 8)
    decision = policy.decide(endpoint("falcon-7b", Objective.MIN_LATENCY, slo_s=0.001), view)
    assert isinstance(decision, Deploy)
    slo, surprise = decision.plans[0].note.split("; ")
    assert slo.startswith("misses its SLO of 0.001 s: the fastest that fits takes 0.1")
    assert "is faster than PP 1" in surprise


def test_times_are_in_the_unit_that_was_asked() -> None:
    empty = ClusterState(cluster_from("8xA6000")).view([0.0] * 8)
    asked = endpoint(slo_s=0.0001)
    in_ms = rank(asked, empty, PAPER, PROFILE.accuracy, in_ms=True)
    assert in_ms.note.startswith("misses its SLO of 0.1 ms: the fastest that fits takes ")
    assert in_ms.note.endswith(" ms")
    assert rank(asked, empty, PAPER, PROFILE.accuracy).note.startswith("misses its SLO of 0.0001 s: ")


def test_an_accuracy_below_one_percent_is_taken_for_a_share() -> None:
    with pytest.raises(InputError, match=r"minimum accuracy is in percent, and 0\.98 would be 0\.98 %; write 98 for"):
        Intent(objective=Objective.MIN_COST, min_accuracy=0.98)


class CountingEstimator:
    """Passes everything on, and counts estimates."""

    def __init__(self, estimator) -> None:
        self._estimator = estimator
        self.estimates = 0

    def __getattr__(self, name):
        return getattr(self._estimator, name)

    def service(self, *arguments, **lengths):
        self.estimates += 1
        return self._estimator.service(*arguments, **lengths)


@pytest.mark.parametrize("objective", Objective)
@pytest.mark.parametrize(("free_gib", "slo_s"), [(48.0, None), (6.0, None), (48.0, 0.5), (48.0, 1e-6)])
def test_the_best_candidate_is_the_first_of_the_ranking_with_fewer_estimates(objective, free_gib, slo_s) -> None:
    model = load_model("llama-3.2-3b")
    intent = Intent(objective=objective, slo_s=slo_s)
    endpoint = EndpointSpec(
        endpoint_id=1, model=model, intent=intent, requested_us=0, prompt_tokens=200, output_tokens=20
    )
    view = ClusterView(gpus=tuple(replace(gpu, usd_per_hour=1.0) for gpu in gpus(*[0.0] * 4, free_gib=free_gib)))
    estimator = CountingEstimator(make_estimator("physics", PROFILE))
    asked = (endpoint, view, estimator, lambda *_: 100.0)
    best, needed = best_candidate(*asked), estimator.estimates
    ranking = rank(*asked)
    assert best == (None if ranking.note else ranking.candidates[0])
    if free_gib > 6 and slo_s is None and objective is not Objective.MIN_MEMORY:
        assert needed < 0.8 * (estimator.estimates - needed)
