"""Choosing a configuration for an intent (SPEC 4).

`rank` enumerates every configuration, rejects those that do not run here, do not fit or break a
constraint, each with a reason, and orders the others by the objective. If none meets the SLO, it
orders those that meet everything else by latency, and says so in a note.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeAlias

from maveriq.domain.cluster import ClusterView, GpuView
from maveriq.domain.deployments import Cost, EndpointSpec, Intent, Objective
from maveriq.domain.models import KvType, ModelSpec, WeightType
from maveriq.domain.parallel import (
    LayerSplit,
    ParallelConfig,
    deal_layers,
    max_layers_per_stage,
    shard_bytes,
    tensor_parallel_degrees,
)
from maveriq.estimate.estimator import (
    ConfigurationAware,
    Estimator,
    LengthAwareMemory,
    PipelineAware,
    SequenceAware,
    ServiceEstimate,
    own_estimator,
)
from maveriq.policy.gpu_pools import GpuPool, gpu_pools
from maveriq.policy.scores import ScoreUnit, price_of, score_unit
from maveriq.policy.slo_limits import first_missed, slo_limits, why_missed
from maveriq.policy.surprises import EvidenceLookup, SurpriseFinder, no_evidence
from maveriq.units import Bytes, gib

AccuracyLookup: TypeAlias = Callable[[str, WeightType, KvType], float | None]
"""Percent of the float16 score for (model name, weights, KV type); None where it was never measured."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A configuration that runs here and fits, with its estimates.

    `gpu_ids` are the GPUs with most free memory, by which its layers were split, stage-major; a placement
    rule may move the shards. `usd_per_hour` is their price, None where one has none. `score` is what the intent
    minimises. `note` says where the configuration is fast by a surprising rule, and what was measured of it.
    """

    configuration: ParallelConfig
    layer_split: LayerSplit
    gpu_ids: tuple[int, ...]
    gpu_bytes: tuple[Bytes, ...]
    service: ServiceEstimate
    memory_bytes: Bytes
    accuracy: float | None
    usd_per_hour: float | None
    score: float
    note: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class RejectedConfig:
    """A configuration that was rejected, and why; `detail` gives the figure that missed the limit."""

    configuration: ParallelConfig
    reason: str
    detail: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranking:
    """The candidates, best first, and the rejected configurations.

    `rejected` has the rejected ones in the order of enumeration; those that only miss the SLO come last.

    `score_unit` is the unit of the candidates' scores. `note` is empty, or says that no candidate meets the SLO. Then
    the candidates are the configurations that meet all other constraints, fastest first.
    """

    candidates: tuple[Candidate, ...]
    rejected: tuple[RejectedConfig, ...]
    score_unit: ScoreUnit
    note: str = ""

    def why_empty(self) -> str:
        """Return one clause on why there is no candidate: the most frequent reasons with their counts."""
        return summary_of_rejected(self.rejected)


def summary_of_rejected(rejected: Collection[RejectedConfig]) -> str:
    """Return one clause on why no configuration can be used: the most frequent reasons with their counts."""
    counts: dict[str, int] = {}
    for config in rejected:
        counts[config.reason] = counts.get(config.reason, 0) + 1
    by_count = sorted(counts.items(), key=lambda item: -item[1])
    listed = "; ".join(f"{count} x {reason}" for reason, count in by_count[:3])
    rest = f"; and {len(by_count) - 3} other reasons" if len(by_count) > 3 else ""
    return f"none of {len(rejected)} configurations can be used: {listed}{rest}"


NO_MEMORY, NO_ROOM = "does not fit the free memory", "has no room for the KV cache"
"""Why a configuration is rejected that more or larger GPUs would hold."""

NEVER_MEASURED = "its accuracy was never measured"
"""Why a configuration is rejected whose accuracy was never measured."""

_ROUNDING = 1e-9  # far more than adding up times in another order changes them

_SPEC_WEIGHTS = (WeightType.FLOAT16, WeightType.INT8, WeightType.INT4, WeightType.INT4_GPTQ, WeightType.FP8)
_SPEC_KV = (KvType.INT8, KvType.NATIVE)


def enumerate_configurations(model: ModelSpec, gpus: int, batch_size: int = 1) -> Iterator[ParallelConfig]:
    """Yield every configuration of SPEC 4 for up to `gpus` GPUs, in the order that breaks ties.

    Each stage needs a layer, so `pp` is at most the number of layers.
    """
    for tp in tensor_parallel_degrees(model, gpus):
        for pp in range(1, min(gpus // tp, model.layers) + 1):
            for weights in _SPEC_WEIGHTS:
                for kv in _SPEC_KV:
                    yield ParallelConfig(tp=tp, pp=pp, weights=weights, kv=kv, batch_size=batch_size)


def rank(
    endpoint: EndpointSpec,
    view: ClusterView,
    estimator: Estimator,
    accuracy: AccuracyLookup,
    *,
    cost: Cost = Cost.MONEY,
    evidence: EvidenceLookup = no_evidence,
    in_ms: bool = False,
) -> Ranking:
    """Order the configurations that can serve an endpoint on the cluster as it is.

    Args:
        endpoint: the model and the intent.
        view: the GPUs.
        estimator: estimates latency and memory.
        accuracy: measured accuracy of quantised models.
        cost: what the intent `min-cost` counts.
        evidence: measured latencies, for notes on surprising configurations.
        in_ms: notes and reasons state times in milliseconds, as the user gave them, not in seconds.
    """
    fitting: list[Candidate] = []
    rejected: list[RejectedConfig] = []
    unit = score_unit(endpoint.intent.objective, cost, view)
    for pool in gpu_pools(view):
        memory_of = _memory_of(endpoint, pool, estimator)
        for configuration in _configurations(endpoint, pool, estimator):
            on_kind = replace(configuration, gpu=pool.kind) if pool.kind else configuration
            outcome = _consider(endpoint, on_kind, pool, estimator, memory_of, accuracy, unit)
            if isinstance(outcome, Candidate):
                fitting.append(outcome)
            else:
                rejected.append(outcome)
    return _order(endpoint.intent, _with_notes(endpoint, fitting, evidence), rejected, unit, in_ms=in_ms)


def best_candidate(
    endpoint: EndpointSpec,
    view: ClusterView,
    estimator: Estimator,
    accuracy: AccuracyLookup,
    *,
    cost: Cost = Cost.MONEY,
    evidence: EvidenceLookup = no_evidence,
) -> Candidate | None:
    """Return the first candidate of `rank` if it meets the SLOs, without estimating what cannot be the first.

    A pipeline holds more GPUs, for no less time than one stage if the estimator says so. None if no candidate meets the
    SLOs; `rank` then says why. The arguments are those of `rank`.
    """
    unit, limits = score_unit(endpoint.intent.objective, cost, view), slo_limits(endpoint.intent)
    outcomes: dict[ParallelConfig, Candidate | RejectedConfig] = {}
    memory_of: dict[str, Callable[[ParallelConfig], Bytes]] = {}
    waiting: list[tuple[float, int, ParallelConfig, GpuPool]] = []  # with the least score, and the place
    for pool in gpu_pools(view):
        memory_of[pool.kind] = _memory_of(endpoint, pool, estimator)
        least_score = _least_scores(endpoint, pool, estimator, unit)
        for configuration in _configurations(endpoint, pool, estimator):
            on_kind = replace(configuration, gpu=pool.kind) if pool.kind else configuration
            waiting.append((least_score(configuration), len(waiting), on_kind, pool))
    best: tuple[tuple[float, ...], int, Candidate] | None = None
    for least, place, configuration, pool in sorted(waiting, key=lambda each: each[:2]):
        if best is not None and least > best[2].score:
            break
        outcome = _consider(endpoint, configuration, pool, estimator, memory_of[pool.kind], accuracy, unit)
        outcomes[configuration] = outcome
        if isinstance(outcome, Candidate) and first_missed(limits, outcome.service) is None:
            ranked = (_key(unit)(outcome), place, outcome)
            best = ranked if best is None or ranked[:2] < best[:2] else best
    if best is None:
        return None
    chosen = best[2]
    # What the note on it compares it with may not have been estimated.
    at_any_place = replace(chosen.configuration, network_hops=0)
    compared = (replace(at_any_place, pp=1), replace(at_any_place, tp=2 * at_any_place.tp))
    for _, _, configuration, pool in waiting:
        if configuration in compared and configuration not in outcomes:
            outcomes[configuration] = _consider(
                endpoint, configuration, pool, estimator, memory_of[pool.kind], accuracy, unit
            )
    fitting = [outcome for outcome in outcomes.values() if isinstance(outcome, Candidate)]
    note = _finder(endpoint, fitting, evidence).note(chosen.configuration)
    return replace(chosen, note=note) if note else chosen


def _least_scores(
    endpoint: EndpointSpec, pool: GpuPool, estimator: Estimator, unit: ScoreUnit
) -> Callable[[ParallelConfig], float]:
    """Return what tells a score that no configuration on GPUs of one kind can beat."""
    own = own_estimator(estimator, endpoint.model, pool.kind)
    if not (isinstance(own, PipelineAware) and own.pipelines_only_add_time) or unit.counts_memory:
        return lambda _: -math.inf
    lengths = {"prompt_tokens": endpoint.prompt_tokens, "output_tokens": endpoint.output_tokens}
    services: dict[tuple[object, ...], ServiceEstimate | None] = {}
    cheapest = pool.least_usd_per_hour

    def least_score(configuration: ParallelConfig) -> float:
        if configuration.pp == 1:
            return -math.inf
        key = (configuration.tp, configuration.ep, configuration.weights, configuration.kv)
        if key not in services:
            one = replace(configuration, pp=1, layer_split=())
            is_known = own.why_not(endpoint.model, one) is None
            services[key] = own.service(endpoint.model, one, **lengths, batch=one.batch_size) if is_known else None
        service = services[key]
        if service is None:
            return -math.inf
        usd_per_hour = configuration.gpus * cheapest
        score = unit.score(
            service, memory_bytes=0, gpus=configuration.gpus, batch=configuration.batch_size, usd_per_hour=usd_per_hour
        )
        return score * (1 - _ROUNDING)

    return least_score


def _memory_of(endpoint: EndpointSpec, pool: GpuPool, estimator: Estimator) -> Callable[[ParallelConfig], Bytes]:
    """Return what tells the memory: the endpoint's share, or for its lengths where the estimator knows that."""
    model, share = endpoint.model, endpoint.memory_share_on(pool.kind)
    if share is not None:
        share_bytes = int(share * pool.capacity_bytes)
        return lambda configuration: configuration.gpus * share_bytes
    own = own_estimator(estimator, model, pool.kind)
    if isinstance(own, SequenceAware) and isinstance(own, LengthAwareMemory):
        lengths = {"prompt_tokens": endpoint.prompt_tokens, "output_tokens": endpoint.output_tokens}
        with_lengths: LengthAwareMemory = own
        return lambda configuration: with_lengths.memory_with(model, replace(configuration, gpu=""), **lengths)
    return partial(estimator.memory, model)


