"""Compiled engines in Python's hands: one at a time (`serve`), or those of a whole cluster with its requests (`RUN`).

While nothing happens but requests and steps, routing is all that connects engines. `_run` takes the requests in order:
engines do what is due until then, and the router chooses one. `k` is the cluster.
"""

from __future__ import annotations

from collections.abc import Callable

from maveriq import compiling
from maveriq.compiling import Pointer, compiled, ints, part, source_digest
from maveriq.engine import compiled_blocks, compiled_cohort, compiled_scheduler, compiled_state
from maveriq.estimate import compiled_step, compiled_timer
from maveriq.scenario import compiled_clock, compiled_clock_state, compiled_recorder
from maveriq.scenario.compiled_clock import compose, finish, slow_down, stop, submit
from maveriq.scenario.compiled_clock_state import (
    C_GAPS,
    C_MOVES,
    C_NEWS,
    C_NEWS_ROWS,
    C_NEXT_US,
    C_NOTES,
    C_RUN_STEPS,
    C_RUNS,
    COMPOSE,
    EXPANDED_STEPS,
    FINISH,
    FINISHED,
    NO_TIME,
    ROWS,
    RUN,
    SLOW_DOWN,
    SUBMIT,
)
from maveriq.units import Micros

DONE, IS_FULL, NEEDS_ROWS = range(3)
"""How a call for `RUN` ends: all is done, buffers are to be emptied, or an engine is to get more rows; after the last
two it is called again."""

BUSY, IDLE = range(5, 7)
"""What is new of an engine, among what is new of requests."""

(
    K_ENGINES, K_ENGINES_AT,  # how many there are, and the address of their rows
    K_NEXT, K_END,  # the next request, and the one behind the last
    # Addresses of columns of requests: when each arrives, its lengths, the first engine of its endpoint, and (written
    # here) the engine that it got.
    K_ARRIVALS_AT, K_PROMPTS_AT, K_OUTPUTS_AT, K_GROUPS_AT, K_CHOSEN_AT,
    K_FIRST_ID,  # the number of the request in row 0
    K_NEWS_AT, K_NEWS,  # the address of rows of news, and how many there are
    K_LAST_US,  # when something was done last
    K_STUCK,  # the engine that needs rows
    K_IN_TURN,  # whether engines are chosen in turn, not by outstanding requests
    K_SIZE,
) = range(16)  # fmt: skip
"""A cluster."""

(
    R_ENGINE_AT, R_CLOCK_AT, R_OUTSTANDING, R_ASSIGNED,
    R_COMPOSES,  # whether it is to compose a step at this instant
    R_MEMBERS, R_LAST,  # of the first engine of an endpoint: how many engines that has, and which was chosen last
    R_SIZE,
) = range(8)  # fmt: skip
"""An engine of a cluster; those of an endpoint follow each other."""

NEWS_SIZE = 6
"""Columns of news: those of `CLOCK`, when it was, and the engine."""

MAX_NEWS = 1 << 15
NEWS_MARGIN = 1 << 13
"""Rows of news after which they are to be emptied, and further ones that there is room for."""


@part
def _is_full(c: Pointer) -> bool:
    return max(c[C_NOTES], c[C_RUNS], c[C_GAPS], c[C_MOVES]) >= ROWS or c[C_RUN_STEPS] >= EXPANDED_STEPS


@part
def _tell(k: Pointer, what: int, request_id: int, value: int, other: int, at_us: int, number: int) -> None:
    row = ints(k[K_NEWS_AT] + 8 * NEWS_SIZE * k[K_NEWS])
    row[0], row[1], row[2], row[3], row[4], row[5] = what, request_id, value, other, at_us, number
    k[K_NEWS] += 1


@part
def _finish(k: Pointer, number: int, at_us: int) -> None:
    """End what is due at an engine, and pass on what is new."""
    row = ints(k[K_ENGINES_AT] + 8 * R_SIZE * number)
    c = ints(row[R_CLOCK_AT])
    c[C_NEWS] = 0
    finish(ints(row[R_ENGINE_AT]), c, at_us)
    k[K_LAST_US] = max(k[K_LAST_US], at_us)
    for index in range(c[C_NEWS]):
        at = C_NEWS_ROWS + 4 * index
        _tell(k, c[at], c[at + 1], c[at + 2], c[at + 3], at_us, number)
        if c[at] == FINISHED:
            row[R_OUTSTANDING] -= 1
            if row[R_OUTSTANDING] == 0:
                _tell(k, IDLE, 0, 0, 0, at_us, number)


@part
def _advance(k: Pointer, until_us: int) -> bool:
    """Let all engines do what is due before a time; return False if buffers are to be emptied first."""
    for number in range(k[K_ENGINES]):
        row = ints(k[K_ENGINES_AT] + 8 * R_SIZE * number)
        e, c = ints(row[R_ENGINE_AT]), ints(row[R_CLOCK_AT])
        while NO_TIME < c[C_NEXT_US] < until_us:
            if _is_full(c) or k[K_NEWS] >= MAX_NEWS:
                return False
            at_us = c[C_NEXT_US]
            _finish(k, number, at_us)
            compose(e, c, at_us)
    return True


