"""Routing policies: which of the replicas of an endpoint that are ready takes a request.

A policy sees the replicas as they are (`Replica`) and the request; it must not look at how many tokens the request will
get. It has no clock, and draws random numbers from a named stream of the seed, so that equal runs route alike.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from enum import StrEnum
from types import MappingProxyType
from typing import Protocol, TypeVar

from maveriq.domain.requests import Request
from maveriq.engine.requests import BlockKey, block_keys, engine_request
from maveriq.streams import pick
from maveriq.units import Micros


class RoutingRule(StrEnum):
    """The routing policies by name."""

    ROUND_ROBIN = "round-robin"
    RANDOM = "random"
    LEAST_OUTSTANDING = "least-outstanding"
    POWER_OF_TWO = "power-of-two"
    LEAST_KV = "least-kv"
    PREFIX_AWARE = "prefix-aware"
    SESSION = "session"
    LEAST_WORK = "least-work"

    @property
    def sees_kv_cache(self) -> bool:
        """Whether it goes by the KV caches of continuous engines."""
        return self in (RoutingRule.LEAST_KV, RoutingRule.PREFIX_AWARE)

    @property
    def predicts_service_time(self) -> bool:
        """Whether it goes by predicted service times, of engines that take one execution at a time."""
        return self is RoutingRule.LEAST_WORK


class Replica(Protocol):
    """What a policy sees of a replica."""

    @property
    def deployment_id(self) -> int:
        """Its number."""

    @property
    def generation(self) -> int:
        """How often its engine has started; a new engine has an empty cache."""

    @property
    def assigned(self) -> int:
        """Requests that it was given so far."""

    @property
    def outstanding(self) -> int:
        """Requests that it was given and that have not ended."""

    @property
    def kv_tokens(self) -> int:
        """Tokens of its KV cache in use, as its engine last reported, plus the prompts that it has not begun."""

    @property
    def kv_capacity_tokens(self) -> int:
        """Tokens that its KV cache holds; 0 where that is not known."""


AnyReplica = TypeVar("AnyReplica", bound=Replica)


class RoutingPolicy(ABC):
    """Chooses a replica for each request."""

    @abstractmethod
    def choose(self, replicas: Sequence[AnyReplica], request: Request) -> AnyReplica:
        """Return one of the replicas, of which there is at least one, in the order of their numbers."""

    def sent(self, replica: Replica, request: Request, now_us: Micros, service_us: Micros) -> None:  # noqa: B027
        """Note that a replica was given a request with this predicted service time. Most policies need not."""


class RoundRobin(RoutingPolicy):
    """Each replica in turn."""

    def __init__(self) -> None:
        self.last: dict[int, int] = {}
        """The deployment that was chosen last, by endpoint."""

    def choose(self, replicas: Sequence[AnyReplica], request: Request) -> AnyReplica:
        """Return the replica after the one that was chosen last."""
        last = self.last.get(request.endpoint_id, 0)
        chosen = next((replica for replica in replicas if replica.deployment_id > last), replicas[0])
        self.last[request.endpoint_id] = chosen.deployment_id
        return chosen


class Random(RoutingPolicy):
    """Any replica, equally likely. The choice depends on the seed and the number of the request alone."""

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def choose(self, replicas: Sequence[AnyReplica], request: Request) -> AnyReplica:
        """Return a random replica."""
        return replicas[pick(self._seed, "replicas", request.request_id, len(replicas))]


class LeastOutstanding(RoutingPolicy):
    """The replica with the fewest requests that have not ended; of equal ones the one that was given the fewest."""

    def choose(self, replicas: Sequence[AnyReplica], request: Request) -> AnyReplica:  # noqa: ARG002
        """Return that replica."""
        best, fewest = replicas[0], replicas[0].outstanding
        for replica in replicas:  # a key function would take twice as long, and replicas can be many
            outstanding = replica.outstanding
            if outstanding < fewest or (outstanding == fewest and replica.assigned < best.assigned):
                best, fewest = replica, outstanding
        return best


class PowerOfTwo(RoutingPolicy):
    """The one of two random replicas with fewer outstanding requests (Mitzenmacher 2001)."""

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def choose(self, replicas: Sequence[AnyReplica], request: Request) -> AnyReplica:
        """Return the better one of two."""
        count = len(replicas)
        if count == 1:
            return replicas[0]
        first = pick(self._seed, "first of two replicas", request.request_id, count)
        second = pick(self._seed, "second of two replicas", request.request_id, count - 1)
        second += second >= first
        return min(replicas[first], replicas[second], key=lambda replica: replica.outstanding)


class LeastKv(RoutingPolicy):
    """The replica whose KV cache is used least, prompts that it has not begun included."""

    def choose(self, replicas: Sequence[AnyReplica], request: Request) -> AnyReplica:  # noqa: ARG002
        """Return that replica."""
        return min(
            replicas,
            key=lambda replica: (replica.kv_tokens / max(1, replica.kv_capacity_tokens), *_by_outstanding(replica)),
        )


class PrefixAware(RoutingPolicy):
    """The replica that has least to compute: of this prompt, without what it has cached of it, and of others.

    The policy keeps its own record of the prompts that each replica was given, as many as the replica's cache holds.
    What a replica has to do for others is `Replica.kv_tokens`: so a popular prefix spreads to further replicas when
    those that have it are busy.
    """

    BLOCK_TOKENS = 16
    _MAX_BLOCKS = 1 << 20  # where the size of a cache is not known

    def __init__(self) -> None:
        self._caches: dict[int, tuple[int, OrderedDict[BlockKey, None]]] = {}  # generation and blocks, by deployment

    def choose(self, replicas: Sequence[AnyReplica], request: Request) -> AnyReplica:
        """Return that replica."""
        keys = self._keys(request)
        return min(
            replicas,
            key=lambda replica: (replica.kv_tokens - self._cached_tokens(replica, keys), *_by_outstanding(replica)),
        )

    def sent(self, replica: Replica, request: Request, now_us: Micros, service_us: Micros) -> None:  # noqa: ARG002
        """Note that the replica will have this prompt in its cache."""
        cache = self._cache(replica)
        for key in reversed(self._keys(request)):  # the end of a prompt is forgotten first
            cache[key] = None
            cache.move_to_end(key)
        limit = replica.kv_capacity_tokens // self.BLOCK_TOKENS or self._MAX_BLOCKS
        while len(cache) > limit:
            cache.popitem(last=False)

    def _keys(self, request: Request) -> list[BlockKey]:
        """Return the keys of the blocks of a prompt that can be found: one token at least is always computed."""
        blocks = (request.prompt_tokens - 1) // self.BLOCK_TOKENS
        return block_keys(engine_request(request), self.BLOCK_TOKENS)[:blocks]

    def _cached_tokens(self, replica: Replica, keys: Sequence[BlockKey]) -> int:
        cache = self._cache(replica)
        found = 0
        for key in keys:
            if key not in cache:
                break
            found += 1
        return found * self.BLOCK_TOKENS

    def _cache(self, replica: Replica) -> OrderedDict[BlockKey, None]:
        generation, cache = self._caches.get(replica.deployment_id, (-1, None))
        if cache is None or generation != replica.generation:
            cache = OrderedDict()
            self._caches[replica.deployment_id] = replica.generation, cache
        return cache


class Session(RoutingPolicy):
    """All requests of a session to one replica, others to the one with the fewest outstanding.

    The replica is the one with the highest random weight (Thaler and Ravishankar 1998), so that when a replica goes,
    only its own sessions move.
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._others = LeastOutstanding()

    def choose(self, replicas: Sequence[AnyReplica], request: Request) -> AnyReplica:
        """Return the replica of the request's session."""
        if not request.session_id:
            return self._others.choose(replicas, request)
        return max(replicas, key=lambda replica: self._weight(replica.deployment_id, request.session_id))

    def _weight(self, deployment_id: int, session_id: int) -> int:
        return pick(self._seed, f"sessions of replica {deployment_id}", session_id, 1 << 62)


