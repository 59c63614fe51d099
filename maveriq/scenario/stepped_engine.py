"""One model of a continuous engine on a clock: when its steps end, and what became of its requests (decision 16).

`SteppedEngine` knows no event queue. Its driver calls it whenever `next_us` says, and at one instant in this order:
`finish` ends the step that is due, `submit` and `abort` hand over what the controller decided, and `compose` starts
what comes next. Between events that matter, steps are skipped: `Engine.quiet_run` says how many only decode, and
`StepTimer` how long they take together.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from typing import ClassVar, NamedTuple

from maveriq.control.engine_recorder import EngineRecorder
from maveriq.control.engine_series import TokenGaps
from maveriq.control.events import EngineProgress, Finished, Started
from maveriq.domain.requests import Request
from maveriq.engine.interface import EngineCounters
from maveriq.engine.requests import EngineRequest, RequestId, engine_request
from maveriq.engine.steps import Emitted, Step
from maveriq.estimate.pipeline_timer import Pipeline, PipelineTimer
from maveriq.estimate.step_timer import DecodeLine, StepTimer, Ticks, earliest_at, micros_after, ticks
from maveriq.scenario.continuous_engines import EngineParts
from maveriq.units import MICROS_PER_SECOND, Micros

_MIN_SKIPPED = 2  # a single step is no run


class _Arrival(NamedTuple):
    """A request on its way to the engine's queue; ordered by time, then by submission."""

    ready_us: Micros
    number: int
    request: EngineRequest


@dataclass(slots=True)
class _InFlight:
    """A step that was composed.

    Args:
        duration: how long it takes, with the GPU for itself; 0 in a pipeline.
        tokens: that it computes.
        step: what it computes; None where steps were skipped: it then decodes.
        ends_none: where steps were skipped, whether no request gets its last token in it.
        start: in a pipeline, when its first part begins it.
        end: in a pipeline, when its last part ends it.
    """

    duration: Ticks
    tokens: int
    step: Step | None
    ends_none: bool = False
    start: Ticks = 0
    end: Ticks = 0

    @property
    def may_be_skipped(self) -> bool:
        """Whether it is certain that no request gets its first or its last token in it."""
        step = self.step
        if step is None:
            return self.ends_none
        if step.chunks or step.preempted:
            return False
        return not step.scheduled or all(
            entry.sequence.prompt_tokens < entry.sequence.length < entry.sequence.end - 1 for entry in step.scheduled
        )


