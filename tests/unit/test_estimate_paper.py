"""The paper's estimator: its formulas against a second implementation of SPEC 3, and its refusals."""

from dataclasses import replace

import pytest

from maveriq.domain.models import KvType, WeightType, load_model
from maveriq.domain.parallel import ParallelConfig
from maveriq.errors import InputError, UnknownNameError
from maveriq.estimate.estimator import Estimator
from maveriq.estimate.hardware_profile import HardwareProfile, load_profile
from maveriq.estimate.registry import make_estimator
from maveriq.units import bytes_from_gib

F16, INT8, INT4, GPTQ, *_ = WeightType


@pytest.fixture(scope="module")
def short() -> HardwareProfile:
    return load_profile("a6000-short")


@pytest.fixture(scope="module")
def paper(short: HardwareProfile) -> Estimator:
    return make_estimator("paper", short)


def latency_by_hand(profile: HardwareProfile, name: str, cfg: ParallelConfig, output_tokens: int, batch: int) -> float:
    """SPEC 3 again, term by term, with its own symbols."""
    n, tp, pp = load_model(name).layers, cfg.tp, cfg.pp
    constants = profile.fingerprints.of(name)
    e = profile.fingerprints.exponents[cfg.weights, cfg.kv]

    def small(tensor: int, of: int) -> float:
        c = constants[cfg.at(tensor, 1, of)]
        ttft, tpot = n * c.ttft_layer_s + c.ttft_other_s, n * c.tpot_layer_s + c.tpot_other_s
        return ttft + output_tokens * tpot

    def whole(of: int) -> float:
        l11 = l12 = small(1, of)
        tensor = (tp - 1) ** e.b / pp**e.c * max(0, small(2, of) - l11 / 2) if tp > 1 else 0
        return l11 / (tp * pp**e.a) + tensor + (pp - 1) ** e.d * max(0, l12 - l11 / 2**e.a)

    return whole(1) + (batch - 1) * max(0, whole(2) - whole(1))


@pytest.mark.parametrize("batch", [1, 2, 8])
@pytest.mark.parametrize("output_tokens", [1, 2, 20, 200])
@pytest.mark.parametrize(
    ("name", "cfg"),
    [
        ("falcon-7b", ParallelConfig(tp=1, pp=3, weights=INT4)),
        ("gptj-6b", ParallelConfig(tp=8, pp=1, weights=INT8)),
        ("llama-2-7b", ParallelConfig(tp=1, pp=1, weights=GPTQ)),
        ("llama-2-70b", ParallelConfig(tp=2, pp=4, weights=F16, kv=KvType.INT8)),
    ],
    ids=str,
)
def test_latency_is_the_formula(
    short: HardwareProfile, paper: Estimator, name: str, cfg: ParallelConfig, output_tokens: int, batch: int
) -> None:
    service = paper.service(load_model(name), cfg, prompt_tokens=10, output_tokens=output_tokens, batch=batch)
    assert service.latency_s == pytest.approx(latency_by_hand(short, name, cfg, output_tokens, batch), rel=1e-12)
    assert service.first_token_s == pytest.approx(latency_by_hand(short, name, cfg, 1, batch), rel=1e-12)
    assert service.output_tokens == output_tokens


def test_one_output_token_has_a_tpot(paper: Estimator) -> None:
    model, cfg = load_model("llama-2-7b"), ParallelConfig(tp=2, pp=1, weights=F16)
    single = paper.service(model, cfg, prompt_tokens=10, output_tokens=1, batch=1)
    two = paper.service(model, cfg, prompt_tokens=10, output_tokens=2, batch=1)
    assert single.tpot_s == two.tpot_s == pytest.approx(two.latency_s - single.latency_s)


def test_memory_is_the_formula(short: HardwareProfile, paper: Estimator) -> None:
    model = load_model("llama-2-13b")
    constants = short.fingerprints.of(model.name)
    cfg = ParallelConfig(tp=4, pp=2, weights=INT8, kv=KvType.INT8)

    def by_hand(batch: int) -> float:
        m11, m21, m12 = (constants[cfg.at(tp, pp, batch)].memory_gib(40) for tp, pp in ((1, 1), (2, 1), (1, 2)))
        return m11 + 3 * max(0, m21 - m11) + 4 * 1 * max(0, m12 - m11)

    assert paper.memory(model, cfg) == bytes_from_gib(by_hand(1))
    batched = by_hand(1) + 7 * max(0, by_hand(2) - by_hand(1))
    assert paper.memory(model, replace(cfg, batch_size=8)) == bytes_from_gib(batched)


