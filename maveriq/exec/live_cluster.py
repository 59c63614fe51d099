"""A cluster that is up: what a service over HTTP, or a replay, may ask of it.

`maveriq.exec.executor.Body` is one. All of it is called from one event loop.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Protocol

from maveriq.domain.deployments import Intent
from maveriq.domain.models import ModelSpec
from maveriq.domain.progress import DeploymentStatus, Progress
from maveriq.domain.requests import RequestStatus
from maveriq.units import Micros


@dataclass(frozen=True, slots=True, kw_only=True)
class Submission:
    """A prompt to an endpoint, as token ids, and how many tokens may follow."""

    endpoint_id: int
    prompt: tuple[int, ...]
    output_tokens: int
    stop_token_ids: tuple[int, ...] = ()
    slo_us: Micros = 0
    priority: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How a request ended; times on the cluster's clock, -1 for what never happened.

    `reason` is empty for a completed one. `tokens` is all that was generated.
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
    """A submitted request, to be followed."""

    @property
    def request_id(self) -> int:
        """Its number, from 1."""

    def tokens(self) -> AsyncIterator[int]:
        """Yield its tokens as they come; ends when the request does, however that is.

        A request that is run again after its engine failed continues where it was: greedy tokens are the same.
        """

    async def outcome(self) -> Outcome:
        """Wait for its end. Always comes, at the latest when the cluster closes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EndpointRequest:
    """What a developer asks to be served, and how (the fields of `DeployAsk` that are theirs to say)."""

    model: ModelSpec
    intent: Intent
    output_tokens: int
    batch_size: int = 1


class LiveCluster(Protocol):
    """Engines under one controller."""

    @property
    def now_us(self) -> Micros:
        """The cluster's clock."""

    def deploy(self, asked: EndpointRequest, *, endpoint_id: int | None = None) -> int:
        """Ask for a model to be served and return the endpoint's number; what became of it is in `endpoint`.

        Args:
            asked: what is wanted.
            endpoint_id: number of an endpoint of an earlier life of the service; None for the next free one.
        """

    def remove(self, endpoint_id: int) -> None:
        """Take an endpoint away: what runs is finished, what waits is refused.

        Raises:
            InputError: there is no such endpoint.
        """

    def endpoint(self, endpoint_id: int) -> tuple[DeploymentStatus, ...]:
        """Return the deployments of an endpoint as they are now.

        Raises:
            InputError: there is no such endpoint.
        """

    def submit(self, submission: Submission) -> RequestHandle:
        """Take in a request. One that cannot be served comes back refused by its ticket, with the reason.

        Raises:
            InputError: there is no such endpoint.
        """

    def cancel(self, request_id: int) -> None:
        """Nobody waits for this request any more: if it has not started it ends as failed, else it is finished."""

    def progress(self) -> Progress:
        """Return what live views and metrics show."""

    async def close(self) -> None:
        """Stop all engines, end all requests (as unfinished), and return when every process is gone."""
