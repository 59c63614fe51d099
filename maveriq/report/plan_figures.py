"""What a configuration would cost and serve: US dollars, tokens a second, and how many a cluster has GPUs for."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from maveriq.domain.cluster import Cluster
from maveriq.domain.deployments import EndpointSpec
from maveriq.policy.configuration import Candidate
from maveriq.policy.scores import usd_per_million_tokens

_SECONDS_PER_HOUR = 3600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanFigures:
    """Figures of one deployment that is never idle, in US dollars; None where no price is known.

    Args:
        output_tokens_per_s: tokens that it makes.
        requests_per_s: requests that it finishes.
        usd_per_hour: price of its GPUs.
        usd_per_million_tokens: price of a million output tokens, their prompts included.
        deployments: how many such deployments the cluster has GPUs for.
    """

    output_tokens_per_s: float
    requests_per_s: float
    usd_per_hour: float | None
    usd_per_million_tokens: float | None
    deployments: int

    @property
    def usd_per_1000_requests(self) -> float | None:
        """Price of a thousand requests."""
        return None if self.usd_per_hour is None else self.usd_per_hour / _SECONDS_PER_HOUR * 1e3 / self.requests_per_s


def figures_of(candidate: Candidate, endpoint: EndpointSpec, cluster: Cluster) -> PlanFigures:
    """Return the figures of a configuration whose batches follow each other without a pause."""
    batch, usd_per_hour = candidate.configuration.batch_size, candidate.usd_per_hour
    requests_per_s = batch / candidate.service.latency_s
    return PlanFigures(
        output_tokens_per_s=requests_per_s * endpoint.output_tokens,
        requests_per_s=requests_per_s,
        usd_per_hour=usd_per_hour,
        usd_per_million_tokens=None
        if usd_per_hour is None
        else usd_per_million_tokens(candidate.service, batch=batch, usd_per_hour=usd_per_hour),
        deployments=_deployments(candidate, cluster),
    )


def _deployments(candidate: Candidate, cluster: Cluster) -> int:
    """Return how many such deployments the GPUs of the kind would hold, if they were empty."""
    kind = cluster.gpus[candidate.gpu_ids[0]].kind
    of_node = Counter(gpu.node for gpu in cluster.gpus if gpu.kind == kind)
    needed = candidate.configuration
    if needed.network_hops:
        return sum(count // needed.tp for count in of_node.values()) // needed.pp
    return sum(count // needed.gpus for count in of_node.values())
