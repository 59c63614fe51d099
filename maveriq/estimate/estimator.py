"""The estimator protocols: how long a request takes and how much memory a deployment holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from maveriq.domain.models import ModelSpec
from maveriq.domain.parallel import ParallelConfig
from maveriq.units import Bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceEstimate:
    """The time one request (or one batch) takes on an idle engine, in seconds.

    `ttft_s` is the intercept at zero output tokens, as the paper has it, and may be slightly
    negative (SPEC 3). The first token comes at `ttft_s + tpot_s`, the last at `latency_s`. In 90 of
    100 cases the true latency is to lie between `latency_s` divided by and times `1 + margin`;
    an estimator that does not know its errors gives no margin.
    """

    ttft_s: float
    tpot_s: float
    output_tokens: int
    margin: float | None = None

    @property
    def latency_s(self) -> float:
        """From the start to the last token."""
        return self.ttft_s + self.output_tokens * self.tpot_s

    @property
    def first_token_s(self) -> float:
        """From the start to the first token."""
        return self.ttft_s + self.tpot_s


class Estimator(Protocol):
    """Answers for a model under a configuration. Pure: equal questions get equal answers."""

    @property
    def name(self) -> str:
        """The name by which `--estimator` and `--service-times` know it."""

    def why_not(self, model: ModelSpec, configuration: ParallelConfig) -> str | None:
        """Return why this configuration cannot be estimated or run here, None if it can.

        A configuration with a reason is never asked about further.
        """

    def service(
        self, model: ModelSpec, configuration: ParallelConfig, *, prompt_tokens: int, output_tokens: int, batch: int
    ) -> ServiceEstimate:
        """Estimate one batch of `batch` equal requests that start together on an idle engine."""

    def memory(self, model: ModelSpec, configuration: ParallelConfig) -> Bytes:
        """Estimate the memory over all GPUs of a deployment, at its configuration's batch size."""


@runtime_checkable
class PlacementAware(Protocol):
    """An estimator to which it matters on which GPUs an engine lies."""

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


@runtime_checkable
class ContentionAware(Protocol):
    """An estimator to which it matters what else runs on the host."""

    def has_neighbours(self, configuration: ParallelConfig) -> bool:
        """Say whether an engine shares a process of the host with others like it: its neighbours."""

    def wait_s(self, model: ModelSpec, configuration: ParallelConfig, *, neighbours: int) -> float:
        """Return how much longer a token takes while so many neighbours are busy; nothing without any."""


@runtime_checkable
class LengthAwareMemory(Protocol):
    """An estimator that knows how memory grows with the lengths of requests."""

    def memory_with(
        self, model: ModelSpec, configuration: ParallelConfig, *, prompt_tokens: int, output_tokens: int
    ) -> Bytes:
        """Estimate as `Estimator.memory`, where each request of a batch has come to such lengths."""


@runtime_checkable
class MemoryMarginAware(Protocol):
    """An estimator that knows how far its estimates of memory are off."""

    def memory_margin(self, model: ModelSpec, configuration: ParallelConfig) -> float:
        """In 90 of 100 cases memory lies between the estimate divided by and times 1 plus this margin."""
