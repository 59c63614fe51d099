"""The executor: runs the controller on a real clock and carries out its actions with supervised engines.

Whatever happens becomes an event of the controller: a request arrives, an engine starts, fails, or ends an execution.
The controller answers with actions (start or stop an engine, execute a batch). The executor itself makes no
scheduling decision. It is plain asyncio, so that tests run it with simulated time and simulated engines.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import TypeAlias, assert_never

from maveriq.control.controller import Controller, snapshot
from maveriq.control.events import (
    Abort,
    Action,
    EndpointAdded,
    EndpointRemoved,
    EngineDown,
    EngineProgress,
    EngineRepaired,
    EngineUp,
    Event,
    Execute,
    ProfileEnded,
    ProfileRequested,
    RequestArrived,
    RequestCancelled,
    StartEngine,
    StartProfile,
    StopEngine,
    StopProfile,
    Submit,
)
from maveriq.domain.deployments import Batching, EndpointSpec
from maveriq.domain.parallel import DeploymentPlan
from maveriq.domain.progress import DeploymentStatus, Progress
from maveriq.domain.records import RequestTable
from maveriq.domain.requests import Request
from maveriq.errors import InputError, InvariantError, MaveriqError
from maveriq.exec.control_lag import ControlLag
from maveriq.exec.emulated_batching import EmulatedBatching
from maveriq.exec.engine_process import LaunchSpec
from maveriq.exec.gpu_memory_gate import GpuMemoryGate, MemoryProbe, NoMemoryProbe
from maveriq.exec.gpu_sampling import GpuSampler
from maveriq.exec.gpus import Devices
from maveriq.exec.in_flight import InFlight, LiveRequestHandle
from maveriq.exec.launcher import Launcher, ProcessLauncher
from maveriq.exec.live_cluster import EndpointRequest, ProfileRunner, Submission
from maveriq.exec.messages import (
    BatchingSpec,
    EngineSpec,
    Failed,
    Finished,
    Generate,
    Loaded,
    StepProgress,
    StepReport,
    check_sequence,
    one_line,
)
from maveriq.exec.model_files import ModelFiles
from maveriq.exec.real_batching import RealBatching
from maveriq.exec.run_notes import RunNotes
from maveriq.exec.scaled_clock import ScaledClock
from maveriq.exec.supervisor import Supervisor
from maveriq.exec.watchdog import SupervisionSettings
from maveriq.scenario.continuous_engines import ContinuousEngines
from maveriq.scenario.system import ServingSystem
from maveriq.units import MICROS_PER_SECOND, Micros, seconds

BatchingSpecOf: TypeAlias = Callable[[EndpointSpec, DeploymentPlan], BatchingSpec]
"""Returns how the engines of an endpoint that batch continuously do so."""


class Executor:
    """A running cluster (`maveriq.exec.live_cluster.LiveCluster`). Create and use it within one running event loop.

    Args:
        system: what to run.
        launcher: starts the engines.
        devices: the devices behind the cluster's GPUs; None where engines run on the CPU or are emulated.
        files: where the files of models are; None for models that are known by their shape alone.
        time_scale: real seconds per second of the cluster's clock.
        supervision: timeouts and restarts of engines.
        memory_probe: reads the free memory of real GPUs.
        measured_loads: returns the recent load of each GPU, where it is measured.
        lag: collects how much longer executions take than their engines; None collects nothing.
        on_request_end: called with the ID of each request that ends; it must not call the executor.
        engines: makes the models of continuous engines, which this process then emulates; None where there are none.
        batching_of: how continuous engines batch, which their own processes do; None where they are emulated here.
        sample_us: length of the intervals of their records.
    """

    def __init__(
        self,
        system: ServingSystem,
        launcher: Launcher,
        *,
        devices: Devices | None = None,
        files: ModelFiles | None = None,
        time_scale: float = 1.0,
        supervision: SupervisionSettings | None = None,
        memory_probe: MemoryProbe | None = None,
        measured_loads: Callable[[], Sequence[float]] | None = None,
        lag: ControlLag | None = None,
        on_request_end: Callable[[int], None] | None = None,
        engines: ContinuousEngines | None = None,
        batching_of: BatchingSpecOf | None = None,
        sample_us: Micros = MICROS_PER_SECOND,
    ) -> None:
        self._lag = lag
        self._batching_of = batching_of
        self._on_request_end = on_request_end
        self._in_flight = InFlight()
        self.controller = Controller(
            system.cluster,
            system.policy,
            system.settings,
            system.predict_service_time,
            measured_loads=measured_loads,
            on_request_end=self._request_ended,
        )
        self.notes = RunNotes()
        self.clock = ScaledClock(time_scale)
        self._system = system
        self._devices = devices or Devices()
        self._files = files or ModelFiles()
        self._launcher = launcher
        self._supervision = supervision or SupervisionSettings()
        self._gate = GpuMemoryGate(memory_probe or NoMemoryProbe())
        self._loop = asyncio.get_running_loop()
        self.internal_error: asyncio.Future[None] = self._loop.create_future()
        """Gets the exception if the executor itself has a bug; it then handles no more events."""
        working = self.controller.manager.engines_working
        self.batching: EmulatedBatching | RealBatching | None = None
        if batching_of is not None:
            self.batching = RealBatching(self, self.clock, self._handle, sample_us, lag)
        elif engines is not None:
            self.batching = EmulatedBatching(engines, self.clock, self._on_progress, sample_us, working)
        self._wake: asyncio.TimerHandle | None = None
        self._supervisors: dict[int, Supervisor] = {}
        self._profile_runners: dict[int, ProfileRunner] = {}
        self._last_request_id = 0
        self._last_endpoint_id = 0
        self._table: RequestTable | None = None

    def _request_ended(self, request_id: int) -> None:
        self._in_flight.request_ended(request_id)
        if self._on_request_end is not None:
            self._on_request_end(request_id)

    @property
    def now_us(self) -> Micros:
        """The cluster's clock; it never goes back."""
        return self.clock.now_us

    # For users and replays

    def deploy(self, endpoint: EndpointRequest, *, endpoint_id: int | None = None, after_profile: int = 0) -> int:
        """Create an endpoint; see `LiveCluster`."""
        number = self._last_endpoint_id + 1 if endpoint_id is None else endpoint_id
        spec = EndpointSpec(
            endpoint_id=number,
            model=endpoint.model,
            intent=endpoint.intent,
            requested_us=self.now_us,
            prompt_tokens=self._system.prompt_tokens,
            output_tokens=endpoint.output_tokens,
            batch_size=endpoint.batch_size,
            batching=endpoint.batching,
        )
        live = self._system.live_engines
        if endpoint.engine is not None and live is not None:
            spec = live.add(spec, endpoint.engine, whole_command=endpoint.whole_command)
        self.add_endpoint(spec, after_profile=after_profile)
        return number

    def add_endpoint(self, endpoint: EndpointSpec, *, after_profile: int = 0) -> None:
        """Add an endpoint that has its id already, to be deployed at once or after a profile."""
        self._last_endpoint_id = max(self._last_endpoint_id, endpoint.endpoint_id)
        self._handle(EndpointAdded(endpoint, after_profile))

    def request_profile(self, profile: ProfileRequested, runner: ProfileRunner) -> None:
        """Queue a profile for GPUs; see `LiveCluster`."""
        self._profile_runners[profile.profile_id] = runner
        self._handle(profile)

    def end_profile(self, profile_id: int, reason: str = "") -> None:
        """Free the GPUs of a profile; see `LiveCluster`."""
        self._profile_runners.pop(profile_id, None)
        self._handle(ProfileEnded(profile_id, reason))

    def remove(self, endpoint_id: int) -> None:
        """Remove an endpoint; see `LiveCluster`."""
        if not self.controller.knows(endpoint_id):
            raise InputError(f"there is no endpoint {endpoint_id}")
        self._handle(EndpointRemoved(endpoint_id))
        if self._system.live_engines is not None:
            self._system.live_engines.remove(endpoint_id)

    def endpoint(self, endpoint_id: int) -> tuple[DeploymentStatus, ...]:
        """Return the current status of an endpoint's deployments; see `LiveCluster`."""
        controller = self.controller
        deployments = controller.deployments_of(endpoint_id)
        if not deployments:
            raise InputError(f"there is no endpoint {endpoint_id}")
        counters = self.batching.counters() if self.batching is not None else {}
        return tuple(
            deployment.status(
                controller.queue.waiting(deployment.deployment_id), counters.get(deployment.deployment_id)
            )
            for deployment in deployments
        )

    def why_too_long(self, endpoint_id: int, tokens: int) -> str | None:
        """Return why a sequence of so many tokens would be refused; see `LiveCluster`."""
        deployments = self.controller.deployments_of(endpoint_id)
        return self.controller.settings.why_too_long(deployments[0].endpoint, tokens) if deployments else None

    def max_sequence_tokens(self, endpoint_id: int) -> int | None:
        """Return the longest sequence of an endpoint that is served; see `LiveCluster`."""
        deployments = self.controller.deployments_of(endpoint_id)
        return self.controller.settings.max_sequence_tokens(deployments[0].endpoint) if deployments else None

    def submit(self, submission: Submission) -> LiveRequestHandle:
        """Submit a request; see `LiveCluster`.

        Raises:
            InputError: there is no such endpoint, a count or token id is out of range, or the executor is closed.
        """
        if not self.controller.knows(submission.endpoint_id):
            raise InputError(f"there is no endpoint {submission.endpoint_id}")
        request = Request(
            request_id=self._last_request_id + 1,
            endpoint_id=submission.endpoint_id,
            arrival_us=self.now_us,
            prompt_tokens=len(submission.prompt),
            output_tokens=submission.output_tokens,
            slo_us=submission.slo_us,
            priority=submission.priority,
        )
        handle = LiveRequestHandle(request, submission.prompt, submission.stop_token_ids)
        check_sequence(handle.sequence())
        self.arrive(handle)
        return handle

    def arrive(self, handle: LiveRequestHandle) -> None:
        """Add a request that has its id already; ids must increase.

        Raises:
            InputError: the executor is closed.
        """
        if self._table is not None:
            raise InputError("the cluster is shut down and takes no more requests")
        self._last_request_id = handle.request_id
        self._in_flight.add(handle)
        self._handle(RequestArrived(handle.request))

    def cancel(self, request_id: int) -> None:
        """Cancel a request; see `LiveCluster`."""
        self._handle(RequestCancelled(request_id))

    def progress(self, *, last_arrival_us: Micros | None = None, total: int | None = None) -> Progress:
        """Return the progress for live views and metrics.

        Args:
            last_arrival_us: arrival of the last request of a replay, None where more may come at any time.
            total: number of requests of a replay, None likewise.
        """
        now_us = self.now_us
        return snapshot(
            self.controller,
            now_us,
            last_arrival_us=now_us if last_arrival_us is None else last_arrival_us,
            total=len(self.controller.tracker) if total is None else total,
            engines=self.batching.counters() if self.batching is not None else {},
        )

    def inject_fault(self, deployment_id: int, *, for_us: Micros | None) -> None:
        """Make an engine fail, for a time or for good (None)."""
        manager, supervisor = self.controller.manager, self._supervisors.get(deployment_id)
        if deployment_id not in manager.deployments or not manager.holds_memory(manager.deployments[deployment_id]):
            return  # rejected, removed or lost: no engine
        reason = "its engine was killed on purpose"
        repair_after_s = None if for_us is None else self.clock.real_s(for_us)
        if supervisor is not None and supervisor.abort(reason, repair_after_s=repair_after_s):
            return
        # There is no engine at this instant, for example during a backoff; an engine that was to start does not.
        self.on_engine_down(deployment_id, reason, restarts=for_us is not None)
        if repair_after_s is not None:
            self._loop.call_later(repair_after_s, self.on_engine_repaired, deployment_id)

    async def drained(self) -> None:
        """Wait until no request is waiting or running."""
        await self._in_flight.wait_empty()

    def end_requests(self) -> RequestTable:
        """Accept no more requests, end the open ones as unfinished, and return the rows of all requests."""
        if self._table is None:
            if self._wake is not None:
                self._wake.cancel()
            self._table = self.controller.tracker.close()
            self._in_flight.complete_all(self.controller.tracker)
        return self._table

    async def close(self) -> None:
        """End all requests, stop all engines, and return when every process has ended."""
        self.end_requests()
        await asyncio.gather(*(supervisor.close() for supervisor in self._supervisors.values()))

    # Events to the controller, actions from it

    def _handle(self, *events: Event) -> None:
        """Pass events to the controller, carry out its actions, and schedule its next wake-up."""
        if self._table is not None or self.internal_error.done():
            return
        try:
            now_us = self.now_us
            for action in self.controller.handle(now_us, events):
                self._execute_action(action, now_us)
            if isinstance(self.batching, EmulatedBatching):
                self.batching.compose(now_us)
        except Exception as error:
            self.on_internal_error(error)
            raise
        self._in_flight.complete_ended(self.controller.tracker)
        if self._wake is not None:
            self._wake.cancel()
        wake_us = self.controller.wake_us
        self._wake = None if wake_us is None else self.clock.call_at(wake_us, self._handle)

    def _execute_action(self, action: Action, now_us: Micros) -> None:
        match action:
            case Execute():
                self._execute(action, now_us)
            case StartEngine():
                self._start(action)
            case Submit(deployment_id, request):
                self._batching(deployment_id).submit(deployment_id, request, now_us)
            case Abort(deployment_id, request_id):
                self._batching(deployment_id).abort(deployment_id, request_id, now_us)
            case StopEngine(deployment_id):
                self._drop_engine(deployment_id)
                self._supervisors[deployment_id].stop()
            case StartProfile(profile_id, gpu_ids):
                self._profile_runners[profile_id].start(gpu_ids)
            case StopProfile(profile_id):
                self._profile_runners[profile_id].stop()
            case _ as never:
                assert_never(never)

    def _batching(self, deployment_id: int) -> EmulatedBatching | RealBatching:
        if self.batching is None:
            raise InvariantError(f"deployment {deployment_id} batches continuously, and the system has no such engines")
        return self.batching

    def _drop_engine(self, deployment_id: int) -> None:
        """Forget what an engine does that was stopped or has failed."""
        self._in_flight.drop_execution(deployment_id)
        if self.batching is not None:
            self.batching.stop(deployment_id, self.now_us)

    def _on_progress(self, progress: EngineProgress, late_us: Micros) -> None:
        """A step of an emulated continuous engine has ended."""
        self._handle(progress)
        if self._lag is not None:
            for finished in progress.finished:
                row = self.controller.tracker.row(finished.request_id)
                self._lag.request_finished(late_us, max(0, row.finish_us - row.start_us))

    def _start(self, action: StartEngine) -> None:
        number = action.deployment_id
        if number not in self._supervisors:
            self._supervisors[number] = Supervisor(
                number, launcher=self._launcher, callbacks=self, settings=self._supervision, gate=self._gate
            )
        self.notes.engine_starting(number, self._loop.time())
        self._supervisors[number].start(self._launch_spec(action))

    def _launch_spec(self, action: StartEngine) -> LaunchSpec:
        plan, configuration = action.plan, action.plan.configuration
        endpoint = self.controller.manager.deployments[action.deployment_id].endpoint
        batching_of = self._batching_of if endpoint.batching is Batching.CONTINUOUS else None
        spec = EngineSpec(
            deployment_id=action.deployment_id,
            generation=action.generation,
            model=plan.model.name,
            config_json=self._files.config_json(plan.model),
            tp=configuration.tp,
            pp=configuration.pp,
            layer_split=plan.layer_split,
            weights=configuration.weights.value,
            kv=configuration.kv.value,
            batch_size=configuration.batch_size,
            devices=self._devices.names(plan.gpu_ids),
            seed=self._system.settings.seed,
            weights_folder=self._files.weights_folder(plan.model),
            time_scale=self.clock.time_scale,
            batching=None if batching_of is None else batching_of(endpoint, plan),
        )
        needed = dict(zip(plan.gpu_ids, plan.gpu_bytes, strict=True))
        load_s = 0.0 if self.clock.is_held else seconds(self._system.load_time(plan))
        return LaunchSpec(spec=spec, needed=needed, load_s=load_s)

    def _execute(self, action: Execute, now_us: Micros) -> None:
        number = action.deployment_id
        plan = self.controller.manager.deployments[number].required_plan
        first_token_us, service_us = self._system.service_times.times_us(plan, action.requests)
        batch = Generate(
            execution_id=action.execution_id,
            sequences=self._in_flight.start_execution(action, now_us),
            first_token_s=seconds(first_token_us),
            service_s=seconds(service_us),
        )
        if self._lag is not None:
            self._lag.execution_started(number, now_us, service_us)
        self._supervisors[number].execute(batch, self.clock.real_s(service_us))

    # `maveriq.exec.real_batching.SendsToEngines`

    def submit_to_engine(self, deployment_id: int, request_id: int, *, is_urgent: bool) -> None:
        """Put a request into an engine's queue."""
        self._supervisors[deployment_id].submit(self._in_flight.sequence(request_id), is_urgent=is_urgent)

    def abort_in_engine(self, deployment_id: int, request_id: int) -> None:
        """End a request of an engine."""
        self._supervisors[deployment_id].abort_request(request_id)

    def add_tokens(self, request_id: int, position: int, tokens: tuple[int, ...]) -> None:
        """Give the client tokens of a request."""
        self._in_flight.add_tokens(request_id, position, tokens)

    # `maveriq.exec.supervisor.SupervisorCallbacks`

    def on_engine_up(self, launch_spec: LaunchSpec, loaded: Loaded) -> None:
        """An engine is ready to serve."""
        self.notes.engine_loaded(launch_spec, loaded, self._loop.time())
        number, generation = launch_spec.spec.deployment_id, launch_spec.spec.generation
        deployment = self.controller.manager.deployments[number]
        if deployment.endpoint.batching is Batching.EXCLUSIVE:
            self._handle(EngineUp(number, generation))
            return
        batching, endpoint = self._batching(number), deployment.endpoint
        if isinstance(batching, RealBatching):
            self._handle(batching.loaded(number, generation, endpoint, loaded.kv_tokens))
            return
        try:
            up = batching.loaded(number, generation, endpoint, deployment.required_plan)
        except MaveriqError as error:
            self.on_internal_error(error)
            return
        self._handle(up)

    def on_engine_down(self, deployment_id: int, reason: str, *, restarts: bool) -> None:
        """An engine failed."""
        events: list[Event] = [EngineDown(deployment_id, restarts, one_line(reason))]
        if isinstance(self.batching, RealBatching):
            last = self.batching.last_words(deployment_id, self.now_us)
            events += [] if last is None else [last]
        self._drop_engine(deployment_id)
        self.on_warning(deployment_id, reason)
        self._handle(*events)

    def on_engine_repaired(self, deployment_id: int) -> None:
        """A failed engine may start again."""
        self._handle(EngineRepaired(deployment_id))

    def on_step(self, deployment_id: int, progress: StepProgress) -> None:
        """A step of an execution is done."""
        self._in_flight.on_step(deployment_id, progress, self.now_us)

    def on_execution_end(self, deployment_id: int, result: Finished | Failed) -> None:
        """An execution has ended."""
        if self._lag is not None and isinstance(result, Finished):
            self._lag.execution_ended(deployment_id, self.now_us, result.service_s)
        event = self._in_flight.end_execution(deployment_id, result, self.now_us, self.clock.time_scale)
        if event is not None:
            self._handle(event)

    def on_report(self, deployment_id: int, generation: int, report: StepReport) -> None:
        """A step of a continuous engine is done."""
        if isinstance(self.batching, RealBatching) and self._table is None:
            self.batching.on_report(deployment_id, generation, report)

    def on_warning(self, deployment_id: int, warning: str) -> None:
        """Add a warning to the notes of the run."""
        self.notes.add_note(self.controller.manager.deployments[deployment_id].name, self.now_us, warning)

    def on_internal_error(self, error: BaseException) -> None:
        """Record a bug in the executor or a supervisor."""
        if not self.internal_error.done():
            self.internal_error.set_exception(error)


