"""`SteppedEngine` compiled, around a compiled scheduler: when steps end.

The rules are explained there; function by function the names are the same. Nobody aborts, and nothing is a pipeline.
`e` is the engine (`maveriq.engine.compiled_state`) and `c` its clock. A time is two numbers, as in
`maveriq.estimate.compiled_timer`.
"""

from __future__ import annotations

from maveriq.compiling import Pointer, floats, ints, part
from maveriq.engine.compiled_scheduler import advance, finish_step, next_step, quiet_steps
from maveriq.engine.compiled_scheduler import submit as submit_to_queue
from maveriq.engine.compiled_state import (
    BLOCK_SIZE,
    BLOCKS,
    COHORT,
    EMITTED_COUNT,
    FIRST_STEP,
    FREE_BLOCKS,
    FREE_ROW,
    MAX_NUM_SEQS,
    OFFSETS,
    ON_WAY_AT,
    REQ_NEXT_ROW,
    REQ_NUMBER,
    REQ_OUTPUT_TOKENS,
    REQ_PROMPT_TOKENS,
    REQ_READY_US,
    REQ_REQUEST_ID,
    REQ_SIZE,
    REQUESTS_AT,
    RUNNING_COUNT,
    SCHED_PAST,
    SCHED_SLOT,
    SCHED_TOKENS,
    SEQ_END,
    SEQ_LENGTH,
    SEQ_PROMPT_TOKENS,
    SLOTS,
    STEP_CHUNK_TOKENS,
    STEP_CHUNKS,
    STEP_CONTEXT_TOKENS,
    STEP_DECODES,
    STEP_DURATION,
    STEP_ENDS_NONE,
    STEP_PREEMPTED,
    STEP_SCHEDULED,
    STEP_TOGETHER,
    STEP_WAS_SKIPPED,
    TICK,
)
from maveriq.estimate.compiled_timer import (
    after,
    after_steps,
    chunked_step,
    decode_step,
    first_token_delay,
    micros_after,
    piece_of,
    steps_until,
)
from maveriq.scenario.compiled_clock_state import (
    C_BOUNDARY_BELOW,
    C_BOUNDARY_US,
    C_CHUNK_PAST_AT,
    C_CHUNK_TOKENS_AT,
    C_CONTEXT_TOKENS,
    C_DECODES,
    C_FREE_BELOW,
    C_FREE_US,
    C_IN_FLIGHT,
    C_IS_FREE,
    C_LEAD,
    C_MOST,
    C_NEXT_US,
    C_ON_WAY,
    C_PASSED_BELOW,
    C_PASSED_US,
    C_PASSES,
    C_PRESENT,
    C_RUN_STEPS,
    C_RUNNING,
    C_RUNS,
    C_RUNS_ON,
    C_RUNS_ROWS,
    C_SKIP_BELOW,
    C_SKIP_SLOWDOWN,
    C_SKIP_US,
    C_SKIPS,
    C_SLOWDOWN,
    C_START_US,
    C_STEPS,
    C_SUBMITTED,
    C_TIMER_AT,
    C_USED_BLOCKS,
    NO_TIME,
)
from maveriq.scenario.compiled_recorder import (
    left,
    moved,
    note,
    note_emitted,
    note_preempted,
    note_started,
    run_ended,
    step_ended,
)

_MIN_SKIPPED = 2


# Requests on their way to the queue: a heap of rows, ordered by time, then by submission


@part
def _is_before(e: Pointer, row: int, other: int) -> bool:
    requests = ints(e[REQUESTS_AT])
    return requests[row * REQ_SIZE + REQ_READY_US] < requests[other * REQ_SIZE + REQ_READY_US] or (
        requests[row * REQ_SIZE + REQ_READY_US] == requests[other * REQ_SIZE + REQ_READY_US]
        and requests[row * REQ_SIZE + REQ_NUMBER] < requests[other * REQ_SIZE + REQ_NUMBER]
    )


@part
def _send(e: Pointer, c: Pointer, row: int) -> None:
    """Add a request to those on their way."""
    heap = ints(e[ON_WAY_AT])
    place = c[C_ON_WAY]
    c[C_ON_WAY] += 1
    while place > 0 and _is_before(e, row, heap[place - 1 >> 1]):
        heap[place] = heap[place - 1 >> 1]
        place = place - 1 >> 1
    heap[place] = row


