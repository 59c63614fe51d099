"""An estimator: what if the same engines ran on a GPU that is faster by a factor?

This estimator calls another one and divides its times.
"""

from __future__ import annotations

from dataclasses import dataclass

from maveriq.domain.models import ModelSpec
from maveriq.domain.parallel import ParallelConfig
from maveriq.estimate.estimator import Estimator, ServiceEstimate
from maveriq.units import Bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class FasterGpu:
    """Another estimator's answers, its times divided by `speedup`; memory stays."""

    base: Estimator
    speedup: float

    @property
    def name(self) -> str:
        """The name that records show."""
        return f"{self.base.name} x {self.speedup:g}"

    def why_not(self, model: ModelSpec, configuration: ParallelConfig) -> str | None:
        """Return why a configuration cannot be estimated or run, None if it can."""
        return self.base.why_not(model, configuration)

    def service(
        self, model: ModelSpec, configuration: ParallelConfig, *, prompt_tokens: int, output_tokens: int, batch: int
    ) -> ServiceEstimate:
        """Estimate one batch that starts on an idle engine."""
        size = {"prompt_tokens": prompt_tokens, "output_tokens": output_tokens, "batch": batch}
        base = self.base.service(model, configuration, **size)
        return ServiceEstimate(
            ttft_s=base.ttft_s / self.speedup, tpot_s=base.tpot_s / self.speedup, output_tokens=output_tokens
        )

    def memory(self, model: ModelSpec, configuration: ParallelConfig) -> Bytes:
        """Estimate the memory over all GPUs of a deployment."""
        return self.base.memory(model, configuration)
