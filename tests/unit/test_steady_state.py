"""Times in an engine that always has the same number of requests in flight."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import pytest

from maveriq.estimate.steady_state import SteadyLoad
from maveriq.estimate.step_time import Chunk

LOAD = SteadyLoad(
    in_flight=1, prompt_tokens=1000, output_tokens=100, max_step_tokens=2048, mixes_prefill=True, asynchronous=False
)


def step_us(decodes: float, chunks: Sequence[Chunk]) -> float:
    """A step of 1 ms, 10 µs a sequence and a microsecond a token of a prompt."""
    return 1000 + 10 * decodes + sum(chunk.tokens for chunk in chunks)


def test_a_request_alone_takes_its_own_steps() -> None:
    times = LOAD.times(step_us)
    assert times.first_us == pytest.approx(1000 + 1000)
    assert times.token_us == pytest.approx(1010)


def test_prompts_of_others_delay_tokens_by_what_they_take() -> None:
    times = replace(LOAD, in_flight=11).times(step_us)
    # Ten prompts of others, each a millisecond, during a hundred tokens; one sequence less decodes beside them.
    assert times.token_us == pytest.approx(1110 + 10 * (1000 - 10) / 100)
    own_us, step_wait_us = 1100 + 1000, times.token_us / 2
    busy = 10 * own_us / (step_wait_us + own_us + 100 * times.token_us)
    assert times.first_us == pytest.approx(step_wait_us + own_us + own_us * busy / (2 * (1 - busy)))
    apart = replace(LOAD, in_flight=11, mixes_prefill=False).times(step_us)
    assert apart.token_us == pytest.approx(1110 + 10 * 2000 / 100)


def test_a_scheduler_that_runs_ahead_delays_the_first_token_by_a_step() -> None:
    load = replace(LOAD, in_flight=11)
    ahead, behind = (replace(load, asynchronous=asynchronous).times(step_us) for asynchronous in (True, False))
    assert ahead.first_us - behind.first_us == pytest.approx(behind.token_us, rel=0.1)  # prompts before differ a little
    assert ahead.token_us == behind.token_us


def test_long_prompts_are_cut_into_chunks_that_add_up() -> None:
    seen: list[Chunk] = []

    def record_us(decodes: float, chunks: Sequence[Chunk]) -> float:
        seen.extend(chunks)
        return step_us(decodes, chunks)

    times = replace(LOAD, prompt_tokens=5000).times(record_us)
    (chunk,) = set(seen)
    assert chunk.tokens <= 2047
    assert 3 * chunk.tokens == pytest.approx(5000, abs=3)
    assert times.first_us == pytest.approx(3 * (1000 + chunk.tokens))


def test_more_requests_in_flight_never_make_one_faster() -> None:
    for stages in (1, 4):
        loads = [replace(LOAD, in_flight=count, stages=stages) for count in (1, 2, 4, 8, 64, 1000, 5000)]
        for earlier, later in pairwise(loads):
            assert later.times(step_us).token_us >= earlier.times(step_us).token_us


def test_first_tokens_wait_for_the_prompts_of_others() -> None:
    times = [replace(LOAD, in_flight=count).times(step_us) for count in (1, 2, 10, 100, 1000)]
    assert [at.first_us for at in times] == sorted(at.first_us for at in times)
    assert times[-1].first_us > 10 * times[0].first_us


def test_stages_share_the_sequences() -> None:
    one, four = (replace(LOAD, in_flight=64, output_tokens=10**9, stages=stages).times(step_us) for stages in (1, 4))
    assert one.token_us == pytest.approx(1000 + 10 * 64, rel=1e-3)
    assert four.token_us == pytest.approx(1000 + 10 * 16, rel=1e-3)
