"""Continuous engines with pipelines, on a clock."""

import hypothesis.strategies as st
import pytest
from clocked_engines import History, pipeline, request, run, stepped
from hypothesis import given, settings

SYNC = {"kind": "vllm", "max_num_seqs": 8, "max_num_batched_tokens": 64, "async_scheduling": False}
PAIR = {**SYNC, "pipeline_parallel_size": 2}


@st.composite
def loads(draw):
    count = draw(st.integers(1, 14))
    arrivals_us = sorted(draw(st.lists(st.integers(0, 40_000), min_size=count, max_size=count)))
    return [
        request(number, at, draw(st.integers(1, 120)), draw(st.integers(1, 60)), draw(st.integers(0, 2)))
        for number, at in enumerate(arrivals_us, start=1)
    ]


@pytest.mark.parametrize("stages", [2, 3])
@settings(max_examples=40)
@given(loads(), st.integers(0, 60_000))
def test_every_request_finishes_once_in_the_order_of_its_tokens(stages, requests, abort_us):
    engine = stepped({**SYNC, "pipeline_parallel_size": stages}, 24, timer=pipeline(*[1 / stages] * stages))
    history = run(engine, requests, [(abort_us, 1)] if abort_us > requests[0].arrival_us else [])
    assert {each.request_id for each in requests} - set(history.finished) <= {1}
    for number, (finish_us, tokens) in history.finished.items():
        asked = requests[number - 1]
        assert tokens == asked.output_tokens
        assert asked.arrival_us <= history.started[number] < history.first_token[number] <= finish_us


@settings(max_examples=30)
@given(loads())
def test_a_pipeline_of_one_stage_is_no_pipeline(requests):
    one, plain = run(stepped(SYNC, 24, timer=pipeline(1.0)), requests), run(stepped(SYNC, 24), requests)
    assert one.started.keys() == plain.started.keys()
    for number, (finish_us, _) in one.finished.items():
        assert abs(finish_us - plain.finished[number][0]) <= 2  # its two parts are rounded by themselves


def batch(engine: dict[str, object], *shares: float, count: int = 8) -> History:
    """Run requests of which four fit a step with their prompts, so that two batches form."""
    requests = [request(at, 0, 8, 100) for at in range(1, count + 1)]
    return run(stepped({**engine, "max_num_batched_tokens": 32}, 200, timer=pipeline(*shares)), requests)


def last_us(history: History) -> int:
    return max(finish_us for finish_us, _ in history.finished.values())


def test_two_even_stages_work_at_two_batches_and_uneven_ones_at_the_pace_of_the_slower():
    serial, even = last_us(batch(SYNC, 5.0)), last_us(batch(PAIR, 2.5, 2.5))
    uneven = [last_us(batch(PAIR, share, 5 - share)) for share in (2.5, 3.0, 3.75, 4.5)]
    assert even < 1.05 * serial  # two batches of half the sequences, in turn
    assert uneven == sorted(uneven)
    assert uneven[-1] > 1.3 * even
    mirrored = last_us(batch(PAIR, 1.25, 3.75))
    assert mirrored == pytest.approx(uneven[2], rel=0.02)


def test_a_request_alone_takes_as_long_as_in_one_stage():
    assert last_us(batch(PAIR, 0.5, 0.5, count=1)) == pytest.approx(last_us(batch(SYNC, 1.0, count=1)), rel=0.001)
