"""Fitting with every model left out in turn: calibrations that can be judged, and margins that are earned."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import msgspec
import numpy as np

from maveriq.estimate.calibrated import deviation, measured_layers
from maveriq.estimate.calibration import Calibration, Margins, Memory
from maveriq.estimate.evaluate import Answer, Group, compared, grouped
from maveriq.estimate.fingerprints import OUTPUTS, Point, Stored
from maveriq.estimate.fitting import (
    BATCHED_TRUTH,
    LONG_FINGERPRINTS,
    LONG_TRUTH,
    SHORT_FINGERPRINTS,
    Array,
    Sample,
    Table,
    fit_calibration,
    trust_of,
    usable,
)
from maveriq.estimate.footprint import Held, held, memory_margin
from maveriq.estimate.formula import Fingerprint, derive

_QUANTILE = 93  # percent of the errors on known models that hold 90 % of those on the next one

Constants = Mapping[Stored, Mapping[Point, Fingerprint]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Answered:
    """A sample and what was predicted of it by a calibration that had not seen its model's ground truth."""

    sample: Sample
    latency_s: float
    held: Held
    trust: float

    @property
    def latency_log_error(self) -> float:
        """Logarithm of predicted over measured latency."""
        return math.log(self.latency_s / self.sample.measured.latency_s)

    @property
    def memory_log_error(self) -> float:
        """Logarithm of predicted over measured memory."""
        return math.log(self.held.gib / self.sample.measured.memory_gib)


@dataclass(frozen=True, slots=True, kw_only=True)
class CrossFit:
    """A calibration fitted to all samples, one per model left out, and how those did on their model."""

    calibration: Calibration
    without: Mapping[str, Calibration]
    answered: Sequence[Answered]


def cross_fit(samples: Sequence[Sample], start: Calibration, told: Callable[[str], None] = lambda _: None) -> CrossFit:
    """Fit to all samples, and again with each model of the ground truth left out.

    Args:
        samples: as `read_samples` gives them.
        start: where every fit begins.
        told: is told what is being fitted.
    """
    constants = {table: constants_of(samples, table) for table in (LONG_FINGERPRINTS, SHORT_FINGERPRINTS)}
    models = list(dict.fromkeys(one.measured.model_name for one in samples if not one.is_fingerprint))
    without: dict[str, Calibration] = {}
    answered: list[Answered] = []
    for model in models:
        told(f"without {model}")
        without[model] = _fit(usable(samples, model), start, constants)
        judged = [
            one
            for one in samples
            if one.measured.model_name == model and not one.is_fingerprint and _points(one, constants)
        ]
        answered.extend(_answers(judged, without[model], constants))
    told("all models")
    return CrossFit(
        calibration=_with_margins(_fit(samples, start, constants), answered),
        # Margins of a model come from the errors on the other models.
        without={
            model: _with_margins(fitted, [one for one in answered if one.sample.measured.model_name != model])
            for model, fitted in without.items()
        },
        answered=answered,
    )


def constants_of(samples: Iterable[Sample], table: str) -> dict[Stored, dict[Point, Fingerprint]]:
    """Return the fingerprint constants of the samples of a table."""
    latency: dict[tuple[Stored, Point], dict[tuple[int, int], float]] = {}
    memory: dict[tuple[Stored, Point], dict[int, float]] = {}
    for one in samples:
        if one.table == table:
            row, asked = one.measured, one.measured.configuration
            key = Stored(row.model_name, asked.weights, asked.kv), Point(asked.tp, asked.pp, asked.batch_size)
            latency.setdefault(key, {})[row.layers, row.output_tokens] = row.latency_s
            if row.output_tokens == OUTPUTS[0]:
                memory.setdefault(key, {})[row.layers] = row.memory_gib
    found: dict[Stored, dict[Point, Fingerprint]] = {}
    for (stored, point), latency_s in latency.items():
        found.setdefault(stored, {})[point] = derive(latency_s, memory[stored, point])
    return found


def _fit(samples: Sequence[Sample], start: Calibration, constants: Mapping[str, Constants]) -> Calibration:
    fitted = fit_calibration(samples, start)
    return msgspec.structs.replace(fitted, memory=_fit_memory(samples, start.memory, constants))


def _fit_memory(samples: Sequence[Sample], start: Memory, constants: Mapping[str, Constants]) -> Memory:
    """Return memory figures: medians of what fingerprints on several GPUs held, and a fit to batches."""
    from scipy.optimize import least_squares

    beyond: dict[str, list[float]] = {}
    for points in constants[LONG_FINGERPRINTS].values():
        for point, found in points.items():
            if Point(1, 1, 1) in points:
                more_gib = found.memory_gib(point.pp) - points[Point(1, 1, 1)].memory_gib(point.pp)
                beyond.setdefault(f"{point.tp}x{point.pp}", []).append(more_gib)
    medians = {key: round(float(np.median(found)), 4) for key, found in beyond.items()}
    memory = msgspec.structs.replace(start, gpus_gib=medians)
    batches = [
        one
        for one in samples
        if one.measured.configuration.batch_size > 1 and not one.is_fingerprint and _points(one, constants)
    ]
    if not batches:
        return memory

    def at(position: Array, digits: int = 17) -> Memory:
        request_kb, gated, unsharded = (float(f"{value:.{digits}g}") for value in position)
        return msgspec.structs.replace(memory, request_kb=request_kb, gated=gated, unsharded=unsharded)

    def residuals(position: Array) -> Array:
        figures = at(position)
        return np.array([math.log(_held(one, figures, constants).gib / one.measured.memory_gib) for one in batches])

    first = np.array([start.request_kb, start.gated, start.unsharded])
    bounds = [0.01, 0.0, 0.0], [1000.0, 1.0, 1.0]
    found = least_squares(residuals, first, bounds=bounds, loss="soft_l1", f_scale=0.05)
    return at(found.x, digits=4)


