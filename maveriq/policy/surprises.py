"""Says where a configuration is faster by a rule that an engineer would not expect, and whether that was measured.

Two rules surprise: a pipeline is faster than fewer stages, though its stages work one after the other; and tensor
parallelism is slower than less of it, though each GPU has less to do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TypeAlias

from maveriq.domain.parallel import ParallelConfig
from maveriq.estimate.full_models import MeasuredRatio

EvidenceLookup: TypeAlias = Callable[[str, ParallelConfig, ParallelConfig], MeasuredRatio | None]
"""Measured latency ratio of two configurations of a model (by name); None where they were not measured."""


def no_evidence(_model_name: str, _configuration: ParallelConfig, _other: ParallelConfig) -> MeasuredRatio | None:
    """Know no measurement: a profile without a table of whole models."""
    return None


@dataclass(frozen=True, slots=True, kw_only=True)
class SurpriseFinder:
    """Finds surprises among the estimates of a model.

    Args:
        model_name: the model.
        prompt_tokens: of the request that was estimated.
        latencies_s: estimated latency of each configuration.
        evidence: what was measured.
        latency_decides: the objective is latency, so that a configuration with less tensor parallelism wins by it.
    """

    model_name: str
    prompt_tokens: int
    latencies_s: Mapping[ParallelConfig, float]
    evidence: EvidenceLookup
    latency_decides: bool

    def note(self, configuration: ParallelConfig) -> str:
        """Return a note on a configuration that is faster by a surprising rule, "" for any other."""
        notes = (self._faster_pipeline(configuration), self._slower_tensor_parallelism(configuration))
        return "; ".join(filter(None, notes))

    def _faster_pipeline(self, configuration: ParallelConfig) -> str:
        whole = replace(configuration, pp=1, network_hops=0)
        if configuration.pp == 1 or self._time_s(whole) <= self._time_s(configuration):
            return ""
        return self._sentence(configuration, whole, f"PP {configuration.pp} is faster than PP 1")

    def _slower_tensor_parallelism(self, configuration: ParallelConfig) -> str:
        more = replace(configuration, tp=2 * configuration.tp)
        if (
            not self.latency_decides
            or more not in self.latencies_s
            or self._time_s(more) <= self._time_s(configuration)
        ):
            return ""
        return self._sentence(configuration, more, f"TP {configuration.tp} is faster than TP {more.tp}")

    def _time_s(self, configuration: ParallelConfig) -> float:
        return self.latencies_s.get(configuration, 0.0)

    def _sentence(self, faster: ParallelConfig, slower: ParallelConfig, claim: str) -> str:
        estimated = 1 - self._time_s(faster) / self._time_s(slower)
        return f"{claim} by {100 * estimated:.0f} % ({self._basis(faster, slower)})"

    def _basis(self, faster: ParallelConfig, slower: ParallelConfig) -> str:
        found = self.evidence(self.model_name, faster, slower)
        if found is None:
            return f"an estimate: {self.model_name} was not measured with both at {faster.weights}"
        gain = f"{100 * abs(1 - found.ratio):.0f} % {'faster' if found.ratio < 1 else 'slower'}"
        other = "" if found.prompt_tokens == self.prompt_tokens else f", not of {self.prompt_tokens}"
        batch = "" if faster.batch_size == 1 else f", batches of 1, not of {faster.batch_size}"
        return (
            f"measured: {gain} on the whole model, {faster.weights}, prompts of {found.prompt_tokens} tokens{other}, "
            f"{found.output_tokens} output tokens{batch}"
        )
