"""Fits latency, memory, and the exponents of the paper's formula (SPEC 3) to measured samples.

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

_TYPICAL_ERROR = 0.03  # the loss is quadratic below this log error and linear above it
_MAX_FACTOR = 4.0  # fitted figures stay within this factor of the start
_SPEEDS = tuple(2.0**power for power in range(-4, 7))
_TIMES = tuple(2.0**power for power in range(-5, 6))
_PULL = 0.02  # towards the start, for figures that no row depends on


class Table:
    """Samples as arrays, to predict all at once under any calibration."""

    def __init__(self, samples: Sequence[Sample]) -> None:
        self.samples = samples
        self.latency_s = np.array([sample.measured.latency_s for sample in samples])
        self.sample_weight = np.array([sample.sample_weight for sample in samples])
        self._output_tokens = np.array([sample.measured.output_tokens for sample in samples])
        self._ops = stacked(OpCounts, [_op_counts(sample) for sample in samples])
        keys = [(sample.measured.configuration.weights, sample.measured.configuration.tp) for sample in samples]
        self._kinds = list(dict.fromkeys(keys))
        self._kind_of = np.array([self._kinds.index(key) for key in keys])

    def predict(self, calibration: Calibration, layer_time_ratio: Array | float = 1.0) -> Array:
        """Return the latency of every sample in seconds."""
        roofline = picked(
            stacked(RooflineParameters, [calibration.roofline(weights, tp) for weights, tp in self._kinds]),
            self._kind_of,
        )
        predicted: Array = latency_s(
            replace(self._ops, layer_time_ratio=layer_time_ratio), roofline, self._output_tokens
        )
        return predicted


def _op_counts(sample: Sample) -> OpCounts:
    configuration = sample.measured.configuration
    return op_counts(
        sample.model,
        configuration.kv,
        tp=configuration.tp,
        pp=configuration.pp,
        batch=configuration.batch_size,
        prompt_tokens=sample.prompt_tokens,
    )


def stacked(shape: type[Any], items: Sequence[Any]) -> Any:
    """Combine many `OpCounts` or `RooflineParameters` of numbers into one of arrays."""
    columns = {
        field.name: np.array([getattr(item, field.name) for item in items], dtype=float) for field in fields(shape)
    }
    return shape(**columns)


def picked(parameters: RooflineParameters, index: np.ndarray[Any, np.dtype[np.int64]]) -> RooflineParameters:
    """Return the parameters at the given positions, which may repeat."""
    return RooflineParameters(
        **{field.name: getattr(parameters, field.name)[index] for field in fields(RooflineParameters)}
    )


def fit_calibration(samples: Sequence[Sample], start: Calibration) -> Calibration:
    """Return the calibration that fits the samples' latencies best.

    The logarithm of every fitted figure is free within bounds around the start. Residuals are
    logarithms of predicted over measured latency; large ones count less (soft L1).

    Args:
        samples: rows to fit to.
        start: the start of the fit; its limits, memory and margins are kept.
    """
    table, figures = Table(samples), _Figures(start)
    logs = np.log(table.latency_s)

    def residuals(position: Array) -> Array:
        weighted = table.sample_weight * (np.log(table.predict(figures.at(position))) - logs)
        return np.concatenate([weighted, _PULL * (position - figures.start)])

    found = least_squares(
        residuals, figures.start, bounds=figures.bounds, loss="soft_l1", f_scale=_TYPICAL_ERROR, max_nfev=80
    )
    return figures.at(found.x, digits=5)


def start_calibration() -> Calibration:
    """Return the start of a fit to GPUs like the A6000."""
    return read_toml(data_path("calibration-start.toml"), Calibration, what="start of a calibration")


def start_for(samples: Sequence[Sample], start: Calibration) -> Calibration:
    """Return a start for another kind of GPU: all speeds and all fixed times scaled to fit the samples best.

    A fit keeps figures within a factor of its start. That range is too narrow for another kind of
    GPU, so this chooses one factor for all speeds and one for all fixed times first.
    """
    table = Table(samples)
    logs = np.log(table.latency_s)

    def cost(scaled: Calibration) -> float:
        errors = table.sample_weight * (np.log(table.predict(scaled)) - logs) / _TYPICAL_ERROR
        return float(np.sum(np.sqrt(1 + errors**2)))

    scaled = (_scaled(start, speed, time) for speed in _SPEEDS for time in _TIMES)
    return min([start, *scaled], key=cost)


def _scaled(start: Calibration, speed: float, time: float) -> Calibration:
    """Multiply the memory and arithmetic speeds of a calibration by one factor and its fixed times by another."""
    tables: dict[str, Any] = msgspec.to_builtins(start)
    for table, key in _fitted_entries(tables):
        if key in ("bandwidth_gb_s", "prefill_tflops", "decode_tflops"):
            table[key] *= speed
        elif key.endswith(("_us", "_ms")):
            table[key] *= time
    return msgspec.convert(tables, Calibration)


class _Figures:
    """The fitted figures of a calibration as a vector of logarithms."""

    def __init__(self, start: Calibration) -> None:
        self._tables: dict[str, Any] = msgspec.to_builtins(start)
        self._entries = list(_fitted_entries(self._tables))
        self.start: Array = np.log([table[key] for table, key in self._entries])
        lower, upper = self.start - np.log(_MAX_FACTOR), self.start + np.log(_MAX_FACTOR)
        keys = [key for _, key in self._entries]
        lower[keys.index("overlap")] = 0.0
        self.bounds = lower, upper

    def at(self, position: Array, digits: int = 17) -> Calibration:
        """Return the calibration at a position, rounded to significant digits."""
        for (table, key), log in zip(self._entries, position, strict=True):
            table[key] = float(f"{np.exp(log):.{digits}g}")
        return msgspec.convert(self._tables, Calibration)


_FIXED = ("trust", "memory", "margins", "served")


def _fitted_entries(table: dict[str, Any]) -> Iterator[tuple[dict[str, Any], str]]:
    for key, value in table.items():
        if isinstance(value, dict) and key not in _FIXED:
            yield from _fitted_entries(value)
        elif isinstance(value, float) and key not in _FIXED and not key.endswith("limit_mb"):
            yield table, key


def trust_weights(residual: Array) -> Array:
    """Return the weight that the loss gives each row, 1 to 0, by its logarithmic residual."""
    return np.asarray(1 / np.sqrt(1 + (residual / _TYPICAL_ERROR) ** 2))


_TYPICAL_MEMORY_ERROR = 0.05


def fit_memory(samples: Sequence[Sample], start: Memory, constants: Mapping[int, Constants]) -> Memory:
    """Return the memory figures that fit the samples best.

    The memory that (TP, PP) adds to that of one GPU is the median over fingerprints, or over whole
    models if there are no fingerprints. The memory that a request of a batch adds is fitted to
    whole models.
    """
    memory = msgspec.structs.replace(start, gpus_gib=_beyond_one_gpu(samples, start, constants))
    batches = [
        sample
        for sample in samples
        if sample.measured.configuration.batch_size > 1
        and not sample.is_fingerprint
        and memory_of(sample, memory, constants) is not None
    ]
    if not batches:
        return memory

    def at(position: Array, digits: int = 17) -> Memory:
        request_kb, gated, unsharded = (float(f"{value:.{digits}g}") for value in position)
        return msgspec.structs.replace(memory, request_kb=request_kb, gated=gated, unsharded=unsharded)

    def residuals(position: Array) -> Array:
        estimates = (memory_of(sample, at(position), constants) for sample in batches)
        return np.array(
            [
                math.log(found.gib / sample.measured.memory_gib)
                for found, sample in zip(estimates, batches, strict=True)
                if found
            ]
        )

    first = np.array([start.request_kb, start.gated, start.unsharded])
    bounds = [0.01, 0.0, 0.0], [1000.0, 1.0, 1.0]
    found = least_squares(residuals, first, bounds=bounds, loss="soft_l1", f_scale=_TYPICAL_MEMORY_ERROR)
    return at(found.x, digits=4)


def memory_of(sample: Sample, figures: Memory, constants: Mapping[int, Constants]) -> MemoryEstimate | None:
    """Return the predicted memory of a sample; None if its model has no fingerprint or (TP, PP) was never measured."""
    found, configuration = nearest_fingerprints(sample, constants), sample.measured.configuration
    if found is None or not is_measured(configuration, found[1], figures):
        return None
    prompt_tokens, points = found
    return estimate_memory(
        sample.model,
        configuration,
        points,
        figures,
        tokens=sample.prompt_tokens + sample.measured.output_tokens,
        fingerprint_tokens=prompt_tokens + OUTPUTS[0],
    )


def _beyond_one_gpu(samples: Sequence[Sample], start: Memory, constants: Mapping[int, Constants]) -> dict[str, float]:
    """Return the memory in GiB that (TP, PP) adds to that of one GPU, by `gpus_key`."""
    more_gib_by_gpus: dict[str, list[float]] = {}
    # It does not depend on the prompt length, so take the length with the most fingerprints.
    for points in max(constants.values(), key=_size, default={}).values():
        for at, fingerprint in points.items():
            one_gpu = points.get(at.at(1, 1))
            if one_gpu is not None:
                more_gib = fingerprint.memory_gib(at.pp) - one_gpu.memory_gib(at.pp)
                more_gib_by_gpus.setdefault(gpus_key(at), []).append(more_gib)
    for key, more in _beyond_by_whole_models(samples, start, constants).items():
        more_gib_by_gpus.setdefault(key, more)
    return {key: round(float(np.median(more)), 4) for key, more in more_gib_by_gpus.items()}


def _beyond_by_whole_models(
    samples: Sequence[Sample], start: Memory, constants: Mapping[int, Constants]
) -> dict[str, list[float]]:
    more_gib_by_gpus: dict[str, list[float]] = {}
    for sample in samples:
        key = gpus_key(sample.measured.configuration)
        nothing_more = msgspec.structs.replace(start, gpus_gib={key: 0.0})
        if not sample.is_fingerprint and sample.measured.configuration.batch_size == 1:
            found = memory_of(sample, nothing_more, constants)
            if found is not None:
                more_gib_by_gpus.setdefault(key, []).append(sample.measured.memory_gib - found.gib)
    return more_gib_by_gpus


def _size(constants: Constants) -> int:
    return sum(len(points) for points in constants.values())


_START = Exponents(a=0.1, b=0.6, c=0.6, d=0.5)  # close to those published for the A6000
_MAX_EXPONENT = 3.0
_MIN_S = 1e-6  # noise in fingerprints can make the formula negative

Kinds = Mapping[tuple[WeightType, KvType], Exponents]


def fit_exponents(samples: Sequence[Sample], constants: Mapping[int, Constants]) -> Kinds:
    """Return exponents for each weight and KV type that has measurements on several GPUs, and fingerprints.

    The published exponents minimise the mean absolute percentage error. This fit is as robust as
    the calibrated one: logarithms of latency under a soft L1 loss.
    """
    rows: dict[tuple[WeightType, KvType], list[tuple[Sample, Fingerprints]]] = {}
    for sample in samples:
        configuration = sample.measured.configuration
        found = nearest_fingerprints(sample, constants)
        if sample.is_fingerprint or found is None or configuration.batch_size > 1 or configuration.gpus == 1:
            continue
        if configuration.tp == 1 or configuration.at(2, 1) in found[1]:
            rows.setdefault((configuration.weights, configuration.kv), []).append((sample, found[1]))
    return {kind: _fitted(of_kind) for kind, of_kind in rows.items()}


def _fitted(rows: Sequence[tuple[Sample, Fingerprints]]) -> Exponents:
    logs = np.log([sample.measured.latency_s for sample, _ in rows])

    def residuals(position: Array) -> Array:
        exponents = _at(position)
        return np.log([max(_MIN_S, _latency_s(sample, points, exponents)) for sample, points in rows]) - logs

    found = least_squares(
        residuals, astuple(_START), bounds=(0.0, _MAX_EXPONENT), loss="soft_l1", f_scale=_TYPICAL_ERROR, max_nfev=60
    )
    return _at(np.round(found.x, 6))


def _at(position: Array) -> Exponents:
    a, b, c, d = map(float, position)
    return Exponents(a=a, b=b, c=c, d=d)


def _latency_s(sample: Sample, points: Fingerprints, exponents: Exponents) -> float:
    configuration, layers = sample.measured.configuration, sample.model.layers
    tp2 = points.get(configuration.at(2, 1))
    single = points[configuration.at(1, 1)].line(layers)
    scaled = ParallelLatency.scaled(
        single, tp2.line(layers) if tp2 else None, exponents, tp=configuration.tp, pp=configuration.pp
    )
    return scaled.at(sample.measured.output_tokens)


def exponents_csv(kinds: Kinds) -> str:
    """Return the table that `fingerprints.read_exponents` reads."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["weights", "kv", *(field.name for field in fields(Exponents))])
    for (weights, kv), exponents in kinds.items():
        table.writerow([weights.value, kv.value, *astuple(exponents)])
    return text.getvalue()
