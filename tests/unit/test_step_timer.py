"""Step times as whole numbers: many steps take as long as their sum, and as long as the step model says."""

import hypothesis.strategies as st
import pytest
from hypothesis import given

from maveriq.domain.gpu_kinds import gpu_sheet
from maveriq.domain.models import load_model
from maveriq.estimate.engine_presets import engine_preset
from maveriq.estimate.operators import operators_of
from maveriq.estimate.step_time import Chunk, StepModel
from maveriq.estimate.step_timer import StepTimer, earliest_at, micros_after, ticks

MODEL = load_model("llama-2-7b")
PRESET = engine_preset("vllm-0.23.0")
STEPS = StepModel(MODEL.decoder, operators_of(gpu_sheet("H100-SXM"), PRESET.kernels))
TIMER = StepTimer(STEPS, PRESET, layers=MODEL.layers)

DECODES = st.integers(1, 300)
MEAN_CONTEXT = st.integers(1, 300_000)


@given(DECODES, MEAN_CONTEXT, st.integers(0, 400), st.integers(0, 400))
def test_many_steps_take_as_long_as_their_parts_to_the_last_tick(decodes, mean, first, further):
    context = decodes * mean
    together = TIMER.decode_steps(decodes, context, first + further)
    behind = TIMER.decode_steps(decodes, context + first * decodes, further)
    assert together == TIMER.decode_steps(decodes, context, first) + behind


@given(DECODES, MEAN_CONTEXT, st.integers(0, 60))
def test_many_steps_take_as_long_as_the_single_ones_to_the_last_tick(decodes, mean, steps):
    context = decodes * mean
    singly = sum(TIMER.step(decodes, context + index * decodes) for index in range(steps))
    assert TIMER.decode_steps(decodes, context, steps) == singly


@given(DECODES, st.integers(1, 262_144), st.integers(0, 299))
def test_a_step_that_decodes_takes_what_model_and_preset_say(decodes, mean, rest):
    context = decodes * mean + rest % decodes
    gpu_us = STEPS.gpu_us(decodes=decodes, context_tokens=context)
    step_us = PRESET.step_time_us(gpu_us, sequences=decodes, has_prefill=False, layers=MODEL.layers)
    assert TIMER.step(decodes, context) == pytest.approx(ticks(step_us), abs=ticks(0.1))


def test_a_step_with_chunks_takes_what_model_and_preset_say():
    chunks = [(512, 0), (100, 2048)]
    gpu_us = STEPS.gpu_us(
        decodes=3, context_tokens=900, chunks=[Chunk(tokens=tokens, past=past) for tokens, past in chunks]
    )
    step_us = PRESET.step_time_us(gpu_us, sequences=5, has_prefill=True, layers=MODEL.layers)
    assert TIMER.step(3, 900, chunks) == ticks(step_us)


def test_an_event_is_at_the_first_whole_microsecond_that_is_not_before_it():
    assert [micros_after(ticks(time_us)) for time_us in (7, 7.25, 8)] == [7, 8, 8]


@given(DECODES, MEAN_CONTEXT, st.integers(1, 600), st.floats(0, 1.1))
def test_the_steps_until_an_instant_are_the_fewest_that_reach_it(decodes, mean, most, share):
    context, line = decodes * mean, TIMER.decode_line(decodes)
    at_least = max(1, int(share * line.sum(context, most)))
    steps, taken = line.steps_until(context, most, at_least)
    assert 1 <= steps <= most
    assert taken == line.sum(context, steps)
    assert line.sum(context, steps - 1) < at_least
    assert taken >= at_least or steps == most


@given(st.integers(1, 10**9))
def test_the_earliest_time_at_a_microsecond_is_the_first_that_rounds_up_to_it(time_us):
    assert micros_after(earliest_at(time_us)) == time_us
    assert micros_after(earliest_at(time_us) - 1) == time_us - 1
