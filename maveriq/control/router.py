"""Which replica of an endpoint a request goes to."""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from typing import assert_never

from maveriq.control.deployment_manager import Deployment, DeploymentState
from maveriq.domain.requests import Request
from maveriq.streams import pick
from maveriq.units import Micros


class RoutingRule(StrEnum):
    """How to choose among replicas that are equally ready."""

    UNIFORM = "uniform"  # at random, as the published AlpaServe runs did
    LEAST_WORK = "least-work"  # whose committed work ends first, as AlpaServe itself does


class Router:
    """Chooses replicas. A request's choice depends on the seed and its number, not on who asked before."""

    __slots__ = ("_busy_until_us", "_choice", "_seed")

    def __init__(self, choice: RoutingRule, seed: int) -> None:
        self._choice = choice
        self._seed = seed
        self._busy_until_us: dict[int, Micros] = {}

    def choose(self, replicas: Sequence[Deployment], request: Request) -> Deployment:
        """Return the replica for a request: one that is up if any is, else one that will be back."""
        up = [one for one in replicas if one.state is DeploymentState.UP]
        ready = up or [one for one in replicas if one.serves] or self._latest(replicas)
        match self._choice:
            case RoutingRule.UNIFORM:
                return ready[pick(self._seed, "replicas", request.request_id, len(ready))]
            case RoutingRule.LEAST_WORK:
                return min(ready, key=lambda one: self._busy_until_us.get(one.deployment_id, 0))
            case _ as never:
                assert_never(never)

    @staticmethod
    def _latest(replicas: Sequence[Deployment]) -> Sequence[Deployment]:
        """Return the replica that explains best why none serves: the last that is neither removed nor rejected."""
        gone = (DeploymentState.REMOVED, DeploymentState.REJECTED)
        return [one for one in replicas if one.state not in gone][-1:] or replicas[-1:]

    def committed(self, deployment: Deployment, now_us: Micros, service_us: Micros) -> None:
        """Note that a request of so much estimated service was given to a replica."""
        if self._choice is RoutingRule.LEAST_WORK:
            busy_until_us = self._busy_until_us.get(deployment.deployment_id, 0)
            self._busy_until_us[deployment.deployment_id] = max(busy_until_us, now_us) + service_us
