"""Laws of the calibrated estimator: physics that every fit obeys."""

import itertools
from dataclasses import replace
from functools import cache

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from maveriq.domain.models import KvType, WeightType, load_model
from maveriq.domain.parallel import ParallelConfig, tensor_parallel_degrees
from maveriq.estimate.calibrated import CalibratedEstimator
from maveriq.estimate.calibration_file import Calibration, read_calibration, require
from maveriq.estimate.hardware_profile import load_profile

MODELS = ("falcon-7b", "falcon-40b", "gptj-6b", "llama-2-7b", "llama-2-13b", "llama-2-70b")
PROFILE = load_profile("a6000-short")


@cache
def calibration() -> Calibration:
    return read_calibration(require(PROFILE.calibrated, PROFILE.name))


@cache
def live() -> CalibratedEstimator:
    return CalibratedEstimator.serving(PROFILE)


@st.composite
def questions(draw: st.DrawFn) -> dict:
    model = load_model(draw(st.sampled_from(MODELS)))
    tp = draw(st.sampled_from(tensor_parallel_degrees(model, 8)))
    weights = draw(st.sampled_from([WeightType.FLOAT16, WeightType.INT8, WeightType.INT4]))
    configuration = ParallelConfig(tp=tp, pp=draw(st.integers(1, 8 // tp)), weights=weights)
    # Limits of the testbed are no laws of physics.
    runs = live().why_not(model, configuration) is None
    return {
        "model": model,
        "configuration": configuration if runs else replace(configuration, tp=1, pp=8),
        "prompt_tokens": draw(st.integers(1, 4000)),
        "output_tokens": draw(st.integers(1, 2000)),
        "batch": draw(st.integers(1, 128)),
    }


def latency_s(estimator: CalibratedEstimator, question: dict) -> float:
    return estimator.service(**question).latency_s


@given(questions())
def test_latency_is_positive_and_so_is_the_first_token(question: dict) -> None:
    service = live().service(**question)
    assert 0 < service.first_token_s <= service.latency_s
    assert service.interval is not None
    assert service.interval.low < 1 < service.interval.high


@given(questions(), st.sampled_from(["prompt_tokens", "output_tokens", "batch"]), st.integers(1, 500))
def test_more_tokens_and_larger_batches_take_longer(question: dict, what: str, more: int) -> None:
    assert latency_s(live(), question | {what: question[what] + more}) > latency_s(live(), question)


@given(questions(), st.floats(1.01, 10))
def test_more_bandwidth_is_faster(question: dict, factor: float) -> None:
    # The layer time relative to the roofline comes from the fingerprint, so it must not be fitted again.
    slow = msgspec.structs.replace(calibration(), trust=0.0)
    fast = msgspec.structs.replace(slow, bandwidth_gb_s=slow.bandwidth_gb_s * factor)
    times = [latency_s(CalibratedEstimator(PROFILE, fitted, online=True), question) for fitted in (fast, slow)]
    assert times[0] < times[1]


@given(questions(), st.integers(1, 50))
def test_more_layers_take_longer_and_hold_more(question: dict, more: int) -> None:
    deeper = question | {"model": replace(question["model"], layers=question["model"].layers + more)}
    assert latency_s(live(), deeper) > latency_s(live(), question)
    held = [live().memory(shape["model"], shape["configuration"]) for shape in (question, deeper)]
    assert 0 < held[0] < held[1]


@given(questions(), st.integers(1, 100))
def test_memory_grows_with_the_batch(question: dict, more: int) -> None:
    sizes = [
        replace(question["configuration"], batch_size=size) for size in (question["batch"], question["batch"] + more)
    ]
    few, many = (live().memory(question["model"], size) for size in sizes)
    assert few < many


def test_fewer_weight_bytes_are_faster_when_weights_dominate() -> None:
    for name in MODELS:
        times = [
            live()
            .service(
                load_model(name),
                ParallelConfig(tp=1, pp=4, weights=weights),
                prompt_tokens=30,
                output_tokens=100,
                batch=1,
            )
            .latency_s
            for weights in (WeightType.FLOAT16, WeightType.INT8, WeightType.INT4)
        ]
        assert times == sorted(times, reverse=True), name


def test_two_all_reduces_cost_more_than_one() -> None:
    llama = load_model("llama-2-7b")
    once = replace(llama, all_reduces_per_layer=1)
    for tp, pp in itertools.product((2, 4), (1, 2)):
        question = {"configuration": ParallelConfig(tp=tp, pp=pp, weights=WeightType.INT8), "prompt_tokens": 30}
        times = [live().service(model, **question, output_tokens=20, batch=1).latency_s for model in (once, llama)]
        assert times[0] < times[1]


def test_a_stage_across_sockets_takes_longer() -> None:
    llama, requested = load_model("llama-2-7b"), {"prompt_tokens": 30, "output_tokens": 20, "batch": 1}
    four = ParallelConfig(tp=4, pp=1, weights=WeightType.FLOAT16)
    together, across = (
        live().service_on(gpus, llama, four, **requested).latency_s for gpus in ((4, 5, 6, 7), (1, 2, 3, 4))
    )
    assert together == live().service(llama, four, **requested).latency_s < across
    two = ParallelConfig(tp=2, pp=2, weights=WeightType.FLOAT16)
    none, one_link, both = (
        live().service_on(gpus, llama, two, **requested).latency_s
        for gpus in ((0, 1, 4, 5), (0, 1, 3, 4), (0, 4, 1, 5))
    )
    assert none < one_link < both
    single = ParallelConfig(tp=1, pp=4, weights=WeightType.FLOAT16)
    assert live().service_on((0, 4, 1, 5), llama, single, **requested) == live().service(llama, single, **requested)


@given(questions(), st.integers(1, 7))
def test_contention_delay_grows_with_co_located_engines(question: dict, co_located: int) -> None:
    model, alone = question["model"], ParallelConfig(tp=1, pp=1, weights=WeightType.INT4)
    waits_s = [live().contention_delay_s(model, alone, co_located=count) for count in (0, co_located, co_located + 1)]
    assert 0 == waits_s[0] < waits_s[1] < waits_s[2] < 0.1
    several = replace(alone, pp=2)
    assert not live().shares_process(several)
    assert live().contention_delay_s(model, several, co_located=co_located) == 0


def test_benchmarks_have_no_contention() -> None:
    alone = ParallelConfig(tp=1, pp=1, weights=WeightType.INT4)
    assert live().shares_process(alone)
    assert not CalibratedEstimator.benchmarked(PROFILE).shares_process(alone)


@pytest.mark.parametrize("kv", [KvType.NATIVE, KvType.INT8])
def test_smaller_kv_entries_are_read_faster(kv: KvType) -> None:
    requested = {"prompt_tokens": 2000, "output_tokens": 500, "batch": 16}
    configuration = ParallelConfig(tp=1, pp=4, weights=WeightType.INT8, kv=kv)
    native = ParallelConfig(tp=1, pp=4, weights=WeightType.INT8)
    model = load_model("llama-2-7b")
    assert (
        live().service(model, configuration, **requested).latency_s
        <= live().service(model, native, **requested).latency_s
    )