@part
def _receive(e: Pointer, c: Pointer) -> int:
    """Remove and return the first of those on their way."""
    heap = ints(e[ON_WAY_AT])
    first = heap[0]
    c[C_ON_WAY] -= 1
    count = c[C_ON_WAY]
    row, place = heap[count], 0
    while 2 * place + 1 < count:
        child = 2 * place + 1
        if child + 1 < count and _is_before(e, heap[child + 1], heap[child]):
            child += 1
        if not _is_before(e, heap[child], row):
            break
        heap[place] = heap[child]
        place = child
    heap[place] = row
    return first


@part
def _next_ready_us(e: Pointer, c: Pointer) -> int:
    return ints(e[REQUESTS_AT])[ints(e[ON_WAY_AT])[0] * REQ_SIZE + REQ_READY_US] if c[C_ON_WAY] > 0 else NO_TIME


@part
def submit(e: Pointer, c: Pointer, now_us: int, request_id: int, lengths: int) -> bool:
    """Send a request to the queue; return False if there is no free row for it.

    Args:
        e: the engine.
        c: its clock.
        now_us: the present.
        request_id: its number.
        lengths: its prompt tokens, and 2^32 times its output tokens.
    """
    requests = ints(e[REQUESTS_AT])
    row = e[FREE_ROW]
    if row < 0:
        return False
    at = row * REQ_SIZE
    e[FREE_ROW] = requests[at + REQ_NEXT_ROW]
    prompt_tokens = lengths & 0xFFFFFFFF
    delay_us = first_token_delay(ints(c[C_TIMER_AT]), prompt_tokens, min(c[C_PRESENT], e[MAX_NUM_SEQS]))
    c[C_SUBMITTED] += 1
    requests[at + REQ_REQUEST_ID] = request_id
    requests[at + REQ_READY_US] = now_us + delay_us
    requests[at + REQ_NUMBER] = c[C_SUBMITTED]
    requests[at + REQ_PROMPT_TOKENS] = prompt_tokens
    requests[at + REQ_OUTPUT_TOKENS] = lengths >> 32
    c[C_PRESENT] += 1
    moved(c, now_us, 1)
    _send(e, c, row)
    first_us = _next_ready_us(e, c)
    if c[C_RUNS_ON]:
        _cut(c, first_us)
    else:
        c[C_NEXT_US] = first_us
    return True


@part
def slow_down(c: Pointer, now_us: int, slowdown: int) -> None:
    """Let steps that start from now on take so many times as long, which is new."""
    c[C_SLOWDOWN] = slowdown
    _cut(c, now_us)


@part
def stop(e: Pointer, c: Pointer, now_us: int) -> None:
    """Compute no more."""
    if c[C_PASSES]:
        if micros_after(c[C_PASSED_US], c[C_PASSED_BELOW]) <= now_us:
            _pass(e, c)
        else:
            _drop_passed(c)
    if c[C_RUNS_ON]:
        steps, decodes = (c[C_STEPS], c[C_DECODES]) if c[C_SKIPS] else (1, 0)
        end_us = micros_after(c[C_BOUNDARY_US], c[C_BOUNDARY_BELOW])
        if now_us > c[C_START_US]:
            done = steps * (now_us - c[C_START_US]) // (end_us - c[C_START_US])
            used = c[C_USED_BLOCKS]
            note(c, now_us, used, done, done * decodes, 0, 0)
    left(c, now_us, c[C_PRESENT])
    c[C_RUNS_ON] = 0
    c[C_NEXT_US] = NO_TIME
    c[C_ON_WAY] = 0


@part
def finish(e: Pointer, c: Pointer, now_us: int) -> None:
    """End what is due now."""
    end_us = c[C_NEXT_US]
    if c[C_RUNS_ON] == 0 or end_us == NO_TIME or end_us > now_us:
        return
    if c[C_PASSES]:
        _pass(e, c)
    c[C_FREE_US], c[C_FREE_BELOW], c[C_IS_FREE] = c[C_BOUNDARY_US], c[C_BOUNDARY_BELOW], 1
    c[C_RUNS_ON] = 0
    c[C_NEXT_US] = NO_TIME
    if c[C_SKIPS]:
        _finish_skipped(e, c, end_us)
    else:
        step_at = _oldest(e)
        if e[STEP_WAS_SKIPPED + step_at] == 0:
            note_started(e, c)
            note_preempted(e, c)
        _end_step(e, c, end_us)
    note_emitted(e, c, end_us)


