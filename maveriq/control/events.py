"""The events that the controller handles, and the actions that it returns.

The simulator or the executor passes the events of an instant to `Controller.handle` and carries
out the actions. Events of the same instant are handled in order of `rank`, then of `key`, so that
the order in which they are passed does not matter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, TypeAlias

from maveriq.domain.deployments import EndpointSpec
from maveriq.domain.parallel import DeploymentPlan
from maveriq.domain.requests import Request
from maveriq.units import Bytes, Micros


class _DeploymentEvent:
    """An event of one deployment."""

    __slots__ = ()
    deployment_id: int

    @property
    def key(self) -> int:
        """The order among events of this kind at one instant."""
        return self.deployment_id


class _GpuEvent:
    """An event of one GPU."""

    __slots__ = ()
    gpu_id: int

    @property
    def key(self) -> int:
        """The order among events of this kind at one instant."""
        return self.gpu_id


@dataclass(slots=True)
class ExecutionFinished(_DeploymentEvent):
    """A deployment finished an execution; its first token came at `first_token_us`.

    Ignored if `execution_id` is not the current one: it then belongs to an engine that has failed.
    `output_tokens` holds the tokens that each request got, in the order of the execution; None if
    each got as many as it asked for.
    """

    deployment_id: int
    execution_id: int
    first_token_us: Micros
    output_tokens: tuple[int, ...] | None = None
    rank: ClassVar[int] = 0


@dataclass(frozen=True, slots=True)
class ExecutionFailed(_DeploymentEvent):
    """An execution failed, and its requests with it; the engine goes on.

    Ignored if `execution_id` is not the current one.
    """

    deployment_id: int
    execution_id: int
    reason: str
    rank: ClassVar[int] = 0


class Started(NamedTuple):
    """A request that an engine computes from `start_us` on; `cached_tokens` of its prompt were in the prefix cache."""

    request_id: int
    start_us: Micros
    cached_tokens: int = 0


class Finished(NamedTuple):
    """A request that got its last token: how many it has, and how many steps computed something of it."""

    request_id: int
    output_tokens: int
    steps: int = 0


class FailedAlone(NamedTuple):
    """A request that an engine cannot do, and why; the engine goes on with the others."""

    request_id: int
    reason: str


@dataclass(slots=True)
class EngineProgress(_DeploymentEvent):
    """What became of the requests of a continuous engine in a step.

    Requests that were aborted may still appear; they are ignored, as is a `generation` that is not the current one.

    Args:
        deployment_id: the engine's deployment.
        generation: of the engine.
        started: computed for the first time.
        preempted: lost what was computed of them, and wait again; a request may appear twice.
        first_tokens: got their first token.
        finished: got their last token.
        failed: ended without it.
        kv_tokens: tokens of the KV blocks that requests hold after it.
    """

    deployment_id: int
    generation: int
    started: Sequence[Started] = ()
    preempted: Sequence[int] = ()
    first_tokens: Sequence[int] = ()
    finished: Sequence[Finished] = ()
    failed: Sequence[FailedAlone] = ()
    kv_tokens: int = 0
    rank: ClassVar[int] = 0

    def __bool__(self) -> bool:
        return bool(self.started or self.preempted or self.first_tokens or self.finished or self.failed)


@dataclass(frozen=True, slots=True)
class GpuDown(_GpuEvent):
    """A GPU fails; `returns` says whether a `GpuUp` will follow."""

    gpu_id: int
    returns: bool
    rank: ClassVar[int] = 1


@dataclass(frozen=True, slots=True)
class GpuUp(_GpuEvent):
    """A failed GPU works again; deployments that wait for it start again."""

    gpu_id: int
    rank: ClassVar[int] = 2


@dataclass(frozen=True, slots=True)
class EngineRepaired(_DeploymentEvent):
    """A failed engine may start again."""

    deployment_id: int
    rank: ClassVar[int] = 3


@dataclass(frozen=True, slots=True)
class EngineUp(_DeploymentEvent):
    """An engine has loaded and registers. Ignored if `generation` is not the current one.

    `kv_capacity_tokens` is how many tokens the KV cache of a continuous engine holds.
    """

    deployment_id: int
    generation: int
    kv_capacity_tokens: int = 0
    rank: ClassVar[int] = 4


@dataclass(frozen=True, slots=True)
class EndpointRemoved:
    """An endpoint is removed: its running requests finish, and its waiting requests are refused."""

    endpoint_id: int
    rank: ClassVar[int] = 5

    @property
    def key(self) -> int:
        """The order among events of this kind at one instant."""
        return self.endpoint_id


@dataclass(frozen=True, slots=True)
class EndpointAdded:
    """A model is to be served, at once or after a profile of it has ended; 0 for no profile."""

    endpoint: EndpointSpec
    after_profile: int = 0
    rank: ClassVar[int] = 6

    @property
    def key(self) -> int:
        """The order among events of this kind at one instant."""
        return self.endpoint.endpoint_id


@dataclass(frozen=True, slots=True)
class EngineDown(_DeploymentEvent):
    """A deployment's engine fails; `returns` says whether an `EngineRepaired` will follow."""

    deployment_id: int
    returns: bool
    reason: str = "its engine failed"
    rank: ClassVar[int] = 7  # an engine may fail at the instant at which its endpoint is added


