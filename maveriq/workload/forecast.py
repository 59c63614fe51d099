"""Demand forecasts from workloads, for policies with static placement.

A forecast names models by their endpoint (`m1`, `m2`, ...), because a set may hold a model twice.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from maveriq.domain.requests import DemandForecast
from maveriq.errors import InputError
from maveriq.units import MICROS_PER_SECOND
from maveriq.workload.arrivals import published_draw
from maveriq.workload.model_sets import ModelSet
from maveriq.workload.requests import Arrivals


def forecast_of(arrivals: Arrivals, endpoints: int) -> DemandForecast:
    """Return the requests of a workload as a perfect forecast; one without SLO may take for ever.

    Args:
        arrivals: the requests, of endpoints from 1.
        endpoints: how many there are; position k in the forecast is endpoint k + 1.
    """
    slo_s = arrivals.slo_us / MICROS_PER_SECOND
    return DemandForecast(
        models=endpoint_names(endpoints),
        arrival_s=arrivals.arrival_us / MICROS_PER_SECOND,
        model_index=arrivals.endpoint_id - 1,
        slo_s=np.where(slo_s > 0, slo_s, np.inf),
    )


def published_forecast(
    requests_per_minute: np.ndarray[Any, Any],
    models: ModelSet,
    *,
    scale: float,
    slo_s: Callable[[str], float],
    name_offset: int = 0,
    seed: int = 42,
) -> DemandForecast:
    """Return the demand that the published AlpaServe placements were searched for.

    It is the published draw over the trace twice in a row. The published driver counted models
    from 0 but named requests from 1: with `name_offset` 1 the first model gets no request, each
    other one the requests (and SLOs) meant for the model before it, and those for the last model
    fail. With 0 every request finds its model.

    Args:
        requests_per_minute: of the trace.
        models: the model set.
        scale: factor on the rate.
        slo_s: latency objective of a model's requests, by its name.
        name_offset: 0, or 1 as published.
        seed: of the draw.

    Raises:
        InputError: another offset, or as `published_draw`.
    """
    if name_offset not in (0, 1):
        raise InputError(f"name offset must be 0 or 1 (as published), not {name_offset}")
    twice = np.concatenate([requests_per_minute, requests_per_minute])
    draw = published_draw(twice, scale=scale, load_at=models.load_at, seed=seed)
    meant_for = draw.endpoint_id - 1
    objectives = np.array([slo_s(entry.model.name) for entry in models.entries])
    addressed = meant_for + name_offset
    return DemandForecast(
        models=endpoint_names(len(models.entries)),
        arrival_s=draw.arrival_us / MICROS_PER_SECOND,
        model_index=np.where(addressed < len(models.entries), addressed, -1),
        slo_s=objectives[meant_for],
    )


def endpoint_names(endpoints: int) -> tuple[str, ...]:
    """Return the names that forecasts use for endpoints 1, 2, ..."""
    return tuple(f"m{endpoint_id}" for endpoint_id in range(1, endpoints + 1))
