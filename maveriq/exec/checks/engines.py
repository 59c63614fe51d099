"""The engines under check: each is run by a `Supervisor`, as the executor runs them, and all start side by side."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from maveriq.errors import MaveriqError
from maveriq.exec.checks.plan import CheckPlan, PlannedEngine
from maveriq.exec.checks.processes import engine_processes, shared_memory_files
from maveriq.exec.engine_process import LaunchSpec
from maveriq.exec.gpu_memory_gate import GpuMemoryGate, MemoryProbe, NoMemoryProbe
from maveriq.exec.gpus import Devices
from maveriq.exec.launcher import EngineConnection, EngineLog, Launcher
from maveriq.exec.messages import (
    EngineSpec,
    Failed,
    Finished,
    Generate,
    Loaded,
    PromptSequence,
    StepProgress,
    StepReport,
)
from maveriq.exec.model_files import ModelFiles
from maveriq.exec.processes import ProcessStat
from maveriq.exec.supervisor import Supervisor
from maveriq.exec.watchdog import SupervisionSettings

T = TypeVar("T")

SUPERVISION = SupervisionSettings(
    start_timeout_s=300.0,  # on GPUs; checks that wait for a start have the same limit
    # Checks have limits of their own; a lost process must be noticed by its exit, not because it hangs.
    hang_timeout_s=600.0,
    grace_period_s=20.0,
    max_restarts=1000,  # none is restarted; this only keeps "given up after" out of the reasons
)
_SEED = 42
_MIN_STARTING_RANKS = 4
_EXIT_CODE_S = 1.0
_LONG_S = 600.0


class EngineDownError(MaveriqError):
    """An engine failed; the message is the reason that the supervisor gives."""


class _RecordingLauncher:
    """Launches an engine and keeps its connection, from which a check learns PID and exit code."""

    def __init__(self, launcher: Launcher) -> None:
        self._launcher = launcher
        self.connection: EngineConnection | None = None

    async def launch(self, spec: EngineSpec, gpu_ids: Sequence[int]) -> EngineConnection:
        self.connection = await self._launcher.launch(spec, gpu_ids)
        return self.connection


class CheckedEngine:
    """One engine and what its supervisor reports (`SupervisorCallbacks`)."""

    def __init__(
        self,
        planned: PlannedEngine,
        launch_spec: LaunchSpec,
        *,
        launcher: Launcher,
        gate: GpuMemoryGate,
        settings: SupervisionSettings,
        logs: Path,
    ) -> None:
        self.planned = planned
        self.launch_spec = launch_spec
        self.log = EngineLog(logs, launch_spec.spec).path
        self.shared_memory: set[str] = set()
        self._launcher = _RecordingLauncher(launcher)
        self._supervisor = Supervisor(
            launch_spec.spec.deployment_id, launcher=self._launcher, callbacks=self, settings=settings, gate=gate
        )
        loop = asyncio.get_running_loop()
        self._loaded: asyncio.Future[Loaded] = loop.create_future()
        self._down: asyncio.Future[str] = loop.create_future()
        self._result: asyncio.Future[Finished | Failed] = loop.create_future()
        self._steps: asyncio.Queue[StepProgress] = asyncio.Queue()
        self._execution_ids = itertools.count(1)
        self._stopped = False
        self._warning = ""

    @property
    def label(self) -> str:
        """Its name in results."""
        return self.planned.label

    @property
    def is_up(self) -> bool:
        """Whether it serves."""
        return self._loaded.done() and not self._down.done() and not self._stopped

    @property
    def facts(self) -> Loaded:
        """What it reported once it was loaded."""
        return self._loaded.result()

    def start(self) -> None:
        """Start it."""
        self._supervisor.start(self.launch_spec)

    async def wait_loaded(self) -> Loaded:
        """Wait until it serves.

        Raises:
            EngineDownError: it does not start.
        """
        return await self._unless_down(self._loaded)

    async def wait_down(self) -> str:
        """Wait until it has failed, and return the reason."""
        return await asyncio.shield(self._down)

    async def run(self, *sequences: PromptSequence) -> tuple[tuple[int, ...], ...]:
        """Run sequences as one execution and return the tokens of each.

        Raises:
            EngineDownError: the execution or the engine failed.
        """
        self._execute(sequences, service_s=0.0)
        result = await self._unless_down(self._result)
        if isinstance(result, Failed):
            raise EngineDownError(f"execution failed {result}")
        return result.outputs

    async def run_until_first_step(self, sequence: PromptSequence) -> None:
        """Start a long execution and return when it has made a step.

        Raises:
            EngineDownError: the execution or the engine failed.
        """
        self._execute((sequence,), service_s=_LONG_S)
        step = asyncio.create_task(self._steps.get())
        try:
            await self._unless_down(step)
        finally:
            step.cancel()

    async def stop(self) -> None:
        """Stop it in order, and wait until the supervisor considers it ended."""
        self._stopped = True
        await self._supervisor.close()

    async def exit_code(self) -> int | None:
        """Return how its leader has ended, as `EngineConnection.wait_exit`; None if it was not launched or runs on."""
        with contextlib.suppress(TimeoutError):
            if self._launcher.connection is not None:
                return await asyncio.wait_for(self._launcher.connection.wait_exit(), _EXIT_CODE_S)
        return None

    async def kill(self) -> None:
        """Kill it as a fault injected into a run does, and wait until the supervisor considers it ended."""
        self._stopped = True
        self._supervisor.abort("killed by a check", repair_after_s=None)
        await self._supervisor.close()

    @property
    def leader_pid(self) -> int | None:
        """The PID of its leader, None before it is launched."""
        return None if self._launcher.connection is None else self._launcher.connection.pid

    async def processes(self) -> list[ProcessStat]:
        """Return its running processes, and remember the shared memory that they use."""
        pid = self.leader_pid
        if pid is None:
            return []
        found = await asyncio.to_thread(engine_processes, pid, self.log)
        self.shared_memory |= await asyncio.to_thread(shared_memory_files, found)
        return found

    def _execute(self, sequences: tuple[PromptSequence, ...], *, service_s: float) -> None:
        self._result = asyncio.get_running_loop().create_future()
        self._steps = asyncio.Queue()
        batch = Generate(execution_id=next(self._execution_ids), sequences=sequences, service_s=service_s)
        self._supervisor.execute(batch, _LONG_S)

    async def _unless_down(self, awaited: asyncio.Future[T]) -> T:
        futures: tuple[asyncio.Future[Any], ...] = (awaited, self._down)
        await asyncio.wait(futures, return_when=asyncio.FIRST_COMPLETED)
        if not awaited.done():
            raise EngineDownError(self._down.result())
        return awaited.result()

    # `SupervisorCallbacks`

    def on_engine_up(self, launch_spec: LaunchSpec, loaded: Loaded) -> None:  # noqa: ARG002
        """It serves."""
        self._loaded.set_result(loaded)

    def on_engine_down(self, deployment_id: int, reason: str, *, restarts: bool) -> None:  # noqa: ARG002
        """It failed."""
        self._down.set_result(f"{reason} ({self._warning})" if self._warning else reason)

    def on_engine_repaired(self, deployment_id: int) -> None:
        """It might restart; a check does not restart it."""

    def on_report(self, deployment_id: int, generation: int, report: StepReport) -> None:
        """Checks run one execution at a time, so that no engine sends this."""

    def on_step(self, deployment_id: int, progress: StepProgress) -> None:  # noqa: ARG002
        """A step is done."""
        self._steps.put_nowait(progress)

    def on_execution_end(self, deployment_id: int, result: Finished | Failed) -> None:  # noqa: ARG002
        """An execution has ended."""
        if not self._result.done():
            self._result.set_result(result)

    def on_warning(self, deployment_id: int, warning: str) -> None:  # noqa: ARG002
        """A warning, such as the engine's last output; the last one explains a failure that follows."""
        self._warning = warning

    def on_internal_error(self, error: BaseException) -> None:
        """The supervisor has a bug."""
        if not self._down.done():
            self._down.set_result(f"bug in the supervisor: {type(error).__name__}: {error}")


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSetup:
    """How engines are started.

    Args:
        launcher: starts their processes.
        logs: the folder of their logs.
        devices: the devices behind the GPUs.
        memory_probe: reads free GPU memory.
        settings: timeouts of the supervisors.
    """

    launcher: Launcher
    logs: Path
    devices: Devices = field(default_factory=Devices)
    memory_probe: MemoryProbe = field(default_factory=NoMemoryProbe)
    settings: SupervisionSettings = SUPERVISION


