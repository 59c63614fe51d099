"""Random settings and requests for vLLM's scheduler, and a driver that runs them to the end."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import hypothesis.strategies as st

from maveriq.domain.engine_defaults import vllm_rules
from maveriq.engine import Emitted, EngineRequest, Step
from maveriq.engine.kv_blocks import KVBlockPool
from maveriq.engine.vllm import SchedulerLimits, VllmScheduler
from maveriq.engine.vllm_engine import VllmEngine

PREFIX_HASH_TOKENS = 4
MAX_TURNS = 20_000


@dataclass(frozen=True)
class Case:
    """An engine, and what happens before which turn of its driver."""

    limits: SchedulerLimits
    version: str
    blocks: int
    block_size: int
    prefix_caching: bool
    submits: tuple[tuple[int, EngineRequest], ...]
    aborts: tuple[tuple[int, int], ...]

    def engine(self, *, counts_together: bool = True) -> VllmEngine:
        rules = vllm_rules(self.version)
        pool = KVBlockPool(
            self.blocks,
            self.block_size,
            prefix_caching=self.prefix_caching,
            reuse_unhashed_first=rules.reuse_unhashed_first,
        )
        return VllmEngine(VllmScheduler(self.limits, rules, pool, counts_together=counts_together))

    def changed(self, **limits: Any) -> Case:
        return replace(self, limits=replace(self.limits, **limits))


@st.composite
def requests(draw, request_id: int, max_model_len: int, prompts: tuple[int, ...]) -> EngineRequest:
    prompt_tokens, output_tokens = draw(st.integers(1, max_model_len - 1)), draw(st.integers(1, 40))
    content: dict[str, Any] = {}
    match draw(st.sampled_from(["unknown", "prompt", "prefixes", "prefixes and output"])):
        case "prompt":
            content["prompt_id"] = draw(st.integers(0, len(prompts) - 1))
            prompt_tokens = prompts[content["prompt_id"]]
        case "prefixes" | "prefixes and output" as kind:
            tokens = prompt_tokens + (output_tokens if kind != "prefixes" else 0)
            shared, family = draw(st.integers(0, 12)), draw(st.integers(0, 1))
            content["prefix_hash_tokens"] = PREFIX_HASH_TOKENS
            content["prefix_hashes"] = [
                (family, index) if index < shared else (request_id, index, "own")
                for index in range(tokens // PREFIX_HASH_TOKENS)
            ]
    return EngineRequest(
        request_id=request_id,
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        max_tokens=draw(st.none() | st.just(output_tokens) | st.just(output_tokens + 5)),
        priority=draw(st.integers(0, 2)),
        **content,
    )


@st.composite
def cases(
    draw, *, pipelines: bool = False, by_priority: bool | None = None, aborts: bool = True, chunked: bool | None = None
) -> Case:
    """Draw cases with tight pools, so that requests are preempted."""
    block_size = draw(st.sampled_from([1, 2, 4, 16]))
    max_model_len = draw(st.sampled_from([24, 64, 128]))
    needed = -(-max_model_len // block_size)
    max_num_seqs = draw(st.sampled_from([1, 2, 4, 16]))
    count = draw(st.integers(1, 12))
    prompts = (max_model_len // 2, max_model_len // 3, 7)
    turns = st.just(0) | st.integers(0, 40)
    is_chunked = draw(st.booleans()) if chunked is None else chunked
    budget = draw(st.sampled_from([4, 8, 16, 40, 256])) if is_chunked else max_model_len
    return Case(
        limits=SchedulerLimits(
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=budget,
            max_model_len=max_model_len,
            long_prefill_token_threshold=draw(st.sampled_from([0, 0, 5])),
            enable_chunked_prefill=is_chunked,
            by_priority=draw(st.booleans()) if by_priority is None else by_priority,
            async_scheduling=draw(st.booleans()),
            pipeline_parallel_size=draw(st.integers(1, 3)) if pipelines else 1,
        ),
        version=draw(st.sampled_from(["0.15.1", "0.23.0", "0.32.0"])),
        blocks=needed + draw(st.integers(0, 4) | st.integers(0, 3 * needed)),
        block_size=block_size,
        prefix_caching=draw(st.booleans()),
        submits=tuple(
            sorted(
                ((draw(turns), draw(requests(index, max_model_len, prompts))) for index in range(count)),
                key=lambda submit: submit[0],
            )
        ),
        aborts=tuple(draw(st.lists(st.tuples(st.integers(0, 40), st.integers(0, count - 1)), max_size=2)))
        if aborts
        else (),
    )


@dataclass
class Turn:
    """The state after a turn of the driver, and the steps that it composed (none, if it took several turns at once)."""

    steps: list[tuple[Any, ...]]
    tokens: int
    running: list[int]
    waiting: list[int]
    free_blocks: int
    preemptions: int


@dataclass
class History:
    """What a run did, by turns of its driver; `events` are first and last tokens with the turn that took them."""

    turns: dict[int, Turn]
    events: list[tuple[int, Emitted]]
    skipped: int


def run(
    case: Case,
    *,
    counts_together: bool = True,
    longest_jump: int = 0,
    check: Callable[[VllmScheduler], None] = lambda _: None,
) -> History:
    """Run a case until all its requests have ended.

    Args:
        counts_together: see `VllmScheduler`.
        longest_jump: the most turns to take at once where nothing happens.
        check: called after each turn.
    """
    engine = case.engine(counts_together=counts_together)
    scheduler = engine.scheduler
    history = History({}, [], 0)
    turn = tokens = 0
    times = sorted({at for at, _ in case.submits} | {at for at, _ in case.aborts})
    while turn < MAX_TURNS:
        for at, request in case.submits:
            if at == turn:
                engine.submit(request)
        for at, request_id in case.aborts:
            if at == turn:
                engine.abort(request_id)
        quiet = engine.quiet_run() if longest_jump else None
        steps: list[Step] = []
        if quiet is not None:
            jump = min([quiet.steps, longest_jump, *(at - turn for at in times if at > turn)])
            together = scheduler.in_flight[0].together if scheduler.in_flight else quiet.decodes
            first, last = engine.advance(jump)
            history.events += [(turn + 1, token) for token in first if _is_event(token)]
            turn += jump
            history.events += [(turn, token) for token in last if _is_event(token)]
            history.skipped += jump
            tokens += together + len(first) + (jump - 1) * quiet.decodes
        else:
            while (step := engine.next_step()) is not None:
                steps.append(step)
            if not scheduler.in_flight and turn > max(times):
                break
            turn += 1
            if scheduler.in_flight:
                oldest = scheduler.in_flight[0]
                listed = engine.finish_step()
                tokens += oldest.together + len(listed)
                history.events += [(turn, token) for token in listed if _is_event(token)]
        check(scheduler)
        history.turns[turn] = Turn(
            [_figures(step) for step in steps],
            tokens,
            [_id(sequence) for sequence in scheduler.running],
            [_id(sequence) for sequence in scheduler.waiting.in_order()],
            scheduler.pool.free_blocks,
            scheduler.preemptions,
        )
    assert turn < MAX_TURNS, "requests do not end"
    assert scheduler.pool.free_blocks == case.blocks
    return history


def _is_event(token: Emitted) -> bool:
    return token.finish_reason is not None or token.output_tokens == 1


def _figures(step: Step) -> tuple[Any, ...]:
    return (
        step.tick, step.decodes, step.context_tokens, tuple(step.chunks),
        tuple(_id(sequence) for sequence in step.preempted),
    )  # fmt: skip


def _id(sequence: Any) -> int:
    return sequence.request.request_id