def _held(sample: Sample, figures: Memory, constants: Mapping[str, Constants]) -> Held:
    points = _points(sample, constants)
    return held(
        sample.model,
        sample.measured.configuration,
        points,
        figures,
        tokens=sample.prompt_tokens + sample.measured.output_tokens,
        fingerprint_tokens=sample.prompt_tokens + OUTPUTS[0],
    )


def _points(sample: Sample, constants: Mapping[str, Constants]) -> Mapping[Point, Fingerprint]:
    """Return a sample's fingerprints, rather those with its prompts; empty where its memory cannot be told."""
    asked = sample.measured.configuration
    stored = Stored(sample.model.name, asked.weights, asked.kv)
    for found in (_fingerprints_for(sample, constants), constants[LONG_FINGERPRINTS]):
        if Point(1, 1, 1) in found.get(stored, {}):
            return found[stored]
    return {}


def _fingerprints_for(sample: Sample, constants: Mapping[str, Constants]) -> Constants:
    """Return the fingerprints that were taken with the prompts of a sample."""
    return constants[LONG_FINGERPRINTS if sample.table == LONG_TRUTH else SHORT_FINGERPRINTS]


def _answers(
    judged: Sequence[Sample], calibration: Calibration, constants: Mapping[str, Constants]
) -> Iterator[Answered]:
    table = Table(judged)
    slowness = np.array([_slowness(one, calibration, constants) for one in judged])
    predicted_s = table.predict(calibration, slowness)
    trust = trust_of(np.log(predicted_s / table.latency_s))
    for one, latency_s, believed in zip(judged, predicted_s, trust, strict=True):
        seen = _held(one, calibration.memory, constants)
        yield Answered(sample=one, latency_s=float(latency_s), held=seen, trust=float(believed))


def _slowness(sample: Sample, calibration: Calibration, constants: Mapping[str, Constants]) -> float:
    weights = sample.measured.configuration.weights
    fingerprints = _fingerprints_for(sample, constants)
    seen = measured_layers(fingerprints, sample.model, weights, prompt_tokens=sample.prompt_tokens)
    return math.exp(calibration.trust * deviation(seen, calibration.law(weights, 1)))


def _with_margins(calibration: Calibration, answered: Sequence[Answered]) -> Calibration:
    single = [one for one in answered if one.sample.measured.configuration.batch_size == 1]
    batched = [one for one in answered if one.sample.measured.configuration.batch_size > 1]
    truth = [one for one in single if one.sample.table in (LONG_TRUTH, BATCHED_TRUTH)]
    by_tp = {tp: _quantile(abs(one.latency_log_error) for one in truth if _tp(one) == tp) for tp in calibration.tp}
    widest = max(found for found in by_tp.values() if found)
    of_single = {tp: found or widest for tp, found in by_tp.items()}
    # Batches were measured on several models at low TP, on one at high TP: how much they widen errors is one factor.
    wider = max(1.0, _quantile(abs(one.latency_log_error) / of_single[_tp(one)] for one in batched) or 1.0)
    memory = _quantile(abs(one.memory_log_error) for one in truth)
    per_share = _quantile(
        max(0.0, abs(one.memory_log_error) - (memory or 0.0)) / one.held.request_share for one in batched
    )
    margins = Margins(
        memory_single=_margin(memory),
        memory_request=_margin(None if per_share is None else per_share * _few(batched)),
        single={tp: _margin(found) for tp, found in of_single.items()},
        batched={tp: _margin(wider * found) for tp, found in of_single.items()},
    )
    return msgspec.structs.replace(calibration, margins=margins)


def _few(answered: Sequence[Answered]) -> float:
    """Return how much wider an interval must be for a new model where few models were seen (Student's t)."""
    from scipy.stats import norm, t

    models = len({one.sample.measured.model_name for one in answered})
    if models == 1:
        return 2.0  # nothing is known of how models differ
    return float(t.ppf(0.95, models - 1) * math.sqrt(1 + 1 / models) / norm.ppf(0.95))


def _tp(one: Answered) -> str:
    return str(one.sample.measured.configuration.tp)


def _quantile(errors: Iterable[float]) -> float | None:
    """Return what the given share of the errors stays below, None where there is none."""
    known = list(errors)
    return float(np.percentile(known, _QUANTILE)) if known else None


def _margin(log_error: float | None) -> float:
    """Return a margin of a logarithmic error; 1, which is a factor of two, where none is known."""
    return 1.0 if log_error is None else round(math.expm1(log_error), 4)


def errors_of(fitted: CrossFit) -> tuple[Group, ...]:
    """Return the errors on models left out, and how many of their rows the margins cover, group by group."""
    return grouped([_compared(one, fitted.without[one.sample.measured.model_name]) for one in fitted.answered])


def _compared(one: Answered, calibration: Calibration) -> Answer:
    margins, asked = calibration.margins, one.sample.measured.configuration
    single = asked.batch_size == 1
    return compared(
        one.sample.measured,
        (one.latency_s, (margins.single if single else margins.batched)[str(asked.tp)]),
        (one.held.gib, memory_margin(margins, one.held)),
    )


def least_trusted(answered: Sequence[Answered], count: int) -> list[tuple[str, float, float]]:
    """Return the rows that the fit believes least: where they stand, measured and predicted seconds."""
    worst = sorted(answered, key=lambda one: one.trust)[:count]
    return [(one.sample.measured.where, one.sample.measured.latency_s, one.latency_s) for one in worst]
