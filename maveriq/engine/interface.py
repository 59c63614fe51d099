"""What every engine model offers to the driver that runs it: the simulator, or an emulated engine on a real clock.

A driver submits requests as they arrive, and runs steps::

    while (step := engine.next_step()) is not None:
        ...                      # start it when the one before ends; a step-time model says how long it takes
    # and when the oldest step has run:
    for token in engine.finish_step():
        ...

`next_step` returns None if the engine waits for a step in flight, or for a request. An engine with asynchronous
scheduling or a pipeline has several steps in flight; they run in the order in which they were returned.

Between events, all steps only decode. `quiet_run` says how many, and `advance` takes many of them at once.
"""

from __future__ import annotations

from collections.abc import Sized
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from maveriq.engine.kv_blocks import KVBlockPool
from maveriq.engine.requests import EngineRequest, RequestId
from maveriq.engine.sequence import Sequence
from maveriq.engine.steps import Advanced, Emitted, Step


class QuietRun(NamedTuple):
    """Next steps that only decode.

    Attributes:
        steps: how many.
        decodes: sequences that decode in each.
        context_tokens: tokens that these attend to in the first; each further step has `decodes` more.
    """

    steps: int
    decodes: int
    context_tokens: int


class CountedScheduler(Protocol):
    """What `EngineCounters` are read from; `prompt_tokens` and `cached_tokens` are theirs."""

    pool: KVBlockPool
    running: list[Sequence]
    preemptions: int
    prompt_tokens: int
    cached_tokens: int

    @property
    def waiting(self) -> Sized:
        """The requests that are not running."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineCounters:
    """The state of an engine at one instant.

    Args:
        running: requests that have been admitted.
        waiting: requests that have not, or were preempted.
        used_blocks: KV blocks that requests hold.
        blocks: KV blocks that requests may hold.
        preemptions: preemptions so far.
        prompt_tokens: prompt tokens of the requests admitted so far.
        cached_tokens: how many of these were found in the prefix cache.
    """

    running: int
    waiting: int
    used_blocks: int
    blocks: int
    preemptions: int
    prompt_tokens: int
    cached_tokens: int

    @classmethod
    def of(cls, scheduler: CountedScheduler) -> EngineCounters:
        """Return the state of what schedules an engine's requests."""
        pool = scheduler.pool
        return cls(
            running=len(scheduler.running),
            waiting=len(scheduler.waiting),
            used_blocks=pool.blocks - pool.free_blocks,
            blocks=pool.blocks,
            preemptions=scheduler.preemptions,
            prompt_tokens=scheduler.prompt_tokens,
            cached_tokens=scheduler.cached_tokens,
        )

    @property
    def kv_use(self) -> float:
        """The share of the KV blocks that requests hold."""
        return self.used_blocks / self.blocks


class Engine(Protocol):
    """The model of one engine (mutable). It knows no clock."""

    pool: KVBlockPool
    running: list[Sequence]

    def submit(self, request: EngineRequest) -> None:
        """Add a request.

        Raises:
            InputError: the engine can never serve it, because it is too long; or its ID is that of a request which
                has not ended.
        """

    def abort(self, request_id: RequestId) -> bool:
        """End a request now, and free what it holds. Return whether the engine held it."""

    def next_step(self) -> Step | None:
        """Compose the next step; None if the engine waits for a step in flight, or for a request."""

    def finish_step(self) -> list[Emitted]:
        """Take the tokens of the oldest step in flight.

        Returns:
            The tokens, in the order of the step. Those of sequences that are counted together (`Step.together`) are
            not listed, unless it is a sequence's last.

        Raises:
            InvariantError: no step is in flight.
        """

    def quiet_run(self) -> QuietRun | None:
        """Return the next steps in which nothing happens but decoding; None if there are none or it cannot tell.

        Requests may end in the last of them. It holds until the next request is submitted or aborted.
        """

    def advance(self, steps: int) -> Advanced:
        """Do `next_step` and `finish_step` so many times, at most as often as `quiet_run` says."""

    @property
    def counters(self) -> EngineCounters:
        """The state of the engine."""
