"""Requests on their way: their tokens as they come, and their end.

Requests that have not ended, and which engine is at which of them.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

from maveriq.control.events import Execute, ExecutionFailed, ExecutionFinished
from maveriq.control.request_tracker import RequestTracker
from maveriq.domain.records import NOT_YET
from maveriq.domain.requests import Request
from maveriq.exec.live_cluster import Outcome
from maveriq.exec.messages import Failed, Finished, PromptSequence, StepProgress, one_line
from maveriq.units import Micros, micros


class LiveRequestHandle:
    """A request that somebody may follow; `maveriq.exec.live_cluster.Ticket`."""

    def __init__(self, request: Request, prompt: tuple[int, ...], stop_token_ids: tuple[int, ...] = ()) -> None:
        self.request = request
        self._prompt = prompt
        self._stop_token_ids = stop_token_ids
        self._got: list[int] = []
        self._news = asyncio.Event()
        self._outcome: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()

    @property
    def request_id(self) -> int:
        """Its number."""
        return self.request.request_id

    @property
    def got(self) -> tuple[int, ...]:
        """The tokens that have come so far."""
        return tuple(self._got)

    def sequence(self) -> PromptSequence:
        """Return it as an engine is asked."""
        return PromptSequence(
            request_id=self.request_id,
            prompt=self._prompt,
            output_tokens=self.request.output_tokens,
            stop_token_ids=self._stop_token_ids,
        )

    def add(self, position: int, tokens: Sequence[int]) -> None:
        """Take in the tokens from a position on; those that are there already came from an engine that failed."""
        self._got.extend(tokens[len(self._got) - position :])
        self._news.set()

    def end(self, outcome: Outcome) -> None:
        """Note how it ended."""
        self._outcome.set_result(outcome)
        self._news.set()

    async def tokens(self) -> AsyncIterator[int]:
        """Yield its tokens as they come, until it ends."""
        sent = 0
        while True:
            while sent < len(self._got):
                yield self._got[sent]
                sent += 1
            if self._outcome.done():
                return
            self._news.clear()
            await self._news.wait()

    async def outcome(self) -> Outcome:
        """Wait for its end."""
        return await asyncio.shield(self._outcome)


@dataclass(slots=True)
class _Execution:
    """What an engine is at."""

    execution_id: int
    handles: tuple[LiveRequestHandle, ...]
    started_us: Micros
    positions: list[int]  # tokens of each sequence so far
    first_token_us: Micros = NOT_YET


class InFlight:
    """Keeps tickets by request and executions by deployment, and hears from the ledger which requests have ended."""

    def __init__(self) -> None:
        self._handles: dict[int, LiveRequestHandle] = {}
        self._executions: dict[int, _Execution] = {}
        self._ended: list[int] = []
        self._none_open = asyncio.Event()
        self._none_open.set()

    def open(self, handle: LiveRequestHandle) -> None:
        """Take in a request that arrives."""
        self._handles[handle.request_id] = handle
        self._none_open.clear()

    async def none_open(self) -> None:
        """Wait until every request has ended."""
        await self._none_open.wait()

    # Executions

    def begin(self, action: Execute, now_us: Micros) -> tuple[PromptSequence, ...]:
        """Note that an engine starts on requests, and return them as it is asked."""
        handles = tuple(self._handles[request.request_id] for request in action.requests)
        self._executions[action.deployment_id] = _Execution(action.execution_id, handles, now_us, [0] * len(handles))
        return tuple(handle.sequence() for handle in handles)

    def drop(self, deployment_id: int) -> None:
        """Note that an engine is gone; what it was at will be run again, or has failed."""
        self._executions.pop(deployment_id, None)

    def stepped(self, deployment_id: int, progress: StepProgress, now_us: Micros) -> None:
        """Hand on the tokens of a step."""
        execution = self._at(deployment_id, progress.execution_id)
        if execution is None:
            return
        if execution.first_token_us == NOT_YET:
            execution.first_token_us = now_us
        for index, token in enumerate(progress.tokens):
            if token >= 0:
                execution.handles[index].add(execution.positions[index], (token,))
                execution.positions[index] += 1

    def executed(
        self, deployment_id: int, ended: Finished | Failed, now_us: Micros, time_scale: float
    ) -> ExecutionFinished | ExecutionFailed | None:
        """Return what the controller should know of the end of an execution; None of one that is long over."""
        execution = self._at(deployment_id, ended.execution_id)
        if execution is None:
            return None
        del self._executions[deployment_id]
        if isinstance(ended, Failed):
            reason = one_line(f"its engine could not do it ({ended.kind}): {ended.message}")
            return ExecutionFailed(deployment_id, ended.execution_id, reason)
        for handle, output in zip(execution.handles, ended.outputs, strict=True):
            handle.add(0, output)
        first_token_us = execution.first_token_us
        if first_token_us == NOT_YET:  # word of it was lost
            first_token_us = execution.started_us + micros(ended.first_token_s / time_scale)
        asked = tuple(handle.request.output_tokens for handle in execution.handles)
        got = tuple(max(1, len(output)) for output in ended.outputs)
        return ExecutionFinished(
            deployment_id, ended.execution_id, min(first_token_us, now_us), None if got == asked else got
        )

    def _at(self, deployment_id: int, execution_id: int) -> _Execution | None:
        execution = self._executions.get(deployment_id)
        return execution if execution is not None and execution.execution_id == execution_id else None

    # Ends

    def request_ended(self, request_id: int) -> None:
        """Note that the controller ended a request; `settle` passes it on."""
        self._ended.append(request_id)

    def settle(self, tracker: RequestTracker) -> None:
        """Tell those who follow requests which of them have ended since the last time."""
        for request_id in self._ended:
            self._settle(request_id, tracker)
        self._ended.clear()
        if not self._handles:
            self._none_open.set()

    def settle_all(self, tracker: RequestTracker) -> None:
        """Tell those who follow requests that all have ended, after the ledger was closed."""
        self._ended.clear()
        for request_id in list(self._handles):
            self._settle(request_id, tracker)
        self._executions.clear()
        self._none_open.set()

    def _settle(self, request_id: int, tracker: RequestTracker) -> None:
        handle = self._handles.pop(request_id)
        row = tracker.row(request_id)
        handle.end(
            Outcome(
                request_id=request_id,
                status=row.status,
                reason=row.reason,
                tokens=handle.got,
                arrival_us=row.arrival_us,
                start_us=row.start_us,
                first_token_us=row.first_token_us,
                finish_us=row.finish_us,
            )
        )
