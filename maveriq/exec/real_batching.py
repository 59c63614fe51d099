"""Continuous engines that really run: their reports as events of the controller, tokens of requests, and records.

`maveriq.exec.emulated_batching.EmulatedBatching` is the counterpart for engines that are modelled in this process.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from maveriq.control.engine_recorder import EngineRecorder, EngineRecords
from maveriq.control.events import EngineProgress, EngineUp, FailedAlone, Finished, Started
from maveriq.domain.deployments import EndpointSpec
from maveriq.domain.records import EngineTable, ItlTable
from maveriq.domain.requests import Request
from maveriq.engine.interface import EngineCounters
from maveriq.engine.steps import Emitted
from maveriq.exec.control_lag import ControlLag
from maveriq.exec.messages import StepReport, one_line
from maveriq.exec.scaled_clock import ScaledClock
from maveriq.units import Micros, micros


class SendsToEngines(Protocol):
    """Sends requests to engines, by deployment."""

    def submit_to_engine(self, deployment_id: int, request_id: int, *, is_urgent: bool) -> None:
        """Put a request into an engine's queue."""

    def abort_in_engine(self, deployment_id: int, request_id: int) -> None:
        """End a request."""

    def add_tokens(self, request_id: int, position: int, tokens: tuple[int, ...]) -> None:
        """Give the client tokens of a request, the first of which is at a position of its output."""


@dataclass(slots=True)
class _Request:
    """A request that an engine has (mutable)."""

    prompt_tokens: int
    submitted_us: Micros
    begun: bool = False
    tokens: int = 0


@dataclass(slots=True)
class _Engine:
    """An engine that is up (mutable)."""

    generation: int
    kv_tokens: int
    recorder: EngineRecorder
    reported_us: Micros  # end of the last step
    clock_offset_us: Micros | None = None  # from the engine's clock to that of the run
    requests: dict[int, _Request] = field(default_factory=dict)
    last: StepReport | None = None
    preemptions: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0


