"""Fitting what the calibrated estimator knows of memory: to fingerprints on several GPUs, and to batches."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import msgspec
import numpy as np

from maveriq.estimate.calibration import Memory
from maveriq.estimate.fingerprints import OUTPUTS, Point
from maveriq.estimate.fitting import Array
from maveriq.estimate.footprint import Held, gpus_key, held, is_measured
from maveriq.estimate.samples import Constants, Sample, nearest_fingerprints

_TYPICAL_ERROR = 0.05


def fit_memory(samples: Sequence[Sample], start: Memory, constants: Mapping[int, Constants]) -> Memory:
    """Return the figures of memory under which the samples are most likely.

    What (TP, PP) holds beyond one GPU is the median over fingerprints, where these are (else over
    whole models); what a request of a batch adds is fitted to whole models.
    """
    from scipy.optimize import least_squares

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
    found = least_squares(residuals, first, bounds=bounds, loss="soft_l1", f_scale=_TYPICAL_ERROR)
    return at(found.x, digits=4)


def held_by(sample: Sample, figures: Memory, constants: Mapping[int, Constants]) -> Held | None:
    """Return what a sample holds by the law, None where its model has no fingerprint, or (TP, PP) none of any."""
    found, asked = nearest_fingerprints(sample, constants), sample.measured.configuration
    if found is None or not is_measured(asked, found[1], figures):
        return None
    prompt_tokens, points = found
    return held(
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
        for point, found in points.items():
            if Point(1, 1, 1) in points:
                more_gib = found.memory_gib(point.pp) - points[Point(1, 1, 1)].memory_gib(point.pp)
                seen.setdefault(f"{point.tp}x{point.pp}", []).append(more_gib)
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
