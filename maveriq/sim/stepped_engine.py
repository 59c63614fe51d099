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
from typing import NamedTuple

from maveriq.control.events import EngineProgress, Started
from maveriq.domain.requests import Request
from maveriq.engine.requests import EngineRequest, RequestId, engine_request
from maveriq.engine.steps import Emitted, Step
from maveriq.estimate.step_timer import StepTimer, Ticks, micros_after, ticks
from maveriq.scenario.continuous_engines import EngineParts
from maveriq.units import Micros

_MIN_SKIPPED = 2  # a single step is no run


class _Arrival(NamedTuple):
    """A request on its way to the engine's queue; ordered by time, then by submission."""

    ready_us: Micros
    number: int
    request: EngineRequest


@dataclass(slots=True)
class _InFlight:
    """A step that was composed. `step` is None where steps were skipped: it then decodes, and starts nothing."""

    duration: Ticks
    step: Step | None

    @property
    def may_be_skipped(self) -> bool:
        """Whether it is certain that no request gets its first or its last token in it."""
        step = self.step
        return (
            step is not None
            and not step.chunks
            and not step.preempted
            and all(
                entry.sequence.prompt_tokens < entry.sequence.length < entry.sequence.end - 1
                for entry in step.scheduled
            )
        )


@dataclass(slots=True)
class _SkippedSteps:
    """Steps that are taken at once.

    Args:
        start: when the first one starts.
        lead: duration of the step that was composed before and runs first; 0 if there is none.
        decodes: sequences of each further one.
        context_tokens: tokens that these attend to in the first of the further ones.
        steps: how many run, the one in front included.
    """

    start: Ticks
    lead: Ticks
    decodes: int
    context_tokens: int
    steps: int

    def end(self, timer: StepTimer, steps: int) -> Ticks:
        """Return when so many of them have run."""
        further = steps - 1 if self.lead else steps
        return self.start + self.lead + timer.decode_steps(self.decodes, self.context_tokens, further)


