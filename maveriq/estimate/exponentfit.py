"""Fitting the exponents of the paper's formula (SPEC 3) to whole models of another kind of GPU."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import astuple, fields

import numpy as np

from maveriq.domain.models import KvType, WeightType
from maveriq.estimate.fingerprints import Point
from maveriq.estimate.fitting import Array
from maveriq.estimate.formula import Exponents, Fingerprint, ParallelLatency
from maveriq.estimate.samples import Constants, Sample, nearest_fingerprints

_START = Exponents(a=0.1, b=0.6, c=0.6, d=0.5)  # near those that were published for the A6000
_LARGEST = 3.0
_TYPICAL_ERROR = 0.03
_LEAST_S = 1e-6  # noise of fingerprints can take a formula below zero

Kinds = Mapping[tuple[WeightType, KvType], Exponents]


def fit_exponents(samples: Sequence[Sample], constants: Mapping[int, Constants]) -> Kinds:
    """Return exponents for each weight and KV type that was measured on several GPUs, with fingerprints for it.

    The published ones made the mean absolute percentage error least; this is as robust as the
    calibrated fit is: logarithms of latency under a soft L1 loss.
    """
    rows: dict[tuple[WeightType, KvType], list[tuple[Sample, Mapping[Point, Fingerprint]]]] = {}
    for one in samples:
        asked = one.measured.configuration
        found = nearest_fingerprints(one, constants)
        if one.is_fingerprint or found is None or asked.batch_size > 1 or asked.gpus == 1:
            continue
        if asked.tp == 1 or Point(2, 1, 1) in found[1]:
            rows.setdefault((asked.weights, asked.kv), []).append((one, found[1]))
    return {kind: _fitted(of_kind) for kind, of_kind in rows.items()}


def _fitted(rows: Sequence[tuple[Sample, Mapping[Point, Fingerprint]]]) -> Exponents:
    from scipy.optimize import least_squares

    logs = np.log([one.measured.latency_s for one, _ in rows])

    def residuals(position: Array) -> Array:
        exponents = _at(position)
        return np.log([max(_LEAST_S, _latency_s(one, points, exponents)) for one, points in rows]) - logs

    found = least_squares(
        residuals, astuple(_START), bounds=(0.0, _LARGEST), loss="soft_l1", f_scale=_TYPICAL_ERROR, max_nfev=60
    )
    return _at(np.round(found.x, 6))


def _at(position: Array) -> Exponents:
    a, b, c, d = map(float, position)
    return Exponents(a=a, b=b, c=c, d=d)


def _latency_s(sample: Sample, points: Mapping[Point, Fingerprint], exponents: Exponents) -> float:
    asked, layers, tp2 = sample.measured.configuration, sample.model.layers, points.get(Point(2, 1, 1))
    single = points[Point(1, 1, 1)].line(layers)
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
