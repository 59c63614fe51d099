"""Fits the corrections of `maveriq.estimate.log_grid.LogGrid` to measured times."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import sparse
from scipy.sparse import linalg

from maveriq.estimate.log_grid import Array, LogGrid, corners

_ITERATIONS = 4
_OUTLIER = 0.1
_WEAKEST_PULL = 1e-3


def fit_log_grid(
    axes: Sequence[Array],
    sizes: Sequence[Array],
    log_ratios: Array,
    *,
    smoothness: Sequence[float],
    pull: float = _WEAKEST_PULL,
) -> LogGrid:
    """Fit a grid to measured ratios by weighted least squares.

    The second differences of the grid along each axis are kept small, so that grid points without measurements follow
    their neighbours. Ratios off by more than about 10 % count less (soft L1), since single kernels stand out.

    Args:
        axes: sizes at the grid points of each axis, increasing; at least two each.
        sizes: for each axis, the size of each measurement.
        log_ratios: natural logarithm of measured over computed time.
        smoothness: weight of the second differences along each axis, in measurements.
        pull: weight of the pull to no correction at each grid point, in measurements. It must not be 0, or grid points
            far from measurements have no unique value.
    """
    shape = tuple(len(axis) for axis in axes)
    design = _design(axes, sizes, shape)
    penalty = _penalty(shape, smoothness, pull)
    penalty = penalty.T @ penalty
    weights = np.ones(len(log_ratios))
    grid = np.zeros(design.shape[1])
    for _ in range(_ITERATIONS):
        normal = design.T @ sparse.diags_array(weights) @ design + penalty
        grid = linalg.spsolve(normal.tocsc(), design.T @ (weights * log_ratios))
        weights = 1 / np.sqrt(1 + ((log_ratios - design @ grid) / _OUTLIER) ** 2)
    return LogGrid(tuple(axes), grid.reshape(shape))


def _design(axes: Sequence[Array], sizes: Sequence[Array], shape: tuple[int, ...]) -> Any:
    """Return the matrix that interpolates the flattened grid at each measurement."""
    count = len(sizes[0])
    rows, columns, values = [], [], []
    for index, weight in corners(axes, sizes):
        rows.append(np.arange(count))
        columns.append(np.ravel_multi_index(index, shape))
        values.append(weight)
    entries = (np.concatenate(values), (np.concatenate(rows), np.concatenate(columns)))
    return sparse.csr_array(entries, shape=(count, int(np.prod(shape))))


def _penalty(shape: tuple[int, ...], smoothness: Sequence[float], pull: float) -> Any:
    """Return the matrix of second differences along each axis, and of the pull to zero."""
    points = np.arange(np.prod(shape)).reshape(shape)
    blocks = [pull * sparse.eye_array(points.size)]
    for axis, weight in enumerate(smoothness):
        along = np.moveaxis(points, axis, 0)
        terms = ((along[:-1], -0.1), (along[1:], 0.1)) if len(along) == 2 else (
            (along[:-2], 1.0), (along[1:-1], -2.0), (along[2:], 1.0)
        )  # fmt: skip
        rows = np.arange(terms[0][0].size)
        blocks.append(
            sparse.coo_array(
                (
                    np.concatenate([np.full(rows.size, weight * factor) for _, factor in terms]),
                    (np.tile(rows, len(terms)), np.concatenate([where.ravel() for where, _ in terms])),
                ),
                shape=(rows.size, points.size),
            )
        )
    return sparse.vstack(blocks).tocsr()
