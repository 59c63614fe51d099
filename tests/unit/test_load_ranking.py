"""Laws of choosing configurations and replicas of continuous engines at a load, on engines with simple times."""

import math
from dataclasses import dataclass, replace

import hypothesis.strategies as st
import pytest
from fixtures import MODEL
from hypothesis import given, settings

from maveriq.domain.cluster import ClusterView, GpuView
from maveriq.domain.deployments import Batching, Cost, EndpointSpec, ExpectedLoad, Intent, Objective
from maveriq.domain.models import WeightType
from maveriq.domain.parallel import ParallelConfig
from maveriq.errors import InputError
from maveriq.estimate.estimator import ServiceEstimate
from maveriq.estimate.load_curve import LoadCurve
from maveriq.policy.configuration import RejectedConfig
from maveriq.policy.load_ranking import MAX_UTILIZATION, SLO_SHARE, LoadRanking, best_at_load, rank_at_load
from maveriq.policy.maveriq import MaverIQ, hybrid, least_loaded_first, packing
from maveriq.policy.policy import Deploy
from maveriq.units import BYTES_PER_GIB

OUTPUT = 100


def service_of(tp: int, in_flight: int) -> ServiceEstimate:
    """A token takes 10 ms on one GPU alone, a tenth more for each other request, and less with TP."""
    tpot_s = 0.01 * (1 + 0.1 * (in_flight - 1)) / tp**0.7
    return ServiceEstimate(ttft_s=4 * tpot_s, tpot_s=tpot_s, output_tokens=OUTPUT)


@dataclass(frozen=True)
class SimpleEngines:
    """Engines of one to eight GPUs with room for so many requests a GPU."""

    room: int = 16

    def configurations(self, endpoint, *, kind, gpus):
        if endpoint.configuration is not None:
            return [endpoint.configuration]
        return [
            ParallelConfig(tp=tp, pp=1, weights=weights, gpu=kind)
            for tp in (1, 2, 4, 8)
            for weights in (WeightType.FLOAT16, WeightType.INT8)
            if tp <= gpus
        ]

    def why_not(self, endpoint, configuration):
        if configuration.weights is WeightType.INT8:
            return RejectedConfig(configuration=configuration, reason="no int8 here")
        return None

    def load_curve(self, endpoint, configuration):
        return LoadCurve(lambda in_flight: service_of(configuration.tp, in_flight), self.room * configuration.tp)


ENGINES = SimpleEngines()


def view(gpus: int, *, per_node: int = 8, usd: float | None = 2.0) -> ClusterView:
    return ClusterView(
        gpus=tuple(
            GpuView(
                gpu_id=number, node=number // per_node, capacity_bytes=80 * BYTES_PER_GIB,
                free_bytes=80 * BYTES_PER_GIB, load=0.0, usd_per_hour=usd,
            )
            for number in range(gpus)
        )
    )  # fmt: skip


def endpoint(rps: float | None = None, *, replicas: int | None = None, **intent) -> EndpointSpec:
    return EndpointSpec(
        endpoint_id=1,
        model=MODEL,
        intent=Intent(**{"objective": Objective.MIN_COST, **intent}),
        requested_us=0,
        prompt_tokens=50,
        output_tokens=OUTPUT,
        batching=Batching.CONTINUOUS,
        memory_share=0.9,
        replicas=replicas,
        load=None if rps is None else ExpectedLoad(rps=rps, prompt_tokens=50, output_tokens=OUTPUT),
    )


def ranked(asked: EndpointSpec, gpus: int = 16, **options) -> LoadRanking:
    return rank_at_load(asked, view(gpus), ENGINES, lambda *_: None, **options)


# The curve


@given(st.integers(1, 300), st.floats(0, 200), st.floats(0, 200))
def test_more_requests_are_more_in_flight_and_slower(room, rps, more):
    curve = LoadCurve(lambda in_flight: service_of(1, in_flight), room)
    few, many = sorted((rps, more))
    assert curve.in_flight(few) <= curve.in_flight(many) <= room
    assert curve.at(few).latency_s <= curve.at(many).latency_s


@given(st.integers(1, 300), st.floats(0.01, 200))
def test_the_requests_in_flight_obey_littles_law(room, rps):
    curve = LoadCurve(lambda in_flight: service_of(1, in_flight), room)
    in_flight = curve.in_flight(rps)
    if rps > curve.capacity_rps:
        assert in_flight == room
    else:
        assert in_flight / curve.at(rps).latency_s >= rps  # so many in flight are enough,
        fewer = service_of(1, max(1, in_flight - 1))
        assert in_flight == 1 or (in_flight - 1) / fewer.latency_s < rps  # and one fewer are not


