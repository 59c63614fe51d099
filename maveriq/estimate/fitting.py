"""Fitting the calibrated estimator: robust least squares on the logarithm of latency."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from typing import Any

import msgspec
import numpy as np

from maveriq.embedded import data_path
from maveriq.estimate.calibration import Calibration, work
from maveriq.estimate.physics import Law, Work, latency_s
from maveriq.estimate.samples import Sample
from maveriq.tables import read_toml

Array = np.ndarray[Any, np.dtype[np.float64]]

_TYPICAL_ERROR = 0.03  # beyond it a row pulls with a constant force, not in proportion
_WIDEST = 4.0  # fitted figures stay within this factor of where the fit begins
_SPEEDS = tuple(2.0**power for power in range(-4, 7))
_TIMES = tuple(2.0**power for power in range(-5, 6))
_PULL = 0.02  # towards where the fit begins, for figures that no row speaks of


class Table:
    """Samples as arrays, to be evaluated at once under any calibration."""

    def __init__(self, samples: Sequence[Sample]) -> None:
        self.samples = samples
        self.latency_s = np.array([one.measured.latency_s for one in samples])
        self.influence = np.array([one.influence for one in samples])
        self._output_tokens = np.array([one.measured.output_tokens for one in samples])
        self._work = stacked(Work, [_work(one) for one in samples])
        keys = [(one.measured.configuration.weights, one.measured.configuration.tp) for one in samples]
        self._kinds = list(dict.fromkeys(keys))
        self._kind_of = np.array([self._kinds.index(key) for key in keys])

    def predict(self, calibration: Calibration, slowness: Array | float = 1.0) -> Array:
        """Return the latency of every sample in seconds."""
        law = picked(stacked(Law, [calibration.law(weights, tp) for weights, tp in self._kinds]), self._kind_of)
        predicted: Array = latency_s(replace(self._work, slowness=slowness), law, self._output_tokens)
        return predicted


def _work(sample: Sample) -> Work:
    asked = sample.measured.configuration
    return work(
        sample.model, asked.kv, tp=asked.tp, pp=asked.pp, batch=asked.batch_size, prompt_tokens=sample.prompt_tokens
    )


def stacked(shape: type[Any], items: Sequence[Any]) -> Any:
    """Return one `Work` or `Law` of arrays, made of many of numbers."""
    columns = {one.name: np.array([getattr(item, one.name) for item in items], dtype=float) for one in fields(shape)}
    return shape(**columns)


def picked(laws: Law, index: np.ndarray[Any, np.dtype[np.int64]]) -> Law:
    """Return the laws of an index, which may name one several times."""
    return Law(**{one.name: getattr(laws, one.name)[index] for one in fields(Law)})


def fit_calibration(samples: Sequence[Sample], start: Calibration) -> Calibration:
    """Return the calibration under which the samples' latencies are most likely.

    The logarithm of every fitted figure is free within bounds around the start; residuals are
    logarithms of predicted over measured latency, and large ones count less (soft L1).

    Args:
        samples: rows to fit to.
        start: where to begin; its limits, memory and margins are kept.
    """
    from scipy.optimize import least_squares

    table, figures = Table(samples), _Figures(start)
    logs = np.log(table.latency_s)

    def residuals(position: Array) -> Array:
        off = table.influence * (np.log(table.predict(figures.at(position))) - logs)
        return np.concatenate([off, _PULL * (position - figures.start)])

    found = least_squares(
        residuals, figures.start, bounds=figures.bounds, loss="soft_l1", f_scale=_TYPICAL_ERROR, max_nfev=80
    )
    return figures.at(found.x, digits=5)


def start_calibration() -> Calibration:
    """Return where a fit to GPUs like the A6000 begins."""
    return read_toml(data_path("calibration-start.toml"), Calibration, what="start of a calibration")


def start_for(samples: Sequence[Sample], start: Calibration) -> Calibration:
    """Return a start for another GPU: all speeds, and all fixed times, scaled to what explains the samples best.

    Fitted figures stay within a factor of the start, which would not reach from one kind of GPU to
    another; these two factors do.
    """
    table = Table(samples)
    logs = np.log(table.latency_s)

    def cost(scaled: Calibration) -> float:
        off = table.influence * (np.log(table.predict(scaled)) - logs) / _TYPICAL_ERROR
        return float(np.sum(np.sqrt(1 + off**2)))

    scaled = (_scaled(start, speed, time) for speed in _SPEEDS for time in _TIMES)
    return min([start, *scaled], key=cost)


def _scaled(start: Calibration, speed: float, time: float) -> Calibration:
    """Return a calibration whose memory and arithmetic are faster, and whose fixed times are longer, by factors."""
    tables: dict[str, Any] = msgspec.to_builtins(start)
    for table, key in _places(tables):
        if key in ("bandwidth_gb_s", "prefill_tflops", "decode_tflops"):
            table[key] *= speed
        elif key.endswith(("_us", "_ms")):
            table[key] *= time
    return msgspec.convert(tables, Calibration)


class _Figures:
    """The fitted figures of a calibration as a vector of logarithms."""

    def __init__(self, start: Calibration) -> None:
        self._tables: dict[str, Any] = msgspec.to_builtins(start)
        self._places = list(_places(self._tables))
        self.start: Array = np.log([table[key] for table, key in self._places])
        lower, upper = self.start - np.log(_WIDEST), self.start + np.log(_WIDEST)
        keys = [key for _, key in self._places]
        lower[keys.index("overlap")] = 0.0
        self.bounds = lower, upper

    def at(self, position: Array, digits: int = 17) -> Calibration:
        """Return the calibration at a position, with so many significant digits."""
        for (table, key), log in zip(self._places, position, strict=True):
            table[key] = float(f"{np.exp(log):.{digits}g}")
        return msgspec.convert(self._tables, Calibration)


_FIXED = ("trust", "memory", "margins", "served")


def _places(table: dict[str, Any]) -> Iterator[tuple[dict[str, Any], str]]:
    for key, value in table.items():
        if isinstance(value, dict) and key not in _FIXED:
            yield from _places(value)
        elif isinstance(value, float) and key not in _FIXED and not key.endswith("limit_mb"):
            yield table, key


def trust_of(residual: Array) -> Array:
    """Return how much a fit believes each row, 1 to 0, by its logarithmic residual."""
    return np.asarray(1 / np.sqrt(1 + (residual / _TYPICAL_ERROR) ** 2))
