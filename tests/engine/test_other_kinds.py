"""Laws of the models of TensorRT-LLM, SGLang and exclusive engines, and their rules one by one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings
from vllm_cases import Case, run

from maveriq.engine import EngineRequest
from maveriq.engine.batching import BatchingEngine
from maveriq.engine.exclusive import ExclusiveEngine
from maveriq.engine.kv_blocks import KVBlockPool
from maveriq.engine.sglang import SglangEngine
from maveriq.engine.trtllm import CapacityPolicy, ChunkingPolicy, TrtllmEngine
from maveriq.engine.vllm import SchedulerLimits
from maveriq.errors import InputError

LONGEST = 64
Maker = Callable[[], BatchingEngine]


@st.composite
def makers(draw) -> Maker:
    """Draw how an engine is made: any kind, with a tight pool."""
    block_size = draw(st.sampled_from([1, 4, 16]))
    blocks = -(-LONGEST // block_size) + draw(st.integers(0, 2 * LONGEST // block_size))
    seqs, overlaps = draw(st.sampled_from([1, 2, 8])), draw(st.booleans())
    caching = draw(st.booleans())
    chunk = draw(st.sampled_from([16, 32, 64]))
    kind = draw(st.sampled_from(["trtllm", "sglang", "exclusive"]))
    policy, chunking = draw(st.sampled_from(CapacityPolicy)), draw(st.none() | st.sampled_from(ChunkingPolicy))
    mixes = draw(st.booleans())

    def make() -> BatchingEngine:
        pool = KVBlockPool(blocks, block_size, prefix_caching=caching and kind != "exclusive")
        if kind == "exclusive":
            return ExclusiveEngine(pool, max_model_len=LONGEST, max_num_seqs=seqs)
        if kind == "sglang":
            return SglangEngine(
                pool, context_length=LONGEST, max_running_requests=seqs, chunked_prefill_size=chunk,
                mixes_chunks=mixes, overlaps=overlaps,
            )  # fmt: skip
        return TrtllmEngine(
            pool, max_seq_len=LONGEST, max_batch_size=seqs, capacity_policy=policy, chunking_policy=chunking,
            max_num_tokens=chunk if chunking else LONGEST, overlaps=overlaps,
        )  # fmt: skip

    return make


@st.composite
def request_lists(draw) -> list[tuple[int, EngineRequest]]:
    asked = []
    for index in range(draw(st.integers(1, 10))):
        prompt_id = draw(st.none() | st.integers(0, 1))
        prompt = draw(st.integers(1, LONGEST - 1)) if prompt_id is None else (30, 17)[prompt_id]
        output = draw(st.integers(1, LONGEST - prompt))
        asked.append(
            (
                draw(st.just(0) | st.integers(0, 30)),
                EngineRequest(
                    request_id=index,
                    prompt_tokens=prompt,
                    output_tokens=output,
                    max_tokens=draw(st.none() | st.integers(output, LONGEST - prompt)),
                    prompt_id=prompt_id,
                ),
            )
        )
    return sorted(asked, key=lambda pair: pair[0])


@dataclass
class Outcome:
    tokens: dict[int, list[int]]
    events: list[tuple[int, int, int]]
    turns: int
    preemptions: int


def outcome(engine: BatchingEngine, asked: list[tuple[int, EngineRequest]], *, skips: bool = False) -> Outcome:
    """Run requests to their end; `events` are (turn, request, output tokens) of first and last tokens."""
    got = Outcome({}, [], 0, 0)
    last_turn = asked[-1][0]
    while got.turns < 20_000:
        for at, request in asked:
            if at == got.turns:
                engine.submit(request)
        quiet = engine.quiet_run() if skips else None
        if quiet is not None:
            jump = min([quiet.steps, *(at - got.turns for at, _ in asked if at > got.turns)])
            first, last = engine.advance(jump)
            got.events += [(got.turns + 1, token.request_id, 1) for token in first if token.output_tokens == 1]
            got.turns += jump
            got.events += [(got.turns, token.request_id, token.output_tokens) for token in last]
            continue
        while engine.next_step() is not None:
            pass
        if not engine.in_flight and got.turns > last_turn:
            break
        got.turns += 1
        if engine.in_flight:
            for token in engine.finish_step():
                got.tokens.setdefault(token.request_id, []).append(token.output_tokens)
                if token.finish_reason or token.output_tokens == 1:
                    got.events.append((got.turns, token.request_id, token.output_tokens))
        check(engine)
    got.preemptions = engine.preemptions
    assert engine.pool.free_blocks == engine.pool.blocks
    return got


def check(engine: BatchingEngine) -> None:
    held = {block for sequence in engine.running for block in sequence.shared_blocks}
    unshared = sum(sequence.blocks - len(sequence.shared_blocks) for sequence in engine.running)
    assert engine.pool.free_blocks + len(held) + unshared == engine.pool.blocks
    assert not any(sequence.blocks for sequence in engine.waiting)
    counters = engine.counters
    assert (counters.running, counters.waiting) == (len(engine.running), len(engine.waiting))
    assert 0 <= counters.kv_use <= 1
    assert counters.cached_tokens <= counters.prompt_tokens


@pytest.mark.heavy
@settings(max_examples=150)
@given(makers(), request_lists())
def test_every_request_gets_its_tokens_once_and_in_order(make: Maker, asked: list[tuple[int, EngineRequest]]) -> None:
    tokens = outcome(make(), asked).tokens
    assert tokens == {request.request_id: list(range(1, request.output_tokens + 1)) for _, request in asked}


@pytest.mark.heavy
@settings(max_examples=150)
@given(makers(), request_lists())
def test_skipping_steps_changes_nothing(make: Maker, asked: list[tuple[int, EngineRequest]]) -> None:
    plain, skipping = outcome(make(), asked), outcome(make(), asked, skips=True)
    assert skipping.events == plain.events
    assert (skipping.turns, skipping.preemptions) == (plain.turns, plain.preemptions)


@pytest.mark.heavy
@settings(max_examples=60)
@given(request_lists())
def test_vllm_with_one_seat_is_exclusive(asked: list[tuple[int, EngineRequest]]) -> None:
    case = Case(
        limits=SchedulerLimits(max_num_seqs=1, max_num_batched_tokens=LONGEST, max_model_len=LONGEST + 1),
        version="0.23.0",
        blocks=LONGEST + 1,
        block_size=1,
        prefix_caching=False,
        submits=tuple(asked),
        aborts=(),
    )
    pool = KVBlockPool(LONGEST, 1, prefix_caching=False)
    exclusive = outcome(ExclusiveEngine(pool, max_model_len=LONGEST, max_num_seqs=1), asked)
    events = [(turn, token.request_id, token.output_tokens) for turn, token in run(case).events]
    assert events == exclusive.events


@pytest.mark.heavy
@settings(max_examples=60)
@given(makers(), request_lists())
def test_no_evict_never_preempts(make: Maker, asked: list[tuple[int, EngineRequest]]) -> None:
    engine = make()
    got = outcome(engine, asked)
    if isinstance(engine, ExclusiveEngine) or (
        isinstance(engine, TrtllmEngine) and engine.capacity_policy is not CapacityPolicy.MAX_UTILIZATION
    ):
        assert not got.preemptions


def request(request_id: int, prompt_tokens: int, output_tokens: int, **others: object) -> EngineRequest:
    return EngineRequest(request_id=request_id, prompt_tokens=prompt_tokens, output_tokens=output_tokens, **others)  # type: ignore[arg-type]


def batches(engine: BatchingEngine, requests: list[EngineRequest], steps: int) -> list[list[tuple[int, int]]]:
    """Return (request, tokens) of the next steps."""
    for one in requests:
        engine.submit(one)
    found = []
    for _ in range(steps):
        step = engine.next_step()
        if step is not None:
            found.append([(entry.sequence.request.request_id, entry.tokens) for entry in step.scheduled])
        if engine.in_flight and (step is None or not engine.overlaps):
            engine.finish_step()
    return found


def trtllm(blocks: int, **others: object) -> TrtllmEngine:
    settings: dict[str, object] = {"max_seq_len": 64, "max_batch_size": 8, "max_num_tokens": 32, "overlaps": False}
    caching = bool(others.pop("caching", False))
    return TrtllmEngine(KVBlockPool(blocks, 4, prefix_caching=caching), **(settings | others))  # type: ignore[arg-type]


def test_trtllm_admits_only_what_fits_to_its_end() -> None:
    # Blocks for 10 and 8 tokens at the end: 3 and 2 of 4, though 2 and 1 would do for the prompts.
    assert batches(trtllm(4), [request(1, 6, 4), request(2, 4, 4)], 5) == [[(1, 6)], *[[(1, 1)]] * 3, [(2, 4)]]
    assert batches(trtllm(5), [request(1, 6, 4), request(2, 4, 4)], 1) == [[(1, 6), (2, 4)]]


def test_trtllm_at_max_utilization_pauses_the_last_one() -> None:
    engine = trtllm(4, capacity_policy=CapacityPolicy.MAX_UTILIZATION)
    # The third step takes a block for request 1 (tokens 9 and on), the fourth has none for request 2.
    assert batches(engine, [request(1, 7, 5), request(2, 7, 5)], 3) == [[(1, 7), (2, 7)], [(1, 1), (2, 1)], [(1, 1)]]
    assert engine.preemptions == 1
    assert batches(engine, [], 3) == [[(1, 1)], [(1, 1)], [(2, 9)]]


def test_trtllm_static_batches_wait_for_each_other() -> None:
    engine = trtllm(16, capacity_policy=CapacityPolicy.STATIC_BATCH, max_batch_size=2)
    asked = [request(1, 4, 2), request(2, 4, 3), request(3, 4, 1)]
    assert batches(engine, asked, 4) == [[(1, 4), (2, 4)], [(1, 1), (2, 1)], [(2, 1)], [(3, 4)]]


@pytest.mark.parametrize(
    ("policy", "first_step"),
    [
        (None, [(1, 20)]),  # the second does not fit whole
        (ChunkingPolicy.FIRST_COME_FIRST_SERVED, [(1, 20), (2, 8)]),  # 10 tokens are left: two blocks of 4
        (ChunkingPolicy.EQUAL_PROGRESS, [(1, 16), (2, 14)]),
    ],
)
def test_trtllm_splits_prompts_by_its_policy(policy: ChunkingPolicy | None, first_step: list[tuple[int, int]]) -> None:
    engine = trtllm(16, chunking_policy=policy, max_num_tokens=30)
    assert batches(engine, [request(1, 20, 2), request(2, 14, 2)], 1) == [first_step]


def test_trtllm_waits_for_a_block_that_is_being_computed() -> None:
    engine = trtllm(16, caching=True)
    asked = [request(1, 9, 2, prompt_id="same"), request(2, 9, 2, prompt_id="same")]
    assert batches(engine, asked, 2) == [[(1, 9)], [(1, 1), (2, 1)]]


def sglang(pages: int, **others: object) -> SglangEngine:
    settings: dict[str, object] = {"context_length": 64, "max_running_requests": 8, "overlaps": False}
    return SglangEngine(KVBlockPool(pages, 1, prefix_caching=False), **(settings | others))  # type: ignore[arg-type]


def test_sglang_computes_prompts_alone() -> None:
    engine = sglang(64)
    engine.submit(request(1, 5, 4))
    assert batches(engine, [], 2) == [[(1, 5)], [(1, 1)]]
    assert batches(engine, [request(2, 3, 4)], 2) == [[(2, 3)], [(1, 1), (2, 1)]]


def test_sglang_mixes_decodes_with_prompts_if_asked() -> None:
    engine = sglang(64, mixes_chunks=True)
    assert batches(engine, [request(1, 5, 4)], 1) == [[(1, 5)]]
    assert batches(engine, [request(2, 3, 4)], 1) == [[(2, 3), (1, 1)]]


def test_sglang_cuts_one_prompt_only() -> None:
    engine = sglang(64, chunked_prefill_size=8)
    asked = [request(1, 12, 2), request(2, 6, 2)]
    assert batches(engine, asked, 4) == [[(1, 8)], [(1, 4), (2, 4)], [(2, 2)], [(1, 1), (2, 1)]]


def test_sglang_admits_by_its_guess() -> None:
    # Request 1 may generate 19 tokens more, of which 0.7 are expected: 13.3. Of 40 pages 21.7 are left beside these and
    # its 5; request 2 needs 5 + 15 + 1.
    asked = [request(1, 5, 20, max_tokens=20), request(2, 5, 15, max_tokens=15)]
    engine = sglang(39)
    assert batches(engine, asked[:1], 1) == [[(1, 5)]]
    assert batches(engine, asked[1:], 1) == [[(1, 1)]]
    roomy = sglang(40)
    assert batches(roomy, asked[:1], 1) == [[(1, 5)]]
    assert batches(roomy, asked[1:], 1) == [[(2, 5)]]


def test_sglang_retracts_who_generated_least() -> None:
    engine = sglang(25, conservativeness=0.0)  # expects no further token
    assert batches(engine, [request(1, 8, 12, max_tokens=12)], 2) == [[(1, 8)], [(1, 1)]]
    assert batches(engine, [request(2, 8, 6, max_tokens=6)], 5) == [[(2, 8)], *[[(1, 1), (2, 1)]] * 4]
    # 13 and 12 pages are held, none is left.
    assert batches(engine, [], 1) == [[(1, 1)]]
    assert engine.preemptions == 1
    # (6 generated + 20) / (12 asked + 1), at most 1.
    assert engine.new_token_ratio == 1.0


def test_an_exclusive_engine_computes_a_batch_to_its_end() -> None:
    engine = ExclusiveEngine(KVBlockPool(16, 4, prefix_caching=False), max_model_len=64, max_num_seqs=2)
    asked = [request(1, 4, 2), request(2, 4, 3), request(3, 4, 1)]
    assert batches(engine, asked, 4) == [[(1, 4), (2, 4)], [(1, 1), (2, 1)], [(2, 1)], [(3, 4)]]


def test_a_request_that_never_fits_is_refused() -> None:
    with pytest.raises(InputError, match="more than the 16 that the engine holds of one sequence"):
        trtllm(4).submit(request(1, 10, 7))
    with pytest.raises(InputError, match="33 tokens are more than max_num_tokens 32, and TensorRT-LLM splits"):
        trtllm(32).submit(request(1, 33, 7))


def test_aborted_requests_free_what_they_hold() -> None:
    engine = sglang(64, chunked_prefill_size=8)
    batches(engine, [request(1, 12, 2), request(2, 6, 2)], 1)
    assert engine.abort(1)
    assert not engine.abort(1)
    assert engine.pool.free_blocks == 64
    assert batches(engine, [], 2) == [[(2, 6)], [(2, 1)]]
