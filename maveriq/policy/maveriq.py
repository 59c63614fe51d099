"""MaverIQ's policy: the best configuration for the intent (SPEC 4), its shards placed by load (SPEC 5).

A placement rule orders the GPUs. `place_shards` puts the largest shard first on the first GPU in
that order that has enough free memory, one shard on a GPU. A deployment that a node can hold stays
on one node.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import TypeAlias

from maveriq.domain.cluster import ClusterView, GpuView
from maveriq.domain.deployments import Batching, Cost, EndpointSpec
from maveriq.domain.parallel import DeploymentPlan
from maveriq.errors import InputError, InvariantError
from maveriq.estimate.estimator import Estimator
from maveriq.policy.configuration import AccuracyLookup, Candidate, best_candidate, free_memory_text, rank
from maveriq.policy.load_ranking import EngineEstimates, LoadCandidate, best_at_load, rank_at_load
from maveriq.policy.policy import Decision, Deploy, Rejection
from maveriq.policy.surprises import EvidenceLookup, no_evidence
from maveriq.units import Bytes

PlacementRule: TypeAlias = Callable[[Sequence[GpuView]], Sequence[GpuView]]
"""Takes the GPUs in the order that breaks ties, usually by id, and returns them in the order of preference."""


@dataclass(frozen=True, slots=True)
class GpuByGpu:
    """A placement rule that ranks each GPU by itself, the lowest first, so that GPUs may go and the others keep theirs.

    Args:
        rank: of a GPU.
    """

    rank: Callable[[GpuView], tuple[float, ...]]

    def __call__(self, gpus: Sequence[GpuView]) -> list[GpuView]:
        """Return the GPUs in the order of preference."""
        return sorted(gpus, key=self.rank)


class TieBreak(StrEnum):
    """Which GPU goes first among those that a placement rule finds equal."""

    FREE_MEMORY = "free-memory"  # most free memory, then fewest deployments, then the lowest id
    GPU_ID = "gpu-id"  # the lowest id, as in the published system

    def order(self, gpus: Sequence[GpuView]) -> Sequence[GpuView]:
        """Return the GPUs in the order that a stable sort keeps for equal ones."""
        if self is TieBreak.GPU_ID:
            return gpus
        return sorted(gpus, key=lambda gpu: (-gpu.free_bytes, gpu.tenants, gpu.gpu_id))


least_loaded_first = GpuByGpu(lambda gpu: (gpu.load,))
"""Spread: ascending load."""

packing = GpuByGpu(lambda gpu: (gpu.load >= 1.0, -gpu.load))
"""Pack: descending load among GPUs under 100 %, then the full ones."""


def hybrid(threshold: float) -> PlacementRule:
    """Pack up to a load, spread beyond it.

    Descending load among GPUs under `threshold` (0 to 1), then the rest by ascending load.

    Raises:
        InputError: a threshold outside 0 to 1.
    """
    if not 0 <= threshold <= 1:
        raise InputError(f"packing threshold must lie between 0 and 1, not {threshold}")
    return GpuByGpu(lambda gpu: (0, -gpu.load) if gpu.load < threshold else (1, gpu.load))


def place_shards(shards: Sequence[Bytes], order: Sequence[GpuView]) -> tuple[int, ...] | None:
    """Return the GPU of each shard, in the order of the shards; None if a shard fits no GPU.

    A shard keeps its position, and so its stage and rank, on any GPU. If the shards fit the
    GPUs in any way at all, they fit in this one: a GPU that can hold the largest shard can hold
    any other, so using it leaves room for the rest.
    """
    taken: dict[int, int] = {}
    free = list(order)
    for position in sorted(range(len(shards)), key=lambda index: -shards[index]):
        gpu = next((gpu for gpu in free if gpu.free_bytes >= shards[position]), None)
        if gpu is None:
            return None
        free.remove(gpu)
        taken[position] = gpu.gpu_id
    return tuple(taken[position] for position in range(len(shards)))


def place_on_a_node(shards: Sequence[Bytes], order: Sequence[GpuView]) -> tuple[int, ...] | None:
    """Return the GPUs of the shards as `place_shards`, all on the node that comes first in the order with enough room.

    A node has come when the shards fit those of its GPUs that have come.
    """
    nodes: dict[int, list[GpuView]] = {}
    for gpu in (gpu for gpu in order if gpu.free_bytes >= min(shards)):
        come = nodes.setdefault(gpu.node, [])
        come.append(gpu)
        placed = place_shards(shards, come) if len(come) >= len(shards) else None
        if placed is not None:
            return placed
    return None


@dataclass(frozen=True, slots=True, kw_only=True)
class MaverIQ:
    """MaverIQ's policy: chooses a configuration by SPEC 4, places its shards by SPEC 5.

    `rule` None keeps the GPUs with most free memory, by which the layers were split.
    `tie_break` orders GPUs that the rule finds equal. `evidence` is for notes on decisions. `cost` is what
    `min-cost` counts. `engines` are the estimates of continuous engines, None where there are none.
    """

    name: str
    estimator: Estimator
    accuracy: AccuracyLookup
    rule: PlacementRule | None
    tie_break: TieBreak = TieBreak.GPU_ID
    evidence: EvidenceLookup = no_evidence
    cost: Cost = Cost.MONEY
    engines: EngineEstimates | None = None

    def decide(self, endpoint: EndpointSpec, view: ClusterView) -> Decision:
        """Return deployments of the best candidate, one for each replica, or why they cannot be made."""
        if not view.gpus:
            return Rejection(reason="every GPU is down")
        if endpoint.batching is Batching.CONTINUOUS:
            return self._decide_at_load(endpoint, view)
        plans: list[DeploymentPlan] = []
        wanted = endpoint.replicas or 1
        while len(plans) < wanted:
            found = self._plan(endpoint, view)
            if isinstance(found, Rejection):
                if plans:
                    return Rejection(reason=f"only {len(plans)} of {wanted} replicas fit: {found.reason}")
                return found
            plans.append(found)
            view = view.with_deployment(found.shares)
            # The others are like the first.
            endpoint = replace(endpoint, configuration=found.configuration.at_any_place())
        return Deploy(plans=tuple(plans))

    def _plan(self, endpoint: EndpointSpec, view: ClusterView) -> DeploymentPlan | Rejection:
        """Return a deployment of the best candidate, on GPUs without continuous engines."""
        view = ClusterView(gpus=tuple(gpu for gpu in view.gpus if not gpu.continuous_tenants))
        if not view.gpus:
            return Rejection(reason="every GPU has an engine that batches continuously")
        asked = (endpoint, view, self.estimator, self.accuracy)
        best, note = best_candidate(*asked, cost=self.cost, evidence=self.evidence), ""
        if best is None:
            ranking = rank(*asked, cost=self.cost, evidence=self.evidence)
            if not ranking.candidates:
                return Rejection(reason=f"{ranking.why_empty()} ({free_memory_text(view)})")
            best, note = ranking.candidates[0], ranking.note
        gpu_ids = self._place(best, view)
        if gpu_ids is None:
            return Rejection(reason=f"policy {self.name!r} found no GPU for a shard of {best.configuration}")
        return DeploymentPlan(
            model=endpoint.model,
            configuration=replace(best.configuration, layer_split=best.layer_split),
            gpu_ids=gpu_ids,
            gpu_bytes=best.gpu_bytes,
            est_latency_s=best.service.latency_s,
            est_memory_bytes=best.memory_bytes,
            note="; ".join(filter(None, (note, best.note))),
        )

    def _place(self, best: Candidate, view: ClusterView) -> tuple[int, ...] | None:
        """Return the GPUs by the rule; where only several nodes together hold the deployment, those it was split by."""
        if self.rule is None or best.configuration.network_hops:
            return best.gpu_ids
        order = self.rule(self.tie_break.order(view.gpus))
        return place_on_a_node(best.gpu_bytes, [gpu for gpu in order if gpu.kind == best.configuration.gpu])

    def _decide_at_load(self, endpoint: EndpointSpec, view: ClusterView) -> Decision:
        """Return the deployments of the best configuration of continuous engines whose replicas all find GPUs."""
        if self.engines is None:
            raise InvariantError(f"policy {self.name!r} was made without estimates of engines that batch continuously")
        view = ClusterView(gpus=tuple(gpu for gpu in view.gpus if gpu.tenants == gpu.continuous_tenants))
        if not view.gpus:
            return Rejection(reason="every GPU has an exclusive engine")
        asked = (endpoint, view, self.engines, self.accuracy)
        for candidate, note in best_at_load(*asked, cost=self.cost):
            plans = self._replicas(endpoint, candidate, view, note)
            if plans is not None:
                return Deploy(plans=plans)
        ranking = rank_at_load(*asked, cost=self.cost)
        return Rejection(reason=f"{ranking.why_empty()} ({free_memory_text(view)})")

    def _replicas(
        self, endpoint: EndpointSpec, candidate: LoadCandidate, view: ClusterView, note: str
    ) -> tuple[DeploymentPlan, ...] | None:
        """Return a plan for each replica, None if the rule finds no GPUs for one."""
        plans: list[DeploymentPlan] = []
        order = self._order(candidate, view)
        while len(plans) < candidate.replicas:
            gpu_ids = place_on_a_node(candidate.gpu_bytes, order)
            if gpu_ids is None:
                return None
            plan = DeploymentPlan(
                model=endpoint.model,
                configuration=candidate.configuration,
                gpu_ids=gpu_ids,
                gpu_bytes=candidate.gpu_bytes,
                est_latency_s=candidate.service.latency_s,
                est_memory_bytes=sum(candidate.gpu_bytes),
                note=note,
            )
            plans.append(plan)
            # Replicas that share a GPU would only slow each other down.
            if self.rule is None or isinstance(self.rule, GpuByGpu):
                order = [gpu for gpu in order if gpu.gpu_id not in gpu_ids]
            else:
                view = view.without(gpu_ids)
                order = self._order(candidate, view)
        return tuple(plans)

    def _order(self, candidate: LoadCandidate, view: ClusterView) -> Sequence[GpuView]:
        """Return the GPUs of a candidate's kind in the order of preference."""
        gpus = [gpu for gpu in view.gpus if gpu.kind == candidate.configuration.gpu]
        return self.rule(self.tie_break.order(gpus)) if self.rule else ClusterView(gpus=tuple(gpus)).by_free_memory()
