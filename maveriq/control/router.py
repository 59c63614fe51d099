"""The router: picks the replica that a request goes to, among those that are ready, by a routing policy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from maveriq.control.deployment_manager import Deployment, DeploymentState
from maveriq.control.routing_policies import RoutingPolicy, RoutingRule, routing_policy
from maveriq.domain.deployments import Batching
from maveriq.domain.requests import Request
from maveriq.units import Micros

DEFAULT_RULES = {Batching.EXCLUSIVE: RoutingRule.RANDOM, Batching.CONTINUOUS: RoutingRule.LEAST_OUTSTANDING}
"""The default routing rule, by how engines batch.

Exclusive engines: at random, as in the published AlpaServe runs. Continuous engines: the fewest outstanding requests.
The router counts these by itself, whatever the engine, and they show which replica is slower or got longer requests.
Turns and chance do not see that.
"""


class RequestRouter(Protocol):
    """Chooses a replica for each request of an endpoint that has several."""

    def choose(self, replicas: Sequence[Deployment], request: Request) -> Deployment:
        """Return one of the replicas; equal calls in an equal order must give equal answers."""

    def sent(self, deployment: Deployment, request: Request, now_us: Micros, service_us: Micros) -> None:
        """Note that a replica was given a request with this predicted service time."""


class Router:
    """Picks replicas by a routing policy.

    Args:
        rule: which policy; None for the one of `DEFAULT_RULES`.
        seed: of random choices.
    """

    __slots__ = ("_policies",)

    def __init__(self, rule: RoutingRule | None, seed: int) -> None:
        rules = {batching: rule or default for batching, default in DEFAULT_RULES.items()}
        made = {each: routing_policy(each, seed) for each in dict.fromkeys(rules.values())}
        self._policies: dict[Batching, RoutingPolicy] = {batching: made[each] for batching, each in rules.items()}

    def policy(self, batching: Batching) -> RoutingPolicy:
        """Return the policy for engines that batch in a way."""
        return self._policies[batching]

    def choose(self, replicas: Sequence[Deployment], request: Request) -> Deployment:
        """Return the replica for a request: one that is up, else one that will be up again."""
        ready = self.ready(replicas)
        return self._policies[ready[0].endpoint.batching].choose(ready, request)

    @classmethod
    def ready(cls, replicas: Sequence[Deployment]) -> Sequence[Deployment]:
        """Return the replicas that a request is sent to one of, or the one that explains why none takes it."""
        up = [replica for replica in replicas if replica.state is DeploymentState.UP]
        return up or [replica for replica in replicas if replica.serves] or cls._latest(replicas)

    @staticmethod
    def _latest(replicas: Sequence[Deployment]) -> Sequence[Deployment]:
        """Return the replica that best explains why none serves: the last one neither removed nor rejected."""
        gone = (DeploymentState.REMOVED, DeploymentState.REJECTED)
        return [replica for replica in replicas if replica.state not in gone][-1:] or replicas[-1:]

    def sent(self, deployment: Deployment, request: Request, now_us: Micros, service_us: Micros) -> None:
        """Note that a replica was given a request."""
        self._policies[deployment.endpoint.batching].sent(deployment, request, now_us, service_us)