@part
def compose(e: Pointer, c: Pointer, now_us: int) -> None:
    """Take the requests that have reached the queue and, unless a step runs, start the next one."""
    if c[C_RUNS_ON]:
        return
    while c[C_ON_WAY] > 0 and _next_ready_us(e, c) <= now_us:
        submit_to_queue(e, _receive(e, c))
    start_us, start_below = now_us, 0
    if c[C_IS_FREE]:
        start_us, start_below = c[C_FREE_US], c[C_FREE_BELOW]
    c[C_IS_FREE] = 0
    running = e[RUNNING_COUNT]
    if _skip(e, c, start_us, start_below):
        _begin(e, c, start_us, start_below, running)
    elif _compose_steps(e, c, start_us, start_below, running):
        duration = c[C_SLOWDOWN] * e[STEP_DURATION + _oldest(e)]
        c[C_BOUNDARY_US], c[C_BOUNDARY_BELOW] = after(start_us, start_below, duration)
        c[C_RUNS_ON] = 1
        _pass_later(e, c)
        c[C_NEXT_US] = micros_after(c[C_BOUNDARY_US], c[C_BOUNDARY_BELOW])
    else:
        c[C_NEXT_US] = _next_ready_us(e, c)


@part
def _oldest(e: Pointer) -> int:
    """Return the place of the oldest step in flight that computes something."""
    place = e[FIRST_STEP]
    return place if e[STEP_DECODES + place] > 0 or e[STEP_CHUNKS + place] > 0 else place ^ 1


@part
def _compose_steps(e: Pointer, c: Pointer, start_us: int, start_below: int, running: int) -> bool:
    """Compose steps while one runs that starts now; return whether one does."""
    while True:
        place = next_step(e)
        if place < 0:
            break
        if c[C_IN_FLIGHT] == 0:
            running = e[RUNNING_COUNT]
        c[C_IN_FLIGHT] += 1
        e[STEP_DURATION + place] = _duration(e, c, place)
    if c[C_IN_FLIGHT] == 0:
        return False
    _begin(e, c, start_us, start_below, running)
    return True


@part
def _duration(e: Pointer, c: Pointer, place: int) -> int:
    if e[STEP_CHUNKS + place] == 0:
        return decode_step(ints(c[C_TIMER_AT]), e[STEP_DECODES + place], e[STEP_CONTEXT_TOKENS + place])
    chunk_tokens, chunk_past, chunks = floats(c[C_CHUNK_TOKENS_AT]), floats(c[C_CHUNK_PAST_AT]), 0
    for index in range(e[STEP_SCHEDULED + place]):
        if e[SCHED_TOKENS + place * SLOTS + index] > 1:
            chunk_tokens[chunks] = e[SCHED_TOKENS + place * SLOTS + index]
            chunk_past[chunks] = e[SCHED_PAST + place * SLOTS + index]
            chunks += 1
    return chunked_step(
        ints(c[C_TIMER_AT]),
        e[STEP_DECODES + place],
        e[STEP_CONTEXT_TOKENS + place],
        c[C_CHUNK_TOKENS_AT],
        c[C_CHUNK_PAST_AT],
        chunks,
    )


@part
def _begin(e: Pointer, c: Pointer, start_us: int, start_below: int, running: int) -> None:
    c[C_START_US] = micros_after(start_us, start_below)
    c[C_RUNNING] = running
    c[C_USED_BLOCKS] = e[BLOCKS] - e[FREE_BLOCKS]


@part
def _may_be_skipped(e: Pointer, place: int) -> bool:
    if e[STEP_WAS_SKIPPED + place]:
        return bool(e[STEP_ENDS_NONE + place])
    if e[STEP_CHUNKS + place] > 0 or e[STEP_PREEMPTED + place] > 0:
        return False
    for index in range(e[STEP_SCHEDULED + place]):
        sequence_at = e[SCHED_SLOT + place * SLOTS + index]
        if not e[SEQ_PROMPT_TOKENS + sequence_at] < e[SEQ_LENGTH + sequence_at] < e[SEQ_END + sequence_at] - 1:
            return False
    return True