def _configurations(endpoint: EndpointSpec, pool: GpuPool, estimator: Estimator) -> Iterable[ParallelConfig]:
    """Return the configurations to consider on GPUs of one kind, in the order that breaks ties."""
    if endpoint.configuration is not None:
        return [endpoint.configuration]
    own = own_estimator(estimator, endpoint.model, pool.kind)
    if isinstance(own, ConfigurationAware):
        return own.configurations(endpoint.model, gpus=len(pool), batch_size=endpoint.batch_size)
    return enumerate_configurations(endpoint.model, len(pool), endpoint.batch_size)


def _with_notes(endpoint: EndpointSpec, fitting: list[Candidate], evidence: EvidenceLookup) -> list[Candidate]:
    """Return the candidates with a note on each that is fast by a surprising rule."""
    finder = _finder(endpoint, fitting, evidence)
    notes = [finder.note(candidate.configuration) for candidate in fitting]
    return [
        replace(candidate, note=note) if note else candidate for candidate, note in zip(fitting, notes, strict=True)
    ]


def _finder(endpoint: EndpointSpec, fitting: Iterable[Candidate], evidence: EvidenceLookup) -> SurpriseFinder:
    return SurpriseFinder(
        model_name=endpoint.model.name,
        prompt_tokens=endpoint.prompt_tokens,
        latencies_s={candidate.configuration: candidate.service.latency_s for candidate in fitting},
        evidence=evidence,
        latency_decides=endpoint.intent.objective is Objective.MIN_LATENCY,
    )


