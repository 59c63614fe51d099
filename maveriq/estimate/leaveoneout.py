"""An estimator that never answers from what it has seen: each model by the calibration that left it out."""

from __future__ import annotations

from maveriq.domain.deployment import Configuration
from maveriq.domain.models import ModelSpec
from maveriq.estimate.base import ServiceEstimate
from maveriq.estimate.calibrated import CalibratedEstimator
from maveriq.estimate.hardware import HardwareProfile
from maveriq.units import Bytes


class LeaveOneOut:
    """The calibrated estimator as a benchmark's tables judge it: every model as if it were new."""

    def __init__(self, profile: HardwareProfile) -> None:
        self._profile = profile
        self._without: dict[str, CalibratedEstimator] = {}

    @property
    def name(self) -> str:
        """What it is called in reports."""
        return "calibrated, each model left out"

    def why_not(self, model: ModelSpec, configuration: Configuration) -> str | None:
        """Return why a configuration cannot be estimated, None if it can."""
        return self._for(model).why_not(model, configuration)

    def service(
        self, model: ModelSpec, configuration: Configuration, *, prompt_tokens: int, output_tokens: int, batch: int
    ) -> ServiceEstimate:
        """Estimate one batch of equal requests, as `CalibratedEstimator.service`."""
        return self._for(model).service(
            model, configuration, prompt_tokens=prompt_tokens, output_tokens=output_tokens, batch=batch
        )

    def memory(self, model: ModelSpec, configuration: Configuration) -> Bytes:
        """Estimate the memory of a deployment, as `CalibratedEstimator.memory`."""
        return self._for(model).memory(model, configuration)

    def memory_with(
        self, model: ModelSpec, configuration: Configuration, *, prompt_tokens: int, output_tokens: int
    ) -> Bytes:
        """Estimate the memory with requests of such lengths, as `CalibratedEstimator.memory_with`."""
        return self._for(model).memory_with(
            model, configuration, prompt_tokens=prompt_tokens, output_tokens=output_tokens
        )

    def memory_margin(self, model: ModelSpec, configuration: Configuration) -> float:
        """Return the margin of memory, as `CalibratedEstimator.memory_margin`."""
        return self._for(model).memory_margin(model, configuration)

    def _for(self, model: ModelSpec) -> CalibratedEstimator:
        found = self._without.get(model.name)
        if found is None:
            found = CalibratedEstimator.benchmarked(self._profile, without_model=model.name)
            self._without[model.name] = found
        return found
