"""A table of corrections to a formula: measured over computed time, on a grid of sizes.

Between grid points the logarithm of the ratio is linear in the logarithm of each size; beyond the ends it is constant.
A formula that is right about bytes and operations, times such a table, follows measured kernels over many orders of
magnitude with a few hundred numbers. `maveriq.calibration.log_grid_fit` fits the tables.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

Array: TypeAlias = npt.NDArray[np.float64]
Sizes: TypeAlias = Any
"""Sizes along one axis: a number, or an array of them; those of all axes broadcast together."""


@dataclass(frozen=True, slots=True, eq=False)
class LogGrid:
    """Corrections on a grid.

    Args:
        axes: the sizes at the grid points of each axis, increasing and positive.
        log_ratios: natural logarithm of measured over computed time, one axis for each size.
    """

    axes: tuple[Array, ...]
    log_ratios: Array

    def ratio(self, *sizes: Sizes) -> Array:
        """Return measured over computed time for these sizes, one argument for each axis."""
        parts = [weight * self.log_ratios[index] for index, weight in corners(self.axes, sizes)]
        return np.asarray(np.exp(sum(parts)))


def corners(axes: Sequence[Array], sizes: Sequence[Sizes]) -> Iterator[tuple[tuple[Any, ...], Array]]:
    """Yield the grid points around each case: their indices and weights. Weights of a case add up to 1."""
    cells = [_cell(axis, np.asarray(size, dtype=np.float64)) for axis, size in zip(axes, sizes, strict=True)]
    for choice in itertools.product((0, 1), repeat=len(axes)):
        weight: Any = 1.0
        for (_, share), upper in zip(cells, choice, strict=True):
            weight = weight * (share if upper else 1 - share)
        yield tuple(low + upper for (low, _), upper in zip(cells, choice, strict=True)), np.asarray(weight)


def _cell(axis: Array, size: Array) -> tuple[Any, Array]:
    """Return the index of the grid point below each size, and how far it lies towards the next, 0 to 1."""
    # `np.clip` takes three times as long on such small arrays.
    low = np.minimum(np.maximum(np.searchsorted(axis, size, side="right") - 1, 0), len(axis) - 2)
    inside = np.minimum(np.maximum(size, axis[0]), axis[-1])
    return low, np.log(inside / axis[low]) / np.log(axis[low + 1] / axis[low])
