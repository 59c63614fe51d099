"""One engine process, from launch to exit: load, heartbeat, executions, hang detection, termination.

`EngineProcess` runs one engine. It waits for GPU memory, launches the process, sends it `Load`, then executions, and a
`Ping` at every heartbeat interval. `maveriq.exec.watchdog` decides whether the
engine hangs. The first of a hang, a failure, the exit of the process and a stop gives the `ExitReason`. Then
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

from maveriq.errors import InvariantError
from maveriq.exec.engines.engine import FailureKind
from maveriq.exec.gpu_memory_gate import GpuHeldError, GpuMemoryGate
from maveriq.exec.gpus import GpuLostError
from maveriq.exec.launcher import EngineConnection, Launcher, LaunchError
from maveriq.exec.messages import (
    PROTOCOL_VERSION,
    AbortRequest,
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
    PromptSequence,
    ProtocolError,
    StepProgress,
    StepReport,
    Stop,
    SubmitRequest,
)
from maveriq.exec.open_requests import OpenRequests
from maveriq.exec.processes import describe_exit
from maveriq.exec.watchdog import CurrentExecution, SupervisionSettings, Watchdog, WatchedWork
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
class ExitReason:
    """Why an engine process ended. `failed` is False after a stop; `retryable` is False where a restart cannot help."""

    reason: str
    failed: bool = True
    retryable: bool = True


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

    def on_report(self, engine: EngineProcess, report: StepReport) -> None:
        """A step of a continuous engine is done. Reports come in order, each once."""

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
        self._requests = (
            None if launch_spec.spec.batching is None else OpenRequests(settings.hang_timeout_s, self._requested_s)
        )
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

    def submit(self, sequence: PromptSequence, *, is_urgent: bool) -> None:
        """Put a request into the queue of a continuous engine."""
        message = self._open_requests.submit(sequence, self._loop.time(), is_urgent=is_urgent)
        self._send(message)

    def abort_request(self, request_id: int) -> None:
        """End a request of a continuous engine."""
        message = self._open_requests.abort(request_id)
        if message is not None:
            self._send(message)

    @property
    def _open_requests(self) -> OpenRequests:
        if self._requests is None:
            raise InvariantError(f"engine {self.launch_spec.spec.deployment_id} does not batch continuously")
        return self._requests

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
                self._watchdog.discount_stall(now_s - due_s, now_s, self._work)
            if reason := self._watchdog.hang_reason(now_s, loaded=self._loaded, work=self._work):
                self._exit(ExitReason(reason=reason))
            self._pings += 1
            self._send(Ping(number=self._pings, received=self._requests.received if self._requests else 0))
            if not self._loaded and self._pings > 1:
                self._send_load()

    @property
    def _work(self) -> WatchedWork | None:
        return self._execution or self._requests

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
            case StepReport():
                self._on_report(message)
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

    def _on_report(self, report: StepReport) -> None:
        requests = self._requests
        if requests is None:
            return
        for due in requests.take(report, self._loop.time()):
            if error := requests.check(due):
                self._exit(ExitReason(reason=f"its engine gave {error}"))
                return
            self._callbacks.on_report(self, due)

    def _on_pong(self, pong: Pong) -> None:
        if self._requests is not None:
            self._on_pong_about(self._requests, pong)
        execution = self._execution
        if execution is None:
            return
        if execution.matches(pong.execution_id):
            execution.record_progress(pong.steps, self._loop.time())
        elif execution.must_resend(pong.number):
            self._send(execution.batch)

    def _on_pong_about(self, requests: OpenRequests, pong: Pong) -> None:
        if error := requests.pong_error(pong):
            self._exit(ExitReason(reason=f"its engine gave {error}"))
            return
        for message in requests.on_pong(pong, self._loop.time()):
            self._send(message)

    def _send_load(self) -> None:
        spec = self.launch_spec.spec
        elapsed_s = (self._loop.time() - self._requested_s) / spec.time_scale
        load_s = max(0.0, self.launch_spec.load_s - elapsed_s)
        self._send(Load(spec=msgspec.structs.replace(spec, load_s=load_s)))

    def _send(self, message: Load | Generate | SubmitRequest | AbortRequest | Ping | Stop) -> None:
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
