"""How long the steps of one engine take, as whole numbers that add up exactly.

A tick is 2^-32 µs. For a number of decoding sequences, the time of a step is linear in the tokens that they attend to,
between the grid points of `GriddedSteps`. The time of many steps, in each of which every sequence has one token more,
is then a formula, and equals the sum of the single steps to the last tick.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import TypeAlias

from maveriq.estimate.engine_presets import EnginePreset
from maveriq.estimate.step_time import GriddedSteps
from maveriq.units import Micros

Ticks: TypeAlias = int
"""A time or a duration in units of 2^-32 µs."""

_BITS = 32


def ticks(time_us: float) -> Ticks:
    """Return a time as ticks, the nearest where it is no whole number of microseconds."""
    return time_us << _BITS if isinstance(time_us, int) else round(time_us * (1 << _BITS))


def micros_after(time: Ticks) -> Micros:
    """Return the first whole microsecond that is not before a time."""
    return -(-time >> _BITS)


def earliest_at(time_us: Micros) -> Ticks:
    """Return the earliest time whose `micros_after` is a whole microsecond."""
    return ((time_us - 1) << _BITS) + 1


class StepTimer:
    """The time of the steps of one engine, from one step to the next.

    Args:
        steps: time of the operators.
        preset: what the engine's process adds.
        layers: layers of the model.
    """

    def __init__(self, steps: GriddedSteps, preset: EnginePreset, *, layers: int) -> None:
        self.steps = steps
        self.preset = preset
        self.layers = layers
        self._lines: dict[int, DecodeLine] = {}

    def step(self, decodes: int, context_tokens: int, chunks: Sequence[tuple[int, int]] = ()) -> Ticks:
        """Return the time of a step.

        Args:
            decodes: sequences that decode.
            context_tokens: tokens that these attend to, all sequences together.
            chunks: `(tokens, past)` of each chunk of a prompt.
        """
        if not chunks:
            line = self._lines.get(decodes) or self.decode_line(decodes)
            return line.at(context_tokens)
        gpu_us = self.steps.gpu_us(decodes=decodes, context_tokens=context_tokens, chunks=chunks)
        return ticks(self._step_us(gpu_us, decodes + len(chunks), has_prefill=True))

    def decode_steps(self, decodes: int, context_tokens: int, steps: int) -> Ticks:
        """Return the time of many steps that only decode; the arguments are those of `DecodeLine.sum`."""
        return self.decode_line(decodes).sum(context_tokens, steps)

    def decode_line(self, decodes: int) -> DecodeLine:
        """Return the time of steps that only decode so many sequences."""
        line = self._lines.get(decodes)
        if line is None:
            contexts = [decodes * context for context in self.steps.contexts]
            times = [
                ticks(self._step_us(self.steps.gpu_us(decodes=decodes, context_tokens=context), decodes))
                for context in contexts
            ]
            line = self._lines[decodes] = DecodeLine(decodes, contexts, times)
        return line

    def _step_us(self, gpu_us: float, sequences: int, *, has_prefill: bool = False) -> float:
        return float(self.preset.step_time_us(gpu_us, sequences=sequences, has_prefill=has_prefill, layers=self.layers))


class DecodeLine:
    """The time of a step of so many decoding sequences, by the tokens that they attend to together.

    Args:
        decodes: sequences.
        contexts: grid points, ascending; at least two. Beyond the last, the last slope goes on.
        times: ticks at these, positive and not decreasing.
    """

    __slots__ = ("_contexts", "_decodes", "_last", "_slopes", "_times")

    def __init__(self, decodes: int, contexts: Sequence[int], times: Sequence[Ticks]) -> None:
        self._decodes = decodes
        self._contexts = contexts
        self._times = times
        points = zip(pairwise(contexts), pairwise(times), strict=True)
        self._slopes = [(high - low) // (right - left) for (left, right), (low, high) in points]
        self._last = len(self._slopes) - 1

    def at(self, context_tokens: int) -> Ticks:
        """Return the time of one step."""
        contexts = self._contexts
        cell = bisect_right(contexts, context_tokens) - 1
        if not 0 <= cell <= self._last:
            cell = 0 if cell < 0 else self._last
        return self._times[cell] + self._slopes[cell] * (context_tokens - contexts[cell])

    def sum(self, context_tokens: int, steps: int) -> Ticks:
        """Return the time of many steps.

        Args:
            context_tokens: tokens that the sequences attend to in the first; in each further one, `decodes` more.
            steps: how many; 0 take no time.
        """
        total, decodes = 0, self._decodes
        while steps > 0:
            cell, here = self._steps_in_cell(context_tokens, steps)
            past = here * (context_tokens - self._contexts[cell]) + decodes * (here * (here - 1) // 2)
            total += here * self._times[cell] + self._slopes[cell] * past
            context_tokens += here * decodes
            steps -= here
        return total

    def pieces(self, context_tokens: int, steps: int) -> Iterator[tuple[Ticks, Ticks, int]]:
        """Yield runs of steps whose times grow evenly: the first time, what each further one has more, and how many.

        The arguments are those of `sum`.
        """
        while steps > 0:
            cell, here = self._steps_in_cell(context_tokens, steps)
            slope = self._slopes[cell]
            yield self._times[cell] + slope * (context_tokens - self._contexts[cell]), slope * self._decodes, here
            context_tokens += here * self._decodes
            steps -= here

    def steps_until(self, context_tokens: int, steps: int, at_least: Ticks) -> tuple[int, Ticks]:
        """Return the first number of steps, at most `steps`, that take `at_least` so long; and how long they take.

        The other arguments are those of `sum`.
        """
        taken, total, decodes = 0, 0, self._decodes
        while taken < steps and total < at_least:
            cell, here = self._steps_in_cell(context_tokens, steps - taken)
            slope = self._slopes[cell]
            first = self._times[cell] + slope * (context_tokens - self._contexts[cell])
            growth = slope * decodes  # from one step to the next
            here, spent = _first_sum(first, growth, here, at_least - total)
            total += spent
            context_tokens += here * decodes
            taken += here
        return taken, total

    def _steps_in_cell(self, context_tokens: int, steps: int) -> tuple[int, int]:
        """Return the cell of the next step, and how many of the next `steps` are in it."""
        contexts, last = self._contexts, self._last
        cell = bisect_right(contexts, context_tokens) - 1
        if cell >= last:
            return last, steps
        if cell < 0:
            cell = 0
        here = -(-(contexts[cell + 1] - context_tokens) // self._decodes)
        return cell, here if here < steps else steps


def _first_sum(first: Ticks, growth: Ticks, most: int, at_least: Ticks) -> tuple[int, Ticks]:
    """Return the first number of terms, from 1 to `most`, whose sum is `at_least` so much; and the sum.

    The terms are `first`, `first + growth`, `first + 2 * growth` and so on. Floating point finds the number but for
    the last digits, and whole numbers settle it.
    """
    linear = first - growth / 2
    root = math.sqrt(max(0.0, linear * linear + 2 * growth * at_least))
    count = min(max(math.ceil(2 * at_least / (linear + root)), 1), most)
    total = count * first + growth * (count * (count - 1) // 2)
    while count < most and total < at_least:
        total += first + count * growth
        count += 1
    while count > 1 and total - (last := first + (count - 1) * growth) >= at_least:
        total -= last
        count -= 1
    return count, total
