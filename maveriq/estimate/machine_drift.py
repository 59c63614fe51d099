"""How much slower than usual a machine was at each moment of a measurement, and samples without that.

A machine that is not alone changes its speed: guests of the same host, clocks and temperature slow everything down for
seconds. Batches that are measured in turns show it, because what slows one of them slows its neighbours in time. The
drift at a sample is the weighted median of what the samples of other batches, next to it in time, took beyond their
own medians. It is taken off as far as it explains the samples, so that on a steady machine nothing is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from maveriq.estimate.log_grid import Array

_REACH_S = 1.0  # over which the weight of a neighbour falls to a third
_WINDOW = 8  # on either side
_ROUNDS = 4


class TimedSamples(NamedTuple):
    """The samples of a batch: when each ended, in seconds since any moment, and the seconds that it took."""

    at_s: tuple[float, ...]
    seconds: tuple[float, ...]


def machine_drift(batches: Sequence[TimedSamples]) -> list[Array]:
    """Return for each sample the logarithm of how much slower than usual the machine was; its median is 0.

    Args:
        batches: that were measured in one session, on one machine.
    """
    counts = [len(batch.at_s) for batch in batches]
    if len(batches) < 2:
        return [np.zeros(count) for count in counts]
    batch_of = np.repeat(np.arange(len(batches)), counts)
    at_s = np.concatenate([batch.at_s for batch in batches])
    logs = np.log(np.concatenate([batch.seconds for batch in batches]))
    order = np.argsort(at_s, kind="stable")
    found = np.empty(len(order))
    found[order] = _in_order(at_s[order], logs[order], batch_of[order])
    return np.split(found, np.cumsum(counts)[:-1])


def _in_order(at_s: Array, logs: Array, batch_of: NDArray[np.int64]) -> Array:
    """Return the drift at samples in the order of their time."""
    steps = np.array([step for step in range(-_WINDOW, _WINDOW + 1) if step])
    beside = np.arange(len(logs))[:, None] + steps
    inside = (beside >= 0) & (beside < len(logs))
    beside = np.clip(beside, 0, len(logs) - 1)
    others = inside & (batch_of[beside] != batch_of[:, None])
    weights = np.where(others, np.exp(-np.abs(at_s[beside] - at_s[:, None]) / _REACH_S), 0.0)
    drift = np.zeros(len(logs))
    for _ in range(_ROUNDS):
        beyond = logs - _medians(logs - drift, batch_of)
        drift = _weighted_medians(beyond[beside], weights)
        drift -= np.median(drift)
    alone = logs - _medians(logs, batch_of)
    explained = float(alone @ drift) / max(float(drift @ drift), 1e-12)
    return np.asarray(drift * np.clip(explained, 0.0, 1.0))


def _medians(values: Array, batch_of: NDArray[np.int64]) -> Array:
    """Return for each value the median of its batch."""
    medians = np.array([np.median(values[batch_of == batch]) for batch in range(batch_of.max() + 1)])
    return np.asarray(medians[batch_of])


def _weighted_medians(values: Array, weights: Array) -> Array:
    """Return the weighted median of each row; 0 of a row without weight."""
    order = np.argsort(values, axis=1)
    sums = np.cumsum(np.take_along_axis(weights, order, axis=1), axis=1)
    middle = np.argmax(sums >= sums[:, -1:] / 2, axis=1)
    found = np.take_along_axis(values, order, axis=1)[np.arange(len(values)), middle]
    return np.where(sums[:, -1] > 0, found, 0.0)