def _consider(
    endpoint: EndpointSpec,
    configuration: ParallelConfig,
    pool: GpuPool,
    estimator: Estimator,
    memory_of: Callable[[ParallelConfig], Bytes],
    accuracy: AccuracyLookup,
    unit: ScoreUnit,
) -> Candidate | RejectedConfig:
    """Return the configuration as a candidate, or the reason against it."""
    percent = accuracy(endpoint.model.name, configuration.weights, configuration.kv)
    reason = estimator.why_not(endpoint.model, configuration)
    reason = reason or broken_constraint(endpoint.intent, configuration, percent)
    if reason:
        return RejectedConfig(configuration=configuration, reason=reason)
    if configuration.tp > pool.largest_node:
        return RejectedConfig(
            configuration=configuration, reason=f"TP {configuration.tp} would cross nodes of {pool.largest_node} GPUs"
        )
    lengths = {"prompt_tokens": endpoint.prompt_tokens, "output_tokens": endpoint.output_tokens}
    memory_bytes = memory_of(configuration)
    sizes = {"tp": configuration.tp, "layers": endpoint.model.layers, "memory_bytes": memory_bytes}
    chosen, split, hops = _dealt(pool, configuration, **sizes)
    if split is None:
        detail = f"needs {gib(memory_bytes):.1f} GiB over {configuration.gpus} GPUs"
        return RejectedConfig(configuration=configuration, reason=NO_MEMORY, detail=detail)
    if hops:
        configuration = replace(configuration, network_hops=hops)
    if isinstance(estimator, SequenceAware):
        no_room = estimator.why_no_room(endpoint.model, configuration, **lengths)
        if no_room:
            return RejectedConfig(configuration=configuration, reason=NO_ROOM, detail=no_room)
    service = estimator.service(endpoint.model, configuration, **lengths, batch=configuration.batch_size)
    usd_per_hour = price_of(chosen)
    return Candidate(
        configuration=configuration,
        layer_split=split,
        gpu_ids=tuple(gpu.gpu_id for gpu in chosen),
        gpu_bytes=shard_bytes(split, **sizes),
        service=service,
        memory_bytes=memory_bytes,
        accuracy=percent,
        usd_per_hour=usd_per_hour,
        score=unit.score(
            service,
            memory_bytes=memory_bytes,
            gpus=configuration.gpus,
            batch=configuration.batch_size,
            usd_per_hour=usd_per_hour,
        ),
    )


