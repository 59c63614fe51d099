"""Laws of vLLM's scheduler on random requests, with tight pools, aborts, priorities, pipelines."""

from __future__ import annotations

import zlib
from collections import Counter
from dataclasses import replace

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings
from vllm_cases import PREFIX_HASH_TOKENS, Case, cases, run

from maveriq.engine import EngineRequest
from maveriq.engine.requests import shareable_tokens
from maveriq.engine.sequence import Sequence
from maveriq.engine.vllm import SchedulerLimits, VllmScheduler
from maveriq.errors import InputError, InvariantError


def check_blocks(scheduler: VllmScheduler) -> None:
    """Blocks neither leak nor exceed the pool, and each is counted once for each of its users."""
    pool, running = scheduler.pool, scheduler.running
    users = Counter(block for sequence in running for block in sequence.shared_blocks)
    assert {block: number for block, number in pool.users().items() if number} == dict(users)
    unshared = sum(sequence.blocks - len(sequence.shared_blocks) for sequence in running)
    assert pool.free_blocks + len(users) + unshared == pool.blocks
    assert pool.free_blocks >= pool.shared_free_blocks >= 0
    for sequence in running:
        assert sequence.blocks == -(-sequence.computed // pool.block_size)
        assert sequence.computed <= sequence.length + sequence.pending
        assert 0 <= sequence.pending <= 2
    assert not any(sequence.blocks or sequence.computed for sequence in scheduler.waiting)
    assert len(running) <= scheduler.limits.max_num_seqs


@pytest.mark.heavy
@settings(max_examples=60)
@given(cases(pipelines=True))
def test_blocks_are_conserved(case: Case) -> None:
    run(case, counts_together=False, check=check_blocks)


@pytest.mark.heavy
@settings(max_examples=60)
@given(cases(pipelines=True, aborts=False))
def test_tokens_come_out_once_and_in_order(case: Case) -> None:
    engine = case.engine(counts_together=False)
    emitted: dict[int, list[int]] = {}
    reasons = {}
    for _, request in case.submits:
        engine.submit(request)
    while True:
        while (step := engine.next_step()) is not None:
            assert step.tokens <= case.limits.max_num_batched_tokens
            sequences = [entry.sequence for entry in step.scheduled]
            assert len(set(sequences)) == len(sequences) == step.decodes + len(step.chunks)
            assert all(entry.tokens >= 1 for entry in step.scheduled)
        if not engine.scheduler.in_flight:
            break
        for token in engine.finish_step():
            emitted.setdefault(token.request_id, []).append(token.output_tokens)
            if token.finish_reason:
                assert token.request_id not in reasons
                reasons[token.request_id] = token.finish_reason
    for _, request in case.submits:
        room = case.limits.max_model_len - request.prompt_tokens
        expected = min(request.output_tokens, room)
        assert emitted[request.request_id] == list(range(1, expected + 1))
        known = min(room, request.max_tokens or request.output_tokens)
        assert reasons[request.request_id] == ("length" if expected == known else "stop")


@pytest.mark.heavy
@settings(max_examples=60)
@given(cases())
def test_sequences_counted_together_take_the_same_steps(case: Case) -> None:
    assert run(case, counts_together=True) == run(case, counts_together=False)


@pytest.mark.heavy
@settings(max_examples=60)
@given(cases(), st.sampled_from([1, 3, 1000]))
def test_skipping_steps_changes_nothing(case: Case, longest_jump: int) -> None:
    plain, skipping = run(case, counts_together=False), run(case, longest_jump=longest_jump)
    assert skipping.events == plain.events
    assert max(skipping.turns) == max(plain.turns)
    for turn, state in skipping.turns.items():
        assert state == (plain.turns[turn] if state.steps else replace(plain.turns[turn], steps=[]))


@pytest.mark.heavy
@settings(max_examples=100)
@given(cases(pipelines=True))
def test_content_token_by_token_gives_the_same_steps(case: Case) -> None:
    """Blocks that nobody else can find are only counted; with token IDs each is an object with its content."""
    fine = replace(case, submits=tuple((at, token_by_token(request)) for at, request in case.submits))
    assert run(fine, counts_together=False) == run(case, counts_together=False)


def token_by_token(request: EngineRequest) -> EngineRequest:
    """Return a request with token IDs that say what its prompt ID or prefix hashes say."""
    tokens: list[int] = []
    for index in range(request.prompt_tokens + request.output_tokens):
        content: object = ("own", request.request_id, index)
        if request.prompt_id is not None and index < request.prompt_tokens:
            content = ("prompt", request.prompt_id, index)
        elif request.prefix_hashes is not None and index < shareable_tokens(request):
            content = (request.prefix_hashes[index // PREFIX_HASH_TOKENS], index)
        tokens.append(zlib.crc32(repr(content).encode()))
    return replace(request, token_ids=tokens, prompt_id=None, prefix_hashes=None)


@pytest.mark.heavy
@settings(max_examples=40)
@given(cases(pipelines=True, by_priority=False, aborts=False))
def test_who_comes_first_is_admitted_first(case: Case) -> None:
    engine = case.engine(counts_together=False)
    for _, request in case.submits:
        engine.submit(request)
    first_steps: dict[int, None] = {}
    while True:
        while (step := engine.next_step()) is not None:
            for entry in step.scheduled:
                first_steps.setdefault(entry.sequence.request.request_id)
        if not engine.scheduler.in_flight:
            break
        engine.finish_step()
    assert list(first_steps) == [request.request_id for _, request in case.submits]


@pytest.mark.heavy
@settings(max_examples=40)
@given(cases(aborts=False), st.integers(1, 50), st.integers(0, 100))
def test_more_blocks_and_budget_lose_no_request(case: Case, blocks: int, budget: int) -> None:
    larger = replace(case, blocks=case.blocks + blocks)
    larger = larger.changed(max_num_batched_tokens=case.limits.max_num_batched_tokens + budget)
    assert _finished(larger) == _finished(case) == {request.request_id for _, request in case.submits}


def _finished(case: Case) -> set[int]:
    return {token.request_id for _, token in run(case).events if token.finish_reason}


@pytest.mark.heavy
@settings(max_examples=20)
@given(cases())
def test_the_same_case_gives_the_same_turns(case: Case) -> None:
    assert run(case) == run(case)


def test_a_request_that_never_fits_is_refused() -> None:
    case = Case(
        limits=SchedulerLimits(max_num_seqs=4, max_num_batched_tokens=64, max_model_len=64),
        version="0.23.0",
        blocks=3,
        block_size=4,
        prefix_caching=True,
        submits=(),
        aborts=(),
    )
    with pytest.raises(InputError, match=r"never fit into the KV cache of 12 tokens; raise num_gpu_blocks"):
        case.engine().submit(EngineRequest(request_id=1, prompt_tokens=10, output_tokens=4))
    with pytest.raises(InputError, match=r"no room for output within max_model_len 64"):
        case.engine().submit(EngineRequest(request_id=1, prompt_tokens=64, output_tokens=1))
    with pytest.raises(InvariantError, match="no step is in flight"):
        case.engine().finish_step()


def test_a_sequence_says_how_far_it_is() -> None:
    sequence = Sequence(EngineRequest(request_id="a", prompt_tokens=5, output_tokens=2), 100, 1)
    assert repr(sequence) == "Sequence('a', WAITING, 0/5 tokens, 0 blocks)"
