"""The state of the clock of a compiled engine: whole numbers in one block of memory, which a pointer `c` points to.

What is noted and what is new of requests is written into buffers in it, which Python empties.
"""

from __future__ import annotations

import numpy as np

from maveriq.compiling import Integers, address
from maveriq.control.engine_series import StepsEnded
from maveriq.engine.compiled_state import SLOTS
from maveriq.estimate.compiled_timer import TimerState

FINISH, COMPOSE, SUBMIT, SLOW_DOWN, STOP, RUN = range(6)
"""What `serve` is asked for."""

STARTED, PREEMPTED, PREEMPTED_BEFORE, FIRST_TOKEN, FINISHED = range(5)
"""What is new of a request. Rows of news are this, its number and two values: when it started and how many tokens of
its prompt were cached; or how many tokens it got, in how many steps. `PREEMPTED_BEFORE` is of a request that was in
flight then, and has got its last token."""

NO_TIME = -1
EXPANDED_STEPS = 1 << 17
"""Steps of runs after which buffers are to be emptied."""

(
    C_NEXT_US,  # when something happens by itself; `NO_TIME` if nothing will
    C_SLOWDOWN, C_START_US, C_SUBMITTED,
    C_ON_WAY,  # requests that have not reached the queue
    C_IN_FLIGHT,  # steps that compute something
    C_RUNS_ON, C_BOUNDARY_US, C_BOUNDARY_BELOW,  # whether something runs, and when it ends
    C_PASSES, C_PASSED_US, C_PASSED_BELOW,  # whether a boundary is passed later, and which
    C_IS_FREE, C_FREE_US, C_FREE_BELOW,  # whether the next step starts at the last boundary, and when that was
    # Steps that are skipped (`_SkippedSteps`).
    C_SKIPS, C_SKIP_US, C_SKIP_BELOW, C_SKIP_SLOWDOWN, C_LEAD, C_DECODES, C_CONTEXT_TOKENS, C_STEPS, C_MOST,
    # What `EngineRecorder` knows.
    C_PRESENT, C_RUNNING, C_USED_BLOCKS, C_DECODING, C_TOKEN_US, C_LATE,
    C_NOTES, C_RUNS, C_GAPS, C_MOVES, C_NEWS,  # rows in the buffers below
    C_RUN_STEPS,  # steps of the rows of `C_RUNS_ROWS`
    C_REPORTED_KV_TOKENS,  # tokens of used KV blocks when there was news last
    C_TIMER_AT, C_CHUNK_TOKENS_AT, C_CHUNK_PAST_AT,  # addresses; the last two of scratch for the chunks of a step
) = range(40)  # fmt: skip
"""The clock of one engine."""

ROWS = 1024
"""Rows after which a buffer is to be emptied; each has room for what else a single step adds."""

_MARGIN = 64
_NOTE = len(StepsEnded._fields)

C_LATE_ROWS = 40  # times of first tokens, and how many came then
C_NOTES_ROWS = C_LATE_ROWS + 2 * (SLOTS + 1)  # `StepsEnded`
C_RUNS_ROWS = C_NOTES_ROWS + _NOTE * (ROWS + _MARGIN)  # what `EngineSums.further_gaps` takes
C_GAPS_ROWS = C_RUNS_ROWS + 4 * (ROWS + _MARGIN)  # what `EngineSums.other_gap` takes
C_MOVES_ROWS = C_GAPS_ROWS + 2 * (ROWS + 4 * SLOTS)  # what `EngineSums.moved` takes
C_NEWS_ROWS = C_MOVES_ROWS + 2 * (ROWS + _MARGIN)  # what is new of requests
_WORDS = C_NEWS_ROWS + 4 * 4 * SLOTS


class ClockState:
    """The memory of the clock of one engine without requests.

    Attributes:
        memory: what `c` points to.
        news: rows of what is new of requests.
    """

    def __init__(self, timer: TimerState) -> None:
        self.memory: Integers = np.zeros(_WORDS, dtype=np.int64)
        self.news = self.memory[C_NEWS_ROWS:].reshape(-1, 4)
        self._timer = timer
        self._chunks = np.zeros((2, SLOTS))
        self.memory[C_NEXT_US], self.memory[C_SLOWDOWN] = NO_TIME, 1
        self.memory[C_TIMER_AT] = address(timer.memory)
        self.memory[C_CHUNK_TOKENS_AT], self.memory[C_CHUNK_PAST_AT] = map(address, self._chunks)

    def take_notes(self) -> dict[str, Integers]:
        """Return what was noted, as `EngineSums.note` takes it; the next call of `serve` may change it. Forget it."""
        memory, taken = self.memory, {}
        for name, count, rows, width in _BUFFERS:
            taken[name] = memory[rows : rows + width * memory[count]].reshape(-1, width)
            memory[count] = 0
        memory[C_RUN_STEPS] = 0
        return taken


_BUFFERS = (
    ("steps", C_NOTES, C_NOTES_ROWS, _NOTE),
    ("runs", C_RUNS, C_RUNS_ROWS, 4),
    ("gaps", C_GAPS, C_GAPS_ROWS, 2),
    ("moves", C_MOVES, C_MOVES_ROWS, 2),
)
