"""The state of a compiled engine of vLLM: whole numbers in one block of memory, which Python allocates.

Compiled functions get a pointer to it, `e`, and find everything at offsets that are constants here: `e[FREE_BLOCKS]`,
and `e[SEQ_COMPUTED + slot]` of the sequence in a slot. (Structured arrays read better, but with them LLVM takes
minutes.) What has no fixed size is elsewhere, at an address that `e` holds: `ints(e[REQUESTS_AT])`.

Counts are tokens unless they say blocks. A *slot* is the place of a request that has begun and not ended; there are
`max_num_seqs`, which is enough: while a preempted request waits at the head, no new one is admitted. A *row* is the
place of a request that has not begun. A *place* is one of the two of steps in flight, 0 or 1.
"""

from __future__ import annotations

import numpy as np

from maveriq.compiling import Integers, address
from maveriq.engine.vllm import VllmScheduler

SLOTS = 1024
"""The most requests that run together."""

MAX_BLOCK_SIZE = 256

(
    # Limits and rules, which do not change; see `SchedulerLimits`, `VllmRules` and `KVBlockPool`.
    MAX_NUM_SEQS, MAX_NUM_BATCHED_TOKENS, MAX_MODEL_LEN, LONG_PREFILL_TOKEN_THRESHOLD, ENABLE_CHUNKED_PREFILL,
    RESERVES_FULL_PROMPT, ASYNC_SCHEDULING, THRESHOLD_NEEDS_COMPANY, CURSOR_FOLLOWS_VICTIMS, PREFIX_CACHING,
    REUSE_UNHASHED_FIRST, BLOCK_SIZE, BLOCKS,
    # Requests.
    HELD,  # that have reached the queue and not ended
    FIRST_ROW, LAST_ROW,  # of the queue of those that have not begun; -1 if there is none
    QUEUED,  # how many these are
    FREE_ROW,  # the first of the free rows; -1 for none
    PUT_BACK_COUNT, RUNNING_COUNT, SINGLES_COUNT, FREE_SLOTS_COUNT, EMITTED_COUNT,  # lengths of the lists below
    ADMISSIONS, HAS_NEWS,
    PREEMPTIONS, PROMPT_TOKENS, CACHED_TOKENS,  # see `EngineCounters`
    # Steps.
    BUDGET,  # of the step that is composed
    FIRST_STEP,  # the place of the oldest in flight
    IN_FLIGHT, DONE, MUST_WAIT,
    # Sequences that are counted together (`DecodeCohort`).
    COHORT, TICK, OFFSETS, END_TICK,
    # Free KV blocks; the queue matters while blocks in it can be found (`maveriq.engine.compiled_blocks`).
    FREE_BLOCKS, FINDABLE_BLOCKS, QUEUE_HEAD, QUEUE_LENGTH, AGES, ELDERS,
    # Addresses, and numbers of elements.
    REQUESTS_AT, ON_WAY_AT, ROWS, FREE_RUNS_AT, FREE_RUNS, ELDERS_AT, FOUND_AT,
) = range(50)  # fmt: skip
"""One scheduler."""

_SEQUENCES = 50

(
    SEQ_REQUEST_ID, SEQ_PROMPT_TOKENS, SEQ_LENGTH, SEQ_END, SEQ_ADMISSION, SEQ_COMPUTED, SEQ_PENDING, SEQ_BLOCKS,
    SEQ_REGISTERED,
    SEQ_FINDABLE_BLOCKS,  # blocks in the queue of free ones that only this sequence can find
    SEQ_CACHED_TOKENS, SEQ_STEPS_WITHOUT_TOKEN, SEQ_IS_RUNNING, SEQ_IS_UNSTARTED,
    SEQ_IN_COHORT, SEQ_OFFSET, SEQ_JOINED_TICK, SEQ_COUNTS_FROM,
    SEQ_INTERRUPTED_US,  # when it was preempted, if it has got no token since; -1 otherwise
    # What the last step emitted: by number, not by slot.
    EMIT_SLOT, EMIT_REQUEST_ID, EMIT_OUTPUT_TOKENS, EMIT_IS_LAST, EMIT_STEPS,
    # Lists of slots.
    RUNNING,  # in the order of admission
    SINGLES,  # those of them outside the cohort, in order
    PUT_BACK,  # preempted ones, which wait before all others; the last is the head of the queue
    FREE_SLOTS,
) = range(_SEQUENCES, _SEQUENCES + 28 * SLOTS, SLOTS)  # fmt: skip
"""Requests that have begun, by slot; see `maveriq.engine.sequence.Sequence`."""

_SCHEDULED = _SEQUENCES + 28 * SLOTS

(
    SCHED_SLOT, SCHED_TOKENS, SCHED_PAST, SCHED_EMITS,  # see `ScheduledTokens`
    # Sequences that were preempted for the step. One has not ended as long as the slot has its request.
    PRE_SLOT, PRE_REQUEST_ID,
) = range(_SCHEDULED, _SCHEDULED + 12 * SLOTS, 2 * SLOTS)  # fmt: skip
"""What is in a step in flight: by number, behind `SLOTS` of the other place."""

_STEPS = _SCHEDULED + 12 * SLOTS