@given(
    st.floats(0.01, 5), st.floats(0.01, 5), st.floats(0, 3), st.floats(0, 3), st.sampled_from([0.5, 0.9, 0.95, 0.99])
)
def test_the_slowest_get_slower_with_the_load_the_share_and_uneven_prompts(rps, more, cv, more_cv, share):
    curve = LoadCurve(lambda in_flight: service_of(1, in_flight), 40)

    def first_token_s(rps: float, cv: float, share: float) -> float:
        return curve.at_tail(rps, share, prompt_cv=cv).first_token_s

    few, many = sorted((rps, more))
    even, uneven = sorted((cv, more_cv))
    assert curve.at_tail(few, share).tpot_s <= curve.at_tail(many, share).tpot_s
    assert curve.at(few).tpot_s <= curve.at_tail(few, share).tpot_s
    assert first_token_s(few, cv, share) <= first_token_s(few, cv, 0.999) * (1 + 1e-9)
    if share >= 0.9:  # below, more variance may move the percentile down
        assert first_token_s(few, even, share) <= first_token_s(few, uneven, share) * (1 + 1e-9)


def test_an_engine_without_a_load_has_one_request_at_a_time():
    curve = LoadCurve(lambda in_flight: service_of(1, in_flight), 40)
    assert curve.at_tail(0.0, 0.95, prompt_cv=1.0) == curve.at(0.0)


def test_the_slowest_first_token_of_a_queue_that_is_all_waiting_is_exponential():
    """An M/M/1 queue that is nearly full: 95 % wait up to three times the mean."""

    def service_of(in_flight: int) -> ServiceEstimate:
        return ServiceEstimate(ttft_s=1e-3 if in_flight == 1 else 9.999, tpot_s=1e-9, output_tokens=1)

    curve = LoadCurve(service_of, 1_000_000)
    slowest = curve.at_tail(1_000.0, 0.95)
    assert slowest.first_token_s == pytest.approx(curve.at(1_000.0).first_token_s * math.log(20), rel=1e-3)


def test_an_engine_without_room_for_a_request_has_no_curve():
    with pytest.raises(InputError, match="room for a request"):
        LoadCurve(lambda in_flight: service_of(1, in_flight), 0)


# Replicas


def carried(tp: int) -> float:
    room = ENGINES.room * tp
    return MAX_UTILIZATION * room / service_of(tp, room).latency_s


@settings(max_examples=60)
@given(st.floats(0.1, 60), st.sampled_from(Objective))
def test_replicas_are_the_fewest_that_carry_the_load(rps, objective):
    for candidate in ranked(endpoint(rps, objective=objective)).candidates:
        tp, most = candidate.configuration.tp, 16 // candidate.configuration.tp
        assert candidate.replicas == min(most, max(1, math.ceil(rps / carried(tp))))
        assert bool(candidate.overload) == (rps > most * carried(tp) / MAX_UTILIZATION)


def test_without_a_load_there_is_one_replica_and_a_request_runs_alone():
    best = ranked(endpoint(objective=Objective.MIN_LATENCY)).candidates[0]
    assert (best.replicas, best.configuration.tp) == (1, 8)
    assert best.service == service_of(8, 1)


def test_a_tighter_slo_takes_more_replicas_until_none_meets_it():
    used = []
    for tpot_ms in (33, 25, 20, 14):
        found = ranked(endpoint(10.0, slo_tpot_s=tpot_ms / 1e3)).candidates
        single = next(candidate for candidate in found if candidate.configuration.tp == 1)
        assert single.slowest.tpot_s <= tpot_ms / 1e3
        used.append(single.replicas)
    assert used == sorted(used)
    assert used[-1] > used[0]
    missed = ranked(endpoint(10.0, slo_tpot_s=0.001))
    assert "misses its TPOT SLO of 1 ms for 95% of the requests" in missed.note
    latencies = [candidate.service.latency_s for candidate in missed.candidates]
    assert latencies == sorted(latencies)