def _dealt(
    pool: GpuPool, configuration: ParallelConfig, *, tp: int, layers: int, memory_bytes: Bytes
) -> tuple[Sequence[GpuView], LayerSplit | None, int]:
    """Return the first GPUs of the pool on which the layers fit, the layers of each stage, and the network hops."""
    for gpus, hops in pool.choices(tp=tp, pp=configuration.pp):
        free_bytes = [gpu.free_bytes for gpu in gpus]
        split = deal_layers(layers, max_layers_per_stage(free_bytes, tp=tp, layers=layers, memory_bytes=memory_bytes))
        if split is not None:
            return gpus, split, hops
    return (), None, 0


def broken_constraint(intent: Intent, configuration: ParallelConfig, accuracy: float | None) -> str | None:
    """Return which constraint other than the SLO a configuration breaks, if any."""
    if intent.float16_only and configuration.weights is not WeightType.FLOAT16:
        return "weights are not float16"
    if intent.min_accuracy > 0 and accuracy is None:
        return NEVER_MEASURED
    if accuracy is not None and accuracy < intent.min_accuracy:
        return f"accuracy {accuracy:g} % is below {intent.min_accuracy:g} %"
    return None


def _order(
    intent: Intent, fitting: list[Candidate], rejected: list[RejectedConfig], unit: ScoreUnit, *, in_ms: bool
) -> Ranking:
    """Order the candidates that meet the SLOs by the objective; if none meets them, order all by latency."""
    limits = slo_limits(intent, in_ms=in_ms)
    missed = [first_missed(limits, candidate.service) for candidate in fitting]
    meeting = [candidate for candidate, limit in zip(fitting, missed, strict=True) if limit is None]
    if fitting and not meeting:
        fastest = sorted(fitting, key=lambda candidate: candidate.service.latency_s)
        note = why_missed(limits, [candidate.service for candidate in fitting])
        return Ranking(candidates=tuple(fastest), rejected=tuple(rejected), score_unit=unit, note=note)
    slow = [
        RejectedConfig(
            configuration=candidate.configuration, reason=limit.reason, detail=f"takes {limit.taken(candidate.service)}"
        )
        for candidate, limit in zip(fitting, missed, strict=True)
        if limit is not None
    ]
    return Ranking(
        candidates=tuple(sorted(meeting, key=_key(unit))),
        rejected=tuple(rejected + slow),
        score_unit=unit,
    )


def _key(unit: ScoreUnit) -> Callable[[Candidate], tuple[float, ...]]:
    """Return by what candidates are ordered."""
    return _in_dollars if unit is ScoreUnit.USD_PER_MILLION_TOKENS else _by_score


def _by_score(candidate: Candidate) -> tuple[float, ...]:
    return (candidate.score,)


def _in_dollars(candidate: Candidate) -> tuple[float, ...]:
    """Return a key by which GPUs that cost nothing are still not held longer than needed."""
    return candidate.score, candidate.service.latency_s * candidate.configuration.gpus


def free_memory_text(view: ClusterView) -> str:
    """Return the free memory of each GPU as text, for a rejection."""
    return "free GiB: " + " ".join(f"{gib(gpu.free_bytes):.1f}" for gpu in view.gpus)
