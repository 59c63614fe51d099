"""What turns a `ContinuousEngine` into reports, for every backend alike; it runs in the engine's thread."""

from __future__ import annotations

import time
from collections.abc import Callable

from maveriq.exec.engines.continuous import ContinuousEngine, StepOutput
from maveriq.exec.engines.engine import EngineError
from maveriq.exec.messages import Admitted, Ended, NewTokens, PromptSequence, StepReport

_UNNUMBERED = 1  # `EngineProtocol.on_report` numbers reports


class ContinuousLoop:
    """The requests of one engine, and its steps (mutable).

    Args:
        engine: has loaded.
        report: is called with what each step did.
        clock: returns the time in seconds.
    """

    def __init__(
        self,
        engine: ContinuousEngine,
        report: Callable[[StepReport], None],
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._engine = engine
        self._report = report
        self._clock = clock
        self._started_s = clock()
        self._received_s: dict[int, float] = {}  # of the requests that have not ended
        self._steps: dict[int, int] = {}  # that computed something of each

    @property
    def open_requests(self) -> tuple[int, ...]:
        """The IDs of the requests that have not ended."""
        return tuple(self._received_s)

    @property
    def has_requests(self) -> bool:
        """Whether a step would compute something."""
        return bool(self._received_s)

    def submit(self, sequence: PromptSequence, *, is_urgent: bool) -> None:
        """Put a request into the engine's queue; if the engine refuses it, it has ended."""
        try:
            self._engine.submit(sequence, is_urgent=is_urgent)
        except EngineError as error:
            refused = Ended(sequence.request_id, 0.0, 0, f"({error.kind.value}): {error}"[:1000])
            self._report(StepReport(number=_UNNUMBERED, ended_s=self._elapsed_s(self._clock()), ended=(refused,)))
        else:
            self._received_s[sequence.request_id] = self._clock()

    def abort(self, request_id: int) -> None:
        """End a request, if it has not ended."""
        if self._received_s.pop(request_id, None) is not None:
            self._steps.pop(request_id, None)
            self._engine.abort(request_id)

    def step(self) -> None:
        """Compute a step and report it, unless it did nothing at all."""
        started_s = self._clock()
        output = self._engine.step()
        ended_s = self._clock()
        for request_id in output.computed:
            self._steps[request_id] = self._steps.get(request_id, 0) + 1
        ended = tuple(
            Ended(request_id, max(0.0, ended_s - received_s), self._steps.pop(request_id, 0))
            for request_id in output.ended
            if (received_s := self._received_s.pop(request_id, None)) is not None
        )
        if output.tokens or ended or output.admitted or output.preempted or output.batch_tokens:
            self._report(_report(output, ended, self._elapsed_s(ended_s), max(0.0, ended_s - started_s)))

    def _elapsed_s(self, time_s: float) -> float:
        return max(0.0, time_s - self._started_s)


def _report(output: StepOutput, ended: tuple[Ended, ...], ended_s: float, step_s: float) -> StepReport:
    return StepReport(
        number=_UNNUMBERED,
        ended_s=ended_s,
        step_s=step_s,
        tokens=tuple(NewTokens(request_id, tuple(tokens)) for request_id, tokens in output.tokens),
        admitted=tuple(Admitted(request_id, cached) for request_id, cached in output.admitted),
        preempted=tuple(output.preempted),
        ended=ended,
        running=output.running,
        waiting=output.waiting,
        kv_tokens=output.kv_tokens,
        batch_tokens=output.batch_tokens,
    )
