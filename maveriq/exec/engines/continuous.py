"""The `ContinuousEngine` protocol: engines that take requests at any moment, and the backends that have one.

Such an engine keeps its own queue and decides what each step computes. It runs inside a process of its own, as an
`Engine` does; `maveriq.exec.engine_server` calls its steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from maveriq.exec.engines.engine import load_class
from maveriq.exec.messages import EngineSpec, Loaded, PromptSequence


@dataclass(slots=True)
class StepOutput:
    """What a step of a continuous engine did. Requests are named by their IDs.

    Args:
        tokens: of each request that got some.
        ended: requests that got their last token, or stopped at one of their stop tokens.
        admitted: requests that were computed for the first time, and how many tokens of their prompts were cached.
        preempted: requests that lost what was computed of them.
        computed: requests of which something was computed.
        batch_tokens: tokens that were computed.
        running: requests that are admitted now.
        waiting: requests in the queue.
        kv_tokens: tokens of the KV cache that requests hold.
    """

    tokens: list[tuple[int, Sequence[int]]] = field(default_factory=list)
    ended: list[int] = field(default_factory=list)
    admitted: list[tuple[int, int]] = field(default_factory=list)
    preempted: list[int] = field(default_factory=list)
    computed: list[int] = field(default_factory=list)
    batch_tokens: int = 0
    running: int = 0
    waiting: int = 0
    kv_tokens: int = 0


class ContinuousEngine(Protocol):
    """One model, loaded in this process and possibly in others that it starts, with a queue of its own.

    The engine server calls it from one thread, one call at a time: `load`; then `step` as long as it has requests, and
    `submit` and `abort` between steps; then `close`. The server measures times.
    """

    def load(self, spec: EngineSpec) -> Loaded:
        """Load the weights, allocate the KV cache, warm up, and return when the engine can serve.

        `spec.batching` has its settings.

        Raises:
            EngineError: the model does not fit, the spec is not supported, or loading failed otherwise.
        """

    def submit(self, sequence: PromptSequence, *, is_urgent: bool) -> None:
        """Put a request into the queue. Decoding is greedy, as with `Engine.generate`.

        Raises:
            EngineError: the engine cannot do it; it goes on with the others.
        """

    def abort(self, request_id: int) -> None:
        """End a request that has not ended, whether it waits or runs."""

    def step(self) -> StepOutput:
        """Compute a step.

        Raises:
            EngineError: it failed, and the engine with it.
        """

    def close(self) -> None:
        """Free all memory and end the processes that `load` started. May be called at any time, and repeatedly."""


CONTINUOUS_BACKENDS = {
    "emulated": "maveriq.exec.engines.emulated_batching:EmulatedContinuousEngine",
    "vllm": "maveriq.exec.engines.vllm_batching:ContinuousVllmEngine",
}
"""The class of each backend whose engines batch continuously, as `module:Class`."""


def make_continuous_engine(backend: str) -> ContinuousEngine:
    """Create an engine that batches continuously.

    Args:
        backend: a name of `CONTINUOUS_BACKENDS`, or a class that implements `ContinuousEngine`, as `module:Class`.

    Raises:
        UnknownNameError: the backend does not exist, or its engines take one execution at a time.
        ImportError: a package that it needs is not installed.
    """
    engine: ContinuousEngine = load_class(backend, CONTINUOUS_BACKENDS)()
    return engine
