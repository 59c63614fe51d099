"""A continuous engine of vLLM whose steps run in compiled code (docs/decisions/0019-compiled-engine.md).

`CompiledEngine` has the methods of `SteppedEngine`, with the same results. Import it late: numba takes half a
second, and the first use after an installation compiles for a quarter of a minute.
"""

from __future__ import annotations

from typing import ClassVar

from maveriq.compiling import address, is_kept
from maveriq.control.engine_recorder import EngineRecorder
from maveriq.control.events import EngineProgress, Finished, Started
from maveriq.domain.requests import Request
from maveriq.engine.compiled_state import (
    BLOCKS,
    CACHED_TOKENS,
    FREE_BLOCKS,
    HELD,
    PREEMPTIONS,
    PROMPT_TOKENS,
    RUNNING_COUNT,
    EngineState,
    why_not_compiled,
)
from maveriq.engine.interface import EngineCounters
from maveriq.engine.requests import engine_request
from maveriq.engine.vllm import VllmScheduler
from maveriq.engine.vllm_engine import VllmEngine
from maveriq.errors import InvariantError
from maveriq.estimate.compiled_timer import TimerState
from maveriq.estimate.step_timer import StepTimer
from maveriq.scenario.compiled_clock_state import (
    C_NEXT_US,
    C_REPORTED_KV_TOKENS,
    COMPOSE,
    FINISH,
    FINISHED,
    FIRST_TOKEN,
    NO_TIME,
    SLOW_DOWN,
    STARTED,
    STOP,
    SUBMIT,
    ClockState,
)
from maveriq.scenario.compiled_cluster import serve
from maveriq.units import Micros


def why_not_used(scheduler: VllmScheduler) -> str | None:
    """Return why `CompiledEngine` is not used for a scheduler, None if it is."""
    if not is_kept(serve):
        return "each process would compile it anew: no folder that numba keeps machine code in can be written"
    return why_not_compiled(scheduler)


class CompiledEngine:
    """A continuous engine on a clock (mutable); the methods are those of `SteppedEngine`.

    Args:
        engine: without requests; it says what the limits and rules are.
        timer: how long a step takes, and by its preset how long a request is on its way to the queue.
        deployment_id: its deployment, for the events that it returns.
        generation: of the deployment's engine.
        recorder: adds up what it does.
    """

    is_compiled: ClassVar[bool] = True

    def __init__(
        self, engine: VllmEngine, timer: StepTimer, deployment_id: int, generation: int, *, recorder: EngineRecorder
    ) -> None:
        self.recorder = recorder
        self.next_us: Micros | None = None
        self._engine = engine
        self._deployment_id = deployment_id
        self._generation = generation
        self._slowdown = 1
        self._timer = TimerState(timer, max_num_seqs=engine.scheduler.limits.max_num_seqs)
        self._state = EngineState(engine.scheduler)
        self._clock = ClockState(self._timer)
        self._engine_at, self._clock_at = address(self._state.memory), address(self._clock.memory)
        self._nothing = EngineProgress(deployment_id, generation)

    @property
    def kv_capacity_tokens(self) -> int:
        """Tokens that its KV cache holds."""
        return self._engine.pool.tokens

    @property
    def counters(self) -> EngineCounters:
        """The state of the engine."""
        memory = self._state.memory
        return EngineCounters(
            running=int(memory[RUNNING_COUNT]),
            waiting=int(memory[HELD] - memory[RUNNING_COUNT]),
            used_blocks=int(memory[BLOCKS] - memory[FREE_BLOCKS]),
            blocks=int(memory[BLOCKS]),
            preemptions=int(memory[PREEMPTIONS]),
            prompt_tokens=int(memory[PROMPT_TOKENS]),
            cached_tokens=int(memory[CACHED_TOKENS]),
        )

    @property
    def surely_held_tokens(self) -> int:
        """Tokens of a request, prompt and output, with which `submit` raises no error."""
        return self._engine.surely_held_tokens

    @property
    def reported_kv_tokens(self) -> int:
        """Tokens of the KV blocks that requests held when there was news last."""
        return int(self._clock.memory[C_REPORTED_KV_TOKENS])

    @property
    def addresses(self) -> tuple[int, int]:
        """The addresses of its memory and of its clock's."""
        return self._engine_at, self._clock_at

    def find_next(self) -> None:
        """Set `next_us` after others have run it."""
        next_us = int(self._clock.memory[C_NEXT_US])
        self.next_us = None if next_us == NO_TIME else next_us

    def add_rows(self) -> None:
        """Make room for more requests that have not begun."""
        self._state.add_rows()

    def submit(self, now_us: Micros, request: Request) -> None:
        """Put a request into the engine's queue, which it reaches after the delay of its prompt.

        Raises:
            InputError: the engine can never serve it.
        """
        prompt_tokens, output_tokens = request.prompt_tokens, request.output_tokens
        if prompt_tokens + output_tokens > self._engine.surely_held_tokens:
            self._engine.check_length(engine_request(request))
        lengths = output_tokens << 32 | prompt_tokens
        while self._serve(SUBMIT, now_us, request.request_id, lengths) < 0:
            self.add_rows()

    def slow_down(self, now_us: Micros, slowdown: int) -> bool:
        """Let steps that start from now on take so many times as long; return whether that is new."""
        if slowdown == self._slowdown:
            return False
        self._slowdown = slowdown
        self._serve(SLOW_DOWN, now_us, slowdown)
        return True

    def abort(self, now_us: Micros, request_id: int) -> None:
        """Raise an error: a simulation aborts no request.

        Raises:
            InvariantError: always.
        """
        raise InvariantError(f"request {request_id} is to be aborted at {now_us} µs in an engine that cannot")

    def stop(self, now_us: Micros) -> None:
        """Compute no more, and forget all requests."""
        self._serve(STOP, now_us)
        self.pass_on_notes()

    def finish(self, now_us: Micros) -> EngineProgress:
        """End what is due now, and return what became of requests in it; nothing if nothing is due."""
        count = self._serve(FINISH, now_us)
        if not count:
            return self._nothing
        started: list[Started] = []
        preempted: list[int] = []
        first_tokens: list[int] = []
        finished: list[Finished] = []
        for what, request_id, value, other in self._clock.news[:count].tolist():
            if what == STARTED:
                started.append(Started(request_id, value, other))
            elif what == FIRST_TOKEN:
                first_tokens.append(request_id)
            elif what == FINISHED:
                finished.append(Finished(request_id, value, other))
            else:
                preempted.append(request_id)
        return EngineProgress(
            self._deployment_id,
            self._generation,
            started=started,
            preempted=preempted,
            first_tokens=first_tokens,
            finished=finished,
            kv_tokens=self.reported_kv_tokens,
        )

    def compose(self, now_us: Micros) -> None:
        """Take the requests that have reached the queue and, unless a step runs, start the next one."""
        self._serve(COMPOSE, now_us)

    def _serve(self, what: int, now_us: Micros, value: int = 0, lengths: int = 0) -> int:
        """Do something in compiled code, and return how many rows of news there are."""
        next_us, news, is_full = serve(self._engine_at, self._clock_at, what, now_us, value, lengths)
        self.next_us = None if next_us == NO_TIME else next_us
        if is_full:
            self.pass_on_notes()
        return news

    def pass_on_notes(self) -> None:
        """Pass on what was noted, and empty the buffers."""
        self.recorder.note(**self._clock.take_notes())
