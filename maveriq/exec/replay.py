"""What a run leaves of its engines, beside the records of requests.

Prompts for requests of which only the length is known.
Ctrl-C and SIGTERM, noted instead of obeyed on the spot, so that a run ends in good order and writes its records.
Replaying a scenario in real time, on engines that really run.
"""

from __future__ import annotations

import asyncio
import heapq
import selectors
import signal
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Self, TypeAlias

from maveriq.domain.deployments import EndpointSpec
from maveriq.domain.faults import FaultTarget
from maveriq.domain.progress import Progress, Watcher
from maveriq.domain.records import RunRecord
from maveriq.domain.requests import Request
from maveriq.errors import InputError
from maveriq.exec.engine_process import SupervisionSettings
from maveriq.exec.executor import EngineRecord, Executor
from maveriq.exec.gpu_memory_gate import MemoryProbe
from maveriq.exec.gpu_sampling import GpuRecorder, GpuSampler
from maveriq.exec.gpus import Devices, GpuMeter
from maveriq.exec.in_flight import LiveRequestHandle
from maveriq.exec.launcher import Launcher
from maveriq.exec.messages import MAX_OUTPUT_TOKENS, MAX_PROMPT_TOKENS
from maveriq.exec.model_files import ModelFiles
from maveriq.scenario.system import ReplaySystem
from maveriq.streams import generator
from maveriq.units import Micros
from maveriq.workload.requests import requests_of


class Prompts:
    """Made-up prompts, drawn per request from a stream of its own, so that each is the same in every run of a seed."""

    def __init__(self, endpoints: Iterable[EndpointSpec], seed: int) -> None:
        self._vocabulary = {endpoint.endpoint_id: endpoint.model.vocab_size for endpoint in endpoints}
        self._seed = seed

    def of(self, request: Request) -> tuple[int, ...]:
        """Return the token ids of a request's prompt. An unknown endpoint gets any valid ids."""
        draw = generator(self._seed, f"prompt of request {request.request_id}")
        return tuple(draw.integers(0, self._vocabulary.get(request.endpoint_id, 2), request.prompt_tokens).tolist())


_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interruption:
    """Notes SIGINT and SIGTERM instead of ending the process. Enter it in the main thread.

    So a second Ctrl-C, while engines are stopped or records written, cannot lose what the first one meant to keep.
    """

    def __init__(self) -> None:
        self.came = False
        self._tell: Callable[[], object] = lambda: None

    def __enter__(self) -> Self:
        self._before = {number: signal.signal(number, self._note) for number in _SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, _number: int, _frame: FrameType | None) -> None:
        self.came = True
        self._tell()

    @contextmanager
    def telling(self, tell: Callable[[], object]) -> Iterator[None]:
        """Call back on a signal, at once if one has come; it runs in the signal handler, in the main thread."""
        self._tell = tell
        if self.came:
            tell()
        try:
            yield
        finally:
            self._tell = lambda: None


_LOOK_EVERY_S = 0.1

