"""Fitting what busy neighbours cost, on recorded requests that had some."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from maveriq.estimate.fitting import Array
from maveriq.estimate.recorded import MOST_NEIGHBOURS, RecordedEngine
from maveriq.estimate.served import Crowd

_FIRST_US = (25.0, 4000.0)
_TYPICAL_ERROR = 0.03
_LEAST_CALM = 5  # requests that say how far an engine is off without neighbours


def fit_crowd(engines: Sequence[tuple[RecordedEngine, Array]]) -> Crowd:
    """Return what neighbours cost a token; what nobody had, be it one neighbour or several, costs nothing.

    Args:
        engines: with what each of their requests would take without neighbours, in seconds.
    """
    from scipy.optimize import least_squares

    pairs = [(engine, alone_s * _off(engine, alone_s)) for engine, alone_s in engines if not engine.calm.all()]
    if not pairs:
        return Crowd(layer_us=0.0, turn_us=0.0)
    layers = np.concatenate([np.full(len(alone_s), engine.model.layers) for engine, alone_s in pairs])
    alone_s = np.concatenate([alone_s for _, alone_s in pairs])
    beside = np.concatenate([engine.beside for engine, _ in pairs])
    output_tokens = np.concatenate([engine.output_tokens for engine, _ in pairs])
    logs = np.log(np.concatenate([engine.service_s for engine, _ in pairs]))
    first_us = _FIRST_US if beside[:, 2:].any() else _FIRST_US[:1]

    def costs_us(position: Array) -> tuple[float, float]:
        layer_us, *turn_us = np.exp(position).tolist()
        return layer_us, *(turn_us or [0.0])

    def residuals(position: Array) -> Array:
        layer_us, turn_us = costs_us(position)
        taken_s = crowded_s(alone_s, beside, _waits_s(layers, layer_us, turn_us), output_tokens)
        return np.asarray(np.log(taken_s) - logs)

    found = least_squares(residuals, np.log(first_us), loss="soft_l1", f_scale=_TYPICAL_ERROR, max_nfev=40)
    layer_us, turn_us = (float(f"{value:.4g}") for value in costs_us(found.x))
    return Crowd(layer_us=layer_us, turn_us=turn_us)


def crowded_s(alone_s: Array, beside: Array, waits_s: Array, output_tokens: Array) -> Array:
    """Return what requests take that would take `alone_s`.

    Args:
        alone_s: (requests).
        beside: (requests, neighbours + 1), the share of the service with so many neighbours.
        waits_s: likewise, how much longer a token takes with so many.
        output_tokens: (requests); a service goes through its tokens at an even pace.
    """
    pace = alone_s[:, None] / (alone_s[:, None] + output_tokens[:, None] * waits_s)
    crowded: Array = alone_s / (beside * pace).sum(axis=1)
    return crowded


def _waits_s(layers: Array, layer_us: float, turn_us: float) -> Array:
    neighbours = np.arange(MOST_NEIGHBOURS + 1)
    waits: Array = 1e-6 * (layers[:, None] * layer_us * (neighbours > 0) + turn_us * np.maximum(neighbours - 1, 0))
    return waits


def _off(engine: RecordedEngine, alone_s: Array) -> float:
    """Return how much longer an engine takes without neighbours than it should; that is not theirs to answer for."""
    calm = engine.calm
    return float(np.median(engine.service_s[calm] / alone_s[calm])) if calm.sum() >= _LEAST_CALM else 1.0
