"""A continuous engine on a clock, in Python or compiled (docs/decisions/0019-compiled-engine.md)."""

from __future__ import annotations

from typing import ClassVar, Protocol

from maveriq.control.engine_recorder import EngineRecorder
from maveriq.control.events import EngineProgress
from maveriq.domain.requests import Request
from maveriq.engine.interface import EngineCounters
from maveriq.engine.vllm_engine import VllmEngine
from maveriq.estimate.step_timer import StepTimer
from maveriq.scenario.continuous_engines import AdmissionDelay, EngineParts
from maveriq.scenario.stepped_engine import SteppedEngine
from maveriq.units import Micros
from maveriq.workload.requests import Arrivals

MIN_REQUESTS = 10_000
"""Requests of a workload from which on compiled engines are worth the start of numba."""


class ClockedEngine(Protocol):
    """What the simulator drives; `SteppedEngine` describes the methods, and in which order they are called."""

    next_us: Micros | None
    is_compiled: ClassVar[bool]

    @property
    def kv_capacity_tokens(self) -> int:
        """Tokens that its KV cache holds."""

    @property
    def counters(self) -> EngineCounters:
        """The state of the engine."""

    def submit(self, now_us: Micros, request: Request) -> None:
        """Put a request into the engine's queue."""

    def slow_down(self, now_us: Micros, slowdown: int) -> bool:
        """Let steps that start from now on take so many times as long; return whether that is new."""

    def abort(self, now_us: Micros, request_id: int) -> None:
        """End a request at the next step boundary."""

    def stop(self, now_us: Micros) -> None:
        """Compute no more, and forget all requests."""

    def finish(self, now_us: Micros) -> EngineProgress:
        """End what is due now, and return what became of requests in it."""

    def compose(self, now_us: Micros) -> None:
        """Take the requests that have reached the queue and, unless a step runs, start the next one."""


def clocked_engine(
    parts: EngineParts, deployment_id: int, generation: int, *, recorder: EngineRecorder, arrivals: Arrivals
) -> ClockedEngine:
    """Return an engine whose requests are never aborted: a compiled one where it applies and pays.

    Args:
        parts: what it is made of.
        deployment_id: its deployment.
        generation: of the deployment's engine.
        recorder: adds up what it does.
        arrivals: the requests of the run.
    """
    engine, timer, delay = parts.engine, parts.timer, parts.admission_delay_us
    if (
        len(arrivals) >= MIN_REQUESTS
        and isinstance(engine, VllmEngine)
        and isinstance(timer, StepTimer)
        and delay == AdmissionDelay(timer.preset, engine.scheduler.limits.max_num_seqs)
    ):
        share = arrivals.prompt_id is not None or arrivals.prefix_hashes is not None
        if not (share and engine.pool.prefix_caching):
            from maveriq.scenario.compiled_engine import CompiledEngine, why_not_used  # late: imports numba

            if why_not_used(engine.scheduler) is None:
                return CompiledEngine(engine, timer, deployment_id, generation, recorder=recorder)
    return SteppedEngine(parts, deployment_id, generation, recorder=recorder)