@dataclass(slots=True)
class RequestArrived:
    """A user sends a request."""

    request: Request
    rank: ClassVar[int] = 8

    @property
    def key(self) -> int:
        """The order among events of this kind at one instant."""
        return self.request.request_id


@dataclass(frozen=True, slots=True)
class RequestCancelled:
    """The client cancelled a request or disconnected.

    A waiting request fails, and so does one in a continuous engine. A running one of another engine continues, but is
    not retried if its engine fails.
    """

    request_id: int
    rank: ClassVar[int] = 9

    @property
    def key(self) -> int:
        """The order among events of this kind at one instant."""
        return self.request_id


@dataclass(frozen=True, slots=True)
class ProfileRequested:
    """A profile is to be measured on GPUs of one node: on GPUs that hold nothing, or beside engines.

    Args:
        profile_id: from 1.
        gpus: how many.
        bytes_per_gpu: memory that it takes of each.
        beside_engines: whether other engines may be on them.
    """

    profile_id: int
    gpus: int
    bytes_per_gpu: Bytes
    beside_engines: bool = False
    rank: ClassVar[int] = 10  # after deployments of the same instant

    @property
    def key(self) -> int:
        """The order among events of this kind at one instant."""
        return self.profile_id


@dataclass(frozen=True, slots=True)
class ProfileEnded:
    """A profile is complete, or was given up; `reason` says why it was given up.

    Endpoints that wait for it are decided on, or rejected with the reason.
    """

    profile_id: int
    reason: str = ""
    rank: ClassVar[int] = -1  # before deployments of the same instant

    @property
    def key(self) -> int:
        """The order among events of this kind at one instant."""
        return self.profile_id


Event: TypeAlias = (
    ExecutionFinished
    | ExecutionFailed
    | EngineProgress
    | GpuDown
    | EngineDown
    | GpuUp
    | EngineRepaired
    | EngineUp
    | EndpointRemoved
    | EndpointAdded
    | RequestArrived
    | RequestCancelled
    | ProfileRequested
    | ProfileEnded
)


@dataclass(frozen=True, slots=True)
class StartEngine:
    """Load an engine; answer with `EngineUp` of the same generation."""

    deployment_id: int
    generation: int
    plan: DeploymentPlan


@dataclass(frozen=True, slots=True)
class StopEngine:
    """Stop an engine, on which nothing runs."""

    deployment_id: int


@dataclass(slots=True)
class Execute:
    """Execute these requests as one batch; answer with `ExecutionFinished`."""

    deployment_id: int
    execution_id: int
    requests: tuple[Request, ...]


@dataclass(slots=True)
class Submit:
    """Put a request into the queue of a continuous engine; answer with `EngineProgress` as it is computed."""

    deployment_id: int
    request: Request


@dataclass(slots=True)
class Abort:
    """End a request of a continuous engine, whether it waits or runs."""

    deployment_id: int
    request_id: int


@dataclass(frozen=True, slots=True)
class StartProfile:
    """Measure a profile on these GPUs; answer with `ProfileEnded`."""

    profile_id: int
    gpu_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class StopProfile:
    """Stop measuring a profile: its GPUs are needed. It goes on with the next `StartProfile`."""

    profile_id: int


Action: TypeAlias = StartEngine | StopEngine | Execute | Submit | Abort | StartProfile | StopProfile
