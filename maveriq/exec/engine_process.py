"""One engine process, from launch to exit: load, heartbeat, executions, hang detection, termination.

`EngineProcess` runs one engine. It waits for GPU memory, launches the process, sends it `Load`, then executions, and a
`Ping` at every heartbeat interval. `Watchdog` decides whether the engine hangs: it sends nothing for `hang_timeout_s`
(it answers pings even while it computes), or its current execution makes no progress for that plus a multiple of its
estimated service time. The first of a hang, a failure, the exit of the process and a stop gives the `ExitReason`. Then
`terminate` ends its processes with `Stop`, SIGTERM, SIGKILL. `maveriq.exec.supervisor` decides whether the engine
restarts.

The only clock is the event loop's, so that tests run on a loop with simulated time.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import msgspec

from maveriq.exec.engines.engine import FailureKind
from maveriq.exec.gpu_memory_gate import GpuHeldError, GpuMemoryGate
from maveriq.exec.gpus import GpuLostError
from maveriq.exec.launcher import EngineConnection, Launcher, LaunchError
from maveriq.exec.messages import (
    PROTOCOL_VERSION,
    ChannelClosedError,
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
    ProtocolError,
    StepProgress,
    Stop,
)
from maveriq.exec.processes import describe_exit
from maveriq.units import Bytes

_OUTPUT_FLUSH_S = 0.05  # messages sent just before the process exited are still to be read
_RANK_REPORT_S = 0.5  # the engine may be about to report why a rank ended


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchSpec:
    """An engine to launch.

    Args:
        spec: what the engine loads.
        needed: memory by GPU id, in rank order.
        load_s: estimated load time, in seconds of the run.
    """

    spec: EngineSpec
    needed: Mapping[int, Bytes]
    load_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class SupervisionSettings:
    """Timeouts and restarts of engines, in real seconds.

    Args:
        start_timeout_s: for launch, handshake and load together.
        heartbeat_interval_s: between pings.
        hang_timeout_s: how long an engine may send nothing.
        service_time_factor: an execution may take `hang_timeout_s` plus this many times its estimated service time
            from one step to the next.
        grace_period_s: between `Stop`, SIGTERM and SIGKILL when an engine is terminated.
        initial_backoff_s: restart delay after the first failure; it doubles with each failure in a row.
        max_backoff_s: the longest restart delay.
        max_restarts: the deployment is given up at this many failures in a row.
        memory_timeout_s: how long a start waits for GPU memory of stopped engines to become free.
    """

    start_timeout_s: float = 900.0
    heartbeat_interval_s: float = 1.0
    hang_timeout_s: float = 30.0
    service_time_factor: float = 3.0
    grace_period_s: float = 5.0
    initial_backoff_s: float = 1.0
    max_backoff_s: float = 60.0
    max_restarts: int = 5
    memory_timeout_s: float = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ExitReason:
    """Why an engine process ended. `failed` is False after a stop; `retryable` is False where a restart cannot help."""

    reason: str
    failed: bool = True
    retryable: bool = True


class CurrentExecution:
    """The execution that an engine runs: which steps have arrived, and when it last made progress.

    Args:
        batch: the execution.
        now_s: when it was sent, on the event loop's clock.
        step_timeout_s: how long it may take from one step to the next.
        pings: how many pings had been sent by then.
    """

    def __init__(self, batch: Generate, *, now_s: float, step_timeout_s: float, pings: int) -> None:
        self.batch = batch
        self._step_timeout_s = step_timeout_s
        self._pings = pings
        self._steps_delivered = 0
        self._steps_done = 0  # also counts steps whose message was lost
        self._progress_s = now_s

    def matches(self, execution_id: int) -> bool:
        """Return whether a message is about this execution."""
        return execution_id == self.batch.execution_id

    def accept_step(self, progress: StepProgress, now_s: float) -> bool:
        """Record a step; return whether it is the next one to deliver, not a duplicate and not after a lost one."""
        if progress.step != self._steps_delivered + 1:
            return False
        self._steps_delivered = progress.step
        self.record_progress(progress.step, now_s)
        return True

    def record_progress(self, steps: int, now_s: float) -> None:
        """Record how many steps the engine has done, which may be more than have arrived."""
        if steps > self._steps_done:
            self._steps_done = steps
            self._progress_s = now_s

    def must_resend(self, ping: int) -> bool:
        """Return whether the `Generate` was lost: the engine is idle and answers a ping that was sent after it."""
        return ping > self._pings

    def discount_stall(self, stall_s: float, now_s: float) -> None:
        """Do not count a time in which the executor itself did not run."""
        self._progress_s = min(now_s, self._progress_s + stall_s)

    def has_stalled(self, now_s: float) -> bool:
        """Return whether the current step takes longer than allowed."""
        return now_s - self._progress_s > self._step_timeout_s

    def output_error(self, message: StepProgress | Finished) -> str:
        """Return what is wrong with the engine's output, or "" if nothing is."""
        outputs = message.tokens if isinstance(message, StepProgress) else message.outputs
        if len(outputs) != len(self.batch.sequences):
            return "tokens for another number of sequences"
        limits = [sequence.output_tokens for sequence in self.batch.sequences]
        if isinstance(message, StepProgress):
            tokens_and_limits = zip(message.tokens, limits, strict=True)
            too_many = any(message.step > limit and token >= 0 for token, limit in tokens_and_limits)
        else:
            too_many = any(len(output) > limit for output, limit in zip(message.outputs, limits, strict=True))
        return "more tokens than were asked for" if too_many else ""


