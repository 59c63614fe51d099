"""What an intent minimises, as one number of a configuration, and the unit of that number."""

from __future__ import annotations

from collections.abc import Iterable
from enum import StrEnum
from typing import assert_never

from maveriq.domain.cluster import ClusterView, GpuView
from maveriq.domain.deployments import Cost, Objective
from maveriq.estimate.estimator import ServiceEstimate
from maveriq.units import Bytes, gib

_SECONDS_PER_HOUR = 3600.0


class ScoreUnit(StrEnum):
    """The unit of a score; the less, the better."""

    SECONDS = "s"
    GIB = "GiB"
    GIB_SECONDS = "GiB s"
    GPU_SECONDS = "GPU s"
    USD_PER_MILLION_TOKENS = "$ per 1M tokens"

    @property
    def counts_memory(self) -> bool:
        """Whether it grows with the memory that a deployment holds."""
        return self in (ScoreUnit.GIB, ScoreUnit.GIB_SECONDS)

    def score(
        self, service: ServiceEstimate, *, memory_bytes: Bytes, gpus: int, batch: int, usd_per_hour: float | None
    ) -> float:
        """Return the score of a configuration.

        Args:
            service: the estimate of a batch.
            memory_bytes: over all GPUs.
            gpus: how many it holds.
            batch: requests of the batch.
            usd_per_hour: price of these GPUs, for `USD_PER_MILLION_TOKENS`.
        """
        match self:
            case ScoreUnit.SECONDS:
                return service.latency_s
            case ScoreUnit.GIB:
                return gib(memory_bytes)
            case ScoreUnit.GIB_SECONDS:
                return service.latency_s * gib(memory_bytes)
            case ScoreUnit.GPU_SECONDS:
                return service.latency_s * gpus
            case ScoreUnit.USD_PER_MILLION_TOKENS:
                return usd_per_million_tokens(service, batch=batch, usd_per_hour=usd_per_hour or 0.0)
            case _ as never:
                assert_never(never)

    def score_at_rate(
        self, service: ServiceEstimate, *, rps: float, gpus: int, memory_bytes: Bytes, usd_per_hour: float | None
    ) -> float:
        """Return the score of engines that serve requests at a rate, whose costs these requests share.

        Args:
            service: the times of a request.
            rps: requests a second that all engines serve together.
            gpus: how many all hold.
            memory_bytes: over all GPUs.
            usd_per_hour: price of these GPUs, for `USD_PER_MILLION_TOKENS`.
        """
        if self is ScoreUnit.SECONDS:
            return service.latency_s
        return self.least_at_rate(
            output_tokens=service.output_tokens,
            rps=rps,
            gpus=gpus,
            memory_bytes=memory_bytes,
            usd_per_hour=usd_per_hour,
        )

    def least_at_rate(
        self, *, output_tokens: int, rps: float, gpus: int, memory_bytes: Bytes, usd_per_hour: float | None
    ) -> float:
        """Return what `score_at_rate` is at least, however long requests take: all but seconds are known."""
        match self:
            case ScoreUnit.SECONDS:
                return 0.0
            case ScoreUnit.GIB:
                return gib(memory_bytes)
            case ScoreUnit.GIB_SECONDS:
                return gib(memory_bytes) / rps
            case ScoreUnit.GPU_SECONDS:
                return gpus / rps
            case ScoreUnit.USD_PER_MILLION_TOKENS:
                return (usd_per_hour or 0.0) / _SECONDS_PER_HOUR * 1e6 / (rps * output_tokens)
            case _ as never:
                assert_never(never)


def usd_per_million_tokens(service: ServiceEstimate, *, batch: int, usd_per_hour: float) -> float:
    """Return the price of a million output tokens, their prompts included, of an engine that is never idle."""
    return usd_per_hour / _SECONDS_PER_HOUR * 1e6 * service.latency_s / (batch * service.output_tokens)


def price_of(gpus: Iterable[GpuView]) -> float | None:
    """Return what GPUs cost together, US dollars an hour; None where one has no price."""
    total = 0.0
    for gpu in gpus:
        if gpu.usd_per_hour is None:
            return None
        total += gpu.usd_per_hour
    return total


def score_unit(objective: Objective, cost: Cost, view: ClusterView) -> ScoreUnit:
    """Return what an objective counts on a cluster: dollars only where each of its GPUs has a price."""
    match objective:
        case Objective.MIN_LATENCY:
            return ScoreUnit.SECONDS
        case Objective.MIN_MEMORY:
            return ScoreUnit.GIB
        case Objective.MIN_GPU_COST:
            return ScoreUnit.GPU_SECONDS
        case Objective.MIN_COST if cost is Cost.MEMORY:
            return ScoreUnit.GIB_SECONDS
        case Objective.MIN_COST:
            return ScoreUnit.GPU_SECONDS if price_of(view.gpus) is None else ScoreUnit.USD_PER_MILLION_TOKENS
        case _ as never:
            assert_never(never)
