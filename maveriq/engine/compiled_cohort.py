"""`DecodeCohort` compiled: sequences that decode one token in every step, counted together.

The rules are explained there; docstrings here say only what differs (docs/decisions/0019-compiled-engine.md).
"""

from __future__ import annotations

from maveriq.compiling import Pointer, part
from maveriq.engine.compiled_blocks import blocks_of
from maveriq.engine.compiled_state import (
    ASYNC_SCHEDULING,
    BLOCK_SIZE,
    COHORT,
    DONE,
    END_TICK,
    FIRST_STEP,
    IN_FLIGHT,
    OFFSETS,
    PHASES,
    RUNNING,
    RUNNING_COUNT,
    SCHED_EMITS,
    SCHED_PAST,
    SCHED_SLOT,
    SCHED_TOKENS,
    SEQ_ADMISSION,
    SEQ_BLOCKS,
    SEQ_COMPUTED,
    SEQ_COUNTS_FROM,
    SEQ_END,
    SEQ_IN_COHORT,
    SEQ_JOINED_TICK,
    SEQ_LENGTH,
    SEQ_OFFSET,
    SEQ_PENDING,
    SEQ_REGISTERED,
    SINGLES,
    SINGLES_COUNT,
    SLOTS,
    STEP_SCHEDULED,
    STEP_TICK,
    STEP_TOGETHER,
    TICK,
)

_NEVER = 1 << 62


@part
def join_cohort(e: Pointer, slot: int, tick: int, pending: int) -> None:
    """Count a sequence with the others from step `tick` on; `pending` of its tokens are in flight then."""
    offset = e[SEQ_OFFSET + slot] = e[SEQ_COMPUTED + slot] - tick
    e[SEQ_JOINED_TICK + slot] = tick
    e[SEQ_COUNTS_FROM + slot] = tick - pending
    e[SEQ_IN_COHORT + slot] = 1
    end_tick = e[SEQ_END + slot] - 2 - offset
    e[END_TICK] = end_tick if e[COHORT] == 0 else min(e[END_TICK], end_tick)
    e[COHORT] += 1
    e[OFFSETS] += offset
    e[PHASES + -offset % e[BLOCK_SIZE]] += 1


@part
def length_in_cohort(e: Pointer, slot: int) -> int:
    """Return the length of a sequence with the tokens of all steps that have run."""
    return e[SEQ_LENGTH + slot] + max(0, e[DONE] - e[SEQ_COUNTS_FROM + slot])


@part
def leave_cohort(e: Pointer, slot: int, tick: int) -> None:
    """Count a sequence by itself from step `tick` on, also in steps in flight; `find_end_tick` is called later."""
    offset = e[SEQ_OFFSET + slot]
    e[SEQ_IN_COHORT + slot] = 0
    e[SEQ_COMPUTED + slot] = offset + tick
    e[SEQ_LENGTH + slot] = length_in_cohort(e, slot)
    e[SEQ_BLOCKS + slot] = blocks_of(e, e[SEQ_COMPUTED + slot])
    e[COHORT] -= 1
    e[OFFSETS] -= offset
    e[PHASES + -offset % e[BLOCK_SIZE]] -= 1
    if e[ASYNC_SCHEDULING]:
        e[SEQ_PENDING + slot] = e[SEQ_COMPUTED + slot] + 1 - e[SEQ_LENGTH + slot]
    e[SEQ_REGISTERED + slot] = max(e[SEQ_REGISTERED + slot], e[SEQ_COMPUTED + slot] - e[SEQ_PENDING + slot])
    for number in range(e[IN_FLIGHT]):
        place = (e[FIRST_STEP] + number) & 1
        if e[STEP_TOGETHER + place] > 0 and e[STEP_TICK + place] >= e[SEQ_JOINED_TICK + slot]:
            e[STEP_TOGETHER + place] -= 1
            entry_at = e[STEP_SCHEDULED + place]
            (
                e[SCHED_SLOT + place * SLOTS + entry_at],
                e[SCHED_TOKENS + place * SLOTS + entry_at],
                e[SCHED_PAST + place * SLOTS + entry_at],
                e[SCHED_EMITS + place * SLOTS + entry_at],
            ) = slot, 1, offset + e[STEP_TICK + place], 1
            e[STEP_SCHEDULED + place] += 1
    at = e[SINGLES_COUNT]
    while at > 0 and e[SEQ_ADMISSION + e[SINGLES + at - 1]] > e[SEQ_ADMISSION + slot]:
        e[SINGLES + at] = e[SINGLES + at - 1]
        at -= 1
    e[SINGLES + at] = slot
    e[SINGLES_COUNT] += 1


@part
def find_end_tick(e: Pointer) -> None:
    """Note the first step in which a sequence of the cohort computes its last token."""
    e[END_TICK] = _NEVER
    for index in range(e[RUNNING_COUNT]):
        slot = e[RUNNING + index]
        if e[SEQ_IN_COHORT + slot]:
            e[END_TICK] = min(e[END_TICK], e[SEQ_END + slot] - 2 - e[SEQ_OFFSET + slot])


@part
def leave_ended(e: Pointer, tick: int) -> None:
    """Count those that compute their last token in step `tick`, the last one composed, by themselves."""
    if e[COHORT] == 0 or e[END_TICK] > tick:
        return
    for index in range(e[RUNNING_COUNT]):
        slot = e[RUNNING + index]
        if e[SEQ_IN_COHORT + slot] and e[SEQ_END + slot] - 2 - e[SEQ_OFFSET + slot] <= tick:
            leave_cohort(e, slot, e[TICK])
    find_end_tick(e)


@part
def dissolve_cohort(e: Pointer) -> None:
    """Count all sequences by themselves."""
    for index in range(e[RUNNING_COUNT]):
        slot = e[RUNNING + index]
        if e[SEQ_IN_COHORT + slot]:
            leave_cohort(e, slot, e[TICK])
