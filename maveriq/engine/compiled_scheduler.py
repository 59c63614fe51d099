"""`VllmScheduler` and `VllmEngine` compiled: FCFS, no pipeline, requests that share no content, no aborts.

The rules are explained there; function by function the names are the same, and so is what they do. Docstrings here say
only what differs. That both are equal is a test (docs/decisions/0019-compiled-engine.md says why there are two).
"""

from __future__ import annotations

from maveriq.compiling import Pointer, ints, part
from maveriq.engine.compiled_blocks import allocate, blocks_of, find, release, release_findable, share, take
from maveriq.engine.compiled_cohort import dissolve_cohort, join_cohort, leave_ended, length_in_cohort
from maveriq.engine.compiled_state import (
    ADMISSIONS,
    ASYNC_SCHEDULING,
    BLOCK_SIZE,
    BUDGET,
    COHORT,
    CURSOR_FOLLOWS_VICTIMS,
    DONE,
    EMIT_IS_LAST,
    EMIT_OUTPUT_TOKENS,
    EMIT_REQUEST_ID,
    EMIT_SLOT,
    EMIT_STEPS,
    EMITTED_COUNT,
    ENABLE_CHUNKED_PREFILL,
    END_TICK,
    FIRST_ROW,
    FIRST_STEP,
    FREE_BLOCKS,
    FREE_ROW,
    FREE_SLOTS,
    FREE_SLOTS_COUNT,
    HAS_NEWS,
    HELD,
    IN_FLIGHT,
    LAST_ROW,
    LONG_PREFILL_TOKEN_THRESHOLD,
    MAX_MODEL_LEN,
    MAX_NUM_BATCHED_TOKENS,
    MAX_NUM_SEQS,
    MUST_WAIT,
    OFFSETS,
    PHASES,
    PRE_REQUEST_ID,
    PRE_SLOT,
    PREEMPTIONS,
    PROMPT_TOKENS,
    PUT_BACK,
    PUT_BACK_COUNT,
    QUEUED,
    REQ_NEXT_ROW,
    REQ_OUTPUT_TOKENS,
    REQ_PROMPT_TOKENS,
    REQ_REQUEST_ID,
    REQ_SIZE,
    REQUESTS_AT,
    RESERVES_FULL_PROMPT,
    RUNNING,
    RUNNING_COUNT,
    SCHED_EMITS,
    SCHED_PAST,
    SCHED_SLOT,
    SCHED_TOKENS,
    SEQ_ADMISSION,
    SEQ_BLOCKS,
    SEQ_CACHED_TOKENS,
    SEQ_COMPUTED,
    SEQ_END,
    SEQ_FINDABLE_BLOCKS,
    SEQ_IN_COHORT,
    SEQ_INTERRUPTED_US,
    SEQ_IS_RUNNING,
    SEQ_IS_UNSTARTED,
    SEQ_LENGTH,
    SEQ_PENDING,
    SEQ_PROMPT_TOKENS,
    SEQ_REGISTERED,
    SEQ_REQUEST_ID,
    SEQ_STEPS_WITHOUT_TOKEN,
    SINGLES,
    SINGLES_COUNT,
    SLOTS,
    STEP_CHUNK_TOKENS,
    STEP_CHUNKS,
    STEP_CONTEXT_TOKENS,
    STEP_DECODES,
    STEP_ENDS_NONE,
    STEP_PREEMPTED,
    STEP_SCHEDULED,
    STEP_TICK,
    STEP_TOGETHER,
    STEP_WAS_SKIPPED,
    THRESHOLD_NEEDS_COMPANY,
    TICK,
)


@part
def submit(e: Pointer, row: int) -> None:
    """Add a request that has reached the queue."""
    requests = ints(e[REQUESTS_AT])
    e[HELD] += 1
    e[QUEUED] += 1
    requests[row * REQ_SIZE + REQ_NEXT_ROW] = -1
    if e[LAST_ROW] < 0:
        e[FIRST_ROW] = row
    else:
        requests[e[LAST_ROW] * REQ_SIZE + REQ_NEXT_ROW] = row
    e[LAST_ROW] = row