@pytest.mark.parametrize("slo_ttft_s", [None, 0.1])
@pytest.mark.parametrize("rps", [0.5, 5.0, 20.0])
def test_min_cost_is_the_least_price_among_all_numbers_of_replicas_that_carry_the_load_within_the_slo(rps, slo_ttft_s):
    def usd_per_hour(tp: int, replicas: int) -> float:
        curve = ENGINES.load_curve(None, ParallelConfig(tp=tp, pp=1, weights=WeightType.FLOAT16))
        is_late = slo_ttft_s is not None and curve.at_tail(rps / replicas, SLO_SHARE).first_token_s > slo_ttft_s
        return math.inf if is_late or rps > replicas * carried(tp) else 2.0 * tp * replicas

    cheapest = min(usd_per_hour(tp, replicas) for tp in (1, 2, 4, 8) for replicas in range(1, 16 // tp + 1))
    assert ranked(endpoint(rps, slo_ttft_s=slo_ttft_s)).candidates[0].usd_per_hour == cheapest


def test_objectives_order_by_what_they_say():
    by = {objective: ranked(endpoint(4.0, objective=objective)).candidates for objective in Objective}
    memory = [candidate.memory_bytes for candidate in by[Objective.MIN_MEMORY]]
    latency = [candidate.service.latency_s for candidate in by[Objective.MIN_LATENCY]]
    gpus = [candidate.replicas * candidate.configuration.gpus for candidate in by[Objective.MIN_GPU_COST]]
    assert (memory, latency, gpus) == (sorted(memory), sorted(latency), sorted(gpus))
    published = ranked(endpoint(4.0), cost=Cost.MEMORY).candidates
    assert [candidate.score for candidate in published] == sorted(candidate.score for candidate in published)


def test_a_load_beyond_the_cluster_gets_as_much_as_fits_and_a_note_says_so():
    ranking = ranked(endpoint(1_000.0), gpus=4)
    assert ranking.note.startswith("carries ")
    assert "of the 1e+03 requests/s expected" in ranking.note
    best = ranking.candidates[0]
    assert best.overload == min(candidate.overload for candidate in ranking.candidates)
    assert best.replicas * best.configuration.gpus == 4


def test_given_replicas_are_kept():
    for candidate in ranked(endpoint(3.0, replicas=2)).candidates:
        assert candidate.replicas == 2
        assert candidate.service == ENGINES.load_curve(None, candidate.configuration).at(1.5)
    for reason in {each.reason for each in ranked(endpoint(3.0, replicas=20)).rejected} - {"no int8 here"}:
        assert reason.endswith("of 20 replicas fit")


def test_rejected_configurations_have_their_reasons():
    ranking = ranked(endpoint(3.0, slo_tpot_s=0.004))
    assert "no int8 here" in {each.reason for each in ranking.rejected}
    assert "above the TPOT SLO of 4 ms" in {each.reason for each in ranking.rejected}


@settings(max_examples=200)
@given(
    st.none() | st.floats(0.1, 200), st.sampled_from(Objective), st.sampled_from(Cost), st.none() | st.integers(1, 20),
    st.none() | st.floats(0.003, 0.05), st.none() | st.floats(0.01, 1.0), st.integers(1, 16),
)  # fmt: skip
def test_the_best_come_one_by_one_in_the_order_of_the_ranking(rps, objective, cost, replicas, tpot_s, ttft_s, gpus):
    asked = endpoint(rps, replicas=replicas, objective=objective, slo_tpot_s=tpot_s, slo_ttft_s=ttft_s)
    ranking = ranked(asked, gpus, cost=cost)
    found = best_at_load(asked, view(gpus), ENGINES, lambda *_: None, cost=cost)
    assert list(found) == [(candidate, ranking.note) for candidate in ranking.candidates]


def test_what_costs_too_much_in_any_case_is_not_estimated():
    estimated = set()

    class Counting(SimpleEngines):
        def load_curve(self, endpoint, configuration):
            estimated.add(configuration.tp)
            return super().load_curve(endpoint, configuration)

    best, _ = next(best_at_load(endpoint(1.0), view(16), Counting(), lambda *_: None))
    assert best.configuration.tp == 1
    assert estimated == {1}


# Placement


class OneByOne:
    """A placement rule that is asked again for each replica, as a user's is."""

    def __init__(self, rule) -> None:
        self._rule = rule

    def __call__(self, gpus):
        return self._rule(gpus)


@settings(max_examples=30)
@given(st.lists(st.sampled_from([0.0, 0.2, 0.6, 1.0]), min_size=4, max_size=16), st.floats(0.1, 40))
def test_a_rule_that_ranks_each_gpu_by_itself_is_asked_once_for_all_replicas(loads, rps):
    gpus = tuple(replace(gpu, load=load) for gpu, load in zip(view(len(loads)).gpus, loads, strict=True))
    for rule in (least_loaded_first, packing, hybrid(0.5)):
        once, again = (policy(each).decide(endpoint(rps), ClusterView(gpus=gpus)) for each in (rule, OneByOne(rule)))
        assert once == again


def policy(rule=least_loaded_first) -> MaverIQ:
    return MaverIQ(name="test", estimator=None, accuracy=lambda *_: None, rule=rule, engines=ENGINES)


@settings(max_examples=30)
@given(st.floats(0.1, 80), st.sampled_from([least_loaded_first, packing, None]), st.integers(1, 20), st.integers(1, 8))
def test_replicas_have_gpus_of_their_own_each_within_a_node(rps, rule, gpus, per_node):
    cluster = view(gpus, per_node=per_node)
    decision = policy(rule).decide(endpoint(rps), cluster)
    assert isinstance(decision, Deploy)
    used = [gpu for plan in decision.plans for gpu in plan.gpu_ids]
    assert len(used) == len(set(used))
    for plan in decision.plans:
        assert len({gpu // per_node for gpu in plan.gpu_ids}) == 1
    assert len({plan.configuration for plan in decision.plans}) == 1


def test_engines_share_a_gpu_with_continuous_ones_by_their_memory_and_with_no_exclusive_one():
    gpu = view(1).gpus[0]
    exclusive, continuous = replace(gpu, tenants=1), replace(gpu, tenants=1, continuous_tenants=1)
    full = replace(continuous, free_bytes=gpu.capacity_bytes // 2)
    views = (ClusterView(gpus=(each,)) for each in (exclusive, continuous, full))
    reasons = [getattr(policy().decide(endpoint(1.0), each), "reason", "") for each in views]
    assert "exclusive engine" in reasons[0]
    assert not reasons[1]
    assert "free memory" in reasons[2]