(
    STEP_TICK, STEP_DECODES, STEP_CONTEXT_TOKENS, STEP_TOGETHER, STEP_CHUNKS, STEP_CHUNK_TOKENS, STEP_SCHEDULED,
    STEP_PREEMPTED,
    # Of the clock: `STEP_WAS_SKIPPED` stands for an `_InFlight` without a step.
    STEP_DURATION, STEP_WAS_SKIPPED, STEP_ENDS_NONE,
) = range(_STEPS, _STEPS + 22, 2)  # fmt: skip
"""Steps in flight, by place. `STEP_CHUNK_TOKENS` is the sum over the chunks."""

PHASES = _STEPS + 22
"""Sequences of the cohort by the tick, modulo the block size, at which they take a block."""

_WORDS = PHASES + MAX_BLOCK_SIZE

REQ_REQUEST_ID, REQ_PROMPT_TOKENS, REQ_OUTPUT_TOKENS, REQ_READY_US, REQ_NUMBER, REQ_NEXT_ROW, REQ_SIZE = range(7)
"""A request that has not begun, by row: when it reaches the queue, its number among those that were submitted, and the
next row of the list that it is in, the queue or the free rows."""

RUN_SLOT, RUN_INDEX, RUN_AGE, RUN_SIZE = range(4)
"""Free blocks: the `RUN_INDEX`-th block of the sequence in a slot; or, where that is -1, so many blocks without
cached content. Of two blocks with the same content the one of smaller age is found."""

_FIRST_ROWS = 64


def why_not_compiled(scheduler: VllmScheduler) -> str | None:
    """Return why a scheduler has no compiled form, None if it has."""
    limits = scheduler.limits
    if limits.by_priority or limits.pipeline_parallel_size > 1:
        return "it schedules by priority, or in a pipeline"
    if limits.max_num_seqs > SLOTS or scheduler.pool.block_size > MAX_BLOCK_SIZE:
        return f"more than {SLOTS} requests run together, or a KV block holds more than {MAX_BLOCK_SIZE} tokens"
    return None


class EngineState:
    """The memory of one engine without requests, with the limits and rules of a scheduler.

    Attributes:
        memory: what `e` points to.
    """

    def __init__(self, scheduler: VllmScheduler) -> None:
        limits, rules, pool = scheduler.limits, scheduler.rules, scheduler.pool
        self.memory: Integers = np.zeros(_WORDS, dtype=np.int64)
        memory = self.memory
        memory[MAX_NUM_SEQS] = memory[FREE_SLOTS_COUNT] = limits.max_num_seqs
        memory[MAX_NUM_BATCHED_TOKENS] = limits.max_num_batched_tokens
        memory[MAX_MODEL_LEN] = limits.max_model_len
        memory[LONG_PREFILL_TOKEN_THRESHOLD] = limits.long_prefill_token_threshold
        memory[ENABLE_CHUNKED_PREFILL] = limits.enable_chunked_prefill
        memory[RESERVES_FULL_PROMPT] = rules.reserve_full_prompt and limits.scheduler_reserve_full_isl
        memory[ASYNC_SCHEDULING] = limits.async_scheduling
        memory[THRESHOLD_NEEDS_COMPANY] = rules.threshold_needs_company
        memory[CURSOR_FOLLOWS_VICTIMS] = rules.cursor_follows_victims
        memory[PREFIX_CACHING] = pool.prefix_caching
        memory[REUSE_UNHASHED_FIRST] = pool.reuse_unhashed_first
        memory[BLOCK_SIZE] = pool.block_size
        memory[BLOCKS] = memory[FREE_BLOCKS] = pool.blocks
        memory[FIRST_ROW] = memory[LAST_ROW] = memory[FREE_ROW] = -1
        memory[FREE_SLOTS : FREE_SLOTS + limits.max_num_seqs] = np.arange(limits.max_num_seqs)[::-1]
        # Each block is an entry at most, and there are runs before, between and behind them. What is not used stays
        # untouched, and so takes no memory.
        entries = 2 * pool.blocks + 2
        self._free_runs = np.zeros((entries, RUN_SIZE), dtype=np.int64)
        self._elders = np.zeros((entries, RUN_SIZE), dtype=np.int64)
        self._found = np.zeros(-(-limits.max_model_len // pool.block_size) + 1, dtype=np.int64)
        memory[FREE_RUNS_AT], memory[FREE_RUNS] = address(self._free_runs), entries
        memory[ELDERS_AT], memory[FOUND_AT] = address(self._elders), address(self._found)
        self._requests = np.zeros((0, REQ_SIZE), dtype=np.int64)
        self._on_way = np.zeros(0, dtype=np.int64)
        self.add_rows()

    def add_rows(self) -> None:
        """Make room for more requests that have not begun."""
        memory, old = self.memory, len(self._requests)
        count = max(_FIRST_ROWS, 2 * old)
        requests, on_way = np.zeros((count, REQ_SIZE), dtype=np.int64), np.zeros(count, dtype=np.int64)
        requests[:old], on_way[:old] = self._requests, self._on_way
        requests[old:, REQ_NEXT_ROW] = np.arange(old + 1, count + 1)
        requests[-1, REQ_NEXT_ROW] = memory[FREE_ROW]
        memory[FREE_ROW] = old
        self._requests, self._on_way = requests, on_way
        memory[REQUESTS_AT], memory[ON_WAY_AT], memory[ROWS] = address(requests), address(on_way), count