@dataclass(slots=True)
class _SkippedSteps:
    """Steps that are taken at once.

    Args:
        start: when the first one starts.
        lead: duration of the step that was composed before and runs first; 0 if there is none.
        line: time of each further one.
        decodes: sequences of each further one.
        context_tokens: tokens that these attend to in the first of the further ones.
        steps: how many run, the one in front included.
        most: how many ran if nothing came in between; in the step behind these, a request may get its last token.
        slowdown: factor on all their times.
    """

    start: Ticks
    lead: Ticks
    line: DecodeLine
    decodes: int
    context_tokens: int
    steps: int
    most: int
    slowdown: int

    @property
    def end(self) -> Ticks:
        """When they have run."""
        further = self.steps - 1 if self.lead else self.steps
        return self.start + self.slowdown * (self.lead + self.line.sum(self.context_tokens, further))

    def cut(self, not_before: Ticks) -> Ticks:
        """Keep the steps, at least one, up to the first that ends at `not_before` or later; return when that ends."""
        led, lead_steps = self.start + self.slowdown * self.lead, 1 if self.lead else 0
        if lead_steps and led >= not_before:
            self.steps = 1
            return led
        at_least = -(-(not_before - led) // self.slowdown)
        further, duration = self.line.steps_until(self.context_tokens, self.steps - lead_steps, max(1, at_least))
        self.steps = lead_steps + further
        return led + self.slowdown * duration


class SteppedEngine:
    """A continuous engine on a clock (mutable).

    Args:
        parts: what it is made of.
        deployment_id: its deployment, for the events that it returns.
        generation: of the deployment's engine.
        recorder: adds up what it does; None for one of its own.
        skips_steps: whether steps are skipped. Nothing else depends on it.
    """

    is_compiled: ClassVar[bool] = False

    def __init__(
        self,
        parts: EngineParts,
        deployment_id: int,
        generation: int,
        *,
        recorder: EngineRecorder | None = None,
        skips_steps: bool = True,
    ) -> None:
        self.engine = parts.engine
        self.recorder = recorder or EngineRecorder(MICROS_PER_SECOND, TokenGaps())
        self._timer = parts.timer
        self._pipeline = Pipeline(parts.timer.parts) if isinstance(parts.timer, PipelineTimer) else None
        self._slowdown = 1
        self._admission_delay_us = parts.admission_delay_us
        self._deployment_id = deployment_id
        self._generation = generation
        self._skips_steps = skips_steps
        self._arrivals: list[_Arrival] = []
        self._submitted = 0
        self._requests = 0  # that have not ended
        self._aborts: list[int] = []
        self._unstarted: set[RequestId] = set()
        self._in_flight: deque[_InFlight] = deque()
        self._skipped: _SkippedSteps | None = None
        self._boundary: Ticks | None = None  # when what runs now ends
        # An earlier step boundary, at which there will be nothing to report. It is passed together with the later one,
        # unless a request comes before.
        self._passed: Ticks | None = None
        self._free_since: Ticks | None = None  # the last boundary, if the next step starts there
        self.next_us: Micros | None = None
        """When to call `finish` and `compose` next; None if nothing will happen by itself."""
        self._nothing = EngineProgress(deployment_id, generation)
        self._start_us: Micros = 0  # when what runs now began

    @property
    def kv_capacity_tokens(self) -> int:
        """Tokens that its KV cache holds."""
        return self.engine.pool.tokens

    @property
    def counters(self) -> EngineCounters:
        """The state of the engine."""
        return self.engine.counters

    def submit(self, now_us: Micros, request: Request) -> None:
        """Put a request into the engine's queue, which it reaches after the delay of its prompt."""
        self.recorder.joined(now_us)
        ready_us = now_us + self._admission_delay_us(request.prompt_tokens, self._requests)
        self._submitted += 1
        self._requests += 1
        heappush(self._arrivals, _Arrival(ready_us, self._submitted, engine_request(request)))
        if self._boundary is None:
            self.next_us = self._arrivals[0].ready_us
        else:
            self._cut(self._arrivals[0].ready_us)

    def slow_down(self, now_us: Micros, slowdown: int) -> bool:
        """Let steps that start from now on take so many times as long; return whether that is new.

        Args:
            now_us: the present; a step that runs keeps its pace.
            slowdown: the engines that share its GPU's time, itself included.
        """
        if slowdown == self._slowdown:
            return False
        self._slowdown = slowdown
        self._cut(now_us)
        return True

    def abort(self, now_us: Micros, request_id: int) -> None:
        """End a request at the next step boundary."""
        self.recorder.left(now_us)
        self._requests -= 1
        self._aborts.append(request_id)
        self._cut(now_us)

    def stop(self, now_us: Micros) -> None:
        """Compute no more, and forget all requests."""
        if self._passed is not None:
            if micros_after(self._passed) <= now_us:
                self._pass()
            else:
                self._boundary, self._passed = self._passed, None
        if self._boundary is not None:
            steps, decodes = (self._skipped.steps, self._skipped.decodes) if self._skipped is not None else (1, 0)
            self.recorder.stopped(now_us, end_us=micros_after(self._boundary), steps=steps, decodes=decodes)
        else:
            self.recorder.stopped(now_us, end_us=now_us, steps=0, decodes=0)
        self._boundary = self.next_us = None
        self._arrivals.clear()

    def finish(self, now_us: Micros) -> EngineProgress:
        """End what is due now, and return what became of requests in it; nothing if nothing is due."""
        end_us = self.next_us
        if self._boundary is None or end_us is None or end_us > now_us:
            return self._nothing
        if self._passed is not None:
            self._pass()
        self._free_since, self._boundary, self.next_us = self._boundary, None, None
        started: list[Started] = []
        preempted: list[int] = []
        if self._skipped is not None:
            emitted = self._finish_skipped(self._skipped, end_us)
        else:
            if self._aborts:
                self._apply_aborts()
            ended = self._in_flight.popleft()
            if (step := ended.step) is not None:
                if self._unstarted:
                    start_us = self._start_us if self._pipeline is None else micros_after(ended.start)
                    started = self._first_computed_in(step, start_us)
                if step.preempted:
                    preempted = [int(sequence.request.request_id) for sequence in step.preempted]
                    self.recorder.preempted(step.preempted)
            emitted = self._end_step(ended, end_us)
        if not (started or preempted or emitted):
            return self._nothing
        finished = [
            Finished(int(token.request_id), token.output_tokens, token.steps)
            for token in emitted
            if token.finish_reason is not None
        ]
        if finished:
            unwanted = sum(1 for end in finished if end.request_id in self._aborts) if self._aborts else 0
            self.recorder.left(end_us, len(finished) - unwanted)
            self._requests -= len(finished) - unwanted
        return EngineProgress(
            self._deployment_id,
            self._generation,
            started=started,
            preempted=preempted,
            first_tokens=[int(token.request_id) for token in emitted if token.output_tokens == 1],
            finished=finished,
            kv_tokens=self.engine.pool.used_tokens,
        )

    def compose(self, now_us: Micros) -> None:
        """Take the requests that have reached the queue and, unless a step runs, start the next one."""
        if self._boundary is not None:
            return
        if self._aborts:
            self._apply_aborts()
        while self._arrivals and self._arrivals[0].ready_us <= now_us:
            request = heappop(self._arrivals).request
            self._unstarted.add(request.request_id)
            self.engine.submit(request)
        start = ticks(now_us) if self._free_since is None else self._free_since
        self._free_since = None
        running = len(self.engine.running)
        if self._skip(start):
            self._begin(start, running)
        elif self._compose_steps(start, running):
            self._boundary = self._in_flight[0].end or start + self._slowdown * self._in_flight[0].duration
            self._pass_later()
            self.next_us = micros_after(self._boundary)
        else:
            self.next_us = self._arrivals[0].ready_us if self._arrivals else None

    def _compose_steps(self, start: Ticks, running: int) -> bool:
        """Compose steps while one runs that starts now; return whether one does."""
        in_flight, engine = self._in_flight, self.engine
        while (step := engine.next_step()) is not None:
            if not in_flight:
                running = len(engine.running)
            in_flight.append(self._composed(step, start))
        if not in_flight:
            return False
        self._begin(start, running)
        return True

    def _composed(self, step: Step, now: Ticks) -> _InFlight:
        """Return a step that is composed now; a pipeline begins it as soon as it can, other engines in its turn."""
        timer = self._timer
        if isinstance(timer, StepTimer):
            return _InFlight(timer.step(step.decodes, step.context_tokens, step.chunks), step.tokens, step)
        assert self._pipeline is not None  # noqa: S101  # made with the timer
        times = timer.step(step.decodes, step.context_tokens, step.chunks)
        start, end = self._pipeline.enter(now, [self._slowdown * time for time in times])
        return _InFlight(0, step.tokens, step, start=start, end=end)

    def _begin(self, start: Ticks, running: int) -> None:
        pool = self.engine.pool
        self._start_us = micros_after(start)
        self.recorder.begin(self._start_us, running, pool.blocks - pool.free_blocks)

    # Boundaries that are passed

    def _pass_later(self) -> None:
        """Pass the end of the step that runs if there is nothing to report, and a prompt is computed behind it."""
        in_flight, boundary = self._in_flight, self._boundary
        if not self._skips_steps or self._pipeline is not None or len(in_flight) != 2 or boundary is None:
            return
        behind = in_flight[1].step
        if behind is None or not behind.chunks or not in_flight[0].may_be_skipped:
            return
        if not self._arrivals or self._arrivals[0].ready_us > micros_after(boundary):
            self._passed = boundary
            self._boundary = boundary + self._slowdown * in_flight[1].duration

    def _pass(self) -> None:
        """Do what happens at the boundary that is passed: a step ends, the next starts, and another is composed."""
        passed = self._passed
        assert passed is not None  # noqa: S101
        self._passed = None
        end_us = micros_after(passed)
        if self._skipped is not None:
            self._finish_skipped(self._skipped, end_us)
        else:
            ended = self._in_flight.popleft()
            self._end_step(ended, end_us)
        self._compose_steps(passed, len(self.engine.running))

    def _end_step(self, ended: _InFlight, end_us: Micros) -> list[Emitted]:
        """Take the tokens of a step that has run, and record it."""
        step = ended.step
        together = ended.tokens if step is None else step.together
        emitted = self.engine.finish_step()
        if step is None:
            together -= len(emitted)
        self.recorder.step_ended(end_us, ended.tokens, together, emitted)
        return emitted

    # Steps that are skipped

    def _skip(self, start: Ticks) -> bool:
        """Plan to skip the next steps, and return whether there are any to skip."""
        in_flight, timer = self._in_flight, self._timer
        if not self._skips_steps or isinstance(timer, PipelineTimer):
            return False
        if len(in_flight) > 1 or (in_flight and not in_flight[0].may_be_skipped):
            return False
        quiet = self.engine.quiet_run()
        if quiet is None or quiet.steps < _MIN_SKIPPED:
            return False
        lead = in_flight[0].duration if in_flight else 0
        decodes, context_tokens = quiet.decodes, quiet.context_tokens
        line = timer.decode_line(decodes)
        steps, slowdown = quiet.steps, self._slowdown
        self._skipped = _SkippedSteps(start, lead, line, decodes, context_tokens, steps, steps, slowdown)
        self._boundary = self._skipped.end
        if lead:  # the last of them composes one more, in which a request gets its last token
            self._passed = self._boundary
            self._boundary += slowdown * line.at(context_tokens + (steps - 1) * decodes)
        self.next_us = micros_after(self._boundary)
        if self._arrivals:
            self._cut(self._arrivals[0].ready_us)
        return True

    def _cut(self, at_us: Micros) -> None:
        """Stop at the first step boundary at `at_us` or later, where several are to be passed at once."""
        if self.next_us is None or self.next_us <= at_us:
            return
        if self._passed is not None:
            if micros_after(self._passed) < at_us:
                return
            self._boundary, self._passed = self._passed, None
            self.next_us = micros_after(self._boundary)
        if self._skipped is not None and self.next_us > at_us:
            self._boundary = self._skipped.cut(earliest_at(at_us))
            self.next_us = micros_after(self._boundary)

    def _finish_skipped(self, skipped: _SkippedSteps, end_us: Micros) -> list[Emitted]:
        """Let the engine take the steps that were skipped, and return the tokens that the last of them lists."""
        steps, decodes, context_tokens = skipped.steps, skipped.decodes, skipped.context_tokens
        line, lead, slowdown, recorder = skipped.line, skipped.lead, skipped.slowdown, self.recorder
        advanced = self.engine.advance(steps)
        self._skipped = None
        if lead:  # one more was composed, and starts now
            self._in_flight.clear()
            duration = line.at(context_tokens + (steps - 1) * decodes)
            self._in_flight.append(_InFlight(duration, decodes, None, ends_none=steps < skipped.most))
        else:
            lead = line.at(context_tokens)
            context_tokens += decodes
        blocks = decodes * steps // self.engine.pool.block_size
        recorder.run_ended(end_us, micros_after(skipped.start + slowdown * lead), steps, decodes, blocks, advanced.last)
        for first, growth, many in line.pieces(context_tokens, steps - 1):
            recorder.further_steps(slowdown * first, slowdown * growth, many, decodes)
        return advanced.last

    # Requests

    def _apply_aborts(self) -> None:
        for request_id in self._aborts:
            self._unstarted.discard(request_id)
            self.recorder.aborted(request_id)
            if not self.engine.abort(request_id):  # it has ended, or is still on its way
                self._arrivals = [arrival for arrival in self._arrivals if arrival.request.request_id != request_id]
                heapify(self._arrivals)
        self._aborts.clear()

    def _first_computed_in(self, step: Step, start_us: Micros) -> list[Started]:
        """Return which requests a step that has run, since `start_us`, computed for the first time."""
        started = []
        for entry in step.scheduled:
            request_id = entry.sequence.request.request_id
            if request_id in self._unstarted:
                self._unstarted.discard(request_id)
                started.append(Started(int(request_id), start_us, entry.sequence.cached_tokens))
        return started
