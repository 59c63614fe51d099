"""`EngineRecorder` compiled, and what is new of requests: what the clock of a compiled engine writes down."""

from __future__ import annotations

from maveriq.compiling import Pointer, part
from maveriq.engine.compiled_state import (
    BLOCK_SIZE,
    BLOCKS,
    EMIT_IS_LAST,
    EMIT_OUTPUT_TOKENS,
    EMIT_REQUEST_ID,
    EMIT_SLOT,
    EMIT_STEPS,
    EMITTED_COUNT,
    FIRST_STEP,
    FREE_BLOCKS,
    PRE_REQUEST_ID,
    PRE_SLOT,
    SCHED_SLOT,
    SEQ_CACHED_TOKENS,
    SEQ_INTERRUPTED_US,
    SEQ_IS_UNSTARTED,
    SEQ_LENGTH,
    SEQ_PROMPT_TOKENS,
    SEQ_REQUEST_ID,
    SLOTS,
    STEP_PREEMPTED,
    STEP_SCHEDULED,
)
from maveriq.scenario.compiled_clock_state import (
    C_DECODING,
    C_GAPS,
    C_GAPS_ROWS,
    C_LATE,
    C_LATE_ROWS,
    C_MOVES,
    C_MOVES_ROWS,
    C_NEWS,
    C_NEWS_ROWS,
    C_NOTES,
    C_NOTES_ROWS,
    C_PRESENT,
    C_REPORTED_KV_TOKENS,
    C_RUNNING,
    C_START_US,
    C_TOKEN_US,
    C_USED_BLOCKS,
    FINISHED,
    FIRST_TOKEN,
    PREEMPTED,
    PREEMPTED_BEFORE,
    STARTED,
)


@part
def tell(c: Pointer, what: int, request_id: int, value: int, other: int) -> None:
    """Add a row of news."""
    row_at = C_NEWS_ROWS + c[C_NEWS] * 4
    c[row_at], c[row_at + 1], c[row_at + 2], c[row_at + 3] = (what, request_id, value, other)
    c[C_NEWS] += 1


@part
def note_started(e: Pointer, c: Pointer) -> None:
    """Tell which requests the step that has run computed for the first time."""
    place = e[FIRST_STEP]
    for index in range(e[STEP_SCHEDULED + place]):
        sequence_at = e[SCHED_SLOT + place * SLOTS + index]
        if e[SEQ_IS_UNSTARTED + sequence_at]:
            e[SEQ_IS_UNSTARTED + sequence_at] = 0
            tell(c, STARTED, e[SEQ_REQUEST_ID + sequence_at], c[C_START_US], e[SEQ_CACHED_TOKENS + sequence_at])


@part
def note_preempted(e: Pointer, c: Pointer) -> None:
    """Tell which requests were preempted for the step that has run, and note when each got its last token."""
    place = e[FIRST_STEP]
    for index in range(e[STEP_PREEMPTED + place]):
        request_id = e[PRE_REQUEST_ID + place * SLOTS + index]
        sequence_at = e[PRE_SLOT + place * SLOTS + index]
        is_here = e[SEQ_REQUEST_ID + sequence_at] == request_id
        tell(c, PREEMPTED if is_here else PREEMPTED_BEFORE, request_id, 0, 0)
        if (
            is_here
            and e[SEQ_LENGTH + sequence_at] > e[SEQ_PROMPT_TOKENS + sequence_at]
            and (e[SEQ_INTERRUPTED_US + sequence_at] < 0)
        ):
            e[SEQ_INTERRUPTED_US + sequence_at] = c[C_START_US]


@part
def note_emitted(e: Pointer, c: Pointer, end_us: int) -> None:
    """Tell which requests got their first token, and which their last."""
    finished = 0
    for index in range(e[EMITTED_COUNT]):
        if e[EMIT_OUTPUT_TOKENS + index] == 1:
            tell(c, FIRST_TOKEN, e[EMIT_REQUEST_ID + index], 0, 0)
    for index in range(e[EMITTED_COUNT]):
        if e[EMIT_IS_LAST + index]:
            tell(c, FINISHED, e[EMIT_REQUEST_ID + index], e[EMIT_OUTPUT_TOKENS + index], e[EMIT_STEPS + index])
            finished += 1
    if finished > 0:
        left(c, end_us, finished)
    if c[C_NEWS] > 0:
        c[C_REPORTED_KV_TOKENS] = (e[BLOCKS] - e[FREE_BLOCKS]) * e[BLOCK_SIZE]


