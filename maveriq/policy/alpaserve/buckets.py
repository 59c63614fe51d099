"""Bucketing: models of similar latency, and shares of the cluster for them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from maveriq.errors import InputError
from maveriq.policy.alpaserve.problem import GroupShape, PlacementProblem

_SIMILAR = 0.38
_GPUS_PER_STEP = 8
_THRESHOLDS = (1.0, 0.5, 0.3, 0.2, 0.1)
_FEW = 100

Bucket = tuple[int, ...]


def bucket_models(problem: PlacementProblem) -> list[Bucket]:
    """Put each model into the first bucket whose first model takes about as long on one GPU.

    Raises:
        InputError: a model that does not run on one GPU, so that its latency is not known.
    """
    latency_s = [_single_gpu_s(problem, model) for model in range(len(problem.models))]
    buckets: list[Bucket] = []
    for model, took_s in enumerate(latency_s):
        for number, bucket in enumerate(buckets):
            first_s = latency_s[bucket[0]]
            if abs(took_s - first_s) <= _SIMILAR * first_s:
                buckets[number] = (*bucket, model)
                break
        else:
            buckets.append((model,))
    return buckets


def _single_gpu_s(problem: PlacementProblem, model: int) -> float:
    profile = problem.models[model].profile.shapes.get(GroupShape(1, 1))
    if profile is None:
        raise InputError(
            f"placement search: bucket needs the latency of every model on one GPU (tp 1, pp 1), and the profile of "
            f"{problem.models[model].name!r} has none; add it or leave bucket out"
        )
    return profile.slowest_stage_s


def device_splits(problem: PlacementProblem, buckets: Sequence[Bucket]) -> list[tuple[int, ...]]:
    """Return how many GPUs each bucket may get: the ordered splits that come near its share of the load.

    Raises:
        InputError: a model without rate, or rates that are all 0.
    """
    rates = [sum(_rate(problem, model) for model in bucket) for bucket in buckets]
    if not sum(rates) > 0:
        raise InputError("placement search: bucket needs a positive rate_per_s of at least one model")
    wanted = np.array(rates) / sum(rates)
    latency_s = np.array([_single_gpu_s(problem, bucket[0]) for bucket in buckets])
    if not (latency_s > 0).all():
        raise InputError("placement search: bucket needs a positive latency of every model on one GPU")
    splits = list(_ordered_splits(problem.gpus, len(buckets)))
    for threshold in _THRESHOLDS:
        splits = [split for split in splits if _distance(split, latency_s, wanted) < threshold]
        if len(splits) < _FEW:
            break
    return splits


def _rate(problem: PlacementProblem, model: int) -> float:
    rate = problem.models[model].rate_per_s
    if rate is None:
        raise InputError(f"placement search: bucket needs the rate_per_s of model {problem.models[model].name!r}")
    return rate


def _ordered_splits(gpus: int, parts: int) -> Iterator[tuple[int, ...]]:
    if parts == 1:
        yield (gpus,)
        return
    for last in range(1, gpus):
        rest = gpus - last
        # A part that is cut off must not break up a node of eight more than the remainder does.
        if last <= gpus % _GPUS_PER_STEP or rest % _GPUS_PER_STEP == 0 or gpus % _GPUS_PER_STEP == 0:
            yield from ((*split, last) for split in _ordered_splits(rest, parts - 1))


def _distance(split: tuple[int, ...], latency_s: np.ndarray[Any, Any], wanted: np.ndarray[Any, Any]) -> float:
    power = np.array(split) / latency_s
    return float(np.abs(power / power.sum() - wanted).max())


def sub_problem(problem: PlacementProblem, bucket: Bucket, gpus: int) -> PlacementProblem:
    """Return the problem of one bucket on so many GPUs; requests to other models are to unknown ones."""
    position = np.full(len(problem.models) + 1, -1)  # the last entry is where -1 looks
    position[list(bucket)] = range(len(bucket))
    models = tuple(problem.models[model] for model in bucket)
    demand = replace(
        problem.demand,
        models=tuple(model.name for model in models),
        model_index=position[problem.demand.model_index],
    )
    return replace(problem, gpus=gpus, models=models, demand=demand)
