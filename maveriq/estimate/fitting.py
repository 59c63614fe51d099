"""Fitting the calibrated estimator: robust least squares on the logarithm of latency."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from maveriq.domain.catalog import shape_of
from maveriq.domain.models import ModelSpec
from maveriq.embedded import data_path
from maveriq.errors import InputError
from maveriq.estimate.calibration import Calibration, work
from maveriq.estimate.evaluate import Measurement, read_measurements
from maveriq.estimate.physics import Law, Work, latency_s
from maveriq.tables import exists, read_toml

Array = np.ndarray[Any, np.dtype[np.float64]]

_TYPICAL_ERROR = 0.03  # beyond it a row pulls with a constant force, not in proportion
_WIDEST = 4.0  # fitted figures stay within this factor of where the fit begins
_PULL = 0.02  # towards where the fit begins, for figures that no row speaks of


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """A measured row, what it says and how much it counts."""

    table: str
    measured: Measurement
    model: ModelSpec
    prompt_tokens: int
    influence: float

    @property
    def is_fingerprint(self) -> bool:
        """Whether it was taken of a model of one or a few layers."""
        return self.table.startswith("fingerprint")


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompts:
    """How many tokens the prompts of long- and short-prompt tables had."""

    long: int = 923
    short: int = 10


LONG_TRUTH, BATCHED_TRUTH = "full_model_long_prompt.csv", "full_model_batched_short_prompt.csv"
UNEVEN, BATCHES = "uneven_pipeline.csv", "batch_scaling.csv"
LONG_FINGERPRINTS, SHORT_FINGERPRINTS = "fingerprint_long_prompt.csv", "fingerprint_short_prompt.csv"
_TABLES = (LONG_TRUTH, BATCHED_TRUTH, UNEVEN, BATCHES, LONG_FINGERPRINTS, SHORT_FINGERPRINTS)
_MOST_BATCH = 128  # beyond it the engine splits a batch, which nothing here describes


def read_samples(folder: Path, prompts: Prompts) -> list[Sample]:
    """Read all tables of a data folder that a fit can use; fingerprints must be there, and ground truth.

    Raises:
        InputError: a needed table is missing, or one is wrong.
    """
    for needed in (LONG_TRUTH, LONG_FINGERPRINTS):
        if not exists(folder / needed):
            raise InputError(f"data folder {str(folder)!r} has no {needed}; a fit needs it")
    return [
        Sample(
            table=table,
            measured=measured,
            model=replace(model, layers=measured.layers),
            prompt_tokens=prompts.long if table in (LONG_TRUTH, LONG_FINGERPRINTS) else prompts.short,
            influence=_influence(table, measured),
        )
        for table in _TABLES
        if exists(folder / table)
        for measured in read_measurements(folder / table)
        if (model := shape_of(measured.model_name)) is not None and measured.configuration.batch_size <= _MOST_BATCH
    ]


def _influence(table: str, measured: Measurement) -> float:
    """Return how much a row counts: fingerprints little, for at one layer a moment's noise is all there is."""
    if table in (LONG_FINGERPRINTS, SHORT_FINGERPRINTS):
        tp, pp = measured.configuration.tp, measured.configuration.pp
        if tp > 2:
            return 0.015  # several GPUs wait for the slowest: noise of tens of milliseconds
        return 0.3 if pp <= 2 else 0.1
    return 0.5 if table == BATCHED_TRUTH else 1.0  # the table of one model alone


def usable(samples: Iterable[Sample], without_model: str | None) -> list[Sample]:
    """Return the samples that may be fitted to when a model is left out: of it its fingerprints alone."""
    return [one for one in samples if one.is_fingerprint or one.measured.model_name != without_model]


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
    """Return where a fit begins."""
    return read_toml(data_path("calibration-start.toml"), Calibration, what="start of a calibration")


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


def by_model(samples: Iterable[Sample]) -> Mapping[str, list[Sample]]:
    """Return samples by model."""
    found: dict[str, list[Sample]] = {}
    for one in samples:
        found.setdefault(one.measured.model_name, []).append(one)
    return found
