"""What a policy knows beforehand of continuous engines."""

from __future__ import annotations

import pytest

from maveriq.domain.deployments import Batching, EndpointSpec, ExpectedLoad, Intent, Objective
from maveriq.domain.models import KvType, WeightType, load_model
from maveriq.domain.parallel import ANY_CONFIGURATION, ConfigurationPattern, ParallelConfig
from maveriq.engine.vllm_settings import VllmSettings
from maveriq.estimate.cluster_profiles import profiles_for
from maveriq.policy.configuration import NO_ROOM
from maveriq.scenario.continuous_engines import ContinuousEngines
from maveriq.scenario.engine_estimates import PlannedEngines

FLOAT16 = ParallelConfig(tp=1, pp=1, weights=WeightType.FLOAT16)


def planned(**arguments) -> PlannedEngines:
    engines = ContinuousEngines(
        settings={1: VllmSettings(**arguments)}, profiles=profiles_for("a6000-short", "8xH100-SXM"),
        largest_node=lambda _: 8,
    )  # fmt: skip
    return PlannedEngines(engines=engines)


def endpoint(pattern: ConfigurationPattern = ANY_CONFIGURATION, *, prompt_tokens: int = 1_000) -> EndpointSpec:
    return EndpointSpec(
        endpoint_id=1,
        model=load_model("llama-2-7b"),
        intent=Intent(objective=Objective.MIN_COST),
        requested_us=0,
        prompt_tokens=prompt_tokens,
        output_tokens=100,
        batching=Batching.CONTINUOUS,
        pattern=pattern,
        load=ExpectedLoad(rps=5.0, prompt_tokens=prompt_tokens, output_tokens=100),
    )


def test_only_what_is_named_is_fixed_and_pipelines_are_not_considered_by_themselves():
    found = list(planned().configurations(endpoint(), kind="", gpus=8))
    assert {each.tp for each in found} == {1, 2, 4, 8}
    assert {each.pp for each in found} == {1}
    assert len({each.weights for each in found}) > 2
    pattern = ConfigurationPattern(pp=3, weights=WeightType.FLOAT16, kv=KvType.NATIVE)
    named = list(planned().configurations(endpoint(pattern), kind="", gpus=8))
    assert {(each.tp, each.pp, each.layer_split) for each in named} == {(1, 3, (11, 11, 10)), (2, 3, (11, 11, 10))}
    assert {(each.weights, each.kv) for each in named} == {(WeightType.FLOAT16, KvType.NATIVE)}


def test_a_smaller_step_delays_first_tokens_and_fewer_seats_lower_the_capacity():
    def first_token_s(tokens: int) -> float:
        curve = planned(max_num_batched_tokens=tokens, max_num_seqs=64).load_curve(endpoint(), FLOAT16)
        return curve.at(8.0).first_token_s

    assert first_token_s(256) > 1.2 * first_token_s(8_192)
    curves = [planned(max_num_seqs=seats).load_curve(endpoint(), FLOAT16) for seats in (4, 16, 64)]
    assert [curve.max_in_flight for curve in curves] == [4, 16, 64]
    capacities = [curve.capacity_rps for curve in curves]
    assert capacities == sorted(capacities)


def test_the_kv_cache_limits_how_many_run_together():
    whole, half = (
        planned(num_gpu_blocks=blocks).load_curve(endpoint(), FLOAT16).max_in_flight for blocks in (1_001, 501)
    )
    assert (whole, half) == (16_000 // 1_050, 8_000 // 1_050)


def test_an_engine_that_does_not_start_is_rejected_with_the_reason():
    rejected = planned(num_gpu_blocks=100).why_not(endpoint(), FLOAT16)
    assert rejected is not None
    assert rejected.reason == NO_ROOM
    assert "max_model_len 4096" in rejected.detail
    assert planned().why_not(endpoint(), FLOAT16) is None


@pytest.mark.parametrize("rps", [1.0, 10.0, 30.0])
def test_a_load_is_carried_by_as_many_in_flight_as_littles_law_says(rps):
    curve = planned().load_curve(endpoint(), FLOAT16)
    in_flight = curve.in_flight(rps)
    assert in_flight / curve.at(rps).latency_s >= min(rps, curve.capacity_rps) * 0.999