class SteppedEngine:
    """A continuous engine on a clock (mutable).

    Args:
        parts: what it is made of.
        deployment_id: its deployment, for the events that it returns.
        generation: of the deployment's engine.
        skips_steps: whether steps are skipped. Nothing else depends on it.
    """

    def __init__(self, parts: EngineParts, deployment_id: int, generation: int, *, skips_steps: bool = True) -> None:
        self.engine = parts.engine
        self._timer = parts.timer
        self._admission_delay_us = parts.admission_delay_us
        self._deployment_id = deployment_id
        self._generation = generation
        self._skips_steps = skips_steps
        self._arrivals: list[_Arrival] = []
        self._submitted = 0
        self._aborts: list[int] = []
        self._unstarted: set[RequestId] = set()
        self._in_flight: deque[_InFlight] = deque()
        self._skipped: _SkippedSteps | None = None
        self._boundary: Ticks | None = None  # when what runs now ends
        self._free_since: Ticks | None = None  # the last boundary, if the next step starts there

    @property
    def kv_capacity_tokens(self) -> int:
        """Tokens that its KV cache holds."""
        return self.engine.pool.tokens

    @property
    def next_us(self) -> Micros | None:
        """When to call `finish` and `compose` next; None if nothing will happen by itself."""
        if self._boundary is not None:
            return micros_after(self._boundary)
        return self._arrivals[0].ready_us if self._arrivals else None

    def submit(self, now_us: Micros, request: Request) -> None:
        """Put a request into the engine's queue, which it reaches after the delay of its prompt."""
        ready_us = now_us + self._admission_delay_us(request.prompt_tokens)
        self._submitted += 1
        heappush(self._arrivals, _Arrival(ready_us, self._submitted, engine_request(request)))
        self._cut(self._arrivals[0].ready_us)

    def abort(self, now_us: Micros, request_id: int) -> None:
        """End a request at the next step boundary."""
        self._aborts.append(request_id)
        self._cut(now_us)

    def finish(self, now_us: Micros) -> EngineProgress:
        """End what is due now, and return what became of requests in it; nothing if nothing is due."""
        progress = EngineProgress(self._deployment_id, self._generation)
        if self._boundary is None or micros_after(self._boundary) > now_us:
            return progress
        if self._skipped is not None:
            self._finish_skipped(self._skipped, progress)
        else:
            self._apply_aborts()
            ended = self._in_flight.popleft()
            if ended.step is not None:
                self._note_starts(ended, progress)
            self._note_tokens(self.engine.finish_step(), progress)
        self._free_since, self._boundary = self._boundary, None
        progress.kv_tokens = self.engine.pool.used_tokens
        return progress

    def compose(self, now_us: Micros) -> None:
        """Take the requests that have reached the queue and, unless a step runs, start the next one."""
        if self._boundary is not None:
            return
        self._apply_aborts()
        while self._arrivals and self._arrivals[0].ready_us <= now_us:
            request = heappop(self._arrivals).request
            self._unstarted.add(request.request_id)
            self.engine.submit(request)
        start = ticks(now_us) if self._free_since is None else self._free_since
        self._free_since = None
        if self._skip(start):
            return
        while (step := self.engine.next_step()) is not None:
            duration = self._timer.step(step.decodes, step.context_tokens, step.chunks)
            self._in_flight.append(_InFlight(duration, step))
        if self._in_flight:
            self._boundary = start + self._in_flight[0].duration

    # Steps that are skipped

    def _skip(self, start: Ticks) -> bool:
        """Plan to skip the next steps, and return whether there are any to skip."""
        in_flight = self._in_flight
        if not self._skips_steps or len(in_flight) > 1 or (in_flight and not in_flight[0].may_be_skipped):
            return False
        quiet = self.engine.quiet_run()
        if quiet is None or quiet.steps < _MIN_SKIPPED:
            return False
        lead = in_flight[0].duration if in_flight else 0
        self._skipped = _SkippedSteps(start, lead, quiet.decodes, quiet.context_tokens, quiet.steps)
        self._boundary = self._skipped.end(self._timer, quiet.steps)
        if self._arrivals:
            self._cut(self._arrivals[0].ready_us)
        return True

    def _cut(self, at_us: Micros) -> None:
        """Let skipped steps end at the first step boundary at `at_us` or later, if they end later."""
        skipped = self._skipped
        if skipped is None or self._boundary is None or micros_after(self._boundary) <= at_us:
            return
        low, high = 1, skipped.steps  # the end of `high` steps is not before `at_us`
        while low < high:
            middle = (low + high) // 2
            if micros_after(skipped.end(self._timer, middle)) >= at_us:
                high = middle
            else:
                low = middle + 1
        skipped.steps = high
        self._boundary = skipped.end(self._timer, high)

    def _finish_skipped(self, skipped: _SkippedSteps, progress: EngineProgress) -> None:
        advanced = self.engine.advance(skipped.steps)
        self._skipped = None
        if skipped.lead:  # one more was composed, and starts now
            self._in_flight.clear()
            context = skipped.context_tokens + (skipped.steps - 1) * skipped.decodes
            self._in_flight.append(_InFlight(self._timer.step(skipped.decodes, context), None))
        self._note_tokens(advanced.last, progress)

    # Requests

    def _apply_aborts(self) -> None:
        for request_id in self._aborts:
            self._unstarted.discard(request_id)
            if not self.engine.abort(request_id):  # it has ended, or is still on its way
                self._arrivals = [arrival for arrival in self._arrivals if arrival.request.request_id != request_id]
                heapify(self._arrivals)
        self._aborts.clear()

    def _note_starts(self, ended: _InFlight, progress: EngineProgress) -> None:
        """Note which requests a step that ends now computed for the first time, and which were preempted for it."""
        step, boundary = ended.step, self._boundary
        assert step is not None and boundary is not None  # noqa: S101, PT018
        if self._unstarted:
            start_us = micros_after(boundary - ended.duration)
            for entry in step.scheduled:
                request_id = entry.sequence.request.request_id
                if request_id in self._unstarted:
                    self._unstarted.discard(request_id)
                    progress.started.append(Started(int(request_id), start_us, entry.sequence.cached_tokens))
        for sequence in step.preempted:
            progress.preempted.append(int(sequence.request.request_id))

    def _note_tokens(self, emitted: list[Emitted], progress: EngineProgress) -> None:
        for token in emitted:
            if token.output_tokens == 1:
                progress.first_tokens.append(int(token.request_id))
            if token.finish_reason is not None:
                progress.finished.append((int(token.request_id), token.output_tokens))
