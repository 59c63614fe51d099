"""The interface of a running cluster: deploy and remove endpoints, submit and cancel requests, read the progress.

`maveriq.exec.executor.Executor` implements it; the HTTP service and replays use it. Call everything from one event
loop.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Protocol

from maveriq.control.events import ProfileRequested
from maveriq.domain.deployments import Batching, Intent
from maveriq.domain.models import ModelSpec
from maveriq.domain.progress import DeploymentStatus, Progress
from maveriq.domain.requests import RequestStatus
from maveriq.units import Micros
from maveriq.workload.model_sets import ContinuousSettings


@dataclass(frozen=True, slots=True, kw_only=True)
class Submission:
    """A request to submit: the endpoint, the token ids of the prompt, and how many tokens to generate."""

    endpoint_id: int
    prompt: tuple[int, ...]
    output_tokens: int
    stop_token_ids: tuple[int, ...] = ()
    slo_us: Micros = 0
    priority: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How a request ended. Times are on the cluster's clock, -1 for what did not happen.

    `reason` is empty for a completed request. `tokens` are all tokens that were generated.
    """

    request_id: int
    status: RequestStatus
    reason: str
    tokens: tuple[int, ...]
    arrival_us: Micros
    start_us: Micros
    first_token_us: Micros
    finish_us: Micros


class RequestHandle(Protocol):
    """A submitted request."""

    @property
    def request_id(self) -> int:
        """The id of the request, from 1."""

    def tokens(self) -> AsyncIterator[int]:
        """Yield the tokens as they arrive, until the request ends in any way.

        If an engine fails and the request is retried, the stream continues where it was: greedy decoding gives the same
        tokens again.
        """

    async def outcome(self) -> Outcome:
        """Wait for the end of the request, which comes at the latest when the cluster closes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EndpointRequest:
    """An endpoint to create: the part of an `EndpointSpec` that a user chooses.

    `engine` are the settings of engines that batch continuously, None for engines that take one execution at a time.
    `whole_command`: they are a whole command, which also says on how many GPUs the engine runs. `wait_for_profile`: a
    profile of its model was under way when it was created, after which it is deployed.
    """

    model: ModelSpec
    intent: Intent
    output_tokens: int
    batch_size: int = 1
    engine: ContinuousSettings | None = None
    whole_command: bool = False
    wait_for_profile: bool = False

    @property
    def batching(self) -> Batching:
        """How its engines batch."""
        return Batching.EXCLUSIVE if self.engine is None else Batching.CONTINUOUS


class ProfileRunner(Protocol):
    """Measures a profile on the GPUs that it is given. Neither method may call the cluster before it returns."""

    def start(self, gpu_ids: tuple[int, ...]) -> None:
        """Measure on these GPUs, from where it stopped."""

    def stop(self) -> None:
        """Stop measuring: the GPUs are needed. `start` follows once others are free."""


class LiveCluster(Protocol):
    """A cluster whose engines are managed by one controller."""

    @property
    def now_us(self) -> Micros:
        """The cluster's clock."""

    def deploy(self, endpoint: EndpointRequest, *, endpoint_id: int | None = None, after_profile: int = 0) -> int:
        """Create an endpoint and return its id; `endpoint` returns whether and how it is deployed.

        Args:
            endpoint: the endpoint to create.
            endpoint_id: the id of an endpoint that the service restores after a restart; None for the next free id.
            after_profile: the number of a profile for which it waits, with its requests; 0 for none.
        """

    def request_profile(self, profile: ProfileRequested, runner: ProfileRunner) -> None:
        """Queue a profile for GPUs; `runner` measures it."""

    def end_profile(self, profile_id: int, reason: str = "") -> None:
        """Free the GPUs of a profile; endpoints that wait for it are decided on, or rejected if there is a reason."""

    def remove(self, endpoint_id: int) -> None:
        """Remove an endpoint. Running requests finish, waiting requests are refused.

        Raises:
            InputError: there is no such endpoint.
        """

    def endpoint(self, endpoint_id: int) -> tuple[DeploymentStatus, ...]:
        """Return the current status of an endpoint's deployments.

        Raises:
            InputError: there is no such endpoint.
        """

    def why_too_long(self, endpoint_id: int, tokens: int) -> str | None:
        """Return why a sequence of so many tokens, prompt and output, would be refused; None if it would not."""

    def max_sequence_tokens(self, endpoint_id: int) -> int | None:
        """Return the longest sequence of an endpoint that is served, prompt and output; None for no limit."""

    def submit(self, submission: Submission) -> RequestHandle:
        """Submit a request. If it cannot be served, it ends as refused, with the reason.

        Raises:
            InputError: there is no such endpoint.
        """

    def cancel(self, request_id: int) -> None:
        """Cancel a request whose client disconnected.

        A waiting request ends as failed, and so does one in an engine that batches continuously. A running one of
        another engine finishes.
        """

    def progress(self) -> Progress:
        """Return the progress for live views and metrics."""

    async def close(self) -> None:
        """End all requests as unfinished, stop all engines, and return when every process has ended."""