@part
def moved(c: Pointer, now_us: int, requests: int) -> None:
    """Note that requests were sent, or (negative) have left."""
    row_at = C_MOVES_ROWS + c[C_MOVES] * 2
    c[row_at], c[row_at + 1] = (now_us, requests)
    c[C_MOVES] += 1


@part
def left(c: Pointer, now_us: int, requests: int) -> None:
    """Note that requests have left."""
    c[C_PRESENT] -= requests
    moved(c, now_us, -requests)


@part
def _other_gap(c: Pointer, gap_us: int, tokens: int) -> None:
    row_at = C_GAPS_ROWS + c[C_GAPS] * 2
    c[row_at], c[row_at + 1] = (gap_us, tokens)
    c[C_GAPS] += 1


@part
def note(c: Pointer, end_us: int, last_used: int, steps: int, tokens: int, gap_us: int, gaps: int) -> None:
    """Note steps that have run; see `StepsEnded`."""
    row_at = C_NOTES_ROWS + c[C_NOTES] * 9
    c[row_at], c[row_at + 1], c[row_at + 2], c[row_at + 3], c[row_at + 4] = (
        c[C_START_US],
        end_us,
        c[C_RUNNING],
        c[C_USED_BLOCKS],
        last_used,
    )
    c[row_at + 5], c[row_at + 6], c[row_at + 7], c[row_at + 8] = (steps, tokens, gap_us, gaps)
    c[C_NOTES] += 1


@part
def step_ended(e: Pointer, c: Pointer, end_us: int, tokens: int, together: int) -> None:
    """Note that a step has run."""
    decoded = together
    for index in range(e[EMITTED_COUNT]):
        if e[EMIT_OUTPUT_TOKENS + index] > 1:
            decoded += 1
    on_time = decoded
    if decoded > 0:
        on_time -= _note_late(c, end_us) + _note_interrupted(e, c, end_us)
    note(c, end_us, c[C_USED_BLOCKS], 1, tokens, end_us - c[C_TOKEN_US], on_time)
    if decoded > 0 or c[C_DECODING] == 0:
        c[C_TOKEN_US] = end_us
    if decoded > 0:
        c[C_DECODING] = decoded
    _note_ends(e, c, end_us)


@part
def run_ended(e: Pointer, c: Pointer, end_us: int, first_end_us: int, steps: int, decodes: int, blocks: int) -> None:
    """Note that steps have run that were skipped."""
    on_time = decodes - _note_late(c, first_end_us)
    used = c[C_USED_BLOCKS] + blocks
    note(c, end_us, used, steps, steps * decodes, first_end_us - c[C_TOKEN_US], on_time)
    c[C_TOKEN_US] = end_us
    c[C_DECODING] = decodes
    _note_ends(e, c, end_us)


@part
def _note_ends(e: Pointer, c: Pointer, end_us: int) -> None:
    """Record first and last tokens."""
    begun, ended = (0, 0)
    for index in range(e[EMITTED_COUNT]):
        if e[EMIT_IS_LAST + index]:
            ended += e[EMIT_OUTPUT_TOKENS + index] > 1
        else:
            begun += e[EMIT_OUTPUT_TOKENS + index] == 1
    if begun > 0 and c[C_TOKEN_US] != end_us:
        late_at = C_LATE_ROWS + c[C_LATE] * 2
        c[late_at], c[late_at + 1] = (end_us, begun)
        c[C_LATE] += 1
    c[C_DECODING] += begun - ended


@part
def _note_late(c: Pointer, end_us: int) -> int:
    """Record second tokens of requests whose first came in a step in which others got none; return their number."""
    number = 0
    for index in range(c[C_LATE]):
        late_at = C_LATE_ROWS + index * 2
        _other_gap(c, end_us - c[late_at], c[late_at + 1])
        number += c[late_at + 1]
    c[C_LATE] = 0
    return number


@part
def _note_interrupted(e: Pointer, c: Pointer, end_us: int) -> int:
    """Record the next token of requests that had been preempted, and return their number."""
    found = 0
    for index in range(e[EMITTED_COUNT]):
        sequence_at = e[EMIT_SLOT + index]
        if e[SEQ_INTERRUPTED_US + sequence_at] >= 0:
            _other_gap(c, end_us - e[SEQ_INTERRUPTED_US + sequence_at], 1)
            e[SEQ_INTERRUPTED_US + sequence_at] = -1
            found += 1
    return found
