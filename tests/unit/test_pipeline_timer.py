"""When steps pass the stages of a pipeline, and how long they take in each."""

from itertools import pairwise

import hypothesis.strategies as st
import pytest
from hypothesis import given

from maveriq.estimate.engine_presets import engine_preset
from maveriq.estimate.pipeline_timer import Pipeline, PipelineTimer, StageModel
from maveriq.estimate.step_timer import StepTimer, ticks


def ends(times: list[list[int]], in_flight: int) -> list[tuple[int, int]]:
    """Return start and end of steps of which so many are in flight: each enters when the one so far before it ends."""
    pipeline, passed = Pipeline(len(times[0])), []
    for number, of_step in enumerate(times):
        now = passed[number - in_flight][1] if number >= in_flight else 0
        passed.append(pipeline.enter(now, of_step))
    return passed


@st.composite
def steps(draw):
    parts = draw(st.integers(1, 5))
    times = st.lists(st.integers(1, 1_000), min_size=parts, max_size=parts)
    return draw(st.lists(times, min_size=1, max_size=30)), draw(st.integers(1, 6))


@given(steps())
def test_steps_keep_their_order_and_no_part_works_at_two(load):
    times, in_flight = load
    passed = ends(times, in_flight)
    for number, (start, end) in enumerate(passed):
        assert end - start >= sum(times[number])
    for (_, before), (_, after) in pairwise(passed):
        assert after > before
    for part in range(len(times[0])):  # all work of a part fits in the time until the last step ends
        assert sum(of_step[part] for of_step in times) <= passed[-1][1]


@given(steps())
def test_one_step_in_flight_takes_the_sum_of_its_parts(load):
    times, _ = load
    assert ends(times, 1)[-1][1] == sum(map(sum, times))


@given(st.lists(st.integers(1, 1_000), min_size=1, max_size=6), st.integers(1, 8))
def test_equal_steps_end_at_the_pace_of_the_slowest_part_or_of_the_steps_in_flight(parts, in_flight):
    passed = ends([parts] * 80, in_flight)
    first, last = passed[20][1], passed[20 + 5 * in_flight][1]
    assert last - first == 5 * max(in_flight * max(parts), sum(parts))


@given(steps())
def test_more_in_flight_never_ends_later(load):
    times, in_flight = load
    assert ends(times, in_flight + 1)[-1][1] <= ends(times, in_flight)[-1][1]


class Operators:
    """Stands for the step model of some layers."""

    contexts = (1, 50, 100_000)

    def __init__(self, layers: int) -> None:
        self.layers = layers

    def gpu_us(self, *, decodes, context_tokens, chunks=()):
        return self.layers * (10 + 0.3 * decodes + 0.01 * context_tokens + 0.9 * sum(tokens for tokens, _ in chunks))


@pytest.mark.parametrize("preset", ["vllm-0.23.0", "vllm-0.15.1", "sglang", "trtllm"])
def test_the_stages_together_take_as_long_as_one_stage_with_all_layers(preset):
    whole = StepTimer(Operators(12), engine_preset(preset), layers=12)
    split = PipelineTimer(
        [StageModel(steps=Operators(layers), layers=layers, hand_over_us=lambda _: 0.0) for layers in (5, 4, 3)],
        engine_preset(preset),
    )
    for step in ((8, 4_000), (3, 900, ((256, 0), (64, 512)))):
        assert sum(split.step(*step)) == pytest.approx(whole.step(*step), rel=1e-9)


def test_activations_are_handed_over_after_every_stage_but_the_last():
    def stages(hand_over_us):
        return [
            StageModel(steps=Operators(4), layers=4, hand_over_us=hand_over_us),
            StageModel(steps=Operators(4), layers=4, hand_over_us=lambda _: 0.0),
        ]

    preset = engine_preset("vllm-0.23.0")
    without = PipelineTimer(stages(lambda _: 0.0), preset).step(2, 100, ((30, 0),))
    with_it = PipelineTimer(stages(lambda tokens: 2.0 * tokens), preset).step(2, 100, ((30, 0),))
    assert [late - early for early, late in zip(without, with_it, strict=True)] == [0, ticks(64), 0]
