"""One estimator for the models that were measured on a kind of GPU, and one for all others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from maveriq.domain.models import ModelSpec
from maveriq.domain.parallel import ParallelConfig
from maveriq.estimate.estimator import ContentionAware, Estimator, SequenceAware, ServiceEstimate, service_at
from maveriq.units import Bytes

JOINED = "/"
"""Joins the names of both estimators."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ByModelEstimator:
    """Estimates a model by one estimator where it was measured, else by another.

    Args:
        measured: estimates the measured models.
        others: estimates all others.
        is_measured: whether a model was.
    """

    measured: Estimator
    others: Estimator
    is_measured: Callable[[ModelSpec], bool]

    @property
    def name(self) -> str:
        """The names of both, joined."""
        return f"{self.measured.name}{JOINED}{self.others.name}"

    def of_model(self, model: ModelSpec) -> Estimator:
        """Return the estimator of a model."""
        return self.measured if self.is_measured(model) else self.others

    def why_not(self, model: ModelSpec, configuration: ParallelConfig) -> str | None:
        """Return why a configuration cannot be estimated, None if it can."""
        return self.of_model(model).why_not(model, configuration)

    def service(
        self, model: ModelSpec, configuration: ParallelConfig, *, prompt_tokens: int, output_tokens: int, batch: int
    ) -> ServiceEstimate:
        """Estimate one batch, as `Estimator.service`.

        Raises:
            InputError: as the estimator of the model.
        """
        return self.of_model(model).service(
            model, configuration, prompt_tokens=prompt_tokens, output_tokens=output_tokens, batch=batch
        )

    def service_on(
        self,
        gpu_ids: Sequence[int],
        model: ModelSpec,
        configuration: ParallelConfig,
        *,
        prompt_tokens: int,
        output_tokens: int,
        batch: int,
    ) -> ServiceEstimate:
        """Estimate as `service`, for an engine on these GPUs (stage-major, as in a plan).

        Raises:
            InputError: as `service`.
        """
        return service_at(self.of_model(model), gpu_ids)(
            model, configuration, prompt_tokens=prompt_tokens, output_tokens=output_tokens, batch=batch
        )

    def memory(self, model: ModelSpec, configuration: ParallelConfig) -> Bytes:
        """Estimate the memory of a deployment, as `Estimator.memory`.

        Raises:
            InputError: as the estimator of the model.
        """
        return self.of_model(model).memory(model, configuration)

    def why_no_room(
        self, model: ModelSpec, configuration: ParallelConfig, *, prompt_tokens: int, output_tokens: int
    ) -> str | None:
        """Return why a batch of requests of these lengths does not fit the KV cache; None if it does, or none knows.

        Raises:
            InputError: as the estimator of the model.
        """
        estimator = self.of_model(model)
        if not isinstance(estimator, SequenceAware):
            return None
        return estimator.why_no_room(model, configuration, prompt_tokens=prompt_tokens, output_tokens=output_tokens)

    def shares_process(self, configuration: ParallelConfig) -> bool:
        """Return whether the engine shares a host process with other engines, of whatever model."""
        return isinstance(self.measured, ContentionAware) and self.measured.shares_process(configuration)

    def contention_delay_s(self, model: ModelSpec, configuration: ParallelConfig, *, co_located: int) -> float:
        """Return how many seconds longer a token takes while `co_located` other engines are busy.

        That is a property of the layers, which is known of every model.
        """
        if not isinstance(self.measured, ContentionAware):
            return 0.0
        return self.measured.contention_delay_s(model, configuration, co_located=co_located)


@dataclass(frozen=True, slots=True, kw_only=True)
class ProfiledEstimator(ByModelEstimator):
    """Another estimator, except for the models whose profiles were measured since it was made (mutable).

    Args:
        profiled: by the model's name, the model and its estimator.
    """

    profiled: dict[str, tuple[ModelSpec, Estimator]]

    @property
    def name(self) -> str:
        """The name of the other estimator."""
        return self.others.name

    def of_model(self, model: ModelSpec) -> Estimator:
        """Return the estimator of a model."""
        found = self.profiled.get(model.name)
        return found[1] if found is not None and found[0] == model else self.others


def with_profiled(base: Estimator, profiled: dict[str, tuple[ModelSpec, Estimator]]) -> ProfiledEstimator:
    """Return an estimator that asks `profiled`, which may grow, before `base`; contention is always that of `base`."""
    return ProfiledEstimator(measured=base, others=base, is_measured=lambda _: False, profiled=profiled)
