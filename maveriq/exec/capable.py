"""An estimator that also knows what the engine cannot do, so that policies choose among what really runs."""

from __future__ import annotations

from dataclasses import dataclass

from maveriq.domain.deployment import Configuration
from maveriq.domain.models import ModelSpec
from maveriq.estimate.base import Estimator, ServiceEstimate
from maveriq.exec.matrix import Arrangement, Device, engine_facts, reason_against
from maveriq.policy.split import even_split
from maveriq.units import Bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class CapableEstimator:
    """Another estimator's answers, but for configurations that an engine cannot run.

    Layers are not dealt yet when it is asked, so it looks at an even split; an engine that needs one may still refuse
    the split that a policy chooses.

    Args:
        base: answers everything else.
        engine: a key of `known_engines`.
        device: what the engine is to compute on.
        slices: whether GPUs are cut into slices (MIG); CUDA shows a process only one of them.
    """

    base: Estimator
    engine: str
    device: Device
    slices: bool = False

    @property
    def name(self) -> str:
        """The name of the estimator beneath, whose figures these are."""
        return self.base.name

    def why_not(self, model: ModelSpec, configuration: Configuration) -> str | None:
        """Return why a configuration cannot be estimated, or run by the engine; None if it can."""
        reason = self.base.why_not(model, configuration)
        if reason is not None or configuration.pp > model.layers:
            return reason
        if self.slices and configuration.gpus > 1:
            return "GPUs of this machine are slices (MIG), and no model spreads over several; turn MIG off"
        even = Arrangement(configuration=configuration, layer_split=even_split(model.layers, configuration.pp))
        refused = reason_against(engine_facts(self.engine), model, even, self.device)
        return refused and f"{self.engine}: {refused}"

    def service(
        self, model: ModelSpec, configuration: Configuration, *, prompt_tokens: int, output_tokens: int, batch: int
    ) -> ServiceEstimate:
        """Estimate one batch of equal requests, as `Estimator.service`."""
        return self.base.service(
            model, configuration, prompt_tokens=prompt_tokens, output_tokens=output_tokens, batch=batch
        )

    def memory(self, model: ModelSpec, configuration: Configuration) -> Bytes:
        """Estimate the memory of a deployment, as `Estimator.memory`."""
        return self.base.memory(model, configuration)
