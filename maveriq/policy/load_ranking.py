"""Choosing a configuration and replicas of engines that batch continuously, at the load that an endpoint expects.

Each configuration gets the fewest replicas that carry the load and meet the SLOs, and its estimates at that load. The
intent then orders the configurations as it orders those of exclusive engines: by latency, memory, or cost.

`rank_at_load` estimates all configurations. `best_at_load` yields the same ones in the same order, and estimates a
configuration only when it may be next: what it costs at least is known from the fewest GPUs that it takes.
"""

from __future__ import annotations

import heapq
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from maveriq.domain.cluster import ClusterView, GpuView
from maveriq.domain.deployments import Cost, EndpointSpec, ExpectedLoad
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


_LESSONS = 3  # of `_Considered.learn`


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
    considered = _considered(endpoint, view, engines, accuracy, unit)
    reasons = [configuration.why_not() for configuration in considered]
    fitting = [each.candidate() for each, reason in zip(considered, reasons, strict=True) if reason is None]
    return _order(endpoint, fitting, [reason for reason in reasons if reason is not None], unit)


def best_at_load(
    endpoint: EndpointSpec,
    view: ClusterView,
    engines: EngineEstimates,
    accuracy: AccuracyLookup,
    *,
    cost: Cost = Cost.MONEY,
) -> Iterator[tuple[LoadCandidate, str]]:
    """Yield the candidates of `rank_at_load`, each with the note of that ranking; estimate no more than needed."""
    unit = score_unit(endpoint.intent.objective, cost, view)
    considered = _considered(endpoint, view, engines, accuracy, unit)
    limits, usable, found = slo_limits(endpoint.intent), [], False
    # Least score and latency, whether they are final, and the place. What is not final goes before what is.
    wanted = endpoint.replicas or 1
    waiting = [(*each.least(), False, place) for place, each in enumerate(considered) if each.most >= wanted]
    heapq.heapify(waiting)
    while waiting:
        *_, is_final, place = heapq.heappop(waiting)
        configuration = considered[place]
        if is_final:
            found = True
            yield configuration.candidate(), ""
        elif not configuration.has_learned:
            if configuration.why_not() is None:
                usable.append(place)
                configuration.learn()
                heapq.heappush(waiting, (*configuration.least(), False, place))
        elif configuration.learn():
            heapq.heappush(waiting, (*configuration.least(), False, place))
        else:
            candidate = configuration.candidate()
            if not candidate.overload and first_missed(limits, candidate.slowest) is None:
                heapq.heappush(waiting, (candidate.score, candidate.service.latency_s, True, place))
    if not found:
        ranking = _order(endpoint, [considered[place].candidate() for place in sorted(usable)], [], unit)
        yield from ((candidate, ranking.note) for candidate in ranking.candidates)


