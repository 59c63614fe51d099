"""Records of engines over time: means times spans are sums over requests, whether steps are skipped or not."""

import hypothesis.strategies as st
import numpy as np
import pytest
from clocked_engines import History, request, run, stepped
from hypothesis import given, settings

from maveriq.control.engine_series import EngineSeries, EngineSums, StepsEnded, TokenGaps
from maveriq.domain.requests import Request
from maveriq.scenario.stepped_engine import SteppedEngine

KINDS = (
    {"kind": "vllm", "version": "0.23.0", "max_num_seqs": 4, "max_num_batched_tokens": 64},
    {"kind": "vllm", "version": "0.15.1", "async_scheduling": False, "max_num_seqs": 4, "max_num_batched_tokens": 64},
    {"kind": "sglang"},
    {"kind": "trtllm"},
)
SCARCE = {"vllm": 24, "trtllm": 12, "sglang": 400}
PLENTY = {"vllm": 400, "trtllm": 200, "sglang": 6_400}


@st.composite
def loads(draw):
    count = draw(st.integers(1, 12))
    arrivals_us = sorted(draw(st.lists(st.integers(0, 40_000), min_size=count, max_size=count)))
    return [
        request(number, at, draw(st.integers(1, 120)), draw(st.integers(1, 120)))
        for number, at in enumerate(arrivals_us, start=1)
    ]


def recorded(engine: SteppedEngine, requests: list[Request]) -> tuple[History, EngineSeries, np.ndarray]:
    """Return what became of requests, the engine over time, and the length of each interval in µs."""
    history = run(engine, requests)
    series = engine.recorder.series(history.ended_us)
    return history, series, np.diff(series.time_us, prepend=0)


def gaps(engine: SteppedEngine) -> tuple[int, int]:
    """Return how many tokens followed another, and the sum of the times between."""
    gap_us, tokens = engine.recorder.gaps.distribution()
    return int(tokens.sum()), int((gap_us * tokens).sum())


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("sample_us", [700, 1_000_000])
@settings(max_examples=15)
@given(loads())
def test_means_times_spans_are_sums_over_requests(kind, sample_us, load):
    engine = stepped(kind, PLENTY[kind["kind"]], delay_us=617, sample_us=sample_us)
    history, series, span_us = recorded(engine, load)
    computed_us = sum(end_us - history.started[number] for number, (end_us, _) in history.finished.items())
    present_us = sum(end_us - load[number - 1].arrival_us for number, (end_us, _) in history.finished.items())
    assert not history.preempted
    assert series.running @ span_us == pytest.approx(computed_us)
    assert (series.running + series.waiting) @ span_us == pytest.approx(present_us)


@pytest.mark.parametrize("kind", KINDS, ids=str)
@settings(max_examples=15)
@given(loads())
def test_tokens_of_steps_are_those_of_requests(kind, load):
    engine = stepped(kind, PLENTY[kind["kind"]], sample_us=3_000)
    _, series, span_us = recorded(engine, load)
    busy_us = series.busy_share * span_us
    tokens = np.nansum(series.batch_tokens * busy_us / series.step_us)
    asked = sum(each.prompt_tokens + each.output_tokens - 1 for each in load)
    # Overlapping engines compute one token more of a request that has ended, which is dropped.
    assert asked - 0.01 <= tokens <= asked + len(load) + 0.01


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("blocks", [SCARCE, PLENTY], ids=["scarce", "plenty"])
@settings(max_examples=15)
@given(loads())
def test_times_between_tokens_add_up_to_those_from_first_to_last(kind, blocks, load):
    engine = stepped(kind, blocks[kind["kind"]])
    history, _, _ = recorded(engine, load)
    counted, total_us = gaps(engine)
    assert counted == sum(each.output_tokens - 1 for each in load)
    spans_us = sum(end_us - history.first_token[number] for number, (end_us, _) in history.finished.items())
    assert total_us == pytest.approx(spans_us, abs=counted)  # each is rounded to a microsecond


