"""The supervisor of one deployment: runs its engine, restarts it with backoff after failures, or gives it up."""

from __future__ import annotations

import asyncio
from typing import Protocol

from maveriq.exec.engine_process import EngineProcess, ExitReason, LaunchSpec
from maveriq.exec.gpu_memory_gate import GpuMemoryGate
from maveriq.exec.launcher import Launcher
from maveriq.exec.messages import Failed, Finished, Generate, Loaded, PromptSequence, StepProgress, StepReport
from maveriq.exec.watchdog import SupervisionSettings


class SupervisorCallbacks(Protocol):
    """Receives the events of all supervisors; `maveriq.exec.executor.Executor` implements it."""

    def on_engine_up(self, launch_spec: LaunchSpec, loaded: Loaded) -> None:
        """An engine is ready to serve."""

    def on_engine_down(self, deployment_id: int, reason: str, *, restarts: bool) -> None:
        """An engine failed. If it `restarts`, `on_engine_repaired` follows after the backoff."""

    def on_engine_repaired(self, deployment_id: int) -> None:
        """The backoff is over; the engine may start again."""

    def on_step(self, deployment_id: int, progress: StepProgress) -> None:
        """A step of an execution is done."""

    def on_execution_end(self, deployment_id: int, result: Finished | Failed) -> None:
        """An execution has ended."""

    def on_report(self, deployment_id: int, generation: int, report: StepReport) -> None:
        """A step of a continuous engine is done."""

    def on_warning(self, deployment_id: int, warning: str) -> None:
        """A warning for the notes of the run."""

    def on_internal_error(self, error: BaseException) -> None:
        """The supervisor itself has a bug."""


class Supervisor:
    """Starts, uses and stops the engines of one deployment, one at a time."""

    def __init__(
        self,
        deployment_id: int,
        *,
        launcher: Launcher,
        callbacks: SupervisorCallbacks,
        settings: SupervisionSettings,
        gate: GpuMemoryGate,
    ) -> None:
        self._deployment_id = deployment_id
        self._launcher = launcher
        self._callbacks = callbacks
        self._settings = settings
        self._gate = gate
        self._engine: EngineProcess | None = None
        self._tasks: set[asyncio.Task[None]] = set()  # of this engine, and of earlier ones that are still terminating
        self._repair: asyncio.TimerHandle | None = None
        self._repair_after_s: float | None = None  # overrides the backoff after an injected fault
        self._failures = 0  # in a row

    def start(self, launch_spec: LaunchSpec) -> None:
        """Start an engine. The previous one, if any, has ended or was stopped."""
        engine = EngineProcess(
            launch_spec, launcher=self._launcher, callbacks=self, settings=self._settings, gate=self._gate
        )
        self._engine = engine
        task = asyncio.get_running_loop().create_task(engine.run())
        self._tasks.add(task)
        task.add_done_callback(self._on_task_done)

    def execute(self, batch: Generate, expected_s: float) -> None:
        """Start an execution on the engine.

        Args:
            batch: the execution.
            expected_s: its estimated service time, in real seconds.
        """
        if self._engine is not None:
            self._engine.execute(batch, expected_s)

    def submit(self, sequence: PromptSequence, *, is_urgent: bool) -> None:
        """Put a request into the queue of a continuous engine.

        Args:
            sequence: the request.
            is_urgent: goes before others where the engine schedules by priority.
        """
        if self._engine is not None:
            self._engine.submit(sequence, is_urgent=is_urgent)

    def abort_request(self, request_id: int) -> None:
        """End a request of a continuous engine."""
        if self._engine is not None:
            self._engine.abort_request(request_id)

    def stop(self) -> None:
        """Stop the engine, if there is one."""
        if self._engine is not None:
            self._engine.stop()
            self._engine = None

    def abort(self, reason: str, *, repair_after_s: float | None) -> bool:
        """Make the engine fail (fault injection); return False if there is no engine.

        Args:
            reason: the reason to report.
            repair_after_s: real seconds until it may start again, None for never.
        """
        if self._engine is None or self._engine.has_exited:
            return False
        self._repair_after_s = repair_after_s
        self._engine.abort(reason, retryable=repair_after_s is not None)
        return True

    async def close(self) -> None:
        """Stop the engine and wait until the processes of all engines have ended."""
        if self._repair is not None:
            self._repair.cancel()
        self.stop()
        while self._tasks:
            await asyncio.wait(self._tasks)

    def _on_task_done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()):
            self._callbacks.on_internal_error(error)

    # `EngineCallbacks`: events of a previous engine are ignored

    def on_loaded(self, engine: EngineProcess, loaded: Loaded) -> None:
        """Report that the engine is ready to serve."""
        if engine is self._engine:
            self._callbacks.on_engine_up(engine.launch_spec, loaded)

    def on_step(self, engine: EngineProcess, progress: StepProgress) -> None:
        """Report a step."""
        if engine is self._engine:
            self._callbacks.on_step(self._deployment_id, progress)

    def on_execution_end(self, engine: EngineProcess, result: Finished | Failed) -> None:
        """Report the end of an execution."""
        if engine is self._engine:
            self._failures = 0
            self._callbacks.on_execution_end(self._deployment_id, result)

    def on_report(self, engine: EngineProcess, report: StepReport) -> None:
        """Report a step of a continuous engine."""
        if engine is self._engine:
            if any(not ended.failure for ended in report.ended):
                self._failures = 0
            self._callbacks.on_report(self._deployment_id, engine.launch_spec.spec.generation, report)

    def on_warning(self, engine: EngineProcess, warning: str) -> None:  # noqa: ARG002
        """Report a warning."""
        self._callbacks.on_warning(self._deployment_id, warning)

    def on_exit(self, engine: EngineProcess, exit_reason: ExitReason) -> None:
        """Decide whether and when a failed engine restarts."""
        if engine is not self._engine or not exit_reason.failed:
            return  # it was stopped
        self._engine = None
        repair_after_s, self._repair_after_s = self._repair_after_s, None
        self._failures += repair_after_s is None  # an injected fault does not count
        given_up = self._failures >= self._settings.max_restarts
        restarts = exit_reason.retryable and not given_up
        reason = (
            f"{exit_reason.reason}; given up after {self._failures} failures in a row"
            if given_up
            else exit_reason.reason
        )
        self._callbacks.on_engine_down(self._deployment_id, reason, restarts=restarts)
        if restarts:
            delay_s = self._backoff_s() if repair_after_s is None else repair_after_s
            loop = asyncio.get_running_loop()
            self._repair = loop.call_later(delay_s, self._callbacks.on_engine_repaired, self._deployment_id)

    def _backoff_s(self) -> float:
        settings = self._settings
        return float(min(settings.max_backoff_s, settings.initial_backoff_s * 2.0 ** (self._failures - 1)))
