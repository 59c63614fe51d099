"""The physics estimator: any model on any kind of GPU of the catalogue, without a measurement of either."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from maveriq.domain.decoder import Attention, DeltaNet, LatentAttention, StateSpace
from maveriq.domain.gpu_kinds import gpu_sheet, gpu_sheets
from maveriq.domain.models import KvType, ModelSpec, WeightType, load_model
from maveriq.domain.parallel import ParallelConfig
from maveriq.domain.weight_formats import FORMATS
from maveriq.errors import InputError
from maveriq.estimate.cluster_profiles import profiles_for
from maveriq.estimate.engine_presets import engine_preset
from maveriq.estimate.hardware_profile import load_profile
from maveriq.estimate.intervals import Family, interval_of
from maveriq.estimate.operators import operators_of
from maveriq.estimate.physics import PhysicsEstimator
from maveriq.estimate.registry import default_estimator
from maveriq.estimate.sheet_profile import sheet_profile
from maveriq.estimate.step_time import StepModel
from maveriq.planning import PlanOptions, rank_configurations
from maveriq.units import gib

LLAMA = load_model("llama-2-7b")
FLOAT16 = ParallelConfig(tp=1, pp=1, weights=WeightType.FLOAT16)
MIXTRAL = {
    "model_type": "mixtral", "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "intermediate_size": 14336, "vocab_size": 32000, "num_local_experts": 8,
    "num_experts_per_tok": 2, "max_position_embeddings": 32768, "sliding_window": None, "tie_word_embeddings": False,
    "hidden_act": "silu",
}  # fmt: skip


def on(kind: str) -> PhysicsEstimator:
    return PhysicsEstimator(sheet_profile(gpu_sheet(kind)))


@pytest.fixture
def mixtral(tmp_path: Path) -> ModelSpec:
    (tmp_path / "config.json").write_text(json.dumps(MIXTRAL))
    return load_model(str(tmp_path))


@pytest.mark.parametrize("kind", gpu_sheets())
def test_every_kind_of_the_catalogue_is_answered(kind: str) -> None:
    estimate = on(kind).service(LLAMA, FLOAT16, prompt_tokens=512, output_tokens=128, batch=8)
    weights_s = 2 * LLAMA.decoder.layers_parameters() / (gpu_sheet(kind).bandwidth_gb_s * 1e9)
    assert weights_s < estimate.tpot_s < 3 * weights_s
    assert estimate.first_token_s > estimate.tpot_s
    assert estimate.latency_s == pytest.approx(estimate.first_token_s + 127 * estimate.tpot_s)


def test_the_data_sheet_is_the_profile_of_unmeasured_gpus() -> None:
    profile = profiles_for("a6000-short", "16xH100").main
    assert (profile.gpu_kind, default_estimator(profile)) == ("H100-SXM", "physics")
    assert profiles_for("a6000-short", "8xA6000").main.name == "a6000-short"
    assert profiles_for("a6000-long", "8xA6000").main.name == "a6000-long"


def test_memory_is_weights_cache_and_a_little_more() -> None:
    estimator = on("H100")
    short = estimator.memory_with(LLAMA, FLOAT16, prompt_tokens=16, output_tokens=16)
    longer = estimator.memory_with(LLAMA, FLOAT16, prompt_tokens=16, output_tokens=16 + 1600)
    assert gib(2 * LLAMA.decoder.parameters()) < gib(short) < gib(2 * LLAMA.decoder.parameters()) + 0.5
    assert longer - short == 1600 * LLAMA.decoder.kv_bytes_per_token()


def test_small_weights_take_less_time_and_memory() -> None:
    estimator = on("H100")
    configurations = [ParallelConfig(tp=1, pp=1, weights=weights) for weights in WeightType][:3]
    lengths = {"prompt_tokens": 512, "output_tokens": 128}
    times = [estimator.service(LLAMA, at, batch=1, **lengths).latency_s for at in configurations]
    sizes = [estimator.memory_with(LLAMA, at, **lengths) for at in configurations]
    assert times == sorted(times, reverse=True)
    assert sizes == sorted(sizes, reverse=True)


def test_an_uneven_pipeline_takes_as_long_as_an_even_one() -> None:
    estimator = on("H100")
    even, uneven = (
        ParallelConfig(tp=1, pp=2, weights=WeightType.FLOAT16, layer_split=split) for split in ((), (20, 12))
    )
    times = [
        estimator.service(LLAMA, at, prompt_tokens=512, output_tokens=128, batch=4).latency_s for at in (even, uneven)
    ]
    assert times[0] == pytest.approx(times[1])


def test_intervals_are_those_of_the_family(mixtral: ModelSpec) -> None:
    estimator = on("H100")
    at = ParallelConfig(tp=2, pp=1, weights=WeightType.FLOAT16)
    experts = estimator.service(mixtral, at, prompt_tokens=512, output_tokens=128, batch=1)
    plain = estimator.service(LLAMA, at, prompt_tokens=512, output_tokens=128, batch=1)
    for estimate, family in ((experts, Family.EXPERTS), (plain, Family.DENSE)):
        assert estimate.interval == interval_of(estimator.engine, family, measured=True)


@pytest.mark.parametrize(
    ("configuration", "reason"),
    [
        (ParallelConfig(tp=3, pp=1, weights=WeightType.FLOAT16), "TP 3 does not divide"),
        (ParallelConfig(tp=16, pp=1, weights=WeightType.FLOAT16), "spans more than the 8 GPUs"),
        (ParallelConfig(tp=1, pp=33, weights=WeightType.FLOAT16), "leaves a stage without"),
    ],
)
def test_what_cannot_run_is_refused(configuration: ParallelConfig, reason: str) -> None:
    assert reason in (on("H100").why_not(LLAMA, configuration) or "")
    with pytest.raises(InputError, match=reason):
        on("H100").service(LLAMA, configuration, prompt_tokens=1, output_tokens=1, batch=1)


@pytest.mark.parametrize(
    ("attention", "reason"),
    [
        (StateSpace(heads=32, head_size=64, groups=8, state_size=128, convolution=4), "state-space layers"),
        (DeltaNet(key_heads=16, value_heads=32, key_size=128, value_size=128, convolution=4), "gated delta-net layers"),
        (
            LatentAttention(
                heads=64, query_rank=2048, kv_rank=512, nope_size=192, rope_size=64, value_size=256,
                index_heads=32, index_size=128, index_tokens=2048,
            ),
            "an indexer picks",
        ),
    ],
    ids=["state space", "delta net", "sparse"],
)  # fmt: skip
def test_layers_without_step_times_are_refused_by_name(attention: Attention, reason: str) -> None:
    plain = LLAMA.decoder.layer_kinds[0]
    kinds = (plain, replace(plain, attention=attention))
    mixed = replace(LLAMA, decoder=replace(LLAMA.decoder, layer_kinds=kinds, layer_pattern=(0, 1) * 16))
    assert reason in (on("H100").why_not(mixed, FLOAT16) or "")
    with pytest.raises(InputError, match=reason):
        StepModel(mixed.decoder, operators_of(gpu_sheet("H100")))


def test_checkpoints_are_planned_as_they_are_stored() -> None:
    estimator = on("B200")
    for name, stored in (("deepseek-v3", WeightType.FP8), ("gpt-oss-120b", WeightType.MXFP4)):
        model = load_model(name)
        considered = list(estimator.configurations(model, gpus=8, batch_size=1))
        assert {configuration.weights for configuration in considered} == {stored}
        at = ParallelConfig(tp=8, pp=1, weights=stored)
        assert estimator.why_not(model, at) is None
        beside = estimator.memory(model, at) - model.decoder.weight_bytes()
        assert 0 < gib(beside) < 8 * 1.2
        assert "its checkpoint holds" in (estimator.why_not(model, FLOAT16) or "")


def test_each_matrix_is_priced_as_the_checkpoint_stores_it() -> None:
    # Its experts have 4 bits, the other matrices 16.
    model, lengths = load_model("gpt-oss-120b"), {"prompt_tokens": 64, "output_tokens": 64}
    estimator = on("H100")
    tpot = estimator.service(model, ParallelConfig(tp=1, pp=1, weights=WeightType.MXFP4), batch=1, **lengths).tpot_s
    decoder = replace(model.decoder, layer_kinds=tuple(replace(kind, formats=()) for kind in model.decoder.layer_kinds))
    plain = replace(model, decoder=decoder, quantization="")
    other = estimator.service(plain, ParallelConfig(tp=1, pp=1, weights=WeightType.FLOAT16), batch=1, **lengths).tpot_s
    all_4_bits = estimator.service(
        plain, ParallelConfig(tp=1, pp=1, weights=WeightType.MXFP4), batch=1, **lengths
    ).tpot_s
    assert all_4_bits < tpot < other


@pytest.mark.parametrize(
    ("kind", "weights", "kv", "reason"),
    [
        ("A100", WeightType.FP8, KvType.NATIVE, "A100-80GB-SXM computes no fp8: that takes compute capability 8.9"),
        ("A100", WeightType.FLOAT16, KvType.FP8, "A100-80GB-SXM computes no fp8"),
        ("A100", WeightType.MXFP4, KvType.INT8, None),
        ("L40S", WeightType.FP8, KvType.FP8, None),
        ("H100", WeightType.NVFP4, KvType.NATIVE, "H100-SXM computes no nvfp4: that takes compute capability 10.0"),
        ("MI300X", WeightType.NVFP4, KvType.NATIVE, "MI300X computes no nvfp4"),
        ("B200", WeightType.NVFP4, KvType.FP8, None),
    ],
)
def test_what_a_generation_cannot_compute_is_refused_by_name(
    kind: str, weights: WeightType, kv: KvType, reason: str | None
) -> None:
    found = on(kind).why_not(LLAMA, ParallelConfig(tp=1, pp=1, weights=weights, kv=kv))
    assert found == reason if reason is None else (found or "").startswith(reason)


def test_latent_vectors_are_cached_as_floats() -> None:
    model = load_model("deepseek-v2-lite")
    at = {kv: ParallelConfig(tp=1, pp=1, weights=WeightType.FLOAT16, kv=kv, batch_size=64) for kv in KvType}
    estimator = on("H100")
    assert "latent vectors" in (estimator.why_not(model, at[KvType.INT8]) or "")
    saved = estimator.memory(model, at[KvType.NATIVE]) - estimator.memory(model, at[KvType.FP8])
    assert saved == 64 * 544 * model.decoder.kv_bytes_per_token(1)  # 532 tokens in blocks of 16


def test_dealt_experts_are_ranked_beside_split_ones() -> None:
    ranking = rank_configurations("mixtral-8x7b", PlanOptions(gpus="8xH100", batch_size=64)).ranking
    degrees = {(at.tp, at.ep) for at in (candidate.configuration for candidate in ranking.candidates)}
    assert {(8, 1), (8, 8), (4, 4)} <= degrees


def test_memory_of_weights_is_that_of_checkpoints() -> None:
    estimator = on("H100")
    lengths = {"prompt_tokens": 16, "output_tokens": 16}
    for weights, stored in ((WeightType.FLOAT16, "float16"), (WeightType.INT8, "int8"), (WeightType.INT4, "int4")):
        at = ParallelConfig(tp=1, pp=1, weights=weights)
        beside = estimator.memory_with(LLAMA, at, **lengths) - LLAMA.decoder.weight_bytes(FORMATS[stored])
        assert 0 < gib(beside) < 0.3


def test_sixteen_h100_are_planned_without_a_measurement(mixtral: ModelSpec) -> None:
    del mixtral
    ranked = rank_configurations("llama-2-70b", PlanOptions(gpus="16xH100", intent="min-latency", float16_only=True))
    assert ranked.estimator == "physics"
    assert ranked.note is not None
    assert "measured operators" in ranked.note
    best = ranked.ranking.candidates[0]
    assert best.configuration.tp == 8
    assert best.configuration.kv in KvType


def test_published_testbeds_keep_their_estimator() -> None:
    profile = load_profile("a6000-short")
    measured, unknown = load_model("llama-2-7b"), load_model("qwen3-8b")
    assert default_estimator(profile) == "calibrated"
    assert [default_estimator(profile, models) for models in ([measured], [unknown], [unknown, measured])] == [
        "calibrated",
        "physics",
        "calibrated/physics",
    ]


def test_a_batch_without_room_for_its_cache_is_refused_with_the_reason() -> None:
    long = ParallelConfig(tp=1, pp=1, weights=WeightType.FLOAT16, batch_size=64)
    estimator = on("H100")
    assert estimator.why_no_room(LLAMA, FLOAT16, prompt_tokens=3000, output_tokens=1000) is None
    reason = estimator.why_no_room(LLAMA, long, prompt_tokens=3000, output_tokens=1000)
    assert reason is not None
    assert reason.startswith("64 sequences of 4000 tokens do not fit: the ")
    options = PlanOptions(gpus="1xH100", batch_size=64, prompt_tokens=3000, output_tokens=1000, float16_only=True)
    ranked = rank_configurations("llama-2-7b", options)
    assert not any(found.configuration.kv is KvType.NATIVE for found in ranked.ranking.candidates)
    assert any("64 sequences" in rejected.detail for rejected in ranked.ranking.rejected)


def test_a_profile_names_the_engine_that_it_was_measured_with() -> None:
    assert PhysicsEstimator(load_profile("a6000-long")).engine.name == "trtllm-0.9"
    assert on("H100").engine.name == "vllm-2026"
    assert PhysicsEstimator(load_profile("a6000-long"), engine_preset("vllm")).engine.name == "vllm-2026"


def test_int4_by_channel_can_be_cut_where_groups_cannot() -> None:
    at = ParallelConfig(tp=4, pp=1, weights=WeightType.INT4)
    assert PhysicsEstimator(load_profile("a6000-long")).why_not(LLAMA, at) is None
    assert "cuts through the blocks" in (on("A6000").why_not(LLAMA, at) or "")
