"""How long the steps of one engine take, as whole numbers that add up exactly.

A tick is 2^-32 µs. For a number of decoding sequences, the time of a step is linear in the tokens that they attend to,
between the grid points of `StepModel`. The time of many steps, in each of which every sequence has one token more, is
then a formula, and equals the sum of the single steps to the last tick.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import pairwise
from typing import TypeAlias

from maveriq.estimate.engine_presets import EnginePreset
from maveriq.estimate.step_time import Chunk, StepModel
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


class StepTimer:
    """The time of the steps of one engine, from one step to the next.

    Args:
        steps: time of the operators.
        preset: what the engine's process adds.
        layers: layers of the model.
    """

    def __init__(self, steps: StepModel, preset: EnginePreset, *, layers: int) -> None:
        self._steps = steps
        self._preset = preset
        self._layers = layers
        self._lines: dict[int, _DecodeLine] = {}

    def step(self, decodes: int, context_tokens: int, chunks: Sequence[tuple[int, int]] = ()) -> Ticks:
        """Return the time of a step.

        Args:
            decodes: sequences that decode.
            context_tokens: tokens that these attend to, all sequences together.
            chunks: `(tokens, past)` of each chunk of a prompt.
        """
        if not chunks:
            return self._line(decodes).at(context_tokens)
        gpu_us = self._steps.gpu_us(
            decodes=decodes,
            context_tokens=context_tokens,
            chunks=[Chunk(tokens=tokens, past=past) for tokens, past in chunks],
        )
        return ticks(self._step_us(gpu_us, decodes + len(chunks), has_prefill=True))

    def decode_steps(self, decodes: int, context_tokens: int, steps: int) -> Ticks:
        """Return the time of many steps that only decode.

        Args:
            decodes: sequences of each.
            context_tokens: tokens that these attend to in the first step; each further step has `decodes` more.
            steps: how many; 0 take no time.
        """
        return self._line(decodes).sum(context_tokens, steps)

    def _line(self, decodes: int) -> _DecodeLine:
        line = self._lines.get(decodes)
        if line is None:
            contexts = [decodes * context for context in self._steps.contexts]
            times = [
                ticks(self._step_us(self._steps.gpu_us(decodes=decodes, context_tokens=context), decodes))
                for context in contexts
            ]
            line = self._lines[decodes] = _DecodeLine(decodes, contexts, times)
        return line

    def _step_us(self, gpu_us: float, sequences: int, *, has_prefill: bool = False) -> float:
        return float(
            self._preset.step_time_us(gpu_us, sequences=sequences, has_prefill=has_prefill, layers=self._layers)
        )


class _DecodeLine:
    """The time of a step of so many decoding sequences, by the tokens that they attend to together.

    Args:
        decodes: sequences.
        contexts: grid points, ascending; at least two. Beyond the last, the last slope goes on.
        times: ticks at these.
    """

    __slots__ = ("_contexts", "_decodes", "_slopes", "_times")

    def __init__(self, decodes: int, contexts: Sequence[int], times: Sequence[Ticks]) -> None:
        self._decodes = decodes
        self._contexts = contexts
        self._times = times
        points = zip(pairwise(contexts), pairwise(times), strict=True)
        self._slopes = [(high - low) // (right - left) for (left, right), (low, high) in points]

    def at(self, context_tokens: int) -> Ticks:
        cell = self._cell(context_tokens)
        return self._times[cell] + self._slopes[cell] * (context_tokens - self._contexts[cell])

    def sum(self, context_tokens: int, steps: int) -> Ticks:
        total, last = 0, len(self._slopes) - 1
        while steps > 0:
            cell = self._cell(context_tokens)
            here = steps
            if cell < last:  # steps until the context leaves the cell
                here = min(steps, -(-(self._contexts[cell + 1] - context_tokens) // self._decodes))
            past = here * (context_tokens - self._contexts[cell]) + self._decodes * (here * (here - 1) // 2)
            total += here * self._times[cell] + self._slopes[cell] * past
            context_tokens += here * self._decodes
            steps -= here
        return total

    def _cell(self, context_tokens: int) -> int:
        return min(max(bisect_right(self._contexts, context_tokens) - 1, 0), len(self._slopes) - 1)
