"""The engine's side of the protocol as a state machine that tolerates duplicated, late and unexpected messages.

It uses no thread, socket or clock. `maveriq.exec.engine_server` provides those of a process, tests simulated ones.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import msgspec

from maveriq.exec.engines.engine import FailureKind, Step
from maveriq.exec.messages import (
    PROTOCOL_VERSION,
    AbortRequest,
    Bye,
    EngineSpec,
    Failed,
    Finished,
    FromEngine,
    Generate,
    Hello,
    Inspect,
    Inspected,
    Load,
    Loaded,
    Ping,
    Pong,
    PromptSequence,
    StepProgress,
    StepReport,
    Stop,
    SubmitRequest,
    ToEngine,
)
from maveriq.exec.numbered_messages import Inbox, Outbox

STOPPED, LOAD_FAILED, NO_PROTOCOL, BROKEN = 0, 1, 3, 4
"""Exit codes of an engine's process; 2 is a wrong command line."""


class EngineWorker(Protocol):
    """Runs the engine, one job after the other, and reports to the protocol (`on_loaded`, `on_step`, ...)."""

    def load(self, spec: EngineSpec) -> None:
        """Begin to load."""

    def inspect(self, spec: EngineSpec) -> None:
        """Begin to inspect the engine's library."""

    def generate(self, batch: Generate) -> None:
        """Begin an execution."""

    def submit(self, sequence: PromptSequence, *, is_urgent: bool) -> None:
        """Put a request into the queue of a continuous engine."""

    def abort(self, request_id: int) -> None:
        """End a request of a continuous engine."""

    def close(self, *, send_bye: bool) -> None:
        """End the current execution, or all requests, at the next step, then free everything."""


class EngineProtocol:
    """Answers the executor's messages and reports what the worker does.

    Args:
        pid: of the process, for `Hello`.
        worker: runs the engine.
        send: sends a message to the executor.
        exit_process: ends the process with an exit code; later calls do nothing.
    """

    def __init__(
        self,
        *,
        pid: int,
        worker: EngineWorker,
        send: Callable[[FromEngine], None],
        exit_process: Callable[[int], None],
    ) -> None:
        self._pid = pid
        self._worker = worker
        self._send = send
        self._exit_process = exit_process
        self._spec: EngineSpec | None = None
        self._loaded: Loaded | None = None
        self._execution_id = 0  # of the current execution, 0 for none
        self._steps = 0
        self._last_result: Finished | Failed | None = None
        self._about_requests: Inbox[SubmitRequest | AbortRequest] = Inbox()
        self._reports: Outbox[StepReport] = Outbox()
        self._stopping = False

    @property
    def is_serving(self) -> bool:
        """Whether the engine is loaded and not stopping."""
        return self._loaded is not None and not self._stopping

    @property
    def is_stopping(self) -> bool:
        """Whether the current execution is to end at its next step."""
        return self._stopping

    # Messages from the executor

    def send_hello(self) -> None:
        """Report that the process is ready for `Load`."""
        self._send(Hello(protocol=PROTOCOL_VERSION, pid=self._pid))

    def on_message(self, message: ToEngine) -> None:
        """Handle a message."""
        match message:
            case Ping():
                self._answer(message)
            case Load(spec=spec):
                self._load(spec)
            case Inspect(spec=spec):
                if self._spec is None and not self._stopping:
                    self._worker.inspect(spec)
            case Generate():
                self._generate(message)
            case SubmitRequest() | AbortRequest():
                self._take(message)
            case Stop():
                self.stop(send_bye=True)

    def stop(self, *, send_bye: bool) -> None:
        """Free everything and exit. `send_bye` is False after the executor closed the channel."""
        if not self._stopping:
            self._stopping = True
            self._worker.close(send_bye=send_bye)

    def _answer(self, ping: Ping) -> None:
        if self._spec is None:
            self.send_hello()
        pong = Pong(
            number=ping.number,
            execution_id=self._execution_id,
            steps=self._steps,
            accepted=self._about_requests.received,
        )
        self._send(pong)
        for report in self._reports.on_heartbeat(ping.received):
            self._send(report)

    def _take(self, message: SubmitRequest | AbortRequest) -> None:
        """Take a message about requests of a continuous engine, in its turn."""
        is_continuous = self._spec is not None and self._spec.batching is not None
        if not is_continuous or not self.is_serving:
            return
        for due in self._about_requests.take(message):
            if isinstance(due, SubmitRequest):
                self._worker.submit(due.sequence, is_urgent=due.is_urgent)
            else:
                self._worker.abort(due.request_id)

    def _load(self, spec: EngineSpec) -> None:
        if self._loaded is not None:
            self._send(self._loaded)
        elif self._spec is None:
            self._spec = spec
            self._worker.load(spec)

    def _generate(self, batch: Generate) -> None:
        execution_id = batch.execution_id
        last = self._last_result
        if last is not None and execution_id == last.execution_id:
            self._send(last)
        elif execution_id <= self._execution_id or (last and execution_id < last.execution_id):
            return  # a duplicate of the current execution, or of an earlier one
        elif reason := self._rejection(batch):
            self._send(Failed(execution_id=execution_id, kind=FailureKind.ERROR.value, message=reason))
        else:
            self._execution_id, self._steps = execution_id, 0
            self._worker.generate(batch)

    def _rejection(self, batch: Generate) -> str:
        """Return why an execution cannot start, or "" if it can."""
        if self._spec is None or self._loaded is None:
            return "nothing is loaded"
        if self._spec.batching is not None:
            return "the engine batches continuously"
        if self._execution_id:
            return f"execution {self._execution_id} is running"
        if len(batch.sequences) > self._spec.batch_size:
            return f"{len(batch.sequences)} sequences exceed the batch size of {self._spec.batch_size}"
        return ""

    # Reports from the worker

    def on_loaded(self, loaded: Loaded) -> None:
        """The engine is ready to serve."""
        self._loaded = loaded
        self._send(loaded)

    def on_inspected(self, inspected: Inspected) -> None:
        """The engine's library is inspected."""
        self._send(inspected)

    def on_load_failed(self, failed: Failed) -> None:
        """Loading, or an inspection, failed."""
        self._send(failed)
        self._exit_process(LOAD_FAILED)

    def on_step(self, batch: Generate, step: int, tokens: Step) -> None:
        """A step of the current execution is done."""
        self._steps = step
        self._send(StepProgress(execution_id=batch.execution_id, step=step, tokens=tuple(tokens)))

    def on_report(self, report: StepReport) -> None:
        """A step of a continuous engine is done. The report gets its number here."""
        numbered = msgspec.structs.replace(report, number=self._reports.next_number)
        self._steps = numbered.number
        self._reports.add(numbered)
        self._send(numbered)

    def on_execution_end(self, result: Finished | Failed) -> None:
        """The current execution has ended."""
        self._last_result = result
        self._execution_id = self._steps = 0
        self._send(result)

    def on_closed(self, *, send_bye: bool) -> None:
        """Everything is freed."""
        if send_bye:
            self._send(Bye())
        self._exit_process(STOPPED)
