"""A policy wrapper that pins endpoints to given plans or to a policy of their own.

The service uses it to bring engines back as they were deployed, and to let a developer choose the
placement of one deployment.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from maveriq.domain.cluster import ClusterView
from maveriq.domain.deployments import EndpointSpec
from maveriq.domain.parallel import DeploymentPlan
from maveriq.errors import MaveriqError, UnknownNameError
from maveriq.policy.policy import Decision, Deploy, Policy, Rejection

Plans: TypeAlias = tuple[DeploymentPlan, ...]


@dataclass(slots=True, kw_only=True)
class PinnedPlacementPolicy:
    """Decides by the default policy, except for endpoints with an override.

    Args:
        default: decides on endpoints without an override.
        by_name: the policies that `place_by` can choose from.
    """

    default: Policy
    by_name: Mapping[str, Policy] = field(default_factory=dict)
    _named: dict[int, Policy] = field(default_factory=dict)
    _pinned: dict[int, Plans] = field(default_factory=dict)
    _listener: Callable[[int, Plans], None] | None = None

    @property
    def name(self) -> str:
        """The name of the default policy."""
        return self.default.name

    def place_by(self, endpoint_id: int, name: str) -> None:
        """Let the policy with this name decide on an endpoint.

        Raises:
            UnknownNameError: there is no such policy.
        """
        if name not in self.by_name:
            raise UnknownNameError("placement", name, self.by_name)
        self._named[endpoint_id] = self.by_name[name]

    def pin(self, endpoint_id: int, plans: Plans) -> None:
        """Use these plans for an endpoint if they still fit when it is decided on."""
        self._pinned[endpoint_id] = plans

    def forget(self, endpoint_id: int) -> None:
        """Drop the overrides of an endpoint."""
        self._named.pop(endpoint_id, None)
        self._pinned.pop(endpoint_id, None)

    def on_decision(self, listener: Callable[[int, Plans], None]) -> None:
        """Call `listener` with the endpoint ID and the plans of each new decision to deploy."""
        self._listener = listener

    def decide(self, endpoint: EndpointSpec, view: ClusterView) -> Decision:
        """Return the pinned plans if they fit, else the decision of the endpoint's policy.

        An error of that policy becomes a rejection, because one endpoint must not stop a cluster that serves others.
        """
        pinned = self._pinned.get(endpoint.endpoint_id, ())
        if pinned and _belongs(pinned, endpoint) and _fits(pinned, view):
            return Deploy(plans=pinned)
        try:
            decision = self._named.get(endpoint.endpoint_id, self.default).decide(endpoint, view)
        except MaveriqError as error:
            return Rejection(reason=str(error))
        if isinstance(decision, Deploy) and self._listener:
            self._listener(endpoint.endpoint_id, decision.plans)
        return decision


def _belongs(plans: Sequence[DeploymentPlan], endpoint: EndpointSpec) -> bool:
    return all(plan.model == endpoint.model and plan.configuration.batch_size == endpoint.batch_size for plan in plans)


def _fits(plans: Sequence[DeploymentPlan], view: ClusterView) -> bool:
    """Return whether every GPU of the plans is up and has room for all of them."""
    free = {gpu.gpu_id: gpu.free_bytes for gpu in view.gpus}
    for plan in plans:
        for gpu_id, amount in zip(plan.gpu_ids, plan.gpu_bytes, strict=True):
            if free.get(gpu_id, -1) < amount:
                return False
            free[gpu_id] -= amount
    return True
