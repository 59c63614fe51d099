"""Scenarios of recorded runs from their description: own plans, own placement, own service times.

MaverIQ's requests are drawn again. Those of the baselines were drawn in another way (SPEC 7) and
cannot be, so that their recorded schedule is taken: when which replica was asked with which prompt.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, repeat

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
from maveriq.scenario.system import ReplaySystem
from maveriq.testbed.recordings import RecordedRun, Scheduled
from maveriq.testbed.replay import options_of
from maveriq.units import MICROS_PER_SECOND, Bytes
from maveriq.workload.arrivals import LOAD_SHIFT_S
from maveriq.workload.requests import Arrivals, Workload


def described(run: RecordedRun, scheduled: Scheduled, recorded: RunRecord, *, estimator: str) -> ReplaySystem:
    """Return the scenario of a recorded run; of the recording it takes the schedule, and that of baselines only.

    Args:
        run: whose description.
        scheduled: its schedule.
        recorded: its records, for the lengths and SLOs that go with the schedule.
        estimator: the estimator to plan with.

    Raises:
        InputError: a description that maveriq has no scenario for.
    """
    options = replace(options_of(run), estimator=estimator)
    if run.by_maveriq:
        return build_system(options)
    return _on_schedule(build_system(replace(options, alpaserve_as_published=True)), _arrivals(scheduled, recorded))


def _on_schedule(scenario: ReplaySystem, arrivals: Arrivals) -> ReplaySystem:
    """Return a baseline's scenario with the recorded schedule, in which each replica is an endpoint of its own."""
    policy = scenario.policy
    if not isinstance(policy, StaticPlacementPolicy):
        raise InvariantError(f"policy {policy.name!r} does not place ahead")
    entries = scenario.workload.endpoints
    # The published driver gives every entry a number, and one more per further replica.
    entry_of = tuple(
        chain.from_iterable(repeat(endpoint, max(1, policy.replicas(endpoint.endpoint_id))) for endpoint in entries)
    )
    endpoints = tuple(
        replace(
            endpoint,
            endpoint_id=endpoint_id,
            requested_us=endpoint.requested_us
            + (endpoint_id - endpoint.endpoint_id) * LOAD_SHIFT_S * MICROS_PER_SECOND,
        )
        for endpoint_id, endpoint in enumerate(entry_of, start=1)
    )
    workload = Workload(name=scenario.workload.name, endpoints=endpoints, arrivals=arrivals)
    return replace(scenario, policy=_ReplicaByReplica(policy, entry_of), workload=workload)


def _arrivals(scheduled: Scheduled, recorded: RunRecord) -> Arrivals:
    table = recorded.requests
    order = np.argsort(table.request_id)  # they arrived up to 0.1 s late, some out of turn
    return Arrivals(
        arrival_us=scheduled.arrival_us,
        endpoint_id=scheduled.endpoint_id,
        prompt_tokens=table.prompt_tokens[order],
        output_tokens=table.output_tokens[order],
        slo_us=table.slo_us[order],
    )


@dataclass(frozen=True, slots=True)
class _ReplicaByReplica:
    """A placement whose replicas are asked for one by one; `entry_of` has the ask that each belongs to."""

    placed: StaticPlacementPolicy
    entry_of: Sequence[EndpointSpec]

    @property
    def name(self) -> str:
        return self.placed.name

    def decide(self, endpoint: EndpointSpec, view: ClusterView) -> Decision:
        entry = self.entry_of[endpoint.endpoint_id - 1]
        # On an idle cluster it names all replicas; on this one those that are up would not fit again.
        idle = ClusterView(gpus=tuple(replace(gpu, free_bytes=gpu.capacity_bytes) for gpu in view.gpus))
        decision = self.placed.decide(entry, idle)
        if not isinstance(decision, Deploy):
            return decision
        first = 1 + self.entry_of.index(entry)
        return Deploy(plans=(decision.plans[endpoint.endpoint_id - first],))


@dataclass(frozen=True, slots=True)
class _AsBefore:
    """What a run had of each endpoint; None where it never came up."""

    plans: Mapping[int, DeploymentPlan | None]
    name: str = "as-before"

    def decide(self, endpoint: EndpointSpec, view: ClusterView) -> Decision:  # noqa: ARG002
        plan = self.plans.get(endpoint.endpoint_id)
        return Deploy(plans=(plan,)) if plan else Rejection(reason="it never came up")


def with_plans_of(run: RunRecord, scenario: ReplaySystem) -> ReplaySystem:
    """Return a scenario with the plans of a run in place of its own, so that placement plays no part."""
    plans = {one.endpoint.endpoint_id: one.plan for one in run.deployments}
    return replace(scenario, policy=_AsBefore(plans))


@dataclass(frozen=True, slots=True)
class Stretched:
    """An estimator whose service takes `factor` times as long."""

    estimator: CalibratedEstimator
    factor: float

    @property
    def name(self) -> str:
        """The name of the one that is stretched."""
        return self.estimator.name

    def why_not(self, model: ModelSpec, configuration: ParallelConfig) -> str | None:
        """Return why a configuration cannot be estimated, None if it can."""
        return self.estimator.why_not(model, configuration)

    def memory(self, model: ModelSpec, configuration: ParallelConfig) -> Bytes:
        """Estimate the memory, which stays as it is."""
        return self.estimator.memory(model, configuration)

    def service(
        self, model: ModelSpec, configuration: ParallelConfig, *, prompt_tokens: int, output_tokens: int, batch: int
    ) -> ServiceEstimate:
        """Estimate a batch."""
        return self._stretched(
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
        return self._stretched(
            self.estimator.service_on(
                gpu_ids, model, configuration, prompt_tokens=prompt_tokens, output_tokens=output_tokens, batch=batch
            )
        )

    def shares_process(self, configuration: ParallelConfig) -> bool:
        """Say whether an engine shares a process of the host with others like it."""
        return self.estimator.shares_process(configuration)

    def contention_delay_s(self, model: ModelSpec, configuration: ParallelConfig, *, co_located: int) -> float:
        """Return how much longer a token takes while so many neighbours are busy."""
        return self.factor * self.estimator.contention_delay_s(model, configuration, co_located=co_located)

    def _stretched(self, one: ServiceEstimate) -> ServiceEstimate:
        return replace(one, ttft_s=self.factor * one.ttft_s, tpot_s=self.factor * one.tpot_s)
