"""The `Engine` protocol: what runs inside an engine's own process (`maveriq.exec.engine_server`).

Lining up sequences that an engine serves at their own pace, so that every step has a token of each.
Engines by the name of their backend; what one needs is imported when it is asked for.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from enum import StrEnum
from importlib import import_module
from typing import Protocol, TypeAlias, cast

from maveriq.errors import MaveriqError, UnknownNameError
from maveriq.exec.messages import EngineSpec, Generate, Loaded


class FailureKind(StrEnum):
    """Why an engine could not do something; `Failed.kind`."""

    OUT_OF_MEMORY = "out-of-memory"
    UNSUPPORTED = "unsupported"
    ERROR = "error"


class EngineError(MaveriqError):
    """An engine cannot load or run something, and says why in one line."""

    def __init__(self, kind: FailureKind, message: str) -> None:
        super().__init__(message)
        self.kind = kind


Step: TypeAlias = Sequence[int]
"""A token for each sequence of the execution; -1 for a sequence that had ended before."""


class Engine(Protocol):
    """One model, loaded in this process and perhaps in others of its process group.

    The host calls an engine from one thread, one call at a time, in the order load, any number
    of generate, close. Time is measured by the host.
    """

    def load(self, spec: EngineSpec) -> Loaded:
        """Load weights, make room for the KV cache, warm up; return once requests can be served.

        Raises:
            EngineError: it does not fit, is not supported, or something else failed.
        """

    def generate(self, work: Generate) -> Iterator[Step]:
        """Yield one step after the other; the first when prefill is done, the last ends the execution.

        Greedy: each token is the likeliest. A sequence ends after its `output_tokens` or with one of its stop tokens,
        which is yielded too.

        Raises:
            EngineError: the execution cannot go on; the engine can still take the next one.
        """

    def close(self) -> None:
        """Free everything and end the processes that `load` began. May be called at any time, also twice."""


ENDED = -1
"""In a step: this sequence had ended before."""


class StepAligner:
    """Takes tokens as they come, in any interleaving, and gives whole steps (`Engine.generate`)."""

    __slots__ = ("_ended", "_waiting")

    def __init__(self, sequences: int) -> None:
        self._waiting: list[deque[int]] = [deque() for _ in range(sequences)]
        self._ended = [False] * sequences

    def add(self, sequence: int, tokens: Iterable[int], *, ended: bool) -> None:
        """Note the next tokens of a sequence, counted from 0, and whether they were its last."""
        self._waiting[sequence].extend(tokens)
        self._ended[sequence] = self._ended[sequence] or ended

    def steps(self) -> Iterator[Step]:
        """Yield the steps that are whole by now."""
        while any(self._waiting) and all(map(self._settled, self._waiting, self._ended)):
            yield tuple(tokens.popleft() if tokens else ENDED for tokens in self._waiting)

    @staticmethod
    def _settled(tokens: deque[int], ended: bool) -> bool:  # noqa: FBT001  (mapped)
        return bool(tokens) or ended


BACKENDS = {
    "emulated": "maveriq.exec.engines.emulated:EmulatedEngine",
    "torch": "maveriq.exec.engines.torch:TorchEngine",
    "vllm": "maveriq.exec.engines.vllm:VllmEngine",
    "trtllm": "maveriq.exec.engines.trtllm:TrtLlmEngine",
}
"""Where each backend's engine is."""


def make_engine(backend: str) -> Engine:
    """Return a new engine.

    Args:
        backend: a name of `BACKENDS`, or where a class of your own is: `module:Class`.

    Raises:
        UnknownNameError: no such backend.
        ImportError: it needs what is not installed.
    """
    place = BACKENDS.get(backend, backend)
    module, colon, name = place.partition(":")
    if not colon:
        raise UnknownNameError("backend", backend, BACKENDS, "or MODULE:CLASS")
    return cast(Callable[[], Engine], getattr(import_module(module), name))()
