"""The `Engine` protocol: what runs inside an engine's own process (`maveriq.exec.host`)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from enum import StrEnum
from typing import Protocol, TypeAlias

from maveriq.errors import MaveriqError
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
