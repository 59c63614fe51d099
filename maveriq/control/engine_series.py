"""Sums of what an engine did, for each interval between two samples, and the distribution of times between tokens.

Steps, and runs of equal steps, are noted as they end. They are added up many at a time, so that a note costs little,
and memory depends on the number of intervals alone. All means are weighted by time, and nothing is sampled: what is
noted of a request that runs for a second counts for a second, however long the intervals are.
"""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING, Any, NamedTuple

from maveriq.units import Micros

if TYPE_CHECKING:
    import numpy as np

_NOTES = 4096
_EXPANDED_STEPS = 1 << 17
_DENSE_GAPS = 1 << 16
_TICK_BITS = 32


class StepsEnded(NamedTuple):
    """One step that has run, or many equal ones in a row.

    Args:
        start_us: when the first started.
        end_us: when the last ended.
        running: requests that had been admitted and had not ended.
        used_blocks: KV blocks that requests held at the start.
        last_used_blocks: the same at the end; between these, they are taken evenly over the time.
        steps: how many steps.
        tokens: tokens computed in all of them.
        gap_us: from the tokens before to those of the first step.
        gaps: requests that got a token after so long in the first step.
    """

    start_us: Micros
    end_us: Micros
    running: int
    used_blocks: int
    last_used_blocks: int
    steps: int
    tokens: int
    gap_us: Micros
    gaps: int


class EngineSeries(NamedTuple):
    """One engine over time, a column each (NumPy, equal lengths); means since the row before, weighted by time.

    Args:
        time_us: the end of each interval.
        running: requests that had been admitted and had not ended.
        waiting: requests on their way to the engine, in its queue, or preempted.
        used_blocks: KV blocks that requests held.
        batch_tokens: tokens of a step; NaN where no step ran.
        step_us: how long a step took; NaN likewise.
        busy_share: share of the interval in which a step ran.
    """

    time_us: np.ndarray[Any, Any]
    running: np.ndarray[Any, Any]
    waiting: np.ndarray[Any, Any]
    used_blocks: np.ndarray[Any, Any]
    batch_tokens: np.ndarray[Any, Any]
    step_us: np.ndarray[Any, Any]
    busy_share: np.ndarray[Any, Any]


class TokenGaps:
    """How long after the one before tokens came: the number of tokens for each whole microsecond (mutable).

    The first token of a request follows none, and is not counted.
    """

    __slots__ = ("_counts", "_long")

    def __init__(self) -> None:
        self._counts: np.ndarray[Any, Any] | None = None  # by microseconds, the short ones
        self._long: dict[int, int] = {}

    def add(self, gap_us: np.ndarray[Any, Any], tokens: np.ndarray[Any, Any]) -> None:
        """Count tokens (int64) that came after gaps (int64)."""
        import numpy as np

        short = gap_us < _DENSE_GAPS
        if not short.all():
            for gap, count in zip(gap_us[~short].tolist(), tokens[~short].tolist(), strict=True):
                self._long[gap] = self._long.get(gap, 0) + count
            gap_us, tokens = gap_us[short], tokens[short]
        counted = np.bincount(gap_us, weights=tokens).astype(np.int64)  # exact below 2^53
        if self._counts is None:
            self._counts = np.zeros(_DENSE_GAPS, dtype=np.int64)
        self._counts[: len(counted)] += counted

    def distribution(self) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """Return the gaps that occurred in µs, ascending, and how many tokens came after each (int64)."""
        import numpy as np

        long = sorted(self._long.items())
        if self._counts is None:
            short = counts = np.zeros(0, dtype=np.int64)
        else:
            short = np.flatnonzero(self._counts)
            counts = self._counts[short]
        return (
            np.concatenate([short, np.array([gap for gap, _ in long], dtype=np.int64)]),
            np.concatenate([counts, np.array([count for _, count in long], dtype=np.int64)]),
        )


