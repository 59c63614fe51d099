"""Times in an engine that always has the same number of requests in flight."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise, product

import pytest

from maveriq.domain.gpu_kinds import gpu_sheet
from maveriq.domain.models import load_model
from maveriq.estimate.engine_presets import engine_preset
from maveriq.estimate.operators import operators_of
from maveriq.estimate.steady_state import SteadyLoad, SteadyTimes, StepTime
from maveriq.estimate.step_time import Chunk, StepModel

LOAD = SteadyLoad(
    in_flight=1, prompt_tokens=1000, output_tokens=100, max_step_tokens=2048, mixes_prefill=True, asynchronous=False
)
IN_FLIGHT = (1, 2, 3, 4, 5, 6, 8, 11, 12, 16, 24, 32, 48, 64, 96, 128, 200, 256, 400)


def step_us(decodes: float, chunks: Sequence[Chunk]) -> float:
    """A step of 1 ms, 10 µs a sequence and a microsecond a token of a prompt."""
    return 1000 + 10 * decodes + sum(chunk.tokens for chunk in chunks)


def request_us(load: SteadyLoad, times: SteadyTimes) -> float:
    """Return the time of a whole request."""
    return times.first_us + (load.output_tokens - 1) * times.token_us


def test_a_request_alone_takes_its_own_steps() -> None:
    for mixes_prefill, in_step in product((True, False), (True, False)):
        times = replace(LOAD, mixes_prefill=mixes_prefill, in_step=in_step).times(step_us)
        assert times.first_us == pytest.approx(1000 + 1000)
        assert times.token_us == pytest.approx(1010)


def test_prompts_of_others_delay_tokens_by_what_they_take() -> None:
    times = replace(LOAD, in_flight=11).times(step_us)
    # While a request decodes, each of the ten others finishes once, and the next prompt takes a millisecond more.
    steps = 99 + 1 + 0.5
    assert times.token_us == pytest.approx(1000 + 10 * (1 + 10 * 99 / steps) + 10 * 1000 / steps, rel=1e-3)
    apart = replace(LOAD, in_flight=11, mixes_prefill=False).times(step_us)
    assert apart.token_us == pytest.approx(1110 + 10 * 2000 / 99.5, rel=1e-3)


def test_a_scheduler_that_runs_ahead_delays_the_first_token_by_a_step() -> None:
    load = replace(LOAD, in_flight=11)
    ahead, behind = (replace(load, asynchronous=asynchronous).times(step_us) for asynchronous in (True, False))
    assert ahead.first_us - behind.first_us == pytest.approx(behind.token_us, rel=0.1)  # prompts before differ a little
    assert ahead.token_us == pytest.approx(behind.token_us, rel=0.01)


def test_long_prompts_are_cut_into_chunks_that_add_up() -> None:
    seen: list[Chunk] = []

    def record_us(decodes: float, chunks: Sequence[Chunk]) -> float:
        seen.extend(chunks)
        return step_us(decodes, chunks)

    times = replace(LOAD, prompt_tokens=5000).times(record_us)
    assert all(chunk.tokens <= 2048 for chunk in seen)
    assert times.first_us == pytest.approx(5000 + 1000 * 5000 / 2047, rel=1e-3)


def test_requests_of_one_length_stay_together_where_prompts_are_processed_apart() -> None:
    load = replace(LOAD, in_flight=16, max_step_tokens=8000, mixes_prefill=False, in_step=True)
    # Two passes of eight prompts: the first eight wait for one and then for the other before their second token.
    pass_us = 1000 + 8 * 1000
    times = load.times(step_us)
    assert times.first_us == pytest.approx((pass_us + 2 * pass_us) / 2)
    assert times.token_us == pytest.approx(1160 + (2 * pass_us - 1.5 * pass_us) / 99)
    apart = replace(load, in_step=False).times(step_us)
    assert apart.first_us < times.first_us
    assert apart.token_us > times.token_us
    mixed = replace(load, mixes_prefill=True)
    together, apart = (replace(mixed, in_step=in_step).times(step_us) for in_step in (True, False))
    assert together.token_us == apart.token_us
    # What runs when a request comes holds the prompt of another, and not only one step in seven.
    waited_us = (1150 + 1000) / 2
    assert 0 < together.first_us - apart.first_us < waited_us / 2


def test_what_the_cache_has_no_room_for_waits() -> None:
    held = replace(LOAD, in_flight=10).times(step_us)
    load = replace(LOAD, in_flight=30, max_running=10)
    times = load.times(step_us)
    assert times.token_us == held.token_us
    assert request_us(load, times) == pytest.approx(3 * request_us(LOAD, held))


def test_a_saturated_engine_fills_its_steps() -> None:
    load = replace(LOAD, in_flight=400, output_tokens=11, max_step_tokens=512)
    times = load.times(step_us)
    a_step = 512 / (1000 + 10)  # prompts that begin in a step, and leave room for their own tokens
    full_us = 1000 + 10 * 10 * a_step + 1000 * a_step
    assert 400 / request_us(load, times) == pytest.approx(a_step / full_us, rel=1e-3)


SHAPES = [(1000, 100), (10, 1000), (8000, 20), (30000, 200), (500, 2), (100, 5), (250, 250)]


def check_laws(load: SteadyLoad, step_time: StepTime, *, rounding: float = 1e-3) -> None:
    """Check that more requests in flight make none faster, and the engine not slower."""
    loads = [replace(load, in_flight=count) for count in IN_FLIGHT]
    for (fewer, less), (more, busier) in pairwise((load, load.times(step_time)) for load in loads):
        assert busier.first_us >= less.first_us * (1 - 1e-9), (fewer, more)
        assert busier.token_us >= less.token_us * (1 - 1e-9), (fewer, more)
        throughput = [at.in_flight / request_us(at, times) for at, times in ((fewer, less), (more, busier))]
        assert throughput[1] >= throughput[0] * (1 - rounding), (fewer, more)


@pytest.mark.parametrize(("prompt_tokens", "output_tokens"), SHAPES)
@pytest.mark.parametrize("mixes_prefill", [True, False])
def test_latency_rises_with_the_requests_in_flight_and_throughput_does_not_fall(
    prompt_tokens: int, output_tokens: int, *, mixes_prefill: bool
) -> None:
    load = replace(LOAD, prompt_tokens=prompt_tokens, output_tokens=output_tokens, mixes_prefill=mixes_prefill)
    for max_step_tokens, asynchronous, stages, in_step in product((512, 8192), (True, False), (1, 4), (True, False)):
        check_laws(
            replace(load, max_step_tokens=max_step_tokens, asynchronous=asynchronous, stages=stages, in_step=in_step),
            step_us,
        )


@pytest.mark.parametrize("engine", ["vllm-0.23.0", "vllm-0.12", "sglang", "trtllm-1.2"])
def test_the_same_holds_of_a_model_on_an_engine(engine: str) -> None:
    preset, model = engine_preset(engine), load_model("llama-3.1-8b")
    steps = StepModel(model.decoder, operators_of(gpu_sheet("H100")))

    def model_step_us(decodes: float, chunks: Sequence[Chunk]) -> float:
        gpu_us = steps.gpu_us(decodes=decodes, context_tokens=1000 * decodes, chunks=chunks)
        sequences = decodes + len(chunks)
        return float(preset.step_time_us(gpu_us, sequences=sequences, has_prefill=bool(chunks), layers=model.layers))

    for prompt_tokens, output_tokens in ((1000, 100), (4000, 100), (200, 400), (8000, 50)):
        load = replace(
            LOAD, prompt_tokens=prompt_tokens, output_tokens=output_tokens, max_step_tokens=8192,
            mixes_prefill=preset.mixes_prefill, asynchronous=preset.asynchronous,
        )  # fmt: skip
        check_laws(
            load, model_step_us, rounding=0.01
        )  # measured kernels of twice the size take a little more than twice


def test_stages_share_the_sequences() -> None:
    one, four = (replace(LOAD, in_flight=64, output_tokens=10**9, stages=stages).times(step_us) for stages in (1, 4))
    assert one.token_us == pytest.approx(1000 + 10 * 64, rel=1e-3)
    assert four.token_us == pytest.approx(1000 + 10 * 16, rel=1e-3)
