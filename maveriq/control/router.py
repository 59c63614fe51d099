"""The router: picks the replica that a request goes to."""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from typing import Protocol, assert_never

from maveriq.control.deployment_manager import Deployment, DeploymentState
from maveriq.domain.requests import Request
from maveriq.streams import pick
from maveriq.units import Micros


class RoutingRule(StrEnum):
    """How to pick among replicas that are equally ready."""

    UNIFORM = "uniform"  # at random, as in the published AlpaServe runs
    LEAST_WORK = "least-work"  # the replica whose assigned work ends first, as AlpaServe itself does


class RequestRouter(Protocol):
    """Chooses a replica for each request of an endpoint that has several."""

    def choose(self, replicas: Sequence[Deployment], request: Request) -> Deployment:
        """Return one of the replicas; equal calls in an equal order must give equal answers."""

    def committed(self, deployment: Deployment, now_us: Micros, service_us: Micros) -> None:
        """Note that a request with this predicted service time was assigned to a replica."""


class Router:
    """Picks replicas. A random pick depends on the seed and the request ID alone."""

    __slots__ = ("_busy_until_us", "_choice", "_seed")

    def __init__(self, choice: RoutingRule, seed: int) -> None:
        self._choice = choice
        self._seed = seed
        self._busy_until_us: dict[int, Micros] = {}

    def choose(self, replicas: Sequence[Deployment], request: Request) -> Deployment:
        """Return the replica for a request: one that is up, else one that will be up again."""
        up = [replica for replica in replicas if replica.state is DeploymentState.UP]
        ready = up or [replica for replica in replicas if replica.serves] or self._latest(replicas)
        match self._choice:
            case RoutingRule.UNIFORM:
                return ready[pick(self._seed, "replicas", request.request_id, len(ready))]
            case RoutingRule.LEAST_WORK:
                return min(ready, key=lambda replica: self._busy_until_us.get(replica.deployment_id, 0))
            case _ as never:
                assert_never(never)

    @staticmethod
    def _latest(replicas: Sequence[Deployment]) -> Sequence[Deployment]:
        """Return the replica that best explains why none serves: the last one neither removed nor rejected."""
        gone = (DeploymentState.REMOVED, DeploymentState.REJECTED)
        return [replica for replica in replicas if replica.state not in gone][-1:] or replicas[-1:]

    def committed(self, deployment: Deployment, now_us: Micros, service_us: Micros) -> None:
        """Record that a replica was assigned a request of this predicted service time."""
        if self._choice is RoutingRule.LEAST_WORK:
            busy_until_us = self._busy_until_us.get(deployment.deployment_id, 0)
            self._busy_until_us[deployment.deployment_id] = max(busy_until_us, now_us) + service_us