@contextlib.asynccontextmanager
async def open_executor(
    system: ServingSystem,
    *,
    backend: str,
    logs: Path,
    devices: Devices | None = None,
    files: ModelFiles | None = None,
    time_scale: float = 1.0,
    supervision: SupervisionSettings | None = None,
    memory_probe: MemoryProbe | None = None,
    sampler: GpuSampler | None = None,
    python: Path | None = None,
    batching_of: BatchingSpecOf | None = None,
) -> AsyncIterator[Executor]:
    """Yield an executor whose engines are processes on this machine, and close it at the end.

    Args:
        system: what to run.
        backend: which engines serve.
        logs: folder for the output of engines; created if it does not exist.
        devices: see `Executor`.
        files: see `Executor`.
        time_scale: see `Executor`.
        supervision: see `Executor`.
        memory_probe: see `Executor`.
        sampler: measures the load of real GPUs.
        python: see `ProcessLauncher`.
        batching_of: see `Executor`.

    Raises:
        InputError: the folder cannot be created.
    """
    try:
        logs.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"folder {str(logs)!r} for logs cannot be created: {error.strerror}; name another") from None
    with ProcessLauncher(backend, logs=logs, devices=devices, python=python) as launcher:
        executor = Executor(
            system,
            launcher,
            devices=devices,
            files=files,
            time_scale=time_scale,
            supervision=supervision,
            memory_probe=memory_probe,
            measured_loads=sampler.loads if sampler else None,
            batching_of=batching_of,
        )
        sampling = asyncio.create_task(sampler.run()) if sampler else None
        try:
            yield executor
        finally:
            if sampling is not None:
                sampling.cancel()
            await executor.close()
