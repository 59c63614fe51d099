"""Baselines without intents: layers balanced over all GPUs, and replicas of one configuration for all models.

`balanced` is what Hugging Face Accelerate's `device_map="balanced"` does with a model that is loaded onto a node: its
layers are spread over all GPUs, as evenly as free memory allows, in the format of its checkpoint. GPUs work one after
the other, as the stages of a pipeline that serves one request.

`replicas` is how fleets of vLLM engines are usually run: every model gets the same engine arguments, in the format of
its checkpoint, and as many replicas as fit. `replicas_policy` finds the arguments.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from maveriq.domain.cluster import ClusterView
from maveriq.domain.deployments import Batching, EndpointSpec, Intent, Objective
from maveriq.domain.parallel import ParallelConfig
from maveriq.policy.maveriq import MaverIQ
from maveriq.policy.policy import Decision, Deploy, Rejection

BALANCED, REPLICAS = "balanced", "replicas"
BASELINES = (BALANCED, REPLICAS)
"""The names of the policies."""

_NO_INTENT = Intent(objective=Objective.MIN_LATENCY)
_MAX_REPLICAS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class BalancedPolicy:
    """Spreads the layers of each model evenly over all GPUs.

    A model with fewer layers than GPUs, or that a profile knows on fewer GPUs only, takes as many as it can. `placer`
    places a given configuration, each shard on the GPU by which its layers were split.
    """

    placer: MaverIQ
    name: str = BALANCED

    def decide(self, endpoint: EndpointSpec, view: ClusterView) -> Decision:
        """Return a deployment over as many GPUs as the model can take, or why there is none."""
        first: Decision | None = None
        for stages in range(len(view.gpus), 0, -1):
            found = _placed(self.placer, endpoint, _configuration(endpoint, tp=1, pp=stages), view)
            if isinstance(found, Deploy):
                return found
            first = first or found
        return first or Rejection(reason="every GPU is down")


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicasPolicy:
    """Gives every model the same TP and PP and equally many replicas, each on the GPUs with most free memory.

    `tp` and `pp` are 0 where no model fits. A model set that names the replicas of a model gets those.
    """

    placer: MaverIQ
    tp: int
    pp: int
    replicas: int
    name: str = REPLICAS

    def decide(self, endpoint: EndpointSpec, view: ClusterView) -> Decision:
        """Return the replicas of the endpoint, or why they do not fit."""
        if not self.tp:
            return Rejection(reason="no model fits the cluster in the format of its checkpoint")
        configuration = _configuration(endpoint, tp=self.tp, pp=self.pp)
        wanted = replace(endpoint, replicas=endpoint.replicas or self.replicas)
        return _placed(self.placer, wanted, configuration, view)


def _configuration(endpoint: EndpointSpec, *, tp: int, pp: int) -> ParallelConfig:
    return ParallelConfig(tp=tp, pp=pp, weights=endpoint.model.unconverted, batch_size=endpoint.batch_size)


def _placed(placer: MaverIQ, endpoint: EndpointSpec, configuration: ParallelConfig, view: ClusterView) -> Decision:
    if endpoint.batching is Batching.CONTINUOUS:
        return Rejection(reason="this policy places exclusive engines; give another --policy for continuous ones")
    return placer.decide(replace(endpoint, intent=_NO_INTENT, configuration=configuration), view)


def replicas_policy(placer: MaverIQ, endpoints: Sequence[EndpointSpec], idle: ClusterView) -> ReplicasPolicy:
    """Return the policy whose one configuration hosts most of these models.

    Of several, it is the one on the fewest GPUs, and of these the one with the highest TP. All models that it hosts get
    another replica as long as every one of them can have one.

    Args:
        placer: places a configuration.
        endpoints: the models, in the order in which they are deployed.
        idle: the GPUs before any of them is.
    """
    best, most = ReplicasPolicy(placer=placer, tp=0, pp=0, replicas=1), 0
    for tp, pp in _shapes(len(idle.gpus)):
        policy = ReplicasPolicy(placer=placer, tp=tp, pp=pp, replicas=1)
        if (count := _hosted(policy, endpoints, idle)) > most:
            best, most = policy, count
    while most and best.replicas < _MAX_REPLICAS:
        more = replace(best, replicas=best.replicas + 1)
        if _hosted(more, endpoints, idle) < most:
            break
        best = more
    return best


def _shapes(gpus: int) -> Iterator[tuple[int, int]]:
    """Yield TP and PP on 1, 2, 4, ... GPUs, the highest TP first."""
    size = 1
    while size <= gpus:
        tp = size
        while tp:
            yield tp, size // tp
            tp //= 2
        size *= 2


def _hosted(policy: ReplicasPolicy, endpoints: Sequence[EndpointSpec], view: ClusterView) -> int:
    """Return how many of the endpoints fit together."""
    count = 0
    for endpoint in endpoints:
        found = policy.decide(endpoint, view)
        if isinstance(found, Deploy):
            count += 1
            for plan in found.plans:
                view = view.with_deployment(plan.shares)
    return count
