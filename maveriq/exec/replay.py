"""Replays a scenario in real time on real engines, as `maveriq.sim` does with simulated ones.

`run_replay` runs an event loop and handles Ctrl-C; `execute` runs within an event loop. The events of the scenario
(endpoints, removals, faults, requests) happen at their times. Prompts are random token ids, since workloads contain
only their lengths (`maveriq.exec.random_prompts`). The result has the records of requests, deployments and GPUs, and a
record of each engine.
"""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import selectors
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import TypeAlias

from maveriq.control.deployment_manager import DeploymentState
from maveriq.domain.deployments import Batching, EndpointSpec
from maveriq.domain.faults import FaultTarget
from maveriq.domain.progress import Progress, Watcher
from maveriq.domain.records import RunRecord
from maveriq.domain.requests import Request
from maveriq.errors import InputError
from maveriq.exec.control_lag import ControlLag, LagSummary
from maveriq.exec.executor import BatchingSpecOf, Executor
from maveriq.exec.gpu_memory_gate import MemoryProbe
from maveriq.exec.gpu_sampling import GpuRecorder, GpuSampler
from maveriq.exec.gpus import Devices, GpuMeter
from maveriq.exec.in_flight import LiveRequestHandle
from maveriq.exec.interrupt import InterruptHandler
from maveriq.exec.launcher import Launcher
from maveriq.exec.messages import MAX_OUTPUT_TOKENS, MAX_PROMPT_TOKENS
from maveriq.exec.model_files import ModelFiles
from maveriq.exec.random_prompts import RandomPrompts
from maveriq.exec.run_notes import EngineRecord
from maveriq.exec.watchdog import SupervisionSettings
from maveriq.scenario.system import ReplaySystem
from maveriq.units import Micros
from maveriq.workload.client import Client
from maveriq.workload.requests import requests_of

_WATCHER_INTERVAL_S = 0.1
_START_INTERVAL_S = 0.01
_STARTING = (DeploymentState.WAITING, DeploymentState.LOADING, DeploymentState.DOWN)

