"""AlpaServe and AlpaServe* as policies: a placement is searched before the run, and endpoints get their part of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from maveriq.domain.cluster import ClusterView
from maveriq.domain.deployments import EndpointSpec
from maveriq.domain.parallel import DeploymentPlan, ParallelConfig
from maveriq.policy.alpaserve.problem import GroupShape, ModelProfile
from maveriq.policy.alpaserve.search import PlacementSolution
from maveriq.policy.policy import Decision, Deploy, Rejection
from maveriq.units import Bytes, gib


@dataclass(frozen=True, slots=True, kw_only=True)
class StaticPlacementPolicy:
    """Deploys each endpoint on every group that hosts it; one that no group hosts is rejected.

    Args:
        name: the name for `--policy`.
        solution: the result of the search; its model k (from 0) is endpoint k + 1.
        profiles: the profile of each endpoint's model that the search used.
    """

    name: str
    solution: PlacementSolution
    profiles: Sequence[ModelProfile]

    def decide(self, endpoint: EndpointSpec, view: ClusterView) -> Decision:
        """Return a replica on each group that hosts the endpoint and has enough free memory."""
        plans = list(self._plans(endpoint))
        if not plans:
            return Rejection(reason=self._why_not_hosted())
        free = {gpu.gpu_id: gpu.free_bytes for gpu in view.gpus}
        fitting = [plan for plan in plans if why_no_room(plan, free) is None]
        if not fitting:
            return Rejection(reason="; ".join(why_no_room(plan, free) or "" for plan in plans))
        return Deploy(plans=tuple(fitting))

    def replicas(self, endpoint_id: int) -> int:
        """Return the number of groups that host an endpoint."""
        return sum(endpoint_id - 1 in group.model_indices for group in self.solution.groups)

    def _plans(self, endpoint: EndpointSpec) -> Iterator[DeploymentPlan]:
        """Yield the replicas; groups take the GPUs in the order of their ids."""
        model, first = endpoint.endpoint_id - 1, 0
        for group in self.solution.groups:
            gpu_ids = tuple(range(first, first + group.tp * group.pp))
            first += len(gpu_ids)
            if model not in group.model_indices:
                continue
            stages = self.profiles[model].shapes[GroupShape(group.tp, group.pp)]
            gpu_bytes = tuple(round(size) for size in stages.stage_weight_bytes for _ in range(group.tp))
            yield DeploymentPlan(
                model=endpoint.model,
                configuration=ParallelConfig(
                    tp=group.tp, pp=group.pp, weights=endpoint.model.unconverted, batch_size=endpoint.batch_size
                ),
                gpu_ids=gpu_ids,
                gpu_bytes=gpu_bytes,
                est_latency_s=sum(stages.stage_latency_s),
                est_memory_bytes=sum(gpu_bytes),
            )

    def _why_not_hosted(self) -> str:
        return self.solution.reason or f"{self.name}'s placement leaves it out"


def why_no_room(plan: DeploymentPlan, free: dict[int, Bytes]) -> str | None:
    """Return why a plan does not fit the GPUs that are up; None if it fits."""
    for gpu_id, size in zip(plan.gpu_ids, plan.gpu_bytes, strict=True):
        if gpu_id not in free:
            return f"the placement has it on GPU {gpu_id}, which is down"
        if free[gpu_id] < size:
            room = f"{gib(free[gpu_id]):.1f} GiB free of the {gib(size):.1f} GiB it needs"
            return f"the placement has it on GPU {gpu_id}, which has {room}"
    return None


def described(solution: PlacementSolution, names: Sequence[str]) -> str:
    """Return a placement in one line: its groups with their models, and the SLO attainment that the search simulated.

    Args:
        solution: the placement.
        names: what to call model 0, 1, ... of the problem.
    """
    if solution.best is None:
        return f"no placement: {solution.reason}"
    groups = "; ".join(
        f"TP {group.tp} x PP {group.pp} for {' '.join(names[model] for model in group.model_indices) or 'no model'}"
        for group in solution.groups
    )
    return f"{groups} (attainment {100 * solution.best.attainment:.1f} % in the search's own simulator)"
