"""Grids of corrections: interpolation, and the fit to scattered measurements."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from maveriq.calibration.log_grid_fit import fit_log_grid
from maveriq.estimate.log_grid import LogGrid, corners

AXES = (np.asarray([1.0, 4.0, 64.0]), np.asarray([2.0, 1000.0]))
GRID = LogGrid(AXES, np.asarray([[0.0, 1.0], [0.5, -1.0], [2.0, 0.25]]))


def test_grid_points_are_answered_as_stored() -> None:
    for row, first in enumerate(AXES[0]):
        for column, second in enumerate(AXES[1]):
            assert GRID.ratio(first, second) == pytest.approx(np.exp(GRID.log_ratios[row, column]))


def test_between_two_points_the_logarithm_is_linear_in_the_logarithm() -> None:
    assert GRID.ratio(2.0, 2.0) == pytest.approx(np.exp(0.25))  # 2 is halfway from 1 to 4


def test_beyond_the_ends_the_ratio_is_that_of_the_end() -> None:
    assert GRID.ratio(1e-6, 1.0) == pytest.approx(np.exp(0.0))
    assert GRID.ratio(1e9, 1e9) == pytest.approx(np.exp(0.25))


@given(st.floats(1e-3, 1e6), st.floats(1e-3, 1e6))
def test_the_weights_of_a_case_are_shares(first: float, second: float) -> None:
    weights = [float(weight) for _, weight in corners(AXES, (first, second))]
    assert min(weights) >= 0
    assert sum(weights) == pytest.approx(1)


def test_sizes_broadcast() -> None:
    assert GRID.ratio(np.asarray([[1.0], [4.0]]), np.asarray([2.0, 10.0, 1000.0])).shape == (2, 3)


def test_a_fit_finds_the_grid_that_made_the_measurements() -> None:
    random = np.random.default_rng(7)
    sizes = [np.exp(random.uniform(np.log(axis[0]), np.log(axis[-1]), 4000)) for axis in AXES]
    measured = np.log(GRID.ratio(*sizes)) + random.normal(0, 0.02, 4000)
    fitted = fit_log_grid(AXES, sizes, measured, smoothness=(0.01, 0.01))
    assert np.abs(fitted.log_ratios - GRID.log_ratios).max() < 0.02


def test_a_few_wild_measurements_hardly_move_a_fit() -> None:
    random = np.random.default_rng(7)
    sizes = [np.exp(random.uniform(np.log(axis[0]), np.log(axis[-1]), 4000)) for axis in AXES]
    measured = np.log(GRID.ratio(*sizes))
    measured[::40] += 3.0
    fitted = fit_log_grid(AXES, sizes, measured, smoothness=(0.01, 0.01))
    assert np.abs(fitted.log_ratios - GRID.log_ratios).max() < 0.1


def test_grid_points_without_measurements_follow_those_beside() -> None:
    axes = (np.asarray([1.0, 10.0, 100.0, 1000.0]),)
    sizes = [np.asarray([1.0, 10.0, 100.0] * 50)]
    fitted = fit_log_grid(axes, sizes, np.asarray([0.0, 0.1, 0.2] * 50), smoothness=(1.0,))
    assert fitted.log_ratios[3] == pytest.approx(0.3, abs=0.02)