@pytest.mark.parametrize("kind", KINDS, ids=str)
@settings(max_examples=15)
@given(loads())
def test_records_are_the_same_whether_steps_are_skipped_or_not(kind, load):
    blocks = PLENTY[kind["kind"]]
    skipping, plain = (stepped(kind, blocks, sample_us=2_000, skips_steps=skips) for skips in (True, False))
    (_, first, span_us), (_, second, _) = recorded(skipping, load), recorded(plain, load)
    for name in ("running", "waiting", "busy_share"):
        assert getattr(first, name) == pytest.approx(getattr(second, name), abs=1e-9), name
    # Skipped steps are spread evenly over their time; all in all they are the same.
    steps, plain_steps = (np.nansum(each.busy_share * span_us / each.step_us) for each in (first, second))
    assert steps == pytest.approx(plain_steps)
    assert first.used_blocks == pytest.approx(second.used_blocks, abs=4 * len(load))
    assert gaps(skipping)[0] == gaps(plain)[0]
    assert gaps(skipping)[1] == pytest.approx(gaps(plain)[1], abs=gaps(plain)[0])


@pytest.mark.parametrize("kind", KINDS[:2], ids=str)
@settings(max_examples=15)
@given(loads())
def test_a_request_takes_a_step_for_each_token_and_for_each_chunk_but_the_last(kind, load):
    budget = 64
    history, _, _ = recorded(stepped(kind, 400), load)
    for number, steps in history.steps.items():
        asked = load[number - 1]
        assert steps >= asked.output_tokens + -(-asked.prompt_tokens // budget) - 1
    alone = run(stepped(kind, 400), [request(1, 0, 120, 5)])
    assert alone.steps == {1: 6}


def test_an_aborted_request_no_longer_waits():
    engine = stepped({"kind": "vllm", "max_num_seqs": 1}, 400, sample_us=1_000)
    history = run(engine, [request(1, 0, 8, 100), request(2, 0, 8, 100)], [(5_500, 2)])
    series = engine.recorder.series(history.finished[1][0])
    assert series.waiting[:5].tolist() == pytest.approx([1.0] * 5, abs=0.2)
    assert series.waiting[6:] == pytest.approx(0.0, abs=1e-9)


def test_an_engine_that_stops_has_no_request():
    engine = stepped({"kind": "vllm", "max_num_seqs": 1}, 400, sample_us=1_000)
    engine.submit(0, request(1, 0, 8, 200))
    engine.compose(0)
    engine.stop(3_500)
    series = engine.recorder.series(10_000)
    assert series.running == pytest.approx([1, 1, 1, 0.5, 0, 0, 0, 0, 0, 0])
    assert series.waiting == pytest.approx(0.0)


def test_rows_depend_on_the_time_alone():
    gaps = TokenGaps()
    sums = EngineSums(1_000, gaps)
    for start_us in range(0, 100_000, 4):
        sums.steps_ended(StepsEnded(start_us, start_us + 4, 1, 2, 2, 1, 3, 4, 1))
    series = sums.series(100_000)
    assert len(series.time_us) == 100
    assert series.running == pytest.approx(1.0)
    assert series.used_blocks == pytest.approx(2.0)
    assert series.batch_tokens == pytest.approx(3.0)
    assert series.step_us == pytest.approx(4.0)
    assert [column.tolist() for column in gaps.distribution()] == [[4], [25_000]]


@given(st.lists(st.tuples(st.integers(0, 200_000), st.integers(1, 9)), min_size=1, max_size=30))
def test_gaps_are_counted_exactly_however_long(pairs):
    counted = TokenGaps()
    for gap_us, tokens in pairs:
        counted.add(np.array([gap_us]), np.array([tokens]))
    gap_us, tokens = counted.distribution()
    assert (np.diff(gap_us) > 0).all()
    assert np.repeat(gap_us, tokens).tolist() == sorted(gap for gap, many in pairs for _ in range(many))
