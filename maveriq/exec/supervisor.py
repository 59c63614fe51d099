"""The supervisor of a deployment: one engine after another, with backoff between failures, until it gives up."""

from __future__ import annotations

import asyncio
from typing import Protocol

from maveriq.exec.engine_process import EngineProcess, ExitReason, LaunchSpec, SupervisionSettings
from maveriq.exec.gpu_memory_gate import GpuMemoryGate
from maveriq.exec.launcher import Launcher
from maveriq.exec.messages import Failed, Finished, Generate, Loaded, StepProgress


class SupervisorCallbacks(Protocol):
    """Who is told how the engines of all deployments are; `maveriq.exec.executor.Body` is one."""

    def engine_up(self, order: LaunchSpec, loaded: Loaded) -> None:
        """An engine serves."""

    def engine_down(self, deployment_id: int, reason: str, *, returns: bool) -> None:
        """An engine failed; if it `returns`, `engine_repaired` follows."""

    def engine_repaired(self, deployment_id: int) -> None:
        """The engine may be started again."""

    def stepped(self, deployment_id: int, progress: StepProgress) -> None:
        """The next step of an execution is done."""

    def executed(self, deployment_id: int, ended: Finished | Failed) -> None:
        """An execution is over."""

    def noticed(self, deployment_id: int, warning: str) -> None:
        """Something that a reader of the results should know."""

    def broke(self, error: BaseException) -> None:
        """The executor itself has a fault."""


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
        self._life: EngineProcess | None = None
        self._tasks: set[asyncio.Task[None]] = set()  # of this life, and of those before whose processes still go
        self._repair: asyncio.TimerHandle | None = None
        self._repair_after_s: float | None = None  # said by who broke the engine on purpose
        self._failures = 0

    def start(self, order: LaunchSpec) -> None:
        """Start an engine; the one before, if any, has ended or was stopped."""
        life = EngineProcess(order, launcher=self._launcher, listener=self, settings=self._settings, gate=self._gate)
        self._life = life
        task = asyncio.get_running_loop().create_task(life.run())
        self._tasks.add(task)
        task.add_done_callback(self._is_over)

    def execute(self, work: Generate, expected_s: float) -> None:
        """Let the engine execute.

        Args:
            work: what.
            expected_s: how long that should take, in real seconds.
        """
        if self._life is not None:
            self._life.execute(work, expected_s)

    def stop(self) -> None:
        """Stop the engine, if there is one."""
        if self._life is not None:
            self._life.stop()
            self._life = None

    def abort(self, reason: str, *, repair_after_s: float | None) -> bool:
        """Make the engine fail on purpose, to be mended after some real seconds or never; says whether there is one."""
        if self._life is None or self._life.is_over:
            return False
        self._repair_after_s = repair_after_s
        self._life.abort(reason, final=repair_after_s is None)
        return True

    async def close(self) -> None:
        """Stop the engine and wait until the processes of all are gone."""
        if self._repair is not None:
            self._repair.cancel()
        self.stop()
        while self._tasks:
            await asyncio.wait(self._tasks)

    def _is_over(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()):
            self._callbacks.broke(error)

    # What its life says

    def loaded(self, life: EngineProcess, loaded: Loaded) -> None:
        """Pass on that the engine serves."""
        if life is self._life:
            self._callbacks.engine_up(life.order, loaded)

    def stepped(self, life: EngineProcess, progress: StepProgress) -> None:
        """Pass on a step."""
        if life is self._life:
            self._callbacks.stepped(self._deployment_id, progress)

    def executed(self, life: EngineProcess, ended: Finished | Failed) -> None:
        """Pass on that an execution is over."""
        if life is self._life:
            self._failures = 0
            self._callbacks.executed(self._deployment_id, ended)

    def noticed(self, life: EngineProcess, warning: str) -> None:  # noqa: ARG002
        """Pass on a warning."""
        self._callbacks.noticed(self._deployment_id, warning)

    def ended(self, life: EngineProcess, ending: ExitReason) -> None:
        """Decide whether the engine comes back, and when."""
        if life is not self._life or not ending.failed:
            return  # it was told to stop
        self._life = None
        after_s, self._repair_after_s = self._repair_after_s, None
        self._failures += after_s is None  # what was broken on purpose says nothing against the engine
        worn_out = self._failures >= self._settings.max_restarts
        returns = not ending.final and not worn_out
        reason = f"{ending.reason}; given up after {self._failures} failures in a row" if worn_out else ending.reason
        self._callbacks.engine_down(self._deployment_id, reason, returns=returns)
        if returns:
            self._repair = asyncio.get_running_loop().call_later(
                self._backoff_s() if after_s is None else after_s, self._callbacks.engine_repaired, self._deployment_id
            )

    def _backoff_s(self) -> float:
        settings = self._settings
        return float(min(settings.longest_backoff_s, settings.backoff_s * 2.0 ** (self._failures - 1)))