@part
def _begin_request(e: Pointer) -> int:
    """Give the head of the queue, which has not begun, a slot, and return that; its row is free again."""
    requests = ints(e[REQUESTS_AT])
    row = e[FIRST_ROW]
    e[FIRST_ROW] = requests[row * REQ_SIZE + REQ_NEXT_ROW]
    if e[FIRST_ROW] < 0:
        e[LAST_ROW] = -1
    e[QUEUED] -= 1
    requests[row * REQ_SIZE + REQ_NEXT_ROW] = e[FREE_ROW]
    e[FREE_ROW] = row
    e[FREE_SLOTS_COUNT] -= 1
    slot = e[FREE_SLOTS + e[FREE_SLOTS_COUNT]]
    e[SEQ_REQUEST_ID + slot] = requests[row * REQ_SIZE + REQ_REQUEST_ID]
    e[SEQ_PROMPT_TOKENS + slot] = e[SEQ_LENGTH + slot] = requests[row * REQ_SIZE + REQ_PROMPT_TOKENS]
    e[SEQ_END + slot] = min(
        requests[row * REQ_SIZE + REQ_PROMPT_TOKENS] + requests[row * REQ_SIZE + REQ_OUTPUT_TOKENS],
        e[MAX_MODEL_LEN],
    )
    e[SEQ_COMPUTED + slot] = e[SEQ_PENDING + slot] = e[SEQ_BLOCKS + slot] = e[SEQ_REGISTERED + slot] = 0
    e[SEQ_CACHED_TOKENS + slot] = e[SEQ_STEPS_WITHOUT_TOKEN + slot] = 0
    e[SEQ_IN_COHORT + slot] = e[SEQ_FINDABLE_BLOCKS + slot] = 0
    e[SEQ_IS_UNSTARTED + slot] = 1
    e[SEQ_INTERRUPTED_US + slot] = -1
    e[PROMPT_TOKENS] += requests[row * REQ_SIZE + REQ_PROMPT_TOKENS]
    return slot


@part
def _has_waiting(e: Pointer) -> bool:
    return e[PUT_BACK_COUNT] > 0 or e[QUEUED] > 0


@part
def _remove(e: Pointer, slots: int, count: int, slot: int) -> None:
    """Remove a slot from a list of `count` that is at an offset."""
    place = 0
    while e[slots + place] != slot:
        place += 1
    for later in range(place, count - 1):
        e[slots + later] = e[slots + later + 1]


@part
def _remove_single(e: Pointer, slot: int) -> None:
    _remove(e, SINGLES, e[SINGLES_COUNT], slot)
    e[SINGLES_COUNT] -= 1


@part
def schedule(e: Pointer) -> int:
    """Compose the next step, and return its place in `steps`."""
    place = (e[FIRST_STEP] + e[IN_FLIGHT]) & 1
    e[IN_FLIGHT] += 1
    e[STEP_TICK + place] = e[TICK]
    e[STEP_DECODES + place] = e[STEP_CONTEXT_TOKENS + place] = e[STEP_TOGETHER + place] = 0
    e[STEP_CHUNKS + place] = e[STEP_CHUNK_TOKENS + place] = 0
    e[STEP_SCHEDULED + place] = e[STEP_PREEMPTED + place] = e[STEP_WAS_SKIPPED + place] = e[STEP_ENDS_NONE + place] = 0
    e[HAS_NEWS] = 0
    e[BUDGET] = e[MAX_NUM_BATCHED_TOKENS]
    if e[COHORT] > 0:
        blocks = e[PHASES + e[TICK] % e[BLOCK_SIZE]]
        if _fit_together(e, blocks):
            e[STEP_TOGETHER + place] = e[STEP_DECODES + place] = e[COHORT]
            e[STEP_CONTEXT_TOKENS + place] = e[OFFSETS] + e[COHORT] * (e[TICK] + 1)
            take(e, blocks)
            e[BUDGET] -= e[COHORT]
        else:
            dissolve_cohort(e)
    if e[SINGLES_COUNT] > 0 or _has_waiting(e):
        _schedule_singles(e, place)
        if e[STEP_PREEMPTED + place] == 0:
            _admit(e, place)
        _commit(e, place)
    e[TICK] += 1
    leave_ended(e, e[STEP_TICK + place])
    return place


