"""Compiled engines are those of Python, to the microsecond, and so are their records."""

import dataclasses

import hypothesis.strategies as st
import numpy as np
import pytest
from clocked_engines import request, run
from hypothesis import given, settings
from msgspec.structs import replace

from maveriq.control.engine_recorder import EngineRecorder
from maveriq.control.engine_series import TokenGaps
from maveriq.domain.gpu_kinds import gpu_sheet
from maveriq.domain.models import load_model
from maveriq.engine.reading import read_engine_settings
from maveriq.engine.settings import EngineHost
from maveriq.estimate.engine_presets import engine_preset
from maveriq.estimate.operators import operators_of
from maveriq.estimate.step_time import StepModel
from maveriq.estimate.step_timer import StepTimer
from maveriq.scenario.compiled_engine import CompiledEngine
from maveriq.scenario.continuous_engines import AdmissionDelay, EngineParts
from maveriq.scenario.stepped_engine import SteppedEngine

PRESET = engine_preset("vllm-0.23.0")
STEPS = StepModel(load_model("llama-2-7b").decoder, operators_of(gpu_sheet("L4")), first=0, end=2)
SAMPLE_US = 20_000

pytestmark = pytest.mark.heavy  # compiling takes half a minute, once


@st.composite
def engines(draw):
    """Settings of vLLM, blocks, and the delay of a prompt's token; blocks and seats are scarce."""
    settings = {
        "kind": "vllm",
        "version": draw(st.sampled_from(["0.15.1", "0.19.0", "0.23.0"])),
        "max_num_seqs": draw(st.integers(1, 6)),
        "max_num_batched_tokens": draw(st.sampled_from([8, 33, 64, 256])),
        "async_scheduling": draw(st.booleans()),
        "enable_prefix_caching": draw(st.booleans()),
        "scheduler_reserve_full_isl": draw(st.booleans()),
        "long_prefill_token_threshold": draw(st.sampled_from([0, 0, 20])),
        "block_size": draw(st.sampled_from([8, 16])),
    }
    chunks = draw(st.booleans()) or settings["max_num_batched_tokens"] < 256
    settings["enable_chunked_prefill"] = chunks
    blocks = 256 // settings["block_size"] + 1 + draw(st.integers(0, 12))
    return settings, blocks, draw(st.integers(0, 40))


@st.composite
def loads(draw):
    count = draw(st.integers(1, 14))
    arrivals_us = sorted(draw(st.lists(st.integers(0, 60_000), min_size=count, max_size=count)))
    lengths = st.one_of(st.integers(1, 120), st.sampled_from([8, 16, 32, 48, 64]))
    return [request(number, at, draw(lengths), draw(lengths)) for number, at in enumerate(arrivals_us, start=1)]


def parts(settings, blocks, delay_us, preset_name):
    settings = dict(settings)
    settings["max_num_batched_tokens"] = max(settings["max_num_batched_tokens"], settings["max_num_seqs"])
    resolved = read_engine_settings(settings).resolve(EngineHost(context_tokens=256))
    preset = replace(engine_preset(preset_name), api_us=617.0, api_token_us=delay_us + 0.25, api_sequence_us=49.5)
    return EngineParts(
        engine=resolved.make_engine(blocks),
        timer=StepTimer(STEPS, preset, layers=2),
        admission_delay_us=AdmissionDelay(preset, resolved.max_num_seqs),
    )


def both(settings, blocks, delay_us, preset="vllm-0.23.0"):
    """Return an engine in Python and a compiled one, each with its recorder."""
    recorders = EngineRecorder(SAMPLE_US, TokenGaps()), EngineRecorder(SAMPLE_US, TokenGaps())
    slow = SteppedEngine(parts(settings, blocks, delay_us, preset), 1, 1, recorder=recorders[0])
    of = parts(settings, blocks, delay_us, preset)
    fast = CompiledEngine(of.engine, of.timer, 1, 1, recorder=recorders[1])
    return (slow, recorders[0]), (fast, recorders[1])


def records(recorder, ended_us):
    series = recorder.series(ended_us)
    return *series, *recorder.gaps.distribution()


class Slowed:
    """An engine that is slowed down when some requests are submitted, as on a GPU that it shares."""

    def __init__(self, engine, slowdowns):
        self._engine, self._slowdowns = engine, slowdowns

    def submit(self, now_us, request):
        self._engine.slow_down(now_us, self._slowdowns[request.request_id % len(self._slowdowns)])
        self._engine.submit(now_us, request)

    def __getattr__(self, name):
        return getattr(self._engine, name)


def assert_equal(pair, requests, slowdowns=(1,)):
    histories = [dataclasses.asdict(run(Slowed(engine, slowdowns), requests)) for engine, _ in pair]
    assert histories[0] == histories[1]
    ended_us = histories[0]["ended_us"]
    for engine, _ in pair:
        engine.stop(ended_us)
    for slow, fast in zip(*(records(recorder, ended_us) for _, recorder in pair), strict=True):
        np.testing.assert_array_equal(slow, fast)


@settings(max_examples=200, deadline=None)
@given(
    engines(),
    loads(),
    st.sampled_from(["vllm-0.23.0", "vllm-0.6.0"]),
    st.lists(st.integers(1, 3), min_size=1, max_size=3),
)
def test_a_compiled_engine_does_what_the_one_in_python_does(engine, requests, preset, slowdowns):
    assert_equal(both(*engine, preset), requests, slowdowns)
