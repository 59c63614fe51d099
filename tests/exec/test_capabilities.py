"""Engine capabilities: refusals, their messages, and the nearest supported configuration."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from maveriq.domain.cluster import ClusterState
from maveriq.domain.deployments import EndpointSpec, Intent, Objective
from maveriq.domain.models import KvType, ModelSpec, WeightType, known_models, load_model, model_from_hf_config
from maveriq.domain.parallel import ParallelConfig
from maveriq.errors import InputError, UnknownNameError
from maveriq.estimate.cluster_spec import cluster_from
from maveriq.estimate.estimator import Estimator
from maveriq.estimate.hardware_profile import load_profile
from maveriq.estimate.registry import make_estimator
from maveriq.exec.capabilities import (
    ANY,
    Refusal,
    Status,
    SupportedByEngine,
    distance,
    known_engines,
    max_sequence_tokens,
    nearest,
    similar_configs,
    unsupported_by,
    why_not,
)
from maveriq.exec.device import Device
from maveriq.policy.configuration import rank

FLOAT16, INT8, INT4, GPTQ, FP8, *_ = WeightType


def refusal_of(
    engine: str,
    model: str | ModelSpec,
    *,
    tp: int = 1,
    pp: int = 1,
    weights: WeightType = FLOAT16,
    kv: KvType = KvType.NATIVE,
    split: tuple[int, ...] | None = None,
    device: Device = Device.CUDA,
) -> Refusal | None:
    shape = load_model(model) if isinstance(model, str) else model
    configuration = ParallelConfig(tp=tp, pp=pp, weights=weights, kv=kv)
    return why_not(engine, shape, replace(configuration, layer_split=split or ()), device)


@pytest.mark.parametrize(
    ("engine", "model", "requested"),
    [
        ("emulated", "falcon-7b", {"tp": 3, "pp": 2, "weights": GPTQ, "kv": KvType.INT8, "device": Device.CPU}),
        ("torch", "falcon-7b", {"pp": 3, "weights": INT4, "kv": KvType.INT8, "split": (20, 6, 6)}),
        ("torch", "gptj-6b", {"tp": 4, "weights": INT8, "device": Device.CPU}),
        ("torch", "llama-2-70b", {"tp": 16}),  # 8 KV heads, each on two GPUs
        ("vllm", "gptj-6b", {"tp": 2, "pp": 2, "weights": INT8, "kv": KvType.INT8, "split": (20, 8)}),
        ("vllm", "llama-2-7b", {"tp": 2, "weights": GPTQ}),
        ("vllm", "falcon-40b", {"weights": INT4}),
        ("vllm", "llama-2-7b", {"tp": 2, "weights": INT8}),
        ("vllm", "llama-2-7b", {"tp": 2, "device": Device.CPU}),
        ("trtllm", "llama-2-13b", {"tp": 2, "pp": 3, "weights": INT4, "split": (20, 10, 10)}),
        ("trtllm-engine", "gptj-6b", {"tp": 2, "weights": INT8}),
        ("trtllm-engine", "llama-2-7b", {"kv": KvType.INT8, "pp": 2}),
    ],
)
def test_supported_configurations_are_accepted(engine: str, model: str, requested: dict[str, object]) -> None:
    assert refusal_of(engine, model, **requested) is None  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("engine", "model", "requested", "reason", "near"),
    [
        ("torch", "falcon-7b", {"tp": 2}, "TP 2 does not divide the 71 attention heads", "TP 1 x PP 2 float16"),
        ("torch", "llama-2-7b", {"weights": GPTQ}, "not int4_gptq", "TP 1 x PP 1 int4"),
        ("torch", "llama-2-70b", {"tp": 64, "weights": INT8, "split": (80,)}, None, None),
        (
            "vllm",
            "llama-2-7b",
            {"tp": 4, "weights": GPTQ},
            "TP 4 cuts the feed-forward width 11008 through weight groups of 128",
            "TP 4 x PP 1 int4",
        ),
        (
            "vllm",
            "llama-2-7b",
            {"pp": 2, "split": (20, 12), "device": Device.CPU},
            "PP 2 is more than its 1",
            "TP 2 x PP 1 float16",
        ),
        (
            "vllm",
            "llama-2-7b",
            {"weights": INT4, "device": Device.CPU},
            "on a CPU it stores llama weights as float16 or fp8, not int4",
            "TP 1 x PP 1 fp8",
        ),
        (
            "trtllm",
            "falcon-7b",
            {"weights": INT8},
            "it runs llama, mistral, qwen2, qwen3 or mixtral models, not falcon",
            None,
        ),
        (
            "trtllm",
            "llama-2-7b",
            {"kv": KvType.INT8, "pp": 2, "split": (20, 12)},
            "it stores the KV cache of llama as native, not int8, with float16 weights",
            "TP 1 x PP 2 float16 (20+12 layers)",
        ),
        ("trtllm", "llama-2-7b", {"device": Device.CPU}, "it runs llama on a CUDA GPU, not on a CPU", None),
        (
            "trtllm-engine",
            "llama-2-7b",
            {"pp": 2, "split": (20, 12)},
            "its pipeline stages must have equally many layers, not (20, 12)",
            "TP 1 x PP 2 float16",
        ),
        (
            "trtllm-engine",
            "llama-2-7b",
            {"weights": GPTQ, "kv": KvType.INT8},
            "it stores the KV cache of llama as native, not int8, with int4_gptq weights",
            "TP 1 x PP 1 int4+kv8",
        ),
    ],
)
def test_a_refusal_names_its_reason_and_the_nearest_configuration(
    engine: str, model: str, requested: dict[str, object], reason: str | None, near: str | None
) -> None:
    refusal = refusal_of(engine, model, **requested)  # type: ignore[arg-type]
    if reason is None:
        assert refusal is None
        return
    assert refusal is not None
    assert reason in refusal.reason
    assert (refusal.describe_nearest() or None) == near
    assert "\n" not in str(refusal)
    assert all(part in str(refusal) for part in (engine, model, refusal.reason, near or "no similar configuration"))


def test_kv_heads_are_split_or_replicated_evenly() -> None:
    shape = replace(load_model("llama-2-70b"), attention_heads=48, kv_heads=8)
    refusal = refusal_of("vllm", shape, tp=12)
    assert refusal is not None
    assert refusal.reason == "TP 12 neither divides the 8 KV heads nor is a multiple of them"
    assert refusal_of("vllm", shape, tp=16) is None


@pytest.mark.parametrize("engine", ["vllm", "trtllm"])
def test_fp8_needs_a_gpu_that_computes_with_it(engine: str) -> None:
    model, fp8 = load_model("llama-2-7b"), ParallelConfig(tp=1, pp=1, weights=FP8)

    def refusal(compute_capability: float | None) -> Refusal | None:
        return why_not(engine, model, fp8, Device.CUDA, compute_capability=compute_capability)

    assert refusal(None) is None
    assert refusal(8.9) is None
    assert refusal(10.0) is None
    refused = refusal(8.6)
    assert refused is not None
    assert refused.reason == "fp8 weights need GPUs of compute capability 8.9, not 8.6"
    assert refused.nearest == ParallelConfig(tp=1, pp=1, weights=INT8)
    base = make_estimator("paper", load_profile("a6000-short"))
    restricted = SupportedByEngine(
        base=EverythingKnown(base), engine=engine, device=Device.CUDA, compute_capability=8.6
    )
    assert restricted.why_not(model, fp8) == f"{engine}: {refused.reason}"


@dataclass(frozen=True)
class EverythingKnown:
    """An estimator that has a reason against nothing."""

    base: Estimator
    name: str = "everything"

    def why_not(self, model: ModelSpec, configuration: ParallelConfig) -> None:
        return None

    def service(self, *args: Any, **named: Any) -> Any:
        return self.base.service(*args, **named)

    def memory(self, model: ModelSpec, configuration: ParallelConfig) -> int:
        return self.base.memory(model, configuration)


MIXTRAL = {
    "model_type": "mixtral", "num_hidden_layers": 32, "hidden_size": 4096, "intermediate_size": 14336,
    "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 32000, "num_local_experts": 8,
    "num_experts_per_tok": 2, "max_position_embeddings": 32768,
}  # fmt: skip


def test_models_of_experts_run_where_they_are_listed() -> None:
    mixtral = model_from_hf_config(json.dumps(MIXTRAL), name="mixtral", where="config.json")
    assert refusal_of("vllm", mixtral, tp=2, pp=2, split=(20, 12)) is None
    assert refusal_of("trtllm", mixtral, tp=2) is None
    assert refusal_of("emulated", mixtral) is None
    assert "not int8" in str(refusal_of("vllm", mixtral, weights=INT8))
    windowed = {**MIXTRAL, "model_type": "mistral", "sliding_window": 4096, "num_local_experts": 0}
    mistral = model_from_hf_config(json.dumps(windowed), name="mistral", where="config.json")
    assert "a sliding window of 4096 tokens; it runs plain decoders" in str(refusal_of("vllm", mistral))


def test_an_odd_feed_forward_size_is_not_split() -> None:
    refusal = refusal_of("torch", replace(load_model("llama-2-7b"), intermediate_size=11007), tp=2)
    assert refusal is not None
    assert "feed-forward width 11007" in refusal.reason


def test_group_limits_explain_what_did_not_run_on_the_testbed() -> None:
    """Exactly the GPTQ configurations that the published testbed could not run are refused."""
    profile = load_profile("a6000-short")
    llamas = [load_model(name) for name in profile.fingerprints.models() if "llama" in name]
    assert llamas
    for model, tp, pp in product(llamas, (1, 2, 4, 8), (1, 2, 4, 8)):
        if tp * pp <= 8:
            known = profile.supports(model.name, ParallelConfig(tp=tp, pp=pp, weights=GPTQ))
            assert (refusal_of("trtllm-engine", model, tp=tp, pp=pp, weights=GPTQ) is None) == known


@pytest.mark.parametrize(
    ("split", "pp", "message"),
    [((32, 1), 2, "add up to 32"), ((32,), 2, "each of 2 stages"), ((32, 0), 2, "at least one layer")],
)
def test_an_invalid_layer_split_is_an_input_error(split: tuple[int, ...], pp: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        refusal_of("torch", "llama-2-7b", pp=pp, split=split)


def test_unknown_engines_and_devices_are_input_errors() -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'trtllm'"):
        refusal_of("trtlm", "llama-2-7b")
    with pytest.raises(UnknownNameError, match="tpu"):
        Device.named("tpu:0")
    assert (Device.named("cuda:3"), Device.named("cpu")) == (Device.CUDA, Device.CPU)


def test_every_capability_names_what_ran_it_or_where_it_is_listed() -> None:
    for facts in known_engines().values():
        assert facts.can
        for row in facts.can:
            assert row.version
            assert row.file
            assert bool(row.date) == (row.status is Status.RAN)
            assert all((row.architectures, row.weights, row.kv, row.devices))
            assert (row.architectures == (ANY,)) or ANY not in row.architectures


# Laws

ENGINES = sorted(known_engines())
MODELS = sorted(known_models())


@st.composite
def configurations(draw: st.DrawFn, model: ModelSpec) -> ParallelConfig:
    pp = draw(st.integers(1, 8))
    cuts = sorted(draw(st.sets(st.integers(1, model.layers - 1), min_size=pp - 1, max_size=pp - 1)))
    split = tuple(b - a for a, b in zip([0, *cuts], [*cuts, model.layers], strict=True))
    return ParallelConfig(
        tp=draw(st.integers(1, 16)),
        pp=pp,
        weights=draw(st.sampled_from(WeightType)),
        kv=draw(st.sampled_from(KvType)),
        layer_split=draw(st.sampled_from([split, ()])),
        batch_size=draw(st.integers(1, 4)),
    ).normalised(model.layers)


@settings(deadline=None)  # because the machine may be busy
@given(st.data(), st.sampled_from(ENGINES), st.sampled_from(MODELS), st.sampled_from(Device))
def test_the_nearest_configuration_is_supported_and_at_minimum_distance(
    data: st.DataObject, engine: str, name: str, device: Device
) -> None:
    model = load_model(name)
    requested = data.draw(configurations(model))

    def allowed(config: ParallelConfig) -> bool:
        return unsupported_by(engine, model, config, device) is None

    refusal = why_not(engine, model, requested, device)
    assert (refusal is None) == allowed(requested)
    if refusal is None:
        return
    possible = [config for config in similar_configs(model, requested) if allowed(config)]
    if refusal.nearest is None:
        assert possible == []
        return
    found = refusal.nearest
    assert allowed(found)
    assert found.gpus <= requested.gpus
    assert found.batch_size == requested.batch_size
    assert sum(found.layers_per_stage(model.layers)) == model.layers
    assert distance(requested, found) == min(distance(requested, config) for config in possible)


@given(st.data())
def test_distance_is_a_metric(data: st.DataObject) -> None:
    model = load_model("gptj-6b")
    a, b, c = (data.draw(configurations(model)) for _ in range(3))
    a, b, c = (replace(config, batch_size=a.batch_size) for config in (a, b, c))
    assert (distance(a, b) == 0) == (a == b)
    assert distance(a, b) == distance(b, a)
    same_stages = a.pp == b.pp == c.pp
    if same_stages:  # splits are compared only for equal PP, so a detour over another PP may be shorter
        assert distance(a, c) <= distance(a, b) + distance(b, c) + 1e-9


@given(st.data(), st.sampled_from(MODELS))
def test_a_supported_configuration_is_its_own_nearest(data: st.DataObject, name: str) -> None:
    model = load_model(name)
    requested = data.draw(configurations(model))
    if requested.pp <= model.layers:
        assert nearest(model, requested, lambda _: True) == requested


def test_ties_in_distance_prefer_more_exact_weights() -> None:
    model = load_model("llama-2-7b")
    requested = ParallelConfig(tp=1, pp=1, weights=INT8)
    found = nearest(model, requested, lambda config: config.weights not in (INT8, FP8))
    assert found is not None
    assert found.weights is FLOAT16


# Policies restricted to supported configurations


def test_policies_choose_only_what_the_engine_supports() -> None:
    profile = load_profile("a6000-short")
    paper = make_estimator("paper", profile)
    restricted = SupportedByEngine(base=paper, engine="trtllm", device=Device.CUDA)
    assert restricted.name == "paper"
    view = ClusterState(cluster_from("8xA6000")).view([0.0] * 8)
    for name, can in (("llama-2-7b", True), ("falcon-7b", False)):
        question = EndpointSpec(
            endpoint_id=1,
            model=load_model(name),
            intent=Intent(objective=Objective.MIN_MEMORY),
            requested_us=0,
            prompt_tokens=10,
            output_tokens=20,
        )
        plain = rank(question, view, paper, profile.accuracy).candidates
        limited = rank(question, view, restricted, profile.accuracy)
        assert plain
        assert bool(limited.candidates) == can
        # The same order, without unsupported configurations.
        kept = [
            candidate.configuration
            for candidate in plain
            if ask_configuration("trtllm", name, candidate.configuration) is None
        ]
        assert [candidate.configuration for candidate in limited.candidates] == kept
        assert len(kept) < len(plain)


def ask_configuration(engine: str, model: str, configuration: ParallelConfig) -> Refusal | None:
    shape = load_model(model)
    return why_not(engine, shape, configuration, Device.CUDA)


@pytest.mark.parametrize(
    ("engine", "kept"),
    [("emulated", [None, None]), ("torch", [None, None]), ("vllm", [2048, 4096]), ("trtllm", [2048, 4096])],
)
def test_external_engines_keep_a_bounded_number_of_tokens_of_a_sequence(engine: str, kept: list[int | None]) -> None:
    assert [max_sequence_tokens(engine, load_model(name)) for name in ("gptj-6b", "llama-3.1-8b")] == kept