@part
def _schedule_singles(e: Pointer, place: int) -> None:
    index = 0
    while index < e[SINGLES_COUNT] and e[BUDGET] > 0:
        slot = e[SINGLES + index]
        tokens = min(_next_tokens(e, slot), e[BUDGET])
        if tokens > 0:
            while not allocate(e, slot, e[SEQ_COMPUTED + slot] + tokens):
                victim = e[RUNNING + e[RUNNING_COUNT] - 1]
                if e[CURSOR_FOLLOWS_VICTIMS]:
                    single = 0
                    while e[SINGLES + single] != victim:
                        single += 1
                    index -= single < index
                else:
                    index -= _place_in(e, place, victim) < e[STEP_SCHEDULED + place]
                _preempt(e, place, victim)
                if victim == slot:
                    return
            _schedule(e, place, slot, tokens)
        index += 1


@part
def _next_tokens(e: Pointer, slot: int) -> int:
    pending = e[SEQ_PENDING + slot]
    if pending > 0 and e[SEQ_COMPUTED + slot] + 2 - pending >= e[SEQ_END + slot]:
        return 0
    tokens = _cut_long(e, e[SEQ_LENGTH + slot] + pending - e[SEQ_COMPUTED + slot])
    return min(tokens, e[MAX_MODEL_LEN] - 1 - e[SEQ_COMPUTED + slot])


@part
def _cut_long(e: Pointer, tokens: int) -> int:
    threshold = e[LONG_PREFILL_TOKEN_THRESHOLD]
    if 0 < threshold < tokens and (not (e[THRESHOLD_NEEDS_COMPANY] and e[HELD] == 1)):
        return threshold
    return tokens


@part
def _place_in(e: Pointer, place: int, slot: int) -> int:
    """Return where a step has scheduled a sequence, `scheduled` if nowhere."""
    count = e[STEP_SCHEDULED + place]
    index = 0
    while index < count and e[SCHED_SLOT + place * SLOTS + index] != slot:
        index += 1
    return index


@part
def _preempt(e: Pointer, place: int, victim: int) -> None:
    at = _place_in(e, place, victim)
    if at < e[STEP_SCHEDULED + place]:
        e[BUDGET] += e[SCHED_TOKENS + place * SLOTS + at]
        for later in range(at, e[STEP_SCHEDULED + place] - 1):
            e[SCHED_SLOT + place * SLOTS + later] = e[SCHED_SLOT + place * SLOTS + later + 1]
            e[SCHED_TOKENS + place * SLOTS + later] = e[SCHED_TOKENS + place * SLOTS + later + 1]
        e[STEP_SCHEDULED + place] -= 1
    e[RUNNING_COUNT] -= 1
    _remove_single(e, victim)
    release_findable(e, victim)
    e[SEQ_COMPUTED + victim] = e[SEQ_REGISTERED + victim] = 0
    e[SEQ_IS_RUNNING + victim] = 0
    e[PUT_BACK + e[PUT_BACK_COUNT]] = victim
    e[PUT_BACK_COUNT] += 1
    e[PREEMPTIONS] += 1
    entry_at = e[STEP_PREEMPTED + place]
    e[PRE_SLOT + place * SLOTS + entry_at] = victim
    e[PRE_REQUEST_ID + place * SLOTS + entry_at] = e[SEQ_REQUEST_ID + victim]
    e[STEP_PREEMPTED + place] += 1


@part
def _schedule(e: Pointer, place: int, slot: int, tokens: int) -> None:
    entry_at = e[STEP_SCHEDULED + place]
    e[SCHED_SLOT + place * SLOTS + entry_at], e[SCHED_TOKENS + place * SLOTS + entry_at] = slot, tokens
    e[STEP_SCHEDULED + place] += 1
    e[BUDGET] -= tokens
    e[SEQ_REGISTERED + slot] = min(e[SEQ_COMPUTED + slot] + tokens, e[SEQ_LENGTH + slot])


@part
def _admit(e: Pointer, place: int) -> None:
    while _has_waiting(e):
        tokens, found = _place(e)
        if tokens == 0:
            return
        if e[PUT_BACK_COUNT] > 0:
            e[PUT_BACK_COUNT] -= 1
            slot = e[PUT_BACK + e[PUT_BACK_COUNT]]
        else:
            slot = _begin_request(e)
        if found > 0:
            share(e, slot, found)
        e[SEQ_COMPUTED + slot] = found * e[BLOCK_SIZE]
        allocate(e, slot, e[SEQ_COMPUTED + slot] + tokens)
        e[RUNNING + e[RUNNING_COUNT]] = slot
        e[RUNNING_COUNT] += 1
        e[SINGLES + e[SINGLES_COUNT]] = slot
        e[SINGLES_COUNT] += 1
        e[ADMISSIONS] += 1
        e[SEQ_ADMISSION + slot] = e[ADMISSIONS]
        e[SEQ_IS_RUNNING + slot] = 1
        _schedule(e, place, slot, tokens)


