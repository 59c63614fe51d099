"""Laws of an engine on a clock: skipping steps changes nothing, and one seat is an exclusive engine."""

from itertools import pairwise

import hypothesis.strategies as st
import pytest
from clocked_engines import History, request, run, stepped
from hypothesis import given, settings

from maveriq.estimate.engine_presets import engine_preset

KINDS = (
    {"kind": "vllm", "version": "0.23.0"},
    {"kind": "vllm", "version": "0.15.1", "async_scheduling": False},
    {"kind": "sglang"},
    {"kind": "trtllm"},
)
LIMITS = {"vllm": {"max_num_seqs": 4, "max_num_batched_tokens": 64}}
BLOCKS = {"vllm": 24, "trtllm": 12, "sglang": 400}  # scarce: a few requests at a time


@st.composite
def loads(draw):
    """Requests that fit 256 tokens, and aborts of some of them."""
    count = draw(st.integers(1, 12))
    arrivals_us = sorted(draw(st.lists(st.integers(0, 40_000), min_size=count, max_size=count)))
    requests = [
        request(number, at, draw(st.integers(1, 120)), draw(st.integers(1, 120)), draw(st.integers(0, 2)))
        for number, at in enumerate(arrivals_us, start=1)
    ]
    aborted = draw(st.lists(st.sampled_from(requests), unique_by=lambda each: each.request_id, max_size=3))
    return requests, [(each.arrival_us + draw(st.integers(0, 60_000)), each.request_id) for each in aborted]


def known(history: History, aborts: list[tuple[int, int]]) -> tuple[object, ...]:
    """Return what a driver may rely on: of an aborted request, nothing after the abort."""
    gone = {request_id: at for at, request_id in aborts}
    finished = {number: end for number, end in history.finished.items() if end[0] < gone.get(number, 1 << 60)}
    first = {number: at for number, at in history.first_token.items() if at < gone.get(number, 1 << 60)}
    return finished, first, {number: at for number, at in history.started.items() if number in finished}, history.cached


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("delays", [{}, {"delay_us": 617}, {"delay_us": 617, "delay_of_each_us": 97}], ids=str)
@settings(max_examples=25)
@given(loads())
def test_skipping_steps_changes_nothing_to_the_microsecond(kind, delays, load):
    requests, aborts = load
    engine = {**kind, **LIMITS.get(kind["kind"], {})}
    blocks = BLOCKS[kind["kind"]]
    skipping = run(stepped(engine, blocks, **delays), requests, aborts)
    plainly = run(stepped(engine, blocks, skips_steps=False, **delays), requests, aborts)
    assert known(skipping, aborts) == known(plainly, aborts)
    assert skipping.preempted == plainly.preempted
    assert skipping.events <= plainly.events


@settings(max_examples=40)
@given(loads())
def test_every_request_is_finished_once_unless_it_is_aborted(load):
    requests, aborts = load
    history = run(stepped({"kind": "vllm", **LIMITS["vllm"]}, 24), requests, aborts)
    asked = {each.request_id: each.output_tokens for each in requests}
    aborted = {request_id for _, request_id in aborts}
    assert {number for number in asked if number not in history.finished} <= aborted
    for number, (finish_us, tokens) in history.finished.items():
        assert tokens == asked[number]
        assert requests[number - 1].arrival_us <= history.started[number] < history.first_token[number] <= finish_us


@settings(max_examples=40)
@given(loads())
def test_with_one_seat_no_cache_and_room_for_any_prompt_it_is_an_exclusive_engine(load):
    requests, _ = load
    one_seat = {
        "kind": "vllm", "max_num_seqs": 1, "enable_prefix_caching": False, "max_num_batched_tokens": 256,
        "async_scheduling": False,
    }  # fmt: skip
    batching, exclusive = run(stepped(one_seat, 24), requests), run(stepped({"kind": "exclusive"}, 24), requests)
    assert batching.started == exclusive.started
    assert batching.first_token == exclusive.first_token
    assert batching.finished == exclusive.finished
    assert list(batching.started) == list(batching.finished) == sorted(batching.started)
    for before, after in pairwise(batching.started):
        assert batching.started[after] >= batching.finished[before][0]


def test_a_long_output_takes_few_events():
    engine = {"kind": "vllm", "max_num_batched_tokens": 64, "max_num_seqs": 4}
    alone = run(stepped(engine, 300, context=4096), [request(1, 0, 8, 4000)])
    assert alone.events < 10
    assert alone.finished[1][1] == 4000


def test_an_asynchronous_engine_admits_a_request_one_step_later():
    first, second = request(1, 0, 8, 50), request(2, 3_000, 8, 2)
    waits = {}
    for scheduling in (True, False):
        engine = {"kind": "vllm", "async_scheduling": scheduling, "max_num_seqs": 4, "max_num_batched_tokens": 64}
        waits[scheduling] = run(stepped(engine, 24), [first, second]).started[2] - second.arrival_us
    step_us = engine_preset("vllm-0.23.0").step_us + 110  # about: the host's time, and that of `RoundSteps`
    assert waits[True] - waits[False] == pytest.approx(step_us, rel=0.3)


def test_a_request_reaches_the_queue_after_the_delay_of_its_front_end():
    history = run(stepped({"kind": "vllm", **LIMITS["vllm"]}, 24, delay_us=6_200), [request(1, 1_000, 8, 2)])
    assert history.started[1] == 7_200


def test_an_equal_prompt_is_found_in_the_cache():
    requests = [request(1, 0, 100, 2, prompt_id=1), request(2, 50_000, 100, 2, prompt_id=1), request(3, 90_000, 100, 2)]
    history = run(stepped({"kind": "vllm", **LIMITS["vllm"]}, 24), requests)
    assert history.cached == {1: 0, 2: 96, 3: 0}


@pytest.mark.parametrize("kind", KINDS[:2], ids=str)
def test_a_request_that_comes_at_a_step_boundary_is_seen_there_whether_steps_are_skipped_or_not(kind):
    engine, first = {**kind, **LIMITS["vllm"]}, request(1, 0, 8, 60)
    plainly = stepped(engine, 24, skips_steps=False)
    plainly.submit(0, first)
    plainly.compose(0)
    boundaries_us = []
    while (now_us := plainly.next_us) is not None:
        boundaries_us.append(now_us)
        plainly.finish(now_us)
        plainly.compose(now_us)
    for at_us in [at_us + late for at_us in boundaries_us[5:50:9] for late in (-1, 0, 1)]:
        requests = [first, request(2, at_us, 8, 3)]
        skipping = run(stepped(engine, 24), requests)
        assert known(skipping, []) == known(run(stepped(engine, 24, skips_steps=False), requests), []), at_us