def _considered(
    endpoint: EndpointSpec,
    view: ClusterView,
    engines: EngineEstimates,
    accuracy: AccuracyLookup,
    unit: ScoreUnit,
) -> list[_Considered]:
    """Return all configurations, before anything is known of them."""
    considered: list[_Considered] = []
    for kind in dict.fromkeys(gpu.kind for gpu in view.gpus):
        of_kind = [gpu for gpu in view.gpus if gpu.kind == kind]
        pool = _Pool(endpoint, of_kind)
        considered += [
            _Considered(
                endpoint=endpoint,
                configuration=configuration,
                pool=pool,
                engines=engines,
                accuracy=accuracy(endpoint.model.name, configuration.weights, configuration.kv),
                unit=unit,
                most=pool.replicas(configuration.gpus),
            )
            for configuration in engines.configurations(endpoint, kind=kind, gpus=len(of_kind))
        ]
    return considered


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
        of_nodes = Counter(gpu.node for gpu in self.gpus)
        self._nodes_with = Counter(of_nodes.values())  # nodes by how many of their GPUs have room

    def replicas(self, gpus: int) -> int:
        """Return how many replicas of so many GPUs have room, each on a node."""
        return sum(nodes * (count // gpus) for count, nodes in self._nodes_with.items())


@dataclass(slots=True, kw_only=True)
class _Considered:
    """A configuration and what is known of it: its estimates are made once they are asked for (mutable).

    Args:
        endpoint: what it would serve.
        configuration: of each replica.
        pool: the GPUs of its kind.
        engines: estimate it.
        accuracy: percent of the float16 score; None where it was never measured.
        unit: what the intent minimises.
        most: replicas that have room.
    """

    endpoint: EndpointSpec
    configuration: ParallelConfig
    pool: _Pool
    engines: EngineEstimates
    accuracy: float | None
    unit: ScoreUnit
    most: int
    _learned: int = field(default=0, init=False)
    _known_fewest: int = field(default=1, init=False)
    _known_latency_s: float = field(default=0.0, init=False)
    _candidate: LoadCandidate | None = field(default=None, init=False)

    @property
    def _rps(self) -> float:
        return self.endpoint.load.rps if self.endpoint.load else 0.0

    @property
    def _limits(self) -> Sequence[SloLimit]:
        return slo_limits(self.endpoint.intent)

    @property
    def _curve(self) -> LoadCurve:
        return self.engines.load_curve(self.endpoint, self.configuration)

    def why_not(self) -> RejectedConfig | None:
        """Return why it cannot be used, None if it can."""
        broken = broken_constraint(self.endpoint.intent, self.configuration, self.accuracy)
        if broken:
            return RejectedConfig(configuration=self.configuration, reason=broken)
        if rejected := self.engines.why_not(self.endpoint, self.configuration):
            return rejected
        wanted = self.endpoint.replicas or 1
        if self.most >= wanted:
            return None
        too_few = f"only {self.most} of {wanted} replicas fit" if self.most else NO_MEMORY
        detail = (
            f"a replica needs {self.configuration.gpus} GPUs of a node with {gib(self.pool.gpu_bytes):.1f} GiB free"
        )
        return RejectedConfig(configuration=self.configuration, reason=too_few, detail=detail)

    @property
    def has_learned(self) -> bool:
        """Whether `learn` was called."""
        return self._learned > 0

    def least(self) -> tuple[float, float]:
        """Return its score and latency at least, as far as they are known, if it is a candidate."""
        if not self.endpoint.load:
            return -math.inf, 0.0  # costs without a load depend on the latency
        least = self._score_of(self.endpoint.replicas or self._known_fewest, self.endpoint.load)
        return max(least, self._known_latency_s if self.unit is ScoreUnit.SECONDS else least), self._known_latency_s

    def learn(self) -> bool:
        """Learn a little more about them; return False if only its estimates tell more."""
        self._learned += 1
        match self._learned:
            case 1:
                self._known_fewest = self._fewest()
            case 2:
                self._known_latency_s = self._curve.at(0.0).latency_s
            case 3 if self.endpoint.replicas is None and self._known_fewest < self.most:
                self._known_fewest += first_missed(self._limits, self._slowest(self._known_fewest)) is not None
        return self._learned <= _LESSONS

    def candidate(self) -> LoadCandidate:
        """Return it with its replicas and estimates."""
        if self._candidate is None:
            self._candidate = self._estimated()
        return self._candidate

    def _score_of(self, replicas: int, load: ExpectedLoad) -> float:
        return self.unit.least_at_rate(
            output_tokens=load.output_tokens,
            rps=load.rps,
            gpus=replicas * self.configuration.gpus,
            memory_bytes=replicas * self.configuration.gpus * self.pool.gpu_bytes,
            usd_per_hour=self._usd_per_hour(replicas),
        )

    def _usd_per_hour(self, replicas: int) -> float | None:
        price = self.pool.usd_per_hour
        return None if price is None else replicas * self.configuration.gpus * price

    def _fewest(self) -> int:
        """Return the fewest replicas that carry the load; as many as fit, if none do."""
        return max(1, min(self.most, math.ceil(self._rps / (MAX_UTILIZATION * self._curve.capacity_rps))))

    def _slowest(self, replicas: int) -> ServiceEstimate:
        prompt_cv = self.endpoint.load.prompt_cv if self.endpoint.load else 0.0
        return self._curve.at_tail(self._rps / replicas, SLO_SHARE, prompt_cv=prompt_cv)

    def _estimated(self) -> LoadCandidate:
        curve, rps = self._curve, self._rps
        replicas = self.endpoint.replicas or _replicas(self._limits, self._slowest, self._fewest(), self.most)
        service = curve.at(rps / replicas)
        usd_per_hour = self._usd_per_hour(replicas)
        carried = replicas * curve.capacity_rps
        return LoadCandidate(
            configuration=self.configuration,
            replicas=replicas,
            gpu_bytes=(self.pool.gpu_bytes,) * self.configuration.gpus,
            service=service,
            slowest=self._slowest(replicas),
            accuracy=self.accuracy,
            usd_per_hour=usd_per_hour,
            score=self.unit.score_at_rate(
                service,
                rps=min(rps, carried) or 1 / service.latency_s,  # without a load, one request runs after the other
                gpus=replicas * self.configuration.gpus,
                memory_bytes=replicas * self.configuration.gpus * self.pool.gpu_bytes,
                usd_per_hour=usd_per_hour,
            ),
            overload=rps / carried if rps > carried else 0.0,
        )


def _replicas(limits: Sequence[SloLimit], slowest: Callable[[int], ServiceEstimate], fewest: int, most: int) -> int:
    """Return the fewest replicas that meet the SLOs, of those that carry the load; these, if none meet the SLOs.

    Args:
        limits: the SLOs.
        slowest: the times that most requests do not exceed, with so many replicas.
        fewest: replicas that carry the load, or as many as fit.
        most: replicas that fit.
    """
    if not limits or first_missed(limits, slowest(fewest)) is None or first_missed(limits, slowest(most)) is not None:
        return fewest
    low, high = fewest + 1, most
    while low < high:  # the more replicas, the faster is each
        middle = (low + high) // 2
        if first_missed(limits, slowest(middle)) is None:
            high = middle
        else:
            low = middle + 1
    return low


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
