"""How long an execution takes where no hardware answers: in the simulator, and with emulated engines."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from maveriq.domain.parallel import DeploymentPlan
from maveriq.domain.requests import Request
from maveriq.estimate.estimator import ContentionAware, Estimator, ServiceEstimate, service_at
from maveriq.units import Micros, duration_micros

if TYPE_CHECKING:
    import numpy as np

RECORDED = "recorded"
"""The name of `RecordedServiceTimes`, as `--service-times` takes it."""

_MAX_CACHED = 1_000_000


@runtime_checkable
class ServiceTimes(Protocol):
    """Answers for the hardware: how long a deployment takes for requests."""

    @property
    def name(self) -> str:
        """The name, as `--service-times` takes it."""

    @property
    def contention(self) -> ContentionAware | None:
        """How co-located engines slow each other down; None if they do not."""

    def times_us(self, plan: DeploymentPlan, requests: Sequence[Request]) -> tuple[Micros, Micros]:
        """Return how long a batch takes to its first and to its last token, both at least 1 µs, without contention."""


class EstimatedServiceTimes:
    """An estimator answers. A batch takes as long as its longest prompt and longest output together."""

    def __init__(self, estimator: Estimator) -> None:
        self.estimator = estimator
        self.contention = estimator if isinstance(estimator, ContentionAware) else None
        # Hashing a plan takes longer than the rest of a lookup, so the keys hold its identity,
        # and `_plans` keeps it alive.
        self._cache: dict[tuple[int, int, int, int], tuple[Micros, Micros]] = {}
        self._plans: dict[int, DeploymentPlan] = {}

    @property
    def name(self) -> str:
        """The estimator's name."""
        return self.estimator.name

    def times_us(self, plan: DeploymentPlan, requests: Sequence[Request]) -> tuple[Micros, Micros]:
        """Return the estimated times; each distinct question is estimated once."""
        if len(requests) == 1:
            prompt_tokens, output_tokens = requests[0].prompt_tokens, requests[0].output_tokens
        else:
            prompt_tokens = max(request.prompt_tokens for request in requests)
            output_tokens = max(request.output_tokens for request in requests)
        key = (id(plan), prompt_tokens, output_tokens, len(requests))
        times = self._cache.get(key)
        if times is None:
            estimate = self._estimate(plan, prompt_tokens, output_tokens, len(requests))
            service_us = duration_micros(estimate.latency_s)
            times = (min(duration_micros(estimate.first_token_s), service_us), service_us)
            if len(self._cache) >= _MAX_CACHED:  # a live cluster may run for months
                self._cache.clear()
                self._plans.clear()
            self._cache[key] = times
            self._plans[id(plan)] = plan
        return times

    def _estimate(self, plan: DeploymentPlan, prompt_tokens: int, output_tokens: int, batch: int) -> ServiceEstimate:
        return service_at(self.estimator, plan.gpu_ids)(
            plan.model, plan.configuration, prompt_tokens=prompt_tokens, output_tokens=output_tokens, batch=batch
        )


class RecordedServiceTimes:
    """The recorded service times of a workload; only the time of the last token is known.

    Args:
        service_us: recorded service time of each request, in the order of arrival.
    """

    name = RECORDED
    contention = None

    def __init__(self, service_us: np.ndarray[Any, Any]) -> None:
        self._service_us = service_us

    @property
    def recorded_us(self) -> np.ndarray[Any, Any]:
        """The recorded service time of each request."""
        return self._service_us

    def times_us(self, plan: DeploymentPlan, requests: Sequence[Request]) -> tuple[Micros, Micros]:  # noqa: ARG002
        """Return the longest recorded time among the requests, for first and last token."""
        service_us = max(int(self._service_us[request.request_id - 1]) for request in requests)
        return service_us, service_us