class RealBatching:
    """What the continuous engines of a cluster have and report (mutable).

    Args:
        sends: sends requests to the engines and tokens to the clients.
        clock: of the run.
        on_progress: is called with what became of requests.
        sample_us: length of the intervals of the records.
        lag: collects how late the ends of requests are known; None collects nothing.
    """

    def __init__(
        self,
        sends: SendsToEngines,
        clock: ScaledClock,
        on_progress: Callable[[EngineProgress], None],
        sample_us: Micros,
        lag: ControlLag | None,
    ) -> None:
        self._sends = sends
        self._clock = clock
        self._on_progress = on_progress
        self._records = EngineRecords(sample_us)
        self._lag = lag
        self._engines: dict[int, _Engine] = {}

    def loaded(self, deployment_id: int, generation: int, endpoint: EndpointSpec, kv_tokens: int) -> EngineUp:
        """Record that an engine has loaded, with a KV cache for so many tokens, and return the event of that."""
        now_us = self._clock.now_us
        recorder = self._records.recorder(
            deployment_id, endpoint_id=endpoint.endpoint_id, blocks=max(1, kv_tokens), now_us=now_us
        )
        self._engines[deployment_id] = _Engine(generation, kv_tokens, recorder, now_us)
        return EngineUp(deployment_id, generation, kv_tokens)

    def submit(self, deployment_id: int, request: Request, now_us: Micros) -> None:
        """Put a request into an engine's queue, unless the engine has failed."""
        if engine := self._engines.get(deployment_id):
            engine.requests[request.request_id] = _Request(request.prompt_tokens, now_us)
            engine.recorder.joined(now_us)
            self._sends.submit_to_engine(deployment_id, request.request_id, is_urgent=request.priority)

    def abort(self, deployment_id: int, request_id: int, now_us: Micros) -> None:
        """End a request."""
        engine = self._engines.get(deployment_id)
        if engine is not None and engine.requests.pop(request_id, None) is not None:
            engine.recorder.left(now_us)
            engine.recorder.aborted(request_id)
            self._sends.abort_in_engine(deployment_id, request_id)

    def stop(self, deployment_id: int, now_us: Micros) -> None:
        """Forget an engine that was stopped or has failed."""
        if engine := self._engines.pop(deployment_id, None):
            engine.recorder.stopped(now_us, end_us=now_us, steps=0, decodes=0)

    def last_words(self, deployment_id: int, now_us: Micros) -> EngineProgress | None:
        """Return the event by which all requests of an engine that has failed count as begun; None if there is none.

        The step that failed may have been the first with any of them, and nothing reports it. A request that makes
        every engine fail would otherwise be tried for ever.
        """
        engine = self._engines.get(deployment_id)
        if engine is None:
            return None
        waiting = [number for number, request in engine.requests.items() if not request.begun]
        return EngineProgress(deployment_id, engine.generation, started=[Started(number, now_us) for number in waiting])

    def on_report(self, deployment_id: int, generation: int, report: StepReport) -> None:
        """Take the report of a step; one of an engine that was stopped or has failed is ignored."""
        engine = self._engines.get(deployment_id)
        if engine is None or engine.generation != generation:
            return
        now_us = self._clock.now_us
        end_us = self._end_of_step(engine, report, now_us)
        start_us = max(engine.reported_us, end_us - micros(report.step_s / self._clock.time_scale))
        progress = self._progress(deployment_id, engine, report, start_us)
        emitted = self._take_tokens(engine, report, progress)
        self._record(engine, report, progress, emitted, start_us, end_us)
        self._end(engine, report, progress, now_us)
        engine.reported_us, engine.last = end_us, report
        if progress:
            self._on_progress(progress)

    def _end_of_step(self, engine: _Engine, report: StepReport, now_us: Micros) -> Micros:
        """Return when a step ended, on the run's clock: its report may have waited where the executor had no processor.

        The report that came soonest says how the engine's clock and that of the run differ.
        """
        ended_us = micros(report.ended_s / self._clock.time_scale)
        offset_us = now_us - ended_us
        if engine.clock_offset_us is None or offset_us < engine.clock_offset_us:
            engine.clock_offset_us = offset_us
        return max(engine.reported_us, min(now_us, ended_us + engine.clock_offset_us))

    def _progress(self, deployment_id: int, engine: _Engine, report: StepReport, start_us: Micros) -> EngineProgress:
        """Return the controller's event of a step, without first and last tokens."""
        started: list[Started] = []
        cached = {admitted.request_id: admitted.cached_tokens for admitted in report.admitted}
        computed = (given.request_id for given in report.tokens)
        ended = (ended.request_id for ended in report.ended if not ended.failure)
        for request_id in dict.fromkeys((*cached, *computed, *ended)):  # engines may leave admissions out
            request = engine.requests.get(request_id)
            if request is not None and not request.begun:
                request.begun = True
                tokens = min(cached.get(request_id, 0), request.prompt_tokens)
                started.append(Started(request_id, max(start_us, request.submitted_us), tokens))
                engine.prompt_tokens += request.prompt_tokens
                engine.cached_tokens += tokens
        preempted = [number for number in report.preempted if number in engine.requests]
        engine.preemptions += len(preempted)
        return EngineProgress(
            deployment_id, engine.generation, started=started, preempted=preempted, kv_tokens=report.kv_tokens
        )

    def _take_tokens(self, engine: _Engine, report: StepReport, progress: EngineProgress) -> list[Emitted]:
        """Pass tokens on to the clients; return them as they are recorded, and note which requests got their first."""
        ended = {ended.request_id for ended in report.ended}
        emitted, first = [], []
        for given in report.tokens:
            request_id = given.request_id
            request = engine.requests.get(request_id)
            if request is None:
                continue
            self._sends.add_tokens(request_id, request.tokens, given.tokens)
            if not request.tokens:
                first.append(request_id)
            is_first, request.tokens = not request.tokens, request.tokens + len(given.tokens)
            emitted.append(
                Emitted(request_id, 1 if is_first else request.tokens, "length" if request_id in ended else None)
            )
        progress.first_tokens = first
        return emitted

    @staticmethod
    def _record(
        engine: _Engine,
        report: StepReport,
        progress: EngineProgress,
        emitted: list[Emitted],
        start_us: Micros,
        end_us: Micros,
    ) -> None:
        recorder = engine.recorder
        recorder.begin(start_us, report.running + sum(not ended.failure for ended in report.ended), report.kv_tokens)
        recorder.interrupted([number for number in progress.preempted if engine.requests[number].tokens])
        recorder.step_ended(end_us, report.batch_tokens, 0, emitted)

    def _end(self, engine: _Engine, report: StepReport, progress: EngineProgress, now_us: Micros) -> None:
        """Note which requests have ended, and how."""
        finished, failed, without_token = [], [], []
        for ended in report.ended:
            request = engine.requests.pop(ended.request_id, None)
            if request is None:
                continue
            engine.recorder.left(now_us)
            if ended.failure:
                failed.append(FailedAlone(ended.request_id, one_line(f"its engine could not do it {ended.failure}")))
                continue
            if not request.tokens:
                without_token.append(ended.request_id)
            finished.append(Finished(ended.request_id, max(1, request.tokens), ended.steps))
            if self._lag is not None:
                service_us = micros(ended.service_s / self._clock.time_scale)
                self._lag.request_finished(max(0, now_us - request.submitted_us - service_us), service_us)
        progress.finished, progress.failed = finished, failed
        progress.first_tokens = [*progress.first_tokens, *without_token]

    def counters(self) -> dict[int, EngineCounters]:
        """Return the state of each engine, by deployment."""
        return {number: _counters(engine) for number, engine in self._engines.items()}

    def tables(self, ended_us: Micros) -> tuple[EngineTable | None, ItlTable | None]:
        """End all engines, and return the records of what they did."""
        for deployment_id in list(self._engines):
            self.stop(deployment_id, ended_us)
        return self._records.tables(ended_us)


def _counters(engine: _Engine) -> EngineCounters:
    last, requests = engine.last, len(engine.requests)
    running = 0 if last is None else min(requests, last.running)
    return EngineCounters(
        running=running,
        waiting=requests - running,
        used_blocks=last.kv_tokens if last is not None and requests else 0,
        blocks=max(1, engine.kv_tokens),
        preemptions=engine.preemptions,
        prompt_tokens=engine.prompt_tokens,
        cached_tokens=engine.cached_tokens,
    )