def test_layers_are_those_of_the_model(paper: Estimator) -> None:
    model, cfg = load_model("llama-2-7b"), ParallelConfig(tp=1, pp=1, weights=F16)
    halved = replace(model, layers=16)
    assert paper.memory(halved, cfg) < paper.memory(model, cfg)
    endpoint = {"prompt_tokens": 10, "output_tokens": 20, "batch": 1}
    assert paper.service(halved, cfg, **endpoint).latency_s < paper.service(model, cfg, **endpoint).latency_s


def test_another_shape_under_a_known_name_is_refused(paper: Estimator) -> None:
    wider = replace(load_model("llama-2-7b"), layers=40, hidden_size=5120, config_json="{}")
    reason = str(paper.why_not(wider, ParallelConfig(tp=1, pp=1, weights=F16)))
    assert "it is not the llama-2-7b that profile a6000-short was measured with" in reason
    assert "layers 40, not 32, hidden_size 5120, not 4096" in reason


@pytest.mark.parametrize(
    ("name", "cfg", "reason"),
    [
        ("falcon-7b", ParallelConfig(tp=2, pp=1, weights=F16), "TP 2 is not a power of two that divides the 71"),
        ("llama-2-70b", ParallelConfig(tp=3, pp=1, weights=F16), "TP 3 is not a power of two"),
        ("llama-2-70b", ParallelConfig(tp=1, pp=1, weights=INT8), "known not to run on A6000"),
        ("gptj-6b", ParallelConfig(tp=1, pp=1, weights=GPTQ), "no fingerprint with int4_gptq weights and native KV"),
        ("gptj-6b", ParallelConfig(tp=1, pp=1, weights=F16, kv=KvType.INT8), "with float16 weights and int8 KV cache"),
    ],
)
def test_unsupported_configurations_are_refused_with_a_reason(
    paper: Estimator, name: str, cfg: ParallelConfig, reason: str
) -> None:
    model = load_model(name)
    assert reason in str(paper.why_not(model, cfg))
    with pytest.raises(InputError, match=reason):
        paper.service(model, cfg, prompt_tokens=10, output_tokens=20, batch=1)
    with pytest.raises(InputError, match=reason):
        paper.memory(model, cfg)


def test_a_model_without_fingerprints_needs_a_profile(paper: Estimator) -> None:
    stranger = replace(load_model("llama-2-7b"), name="stranger")
    for tp in (1, 64):
        reason = paper.why_not(stranger, ParallelConfig(tp=tp, pp=1, weights=F16))
        assert reason is not None
        assert "profile a6000-short has no fingerprint of stranger" in reason
        assert "give a profile" in reason


def test_a_profile_names_its_missing_points(short: HardwareProfile) -> None:
    single = ParallelConfig(tp=1, pp=1, weights=F16)
    only = {"llama-2-7b": {single: short.fingerprints.of("llama-2-7b")[single]}}
    alone = make_estimator("paper", replace(short, fingerprints=replace(short.fingerprints, by_model=only)))
    model = load_model("llama-2-7b")
    assert alone.why_not(model, ParallelConfig(tp=1, pp=1, weights=F16)) is None
    assert "at TP 2 x PP 1 and TP 1 x PP 2" in str(alone.why_not(model, ParallelConfig(tp=4, pp=2, weights=F16)))


def test_a_batch_needs_fingerprints_of_batch_two() -> None:
    long = make_estimator("paper", load_profile("a6000-long"))
    model, single = load_model("llama-2-7b"), ParallelConfig(tp=1, pp=1, weights=F16)
    batched = replace(single, batch_size=4)
    assert long.why_not(model, single) is None
    assert "no fingerprint of batch 2 in profile a6000-long" in str(long.why_not(model, batched))
    with pytest.raises(InputError, match="batch 4 needs fingerprints of batch 2, which profile a6000-long has not"):
        long.service(model, single, prompt_tokens=923, output_tokens=20, batch=4)
    with pytest.raises(InputError, match="no fingerprint of batch 2"):
        long.memory(model, batched)


@pytest.mark.parametrize(("output_tokens", "batch"), [(0, 1), (20, 0)])
def test_zero_tokens_are_refused(paper: Estimator, output_tokens: int, batch: int) -> None:
    cfg = ParallelConfig(tp=1, pp=1, weights=F16)
    with pytest.raises(InputError, match="must be at least 1"):
        paper.service(load_model("gptj-6b"), cfg, prompt_tokens=10, output_tokens=output_tokens, batch=batch)


def test_an_unknown_estimator_is_refused(short: HardwareProfile) -> None:
    with pytest.raises(UnknownNameError, match="unknown estimator 'papper'; did you mean 'paper'"):
        make_estimator("papper", short)
