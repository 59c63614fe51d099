"""How long an execution takes where no hardware answers: in the simulator, and with emulated engines."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

from maveriq.domain.parallel import DeploymentPlan
from maveriq.domain.requests import Request
from maveriq.errors import InputError
from maveriq.estimate.estimator import Estimator, PlacementAware, ServiceEstimate
from maveriq.scenario.system import ServingSystem
from maveriq.units import Micros, duration_micros

if TYPE_CHECKING:
    import numpy as np


_MAX_KNOWN = 1_000_000


class ServiceTimes(Protocol):
    """Answers for the hardware that is not there."""

    def times_us(self, deployment_id: int, plan: DeploymentPlan, requests: Sequence[Request]) -> tuple[Micros, Micros]:
        """Return how long until the first token and until the last, both at least 1 µs, if no neighbour is busy."""


class EstimatedServiceTimes:
    """An estimator answers. A batch takes as long as its longest prompt and output together."""

    def __init__(self, estimator: Estimator) -> None:
        self._estimator = estimator
        self._known: dict[tuple[int, int, int, int], tuple[Micros, Micros]] = {}

    def times_us(self, deployment_id: int, plan: DeploymentPlan, requests: Sequence[Request]) -> tuple[Micros, Micros]:
        """Return the estimated times; equal questions are estimated once."""
        if len(requests) == 1:
            prompt_tokens, output_tokens = requests[0].prompt_tokens, requests[0].output_tokens
        else:
            prompt_tokens = max(request.prompt_tokens for request in requests)
            output_tokens = max(request.output_tokens for request in requests)
        key = (deployment_id, prompt_tokens, output_tokens, len(requests))  # a deployment's plan never changes
        times = self._known.get(key)
        if times is None:
            estimate = self._estimate(plan, prompt_tokens, output_tokens, len(requests))
            service_us = duration_micros(estimate.latency_s)
            if len(self._known) >= _MAX_KNOWN:  # a service never ends
                self._known.clear()
            times = (min(duration_micros(estimate.first_token_s), service_us), service_us)
            self._known[key] = times
        return times

    def _estimate(self, plan: DeploymentPlan, prompt_tokens: int, output_tokens: int, batch: int) -> ServiceEstimate:
        estimator = self._estimator
        endpoint = (
            partial(estimator.service_on, plan.gpu_ids) if isinstance(estimator, PlacementAware) else estimator.service
        )
        return endpoint(
            plan.model, plan.configuration, prompt_tokens=prompt_tokens, output_tokens=output_tokens, batch=batch
        )


class RecordedServiceTimes:
    """The workload's own recorded times of service; only the last token's time is known."""

    def __init__(self, service_us: np.ndarray[Any, Any]) -> None:
        self._service_us = service_us

    def times_us(self, deployment_id: int, plan: DeploymentPlan, requests: Sequence[Request]) -> tuple[Micros, Micros]:  # noqa: ARG002
        """Return the recorded time of the request that took longest, for first and last token."""
        service_us = max(int(self._service_us[request.request_id - 1]) for request in requests)
        return service_us, service_us


def service_times_for(scenario: ServingSystem) -> ServiceTimes:
    """Return who answers for the hardware.

    Raises:
        InputError: recorded service times are wanted, but the workload has none.
    """
    if scenario.serve is not None:
        return EstimatedServiceTimes(scenario.serve)
    service_us = scenario.workload.arrivals.service_us
    if service_us is None:
        raise InputError(
            f"workload {scenario.workload.name!r} has no recorded service times; "
            "give a schedule with a service_s column, or serve with an estimator"
        )
    return RecordedServiceTimes(service_us)