class LeastWork(RoutingPolicy):
    """The replica whose assigned work ends first, by predicted service times, as AlpaServe itself does."""

    def __init__(self) -> None:
        self._busy_until_us: dict[int, Micros] = {}

    def choose(self, replicas: Sequence[AnyReplica], request: Request) -> AnyReplica:  # noqa: ARG002
        """Return that replica."""
        return min(replicas, key=lambda replica: self._busy_until_us.get(replica.deployment_id, 0))

    def sent(self, replica: Replica, request: Request, now_us: Micros, service_us: Micros) -> None:  # noqa: ARG002
        """Add the work."""
        busy_until_us = self._busy_until_us.get(replica.deployment_id, 0)
        self._busy_until_us[replica.deployment_id] = max(busy_until_us, now_us) + service_us


def _by_outstanding(replica: Replica) -> tuple[int, int, int]:
    return replica.outstanding, replica.assigned, replica.deployment_id


_POLICIES: Mapping[RoutingRule, Callable[[int], RoutingPolicy]] = MappingProxyType(
    {
        RoutingRule.ROUND_ROBIN: lambda _seed: RoundRobin(),
        RoutingRule.RANDOM: Random,
        RoutingRule.LEAST_OUTSTANDING: lambda _seed: LeastOutstanding(),
        RoutingRule.POWER_OF_TWO: PowerOfTwo,
        RoutingRule.LEAST_KV: lambda _seed: LeastKv(),
        RoutingRule.PREFIX_AWARE: lambda _seed: PrefixAware(),
        RoutingRule.SESSION: Session,
        RoutingRule.LEAST_WORK: lambda _seed: LeastWork(),
    }
)


def routing_policy(rule: RoutingRule, seed: int) -> RoutingPolicy:
    """Return a new policy of a name."""
    return _POLICIES[rule](seed)