@part
def _choose(k: Pointer, group: int) -> int:
    """Return the engine for a request to an endpoint (`LeastOutstanding`, `RoundRobin`)."""
    first = ints(k[K_ENGINES_AT] + 8 * R_SIZE * group)
    members = first[R_MEMBERS]
    if k[K_IN_TURN]:
        first[R_LAST] = (first[R_LAST] + 1) % members
        return group + first[R_LAST]
    chosen, fewest, assigned = group, first[R_OUTSTANDING], first[R_ASSIGNED]
    for number in range(group + 1, group + members):
        row = ints(k[K_ENGINES_AT] + 8 * R_SIZE * number)
        if row[R_OUTSTANDING] < fewest or (row[R_OUTSTANDING] == fewest and row[R_ASSIGNED] < assigned):
            chosen, fewest, assigned = number, row[R_OUTSTANDING], row[R_ASSIGNED]
    return chosen


@part
def _arrive(k: Pointer, at_us: int) -> int:
    """Let the next request, which arrives now, go to an engine; return `DONE` if it could."""
    request = k[K_NEXT]
    chosen = _choose(k, ints(k[K_GROUPS_AT])[request])
    row = ints(k[K_ENGINES_AT] + 8 * R_SIZE * chosen)
    outcome = DONE
    if k[K_NEWS] >= MAX_NEWS or _is_full(ints(row[R_CLOCK_AT])):
        outcome = IS_FULL
    lengths = ints(k[K_OUTPUTS_AT])[request] << 32 | ints(k[K_PROMPTS_AT])[request]
    request_id = k[K_FIRST_ID] + request
    e, c = ints(row[R_ENGINE_AT]), ints(row[R_CLOCK_AT])
    if outcome == DONE and not submit(e, c, at_us, request_id, lengths):
        k[K_STUCK], outcome = chosen, NEEDS_ROWS
    if outcome != DONE:
        if k[K_IN_TURN]:  # it is chosen again
            ints(k[K_ENGINES_AT] + 8 * R_SIZE * ints(k[K_GROUPS_AT])[request])[R_LAST] -= 1
        return outcome
    if row[R_OUTSTANDING] == 0:
        _tell(k, BUSY, 0, 0, 0, at_us, chosen)
    row[R_OUTSTANDING] += 1
    row[R_ASSIGNED] += 1
    row[R_COMPOSES] = 1
    ints(k[K_CHOSEN_AT])[request] = chosen
    k[K_NEXT] += 1
    return DONE


@part
def _run(k: Pointer, until_us: int) -> int:
    """Do all that happens before a time: `DONE` and so on."""
    arrivals_us = ints(k[K_ARRIVALS_AT])
    while k[K_NEXT] < k[K_END] and arrivals_us[k[K_NEXT]] < until_us:
        at_us = arrivals_us[k[K_NEXT]]
        if not _advance(k, at_us):
            return IS_FULL
        for number in range(k[K_ENGINES]):
            row = ints(k[K_ENGINES_AT] + 8 * R_SIZE * number)
            if ints(row[R_CLOCK_AT])[C_NEXT_US] == at_us:
                if k[K_NEWS] >= MAX_NEWS:
                    return IS_FULL
                _finish(k, number, at_us)
                row[R_COMPOSES] = 1
        k[K_LAST_US] = at_us
        while k[K_NEXT] < k[K_END] and arrivals_us[k[K_NEXT]] == at_us:
            outcome = _arrive(k, at_us)
            if outcome != DONE:
                return outcome
        for number in range(k[K_ENGINES]):
            row = ints(k[K_ENGINES_AT] + 8 * R_SIZE * number)
            if row[R_COMPOSES]:
                row[R_COMPOSES] = 0
                compose(ints(row[R_ENGINE_AT]), ints(row[R_CLOCK_AT]), at_us)
    return DONE if _advance(k, until_us) else IS_FULL


def _entry(sources: int) -> Callable[[int, int, int, Micros, int, int], tuple[int, int, bool]]:
    """Return the compiled function for sources with a digest, which must be a constant of it (`maveriq.compiling`)."""

    def serve(engine_at: int, clock_at: int, what: int, now_us: int, value: int, lengths: int) -> tuple[int, int, bool]:
        """Let one engine do something, or a whole cluster all that happens before a time.

        Args:
            engine_at: the address of the engine's memory; for `RUN`, of the cluster's.
            clock_at: that of its clock's.
            what: `FINISH` and so on.
            now_us: the present; for `RUN`, the time before which all is to be done.
            value: the number of the request that is submitted, or the slowdown.
            lengths: its prompt tokens, and 2^32 times its output tokens.

        Returns:
            When something happens by itself, `NO_TIME` if nothing will; how many rows of news there are, -1 if there is
            no free row for a request; and whether a buffer is to be emptied. For `RUN`, first `DONE` and so on.
        """
        e, c = ints(engine_at), ints(clock_at)
        if what == RUN:
            return _run(e, now_us), 0 * sources, False
        c[C_NEWS] = 0
        if what == FINISH:
            finish(e, c, now_us)
        elif what == COMPOSE:
            compose(e, c, now_us)
        elif what == SUBMIT:
            if not submit(e, c, now_us, value, lengths):
                c[C_NEWS] = -1
        elif what == SLOW_DOWN:
            slow_down(c, now_us, value)
        else:
            stop(e, c, now_us)
        return c[C_NEXT_US], c[C_NEWS], _is_full(c)

    return compiled(serve)


serve = _entry(
    source_digest(
        compiling, compiled_step, compiled_timer, compiled_state, compiled_blocks, compiled_cohort, compiled_scheduler,
        compiled_clock_state, compiled_recorder, compiled_clock,
    )
)  # fmt: skip
