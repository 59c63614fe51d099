"""A policy that knows what was said of single endpoints before it is asked about them.

A service brings its engines back as they were deployed, and lets a developer name the placement
of one deployment. Neither is part of an ask (`DeployAsk`), so both are told to this wrapper.
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
    """Asks `usual`, except for endpoints of which something else was said.

    Args:
        usual: decides where nothing was said.
        by_name: the policies that an endpoint may be given instead, by the name of their placement.
        decided: told of each new decision to deploy, so that it can be pinned after a restart.
    """

    default: Policy
    by_name: Mapping[str, Policy] = field(default_factory=dict)
    decided: Callable[[int, Plans], None] | None = None
    _named: dict[int, Policy] = field(default_factory=dict)
    _pinned: dict[int, Plans] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The name of the usual policy."""
        return self.default.name

    def place_by(self, endpoint_id: int, name: str) -> None:
        """Let the policy of a name decide on an endpoint.

        Raises:
            UnknownNameError: no such policy.
        """
        if name not in self.by_name:
            raise UnknownNameError("placement", name, self.by_name)
        self._named[endpoint_id] = self.by_name[name]

    def pin(self, endpoint_id: int, plans: Plans) -> None:
        """Deploy an endpoint by these plans, if they still fit when it is asked for."""
        self._pinned[endpoint_id] = plans

    def forget(self, endpoint_id: int) -> None:
        """Drop what was said of an endpoint."""
        self._named.pop(endpoint_id, None)
        self._pinned.pop(endpoint_id, None)

    def decide(self, endpoint: EndpointSpec, view: ClusterView) -> Decision:
        """Return the pinned plans where they fit, else what the endpoint's policy decides.

        An error of that policy becomes a rejection: one ask must not end a cluster that serves others.
        """
        pinned = self._pinned.get(endpoint.endpoint_id, ())
        if pinned and _belongs(pinned, endpoint) and _fits(pinned, view):
            return Deploy(plans=pinned)
        try:
            decision = self._named.get(endpoint.endpoint_id, self.default).decide(endpoint, view)
        except MaveriqError as error:
            return Rejection(reason=str(error))
        if isinstance(decision, Deploy) and self.decided:
            self.decided(endpoint.endpoint_id, decision.plans)
        return decision


def _belongs(plans: Sequence[DeploymentPlan], endpoint: EndpointSpec) -> bool:
    return all(plan.model == endpoint.model and plan.configuration.batch_size == endpoint.batch_size for plan in plans)


def _fits(plans: Sequence[DeploymentPlan], view: ClusterView) -> bool:
    """Say whether every GPU of the plans is up and has room for all that they put on it."""
    free = {gpu.gpu_id: gpu.free_bytes for gpu in view.gpus}
    for plan in plans:
        for gpu_id, amount in zip(plan.gpu_ids, plan.gpu_bytes, strict=True):
            if free.get(gpu_id, -1) < amount:
                return False
            free[gpu_id] -= amount
    return True
