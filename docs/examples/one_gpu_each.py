"""A whole policy: every model whole and in float16 on one GPU.

This is the smallest policy. Policies of your own are passed through Python; see docs/extending.md.
"""

from __future__ import annotations

from dataclasses import dataclass

from maveriq.domain.cluster import ClusterView
from maveriq.domain.deployments import EndpointSpec
from maveriq.domain.models import WeightType
from maveriq.domain.parallel import DeploymentPlan, ParallelConfig
from maveriq.estimate.estimator import Estimator
from maveriq.policy.policy import Decision, Deploy, Rejection


@dataclass(frozen=True, slots=True, kw_only=True)
class OneGpuEach:
    """Places a whole, unquantised model on the GPU with most free memory."""

    estimator: Estimator
    name: str = "one-gpu-each"

    def decide(self, endpoint: EndpointSpec, view: ClusterView) -> Decision:
        """Return one deployment on one GPU, or a rejection with the reason."""
        configuration = ParallelConfig(tp=1, pp=1, weights=WeightType.FLOAT16, batch_size=endpoint.batch_size)
        reason = self.estimator.why_not(endpoint.model, configuration)
        if reason:
            return Rejection(reason=reason)
        needed = self.estimator.memory(endpoint.model, configuration)
        roomiest = view.by_free_memory()[:1]
        if not roomiest or roomiest[0].free_bytes < needed:
            return Rejection(reason="no GPU has room for the whole model")
        service = self.estimator.service(
            endpoint.model,
            configuration,
            prompt_tokens=endpoint.prompt_tokens,
            output_tokens=endpoint.output_tokens,
            batch=endpoint.batch_size,
        )
        plan = DeploymentPlan(
            model=endpoint.model,
            configuration=configuration,
            gpu_ids=(roomiest[0].gpu_id,),
            gpu_bytes=(needed,),
            est_latency_s=service.latency_s,
            est_memory_bytes=needed,
        )
        return Deploy(plans=(plan,))