@part
def _place(e: Pointer) -> tuple[int, int]:
    """Return the next tokens of the waiting sequence at the head and its cached blocks; 0 tokens if it must wait."""
    if e[BUDGET] <= 0 or e[RUNNING_COUNT] >= e[MAX_NUM_SEQS]:
        return (0, 0)
    found = 0
    if e[PUT_BACK_COUNT] > 0:
        slot = e[PUT_BACK + e[PUT_BACK_COUNT] - 1]
        length = e[SEQ_LENGTH + slot]
        found = find(e, slot)
    else:
        length = ints(e[REQUESTS_AT])[e[FIRST_ROW] * REQ_SIZE + REQ_PROMPT_TOKENS]
    cached = found * e[BLOCK_SIZE]
    tokens = length - cached
    if e[LONG_PREFILL_TOKEN_THRESHOLD] > 0:
        tokens = _cut_long(e, tokens)
    if tokens > e[BUDGET]:
        if e[ENABLE_CHUNKED_PREFILL] == 0:
            return (0, 0)
        tokens = e[BUDGET]
    needed = min(length, e[MAX_MODEL_LEN]) if e[RESERVES_FULL_PROMPT] else cached + tokens
    if max(blocks_of(e, needed), found) > e[FREE_BLOCKS]:
        return (0, 0)
    return (tokens, found)


@part
def _commit(e: Pointer, place: int) -> None:
    for index in range(e[STEP_SCHEDULED + place]):
        slot, tokens = e[SCHED_SLOT + place * SLOTS + index], e[SCHED_TOKENS + place * SLOTS + index]
        past = e[SEQ_COMPUTED + slot]
        computed = e[SEQ_COMPUTED + slot] = past + tokens
        emits = computed >= e[SEQ_LENGTH + slot] + e[SEQ_PENDING + slot]
        if emits and e[ASYNC_SCHEDULING]:
            e[SEQ_PENDING + slot] += 1
        e[SCHED_PAST + place * SLOTS + index], e[SCHED_EMITS + place * SLOTS + index] = past, emits
        if not emits:
            e[SEQ_STEPS_WITHOUT_TOKEN + slot] += 1
        if tokens == 1:
            e[STEP_DECODES + place] += 1
            e[STEP_CONTEXT_TOKENS + place] += past + 1
        else:
            e[STEP_CHUNKS + place] += 1
            e[STEP_CHUNK_TOKENS + place] += tokens
        if emits and computed <= e[SEQ_END + slot] - 2:
            _remove_single(e, slot)
            join_cohort(e, slot, e[STEP_TICK + place] + 1, e[SEQ_PENDING + slot] if e[ASYNC_SCHEDULING] else 1)


@part
def _fit_together(e: Pointer, blocks: int) -> bool:
    left = e[BUDGET] - e[COHORT]
    if e[SINGLES_COUNT] == 0:
        return left >= 0 and blocks <= e[FREE_BLOCKS]
    is_short = False
    for index in range(e[SINGLES_COUNT]):
        slot = e[SINGLES + index]
        tokens = max(0, _next_tokens(e, slot))
        if tokens > left:
            is_short, tokens = True, left
        left -= tokens
        blocks += max(0, blocks_of(e, e[SEQ_COMPUTED + slot] + tokens) - e[SEQ_BLOCKS + slot])
    if left < 0 or blocks > e[FREE_BLOCKS]:
        return False
    if is_short:
        for index in range(e[SINGLES_COUNT]):
            if e[RUNNING + e[COHORT] + index] != e[SINGLES + index]:
                return False
    return True


@part
def _blocks_needed(e: Pointer, steps: int) -> int:
    size = e[BLOCK_SIZE]
    blocks = steps // size * e[COHORT]
    for later in range(steps % size):
        blocks += e[PHASES + (e[TICK] + later) % size]
    return blocks


