"""The simulator: a SimPy clock feeds the controller, and estimates take the place of engines.

SimPy holds the event queue; each timeout carries one event for the controller. Events of the same
instant go to the controller together, and it sorts them, so that the order in which they were
scheduled does not matter. Steps of continuous engines end first, and new ones are composed last.

Ends of steps are most of what happens, and are no events of SimPy: they wait in a heap of their own, and those before
SimPy's next event happen one after the other without it.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from heapq import heappop, heappush
from typing import TYPE_CHECKING, assert_never

import simpy

from maveriq.control.controller import Controller, snapshot
from maveriq.control.engine_recorder import EngineRecords
from maveriq.control.events import (
    Abort,
    Action,
    EndpointAdded,
    EndpointRemoved,
    EngineDown,
    EngineRepaired,
    EngineUp,
    Event,
    Execute,
    ExecutionFinished,
    GpuDown,
    GpuUp,
    RequestArrived,
    StartEngine,
    StartProfile,
    StopEngine,
    StopProfile,
    Submit,
)
from maveriq.domain.deployments import Batching, EndpointSpec
from maveriq.domain.faults import Fault, FaultTarget
from maveriq.domain.parallel import DeploymentPlan
from maveriq.domain.progress import Progress, Watcher
from maveriq.domain.records import GpuSample, RunRecord
from maveriq.domain.requests import RequestStatus
from maveriq.errors import InvariantError
from maveriq.scenario.clocked_engine import ClockedEngine, clocked_engine
from maveriq.scenario.shared_gpus import SharedGpus
from maveriq.scenario.system import ReplaySystem
from maveriq.sim.contention import ContentionModel, ScheduledEnd
from maveriq.units import Micros
from maveriq.workload.client import Client

if TYPE_CHECKING:
    from maveriq.sim.fast_forward import FastForward

_STEPS_BETWEEN_UPDATES = 256
_OBJECTS_BETWEEN_COLLECTIONS = 50_000


def simulate(system: ReplaySystem, watcher: Watcher | None = None) -> RunRecord:
    """Simulate a run from its first event to its end, and return its record."""
    simulation = _Simulation(system, watcher)
    with _rare_collections():
        return simulation.run()


@contextmanager
def _rare_collections() -> Iterator[None]:
    """Look for cyclic garbage rarely: a simulation makes many small objects, and next to none in cycles."""
    before = gc.get_threshold()
    gc.set_threshold(_OBJECTS_BETWEEN_COLLECTIONS, *before[1:])
    try:
        yield
    finally:
        gc.set_threshold(*before)


class _Simulation:
    """One run. SimPy's time is in whole microseconds; `_now_us` is the instant that is handled, at or after it."""

    def __init__(self, system: ReplaySystem, watcher: Watcher | None) -> None:
        arrivals = system.workload.arrivals
        self._system = system
        self._watcher = watcher
        self._env = simpy.Environment()
        # Whether it is not known beforehand when the last request is sent.
        self._reacts = system.workload.reacts or system.max_in_flight is not None
        self._controller = Controller(
            system.cluster,
            system.policy,
            system.settings,
            system.predict_service_time,
            on_request_end=self._request_ended if self._reacts else None,
        )
        self._service_times = system.service_times
        self._client = Client(arrivals, concurrency=system.workload.concurrency, max_in_flight=system.max_in_flight)
        self._client_wake_us: Micros | None = None  # the last one that was scheduled for it
        self._contention = ContentionModel(system.cluster, system.service_times.contention)
        self._last_endpoint_us = max((endpoint.requested_us for endpoint in system.workload.endpoints), default=0)
        self._last_arrival_us = int(arrivals.arrival_us[-1])
        self._plans: dict[int, DeploymentPlan] = {}
        self._engines: dict[int, ClockedEngine] = {}  # the continuous ones, by deployment
        self._engine_records = EngineRecords(system.sample_us)
        self._shared_gpus = SharedGpus(self._controller.manager.engines_working)
        self._to_compose: dict[int, None] = {}  # deployments whose engines may have something to start
        self._engine_wakes: list[tuple[Micros, int]] = []  # a heap; those that engines no longer want remain in it
        self._now_us: Micros = 0
        self._is_unsettled = False  # events of this instant have happened, and are not handled
        self._inbox: list[Event] = []
        self._last_wake_us: Micros | None = None  # the last wake-up that was scheduled
        self._steps = 0
        self._samples: list[GpuSample] = []
        self._sampled_us: Micros = 0
        # Whether the client waits for nothing, and only continuous engines serve: it then needs no events of SimPy.
        self._has_plain_client = not self._reacts and all(
            endpoint.batching is Batching.CONTINUOUS for endpoint in system.workload.endpoints
        )
        self._may_have_engines = any(endpoint.batching is Batching.CONTINUOUS for endpoint in system.workload.endpoints)
        self._fast_forward: FastForward | None = None  # once there is a compiled engine
        self._busy_us = [0] * len(system.cluster)

    def run(self) -> RunRecord:
        """Run until every request has ended, at the latest until the drain time is over."""
        self._start_ready(self._system.workload.endpoints)
        for endpoint in self._system.workload.endpoints:
            if not endpoint.ready_at_start:
                self._post(endpoint.requested_us, EndpointAdded(endpoint))
        for fault in self._system.faults:
            self._post_fault(fault)
        for removal in self._system.removals:
            self._post(removal.at_us, EndpointRemoved(removal.endpoint_id))
        if self._has_plain_client:
            self._at(int(self._system.workload.arrivals.arrival_us[0]), self._wake_client)
        else:
            self._wake_client_later()
        self._at(self._system.sample_us, self._sample_regularly)
        if self._reacts:
            self._env.run()  # until `_stop`, or until nothing is left to happen
            return self._record(max(self._now_us, self._event_us))
        deadline_us = self._last_arrival_us + self._system.drain_us
        # Events at the deadline itself still happen.
        self._env.run(until=deadline_us + 1)
        return self._record(min(max(self._now_us, self._event_us), deadline_us))

    def _start_ready(self, endpoints: Iterable[EndpointSpec]) -> None:
        """Start the engines that are up before the first request arrives."""
        added = [EndpointAdded(endpoint) for endpoint in endpoints if endpoint.ready_at_start]
        if not added:
            return
        actions = self._controller.handle(0, added)
        self._controller.handle(0, [self._load(action) for action in actions if isinstance(action, StartEngine)])

    # Scheduling

    @property
    def _event_us(self) -> Micros:
        """The time of SimPy's event."""
        return self._env.now  # type: ignore[return-value]  # every delay is a whole number

    def _at(self, time_us: Micros, callback: Callable[[simpy.Event], None]) -> None:
        self._env.timeout(time_us - self._env.now).callbacks.append(callback)

    def _post(self, time_us: Micros, event: Event) -> None:
        """Schedule an event for the controller."""
        self._at(time_us, partial(self._deliver, event))

    def _deliver(self, event: Event, _: simpy.Event) -> None:
        self._inbox.append(event)
        self._settle(self._event_us)

    def _wake_client_later(self) -> None:
        """Schedule when the client sends its next request, unless that is scheduled or not known."""
        wake_us = self._client.next_us
        if not self._has_plain_client and wake_us is not None and wake_us != self._client_wake_us:
            self._client_wake_us = wake_us
            self._at(wake_us, self._wake_client)

    def _wake_client(self, _: simpy.Event) -> None:
        now_us = self._event_us
        self._send(now_us)
        self._settle(now_us)

    def _send(self, now_us: Micros) -> bool:
        """Let the client send what is due and what its limit allows; return whether it sent anything."""
        sent = self._client.send(now_us)
        self._inbox.extend(map(RequestArrived, sent))
        self._wake_client_later()
        if sent and self._reacts:
            self._last_arrival_us = now_us
            if not self._client.unsent:
                self._at(now_us + self._system.drain_us + 1, _stop)
        return bool(sent)

    def _request_ended(self, request_id: int) -> None:
        self._client.ended(request_id, self._now_us)

    def _settle(self, now_us: Micros) -> None:
        """Handle this instant once no more of SimPy's events are due at it, then the ends of steps up to the next one.

        Raises:
            StopSimulation: every request has ended; this ends SimPy's `run`.
        """
        if self._env.peek() <= now_us:
            self._is_unsettled = True
            return  # the last event of this instant settles
        self._is_unsettled = False
        if self._has_plain_client:
            self._send_due(now_us)
        self._handle_instant(now_us, has_events=True)
        while self._may_have_engines:
            next_event_us = self._env.peek()
            self._fast_forward_to(next_event_us)
            wakes = [self._next_engine_wake(), self._client.next_us if self._has_plain_client else None]
            wake_us = min((wake_us for wake_us in wakes if wake_us is not None), default=None)
            if wake_us is None or wake_us >= next_event_us:
                return
            if self._has_plain_client:
                self._send_due(wake_us)
            self._handle_instant(wake_us, has_events=False)

    def _send_due(self, now_us: Micros) -> None:
        """Let a client send what is due that SimPy does not wake."""
        if self._client.next_us is not None and self._client.next_us <= now_us:
            self._send(now_us)

    def _fast_forward_to(self, next_event_us: float) -> None:
        """Do at once what happens before SimPy's next event, or a part of it.

        Raises:
            StopSimulation: every request has ended.
        """
        if self._fast_forward is None:
            return
        last_us = self._fast_forward.run(int(min(next_event_us, 1 << 62)))
        if last_us is None:
            return
        self._now_us = max(self._now_us, last_us)
        for number, engine in self._engines.items():
            if engine.next_us is not None:
                heappush(self._engine_wakes, (engine.next_us, number))
        if self._watcher:
            self._update(self._watcher, self._now_us)
        if not self._client.unsent and self._all_ended():
            raise simpy.core.StopSimulation("every request has ended")

    def _handle_instant(self, now_us: Micros, *, has_events: bool) -> None:
        """End the steps that are due, pass everything to the controller, and start the steps that follow.

        Args:
            now_us: the instant.
            has_events: whether something else than the end of a step happens; else the controller may learn nothing.
        """
        self._now_us = now_us
        if self._engine_wakes:
            self._finish_steps(now_us)
        concerns_controller = has_events or bool(self._inbox)
        if concerns_controller:
            self._handle_inbox(now_us)
            while self._client.may_send and self._send(now_us):  # requests that ended have made room for others
                self._handle_inbox(now_us)
            wake_us = self._controller.wake_us
            if wake_us is not None and wake_us != self._last_wake_us:
                self._last_wake_us = wake_us
                self._at(wake_us, self._wake)
            if self._watcher:
                self._update(self._watcher, now_us)
            if self._engines:
                self._to_compose.update(dict.fromkeys(self._shared_gpus.slow_down(now_us)))
        if self._to_compose:
            self._compose(now_us)
        if concerns_controller and not self._client.unsent and self._all_ended():
            raise simpy.core.StopSimulation("every request has ended")

    def _handle_inbox(self, now_us: Micros) -> None:
        events, self._inbox = self._inbox, []
        actions = self._controller.handle(now_us, events)
        if self._system.faults:
            self._schedule_ends(self._contention.abort(now_us, self._is_running))
            self._drop_failed_engines()
        for action in actions:
            self._carry_out(action, now_us)

    def _wake(self, _: simpy.Event) -> None:
        self._settle(self._event_us)

    def _all_ended(self) -> bool:
        tracker = self._controller.tracker
        still_open = tracker.count(RequestStatus.WAITING) + tracker.count(RequestStatus.RUNNING)
        return not still_open and self._now_us >= self._last_endpoint_us

    # Actions of the controller

    def _carry_out(self, action: Action, now_us: Micros) -> None:
        match action:
            case Execute():
                self._execute(action, now_us)
            case Submit(deployment_id, request):
                if engine := self._engines.get(deployment_id):  # else it failed at this instant, too
                    engine.submit(now_us, request)
                    self._to_compose[deployment_id] = None
            case Abort(deployment_id, request_id):
                if engine := self._engines.get(deployment_id):
                    engine.abort(now_us, request_id)
                    self._to_compose[deployment_id] = None
            case StartEngine():
                up = self._load(action)
                self._post(now_us + self._system.load_time(action.plan), up)
            case StopEngine(deployment_id):  # at once; the controller has freed its memory
                self._drop_engine(deployment_id)
            case StartProfile() | StopProfile():
                raise InvariantError("a simulation measures no profiles, and none was requested")
            case _ as never:
                assert_never(never)

    def _load(self, action: StartEngine) -> EngineUp:
        """Make the engine of a deployment, and return the event of its registration."""
        number = action.deployment_id
        self._plans[number] = action.plan
        endpoint = self._controller.manager.deployments[number].endpoint
        if endpoint.batching is Batching.CONTINUOUS:
            if self._system.engines is None:
                raise InvariantError(
                    f"endpoint {endpoint.endpoint_id} batches continuously, and the system has no engines"
                )
            parts = self._system.engines.parts(endpoint, action.plan)
            recorder = self._engine_records.recorder(
                number,
                endpoint_id=endpoint.endpoint_id,
                blocks=parts.engine.pool.blocks,
                now_us=self._now_us,
            )
            engine = self._engines[number] = clocked_engine(
                parts, number, action.generation, recorder=recorder, arrivals=self._system.workload.arrivals
            )
            self._shared_gpus.add(number, engine, action.plan.gpu_ids)
            if self._has_plain_client and self._fast_forward is None and engine.is_compiled:
                from maveriq.sim.fast_forward import FastForward  # late: imports numba

                arrivals = self._system.workload.arrivals
                self._fast_forward = FastForward(
                    self._controller, self._client, arrivals, self._engines, self._shared_gpus.shares
                )
            return EngineUp(number, action.generation, engine.kv_capacity_tokens)
        return EngineUp(number, action.generation)

    # Continuous engines

    def _next_engine_wake(self) -> Micros | None:
        """Return when the next engine has something to do; None if none has."""
        wakes = self._engine_wakes
        while wakes:
            wake_us, number = wakes[0]
            engine = self._engines.get(number)
            if engine is not None and engine.next_us == wake_us:
                return wake_us
            heappop(wakes)  # it wants another one, or has stopped
        return None

    def _finish_steps(self, now_us: Micros) -> None:
        """End the steps that are due at this instant."""
        wakes = self._engine_wakes
        while wakes and wakes[0][0] <= now_us:
            wake_us, number = heappop(wakes)
            engine = self._engines.get(number)
            if engine is None or engine.next_us != wake_us:
                continue
            self._to_compose[number] = None
            progress = engine.finish(now_us)
            if progress:
                self._inbox.append(progress)

    def _compose(self, now_us: Micros) -> None:
        """Let engines start their next steps, and note when these end."""
        for number in self._to_compose:
            engine = self._engines[number]
            engine.compose(now_us)
            wake_us = engine.next_us
            if wake_us is not None:
                heappush(self._engine_wakes, (wake_us, number))
        self._to_compose.clear()

    def _drop_failed_engines(self) -> None:
        deployments = self._controller.manager.deployments
        for number in [number for number in self._engines if not deployments[number].alive]:
            self._drop_engine(number)

    def _drop_engine(self, number: int) -> None:
        if engine := self._engines.pop(number, None):
            engine.stop(self._now_us)
            self._shared_gpus.drop(number)
        self._to_compose.pop(number, None)

    # Exclusive engines

    def _execute(self, action: Execute, now_us: Micros) -> None:
        plan = self._plans[action.deployment_id]
        first_token_us, service_us = self._service_times.times_us(plan, action.requests)
        finished = ExecutionFinished(action.deployment_id, action.execution_id, now_us + first_token_us)
        ends = self._contention.start(now_us, finished, plan, action.requests, service_us=service_us)
        self._schedule_ends(ends)

    def _schedule_ends(self, ends: Iterable[ScheduledEnd]) -> None:
        for finished, finish_us in ends:
            self._at(finish_us, partial(self._end_execution, finished))

    def _end_execution(self, finished: ExecutionFinished, _: simpy.Event) -> None:
        now_us = self._event_us
        ends = self._contention.end(now_us, finished)
        if ends is not None:
            self._schedule_ends(ends)
            self._inbox.append(finished)
        self._settle(now_us)

    def _is_running(self, deployment_id: int, execution_id: int) -> bool:
        deployment = self._controller.manager.deployments[deployment_id]
        return bool(deployment.running) and deployment.execution_id == execution_id

    def _post_fault(self, fault: Fault) -> None:
        """Schedule a fault, and its end if it has one."""
        returns = fault.for_us is not None
        down: Event
        up: Event
        if fault.target is FaultTarget.GPU:
            down, up = GpuDown(fault.target_id, returns), GpuUp(fault.target_id)
        else:
            down, up = EngineDown(fault.target_id, returns), EngineRepaired(fault.target_id)
        self._post(fault.at_us, down)
        if fault.for_us is not None:
            self._post(fault.at_us + max(1, fault.for_us), up)  # after the fault

    # Live views and GPU samples

    def _update(self, watcher: Watcher, now_us: Micros) -> None:
        self._steps += 1
        if self._steps % _STEPS_BETWEEN_UPDATES == 0 and watcher.wants_update():
            watcher.update(self._progress(now_us))

    def _progress(self, now_us: Micros) -> Progress:
        return snapshot(
            self._controller,
            now_us,
            last_arrival_us=now_us if self._reacts and self._client.unsent else self._last_arrival_us,
            total=len(self._system.workload.arrivals),
            engines={number: engine.counters for number, engine in self._engines.items()},
        )

    def _sample_regularly(self, _: simpy.Event) -> None:
        now_us = self._event_us
        self._sample(now_us)
        nothing_due = self._env.peek() == math.inf and not self._is_unsettled
        if nothing_due and self._next_engine_wake() is None:  # whoever waits now waits for ever
            raise simpy.core.StopSimulation("nothing will happen any more")
        self._at(now_us + self._system.sample_us, self._sample_regularly)
        self._settle(now_us)

    def _sample(self, now_us: Micros) -> None:
        manager = self._controller.manager
        for gpu_id, busy_before_us in enumerate(self._busy_us):
            busy_us = manager.busy_us(gpu_id, now_us)
            self._busy_us[gpu_id] = busy_us
            self._samples.append(
                GpuSample(
                    time_us=now_us,
                    gpu_id=gpu_id,
                    memory_bytes=manager.used_bytes(gpu_id),
                    busy_share=(busy_us - busy_before_us) / (now_us - self._sampled_us),
                )
            )
        self._sampled_us = now_us

    def _record(self, ended_us: Micros) -> RunRecord:
        controller = self._controller
        for request in self._client.left(ended_us):  # the run ended before the client could send them
            controller.tracker.arrived(request)
        if ended_us > self._sampled_us:
            self._sample(ended_us)
        if self._watcher:
            self._watcher.update(self._progress(ended_us))
        for engine in self._engines.values():
            engine.stop(ended_us)
        engines, itl = self._engine_records.tables(ended_us)
        return RunRecord(
            requests=controller.tracker.close(),
            deployments=tuple(deployment.record() for deployment in controller.manager.deployments.values()),
            gpu_samples=tuple(self._samples),
            models={endpoint.endpoint_id: endpoint.model.name for endpoint in self._system.workload.endpoints},
            ended_us=ended_us,
            engines=engines,
            itl=itl,
        )


def _stop(_: simpy.Event) -> None:
    raise simpy.core.StopSimulation("the drain time is over")
