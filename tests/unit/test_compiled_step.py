"""Compiled step times are those of Python, and runs of steps are sums of steps."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from maveriq.domain.gpu_kinds import gpu_sheet
from maveriq.domain.models import load_model
from maveriq.estimate.compiled_step import decode_run_us, decode_steps_within, step_us
from maveriq.estimate.operators import operators_of
from maveriq.estimate.step_time import Chunk, Sharding, StepModel

MODELS = [
    StepModel(load_model("llama-2-7b").decoder, operators_of(gpu_sheet("A100-80GB-SXM"))),
    StepModel(load_model("mixtral-8x7b").decoder, operators_of(gpu_sheet("H100-SXM")), sharding=Sharding(tp=2)),
    StepModel(load_model("llama-2-7b").decoder, operators_of(gpu_sheet("L4")), first=0, end=10),
]
CHUNKS = st.lists(st.builds(Chunk, tokens=st.integers(1, 40_000), past=st.integers(0, 200_000)), max_size=4)

pytestmark = pytest.mark.heavy  # compiling takes seconds, once


def compiled_us(model: StepModel, decodes: int, context_tokens: int, chunks: list[Chunk]) -> float:
    tokens = np.asarray([*(chunk.tokens for chunk in chunks), 99], dtype=np.float64)
    past = np.asarray([*(chunk.past for chunk in chunks), 99], dtype=np.float64)
    return step_us(model.packed, float(decodes), float(context_tokens), tokens, past, len(chunks))


@settings(deadline=None)
@given(st.sampled_from(MODELS), st.integers(0, 6000), st.integers(1, 400_000), CHUNKS)
def test_compiled_steps_take_as_long_as_those_of_python(
    model: StepModel, decodes: int, context: int, chunks: list[Chunk]
) -> None:
    expected = model.gpu_us(decodes=decodes, context_tokens=decodes * context, chunks=chunks)
    assert compiled_us(model, decodes, decodes * context, chunks) == pytest.approx(expected, rel=1e-9)


@settings(deadline=None)
@given(st.sampled_from(MODELS), st.integers(1, 600), st.integers(1, 60_000), st.integers(0, 3000))
def test_a_run_of_steps_takes_as_long_as_its_steps(model: StepModel, decodes: int, tokens: int, steps: int) -> None:
    context = tokens + decodes  # not a multiple of the sequences: the mean context is a fraction
    each = [model.gpu_us(decodes=decodes, context_tokens=context + step * decodes) for step in range(steps)]
    assert decode_run_us(model.packed, float(decodes), float(context), steps) == pytest.approx(sum(each), rel=1e-9)


@settings(deadline=None)
@given(st.integers(1, 300), st.integers(1, 20_000), st.floats(0, 1e8), st.integers(0, 5000))
def test_as_many_steps_end_within_a_time_as_there_is_room(
    decodes: int, context: int, limit_us: float, most: int
) -> None:
    packed, factor, added_us = MODELS[0].packed, 1.1, 200.0
    at = (packed, float(decodes), float(decodes * context))

    def run_us(steps: int) -> float:
        return factor * decode_run_us(*at, steps) + steps * added_us

    steps = decode_steps_within(*at, most, limit_us, factor, added_us)
    assert 0 <= steps <= most
    assert run_us(steps) <= limit_us
    assert steps == most or run_us(steps + 1) > limit_us