@part
def _steps_within(e: Pointer, blocks: int, limit: int) -> int:
    size = e[BLOCK_SIZE]
    if (limit // size + 1) * e[COHORT] <= blocks:
        return limit
    rounds = blocks // e[COHORT]
    steps, left = rounds * size, blocks - rounds * e[COHORT]
    while steps < limit:
        left -= e[PHASES + (e[TICK] + steps) % size]
        if left < 0:
            break
        steps += 1
    return min(steps, limit)


@part
def quiet_steps(e: Pointer) -> int:
    """Return how many of the next steps only decode; of `VllmEngine.quiet_run`, too."""
    if e[MUST_WAIT] or e[COHORT] == 0 or e[IN_FLIGHT] != e[ASYNC_SCHEDULING]:
        return 0
    for index in range(e[SINGLES_COUNT]):
        if _next_tokens(e, e[SINGLES + index]) > 0:
            return 0
    e[BUDGET] = e[MAX_NUM_BATCHED_TOKENS] - e[COHORT]
    if e[BUDGET] < 0:
        return 0
    has_waiting = _has_waiting(e)
    if has_waiting:
        if e[PUT_BACK_COUNT] > 0:
            length = e[SEQ_LENGTH + e[PUT_BACK + e[PUT_BACK_COUNT] - 1]]
        else:
            length = ints(e[REQUESTS_AT])[e[FIRST_ROW] * REQ_SIZE + REQ_PROMPT_TOKENS]
        if e[BUDGET] > 0 and e[RUNNING_COUNT] < e[MAX_NUM_SEQS] and (blocks_of(e, length) <= e[FREE_BLOCKS]):
            return 0
        tokens, _ = _place(e)
        if tokens > 0:
            return 0
    steps = _steps_within(e, e[FREE_BLOCKS], e[END_TICK] - e[TICK] + 1)
    if has_waiting and e[SINGLES_COUNT] > 0:
        return min(steps, 1)
    return steps


@part
def advance(e: Pointer, steps: int) -> None:
    """Compose steps that only decode, and take the tokens of as many. `emitted` has those of the last one.

    Those of the first, which was in flight before, are not listed: no request gets its first or last token in it.
    """
    size = e[COHORT]
    take(e, _blocks_needed(e, steps))
    tick = e[TICK] = e[TICK] + steps
    if e[IN_FLIGHT] == 0:
        e[EMITTED_COUNT] = 0
        e[HAS_NEWS] = 0
        e[DONE] += steps
        before = e[SINGLES_COUNT]
        leave_ended(e, tick - 1)
        for _ in range(e[SINGLES_COUNT] - before):  # no other runs by itself, so that the first is always the next
            _emit(e, e[SINGLES])
        return
    update(e)
    if steps > 1:
        e[HAS_NEWS] = 0
    e[DONE] += steps - 1
    place = (e[FIRST_STEP] + e[IN_FLIGHT]) & 1
    e[STEP_TICK + place] = tick - 1
    e[STEP_TOGETHER + place] = e[STEP_DECODES + place] = size
    e[STEP_CONTEXT_TOKENS + place] = e[OFFSETS] + e[COHORT] * (tick + 1) - size
    e[STEP_CHUNKS + place] = e[STEP_CHUNK_TOKENS + place] = e[STEP_SCHEDULED + place] = e[STEP_PREEMPTED + place] = 0
    e[IN_FLIGHT] += 1
    e[EMITTED_COUNT] = 0
    leave_ended(e, tick - 1)


@part
def update(e: Pointer) -> None:
    """Take the tokens of the oldest step in flight. Those that are not counted together are in `emitted`, in order."""
    place = e[FIRST_STEP]
    e[FIRST_STEP] = (place + 1) & 1
    e[IN_FLIGHT] -= 1
    e[DONE] += 1
    e[EMITTED_COUNT] = 0
    if e[STEP_SCHEDULED + place] > 1:
        _sort_by_admission(e, place)
    for index in range(e[STEP_SCHEDULED + place]):
        if e[SCHED_EMITS + place * SLOTS + index]:
            if not e[SEQ_IN_COHORT + e[SCHED_SLOT + place * SLOTS + index]]:
                _count_token(e, e[SCHED_SLOT + place * SLOTS + index])
            _emit(e, e[SCHED_SLOT + place * SLOTS + index])


@part
def _sort_by_admission(e: Pointer, place: int) -> None:
    """Put those that left the cohort, which came last, in their places among the others."""
    first = place * SLOTS
    for index in range(first + 1, first + e[STEP_SCHEDULED + place]):
        slot, tokens = e[SCHED_SLOT + index], e[SCHED_TOKENS + index]
        past, emits = e[SCHED_PAST + index], e[SCHED_EMITS + index]
        at = index
        while at > first and e[SEQ_ADMISSION + e[SCHED_SLOT + at - 1]] > e[SEQ_ADMISSION + slot]:
            e[SCHED_SLOT + at], e[SCHED_TOKENS + at] = e[SCHED_SLOT + at - 1], e[SCHED_TOKENS + at - 1]
            e[SCHED_PAST + at], e[SCHED_EMITS + at] = e[SCHED_PAST + at - 1], e[SCHED_EMITS + at - 1]
            at -= 1
        e[SCHED_SLOT + at], e[SCHED_TOKENS + at], e[SCHED_PAST + at], e[SCHED_EMITS + at] = slot, tokens, past, emits


@part
def _count_token(e: Pointer, slot: int) -> None:
    e[SEQ_LENGTH + slot] += 1
    if e[ASYNC_SCHEDULING]:
        e[SEQ_PENDING + slot] -= 1
        known = e[SEQ_COMPUTED + slot] - e[SEQ_PENDING + slot]
        if known > e[SEQ_REGISTERED + slot] and e[SEQ_IS_RUNNING + slot]:
            e[SEQ_REGISTERED + slot] = known


@part
def _emit(e: Pointer, slot: int) -> None:
    """List a sequence's newest token; end the sequence if it is the last."""
    entry_at = e[EMITTED_COUNT]
    e[EMITTED_COUNT] += 1
    length = length_in_cohort(e, slot) if e[SEQ_IN_COHORT + slot] else e[SEQ_LENGTH + slot]
    e[EMIT_SLOT + entry_at], e[EMIT_REQUEST_ID + entry_at] = slot, e[SEQ_REQUEST_ID + slot]
    e[EMIT_OUTPUT_TOKENS + entry_at] = length - e[SEQ_PROMPT_TOKENS + slot]
    e[EMIT_STEPS + entry_at] = e[EMIT_OUTPUT_TOKENS + entry_at] + e[SEQ_STEPS_WITHOUT_TOKEN + slot]
    e[EMIT_IS_LAST + entry_at] = 0
    if not e[SEQ_IN_COHORT + slot] and length >= e[SEQ_END + slot]:
        e[EMIT_IS_LAST + entry_at] = 1
        _end(e, slot)


@part
def _end(e: Pointer, slot: int) -> None:
    if e[SEQ_IS_RUNNING + slot]:
        _remove(e, RUNNING, e[RUNNING_COUNT], slot)
        e[RUNNING_COUNT] -= 1
        _remove_single(e, slot)
    else:
        _remove(e, PUT_BACK, e[PUT_BACK_COUNT], slot)
        e[PUT_BACK_COUNT] -= 1
    release(e, slot)
    e[SEQ_IS_RUNNING + slot] = 0
    e[SEQ_REQUEST_ID + slot] = -1
    e[FREE_SLOTS + e[FREE_SLOTS_COUNT]] = slot
    e[FREE_SLOTS_COUNT] += 1
    e[HELD] -= 1
    e[HAS_NEWS] = 1


@part
def next_step(e: Pointer) -> int:
    """Compose the next step, and return its place in `steps`; -1 if the engine waits."""
    while True:
        if e[MUST_WAIT]:
            oldest_at = e[FIRST_STEP]
            if e[STEP_DECODES + oldest_at] > 0 or e[STEP_CHUNKS + oldest_at] > 0:
                return -1
            update(e)
            e[MUST_WAIT] = 0
        if e[HELD] == 0 and e[HAS_NEWS] == 0:
            if e[IN_FLIGHT] == 0:
                return -1
            e[MUST_WAIT] = 1
            continue
        place = schedule(e)
        if e[STEP_DECODES + place] > 0 or e[STEP_CHUNKS + place] > 0:
            e[MUST_WAIT] = e[IN_FLIGHT] == 1 + e[ASYNC_SCHEDULING]
            return place
        e[MUST_WAIT] = 1


@part
def finish_step(e: Pointer) -> None:
    """Take the tokens of the oldest step in flight, which holds some."""
    e[MUST_WAIT] = 0
    update(e)