class EngineSums:
    """Adds up what one engine did (mutable).

    Args:
        sample_us: length of an interval.
        gaps: where times between tokens are counted; engines may share it.
    """

    def __init__(self, sample_us: Micros, gaps: TokenGaps) -> None:
        self._sample_us = sample_us
        self.gaps = gaps
        self._steps = array("q")
        self._runs = array("q")
        self._run_steps = 0
        self._single_gaps = array("q")
        self._moves = array("q")
        self._sums: np.ndarray[Any, Any] | None = None  # a row for each interval

    # Notes

    def moved(self, now_us: Micros, requests: int) -> None:
        """Note that requests were sent to the engine, or (negative) have left it."""
        self._moves.extend((now_us, requests))
        if len(self._moves) >= 2 * _NOTES:
            self._add_moves()

    def steps_ended(self, ended: StepsEnded) -> None:
        """Note steps; in order of time."""
        self._steps.extend(ended)
        if len(self._steps) >= len(StepsEnded._fields) * _NOTES:
            self._add_steps()

    def note(
        self,
        *,
        steps: np.ndarray[Any, Any],
        runs: np.ndarray[Any, Any],
        gaps: np.ndarray[Any, Any],
        moves: np.ndarray[Any, Any],
    ) -> None:
        """Note what was collected elsewhere, in order of time: rows of int64, in columns as the methods here have them.

        Args:
            steps: for `steps_ended`, of which it takes `StepsEnded`.
            runs: for `further_gaps`.
            gaps: for `other_gap`.
            moves: for `moved`.
        """
        self._moves.frombytes(moves.tobytes())
        self._runs.frombytes(runs.tobytes())
        self._single_gaps.frombytes(gaps.tobytes())
        size = len(StepsEnded._fields) * _NOTES
        left = steps.ravel()
        while len(self._steps) + len(left) >= size:  # as many at once as `steps_ended` adds, so that sums round alike
            now, left = left[: size - len(self._steps)], left[size - len(self._steps) :]
            self._steps.frombytes(now.tobytes())
            self._add_steps()
        self._steps.frombytes(left.tobytes())
        self._add_moves()
        self._add_gaps()

    def further_gaps(self, first: int, growth: int, steps: int, tokens: int) -> None:
        """Note that the same requests got a token in each of many steps.

        Args:
            first: duration of the first step, in 2^-32 µs.
            growth: by how much each further one is longer.
            steps: how many.
            tokens: tokens of each.
        """
        self._runs.extend((first, growth, steps, tokens))
        self._run_steps += steps
        if self._run_steps >= _EXPANDED_STEPS:
            self._add_gaps()

    def other_gap(self, gap_us: Micros, tokens: int = 1) -> None:
        """Note tokens that came after another time than those of the same step."""
        self._single_gaps.extend((gap_us, tokens))

    # Sums

    def series(self, ended_us: Micros) -> EngineSeries:
        """Return what was noted up to an instant, with which the last interval ends."""
        import numpy as np

        self._add_steps()
        self._add_moves()
        sample_us = self._sample_us
        count = max(1, -(-ended_us // sample_us))
        sums = self._rows(count)[:count]
        time_us = np.minimum(np.arange(1, count + 1, dtype=np.int64) * sample_us, ended_us)
        span_us = np.maximum(np.diff(time_us, prepend=0), 1)
        present = np.cumsum(sums["moved"])  # at the end of each interval
        present_us = sums["moved_us"] + np.concatenate([[0], present[:-1]]) * sample_us
        present_us[-1] -= present[-1] * (count * sample_us - ended_us)
        with np.errstate(divide="ignore", invalid="ignore"):
            batch_tokens, step_us = sums["tokens"] / sums["steps"], sums["busy_us"] / sums["steps"]
        running = sums["running_us"] / span_us
        return EngineSeries(
            time_us=time_us,
            running=running,
            waiting=np.maximum(present_us / span_us - running, 0.0),
            used_blocks=sums["block_us"] / span_us,
            batch_tokens=batch_tokens,
            step_us=step_us,
            busy_share=np.minimum(sums["busy_us"] / span_us, 1.0),
        )

    def _rows(self, count: int) -> np.ndarray[Any, Any]:
        """Return the sums of at least so many intervals."""
        import numpy as np

        if self._sums is None or len(self._sums) < count:
            names = ("running_us", "block_us", "busy_us", "steps", "tokens")
            kinds = [*((name, np.float64) for name in names), ("moved", np.int64), ("moved_us", np.int64)]
            grown = np.zeros(max(64, 2 * count), dtype=kinds)
            if self._sums is not None:
                grown[: len(self._sums)] = self._sums
            self._sums = grown
        return self._sums

    def _add_moves(self) -> None:
        if not self._moves:
            return
        import numpy as np

        moves = np.array(self._moves, dtype=np.int64).reshape(-1, 2)
        del self._moves[:]
        time_us, change = moves[:, 0], moves[:, 1]
        at = time_us // self._sample_us
        sums = self._rows(int(at.max()) + 1)
        np.add.at(sums["moved"], at, change)
        np.add.at(sums["moved_us"], at, change * ((at + 1) * self._sample_us - time_us))

    def _add_steps(self) -> None:
        self._add_gaps()
        if not self._steps:
            return
        import numpy as np

        notes = np.array(self._steps, dtype=np.int64).reshape(-1, len(StepsEnded._fields))
        del self._steps[:]
        ended = StepsEnded(*notes.T)
        start_us, length_us = ended.start_us, ended.end_us - ended.start_us
        first = int(notes[0, 0]) // self._sample_us
        last = max(first + 1, -(-int(notes[-1, 1]) // self._sample_us))
        grid_us = np.arange(first, last + 1, dtype=np.int64) * self._sample_us
        at = np.maximum(np.searchsorted(start_us, grid_us, side="right") - 1, 0)
        inside_us = np.clip(grid_us - notes[at, 0], 0, length_us[at])  # type: ignore[index]
        share = np.where(length_us[at] > 0, inside_us / np.maximum(length_us[at], 1), 1.0)  # type: ignore[index]
        share[grid_us < notes[at, 0]] = 0.0

        def by_interval(amounts: Any, shares: Any = share) -> np.ndarray[Any, Any]:
            """Return amounts that are spread evenly over their notes."""
            before = np.concatenate([[0], np.cumsum(amounts)])[at]
            return np.diff(before + amounts[at] * shares)

        sums = self._rows(last)[first:last]
        sums["running_us"] += by_interval(ended.running * length_us)
        sums["busy_us"] += by_interval(length_us)
        sums["steps"] += by_interval(ended.steps)
        sums["tokens"] += by_interval(ended.tokens)
        growth = ended.last_used_blocks - ended.used_blocks
        sums["block_us"] += by_interval(ended.used_blocks * length_us)
        sums["block_us"] += by_interval(growth * length_us / 2, share * share)
        counted = np.asarray(ended.gaps) > 0
        self.gaps.add(np.asarray(ended.gap_us)[counted], np.asarray(ended.gaps)[counted])

    def _add_gaps(self) -> None:
        import numpy as np

        if self._runs:
            first, growth, steps, tokens = np.array(self._runs, dtype=np.int64).reshape(-1, 4).T
            del self._runs[:]
            self._run_steps = 0
            which = np.repeat(np.arange(len(steps)), steps)
            index = np.arange(len(which)) - np.repeat(np.cumsum(steps) - steps, steps)
            half = 1 << (_TICK_BITS - 1)
            self.gaps.add((first[which] + growth[which] * index + half) >> _TICK_BITS, tokens[which])
        if self._single_gaps:
            gap_us, tokens = np.array(self._single_gaps, dtype=np.int64).reshape(-1, 2).T
            del self._single_gaps[:]
            self.gaps.add(gap_us, tokens)
