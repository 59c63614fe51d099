"""Fewer points that show the same: distributions at quantiles, levels over time by their extremes, means over time.

The number of points is bounded whatever the run's size. Nothing is left out in silence: a distribution is exact at each
of its points, and a level shows the least and the most within each part of the time.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

Array: TypeAlias = npt.NDArray[Any]

PARTS = 400
"""Parts of the time in which a level is shown by its extremes: about one for each two pixels."""

_EXACT = 250
_SHARES = np.unique(np.concatenate([np.linspace(0, 1, 201), np.linspace(0.99, 1, 21), [0.9995, 0.9999]]))


def distribution(values: Array, counts: Array | None = None) -> tuple[Array, Array]:
    """Return points (value, share of values up to it) of a distribution, exact at each.

    Args:
        values: in any order.
        counts: how often each occurs; None for once.

    Returns:
        Ascending values and shares: all of up to 250 distinct values, else those at some 220 quantiles: each 0.5 %, and
        finer in the last percent.
    """
    if not len(values):
        return np.zeros(0), np.zeros(0)
    distinct, at = np.unique(values, return_inverse=True)
    totals = np.cumsum(np.bincount(at, weights=counts))
    shares = totals / totals[-1]
    if len(distinct) <= _EXACT:
        return distinct, shares
    chosen = np.unique(np.minimum(np.searchsorted(shares, _SHARES - 1e-12), len(distinct) - 1))
    return distinct[chosen], shares[chosen]


def level_over_time(starts: Array, ends: Array, until: float, *, parts: int = PARTS) -> tuple[Array, Array, Array]:
    """Return how many intervals are open over time, as the least and the most in each part of the time.

    Args:
        starts: when each interval opens.
        ends: when each closes; beyond `until` if it does not.
        until: the end of the time, which begins at 0.
        parts: into how many equal parts the time is cut.

    Returns:
        When each part begins, with `until` last; the least in each, and the most, with the last value repeated.
    """
    opened, closed = np.sort(starts), np.sort(ends)
    edges = np.linspace(0, max(until, 1e-9), parts + 1)
    times = np.unique(np.concatenate([opened, closed]))
    levels = np.searchsorted(opened, times, side="right") - np.searchsorted(closed, times, side="right")
    levels = np.concatenate([[0], levels, [0]])
    first = np.searchsorted(times, edges[:-1], side="right")
    last = np.searchsorted(times, edges[1:], side="left") + 1
    bounds = np.stack([first, np.maximum(last, first + 1)], axis=1).ravel()
    low, high = np.minimum.reduceat(levels, bounds)[::2], np.maximum.reduceat(levels, bounds)[::2]
    return edges, np.append(low, low[-1]), np.append(high, high[-1])


def by_part(times: Array, until: float, parts: int) -> Array:
    """Return the number of the part of the time, from 0, in which each instant lies."""
    part: Array = np.clip((np.asarray(times) * parts / max(until, 1e-9)).astype(np.int64), 0, parts - 1)
    return part


def percentiles_over_time(
    times: Array, values: Array, until: float, percentiles: tuple[float, ...], *, parts: int
) -> tuple[Array, list[Array]]:
    """Return percentiles of the values in each part of the time.

    Returns:
        The middle of each part; for each percentile its values, NaN for a part without one.
    """
    part = by_part(times, until, parts)
    order = np.lexsort((values, part))
    ordered, bounds = np.asarray(values)[order], np.searchsorted(part[order], np.arange(parts + 1))
    counts = np.diff(bounds)
    middles = (np.arange(parts) + 0.5) * until / parts
    if not len(ordered):
        return middles, [np.full(parts, np.nan) for _ in percentiles]
    found = []
    for percentile in percentiles:
        rank = bounds[:-1] + percentile / 100 * np.maximum(counts - 1, 0)
        below = np.minimum(np.floor(rank).astype(np.int64), len(ordered) - 1)
        above = np.minimum(below + 1, np.maximum(bounds[1:] - 1, 0))
        value = ordered[below] + (ordered[np.maximum(above, below)] - ordered[below]) * (rank - np.floor(rank))
        found.append(np.where(counts > 0, value, np.nan))
    return middles, found


def means_over_spans(values: Array, spans: Array, groups: Array, count: int) -> Array:
    """Return the means of values in each group, weighted by their spans of time; NaN for a group without any."""
    known = np.isfinite(values)
    weights = np.where(known, spans, 0.0)
    totals = np.bincount(groups, weights=weights, minlength=count)
    sums = np.bincount(groups, weights=np.where(known, values, 0.0) * weights, minlength=count)
    with np.errstate(invalid="ignore", divide="ignore"):
        means: Array = sums / totals
    return means
