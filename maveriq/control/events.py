"""What the controller is told, and what it asks for in return.

A body (the simulator, the executor) tells the controller what happened at an instant and
carries out the actions that come back. Events of one instant are handled in the order of their
`rank`, then of their `key`, so that the order in which a body learned of them plays no part.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, TypeAlias

from maveriq.domain.deployments import EndpointSpec
from maveriq.domain.parallel import DeploymentPlan
from maveriq.domain.requests import Request
from maveriq.units import Micros


@dataclass(slots=True)
class ExecutionFinished:
    """A deployment is done with an execution; `first_token_us` is when its first token came.

    An `execution_id` other than that under way is a late word from before a failure: ignored.
    `output_tokens` says how many tokens each request got, in the order of the execution; None for as many as asked.
    """

    deployment_id: int
    execution_id: int
    first_token_us: Micros
    output_tokens: tuple[int, ...] | None = None
    rank: ClassVar[int] = 0

    @property
    def key(self) -> int:
        """Order among events of this kind."""
        return self.deployment_id


@dataclass(frozen=True, slots=True)
class ExecutionFailed:
    """A deployment could not do an execution, and still serves; its requests have failed.

    Late words are ignored as for `ExecutionFinished`.
    """

    deployment_id: int
    execution_id: int
    reason: str
    rank: ClassVar[int] = 0

    @property
    def key(self) -> int:
        """Order among events of this kind."""
        return self.deployment_id


@dataclass(frozen=True, slots=True)
class GpuDown:
    """A GPU fails; `returns` says whether a `GpuUp` will follow."""

    gpu_id: int
    returns: bool
    rank: ClassVar[int] = 1

    @property
    def key(self) -> int:
        """Order among events of this kind."""
        return self.gpu_id


@dataclass(frozen=True, slots=True)
class GpuUp:
    """A failed GPU is back; deployments that wait for it start again."""

    gpu_id: int
    rank: ClassVar[int] = 2

    @property
    def key(self) -> int:
        """Order among events of this kind."""
        return self.gpu_id


@dataclass(frozen=True, slots=True)
class EngineRepaired:
    """What made an engine fail is mended; it starts again."""

    deployment_id: int
    rank: ClassVar[int] = 3

    @property
    def key(self) -> int:
        """Order among events of this kind."""
        return self.deployment_id


@dataclass(frozen=True, slots=True)
class EngineUp:
    """An engine has loaded and registers. A stale `generation` is ignored."""

    deployment_id: int
    generation: int
    rank: ClassVar[int] = 4

    @property
    def key(self) -> int:
        """Order among events of this kind."""
        return self.deployment_id


@dataclass(frozen=True, slots=True)
class EndpointRemoved:
    """The developer takes an endpoint away; what runs may finish, what waits is refused."""

    endpoint_id: int
    rank: ClassVar[int] = 5

    @property
    def key(self) -> int:
        """Order among events of this kind."""
        return self.endpoint_id


@dataclass(frozen=True, slots=True)
class EndpointAdded:
    """A developer asks for a model to be served."""

    endpoint: EndpointSpec
    rank: ClassVar[int] = 6

    @property
    def key(self) -> int:
        """Order among events of this kind."""
        return self.endpoint.endpoint_id


@dataclass(frozen=True, slots=True)
class EngineDown:
    """A deployment's engine fails; `returns` says whether an `EngineRepaired` will follow."""

    deployment_id: int
    returns: bool
    reason: str = "its engine failed"
    rank: ClassVar[int] = 7  # an engine can fail at the very instant it is asked for

    @property
    def key(self) -> int:
        """Order among events of this kind."""
        return self.deployment_id


@dataclass(slots=True)
class RequestArrived:
    """A user sends a request."""

    request: Request
    rank: ClassVar[int] = 8

    @property
    def key(self) -> int:
        """Order among events of this kind."""
        return self.request.request_id


@dataclass(frozen=True, slots=True)
class RequestCancelled:
    """Nobody waits for a request any more.

    One that has not started fails; one that runs goes on, but is not run again should its engine fail.
    """

    request_id: int
    rank: ClassVar[int] = 9

    @property
    def key(self) -> int:
        """Order among events of this kind."""
        return self.request_id


Event: TypeAlias = (
    ExecutionFinished
    | ExecutionFailed
    | GpuDown
    | EngineDown
    | GpuUp
    | EngineRepaired
    | EngineUp
    | EndpointRemoved
    | EndpointAdded
    | RequestArrived
    | RequestCancelled
)


@dataclass(frozen=True, slots=True)
class StartEngine:
    """Load an engine; answer with `EngineUp` of the same generation."""

    deployment_id: int
    generation: int
    plan: DeploymentPlan


@dataclass(frozen=True, slots=True)
class StopEngine:
    """Stop an engine; nothing runs on it."""

    deployment_id: int


@dataclass(slots=True)
class Execute:
    """Run these requests together (one unless the batch size is larger); answer with `ExecutionFinished`."""

    deployment_id: int
    execution_id: int
    requests: tuple[Request, ...]


Action: TypeAlias = StartEngine | StopEngine | Execute
