"""The policy's protocol: pure decisions from a view, without clock, randomness or I/O."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, TypeAlias

from maveriq.domain.cluster import ClusterView
from maveriq.domain.deployments import EndpointSpec
from maveriq.domain.parallel import DeploymentPlan
from maveriq.errors import InputError


@dataclass(frozen=True, slots=True, kw_only=True)
class Deploy:
    """Start these deployments; each serves the endpoint.

    Raises:
        InputError: there is no plan; return a `Rejection` instead.
    """

    plans: tuple[DeploymentPlan, ...]

    def __post_init__(self) -> None:
        if not self.plans:
            raise InputError("a Deploy needs at least one plan; return a Rejection with its reason instead")


@dataclass(frozen=True, slots=True, kw_only=True)
class Rejection:
    """The endpoint cannot be deployed; `reason` is one clause that a user can act on."""

    reason: str


Decision: TypeAlias = Deploy | Rejection


class Policy(Protocol):
    """Decides how an endpoint is served on the cluster as it is."""

    @property
    def name(self) -> str:
        """The name for `--policy`."""

    def decide(self, endpoint: EndpointSpec, view: ClusterView) -> Decision:
        """Return the deployments to start, or why there are none.

        Equal arguments must give equal decisions. Plans must fit the free memory of the view.
        """
