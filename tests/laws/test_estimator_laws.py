"""Laws of estimates: over everything the embedded profiles cover, and over made-up fingerprints."""

import itertools
from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from profile_fixtures import rows_of, write_profile

from maveriq.domain.models import KvType, ModelSpec, WeightType, load_model
from maveriq.domain.parallel import ParallelConfig
from maveriq.estimate.estimator import Estimator
from maveriq.estimate.fingerprints import Exponents, Line, ParallelLatency, at_batch, derive, parallel_memory_gib
from maveriq.estimate.hardware_profile import HardwareProfile, load_profile
from maveriq.estimate.registry import CALIBRATED, ESTIMATORS, MEASURED, make_estimator

GPUS = 8
seconds = st.floats(1e-4, 100.0)
gibs = st.floats(0.01, 500.0)
degrees = st.integers(1, 8)


def configurations() -> list[ParallelConfig]:
    degrees = [(tp, pp) for tp in (1, 2, 4, 8) for pp in range(1, GPUS // tp + 1)]
    return [
        ParallelConfig(tp=tp, pp=pp, weights=weights, kv=kv)
        for (tp, pp), weights, kv in itertools.product(degrees, WeightType, KvType)
    ]


@pytest.fixture(scope="module")
def profile_for(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], HardwareProfile]:
    """Embedded profiles contain fingerprints; the estimator of measured models gets a table of whole models instead."""

    def profile_of(name: str, embedded: str) -> HardwareProfile:
        profile = load_profile(embedded)
        if name != MEASURED:
            return profile
        source = make_estimator(CALIBRATED, profile)
        rows = "\n".join(rows_of(source, answered(source)))
        return load_profile(str(write_profile(tmp_path_factory.mktemp(embedded), rows)))

    return profile_of


@pytest.fixture(scope="module", params=itertools.product(ESTIMATORS, ["a6000-short", "a6000-long"]), ids="/".join)
def estimator(request: pytest.FixtureRequest, profile_for: Callable[[str, str], HardwareProfile]) -> Estimator:
    name, profile = request.param
    return make_estimator(name, profile_for(name, profile))


MODELS = ("falcon-7b", "falcon-40b", "gptj-6b", "llama-2-7b", "llama-2-13b", "llama-2-70b")


def answered(estimator: Estimator) -> list[tuple[ModelSpec, ParallelConfig]]:
    pairs = itertools.product(map(load_model, MODELS), configurations())
    found = [(model, cfg) for model, cfg in pairs if estimator.why_not(model, cfg) is None]
    assert len(found) > 300, "the profile covers too little for these laws to say anything"
    return found


def latencies_s(estimator: Estimator, model: ModelSpec, cfg: ParallelConfig, tokens: list[int]) -> list[float]:
    return [estimator.service(model, cfg, prompt_tokens=10, output_tokens=o, batch=1).latency_s for o in tokens]


def test_latency_is_positive_at_measured_lengths(estimator: Estimator) -> None:
    """Below ten output tokens, outside the fingerprints, the paper's intercept can be negative."""
    for model, cfg in answered(estimator):
        assert min(latencies_s(estimator, model, cfg, [10, 20, 200])) > 0, (model.name, cfg)


def test_latency_grows_with_output_tokens(estimator: Estimator) -> None:
    """At TP 8 the paper amplifies the noise of its TP 2 fingerprints, so growth holds only for long outputs."""
    for model, cfg in answered(estimator):
        tokens = [100, 200, 500] if cfg.tp == 8 else [1, 2, 5, 20, 200, 500]
        latencies = latencies_s(estimator, model, cfg, tokens)
        assert all(less < more for less, more in itertools.pairwise(latencies)), (model.name, cfg)


def test_ttft_does_not_depend_on_output_tokens(estimator: Estimator) -> None:
    for model, cfg in answered(estimator):
        endpoint = {"prompt_tokens": 10, "batch": 1}
        few, many = (estimator.service(model, cfg, output_tokens=tokens, **endpoint) for tokens in (1, 500))
        assert few.first_token_s == pytest.approx(many.first_token_s, rel=1e-9)


def test_memory_is_positive_and_does_not_shrink_with_more_gpus(estimator: Estimator) -> None:
    memory = {(model.name, cfg): estimator.memory(model, cfg) for model, cfg in answered(estimator)}
    assert min(memory.values()) > 0
    for (name, cfg), held in memory.items():
        longer = ParallelConfig(tp=cfg.tp, pp=cfg.pp + 1, weights=cfg.weights, kv=cfg.kv)
        assert memory.get((name, longer), held) >= held


@pytest.mark.parametrize("name", ESTIMATORS)
def test_equal_questions_get_equal_answers_in_any_order(
    name: str, profile_for: Callable[[str, str], HardwareProfile]
) -> None:
    profile = profile_for(name, "a6000-short")
    once, again = (make_estimator(name, profile) for _ in range(2))
    requested = answered(again)
    endpoint = {"prompt_tokens": 10, "output_tokens": 20, "batch": 1}
    forward = {(model.name, cfg): once.service(model, cfg, **endpoint) for model, cfg in requested}
    backward = {(model.name, cfg): again.service(model, cfg, **endpoint) for model, cfg in reversed(requested)}
    assert forward == backward


def test_a_model_with_an_odd_number_of_heads_has_no_tensor_parallelism(estimator: Estimator) -> None:
    falcon = load_model("falcon-7b")
    degrees = {cfg.tp for model, cfg in answered(estimator) if model == falcon}
    assert degrees == {1}


@pytest.mark.parametrize("name", ESTIMATORS)
def test_a_larger_batch_does_not_take_less(name: str, profile_for: Callable[[str, str], HardwareProfile]) -> None:
    estimator = make_estimator(name, profile_for(name, "a6000-short"))
    rounding = 1 - 1e-12
    for model, cfg in answered(estimator):
        endpoint = {"prompt_tokens": 10, "output_tokens": 20}
        latencies = [estimator.service(model, cfg, batch=batch, **endpoint).latency_s for batch in (1, 2, 16)]
        assert all(less * rounding <= more for less, more in itertools.pairwise(latencies)), (model.name, cfg)
        memory = [estimator.memory(model, replace(cfg, batch_size=batch)) for batch in (1, 2, 16)]
        assert memory == sorted(memory), (model.name, cfg)


@given(l11=seconds, l12=seconds, l21=seconds, l22=seconds, m1=gibs, m2=gibs, n1=degrees, o1=degrees)
def test_the_constants_reproduce_their_measurements(
    l11: float, l12: float, l21: float, l22: float, m1: float, m2: float, n1: int, o1: int
) -> None:
    """Four latencies and two memory sizes determine the six constants."""
    latency = {(n1, o1): l11, (n1, o1 + 10): l12, (n1 + 1, o1): l21, (n1 + 1, o1 + 10): l22}
    memory = {n1: m1, n1 + 1: m2}
    constants = derive(latency, memory)
    for (layers, tokens), measured in latency.items():
        assert constants.line(layers).at(tokens) == pytest.approx(measured, rel=1e-9, abs=1e-9)
    for layers, measured in memory.items():
        assert constants.memory_gib(layers) == pytest.approx(measured, rel=1e-9, abs=1e-9)


@given(ttft=seconds, tpot=seconds, tp2=seconds, a=st.floats(0, 1), b=st.floats(0, 1), tokens=st.integers(1, 500))
def test_one_gpu_is_no_parallelism(ttft: float, tpot: float, tp2: float, a: float, b: float, tokens: int) -> None:
    single, exponents = Line(ttft_s=ttft, tpot_s=tpot), Exponents(a=a, b=b, c=b, d=a)
    whole = ParallelLatency.scaled(single, Line(ttft_s=tp2, tpot_s=tp2), exponents, tp=1, pp=1)
    assert whole.at(tokens) == single.at(tokens)
    assert parallel_memory_gib(ttft, tp2, tp2, tp=1, pp=1) == ttft


@given(single=gibs, tp2=gibs, pp2=gibs, tp=degrees, pp=degrees)
def test_splitting_a_model_never_saves_memory(single: float, tp2: float, pp2: float, tp: int, pp: int) -> None:
    assert parallel_memory_gib(single, tp2, pp2, tp=tp, pp=pp) >= single


@given(batch_one=gibs, batch_two=gibs, batch=st.integers(1, 512))
def test_the_batch_rule_starts_at_batch_one_and_never_falls(batch_one: float, batch_two: float, batch: int) -> None:
    assert at_batch(batch_one, batch_two, 1) == batch_one
    assert at_batch(batch_one, batch_two, batch + 1) >= at_batch(batch_one, batch_two, batch)