@part
def _pass_later(e: Pointer, c: Pointer) -> None:
    """Pass the end of the step that runs if there is nothing to report, and a prompt is computed behind it."""
    if c[C_IN_FLIGHT] != 2:
        return
    place = _oldest(e)
    behind_at = place ^ 1
    if e[STEP_WAS_SKIPPED + behind_at] or e[STEP_CHUNKS + behind_at] == 0 or (not _may_be_skipped(e, place)):
        return
    if c[C_ON_WAY] == 0 or _next_ready_us(e, c) > micros_after(c[C_BOUNDARY_US], c[C_BOUNDARY_BELOW]):
        c[C_PASSES], c[C_PASSED_US], c[C_PASSED_BELOW] = 1, c[C_BOUNDARY_US], c[C_BOUNDARY_BELOW]
        c[C_BOUNDARY_US], c[C_BOUNDARY_BELOW] = after(
            c[C_BOUNDARY_US], c[C_BOUNDARY_BELOW], c[C_SLOWDOWN] * e[STEP_DURATION + behind_at]
        )


@part
def _pass(e: Pointer, c: Pointer) -> None:
    """Do what happens at the boundary that is passed: a step ends, the next starts, and another is composed."""
    c[C_PASSES] = 0
    passed_us, passed_below = c[C_PASSED_US], c[C_PASSED_BELOW]
    end_us = micros_after(passed_us, passed_below)
    if c[C_SKIPS]:
        _finish_skipped(e, c, end_us)
    else:
        _end_step(e, c, end_us)
    _compose_steps(e, c, passed_us, passed_below, e[RUNNING_COUNT])


@part
def _drop_passed(c: Pointer) -> None:
    """Stop at the boundary that was to be passed."""
    c[C_BOUNDARY_US], c[C_BOUNDARY_BELOW], c[C_PASSES] = c[C_PASSED_US], c[C_PASSED_BELOW], 0


@part
def _end_step(e: Pointer, c: Pointer, end_us: int) -> None:
    """Take the tokens of a step that has run, and record it."""
    step_at = e[FIRST_STEP]
    tokens = e[STEP_DECODES + step_at] + e[STEP_CHUNK_TOKENS + step_at]
    was_skipped, together = e[STEP_WAS_SKIPPED + step_at], e[STEP_TOGETHER + step_at]
    c[C_IN_FLIGHT] -= 1
    finish_step(e)
    if was_skipped:
        together = tokens - e[EMITTED_COUNT]
    step_ended(e, c, end_us, tokens, together)


@part
def _skip(e: Pointer, c: Pointer, start_us: int, start_below: int) -> bool:
    """Plan to skip the next steps, and return whether there are any to skip."""
    if c[C_IN_FLIGHT] > 1 or (c[C_IN_FLIGHT] == 1 and (not _may_be_skipped(e, _oldest(e)))):
        return False
    steps = quiet_steps(e)
    if steps < _MIN_SKIPPED:
        return False
    c[C_SKIPS], c[C_SKIP_SLOWDOWN] = 1, c[C_SLOWDOWN]
    c[C_SKIP_US], c[C_SKIP_BELOW] = start_us, start_below
    c[C_LEAD] = e[STEP_DURATION + _oldest(e)] if c[C_IN_FLIGHT] == 1 else 0
    c[C_DECODES], c[C_CONTEXT_TOKENS] = (e[COHORT], e[OFFSETS] + e[COHORT] * (e[TICK] + 1))
    c[C_STEPS] = c[C_MOST] = steps
    further = steps - 1 if c[C_LEAD] > 0 else steps
    led_us, led_below = after(start_us, start_below, c[C_SLOWDOWN] * c[C_LEAD])
    end_us, end_below = after_steps(
        ints(c[C_TIMER_AT]), led_us, led_below, c[C_DECODES], c[C_CONTEXT_TOKENS], further, c[C_SLOWDOWN]
    )
    c[C_RUNS_ON] = 1
    if c[C_LEAD] > 0:
        c[C_PASSES], c[C_PASSED_US], c[C_PASSED_BELOW] = 1, end_us, end_below
        context_tokens = c[C_CONTEXT_TOKENS] + (steps - 1) * c[C_DECODES]
        last = decode_step(ints(c[C_TIMER_AT]), c[C_DECODES], context_tokens)
        end_us, end_below = after(end_us, end_below, c[C_SLOWDOWN] * last)
    c[C_BOUNDARY_US], c[C_BOUNDARY_BELOW] = end_us, end_below
    c[C_NEXT_US] = micros_after(end_us, end_below)
    if c[C_ON_WAY] > 0:
        _cut(c, _next_ready_us(e, c))
    return True


