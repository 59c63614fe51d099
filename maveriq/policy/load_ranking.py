"""Choosing a configuration and replicas of engines that batch continuously, at the load that an endpoint expects.

Each configuration gets the fewest replicas that carry the load and meet the SLOs, and its estimates at that load. The
intent then orders the configurations as it orders those of exclusive engines: by latency, memory, or cost.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from maveriq.domain.cluster import ClusterView, GpuView
from maveriq.domain.deployments import Cost, EndpointSpec
from maveriq.domain.parallel import ParallelConfig
from maveriq.estimate.estimator import ServiceEstimate
from maveriq.estimate.load_curve import LoadCurve
from maveriq.policy.configuration import (
    NO_MEMORY,
    AccuracyLookup,
    RejectedConfig,
    broken_constraint,
    summary_of_rejected,
)
from maveriq.policy.scores import ScoreUnit, price_of, score_unit
from maveriq.policy.slo_limits import SloLimit, first_missed, slo_limits, why_missed
from maveriq.units import Bytes, gib

MAX_UTILIZATION = 0.8
"""The share of an engine's capacity that an expected load may take: arrivals are uneven, and estimates err."""

SLO_SHARE = 0.95
"""The share of the requests that an SLO is meant for."""


class EngineEstimates(Protocol):
    """What is known beforehand of the engines of an endpoint."""

    def configurations(self, endpoint: EndpointSpec, *, kind: str, gpus: int) -> Iterable[ParallelConfig]:
        """Return the configurations to consider on up to so many GPUs of a kind, in the order that breaks ties."""

    def why_not(self, endpoint: EndpointSpec, configuration: ParallelConfig) -> RejectedConfig | None:
        """Return why an engine cannot run so, None if it can."""

    def load_curve(self, endpoint: EndpointSpec, configuration: ParallelConfig) -> LoadCurve:
        """Return the times of an engine's requests, from idle to full."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadCandidate:
    """A configuration and its replicas, with the estimates of each replica at its share of the load.

    Args:
        configuration: of each replica; it names the kind of its GPUs where there are several.
        replicas: how many.
        gpu_bytes: memory of a replica on each of its GPUs.
        service: mean times of a request.
        slowest: the times that `SLO_SHARE` of the requests do not exceed.
        accuracy: percent of the float16 score; None where it was never measured.
        usd_per_hour: price of all replicas; None where a GPU has none.
        score: what the intent minimises.
        overload: the load over what the replicas carry, where it is more; 0 where it is not.
    """

    configuration: ParallelConfig
    replicas: int
    gpu_bytes: tuple[Bytes, ...]
    service: ServiceEstimate
    slowest: ServiceEstimate
    accuracy: float | None
    usd_per_hour: float | None
    score: float
    overload: float = 0.0

    @property
    def memory_bytes(self) -> Bytes:
        """Memory of all replicas."""
        return self.replicas * sum(self.gpu_bytes)


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadRanking:
    """The candidates, best first, and the rejected configurations.

    `note` is empty, or says that no candidate carries the load or meets the SLOs; the nearest are then first.
    """

    candidates: tuple[LoadCandidate, ...]
    rejected: tuple[RejectedConfig, ...]
    score_unit: ScoreUnit
    note: str = ""

    def why_empty(self) -> str:
        """Return why every configuration was rejected, in one clause."""
        return summary_of_rejected(self.rejected)


def rank_at_load(
    endpoint: EndpointSpec,
    view: ClusterView,
    engines: EngineEstimates,
    accuracy: AccuracyLookup,
    *,
    cost: Cost = Cost.MONEY,
) -> LoadRanking:
    """Order the configurations of an endpoint's engines, each with its replicas.

    Args:
        endpoint: the model, the intent, and the load; without a load, one request at a time is expected.
        view: the GPUs.
        engines: see there.
        accuracy: measured accuracy of quantised models.
        cost: what the intent `min-cost` counts.

    An SLO is met if it holds for `SLO_SHARE` of the requests.
    """
    unit = score_unit(endpoint.intent.objective, cost, view)
    fitting: list[LoadCandidate] = []
    rejected: list[RejectedConfig] = []
    for kind in dict.fromkeys(gpu.kind for gpu in view.gpus):
        of_kind = [gpu for gpu in view.gpus if gpu.kind == kind]
        pool = _Pool(endpoint, of_kind)
        for configuration in engines.configurations(endpoint, kind=kind, gpus=len(of_kind)):
            found = _consider(endpoint, configuration, pool, engines, accuracy, unit)
            if isinstance(found, LoadCandidate):
                fitting.append(found)
            else:
                rejected.append(found)
    return _order(endpoint, fitting, rejected, unit)


class _Pool:
    """The GPUs of one kind on which an endpoint's engines have room.

    Args:
        endpoint: whose engines.
        gpus: of the kind, at least one.
    """

    def __init__(self, endpoint: EndpointSpec, gpus: Sequence[GpuView]) -> None:
        share = endpoint.memory_share_on(gpus[0].kind) or 1.0
        self.gpu_bytes = int(share * min(gpu.capacity_bytes for gpu in gpus))
        self.gpus = [gpu for gpu in gpus if gpu.free_bytes >= self.gpu_bytes]
        self.usd_per_hour = price_of(self.gpus[:1])
        self._of_node: dict[int, int] = {}
        for gpu in self.gpus:
            self._of_node[gpu.node] = self._of_node.get(gpu.node, 0) + 1

    def replicas(self, gpus: int) -> int:
        """Return how many replicas of so many GPUs have room, each on a node."""
        return sum(count // gpus for count in self._of_node.values())


def _consider(
    endpoint: EndpointSpec,
    configuration: ParallelConfig,
    pool: _Pool,
    engines: EngineEstimates,
    accuracy: AccuracyLookup,
    unit: ScoreUnit,
) -> LoadCandidate | RejectedConfig:
    """Return the configuration with its replicas, or the reason against it."""
    percent = accuracy(endpoint.model.name, configuration.weights, configuration.kv)
    broken = broken_constraint(endpoint.intent, configuration, percent)
    if broken:
        return RejectedConfig(configuration=configuration, reason=broken)
    if rejected := engines.why_not(endpoint, configuration):
        return rejected
    most, wanted = pool.replicas(configuration.gpus), endpoint.replicas or 1
    if most < wanted:
        too_few = f"only {most} of {wanted} replicas fit" if most else NO_MEMORY
        detail = f"a replica needs {configuration.gpus} GPUs of a node with {gib(pool.gpu_bytes):.1f} GiB free"
        return RejectedConfig(configuration=configuration, reason=too_few, detail=detail)
    curve = engines.load_curve(endpoint, configuration)
    rps = endpoint.load.rps if endpoint.load else 0.0

    def slowest(replicas: int) -> ServiceEstimate:
        prompt_cv = endpoint.load.prompt_cv if endpoint.load else 0.0
        return curve.at_tail(rps / replicas, SLO_SHARE, prompt_cv=prompt_cv)

    replicas = endpoint.replicas or _replicas(slo_limits(endpoint.intent), slowest, curve.capacity_rps, rps, most)
    service = curve.at(rps / replicas)
    usd_per_hour = None if pool.usd_per_hour is None else replicas * configuration.gpus * pool.usd_per_hour
    carried = replicas * curve.capacity_rps
    return LoadCandidate(
        configuration=configuration,
        replicas=replicas,
        gpu_bytes=(pool.gpu_bytes,) * configuration.gpus,
        service=service,
        slowest=slowest(replicas),
        accuracy=percent,
        usd_per_hour=usd_per_hour,
        score=unit.score_at_rate(
            service,
            rps=min(rps, carried) or 1 / service.latency_s,  # without a load, one request runs after the other
            gpus=replicas * configuration.gpus,
            memory_bytes=replicas * configuration.gpus * pool.gpu_bytes,
            usd_per_hour=usd_per_hour,
        ),
        overload=rps / carried if rps > carried else 0.0,
    )


def _replicas(
    limits: Sequence[SloLimit], slowest: Callable[[int], ServiceEstimate], capacity_rps: float, rps: float, most: int
) -> int:
    """Return the fewest replicas that carry a load and meet the SLOs.

    If none meet the SLOs, those that carry it; if none carry it, as many as fit.
    """
    fewest = max(1, min(most, math.ceil(rps / (MAX_UTILIZATION * capacity_rps))))
    low, high = fewest, most
    while low < high:  # the more replicas, the faster is each
        middle = (low + high) // 2
        if first_missed(limits, slowest(middle)) is None:
            high = middle
        else:
            low = middle + 1
    return low if first_missed(limits, slowest(low)) is None else fewest


def _order(
    endpoint: EndpointSpec, fitting: list[LoadCandidate], rejected: list[RejectedConfig], unit: ScoreUnit
) -> LoadRanking:
    """Order those that carry the load and meet the SLOs by the objective.

    If none does both, those that carry the load by latency; if none carries it, by how much of it they do.
    """
    limits = slo_limits(endpoint.intent)
    carrying = [candidate for candidate in fitting if not candidate.overload]
    missed = [first_missed(limits, candidate.slowest) for candidate in carrying]
    meeting = [candidate for candidate, limit in zip(carrying, missed, strict=True) if limit is None]
    if meeting:
        slow = [_missing(candidate, limit) for candidate, limit in zip(carrying, missed, strict=True) if limit]
        ordered = sorted(meeting, key=lambda candidate: (candidate.score, candidate.service.latency_s))
        return LoadRanking(candidates=tuple(ordered), rejected=(*rejected, *slow), score_unit=unit)
    if carrying:
        ordered = sorted(carrying, key=lambda candidate: candidate.service.latency_s)
        note = why_missed(limits, [candidate.slowest for candidate in carrying], share=SLO_SHARE)
    else:
        ordered = sorted(fitting, key=lambda candidate: candidate.overload)
        note = _why_overloaded(endpoint, ordered[0]) if ordered else ""
    return LoadRanking(candidates=tuple(ordered), rejected=tuple(rejected), score_unit=unit, note=note)


def _missing(candidate: LoadCandidate, limit: SloLimit) -> RejectedConfig:
    detail = f"{SLO_SHARE:.0%} of the requests take up to {limit.taken(candidate.slowest)}"
    return RejectedConfig(configuration=candidate.configuration, reason=limit.reason, detail=detail)


def _why_overloaded(endpoint: EndpointSpec, best: LoadCandidate) -> str:
    rps = endpoint.load.rps if endpoint.load else 0.0
    return f"carries {rps / best.overload:.3g} of the {rps:.3g} requests/s expected, the most that fits"
