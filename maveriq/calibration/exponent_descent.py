"""Exponents of the paper's formula (SPEC 3) by gradient descent, as they were published: Adam on the mean APE.

`maveriq.calibration.fitting.fit_exponents` is our own fit, by robust least squares. This one shows what the published
procedure gives: few sampled points a model, and an error that every row adds to alike.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from typing import Any, TypeAlias

import numpy as np

from maveriq.estimate.fingerprints import Exponents

Array: TypeAlias = np.ndarray[Any, np.dtype[np.float64]]

START = Exponents(a=0.5, b=0.5, c=0.5, d=0.5)
_LEAST, _MOST = 1e-6, 3.0  # the least is that of the published table
_STEPS, _RATE = 3000, 0.01
_MOMENTUM, _SQUARES, _TINY = 0.9, 0.999, 1e-8


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """A measured latency of a whole model, and what fingerprints say of it.

    Args:
        tp: tensor-parallel degree.
        pp: pipeline-parallel degree.
        single_s: estimated latency on one GPU, L(1,1).
        beyond_half_s: what TP 2 takes beyond half of it, max(0, L(2,1) - L(1,1) / 2).
        latency_s: the measured latency.
    """

    tp: int
    pp: int
    single_s: float
    beyond_half_s: float
    latency_s: float


class Points:
    """Points as arrays."""

    def __init__(self, points: Sequence[Point]) -> None:
        self._tp, self._pp, self._single, self._beyond, self._measured = np.array(
            [astuple(point) for point in points], dtype=float
        ).T

    def latency_s(self, position: Array) -> Array:
        """Return the formula's latency of every point; `position` is a, b, c, d."""
        a, b, c, d = position
        pipeline = np.where(self._pp > 1, self._power(self._pp - 1, d), 0.0) * self._single * (1 - 2.0**-a)
        return np.asarray(
            self._single / (self._tp * self._pp**a)
            + np.where(self._tp > 1, self._power(self._tp - 1, b), 0.0) / self._pp**c * self._beyond
            + pipeline
        )

    def mean_error(self, position: Array) -> float:
        """Return the mean absolute percentage error as a fraction."""
        return float(np.mean(np.abs(self.latency_s(position) / self._measured - 1)))

    def gradient(self, position: Array) -> Array:
        """Return the gradient of `mean_error` by a, b, c and d."""
        a, b, c, d = position
        sign = np.sign(self.latency_s(position) - self._measured) / self._measured / len(self._measured)
        tensor = np.where(self._tp > 1, self._power(self._tp - 1, b), 0.0) / self._pp**c * self._beyond
        stages = np.where(self._pp > 1, self._power(self._pp - 1, d), 0.0) * self._single
        by_a = stages * math.log(2) * 2.0**-a - self._single * np.log(self._pp) / (self._tp * self._pp**a)
        by_b = tensor * np.log(np.maximum(self._tp - 1, 1))
        by_c = -tensor * np.log(self._pp)
        by_d = stages * (1 - 2.0**-a) * np.log(np.maximum(self._pp - 1, 1))
        return np.array([float(sign @ part) for part in (by_a, by_b, by_c, by_d)])

    @staticmethod
    def _power(base: Array, exponent: float) -> Array:
        return np.asarray(np.maximum(base, 0.0) ** exponent)


def descend(points: Sequence[Point], start: Exponents = START, *, steps: int = _STEPS) -> Exponents:
    """Return exponents with a small mean APE over the points, by Adam; the best position on the way counts.

    Args:
        points: at least one.
        start: where the descent starts.
        steps: how many it takes; the step size falls to zero.
    """
    table, position = Points(points), np.array(astuple(start))
    mean, squares = np.zeros(4), np.zeros(4)
    best, least = position, table.mean_error(position)
    for step in range(1, steps + 1):
        slope = table.gradient(position)
        mean = _MOMENTUM * mean + (1 - _MOMENTUM) * slope
        squares = _SQUARES * squares + (1 - _SQUARES) * slope**2
        size = _RATE * (1 - step / (steps + 1))
        move = mean / (1 - _MOMENTUM**step) / (np.sqrt(squares / (1 - _SQUARES**step)) + _TINY)
        position = np.clip(position - size * move, _LEAST, _MOST)
        error = table.mean_error(position)
        if error < least:
            best, least = position, error
    a, b, c, d = (round(float(value), 6) for value in best)
    return Exponents(a=a, b=b, c=c, d=d)