class Watchdog:
    """Decides whether an engine hangs. Times are on the event loop's clock.

    Args:
        settings: the timeouts.
        now_s: when the engine is launched.
    """

    def __init__(self, settings: SupervisionSettings, now_s: float) -> None:
        self._settings = settings
        self._launched_s = self._last_message_s = now_s

    def message_received(self, now_s: float) -> None:
        """Record that the engine has sent a message."""
        self._last_message_s = now_s

    def discount_stall(self, stall_s: float, now_s: float, execution: CurrentExecution | None) -> None:
        """Do not count a time in which the executor itself did not run (stopped, or short of CPU)."""
        self._launched_s += stall_s
        self._last_message_s = min(now_s, self._last_message_s + stall_s)
        if execution is not None:
            execution.discount_stall(stall_s, now_s)

    def hang_reason(self, now_s: float, *, loaded: bool, execution: CurrentExecution | None) -> str:
        """Return which timeout the engine has exceeded, or "" if none."""
        if not loaded:
            return self.start_timeout_reason() if now_s - self._launched_s > self._settings.start_timeout_s else ""
        if now_s - self._last_message_s > self._settings.hang_timeout_s:
            return f"heartbeat timeout: its engine sent nothing for {self._settings.hang_timeout_s:g} s"
        if execution is not None and execution.has_stalled(now_s):
            return "its engine hangs: the current execution makes no progress"
        return ""

    def start_timeout_reason(self) -> str:
        """Return the reason for an engine that takes too long to start."""
        return f"its engine did not start within {self._settings.start_timeout_s:g} s"


async def terminate(
    connection: EngineConnection, *, grace_period_s: float, send_stop: Callable[[], None] | None
) -> bool:
    """End an engine and close its channel; return whether all processes have ended, False if one cannot be killed.

    Args:
        connection: to the engine.
        grace_period_s: how long to wait after each of `Stop`, SIGTERM and SIGKILL.
        send_stop: sends `Stop`; None to kill all processes at once, as after a failure.
    """
    try:
        for ask_to_exit in (send_stop, connection.terminate) if send_stop else ():
            ask_to_exit()
            if await _gone_within(connection, grace_period_s):
                return True
        connection.kill()
        return await _gone_within(connection, grace_period_s)
    finally:
        connection.channel.close()


async def _gone_within(connection: EngineConnection, timeout_s: float) -> bool:
    try:
        async with asyncio.timeout(timeout_s):
            await connection.wait_gone()
    except TimeoutError:
        return False
    return True


