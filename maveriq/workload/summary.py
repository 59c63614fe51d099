"""A workload in figures: counts, the rate over time, lengths."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from maveriq.units import MICROS_PER_SECOND, seconds
from maveriq.workload.arrivals import BIN_S
from maveriq.workload.requests import Workload

_MAX_BINS = 10_000


@dataclass(frozen=True, slots=True, kw_only=True)
class LengthSummary:
    """Tokens of all requests: observed quantiles, and the mean."""

    minimum: int
    p25: int
    median: int
    p75: int
    p90: int
    p99: int
    maximum: int
    mean: float


@dataclass(frozen=True, slots=True, kw_only=True)
class EndpointSummary:
    """A model of the set: when it is requested and how many requests it gets."""

    endpoint: int
    model: str
    requested_s: float
    requests: int


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkloadSummary:
    """Figures of a workload; `requests_per_bin` counts arrivals in each `bin_s` seconds from the start."""

    name: str
    requests: int
    first_arrival_s: float
    last_arrival_s: float
    bin_s: int
    requests_per_bin: tuple[int, ...]
    prompt_tokens: LengthSummary
    output_tokens: LengthSummary
    endpoints: tuple[EndpointSummary, ...]

    @property
    def mean_rate_per_s(self) -> float:
        """Requests a second between the first and the last arrival; 0 where they are one."""
        span_s = self.last_arrival_s - self.first_arrival_s
        return self.requests / span_s if span_s else 0.0


def summarise(workload: Workload) -> WorkloadSummary:
    """Return the figures of a workload."""
    arrivals = workload.arrivals
    last_s = int(arrivals.arrival_us[-1]) // MICROS_PER_SECOND
    bin_s = BIN_S * -(-(last_s + 1) // (BIN_S * _MAX_BINS))
    requests = np.bincount(arrivals.endpoint_id, minlength=len(workload.endpoints) + 1)
    return WorkloadSummary(
        name=workload.name,
        requests=len(arrivals),
        first_arrival_s=seconds(int(arrivals.arrival_us[0])),
        last_arrival_s=seconds(int(arrivals.arrival_us[-1])),
        bin_s=bin_s,
        requests_per_bin=tuple(np.bincount(arrivals.arrival_us // (bin_s * MICROS_PER_SECOND)).tolist()),
        prompt_tokens=_lengths(arrivals.prompt_tokens),
        output_tokens=_lengths(arrivals.output_tokens),
        endpoints=tuple(
            EndpointSummary(
                endpoint=endpoint.endpoint_id,
                model=endpoint.model.name,
                requested_s=seconds(endpoint.requested_us),
                requests=int(requests[endpoint.endpoint_id]),
            )
            for endpoint in workload.endpoints
        ),
    )


def _lengths(tokens: np.ndarray[Any, Any]) -> LengthSummary:
    quantiles = np.percentile(tokens, (0, 25, 50, 75, 90, 99, 100), method="inverted_cdf").tolist()
    names = ("minimum", "p25", "median", "p75", "p90", "p99", "maximum")
    return LengthSummary(**dict(zip(names, quantiles, strict=True)), mean=float(tokens.mean()))
