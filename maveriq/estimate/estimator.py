"""The estimator protocols: how long a request takes and how much memory a deployment holds."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from typing import Protocol, runtime_checkable

from maveriq.domain.models import ModelSpec
from maveriq.domain.parallel import ParallelConfig
from maveriq.errors import InputError
from maveriq.estimate.intervals import Interval
from maveriq.units import Bytes


class Basis(StrEnum):
    """What an estimate rests on, from the most to the least that was measured."""

    MEASURED = "measured"  # whole models, or fingerprints of them
    OPERATORS = "operators"
    DATA_SHEET = "data sheet"


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceEstimate:
    """The time one request (or one batch) takes on an idle engine, in seconds.

    `ttft_s` is the intercept at zero output tokens, as in the paper, and may be slightly negative
    (SPEC 3). The first token comes at `ttft_s + tpot_s`, the last at `latency_s`. `interval` holds
    the factors of the latency between which it lies in 90 of 100 cases; it is None if the estimator
    does not know its errors. `basis` is None if the estimator does not say what it rests on.
    """

    ttft_s: float
    tpot_s: float
    output_tokens: int
    interval: Interval | None = None
    basis: Basis | None = None

    @property
    def latency_s(self) -> float:
        """From the start to the last token."""
        return self.ttft_s + self.output_tokens * self.tpot_s

    @property
    def first_token_s(self) -> float:
        """From the start to the first token."""
        return self.ttft_s + self.tpot_s


class Estimator(Protocol):
    """Estimates latency and memory of a model with a configuration. Pure: equal arguments give equal results."""

    @property
    def name(self) -> str:
        """The name by which `--estimator` and `--service-times` know it."""

    def why_not(self, model: ModelSpec, configuration: ParallelConfig) -> str | None:
        """Return why this configuration cannot be estimated or run here, None if it can.

        Callers must not call the other methods for a configuration with a reason.
        """

    def service(
        self, model: ModelSpec, configuration: ParallelConfig, *, prompt_tokens: int, output_tokens: int, batch: int
    ) -> ServiceEstimate:
        """Estimate one batch of `batch` equal requests that start together on an idle engine."""

    def memory(self, model: ModelSpec, configuration: ParallelConfig) -> Bytes:
        """Estimate the memory over all GPUs of a deployment, at its configuration's batch size."""


@runtime_checkable
class ConfigurationAware(Protocol):
    """An estimator that knows which configurations are worth considering; others are asked for those of SPEC 4."""

    def configurations(self, model: ModelSpec, *, gpus: int, batch_size: int) -> Iterable[ParallelConfig]:
        """Return the configurations for up to so many GPUs, in the order that breaks ties."""


@runtime_checkable
class KindAware(Protocol):
    """An estimator of several kinds of GPU, which configurations name."""

    def of_kind(self, kind: str) -> Estimator:
        """Return the estimator of one kind, for configurations that name none; "" for the first."""


@runtime_checkable
class ModelAware(Protocol):
    """An estimator that leaves each model to another one."""

    def of_model(self, model: ModelSpec) -> Estimator:
        """Return the estimator of a model."""


@runtime_checkable
class PlacementAware(Protocol):
    """An estimator whose estimates depend on the GPUs of an engine."""

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
        """Estimate as `Estimator.service`, for an engine on these GPUs (stage-major, as in a plan)."""


def service_at(estimator: Estimator, gpu_ids: Sequence[int]) -> Callable[..., ServiceEstimate]:
    """Return the `service_on` of an estimator for an engine on these GPUs, its `service` if it has none."""
    if isinstance(estimator, PlacementAware):
        return partial(estimator.service_on, gpu_ids)
    return estimator.service


@runtime_checkable
class ContentionAware(Protocol):
    """An estimator that knows how co-located engines slow each other down."""

    def shares_process(self, configuration: ParallelConfig) -> bool:
        """Return whether the engine shares a host process with other engines."""

    def contention_delay_s(self, model: ModelSpec, configuration: ParallelConfig, *, co_located: int) -> float:
        """Return how many seconds longer a token takes while `co_located` other engines are busy; 0 if none are."""


@runtime_checkable
class LengthAwareMemory(Protocol):
    """An estimator that knows how memory grows with prompt and output length."""

    def memory_with(
        self, model: ModelSpec, configuration: ParallelConfig, *, prompt_tokens: int, output_tokens: int
    ) -> Bytes:
        """Estimate as `Estimator.memory`, with each request of a batch at the given lengths."""


@runtime_checkable
class MemoryIntervalAware(Protocol):
    """An estimator that knows the errors of its memory estimates."""

    def memory_interval(self, model: ModelSpec, configuration: ParallelConfig) -> Interval:
        """Return the factors of the estimate between which the memory lies in 90 of 100 cases."""


@runtime_checkable
class PipelineAware(Protocol):
    """An estimator that knows how pipelines compare with one stage."""

    @property
    def pipelines_only_add_time(self) -> bool:
        """Whether stages work one after the other, so that a batch takes at least the time that one stage takes."""


@runtime_checkable
class SequenceAware(Protocol):
    """An estimator that knows how many sequences an engine has room for."""

    def why_no_room(
        self, model: ModelSpec, configuration: ParallelConfig, *, prompt_tokens: int, output_tokens: int
    ) -> str | None:
        """Return why a batch of requests of these lengths does not fit the KV cache; None if it does."""


def own_estimator(estimator: Estimator, model: ModelSpec, kind: str = "") -> Estimator:
    """Return the estimator that answers for a model on a kind of GPU, for configurations that name none."""
    of_kind = estimator.of_kind(kind) if isinstance(estimator, KindAware) else estimator
    return of_kind.of_model(model) if isinstance(of_kind, ModelAware) else of_kind


def check_estimable(estimator: Estimator, model: ModelSpec, configuration: ParallelConfig) -> None:
    """Check that an estimator answers for a configuration.

    Raises:
        InputError: the configuration has a reason in `Estimator.why_not`.
    """
    reason = estimator.why_not(model, configuration)
    if reason is not None:
        raise InputError(f"{model.name} with {configuration} cannot be estimated: {reason}")


def check_lengths(model: ModelSpec, *, prompt_tokens: int, output_tokens: int, batch: int) -> None:
    """Check the lengths and the number of requests that are to be estimated.

    Raises:
        InputError: one is below 1.
    """
    if min(prompt_tokens, output_tokens, batch) < 1:
        raise InputError(
            f"{model.name}: prompt tokens, output tokens and batch must be at least 1, "
            f"not {prompt_tokens}, {output_tokens} and {batch}"
        )
