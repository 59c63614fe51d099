"""`KVBlockPool` compiled, for sequences that share no content: the free blocks, and which of them can be found again.

A sequence that was preempted finds what it had computed as long as its blocks are not reused. So free blocks are a
queue, in which the blocks of preempted sequences have an entry each, and all others are counted. While no block can be
found, the order of the queue does not matter, and `free_blocks` is all there is.
"""

from __future__ import annotations

from maveriq.compiling import Pointer, ints, part
from maveriq.engine.compiled_state import (
    AGES,
    BLOCK_SIZE,
    ELDERS,
    ELDERS_AT,
    FINDABLE_BLOCKS,
    FOUND_AT,
    FREE_BLOCKS,
    FREE_RUNS,
    FREE_RUNS_AT,
    PREFIX_CACHING,
    QUEUE_HEAD,
    QUEUE_LENGTH,
    REUSE_UNHASHED_FIRST,
    RUN_AGE,
    RUN_INDEX,
    RUN_SIZE,
    RUN_SLOT,
    SEQ_BLOCKS,
    SEQ_END,
    SEQ_FINDABLE_BLOCKS,
    SEQ_LENGTH,
    SEQ_REGISTERED,
)


@part
def blocks_of(e: Pointer, tokens: int) -> int:
    """Return how many blocks hold so many tokens."""
    return -(-tokens // e[BLOCK_SIZE])


@part
def take(e: Pointer, number: int) -> None:
    """Take blocks from the head of the queue; what they held is forgotten."""
    runs = ints(e[FREE_RUNS_AT])
    e[FREE_BLOCKS] -= number
    while number > 0 and e[FINDABLE_BLOCKS] > 0:
        run_at = e[QUEUE_HEAD]
        if runs[run_at * RUN_SIZE + RUN_SLOT] < 0 and runs[run_at * RUN_SIZE + RUN_INDEX] > number:
            runs[run_at * RUN_SIZE + RUN_INDEX] -= number
            return
        e[QUEUE_HEAD] = (e[QUEUE_HEAD] + 1) % e[FREE_RUNS]
        e[QUEUE_LENGTH] -= 1
        if runs[run_at * RUN_SIZE + RUN_SLOT] < 0:
            number -= runs[run_at * RUN_SIZE + RUN_INDEX]
        else:
            number -= 1
            e[FINDABLE_BLOCKS] -= 1
            e[SEQ_FINDABLE_BLOCKS + runs[run_at * RUN_SIZE + RUN_SLOT]] -= 1


@part
def allocate(e: Pointer, slot: int, tokens: int) -> bool:
    """Give a sequence the blocks for its first tokens, and return True; change nothing if there are too few."""
    new = blocks_of(e, tokens) - e[SEQ_BLOCKS + slot]
    if new > e[FREE_BLOCKS]:
        return False
    if new > 0:
        take(e, new)
        e[SEQ_BLOCKS + slot] += new
    return True


@part
def release(e: Pointer, slot: int) -> None:
    """Take all blocks from a sequence that has ended."""
    if e[FINDABLE_BLOCKS] > 0:
        if e[SEQ_FINDABLE_BLOCKS + slot] > 0:
            _forget(e, slot)
        unhashed = _unhashed(e, slot)
        _put_first(e, unhashed)
        _append_run(e, e[SEQ_BLOCKS + slot] - unhashed)
    else:
        e[FREE_BLOCKS] += e[SEQ_BLOCKS + slot]
    _forget_elders(e, slot)
    e[SEQ_BLOCKS + slot] = 0


@part
def release_findable(e: Pointer, slot: int) -> None:
    """Take all blocks from a sequence that is preempted. It can find the full ones; the last is reused first."""
    if e[PREFIX_CACHING] == 0:
        e[FREE_BLOCKS] += e[SEQ_BLOCKS + slot]
        e[SEQ_BLOCKS + slot] = 0
        return
    findable = min(e[SEQ_REGISTERED + slot], e[SEQ_END + slot]) // e[BLOCK_SIZE]
    others = e[SEQ_BLOCKS + slot] - findable
    if findable > 0 and e[FINDABLE_BLOCKS] == 0:
        e[QUEUE_HEAD] = e[QUEUE_LENGTH] = 0
        _push(e, -1, e[FREE_BLOCKS], 0)
    if e[FINDABLE_BLOCKS] > 0 or findable > 0:
        unhashed = min(others, _unhashed(e, slot))
        _put_first(e, unhashed)
        _append_run(e, others - unhashed)
    else:
        e[FREE_BLOCKS] += others
    for index in range(findable - 1, -1, -1):
        _push(e, slot, index, _age(e, slot, index))
    e[FREE_BLOCKS] += findable
    e[FINDABLE_BLOCKS] += findable
    e[SEQ_FINDABLE_BLOCKS + slot] += findable
    e[SEQ_BLOCKS + slot] = 0


@part
def _unhashed(e: Pointer, slot: int) -> int:
    """Return how many of the blocks of a sequence go to the head of the queue."""
    if e[REUSE_UNHASHED_FIRST] == 0:
        return 0
    return e[SEQ_BLOCKS + slot] - e[SEQ_REGISTERED + slot] // e[BLOCK_SIZE]


@part
def _push(e: Pointer, slot: int, index: int, age: int) -> None:
    """Add an entry at the tail of the queue."""
    runs = ints(e[FREE_RUNS_AT])
    run_at = (e[QUEUE_HEAD] + e[QUEUE_LENGTH]) % e[FREE_RUNS]
    runs[run_at * RUN_SIZE + RUN_SLOT] = slot
    runs[run_at * RUN_SIZE + RUN_INDEX] = index
    runs[run_at * RUN_SIZE + RUN_AGE] = age
    e[QUEUE_LENGTH] += 1


@part
def _append_run(e: Pointer, number: int) -> None:
    """Add blocks without cached content at the tail of the queue."""
    runs = ints(e[FREE_RUNS_AT])
    if number <= 0:
        return
    e[FREE_BLOCKS] += number
    if e[QUEUE_LENGTH] > 0:
        last_at = (e[QUEUE_HEAD] + e[QUEUE_LENGTH] - 1) % e[FREE_RUNS]
        if runs[last_at * RUN_SIZE + RUN_SLOT] < 0:
            runs[last_at * RUN_SIZE + RUN_INDEX] += number
            return
    _push(e, -1, number, 0)


@part
def _put_first(e: Pointer, number: int) -> None:
    """Add blocks without cached content at the head of the queue."""
    runs = ints(e[FREE_RUNS_AT])
    if number <= 0:
        return
    e[FREE_BLOCKS] += number
    if e[QUEUE_LENGTH] > 0:
        first_at = e[QUEUE_HEAD]
        if runs[first_at * RUN_SIZE + RUN_SLOT] < 0:
            runs[first_at * RUN_SIZE + RUN_INDEX] += number
            return
    e[QUEUE_HEAD] = (e[QUEUE_HEAD] - 1) % e[FREE_RUNS]
    e[QUEUE_LENGTH] += 1
    first_at = e[QUEUE_HEAD]
    runs[first_at * RUN_SIZE + RUN_SLOT] = -1
    runs[first_at * RUN_SIZE + RUN_INDEX] = number
    runs[first_at * RUN_SIZE + RUN_AGE] = 0


@part
def find(e: Pointer, slot: int) -> int:
    """Return how many blocks at its beginning a preempted sequence finds, at most all but its last token.

    Where they are in the queue is in `found`.
    """
    found = ints(e[FOUND_AT])
    runs = ints(e[FREE_RUNS_AT])
    if e[SEQ_FINDABLE_BLOCKS + slot] == 0:
        return 0
    most = (e[SEQ_LENGTH + slot] - 1) // e[BLOCK_SIZE]
    for index in range(most):
        found[index] = -1
    size = e[FREE_RUNS]
    for place in range(e[QUEUE_HEAD], e[QUEUE_HEAD] + e[QUEUE_LENGTH]):
        run_at = place % size
        if runs[run_at * RUN_SIZE + RUN_SLOT] == slot and runs[run_at * RUN_SIZE + RUN_INDEX] < most:
            other = found[runs[run_at * RUN_SIZE + RUN_INDEX]]
            if other < 0 or runs[run_at * RUN_SIZE + RUN_AGE] < runs[other * RUN_SIZE + RUN_AGE]:
                found[runs[run_at * RUN_SIZE + RUN_INDEX]] = place % size
    number = 0
    while number < most and found[number] >= 0:
        number += 1
    return number


@part
def share(e: Pointer, slot: int, number: int) -> None:
    """Give a sequence the blocks of `find`, which has just been called."""
    found = ints(e[FOUND_AT])
    elders = ints(e[ELDERS_AT])
    runs = ints(e[FREE_RUNS_AT])
    for index in range(number):
        run_at = found[index]
        runs[run_at * RUN_SIZE + RUN_SLOT] = -2
        found[index] = runs[run_at * RUN_SIZE + RUN_AGE]
    size, length = e[FREE_RUNS], e[QUEUE_LENGTH]
    e[QUEUE_LENGTH] = 0
    for place in range(e[QUEUE_HEAD], e[QUEUE_HEAD] + length):
        run_at = place % size
        if runs[run_at * RUN_SIZE + RUN_SLOT] == -2:
            continue
        if runs[run_at * RUN_SIZE + RUN_SLOT] == slot and runs[run_at * RUN_SIZE + RUN_INDEX] < number:
            elder_at = e[ELDERS]
            elders[elder_at * RUN_SIZE + RUN_SLOT], elders[elder_at * RUN_SIZE + RUN_INDEX] = (
                slot,
                runs[run_at * RUN_SIZE + RUN_INDEX],
            )
            elders[elder_at * RUN_SIZE + RUN_AGE] = found[runs[run_at * RUN_SIZE + RUN_INDEX]]
            e[ELDERS] += 1
        _push(
            e,
            runs[run_at * RUN_SIZE + RUN_SLOT],
            runs[run_at * RUN_SIZE + RUN_INDEX],
            runs[run_at * RUN_SIZE + RUN_AGE],
        )
    e[FREE_BLOCKS] -= number
    e[FINDABLE_BLOCKS] -= number
    e[SEQ_FINDABLE_BLOCKS + slot] -= number
    e[SEQ_BLOCKS + slot] += number


@part
def _age(e: Pointer, slot: int, index: int) -> int:
    """Return the age of a block that a sequence gives back: a new one, unless it is older than one that is free."""
    elders = ints(e[ELDERS_AT])
    age = place = 0
    while place < e[ELDERS]:
        if elders[place * RUN_SIZE + RUN_SLOT] == slot and elders[place * RUN_SIZE + RUN_INDEX] == index:
            age = elders[place * RUN_SIZE + RUN_AGE]
            _drop_elder(e, place)
        else:
            place += 1
    if age > 0:
        return age
    e[AGES] += 1
    return e[AGES]


@part
def _forget(e: Pointer, slot: int) -> None:
    """Remove the blocks of a sequence that has ended from the cache."""
    runs = ints(e[FREE_RUNS_AT])
    for place in range(e[QUEUE_HEAD], e[QUEUE_HEAD] + e[QUEUE_LENGTH]):
        run_at = place % e[FREE_RUNS]
        if runs[run_at * RUN_SIZE + RUN_SLOT] == slot:
            (
                runs[run_at * RUN_SIZE + RUN_SLOT],
                runs[run_at * RUN_SIZE + RUN_INDEX],
            ) = (-1, 1)
    e[FINDABLE_BLOCKS] -= e[SEQ_FINDABLE_BLOCKS + slot]
    e[SEQ_FINDABLE_BLOCKS + slot] = 0


@part
def _forget_elders(e: Pointer, slot: int) -> None:
    elders = ints(e[ELDERS_AT])
    place = 0
    while place < e[ELDERS]:
        if elders[place * RUN_SIZE + RUN_SLOT] == slot:
            _drop_elder(e, place)
        else:
            place += 1


@part
def _drop_elder(e: Pointer, place: int) -> None:
    """Drop an entry of `elders`; the last takes its place."""
    elders = ints(e[ELDERS_AT])
    e[ELDERS] -= 1
    last_at = e[ELDERS]
    for field in range(RUN_SIZE):
        elders[place * RUN_SIZE + field] = elders[last_at * RUN_SIZE + field]
