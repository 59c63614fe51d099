"""Continuous engines that are emulated: on the real clock, the same model of each as in the simulator (decision 16).

The engine's process is that of an emulated engine, so that it loads, fails and is supervised as any other. It computes
nothing: what its requests get, and when, is up to the model, which runs here.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from functools import partial

from maveriq.control.engine_recorder import EngineRecords
from maveriq.control.events import EngineProgress, EngineUp
from maveriq.domain.deployments import EndpointSpec
from maveriq.domain.parallel import DeploymentPlan
from maveriq.domain.records import EngineTable, ItlTable
from maveriq.domain.requests import Request
from maveriq.engine.interface import EngineCounters
from maveriq.exec.scaled_clock import ScaledClock
from maveriq.scenario.continuous_engines import ContinuousEngines
from maveriq.scenario.shared_gpus import SharedGpus
from maveriq.scenario.stepped_engine import SteppedEngine
from maveriq.units import Micros


class EmulatedBatching:
    """The models of the continuous engines of a run (mutable).

    Args:
        engines: makes them.
        clock: of the run.
        on_progress: is called with what became of requests, and with how late that is.
        sample_us: length of the intervals of their records.
        working: returns the most engines that have requests on one of some GPUs.
    """

    def __init__(
        self,
        engines: ContinuousEngines,
        clock: ScaledClock,
        on_progress: Callable[[EngineProgress, Micros], None],
        sample_us: Micros,
        working: Callable[[Iterable[int]], int],
    ) -> None:
        self._makes = engines
        self._clock = clock
        self._on_progress = on_progress
        self._records = EngineRecords(sample_us)
        self._engines: dict[int, SteppedEngine] = {}
        self._shared_gpus = SharedGpus(working)
        self._timers: dict[int, asyncio.TimerHandle] = {}
        self._touched: dict[int, None] = {}

    def loaded(self, deployment_id: int, generation: int, endpoint: EndpointSpec, plan: DeploymentPlan) -> EngineUp:
        """Make the model of an engine whose process has loaded, and return the event of its registration."""
        parts = self._makes.parts(endpoint, plan)
        recorder = self._records.recorder(
            deployment_id,
            endpoint_id=endpoint.endpoint_id,
            blocks=parts.engine.pool.blocks,
            now_us=self._clock.now_us,
        )
        engine = self._engines[deployment_id] = SteppedEngine(parts, deployment_id, generation, recorder=recorder)
        self._shared_gpus.add(deployment_id, engine, plan.gpu_ids)
        return EngineUp(deployment_id, generation, engine.kv_capacity_tokens)

    def submit(self, deployment_id: int, request: Request, now_us: Micros) -> None:
        """Put a request into an engine's queue, unless it has failed."""
        if engine := self._engines.get(deployment_id):
            engine.submit(now_us, request)
            self._touched[deployment_id] = None

    def abort(self, deployment_id: int, request_id: int, now_us: Micros) -> None:
        """End a request."""
        if engine := self._engines.get(deployment_id):
            engine.abort(now_us, request_id)
            self._touched[deployment_id] = None

    def stop(self, deployment_id: int, now_us: Micros) -> None:
        """Forget an engine that was stopped or has failed."""
        engine = self._engines.pop(deployment_id, None)
        if engine is not None:
            engine.stop(now_us)
            self._shared_gpus.drop(deployment_id)
        self._touched.pop(deployment_id, None)
        if timer := self._timers.pop(deployment_id, None):
            timer.cancel()

    def compose(self, now_us: Micros) -> None:
        """Let engines that got or lost requests, or have ended a step, start what comes next."""
        touched, self._touched = self._touched, {}
        touched |= dict.fromkeys(self._shared_gpus.slow_down(now_us))
        for deployment_id in touched:
            engine = self._engines[deployment_id]
            engine.compose(now_us)
            if timer := self._timers.pop(deployment_id, None):
                timer.cancel()
            if (wake_us := engine.next_us) is not None:
                self._timers[deployment_id] = self._clock.call_at(wake_us, partial(self._wake, deployment_id))

    def _wake(self, deployment_id: int) -> None:
        """End the steps that are due; where the clock is late, several one after the other."""
        engine = self._engines.get(deployment_id)
        now_us = self._clock.now_us
        while engine is not None and (due_us := engine.next_us) is not None and due_us <= now_us:
            progress = engine.finish(due_us)
            engine.compose(due_us)
            if progress:
                self._on_progress(progress, now_us - due_us)
                engine = self._engines.get(deployment_id)
        self._touched[deployment_id] = None
        if engine is None:
            del self._touched[deployment_id]
        self.compose(now_us)

    def counters(self) -> dict[int, EngineCounters]:
        """Return the state of each engine, by deployment."""
        return {number: engine.engine.counters for number, engine in self._engines.items()}

    def tables(self, ended_us: Micros) -> tuple[EngineTable | None, ItlTable | None]:
        """End all engines, and return the records of what they did."""
        for deployment_id in list(self._engines):
            self.stop(deployment_id, ended_us)
        return self._records.tables(ended_us)