_TimedEvent: TypeAlias = tuple[Micros, int, int, Callable[[], None]]
"""A time, the order among events of one time (kind, then id), and the action."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplaySettings:
    """Settings of a replay.

    Args:
        time_scale: real seconds per second of the run.
        devices: the devices behind the cluster's GPUs.
        files: where the files of models are.
        supervision: timeouts and restarts of engines.
        meter: reads real GPUs, None without GPUs.
        memory_probe: reads the free memory of real GPUs.
        sampler: measures the load of real GPUs.
        planned_times: engines are emulated and take the planned times; longer ones are lag.
        batching_of: see `Executor`.
    """

    time_scale: float = 1.0
    devices: Devices = field(default_factory=Devices)
    files: ModelFiles = field(default_factory=ModelFiles)
    supervision: SupervisionSettings = field(default_factory=SupervisionSettings)
    meter: GpuMeter | None = None
    memory_probe: MemoryProbe | None = None
    sampler: GpuSampler | None = None
    planned_times: bool = False
    batching_of: BatchingSpecOf | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplayResult:
    """The result of a replay.

    Args:
        record: the records of requests, deployments and GPUs.
        engines: the engines that served.
        notes: warnings for readers of the results.
        energy_j: energy of each device in joules, None where unknown; empty if it was not measured.
        interrupted: whether the replay was ended early.
        lag: how late the control plane was, None where nothing was executed.
    """

    record: RunRecord
    engines: tuple[EngineRecord, ...]
    notes: tuple[str, ...]
    energy_j: tuple[float | None, ...]
    interrupted: bool
    lag: LagSummary | None = None


def run_replay(
    scenario: ReplaySystem,
    launcher: Launcher,
    settings: ReplaySettings,
    watcher: Watcher | None,
    interrupt: InterruptHandler,
) -> ReplayResult:
    """Replay a scenario on a new event loop; an interrupt ends it early, with all records.

    Raises:
        InputError: the scenario cannot run on real engines (`check_replayable`).
    """

    async def interruptible() -> ReplayResult:
        interrupted = asyncio.Event()
        loop = asyncio.get_running_loop()
        with interrupt.calling(lambda: loop.call_soon_threadsafe(interrupted.set)):
            return await execute(scenario, launcher, settings, watcher, interrupted=interrupted)

    # select() waits with microsecond resolution; epoll rounds every wait up to milliseconds.
    with asyncio.Runner(loop_factory=lambda: asyncio.SelectorEventLoop(selectors.SelectSelector())) as runner:
        return runner.run(interruptible())


async def execute(
    scenario: ReplaySystem,
    launcher: Launcher,
    settings: ReplaySettings,
    watcher: Watcher | None = None,
    *,
    interrupted: asyncio.Event | None = None,
) -> ReplayResult:
    """Replay a scenario on the running event loop; it ends early when `interrupted` is set.

    Raises:
        InputError: the scenario cannot run on real engines (`check_replayable`).
    """
    return await _Replay(scenario, launcher, settings, watcher, interrupted or asyncio.Event()).run()


class _Replay:
    """One replay."""

    def __init__(
        self,
        scenario: ReplaySystem,
        launcher: Launcher,
        settings: ReplaySettings,
        watcher: Watcher | None,
        interrupted: asyncio.Event,
    ) -> None:
        check_replayable(scenario)
        self._scenario = scenario
        self._settings = settings
        self._watcher = watcher
        self._interrupted = interrupted
        self._last_arrival_us = int(scenario.workload.arrivals.arrival_us[-1])
        self._prompts = RandomPrompts(scenario.settings.seed)
        self._has_prompts = scenario.engines is None or settings.batching_of is not None
        self._vocabulary_sizes = {
            endpoint.endpoint_id: endpoint.model.vocab_size for endpoint in scenario.workload.endpoints
        }
        self._ready_at_start = [
            endpoint
            for endpoint in scenario.workload.endpoints
            if endpoint.ready_at_start and endpoint.batching is Batching.CONTINUOUS
        ]
        self._endpoints_left = len(scenario.workload.endpoints)
        self._client: Client | None = None  # of requests that wait for others; None if each has its own time
        if scenario.workload.reacts or scenario.max_in_flight is not None:
            self._client = Client(
                scenario.workload.arrivals,
                concurrency=scenario.workload.concurrency,
                max_in_flight=scenario.max_in_flight,
            )
        self._ended_request = asyncio.Event()
        self._all_sent = asyncio.Event()
        self._lag = ControlLag(settings.time_scale, planned=settings.planned_times)
        self._executor = Executor(
            scenario,
            launcher,
            devices=settings.devices,
            files=settings.files,
            time_scale=settings.time_scale,
            supervision=settings.supervision,
            memory_probe=settings.memory_probe,
            measured_loads=settings.sampler.loads if settings.sampler else None,
            lag=self._lag,
            on_request_end=self._request_ended,
            engines=scenario.engines,
            batching_of=settings.batching_of,
            sample_us=scenario.sample_us,
        )
        self._gpus = GpuRecorder(
            self._executor.controller.manager,
            len(scenario.cluster),
            settings.meter,
            own_devices=not settings.devices.shared,
        )

    async def run(self) -> ReplayResult:
        """Run until every request has ended, the drain time is over, or the replay is interrupted."""
        await self._gpus.read()
        try:
            await self._start_ready()
            await self._wait_for_end()
            executor = self._executor
            ended_us = min(executor.now_us, self._last_arrival_us + self._scenario.drain_us)
            await self._gpus.read()
            if ended_us > self._gpus.sampled_us:
                self._gpus.sample(ended_us)
            if self._watcher:
                with contextlib.suppress(OSError):  # the terminal is gone
                    self._watcher.update(self._progress())
            batching = executor.batching
            engines, itl = (None, None) if batching is None else batching.tables(ended_us)
            record = RunRecord(
                requests=executor.end_requests(),
                deployments=tuple(
                    deployment.record() for deployment in executor.controller.manager.deployments.values()
                ),
                gpu_samples=tuple(self._gpus.samples),
                models={endpoint.endpoint_id: endpoint.model.name for endpoint in self._scenario.workload.endpoints},
                ended_us=ended_us,
                engines=engines,
                itl=itl,
            )
        finally:
            await self._executor.close()
        return ReplayResult(
            record=record,
            engines=tuple(executor.notes.engines),
            notes=(*executor.notes.notes, *self._gpus.notes),
            energy_j=self._gpus.energy_j(),
            interrupted=self._interrupted.is_set(),
            lag=self._lag.summary(),
        )

    async def _start_ready(self) -> None:
        """Start the continuous engines that are up before the first request; the run's clock stands still meanwhile."""
        executor = self._executor
        if not self._ready_at_start:
            return
        executor.clock.hold()
        for endpoint in self._ready_at_start:
            self._add_endpoint(endpoint)
        while any(
            not deployment.gone_for_good and deployment.state in _STARTING
            for deployment in executor.controller.manager.deployments.values()
        ):
            if executor.internal_error.done() or self._interrupted.is_set():
                break
            await asyncio.sleep(_START_INTERVAL_S)
        executor.clock.release()

    async def _wait_for_end(self) -> None:
        coroutines = [
            self._sample_gpus(),
            *([self._update_watcher(self._watcher)] if self._watcher else []),
            *([self._settings.sampler.run()] if self._settings.sampler else []),
        ]
        background = [asyncio.create_task(coroutine) for coroutine in coroutines]
        ends = [
            asyncio.create_task(self._replay_events()),
            asyncio.create_task(self._drain_time_over()),
            asyncio.create_task(self._wait_interrupted()),
            self._executor.internal_error,
        ]
        try:
            await asyncio.wait([*ends, *background], return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (*ends[:3], *background):
                task.cancel()
        ended = [task for task in (*ends, *background) if task.done() and not task.cancelled()]
        errors = [error for task in ended if (error := task.exception()) is not None]
        if errors:  # one fault may end several tasks; asyncio prints a traceback for an error that nobody looks at
            raise errors[0]

    async def _wait_interrupted(self) -> None:
        await self._interrupted.wait()

    async def _drain_time_over(self) -> None:
        if self._client is not None:
            await self._all_sent.wait()
        await self._executor.clock.sleep_until(self._last_arrival_us + self._scenario.drain_us + 1)

    async def _replay_events(self) -> None:
        """Run every event at its time, then wait until every request has ended."""
        events = sorted(self._scenario_events(), key=_event_order)
        if self._client is None:
            await self._run_events(heapq.merge(events, self._arrivals(), key=_event_order))
        else:
            await asyncio.gather(self._run_events(events), self._send_requests(self._client))
        await self._executor.drained()

    async def _run_events(self, events: Iterable[_TimedEvent]) -> None:
        for time_us, _, _, action in events:
            if time_us > self._executor.now_us:
                await self._executor.clock.sleep_until(time_us)
            action()

    async def _send_requests(self, client: Client) -> None:
        """Send every request when it is due and the client may."""
        executor = self._executor
        while client.unsent:
            self._ended_request.clear()
            for request in client.send(executor.now_us):
                self._last_arrival_us = request.arrival_us
                self._arrive(request)
            next_us = client.next_us
            wait_s = None if next_us is None else executor.clock.real_s(max(0, next_us - executor.now_us))
            if client.unsent:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._ended_request.wait(), wait_s)
        self._all_sent.set()

    def _request_ended(self, request_id: int) -> None:
        if self._client is not None:
            self._client.ended(request_id, self._executor.now_us)
            self._ended_request.set()

    def _scenario_events(self) -> Iterator[_TimedEvent]:
        """Yield all events except arrivals of requests. Kinds are in the order in which the controller handles them."""
        executor, scenario = self._executor, self._scenario
        for removal in scenario.removals:
            yield removal.at_us, 0, removal.endpoint_id, partial(executor.remove, removal.endpoint_id)
        for endpoint in scenario.workload.endpoints:
            if endpoint in self._ready_at_start:
                continue
            yield endpoint.requested_us, 1, endpoint.endpoint_id, partial(self._add_endpoint, endpoint)
        for fault in scenario.faults:
            inject = partial(executor.inject_fault, fault.target_id, for_us=fault.for_us)
            yield fault.at_us, 2, fault.target_id, inject

    def _arrivals(self) -> Iterator[_TimedEvent]:
        for request in requests_of(self._scenario.workload.arrivals):
            yield request.arrival_us, 3, request.request_id, partial(self._arrive, request)

    def _add_endpoint(self, endpoint: EndpointSpec) -> None:
        self._endpoints_left -= 1
        self._executor.add_endpoint(endpoint)

    def _arrive(self, request: Request) -> None:
        self._lag.arrived(request.arrival_us, self._executor.now_us)
        self._executor.arrive(LiveRequestHandle(request, self._random_prompt(request)))

    def _random_prompt(self, request: Request) -> tuple[int, ...]:
        """Return token ids for a prompt. The models of continuous engines need none."""
        if not self._has_prompts:
            return ()
        vocabulary_size = self._vocabulary_sizes.get(request.endpoint_id, 2)  # 2: the endpoint does not exist
        return self._prompts.prompt(request, vocabulary_size)

    # Observation

    async def _update_watcher(self, watcher: Watcher) -> None:
        loop = asyncio.get_running_loop()
        shown = True
        while True:
            if shown and watcher.wants_update():
                try:
                    # In a thread: drawing would delay requests.
                    await loop.run_in_executor(None, watcher.update, self._progress())
                except OSError:  # the terminal is gone; the run goes on
                    shown = False
            await asyncio.sleep(_WATCHER_INTERVAL_S)

    def _progress(self) -> Progress:
        more_may_come = self._client is not None and self._client.unsent > 0
        return self._executor.progress(
            last_arrival_us=None if more_may_come else self._last_arrival_us,
            total=len(self._scenario.workload.arrivals),
        )

    async def _sample_gpus(self) -> None:
        due_us = 0
        while not self._all_engines_failed():
            due_us += self._scenario.sample_us
            await self._executor.clock.sleep_until(due_us)
            await self._gpus.read()
            self._gpus.sample(self._executor.now_us)

    def _all_engines_failed(self) -> bool:
        """Return whether every deployment was given up, so that all later requests would only be refused."""
        deployments = [
            deployment for deployment in self._executor.controller.manager.deployments.values() if deployment.plan
        ]
        return (
            bool(deployments)
            and not self._endpoints_left
            and all(deployment.gone_for_good for deployment in deployments)
        )


def _event_order(event: _TimedEvent) -> tuple[Micros, int, int]:
    return event[:3]


def check_replayable(scenario: ReplaySystem) -> None:
    """Reject a scenario that can be simulated but not run on real engines, or on emulated ones.

    Raises:
        InputError: a GPU is to fail, or a request is too long for an engine.
    """
    arrivals = scenario.workload.arrivals
    for part, maximum, longest in (
        ("prompt", MAX_PROMPT_TOKENS, arrivals.prompt_tokens.max()),
        ("output", MAX_OUTPUT_TOKENS, arrivals.output_tokens.max()),
    ):
        if longest > maximum:
            raise InputError(f"workload: {part} of {longest:,} tokens; engines take at most {maximum:,}")
    for fault in scenario.faults:
        if fault.target is FaultTarget.GPU:
            raise InputError(
                f"fault of GPU {fault.target_id}: a real GPU cannot be made to fail; "
                "give deployment=NUMBER@TIME, which kills its engine"
            )
