"""When requests arrive and which endpoint they address: the published draw, and Poisson streams."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from maveriq.csv_columns import micros_column
from maveriq.errors import InputError
from maveriq.streams import generator
from maveriq.units import MICROS_PER_SECOND, Micros
from maveriq.workload.requests import Arrivals

BIN_S = 30
"""A minute of trace is replayed in this many seconds; models load at multiples of it."""
LOAD_SHIFT_S = 90
"""How much later everything after a deploy happens, to leave its engine time to load."""
MAX_REQUESTS = 100_000_000
"""A workload larger than this would not fit into memory."""

DRAW_WIDTH_S = 29.9
_STAGES = 15
_STAGE_S = 120
_POISSON_BINS = _STAGES * _STAGE_S // BIN_S
_HIGH_STAGE_FACTOR = 2.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Draw:
    """Requests in order of arrival, a column each (int64): time, endpoint (from 1), bin (from 0).

    `session` numbers the conversations of which they are turns, from 1; None where they are none.
    """

    arrival_us: np.ndarray[Any, Any]
    endpoint_id: np.ndarray[Any, Any]
    bin_index: np.ndarray[Any, Any]
    session: np.ndarray[Any, Any] | None = None

    def __len__(self) -> int:
        return len(self.arrival_us)

    def first(self, requests: int) -> Draw:
        """Return the first requests alone."""
        return self.rows(slice(requests))

    def rows(self, index: np.ndarray[Any, Any] | slice) -> Draw:
        """Return some of the requests, in the order of `index`."""
        return Draw(
            arrival_us=self.arrival_us[index],
            endpoint_id=self.endpoint_id[index],
            bin_index=self.bin_index[index],
            session=None if self.session is None else self.session[index],
        )

    def with_turns(self, turns: np.ndarray[Any, Any]) -> Draw:
        """Return each request repeated so many times, as the turns of a conversation that begins at its time."""
        conversation = np.repeat(np.arange(len(self)), turns)
        return replace(self.rows(conversation), session=conversation + 1)


def deploy_times(load_at: Sequence[int]) -> list[Micros]:
    """Return when each model is asked for: the k-th at 30 i + 90 k s for bin i, plus 30 s unless i = 0 (SPEC 7)."""
    return [
        (BIN_S * start + LOAD_SHIFT_S * k + (BIN_S if start else 0)) * MICROS_PER_SECOND
        for k, start in enumerate(load_at)
    ]


def deployed_per_bin(load_at: Sequence[int], bins: int) -> np.ndarray[Any, Any]:
    """Return for each bin how many models are deployed in it, those that load at it included.

    Args:
        load_at: the bin at which each model loads, ascending.
        bins: bins of the trace.

    Raises:
        InputError: no model loads at bin 0, or one loads after the last bin.
    """
    if not load_at or load_at[0] != 0:
        raise InputError("model set: the first model must load at bin 0, or the first requests have no model to go to")
    if load_at[-1] >= bins:
        raise InputError(
            f"model set: model {len(load_at)} loads at bin {load_at[-1]}, but the last bin of the trace is {bins - 1};"
            " lower its load_at or give a longer trace"
        )
    return np.searchsorted(np.asarray(load_at), np.arange(bins), side="right")


def scaled_counts(requests_per_minute: np.ndarray[Any, Any], scale: float) -> np.ndarray[Any, Any]:
    """Return the requests of each bin: counts times the scale, cut to whole numbers.

    Raises:
        InputError: a scale that is not positive and finite, or that asks for too many requests.
    """
    _check_scale(scale)
    _check_total(float(requests_per_minute.sum()) * scale, scale)
    return np.floor(requests_per_minute * scale).astype(np.int64)


def published_draw(
    requests_per_minute: np.ndarray[Any, Any],
    *,
    scale: float,
    load_at: Sequence[int],
    seed: int = 42,
    weights: Sequence[float] | None = None,
) -> Draw:
    """Draw arrivals as the published system did; with seed 42 they equal the recorded schedules (SPEC 7).

    NumPy's legacy generator is kept for that reason. Bin i gives sorted uniform times in
    [30 i, 30 i + 29.9) s, shifted by 90 s for every model deployed so far, then one model for each: equally likely,
    or by its weight.

    Raises:
        InputError: as `scaled_counts` and `deployed_per_bin`.
    """
    wanted = scaled_counts(requests_per_minute, scale)
    deployed = deployed_per_bin(load_at, len(wanted))
    legacy = np.random.RandomState(seed)
    times, endpoints = [], []
    for index, (count, models) in enumerate(zip(wanted.tolist(), deployed.tolist(), strict=True)):
        start_s = BIN_S * index
        times.append(np.sort(legacy.uniform(start_s, start_s + DRAW_WIDTH_S, count)) + LOAD_SHIFT_S * models)
        # One call for all takes the same numbers from the generator as one call for each.
        likely = None if weights is None else np.asarray(weights[:models]) / sum(weights[:models])
        endpoints.append(legacy.choice(models, size=count, p=likely) + 1)
    return Draw(
        arrival_us=micros_column(np.concatenate(times)),
        endpoint_id=np.concatenate(endpoints),
        bin_index=np.repeat(np.arange(len(wanted)), wanted),
    )


def staged_poisson(*, scale: float, load_at: Sequence[int], seed: int, weights: Sequence[float] | None = None) -> Draw:
    """Draw a Poisson stream in 15 stages of two minutes: scale / 0.2 a second, 2.5 times that in every second stage.

    Models load at their bins of 30 s, with the shift of 90 s per model as in the published draw.

    Raises:
        InputError: as `scaled_counts` and `deployed_per_bin`.
    """
    low_per_s = _low_rate(scale)
    stream = generator(seed, "poisson-arrivals")
    times = []
    for stage in range(_STAGES):
        rate_per_s = low_per_s * (_HIGH_STAGE_FACTOR if stage % 2 else 1)
        # Given their number, the arrivals of a Poisson stream are uniform.
        count = stream.poisson(rate_per_s * _STAGE_S)
        times.append(np.sort(stream.uniform(_STAGE_S * stage, _STAGE_S * (stage + 1), count)))
    return _spread(np.concatenate(times), load_at, seed, weights)


def staged_poisson_as_published(
    *, scale: float, load_at: Sequence[int], seed: int, weights: Sequence[float] | None = None
) -> Draw:
    """Draw the stages as the published generator did: by a number of gaps, so that a stage's length varies.

    A low stage has 120 x rate gaps; a high one has twice as many at 2.5 times the rate, and so
    lasts 96 s on average. Beyond bin 59 all models are deployed.

    Raises:
        InputError: as `scaled_counts` and `deployed_per_bin`.
    """
    low_per_s = _low_rate(scale)
    stream = generator(seed, "poisson-arrivals")
    gaps = int(_STAGE_S * low_per_s)
    stages: Iterator[np.ndarray[Any, Any]] = (
        stream.exponential(1 / (low_per_s * _HIGH_STAGE_FACTOR), 2 * gaps)
        if stage % 2
        else stream.exponential(1 / low_per_s, gaps)
        for stage in range(_STAGES)
    )
    return _spread(np.cumsum(np.concatenate(list(stages))), load_at, seed, weights)


def spread_over_models(
    offsets_us: np.ndarray[Any, Any],
    *,
    loaded_us: Sequence[Micros],
    start_us: Micros,
    seed: int,
    weights: Sequence[float] | None = None,
) -> Draw:
    """Return requests at given times after a start, each for one of the models that have loaded by then.

    Args:
        offsets_us: the times, in order.
        loaded_us: when each model has loaded; those that have not at the start are in order of time.
        start_us: the time 0 of the offsets.
        seed: of the draw.
        weights: how likely each model is beside the others; None for equally.
    """
    arrival_us = offsets_us + start_us
    models = np.searchsorted(np.maximum(loaded_us, start_us), arrival_us, side="right")
    return Draw(
        arrival_us=arrival_us,
        endpoint_id=_endpoints(models, generator(seed, "trace-endpoints"), weights),
        bin_index=np.zeros(len(arrival_us), np.int64),
    )


def _endpoints(
    models: np.ndarray[Any, Any], stream: np.random.Generator, weights: Sequence[float] | None
) -> np.ndarray[Any, Any]:
    """Draw an endpoint for each request among the first so many models."""
    if weights is None:
        drawn: np.ndarray[Any, Any] = stream.integers(1, models, endpoint=True)
        return drawn
    cumulated = np.cumsum(weights)
    picked: np.ndarray[Any, Any] = np.searchsorted(
        cumulated, stream.uniform(size=len(models)) * cumulated[models - 1], side="right"
    )
    in_range: np.ndarray[Any, Any] = np.minimum(picked + 1, models)  # rounding may reach the end itself
    return in_range


def poisson_offsets(
    *, rate_per_s: float, duration_s: float | None, requests: int | None, seed: int
) -> np.ndarray[Any, Any]:
    """Draw the times (µs) of a Poisson stream of constant rate: for a duration, or else so many requests.

    Raises:
        InputError: too many requests.
    """
    stream = generator(seed, "poisson-arrivals")
    if duration_s is None:
        return micros_column(np.cumsum(stream.exponential(1 / rate_per_s, requests)))
    _check_load(rate_per_s, duration_s)
    # Given their number, the arrivals of a Poisson stream are uniform.
    return micros_column(np.sort(stream.uniform(0, duration_s, stream.poisson(rate_per_s * duration_s))))


def constant_offsets(*, rate_per_s: float, duration_s: float | None, requests: int | None) -> np.ndarray[Any, Any]:
    """Return the times (µs) of requests at equal gaps, from 0: for a duration, or else so many requests.

    Raises:
        InputError: too many requests.
    """
    if duration_s is None:
        return micros_column(np.arange(requests or 0) / rate_per_s)
    _check_load(rate_per_s, duration_s)
    offsets_us = micros_column(np.arange(math.ceil(rate_per_s * duration_s)) / rate_per_s)
    return offsets_us[offsets_us < max(1, round(duration_s * MICROS_PER_SECOND))]


def gamma_offsets(
    *, rate_per_s: float, cv: float, duration_s: float | None, requests: int | None, seed: int
) -> np.ndarray[Any, Any]:
    """Draw the times (µs) of a stream whose gaps are gamma distributed: for a duration, or else so many requests.

    Args:
        rate_per_s: requests a second.
        cv: coefficient of variation of the gaps; 1 is a Poisson stream, more is burstier.
        duration_s: only the requests before.
        requests: only so many, where there is no duration.
        seed: of the draw.

    Raises:
        InputError: too many requests.
    """
    stream = generator(seed, "gamma-arrivals")
    shape = cv**-2
    if duration_s is None:
        return micros_column(np.cumsum(stream.gamma(shape, 1 / (rate_per_s * shape), requests)))
    _check_load(rate_per_s, duration_s)
    parts, reached_s = [], 0.0
    while reached_s < duration_s:
        gaps_s = stream.gamma(shape, 1 / (rate_per_s * shape), _GAPS_AT_ONCE)
        parts.append(reached_s + np.cumsum(gaps_s))
        reached_s = float(parts[-1][-1])
    times_s = np.concatenate(parts)
    return micros_column(times_s[times_s < duration_s])


_GAPS_AT_ONCE = 1 << 14


def _check_load(rate_per_s: float, duration_s: float) -> None:
    if rate_per_s * duration_s > MAX_REQUESTS:
        raise InputError(
            f"rate {rate_per_s:g} for {duration_s:g} s gives more than {MAX_REQUESTS:,} requests; give a lower rate or "
            "a shorter duration"
        )


def steady_poisson(
    *, rate_per_s: float, requests: int, endpoints: int = 1, seed: int = 42, prompt_tokens: int = 30,
    output_tokens: int = 20,
) -> Arrivals:  # fmt: skip
    """Draw a Poisson stream of constant rate over equally likely endpoints, all requests of one size.

    Raises:
        InputError: a rate that is not positive and finite, or a count below 1 or too large.
    """
    if not (math.isfinite(rate_per_s) and rate_per_s > 0):
        raise InputError(f"rate must be a positive number of requests a second, not {rate_per_s}")
    if not 1 <= requests <= MAX_REQUESTS:
        raise InputError(f"requests must lie between 1 and {MAX_REQUESTS:,}, not {requests}")
    if endpoints < 1:
        raise InputError(f"endpoints must be at least 1, not {endpoints}")
    gaps = generator(seed, "poisson-arrivals").exponential(1 / rate_per_s, requests)
    return Arrivals(
        arrival_us=micros_column(np.cumsum(gaps)),
        endpoint_id=generator(seed, "poisson-endpoints").integers(1, endpoints, requests, endpoint=True),
        prompt_tokens=np.full(requests, prompt_tokens, np.int64),
        output_tokens=np.full(requests, output_tokens, np.int64),
        slo_us=np.zeros(requests, np.int64),
    )


def _spread(times_s: np.ndarray[Any, Any], load_at: Sequence[int], seed: int, weights: Sequence[float] | None) -> Draw:
    """Give each time an endpoint among those deployed in its bin, and shift it by 90 s for each of them."""
    deployed = deployed_per_bin(load_at, _POISSON_BINS)
    bins = np.minimum((times_s // BIN_S).astype(np.int64), _POISSON_BINS - 1)
    models = deployed[bins]
    return Draw(
        arrival_us=micros_column(times_s + LOAD_SHIFT_S * models),
        endpoint_id=_endpoints(models, generator(seed, "poisson-endpoints"), weights),
        bin_index=bins,
    )


def _low_rate(scale: float) -> float:
    _check_scale(scale)
    low_per_s = scale / 0.2
    _check_total(low_per_s * _STAGES * _STAGE_S * _HIGH_STAGE_FACTOR, scale)
    return low_per_s


def _check_scale(scale: float) -> None:
    if not (math.isfinite(scale) and scale > 0):
        raise InputError(f"scale must be a positive number, not {scale}")


def _check_total(requests: float, scale: float) -> None:
    if requests > MAX_REQUESTS:
        raise InputError(
            f"scale {scale:g} gives {requests:.3g} requests, more than {MAX_REQUESTS:,}; give a lower scale"
        )
