"""Exponents of the paper's formula: as published, by the published procedure, and by our own fit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import astuple

import numpy as np

from maveriq.calibration.exponent_descent import Array, Point, Points, descend
from maveriq.calibration.fitting import fit_exponents
from maveriq.calibration.measurements import Measurement
from maveriq.calibration.samples import Constants, constants_of, nearest_fingerprints
from maveriq.domain.parallel import KV_SUFFIX
from maveriq.errors import InputError
from maveriq.estimate.fingerprints import Exponents
from maveriq.streams import generator
from maveriq.study.predictions import Predictions, samples_of
from maveriq.study.ratios import grouped
from maveriq.study.result import Cell, Mark, Panel, Series, StudyResult, StudyTable
from maveriq.study.runs import Runs, storage

COLUMNS = (
    "weights", "kv", "fit", "points", "a", "b", "c", "d", "latency_error_median", "latency_error_mean",
    "latency_error_p90",
)  # fmt: skip
"""Errors, in percent, are those of all measured whole models, the points of the fit among them."""

PUBLISHED, FIVE, EVERY, SQUARES = (
    "published", "descent, few points a model", "descent, every point", "robust least squares",
)  # fmt: skip


def analyse(runs: Runs, predictions: Predictions, options: Mapping[str, Sequence[int]]) -> StudyResult:
    """Fit exponents in several ways, and judge each on every run of a whole model.

    Args:
        runs: `full_models` and `fingerprints`.
        predictions: has the published exponents.
        options: `points_per_model` of the published procedure, and the `seed` that samples them.

    Raises:
        InputError: no run of a whole model has fingerprints.
    """
    whole = list(samples_of(runs["full_models"], is_fingerprint=False))
    constants = constants_of(samples_of(runs["fingerprints"], is_fingerprint=True))
    squares = fit_exponents(whole, constants)
    rows: list[tuple[Cell, ...]] = []
    errors_of: dict[str, list[float]] = {}
    mean_of: dict[str, dict[str, float]] = {}
    for kind, of_kind in grouped((sample.measured for sample in whole), storage).items():
        points = {id(run): point for run in of_kind if (point := _point(run, constants)) is not None}
        judged = [run for run in of_kind if id(run) in points]
        if not judged or kind not in squares:
            continue
        few = _sampled(judged, options["points_per_model"][0], options["seed"][0])
        every = [points[id(run)] for run in judged]
        fits: dict[str, tuple[Exponents, int | None]] = {
            FIVE: (descend([points[id(run)] for run in few]), len(few)),
            EVERY: (descend(every), len(every)),
            SQUARES: (squares[kind], len(every)),
        }
        if kind in predictions.exponents:
            fits = {PUBLISHED: (predictions.exponents[kind], None), **fits}
        for name, (exponents, count) in fits.items():
            errors = _errors(every, exponents)
            quality = (np.median(errors), np.mean(errors), np.percentile(errors, 90))
            rows.append((*kind, name, count, *astuple(exponents), *(round(float(value), 2) for value in quality)))
            errors_of.setdefault(name, []).extend(errors.tolist())
            mean_of.setdefault(name, {})[f"{kind[0].value}{KV_SUFFIX[kind[1]]}"] = float(np.mean(errors))
    if not rows:
        raise InputError("no run of a whole model on several GPUs has fingerprints at TP 1, and 2 where it needs them")
    panel = Panel(
        title="Error of latency by the paper's formula",
        x_label="weights and KV cache",
        y_label="mean error, %",
        series=tuple(
            Series(label=name, x=list(means), y=list(means.values()), mark=Mark.BARS) for name, means in mean_of.items()
        ),
    )
    figures = {f"latency-mean {name}": float(np.mean(errors)) for name, errors in errors_of.items()}
    figures |= {f"latency-median {name}": float(np.median(errors)) for name, errors in errors_of.items()}
    return StudyResult(
        table=StudyTable(columns=COLUMNS, rows=tuple(rows)),
        panels=(panel,),
        figures=figures,
        notes=("Errors are of all measured whole models, the points that a fit saw among them.",),
    )


def _point(run: Measurement, constants: Mapping[int, Constants]) -> Point | None:
    """Return a measured latency with what fingerprints say; None without the fingerprints that it needs."""
    sample = next(samples_of([run], is_fingerprint=False))
    found = nearest_fingerprints(sample, constants)
    configuration = run.configuration
    if found is None or configuration.batch_size > 1:
        return None
    fingerprints = found[1]
    single_s = fingerprints[configuration.at(1, 1)].line(run.layers).at(run.output_tokens)
    beyond_s = 0.0
    if configuration.tp > 1:
        tp2 = fingerprints.get(configuration.at(2, 1))
        if tp2 is None:
            return None
        beyond_s = max(0.0, tp2.line(run.layers).at(run.output_tokens) - single_s / 2)
    return Point(
        tp=configuration.tp, pp=configuration.pp, single_s=single_s, beyond_half_s=beyond_s, latency_s=run.latency_s
    )


def _sampled(runs: Sequence[Measurement], count: int, seed: int) -> list[Measurement]:
    """Return so many runs of each model, drawn from the seed; all of a model with fewer."""
    draw = generator(seed, "points for exponents")
    chosen: list[Measurement] = []
    for of_model in grouped(runs, lambda run: run.model_name).values():
        places = draw.permutation(len(of_model))[:count]
        chosen += [of_model[place] for place in sorted(places.tolist())]
    return chosen


def _errors(points: Sequence[Point], exponents: Exponents) -> Array:
    measured = np.array([point.latency_s for point in points])
    return np.asarray(100 * np.abs(Points(points).latency_s(np.array(astuple(exponents))) / measured - 1))
