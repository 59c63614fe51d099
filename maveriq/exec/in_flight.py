"""Open requests: their handles, the execution that each engine runs, and the tokens generated so far."""

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
    """The handle of a submitted request (`maveriq.exec.live_cluster.RequestHandle`)."""

    def __init__(self, request: Request, prompt: tuple[int, ...], stop_token_ids: tuple[int, ...] = ()) -> None:
        self.request = request
        self._prompt = prompt
        self._stop_token_ids = stop_token_ids
        self._tokens: list[int] = []
        self._updated = asyncio.Event()
        self._outcome: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()

    @property
    def request_id(self) -> int:
        """The request's id."""
        return self.request.request_id

    @property
    def tokens_so_far(self) -> tuple[int, ...]:
        """The tokens generated so far."""
        return tuple(self._tokens)

    def sequence(self) -> PromptSequence:
        """Return the request as an engine receives it."""
        return PromptSequence(
            request_id=self.request_id,
            prompt=self._prompt,
            output_tokens=self.request.output_tokens,
            stop_token_ids=self._stop_token_ids,
        )

    def add_tokens(self, position: int, tokens: Sequence[int]) -> None:
        """Add the tokens from `position` on; skip those that are known from an engine that failed since."""
        self._tokens.extend(tokens[len(self._tokens) - position :])
        self._updated.set()

    def end(self, outcome: Outcome) -> None:
        """End the request."""
        self._outcome.set_result(outcome)
        self._updated.set()

    async def tokens(self) -> AsyncIterator[int]:
        """Yield the tokens as they arrive, until the request ends."""
        sent = 0
        while True:
            while sent < len(self._tokens):
                yield self._tokens[sent]
                sent += 1
            if self._outcome.done():
                return
            self._updated.clear()
            await self._updated.wait()

    async def outcome(self) -> Outcome:
        """Wait for the end of the request."""
        return await asyncio.shield(self._outcome)


@dataclass(slots=True)
class _Execution:
    """The execution that an engine runs."""

    execution_id: int
    handles: tuple[LiveRequestHandle, ...]
    started_us: Micros
    positions: list[int]  # tokens of each sequence so far
    first_token_us: Micros = NOT_YET


class InFlight:
    """Keeps handles by request id and executions by deployment id; completes the handles of ended requests."""

    def __init__(self) -> None:
        self._handles: dict[int, LiveRequestHandle] = {}
        self._executions: dict[int, _Execution] = {}
        self._ended: list[int] = []
        self._empty = asyncio.Event()
        self._empty.set()

    def add(self, handle: LiveRequestHandle) -> None:
        """Add a request that arrives."""
        self._handles[handle.request_id] = handle
        self._empty.clear()

    async def wait_empty(self) -> None:
        """Wait until every request has ended."""
        await self._empty.wait()

    # Requests of continuous engines

    def sequence(self, request_id: int) -> PromptSequence:
        """Return a request as an engine receives it."""
        return self._handles[request_id].sequence()

    def add_tokens(self, request_id: int, position: int, tokens: Sequence[int]) -> None:
        """Add the tokens of a request from `position` on, unless it has ended."""
        if handle := self._handles.get(request_id):
            handle.add_tokens(position, tokens)

    # Executions

    def start_execution(self, action: Execute, now_us: Micros) -> tuple[PromptSequence, ...]:
        """Record that an engine starts an execution, and return its sequences."""
        handles = tuple(self._handles[request.request_id] for request in action.requests)
        self._executions[action.deployment_id] = _Execution(action.execution_id, handles, now_us, [0] * len(handles))
        return tuple(handle.sequence() for handle in handles)

    def drop_execution(self, deployment_id: int) -> None:
        """Forget the execution of an engine that has ended. The controller retries or fails its requests."""
        self._executions.pop(deployment_id, None)

    def on_step(self, deployment_id: int, progress: StepProgress, now_us: Micros) -> None:
        """Add the tokens of a step to the handles."""
        execution = self._current(deployment_id, progress.execution_id)
        if execution is None:
            return
        if execution.first_token_us == NOT_YET:
            execution.first_token_us = now_us
        for index, token in enumerate(progress.tokens):
            if token >= 0:
                execution.handles[index].add_tokens(execution.positions[index], (token,))
                execution.positions[index] += 1

    def end_execution(
        self, deployment_id: int, result: Finished | Failed, now_us: Micros, time_scale: float
    ) -> ExecutionFinished | ExecutionFailed | None:
        """Return the controller's event for the end of an execution, None if it is not the engine's current one."""
        execution = self._current(deployment_id, result.execution_id)
        if execution is None:
            return None
        del self._executions[deployment_id]
        if isinstance(result, Failed):
            reason = one_line(f"its engine could not do it {result}")
            return ExecutionFailed(deployment_id, result.execution_id, reason)
        for handle, output in zip(execution.handles, result.outputs, strict=True):
            handle.add_tokens(0, output)
        first_token_us = execution.first_token_us
        if first_token_us == NOT_YET:  # the message of the first step was lost
            first_token_us = execution.started_us + micros(result.first_token_s / time_scale)
        requested = tuple(handle.request.output_tokens for handle in execution.handles)
        generated = tuple(max(1, len(output)) for output in result.outputs)
        return ExecutionFinished(
            deployment_id,
            result.execution_id,
            min(first_token_us, now_us),
            None if generated == requested else generated,
        )

    def _current(self, deployment_id: int, execution_id: int) -> _Execution | None:
        execution = self._executions.get(deployment_id)
        return execution if execution is not None and execution.execution_id == execution_id else None

    # Ends of requests

    def request_ended(self, request_id: int) -> None:
        """Record that the controller ended a request; `complete_ended` completes its handle."""
        self._ended.append(request_id)

    def complete_ended(self, tracker: RequestTracker) -> None:
        """Complete the handles of requests that have ended since the last call."""
        for request_id in self._ended:
            self._complete(request_id, tracker)
        self._ended.clear()
        if not self._handles:
            self._empty.set()

    def complete_all(self, tracker: RequestTracker) -> None:
        """Complete all handles, after the tracker was closed."""
        self._ended.clear()
        for request_id in list(self._handles):
            self._complete(request_id, tracker)
        self._executions.clear()
        self._empty.set()

    def _complete(self, request_id: int, tracker: RequestTracker) -> None:
        handle = self._handles.pop(request_id)
        row = tracker.row(request_id)
        handle.end(
            Outcome(
                request_id=request_id,
                status=row.status,
                reason=row.reason,
                tokens=handle.tokens_so_far,
                arrival_us=row.arrival_us,
                start_us=row.start_us,
                first_token_us=row.first_token_us,
                finish_us=row.finish_us,
            )
        )