@part
def _cut(c: Pointer, at_us: int) -> None:
    """Stop at the first step boundary at `at_us` or later, where several are to be passed at once."""
    if c[C_NEXT_US] == NO_TIME or c[C_NEXT_US] <= at_us:
        return
    if c[C_PASSES]:
        if micros_after(c[C_PASSED_US], c[C_PASSED_BELOW]) < at_us:
            return
        _drop_passed(c)
        c[C_NEXT_US] = micros_after(c[C_BOUNDARY_US], c[C_BOUNDARY_BELOW])
    if c[C_SKIPS] and c[C_NEXT_US] > at_us:
        _cut_skipped(c, at_us - 1, 1)
        c[C_NEXT_US] = micros_after(c[C_BOUNDARY_US], c[C_BOUNDARY_BELOW])


@part
def _cut_skipped(c: Pointer, until_us: int, until_below: int) -> None:
    """Keep the steps, at least one, up to the first that ends at a time or later; that is the boundary."""
    led_us, led_below = after(c[C_SKIP_US], c[C_SKIP_BELOW], c[C_SKIP_SLOWDOWN] * c[C_LEAD])
    lead_steps = 1 if c[C_LEAD] > 0 else 0
    if lead_steps == 1 and (led_us > until_us or (led_us == until_us and led_below >= until_below)):
        c[C_STEPS] = 1
        c[C_BOUNDARY_US], c[C_BOUNDARY_BELOW] = led_us, led_below
        return
    further, end_us, end_below = steps_until(
        ints(c[C_TIMER_AT]),
        led_us,
        led_below,
        c[C_DECODES],
        c[C_CONTEXT_TOKENS],
        c[C_STEPS] - lead_steps,
        c[C_SKIP_SLOWDOWN],
        until_us,
        until_below,
    )
    c[C_STEPS] = lead_steps + further
    c[C_BOUNDARY_US], c[C_BOUNDARY_BELOW] = end_us, end_below


@part
def _finish_skipped(e: Pointer, c: Pointer, end_us: int) -> None:
    """Let the engine take the steps that were skipped; `emitted` has the tokens that the last of them lists."""
    steps, decodes, context_tokens, lead = c[C_STEPS], c[C_DECODES], c[C_CONTEXT_TOKENS], c[C_LEAD]
    advance(e, steps)
    c[C_SKIPS] = 0
    if lead > 0:
        newest_at = _oldest(e)
        e[STEP_DURATION + newest_at] = decode_step(ints(c[C_TIMER_AT]), decodes, context_tokens + (steps - 1) * decodes)
        e[STEP_WAS_SKIPPED + newest_at], e[STEP_ENDS_NONE + newest_at] = 1, steps < c[C_MOST]
    else:
        lead = decode_step(ints(c[C_TIMER_AT]), decodes, context_tokens)
        context_tokens += decodes
    led_us, led_below = after(c[C_SKIP_US], c[C_SKIP_BELOW], c[C_SKIP_SLOWDOWN] * lead)
    run_ended(e, c, end_us, micros_after(led_us, led_below), steps, decodes, decodes * steps // e[BLOCK_SIZE])
    left = steps - 1
    while left > 0:
        first, growth, here = piece_of(ints(c[C_TIMER_AT]), decodes, context_tokens, left)
        run_at = C_RUNS_ROWS + c[C_RUNS] * 4
        c[run_at], c[run_at + 1] = c[C_SKIP_SLOWDOWN] * first, c[C_SKIP_SLOWDOWN] * growth
        c[run_at + 2], c[run_at + 3] = here, decodes
        c[C_RUNS] += 1
        c[C_RUN_STEPS] += here
        context_tokens += here * decodes
        left -= here
