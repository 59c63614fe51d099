"""Systems built from the descriptions of recorded runs, with maveriq's own plans, placement and service times.

The requests of MaverIQ's runs are drawn again. Those of the baselines were drawn in another way (SPEC 7) and cannot
be drawn again, so their recorded schedule is used: arrival, replica and prompt of each request.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from maveriq.domain.cluster import ClusterView
from maveriq.domain.deployments import EndpointSpec
from maveriq.domain.models import ModelSpec
from maveriq.domain.parallel import DeploymentPlan, ParallelConfig
from maveriq.domain.records import RunRecord
from maveriq.errors import InvariantError
from maveriq.estimate.calibrated import CalibratedEstimator
from maveriq.estimate.estimator import ServiceEstimate
from maveriq.policy.alpaserve.policy import StaticPlacementPolicy
from maveriq.policy.policy import Decision, Deploy, Rejection
from maveriq.scenario.build import build_system
from maveriq.scenario.replica_endpoints import one_endpoint_per_replica
from maveriq.scenario.system import ReplaySystem
from maveriq.testbed.recordings import RecordedRun, Scheduled
from maveriq.testbed.replay import options_of
from maveriq.units import Bytes
from maveriq.workload.requests import Arrivals, Workload


def described_system(run: RecordedRun, scheduled: Scheduled, recorded: RunRecord, *, estimator: str) -> ReplaySystem:
    """Return the system of a recorded run. Only baselines use the recorded schedule.

    Args:
        run: the description.
        scheduled: the recorded schedule.
        recorded: the records, for the lengths and SLOs of the schedule.
        estimator: the estimator to plan with.

    Raises:
        InputError: maveriq cannot simulate the description.
    """
    options = replace(options_of(run), estimator=estimator)
    if run.by_maveriq:
        return build_system(options)
    return _on_schedule(build_system(replace(options, alpaserve_as_published=True)), _arrivals(scheduled, recorded))


def _on_schedule(system: ReplaySystem, arrivals: Arrivals) -> ReplaySystem:
    """Return a baseline's system with the recorded schedule, in which each replica is a separate endpoint."""
    policy = system.policy
    if not isinstance(policy, StaticPlacementPolicy):
        raise InvariantError(f"policy {policy.name!r} has no static placement")
    split_policy, endpoints = one_endpoint_per_replica(policy, system.workload.endpoints)
    workload = Workload(name=system.workload.name, endpoints=endpoints, arrivals=arrivals)
    return replace(system, policy=split_policy, workload=workload)


def _arrivals(scheduled: Scheduled, recorded: RunRecord) -> Arrivals:
    table = recorded.requests
    order = np.argsort(table.request_id)  # they arrived up to 0.1 s late, some out of order
    return Arrivals(
        arrival_us=scheduled.arrival_us,
        endpoint_id=scheduled.endpoint_id,
        prompt_tokens=table.prompt_tokens[order],
        output_tokens=table.output_tokens[order],
        slo_us=table.slo_us[order],
    )


@dataclass(frozen=True, slots=True)
class _PlansOfRun:
    """The plans of a run, by endpoint; None for an endpoint that never started."""

    plans: Mapping[int, DeploymentPlan | None]
    name: str = "plans-of-run"

    def decide(self, endpoint: EndpointSpec, view: ClusterView) -> Decision:  # noqa: ARG002
        plan = self.plans.get(endpoint.endpoint_id)
        return Deploy(plans=(plan,)) if plan else Rejection(reason="the endpoint never started")


def with_plans_of(run: RunRecord, system: ReplaySystem) -> ReplaySystem:
    """Return a system that uses the plans of a run, so that placement has no effect."""
    plans = {deployment.endpoint.endpoint_id: deployment.plan for deployment in run.deployments}
    return replace(system, policy=_PlansOfRun(plans))


@dataclass(frozen=True, slots=True)
class ScaledEstimator:
    """An estimator whose service times are multiplied by `factor`."""

    estimator: CalibratedEstimator
    factor: float

    @property
    def name(self) -> str:
        """The name of the original estimator."""
        return self.estimator.name

    def why_not(self, model: ModelSpec, configuration: ParallelConfig) -> str | None:
        """Return why a configuration cannot be estimated, None if it can."""
        return self.estimator.why_not(model, configuration)

    def memory(self, model: ModelSpec, configuration: ParallelConfig) -> Bytes:
        """Return the memory, which is not scaled."""
        return self.estimator.memory(model, configuration)

    def service(
        self, model: ModelSpec, configuration: ParallelConfig, *, prompt_tokens: int, output_tokens: int, batch: int
    ) -> ServiceEstimate:
        """Estimate a batch."""
        return self._scaled(
            self.estimator.service(
                model, configuration, prompt_tokens=prompt_tokens, output_tokens=output_tokens, batch=batch
            )
        )

    def service_on(
        self,
        gpu_ids: Sequence[int],
        model: ModelSpec,
        configuration: ParallelConfig,
        *,
        prompt_tokens: int,
        output_tokens: int,
        batch: int,
    ) -> ServiceEstimate:
        """Estimate a batch on these GPUs."""
        return self._scaled(
            self.estimator.service_on(
                gpu_ids, model, configuration, prompt_tokens=prompt_tokens, output_tokens=output_tokens, batch=batch
            )
        )

    def shares_process(self, configuration: ParallelConfig) -> bool:
        """Return whether an engine shares a host process with others."""
        return self.estimator.shares_process(configuration)

    def contention_delay_s(self, model: ModelSpec, configuration: ParallelConfig, *, co_located: int) -> float:
        """Return the delay of a token while `co_located` other engines are busy."""
        return self.factor * self.estimator.contention_delay_s(model, configuration, co_located=co_located)

    def _scaled(self, estimate: ServiceEstimate) -> ServiceEstimate:
        return replace(estimate, ttft_s=self.factor * estimate.ttft_s, tpot_s=self.factor * estimate.tpot_s)