class CheckedEngines:
    """All engines of a plan. `start` returns at once; `close` leaves no process behind."""

    def __init__(self, plan: CheckPlan, setup: EngineSetup) -> None:
        self.plan = plan
        self.setup = setup
        gate = GpuMemoryGate(setup.memory_probe)
        self.by_label = {
            planned.label: CheckedEngine(
                planned,
                _launch_spec(number, planned, setup.devices),
                launcher=setup.launcher,
                gate=gate,
                settings=setup.settings,
                logs=setup.logs,
            )
            for number, planned in enumerate(plan.engines, 1)
        }
        self._max_starting_ranks = max(_MIN_STARTING_RANKS, (os.cpu_count() or 1) // 2)
        self._starting_ranks = 0
        self._changed = asyncio.Condition()
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        """Start all engines side by side, though no more at once than the machine's cores can load."""
        self._tasks = [asyncio.create_task(self._start(engine)) for engine in self.by_label.values()]

    def matrix_up(self) -> list[CheckedEngine]:
        """Return the engines of each format and split that serve."""
        matrix = (self.by_label.get(planned.label) for planned in self.plan.matrix)
        return [engine for engine in matrix if engine is not None and engine.is_up]

    async def on_all(self, action: Callable[[CheckedEngine], Coroutine[Any, Any, str]]) -> list[str]:
        """Do something on every engine of the matrix at once; return what is wrong, with the engine's label."""

        async def guarded(engine: CheckedEngine) -> str:
            try:
                problem = await action(engine)
            except EngineDownError as error:
                problem = str(error)
            return problem and f"{engine.label}: {problem}"

        return [problem for problem in await asyncio.gather(*map(guarded, self.matrix_up())) if problem]

    async def close(self) -> None:
        """Stop all engines and wait until the supervisors consider them ended."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*(engine.stop() for engine in self.by_label.values()))

    async def _start(self, engine: CheckedEngine) -> None:
        ranks = engine.planned.configuration.gpus
        async with self._changed:
            await self._changed.wait_for(
                lambda: not self._starting_ranks or self._starting_ranks + ranks <= self._max_starting_ranks
            )
            self._starting_ranks += ranks
        engine.start()
        with contextlib.suppress(EngineDownError):
            await engine.wait_loaded()
        async with self._changed:
            self._starting_ranks -= ranks
            self._changed.notify_all()


def _launch_spec(number: int, planned: PlannedEngine, devices: Devices) -> LaunchSpec:
    cfg, model = planned.configuration, planned.model
    spec = EngineSpec(
        deployment_id=number,
        generation=1,
        model=planned.label,
        config_json=ModelFiles().config_json(model),
        tp=cfg.tp,
        pp=cfg.pp,
        layer_split=cfg.layers_per_stage(model.layers),
        weights=cfg.weights.value,
        kv=cfg.kv.value,
        batch_size=cfg.batch_size,
        devices=devices.names(planned.gpu_ids),
        seed=_SEED,
    )
    return LaunchSpec(spec=spec, needed=dict.fromkeys(planned.gpu_ids, planned.needed_bytes), load_s=0.0)
