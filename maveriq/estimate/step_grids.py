"""The times of a step on grids of sizes.

`StepModel` answers from them in Python, `maveriq.estimate.compiled_step` in compiled code, with the same results.
"""

from __future__ import annotations

from bisect import bisect_right
from typing import NamedTuple

import numpy as np

from maveriq.estimate.log_grid import Array


class StepGrids(NamedTuple):
    """Times of the parts of a step in µs. Between grid points they are linear along each axis, and beyond the last.

    Args:
        tokens: tokens of a step; increasing, as all axes.
        tokens_us: all but attention and output, by tokens.
        sequences: sequences.
        context: tokens that a sequence attends to.
        decode_us: attention of decoding sequences, by sequences and mean context.
        mixed_decode_us: the same in a step that also holds chunks.
        chunk: tokens of a chunk.
        past: tokens before it.
        prefill_us: what attention of a chunk adds beside others, by its tokens and those before it.
        prefill_lead_us: what it takes longer alone, because it does not fill the GPU; the most of any chunk counts.
        head_us: the output and the choice of a token, by sequences; zeros where another stage computes them.
    """

    tokens: Array
    tokens_us: Array
    sequences: Array
    context: Array
    decode_us: Array
    mixed_decode_us: Array
    chunk: Array
    past: Array
    prefill_us: Array
    prefill_lead_us: Array
    head_us: Array

    def packed(self) -> Array:
        """Return all in one array, which costs compiled code less to pass on than many.

        First the lengths of the axes (tokens, sequences, context, chunk, past), then the axes, then the times: by
        tokens, of the output, of decoding, of mixed decoding, of prefill and of its lead.
        """
        axes = (self.tokens, self.sequences, self.context, self.chunk, self.past)
        tables = (
            self.tokens_us, self.head_us, self.decode_us, self.mixed_decode_us, self.prefill_us, self.prefill_lead_us,
        )  # fmt: skip
        first = np.asarray([len(axis) for axis in axes], dtype=np.float64)
        return np.concatenate([first, *axes, *(table.ravel() for table in tables)])


class Line:
    """A function of one size, linear between grid points and beyond the last."""

    __slots__ = ("_slopes", "_values", "_xs")

    def __init__(self, xs: Array, values: Array) -> None:
        self._xs: list[float] = xs.tolist()
        self._values: list[float] = values.tolist()
        self._slopes: list[float] = ((values[1:] - values[:-1]) / (xs[1:] - xs[:-1])).tolist()

    def at(self, x: float) -> float:
        """Return the value at a size."""
        cell = bisect_right(self._xs, x) - 1
        if not 0 <= cell < len(self._slopes):
            cell = 0 if cell < 0 else len(self._slopes) - 1
        return self._values[cell] + self._slopes[cell] * (x - self._xs[cell])


class Surface:
    """A function of two sizes, linear along each between grid points and beyond the last."""

    __slots__ = ("_rows", "_xs")

    def __init__(self, xs: Array, ys: Array, values: Array) -> None:
        self._xs: list[float] = xs.tolist()
        self._rows = [Line(ys, row) for row in values]

    def at(self, x: float, y: float) -> float:
        """Return the value at two sizes."""
        cell = min(max(bisect_right(self._xs, x) - 1, 0), len(self._xs) - 2)
        share = (x - self._xs[cell]) / (self._xs[cell + 1] - self._xs[cell])
        return (1 - share) * self._rows[cell].at(y) + share * self._rows[cell + 1].at(y)


class SurfacePair:
    """Two functions of the same two sizes, which are looked up once; each is as `Surface` has it."""

    __slots__ = ("_first", "_second", "_xs", "_ys")

    def __init__(self, xs: Array, ys: Array, first: Array, second: Array) -> None:
        self._xs: list[float] = xs.tolist()
        self._ys: list[float] = ys.tolist()
        self._first = _values_and_slopes(ys, first)
        self._second = _values_and_slopes(ys, second)

    def at(self, x: float, y: float) -> tuple[float, float]:
        """Return both values at two sizes."""
        xs, ys = self._xs, self._ys
        row = min(max(bisect_right(xs, x) - 1, 0), len(xs) - 2)
        column = min(max(bisect_right(ys, y) - 1, 0), len(ys) - 2)
        share = (x - xs[row]) / (xs[row + 1] - xs[row])
        rest, beyond = 1 - share, y - ys[column]
        (low, low_slope), (high, high_slope) = self._first[row][column], self._first[row + 1][column]
        first = rest * (low + low_slope * beyond) + share * (high + high_slope * beyond)
        (low, low_slope), (high, high_slope) = self._second[row][column], self._second[row + 1][column]
        return first, rest * (low + low_slope * beyond) + share * (high + high_slope * beyond)


def _values_and_slopes(ys: Array, values: Array) -> list[list[tuple[float, float]]]:
    """Return for each row and each cell along it the value at its start, and the slope."""
    slopes = (values[:, 1:] - values[:, :-1]) / (ys[1:] - ys[:-1])
    return [
        list(zip(starts, along, strict=True))
        for starts, along in zip(values[:, :-1].tolist(), slopes.tolist(), strict=True)
    ]
