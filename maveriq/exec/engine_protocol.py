"""An engine's side of the protocol: what to do with a message, also with one that comes twice, late or at a bad time.

A session knows no thread, no socket and no clock. `maveriq.exec.engine_server` gives it those of a process; tests give it
simulated ones.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from maveriq.exec.engines.engine import FailureKind, Step
from maveriq.exec.messages import (
    PROTOCOL_VERSION,
    Bye,
    EngineSpec,
    Failed,
    Finished,
    FromEngine,
    Generate,
    Hello,
    Load,
    Loaded,
    Ping,
    Pong,
    StepProgress,
    Stop,
    ToEngine,
)

STOPPED, LOAD_FAILED, NO_PROTOCOL, BROKEN = 0, 1, 3, 4
"""Exit codes of an engine's process; 2 is for a wrong command line."""


class Worker(Protocol):
    """Who does the work, one thing after the other, and tells the session (`loaded`, `stepped`, ...)."""

    def load(self, spec: EngineSpec) -> None:
        """Begin to load."""

    def generate(self, work: Generate) -> None:
        """Begin an execution."""

    def close(self, *, say_bye: bool) -> None:
        """End what is under way at its next step, then free everything."""


class EngineProtocol:
    """The rules.

    Args:
        pid: of the process, for the greeting.
        worker: does the work.
        send: sends a message to the executor.
        leave: ends the process with an exit code; later calls do nothing.
    """

    def __init__(
        self, *, pid: int, worker: Worker, send: Callable[[FromEngine], None], leave: Callable[[int], None]
    ) -> None:
        self._pid = pid
        self._worker = worker
        self._send = send
        self._leave = leave
        self._spec: EngineSpec | None = None
        self._loaded: Loaded | None = None
        self._under_way = 0  # the execution that the engine is at
        self._steps = 0
        self._ended: Finished | Failed | None = None  # how the last execution ended
        self._stopping = False

    @property
    def serves(self) -> bool:
        """Whether the engine is loaded and was not told to stop."""
        return self._loaded is not None and not self._stopping

    @property
    def stopping(self) -> bool:
        """Whether an execution is to end at its next step."""
        return self._stopping

    # What the executor says

    def greet(self) -> None:
        """Say that the process is there."""
        self._send(Hello(protocol=PROTOCOL_VERSION, pid=self._pid))

    def take(self, message: ToEngine) -> None:
        """Take in a message."""
        match message:
            case Ping(number=number):
                if self._spec is None:
                    self.greet()
                self._send(Pong(number=number, execution_id=self._under_way, steps=self._steps))
            case Load(spec=spec):
                self._load(spec)
            case Generate():
                self._generate(message)
            case Stop():
                self.stop(say_bye=True)

    def stop(self, *, say_bye: bool) -> None:
        """Free everything and leave; without a word if nobody is there to hear it."""
        if not self._stopping:
            self._stopping = True
            self._worker.close(say_bye=say_bye)

    def _load(self, spec: EngineSpec) -> None:
        if self._loaded is not None:
            self._send(self._loaded)
        elif self._spec is None:
            self._spec = spec
            self._worker.load(spec)

    def _generate(self, work: Generate) -> None:
        execution_id = work.execution_id
        if self._ended is not None and execution_id == self._ended.execution_id:
            self._send(self._ended)
        elif execution_id <= self._under_way or (self._ended and execution_id < self._ended.execution_id):
            return  # it is at it, or that is long over
        elif why_not := self._why_not(work):
            self._send(Failed(execution_id=execution_id, kind=FailureKind.ERROR.value, message=why_not))
        else:
            self._under_way, self._steps = execution_id, 0
            self._worker.generate(work)

    def _why_not(self, work: Generate) -> str:
        if self._spec is None or self._loaded is None:
            return "nothing is loaded"
        if self._under_way:
            return f"execution {self._under_way} is under way"
        if len(work.sequences) > self._spec.batch_size:
            return f"{len(work.sequences)} sequences, where batches are of {self._spec.batch_size} at most"
        return ""

    # What the worker says

    def loaded(self, loaded: Loaded) -> None:
        """The engine serves."""
        self._loaded = loaded
        self._send(loaded)

    def load_failed(self, failed: Failed) -> None:
        """It never will."""
        self._send(failed)
        self._leave(LOAD_FAILED)

    def stepped(self, work: Generate, number: int, tokens: Step) -> None:
        """A step is done."""
        self._steps = number
        self._send(StepProgress(execution_id=work.execution_id, step=number, tokens=tuple(tokens)))

    def generated(self, ended: Finished | Failed) -> None:
        """An execution is over."""
        self._ended = ended
        self._under_way = self._steps = 0
        self._send(ended)

    def closed(self, *, say_bye: bool) -> None:
        """Everything is freed."""
        if say_bye:
            self._send(Bye())
        self._leave(STOPPED)