_TimedEvent: TypeAlias = tuple[Micros, int, int, Callable[[], None]]
"""When, which kind and which of them come first at one instant, and what to do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplaySettings:
    """How a scenario is run.

    Args:
        time_scale: real seconds per second of the run.
        devices: what stands behind the cluster's GPUs.
        files: where those of models lie.
        supervision: how long to be patient with engines.
        meter: reads real GPUs, None where there are none.
        memory_probe: reads the free memory of real GPUs.
        sampler: who sees how busy they are.
    """

    time_scale: float = 1.0
    devices: Devices = field(default_factory=Devices)
    files: ModelFiles = field(default_factory=ModelFiles)
    supervision: SupervisionSettings = field(default_factory=SupervisionSettings)
    meter: GpuMeter | None = None
    memory_probe: MemoryProbe | None = None
    sampler: GpuSampler | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Replayed:
    """What a run leaves: its record, the engines that served, what a reader must know, joules by device if measured."""

    record: RunRecord
    engines: tuple[EngineRecord, ...]
    notes: tuple[str, ...]
    energy_j: tuple[float | None, ...]
    interrupted: bool


def run_replay(
    scenario: ReplaySystem,
    launcher: Launcher,
    settings: ReplaySettings,
    watcher: Watcher | None,
    interruption: Interruption,
) -> Replayed:
    """Replay a scenario on an event loop of its own; an interruption ends it early, with all records.

    Raises:
        InputError: a fault that cannot be made for real.
    """

    async def with_signals() -> Replayed:
        interrupted = asyncio.Event()
        loop = asyncio.get_running_loop()
        with interruption.telling(lambda: loop.call_soon_threadsafe(interrupted.set)):
            return await execute(scenario, launcher, settings, watcher, interrupted=interrupted)

    # select() takes microseconds, where epoll would round every wait up to whole milliseconds.
    with asyncio.Runner(loop_factory=lambda: asyncio.SelectorEventLoop(selectors.SelectSelector())) as runner:
        return runner.run(with_signals())


async def execute(
    scenario: ReplaySystem,
    launcher: Launcher,
    settings: ReplaySettings,
    watcher: Watcher | None = None,
    *,
    interrupted: asyncio.Event | None = None,
) -> Replayed:
    """Replay a scenario on the running event loop; it ends early when `interrupted` is set.

    Raises:
        InputError: a fault that cannot be made for real.
    """
    return await _Replay(scenario, launcher, settings, watcher, interrupted or asyncio.Event()).run()


class _Replay:
    """One run."""

    def __init__(
        self,
        scenario: ReplaySystem,
        launcher: Launcher,
        settings: ReplaySettings,
        watcher: Watcher | None,
        interrupted: asyncio.Event,
    ) -> None:
        check_real(scenario)
        self._scenario = scenario
        self._settings = settings
        self._watcher = watcher
        self._interrupted = interrupted
        self._last_arrival_us = int(scenario.workload.arrivals.arrival_us[-1])
        self._prompts = Prompts(scenario.workload.endpoints, scenario.settings.seed)
        self._asks_left = len(scenario.workload.endpoints)
        self._body = Executor(
            scenario,
            launcher,
            devices=settings.devices,
            files=settings.files,
            time_scale=settings.time_scale,
            supervision=settings.supervision,
            memory_probe=settings.memory_probe,
            measured_loads=settings.sampler.loads if settings.sampler else None,
        )
        self._gpus = GpuRecorder(
            self._body.controller.manager,
            len(scenario.cluster),
            settings.meter,
            own_devices=not settings.devices.shared,
        )

    async def run(self) -> Replayed:
        """Run to the end: every request ended, the time to drain over, or interrupted."""
        await self._gpus.read()
        try:
            await self._until_the_end()
            body = self._body
            ended_us = min(body.now_us, self._last_arrival_us + self._scenario.drain_us)
            await self._gpus.read()
            if ended_us > self._gpus.sampled_us:
                self._gpus.sample(ended_us)
            if self._watcher:
                self._watcher.update(self._progress())
            record = RunRecord(
                requests=body.end_requests(),
                deployments=tuple(one.record() for one in body.controller.manager.deployments.values()),
                gpu_samples=tuple(self._gpus.samples),
                models={endpoint.endpoint_id: endpoint.model.name for endpoint in self._scenario.workload.endpoints},
                ended_us=ended_us,
            )
        finally:
            await self._body.close()
        return Replayed(
            record=record,
            engines=tuple(body.notes.engines),
            notes=(*body.notes.notes, *self._gpus.notes),
            energy_j=self._gpus.energy_j(),
            interrupted=self._interrupted.is_set(),
        )

    async def _until_the_end(self) -> None:
        deadline_us = self._last_arrival_us + self._scenario.drain_us
        doings = [
            self._sample_regularly(),
            *([self._show(self._watcher)] if self._watcher else []),
            *([self._settings.sampler.run()] if self._settings.sampler else []),
        ]
        beside = [asyncio.create_task(doing) for doing in doings]
        ends = [
            asyncio.create_task(self._serve_all()),
            asyncio.create_task(self._body.clock.sleep_until(deadline_us + 1)),
            asyncio.create_task(self._wait_interrupted()),
            self._body.internal_error,
        ]
        try:
            await asyncio.wait([*ends, *beside], return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (*ends[:3], *beside):
                task.cancel()
        for task in (*ends, *beside):
            if task.done() and not task.cancelled():
                task.result()  # a fault of the executor's own comes up here

    async def _wait_interrupted(self) -> None:
        await self._interrupted.wait()

    async def _serve_all(self) -> None:
        """Let everything happen at its time, and wait until every request has ended."""
        for time_us, _, _, happen in heapq.merge(sorted(self._planned(), key=_order), self._arriving(), key=_order):
            if time_us > self._body.now_us:
                await self._body.clock.sleep_until(time_us)
            happen()
        await self._body.drained()

    def _planned(self) -> Iterator[_TimedEvent]:
        """Yield what is known beforehand, but for requests; at one instant in the order of the controller's events."""
        body, scenario = self._body, self._scenario
        for removal in scenario.removals:
            yield removal.at_us, 0, removal.endpoint_id, lambda one=removal: body.remove(one.endpoint_id)  # type: ignore[misc]
        for endpoint in scenario.workload.endpoints:
            yield endpoint.requested_us, 1, endpoint.endpoint_id, lambda one=endpoint: self._ask(one)  # type: ignore[misc]
        for fault in scenario.faults:
            yield (
                fault.at_us,
                2,
                fault.target_id,
                lambda one=fault: body.inject_fault(one.target_id, for_us=one.for_us),  # type: ignore[misc]
            )

    def _arriving(self) -> Iterator[_TimedEvent]:
        for request in requests_of(self._scenario.workload.arrivals):
            yield request.arrival_us, 3, request.request_id, lambda one=request: self._arrive(one)  # type: ignore[misc]

    def _ask(self, endpoint: EndpointSpec) -> None:
        self._asks_left -= 1
        self._body.add_endpoint(endpoint)

    def _arrive(self, request: Request) -> None:
        self._body.arrive(LiveRequestHandle(request, self._prompts.of(request)))

    # Looking on

    async def _show(self, watcher: Watcher) -> None:
        loop = asyncio.get_running_loop()
        while True:
            if watcher.wants_update():
                # Drawing takes longer than a request may wait for its engine.
                await loop.run_in_executor(None, watcher.update, self._progress())
            await asyncio.sleep(_LOOK_EVERY_S)

    def _progress(self) -> Progress:
        return self._body.progress(last_arrival_us=self._last_arrival_us, total=len(self._scenario.workload.arrivals))

    async def _sample_regularly(self) -> None:
        due_us = 0
        while not self._nothing_left():
            due_us += self._scenario.sample_us
            await self._body.clock.sleep_until(due_us)
            await self._gpus.read()
            self._gpus.sample(self._body.now_us)

    def _nothing_left(self) -> bool:
        """Say whether every engine was given up for good: all that is to come would be refused, in real time."""
        failed = [one for one in self._body.controller.manager.deployments.values() if one.plan]
        return bool(failed) and not self._asks_left and all(one.gone_for_good for one in failed)


def _order(happening: _TimedEvent) -> tuple[Micros, int, int]:
    return happening[:3]


def check_real(scenario: ReplaySystem) -> None:
    """Refuse what can be simulated, but not be done for real.

    Raises:
        InputError: a GPU is to fail, or a request is too long to be put to an engine.
    """
    arrivals = scenario.workload.arrivals
    for what, maximum, longest in (
        ("prompt", MAX_PROMPT_TOKENS, arrivals.prompt_tokens.max()),
        ("output", MAX_OUTPUT_TOKENS, arrivals.output_tokens.max()),
    ):
        if longest > maximum:
            raise InputError(f"workload: {what} of {longest:,} tokens; engines are asked for {maximum:,} at most")
    for fault in scenario.faults:
        if fault.target is FaultTarget.GPU:
            raise InputError(
                f"fault of GPU {fault.target_id}: a real GPU cannot be made to fail; "
                "give deployment=NUMBER@TIME, which kills its engine"
            )
