"""MaverIQ's policy: the best configuration for the intent, its shards placed by load."""

from __future__ import annotations

from dataclasses import dataclass

from maveriq.domain.cluster import ClusterView
from maveriq.domain.deployment import DeploymentPlan
from maveriq.domain.intents import DeployAsk
from maveriq.estimate.base import Estimator
from maveriq.policy.base import Decision, Deploy, Rejection
from maveriq.policy.configure import Accuracy, Candidate, rank, room_sentence
from maveriq.policy.place import PlacementRule, place_shards


@dataclass(frozen=True, slots=True, kw_only=True)
class MaverIQ:
    """Chooses by SPEC 4, places by SPEC 5.

    `rule` None keeps the GPUs with most free memory, to which the configuration was fitted.
    """

    name: str
    estimator: Estimator
    accuracy: Accuracy
    rule: PlacementRule | None

    def decide(self, ask: DeployAsk, view: ClusterView) -> Decision:
        """Return one deployment of the best candidate, or why none can be made."""
        if not view.gpus:
            return Rejection(reason="every GPU is down")
        ranking = rank(ask, view, self.estimator, self.accuracy)
        if not ranking.candidates:
            return Rejection(reason=f"{ranking.why_empty()} ({room_sentence(view)})")
        best = ranking.candidates[0]
        gpu_ids = self._place(best, view)
        if gpu_ids is None:
            return Rejection(reason=f"policy {self.name!r} found no GPU for a shard of {best.configuration}")
        plan = DeploymentPlan(
            model=ask.model,
            configuration=best.configuration,
            layer_split=best.layer_split,
            gpu_ids=gpu_ids,
            gpu_bytes=best.gpu_bytes,
            est_latency_s=best.service.latency_s,
            est_memory_bytes=best.memory_bytes,
            note=ranking.note,
        )
        return Deploy(plans=(plan,))

    def _place(self, best: Candidate, view: ClusterView) -> tuple[int, ...] | None:
        if self.rule is None:
            return best.gpu_ids
        return place_shards(best.gpu_bytes, self.rule(view.gpus))
