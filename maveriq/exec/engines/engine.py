"""The `Engine` protocol and the list of backends.

An engine runs inside a process of its own (`maveriq.exec.engine_server`). `make_engine` creates one by the name of its
backend and imports only what that backend needs. `StepAligner` is for engines whose sequences advance at different
paces.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib import import_module
from typing import Any, Protocol, TypeAlias, cast, runtime_checkable

from maveriq.compat import StrEnum
from maveriq.errors import MaveriqError, UnknownNameError
from maveriq.exec.messages import EngineSpec, Generate, Inspected, Loaded


class FailureKind(StrEnum):
    """The kind of an engine's failure; `Failed.kind`."""

    OUT_OF_MEMORY = "out-of-memory"
    UNSUPPORTED = "unsupported"
    ERROR = "error"


class EngineError(MaveriqError):
    """An engine cannot load a model or run an execution. The message is one line.

    Args:
        kind: what went wrong.
        message: why, in one line.
        device: the device that lacks memory, as in `EngineSpec.devices`; "" if unknown.
    """

    def __init__(self, kind: FailureKind, message: str, *, device: str = "") -> None:
        super().__init__(message)
        self.kind = kind
        self.device = device


ENDED = -1
"""In a step: the sequence ended in an earlier step."""

Step: TypeAlias = Sequence[int]
"""One token for each sequence of the execution, or `ENDED`."""


class Engine(Protocol):
    """One model, loaded in this process and possibly in others that it starts.

    The engine server calls an engine from one thread, one call at a time: `load`, then `generate` any number of times,
    then `close`. The server measures times.
    """

    def load(self, spec: EngineSpec) -> Loaded:
        """Load the weights, allocate the KV cache, warm up, and return when the engine can serve.

        Raises:
            EngineError: the model does not fit, the spec is not supported, or loading failed otherwise.
        """

    def generate(self, batch: Generate) -> Iterator[Step]:
        """Run an execution and yield its steps: the first after prefill, the last when all sequences have ended.

        Decoding is greedy. A sequence ends after its `output_tokens` or with one of its stop tokens (yielded too).

        Raises:
            EngineError: the execution failed; the engine can still run the next one.
        """

    def close(self) -> None:
        """Free all memory and end the processes that `load` started. May be called at any time, and repeatedly."""


@runtime_checkable
class Inspectable(Protocol):
    """An engine that can say, without loading anything, whether its library is the one that maveriq knows."""

    def inspect(self, spec: EngineSpec) -> Inspected:
        """Import the library and compare its classes with the arguments for a spec.

        Raises:
            EngineError: the library cannot be imported, or the spec is not supported.
        """


class StepAligner:
    """Assembles the tokens of sequences, which arrive in any interleaving, into whole steps (`Engine.generate`)."""

    __slots__ = ("_ended", "_waiting")

    def __init__(self, sequences: int) -> None:
        self._waiting: list[deque[int]] = [deque() for _ in range(sequences)]
        self._ended = [False] * sequences

    def add(self, sequence: int, tokens: Iterable[int], *, ended: bool) -> None:
        """Add the next tokens of a sequence (index from 0); `ended` if they are its last."""
        self._waiting[sequence].extend(tokens)
        self._ended[sequence] = self._ended[sequence] or ended

    def steps(self) -> Iterator[Step]:
        """Yield the steps that are complete: every sequence has a token or has ended."""
        while any(self._waiting) and all(map(self._is_ready, self._waiting, self._ended)):
            yield tuple(tokens.popleft() if tokens else ENDED for tokens in self._waiting)

    @staticmethod
    def _is_ready(tokens: deque[int], ended: bool) -> bool:  # noqa: FBT001  (mapped)
        return bool(tokens) or ended


BACKENDS = {
    "emulated": "maveriq.exec.engines.emulated:EmulatedEngine",
    "torch": "maveriq.exec.engines.torch:TorchEngine",
    "vllm": "maveriq.exec.engines.vllm:VllmEngine",
    "trtllm": "maveriq.exec.engines.trtllm:TrtLlmEngine",
}
"""The engine class of each backend, as `module:Class`."""


def make_engine(backend: str) -> Engine:
    """Create an engine.

    Args:
        backend: a name of `BACKENDS`, or another class that implements `Engine`, as `module:Class`.

    Raises:
        UnknownNameError: the backend does not exist.
        ImportError: a package that it needs is not installed.
    """
    engine: Engine = load_class(backend, BACKENDS)()
    return engine


def load_class(backend: str, known: Mapping[str, str]) -> Callable[[], Any]:
    """Return the class of a backend.

    Args:
        backend: a known name, or `module:Class`.
        known: locations by name, as `module:Class`.

    Raises:
        UnknownNameError: neither.
        ImportError: a package that it needs is not installed.
    """
    module, colon, name = known.get(backend, backend).partition(":")
    if not colon:
        raise UnknownNameError("backend", backend, known, "or MODULE:CLASS")
    return cast(Callable[[], Any], getattr(import_module(module), name))
