"""Fitting: latency, memory, and the exponents of the paper's formula (SPEC 3).

All fits are robust least squares on logarithms of predicted over measured values.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import astuple, fields, replace
from typing import Any

import msgspec
import numpy as np
from scipy.optimize import least_squares

from maveriq.calibration.samples import Constants, Sample, nearest_fingerprints
from maveriq.domain.models import KvType, WeightType
from maveriq.estimate.calibration_file import Calibration, Memory, op_counts
from maveriq.estimate.fingerprints import OUTPUTS, Exponents, Fingerprints, ParallelLatency
from maveriq.estimate.memory import MemoryEstimate, estimate_memory, gpus_key, is_measured
from maveriq.estimate.roofline import OpCounts, RooflineParameters, latency_s
from maveriq.files import data_path
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
        self.sample_weight = np.array([one.sample_weight for one in samples])
        self._output_tokens = np.array([one.measured.output_tokens for one in samples])
        self._work = stacked(OpCounts, [_work(one) for one in samples])
        keys = [(one.measured.configuration.weights, one.measured.configuration.tp) for one in samples]
        self._kinds = list(dict.fromkeys(keys))
        self._kind_of = np.array([self._kinds.index(key) for key in keys])

    def predict(self, calibration: Calibration, layer_time_ratio: Array | float = 1.0) -> Array:
        """Return the latency of every sample in seconds."""
        law = picked(
            stacked(RooflineParameters, [calibration.law(weights, tp) for weights, tp in self._kinds]), self._kind_of
        )
        predicted: Array = latency_s(replace(self._work, layer_time_ratio=layer_time_ratio), law, self._output_tokens)
        return predicted


def _work(sample: Sample) -> OpCounts:
    asked = sample.measured.configuration
    return op_counts(
        sample.model, asked.kv, tp=asked.tp, pp=asked.pp, batch=asked.batch_size, prompt_tokens=sample.prompt_tokens
    )


def stacked(shape: type[Any], items: Sequence[Any]) -> Any:
    """Return one `Work` or `Law` of arrays, made of many of numbers."""
    columns = {one.name: np.array([getattr(item, one.name) for item in items], dtype=float) for one in fields(shape)}
    return shape(**columns)


def picked(laws: RooflineParameters, index: np.ndarray[Any, np.dtype[np.int64]]) -> RooflineParameters:
    """Return the laws of an index, which may name one several times."""
    return RooflineParameters(**{one.name: getattr(laws, one.name)[index] for one in fields(RooflineParameters)})


def fit_calibration(samples: Sequence[Sample], start: Calibration) -> Calibration:
    """Return the calibration under which the samples' latencies are most likely.

    The logarithm of every fitted figure is free within bounds around the start; residuals are
    logarithms of predicted over measured latency, and large ones count less (soft L1).

    Args:
        samples: rows to fit to.
        start: where to begin; its limits, memory and margins are kept.
    """
    table, figures = Table(samples), _Figures(start)
    logs = np.log(table.latency_s)

    def residuals(position: Array) -> Array:
        off = table.sample_weight * (np.log(table.predict(figures.at(position))) - logs)
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
        off = table.sample_weight * (np.log(table.predict(scaled)) - logs) / _TYPICAL_ERROR
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


_TYPICAL_MEMORY_ERROR = 0.05


def fit_memory(samples: Sequence[Sample], start: Memory, constants: Mapping[int, Constants]) -> Memory:
    """Return the figures of memory under which the samples are most likely.

    What (TP, PP) holds beyond one GPU is the median over fingerprints, where these are (else over
    whole models); what a request of a batch adds is fitted to whole models.
    """
    memory = msgspec.structs.replace(start, gpus_gib=_beyond_one_gpu(samples, start, constants))
    batches = [
        one
        for one in samples
        if one.measured.configuration.batch_size > 1
        and not one.is_fingerprint
        and held_by(one, memory, constants) is not None
    ]
    if not batches:
        return memory

    def at(position: Array, digits: int = 17) -> Memory:
        request_kb, gated, unsharded = (float(f"{value:.{digits}g}") for value in position)
        return msgspec.structs.replace(memory, request_kb=request_kb, gated=gated, unsharded=unsharded)

    def residuals(position: Array) -> Array:
        seen = (held_by(one, at(position), constants) for one in batches)
        return np.array(
            [math.log(found.gib / one.measured.memory_gib) for found, one in zip(seen, batches, strict=True) if found]
        )

    first = np.array([start.request_kb, start.gated, start.unsharded])
    bounds = [0.01, 0.0, 0.0], [1000.0, 1.0, 1.0]
    found = least_squares(residuals, first, bounds=bounds, loss="soft_l1", f_scale=_TYPICAL_MEMORY_ERROR)
    return at(found.x, digits=4)


def held_by(sample: Sample, figures: Memory, constants: Mapping[int, Constants]) -> MemoryEstimate | None:
    """Return what a sample holds by the law, None where its model has no fingerprint, or (TP, PP) none of any."""
    found, asked = nearest_fingerprints(sample, constants), sample.measured.configuration
    if found is None or not is_measured(asked, found[1], figures):
        return None
    prompt_tokens, points = found
    return estimate_memory(
        sample.model,
        asked,
        points,
        figures,
        tokens=sample.prompt_tokens + sample.measured.output_tokens,
        fingerprint_tokens=prompt_tokens + OUTPUTS[0],
    )


def _beyond_one_gpu(samples: Sequence[Sample], start: Memory, constants: Mapping[int, Constants]) -> dict[str, float]:
    """Return what (TP, PP) holds more than one GPU."""
    seen: dict[str, list[float]] = {}
    # Prompts change nothing about it, so those with the most fingerprints speak for all.
    for points in max(constants.values(), key=_size, default={}).values():
        for at, fingerprint in points.items():
            one_gpu = points.get(at.at(1, 1))
            if one_gpu is not None:
                more_gib = fingerprint.memory_gib(at.pp) - one_gpu.memory_gib(at.pp)
                seen.setdefault(gpus_key(at), []).append(more_gib)
    for key, more in _beyond_by_whole_models(samples, start, constants).items():
        seen.setdefault(key, more)
    return {key: round(float(np.median(more)), 4) for key, more in seen.items()}


def _beyond_by_whole_models(
    samples: Sequence[Sample], start: Memory, constants: Mapping[int, Constants]
) -> dict[str, list[float]]:
    seen: dict[str, list[float]] = {}
    for one in samples:
        key = gpus_key(one.measured.configuration)
        nothing_more = msgspec.structs.replace(start, gpus_gib={key: 0.0})
        if not one.is_fingerprint and one.measured.configuration.batch_size == 1:
            found = held_by(one, nothing_more, constants)
            if found is not None:
                seen.setdefault(key, []).append(one.measured.memory_gib - found.gib)
    return seen


def _size(constants: Constants) -> int:
    return sum(len(points) for points in constants.values())


_START = Exponents(a=0.1, b=0.6, c=0.6, d=0.5)  # near those that were published for the A6000
_LARGEST = 3.0
_TYPICAL_ERROR = 0.03
_MIN_S = 1e-6  # noise of fingerprints can take a formula below zero

Kinds = Mapping[tuple[WeightType, KvType], Exponents]


def fit_exponents(samples: Sequence[Sample], constants: Mapping[int, Constants]) -> Kinds:
    """Return exponents for each weight and KV type that was measured on several GPUs, with fingerprints for it.

    The published ones made the mean absolute percentage error least; this is as robust as the
    calibrated fit is: logarithms of latency under a soft L1 loss.
    """
    rows: dict[tuple[WeightType, KvType], list[tuple[Sample, Fingerprints]]] = {}
    for one in samples:
        asked = one.measured.configuration
        found = nearest_fingerprints(one, constants)
        if one.is_fingerprint or found is None or asked.batch_size > 1 or asked.gpus == 1:
            continue
        if asked.tp == 1 or asked.at(2, 1) in found[1]:
            rows.setdefault((asked.weights, asked.kv), []).append((one, found[1]))
    return {kind: _fitted(of_kind) for kind, of_kind in rows.items()}


def _fitted(rows: Sequence[tuple[Sample, Fingerprints]]) -> Exponents:
    logs = np.log([one.measured.latency_s for one, _ in rows])

    def residuals(position: Array) -> Array:
        exponents = _at(position)
        return np.log([max(_MIN_S, _latency_s(one, points, exponents)) for one, points in rows]) - logs

    found = least_squares(
        residuals, astuple(_START), bounds=(0.0, _LARGEST), loss="soft_l1", f_scale=_TYPICAL_ERROR, max_nfev=60
    )
    return _at(np.round(found.x, 6))


def _at(position: Array) -> Exponents:
    a, b, c, d = map(float, position)
    return Exponents(a=a, b=b, c=c, d=d)


def _latency_s(sample: Sample, points: Fingerprints, exponents: Exponents) -> float:
    asked, layers = sample.measured.configuration, sample.model.layers
    tp2 = points.get(asked.at(2, 1))
    single = points[asked.at(1, 1)].line(layers)
    scaled = ParallelLatency.scaled(single, tp2.line(layers) if tp2 else None, exponents, tp=asked.tp, pp=asked.pp)
    return scaled.at(sample.measured.output_tokens)


def exponents_csv(kinds: Kinds) -> str:
    """Return the table that `fingerprints.read_exponents` reads."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["weights", "kv", *(one.name for one in fields(Exponents))])
    for (weights, kv), exponents in kinds.items():
        table.writerow([weights.value, kv.value, *astuple(exponents)])
    return text.getvalue()
