"""vLLM's engine loop around its scheduler (`vllm/v1/engine/core.py`: `step_with_batch_queue`; SCHEDULERS 1.7)."""

from __future__ import annotations

from maveriq.engine.interface import EngineCounters, QuietRun
from maveriq.engine.requests import EngineRequest, RequestId
from maveriq.engine.steps import Advanced, Emitted, Step
from maveriq.engine.vllm import VllmScheduler
from maveriq.errors import InputError, InvariantError


class VllmEngine:
    """An engine of vLLM V1 (mutable); `maveriq.engine.interface.Engine` describes its methods.

    With asynchronous scheduling a step is composed while the one before runs, so that arrivals and the blocks of
    requests that end are seen one step later. It is assumed that no step ends before the next is composed.

    Args:
        scheduler: its scheduler, which no request has been given yet.
    """

    def __init__(self, scheduler: VllmScheduler) -> None:
        self.scheduler = scheduler
        self.pool = scheduler.pool
        self.running = scheduler.running
        self.surely_held_tokens = min(
            scheduler.limits.max_model_len - 1, scheduler.pool.blocks * scheduler.pool.block_size
        )
        """Tokens of a request, prompt and output, with which it passes `check_length`."""
        self._max_in_flight = scheduler.limits.steps_in_flight
        self._must_wait = False  # for the oldest step in flight

    def submit(self, request: EngineRequest) -> None:
        """Add a request."""
        if request.prompt_tokens + request.output_tokens > self.surely_held_tokens:
            self.check_length(request)
        self.scheduler.submit(request)

    def check_length(self, request: EngineRequest) -> None:
        """Raise an error if the engine can never serve a request.

        Raises:
            InputError: it is too long.
        """
        limits, pool = self.scheduler.limits, self.scheduler.pool
        prompt_tokens = request.prompt_tokens
        longest = pool.blocks * pool.block_size
        if prompt_tokens >= limits.max_model_len:
            raise InputError(
                f"request {request.request_id!r}: a prompt of {request.prompt_tokens} tokens leaves no room for output "
                f"within max_model_len {limits.max_model_len}; shorten it or raise max_model_len"
            )
        if longest < limits.max_model_len and longest < prompt_tokens + request.output_tokens - 1:
            raise InputError(
                f"request {request.request_id!r}: {request.prompt_tokens} prompt and {request.output_tokens} output "
                f"tokens never fit into the KV cache of {longest} tokens; raise num_gpu_blocks"
            )

    def abort(self, request_id: RequestId) -> bool:
        """End a request now."""
        return self.scheduler.abort(request_id)

    def next_step(self) -> Step | None:
        """Compose the next step; None if the engine waits."""
        scheduler, in_flight = self.scheduler, self.scheduler.in_flight
        while True:
            if self._must_wait:
                oldest = in_flight[0]
                if oldest.decodes or oldest.chunks:
                    return None
                scheduler.update()  # an empty step is done at once
                self._must_wait = False
            if not scheduler.has_requests:
                if not in_flight:
                    return None
                self._must_wait = True
                continue
            step = scheduler.schedule()
            if step.decodes or step.chunks:
                self._must_wait = len(in_flight) == self._max_in_flight
                return step
            self._must_wait = True

    def finish_step(self) -> list[Emitted]:
        """Take the tokens of the oldest step in flight."""
        in_flight = self.scheduler.in_flight
        if not in_flight or in_flight[0].is_empty:
            raise InvariantError("finish_step: no step is in flight")
        self._must_wait = False
        return self.scheduler.update()

    def quiet_run(self) -> QuietRun | None:
        """Return the next steps in which nothing happens but decoding."""
        cohort = self.scheduler.cohort
        steps = 0 if self._must_wait else self.scheduler.quiet_steps()
        return QuietRun(steps, cohort.size, cohort.context_tokens) if steps else None

    def advance(self, steps: int) -> Advanced:
        """Do `next_step` and `finish_step` so many times."""
        return self.scheduler.advance(steps)

    @property
    def counters(self) -> EngineCounters:
        """The state of the engine."""
        return EngineCounters.of(self.scheduler)