class EngineCallbacks(Protocol):
    """Receives the events of an engine, from the event loop and never from within a call to `EngineProcess`."""

    def on_loaded(self, engine: EngineProcess, loaded: Loaded) -> None:
        """The engine is ready to serve."""

    def on_step(self, engine: EngineProcess, progress: StepProgress) -> None:
        """A step of the current execution is done. Steps come in order, each at most once; some may be lost."""

    def on_execution_end(self, engine: EngineProcess, result: Finished | Failed) -> None:
        """The current execution has ended."""

    def on_warning(self, engine: EngineProcess, warning: str) -> None:
        """A warning for the notes of the run."""

    def on_exit(self, engine: EngineProcess, exit_reason: ExitReason) -> None:
        """The engine has ended or is being terminated; called once."""


class EngineProcess:
    """One engine. Call `run` in a task of its own."""

    def __init__(
        self,
        launch_spec: LaunchSpec,
        *,
        launcher: Launcher,
        callbacks: EngineCallbacks,
        settings: SupervisionSettings,
        gate: GpuMemoryGate,
    ) -> None:
        self.launch_spec = launch_spec
        self._launcher = launcher
        self._callbacks = callbacks
        self._settings = settings
        self._gate = gate
        self._loop = asyncio.get_running_loop()
        self._requested_s = self._loop.time()
        self._exit_reason: asyncio.Future[ExitReason] = self._loop.create_future()
        self._connection: EngineConnection | None = None
        self._holds_memory_claim = False
        self._memory_at_launch = ""
        self._loaded = False
        self._execution: CurrentExecution | None = None
        self._watchdog = Watchdog(settings, self._requested_s)
        self._pings = 0

    # Called by the supervisor

    def execute(self, batch: Generate, expected_s: float) -> None:
        """Start an execution; `expected_s` is its estimated service time, in real seconds."""
        step_timeout_s = self._settings.hang_timeout_s + self._settings.service_time_factor * expected_s
        self._execution = CurrentExecution(
            batch, now_s=self._loop.time(), step_timeout_s=step_timeout_s, pings=self._pings
        )
        self._send(batch)

    def stop(self) -> None:
        """Stop the engine."""
        self._exit(ExitReason(reason="stopped", failed=False))

    def abort(self, reason: str, *, retryable: bool) -> None:
        """Kill the engine as if it had failed (fault injection)."""
        self._exit(ExitReason(reason=reason, retryable=retryable))

    @property
    def has_exited(self) -> bool:
        """Whether the exit reason is known; processes may still be running."""
        return self._exit_reason.done()

    # Lifecycle

    async def run(self) -> None:
        """Run the engine until all of its processes have ended, or cannot be killed."""
        gpu_ids = tuple(self.launch_spec.needed)
        try:
            exit_reason = await self._run_until_exit()
            self._release_memory_claim()
            self._gate.engine_stopping(gpu_ids)
            self._callbacks.on_exit(self, exit_reason)
            connection = self._connection
            if connection is None or await self._terminate(connection, exit_reason):
                await self._gate.engine_gone(gpu_ids)
            else:
                self._callbacks.on_warning(self, f"process group {connection.pid} cannot be killed")
                self._gate.engine_unkillable(gpu_ids, connection.wait_gone())
        except BaseException:  # a bug, or the loop is being closed: leave no process behind
            if self._connection is not None:
                self._connection.kill()
            raise

    async def _run_until_exit(self) -> ExitReason:
        """Launch the engine, watch it, and return the exit reason."""
        launch = asyncio.create_task(self._launch())
        either: tuple[asyncio.Future[Any], ...] = (launch, self._exit_reason)
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if not launch.done():
            launch.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await launch
        connection = self._connection
        if connection is None:
            return await self._exit_reason
        coroutines = (
            self._receive(connection),
            self._heartbeat(),
            self._watch_process(connection),
            self._watch_ranks(connection),
        )
        tasks = [asyncio.create_task(coroutine) for coroutine in coroutines]
        for task in tasks:
            task.add_done_callback(self._propagate_error)
        try:
            return await self._exit_reason
        finally:
            for task in tasks:
                task.cancel()

    def _propagate_error(self, task: asyncio.Task[None]) -> None:
        """Raise an error of a background task in `run`."""
        if not task.cancelled() and (error := task.exception()) and not self._exit_reason.done():
            self._exit_reason.set_exception(error)

    async def _launch(self) -> None:
        try:
            warning = await self._gate.claim(self.launch_spec.needed, self._settings.memory_timeout_s)
            self._holds_memory_claim = True
            self._memory_at_launch = self._gate.tightest(self.launch_spec.needed)
        except GpuLostError as error:
            self._exit(ExitReason(reason=str(error), retryable=False))
            return
        except GpuHeldError as error:
            self._exit(ExitReason(reason=f"its engine cannot start: {error}"))
            return
        if warning:
            self._callbacks.on_warning(self, warning)
        self._watchdog = Watchdog(self._settings, self._loop.time())  # waiting for memory does not count
        try:
            async with asyncio.timeout(self._settings.start_timeout_s):
                self._connection = await self._launcher.launch(self.launch_spec.spec, tuple(self.launch_spec.needed))
        except TimeoutError:
            self._exit(ExitReason(reason=self._watchdog.start_timeout_reason()))
        except LaunchError as error:
            self._exit(ExitReason(reason=str(error), retryable=error.retryable))

    async def _receive(self, connection: EngineConnection) -> None:
        try:
            while True:
                self._on_message(await connection.channel.receive())
        except ProtocolError as error:
            self._exit(ExitReason(reason=f"its engine does not speak the protocol: {error}"))
        except ChannelClosedError:
            await asyncio.sleep(self._settings.grace_period_s)  # the exit of the process gives a better reason
            self._exit(ExitReason(reason="its engine closed the channel"))

    async def _watch_process(self, connection: EngineConnection) -> None:
        code = await connection.wait_exit()
        await asyncio.sleep(_OUTPUT_FLUSH_S)
        lost = connection.rank_lost
        reason = f"its engine lost {lost.result()}" if lost.done() else f"its engine ended with {describe_exit(code)}"
        self._exit_with_output(connection, reason)

    async def _watch_ranks(self, connection: EngineConnection) -> None:
        lost = await asyncio.shield(connection.rank_lost)
        # A load that fails ends its ranks before it is reported.
        await asyncio.sleep(_RANK_REPORT_S if self._loaded else self._settings.grace_period_s)
        self._exit_with_output(connection, f"its engine lost {lost}")

    def _exit_with_output(self, connection: EngineConnection, reason: str) -> None:
        if not self._exit_reason.done() and (output := connection.last_output()):
            self._callbacks.on_warning(self, f"last output of its engine: {output}")
        self._exit(ExitReason(reason=reason))

    async def _heartbeat(self) -> None:
        """Ping the engine and check the watchdog at every interval."""
        interval_s = self._settings.heartbeat_interval_s
        while True:
            due_s = self._loop.time() + interval_s
            await asyncio.sleep(interval_s)
            now_s = self._loop.time()
            if now_s - due_s > interval_s:
                self._watchdog.discount_stall(now_s - due_s, now_s, self._execution)
            if reason := self._watchdog.hang_reason(now_s, loaded=self._loaded, execution=self._execution):
                self._exit(ExitReason(reason=reason))
            self._pings += 1
            self._send(Ping(number=self._pings))
            if not self._loaded and self._pings > 1:
                self._send_load()

    def _exit(self, exit_reason: ExitReason) -> None:
        if not self._exit_reason.done():
            self._exit_reason.set_result(exit_reason)

    async def _terminate(self, connection: EngineConnection, exit_reason: ExitReason) -> bool:
        send_stop = None if exit_reason.failed else partial(self._send, Stop())
        return await terminate(connection, grace_period_s=self._settings.grace_period_s, send_stop=send_stop)

    # Messages

    def _on_message(self, message: FromEngine) -> None:
        if self._exit_reason.done():
            return
        self._watchdog.message_received(self._loop.time())
        if isinstance(message, Failed):
            message = self._name_gpu(message)
        match message:
            case Hello(protocol=protocol):
                self._on_hello(protocol)
            case Loaded():
                self._on_loaded(message)
            case Failed(execution_id=0):
                retryable = message.kind not in (FailureKind.OUT_OF_MEMORY, FailureKind.UNSUPPORTED)
                self._exit(ExitReason(reason=f"its engine could not load {message}", retryable=retryable))
            case StepProgress():
                self._on_step(message)
            case Finished() | Failed():
                self._on_execution_end(message)
            case Pong():
                self._on_pong(message)

    def _name_gpu(self, failed: Failed) -> Failed:
        """Name the GPU of a failure by its id in the cluster: an engine counts only the GPUs that it sees.

        Not every engine names one. Where memory lacks while it loads, the one that is short of it by the plan is named.
        """
        is_load = failed.execution_id == 0 and failed.kind == FailureKind.OUT_OF_MEMORY
        if is_load and not failed.device and self._memory_at_launch:
            return msgspec.structs.replace(failed, message=f"{failed.message}; {self._memory_at_launch}")
        gpu_ids = dict(zip(self.launch_spec.spec.devices, self.launch_spec.needed, strict=False))
        gpu_id = gpu_ids.get(failed.device)
        return failed if gpu_id is None else msgspec.structs.replace(failed, device=f"GPU {gpu_id}")

    def _on_hello(self, protocol: int) -> None:
        if protocol != PROTOCOL_VERSION:
            reason = f"its engine speaks version {protocol} of the protocol, not {PROTOCOL_VERSION}"
            self._exit(ExitReason(reason=reason, retryable=False))
        else:
            self._send_load()

    def _on_loaded(self, loaded: Loaded) -> None:
        if not (loaded.backend and f"{loaded.backend}{loaded.version}".isprintable()):
            # Believed, it would give the memory that the engine has yet to allocate to another one.
            self._exit(
                ExitReason(reason="its engine does not speak the protocol: it names no backend as it has loaded")
            )
        elif not self._loaded:
            self._loaded = True
            if self._connection is not None:
                self._connection.engine_loaded([shard.pid for shard in loaded.shards])
            self._release_memory_claim()
            self._callbacks.on_loaded(self, loaded)

    def _on_step(self, progress: StepProgress) -> None:
        execution = self._execution
        if execution is None or not execution.matches(progress.execution_id):
            return
        if error := execution.output_error(progress):
            self._exit(ExitReason(reason=f"its engine gave {error}"))
        elif execution.accept_step(progress, self._loop.time()):
            self._callbacks.on_step(self, progress)

    def _on_execution_end(self, result: Finished | Failed) -> None:
        execution = self._execution
        if execution is None or not execution.matches(result.execution_id):
            return
        if isinstance(result, Finished) and (error := execution.output_error(result)):
            self._exit(ExitReason(reason=f"its engine gave {error}"))
            return
        self._execution = None
        self._callbacks.on_execution_end(self, result)

    def _on_pong(self, pong: Pong) -> None:
        execution = self._execution
        if execution is None:
            return
        if execution.matches(pong.execution_id):
            execution.record_progress(pong.steps, self._loop.time())
        elif execution.must_resend(pong.number):
            self._send(execution.batch)

    def _send_load(self) -> None:
        spec = self.launch_spec.spec
        elapsed_s = (self._loop.time() - self._requested_s) / spec.time_scale
        load_s = max(0.0, self.launch_spec.load_s - elapsed_s)
        self._send(Load(spec=msgspec.structs.replace(spec, load_s=load_s)))

    def _send(self, message: Load | Generate | Ping | Stop) -> None:
        if self._connection is None:
            return
        try:
            self._connection.channel.send(message)
        except ProtocolError as error:  # the message is too long, which is not the engine's failure
            if isinstance(message, Generate):
                result = Failed(execution_id=message.execution_id, kind=FailureKind.ERROR.value, message=str(error))
                self._loop.call_soon(self._on_execution_end, result)
            else:
                self._exit(ExitReason(reason=str(error), retryable=False))

    def _release_memory_claim(self) -> None:
        if self._holds_memory_claim:
            self._holds_memory_claim = False
            self._gate.release_claim(self.launch_spec.needed)
