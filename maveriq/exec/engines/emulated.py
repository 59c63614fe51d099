"""The emulated engine: a real process that takes the estimated time and needs no GPU.

It serves tests, demonstrations, and measurements of the control plane's own overhead. Each rank after the first is an
idle child process that ends with the engine, so that the engine is a real process group.
"""

from __future__ import annotations

import json
import subprocess
import time
import zlib
from array import array
from collections.abc import Iterator

from maveriq.exec.engines.engine import ENDED, EngineError, FailureKind, Step
from maveriq.exec.messages import EngineSpec, Generate, Inspected, Loaded, PromptSequence
from maveriq.streams import pick

_DEFAULT_VOCABULARY_SIZE = 32_000
_VERSION = "1"
_MAX_VOCABULARY_SIZE = 2**31  # token ids are 32-bit in messages


class EmulatedEngine:
    """Yields pseudo-random tokens at their estimated times."""

    def __init__(self) -> None:
        self._time_scale = 1.0
        self._vocabulary_size = _DEFAULT_VOCABULARY_SIZE
        self._ranks: list[subprocess.Popen[bytes]] = []

    def inspect(self, spec: EngineSpec) -> Inspected:  # noqa: ARG002
        """Return its version; it passes no arguments to anything."""
        return Inspected(version=_VERSION)

    def load(self, spec: EngineSpec) -> Loaded:
        """Start the other ranks and take the estimated load time.

        Raises:
            EngineError: the model's configuration is not a JSON object.
        """
        due_s = time.monotonic() + spec.load_s * spec.time_scale
        self._time_scale = spec.time_scale
        self._vocabulary_size = vocabulary_size(spec.config_json)
        # `cat` waits for input; its stdin closes, and it exits, when this process ends.
        self._ranks = [
            subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)  # noqa: S607
            for _ in range(spec.tp * spec.pp - 1)
        ]
        sleep_until(due_s)
        return Loaded(backend="emulated", version=_VERSION)

    def generate(self, batch: Generate) -> Iterator[Step]:
        """Yield pseudo-random tokens; steps are spaced evenly from the first token to the end of the service time."""
        started_s = time.monotonic()
        steps = max(sequence.output_tokens for sequence in batch.sequences)
        step_s = max(0.0, batch.service_s - batch.first_token_s) / max(1, steps - 1)
        streams = [emulated_tokens(sequence, self._vocabulary_size) for sequence in batch.sequences]
        for step in range(steps):
            tokens = [next(stream, ENDED) for stream in streams]
            if all(token == ENDED for token in tokens):
                return
            elapsed_s = batch.first_token_s + step * step_s if steps > 1 else batch.service_s
            sleep_until(started_s + elapsed_s * self._time_scale)
            yield tokens

    def close(self) -> None:
        """End the other ranks."""
        ranks, self._ranks = self._ranks, []
        for rank in ranks:
            rank.communicate()  # closes its stdin


def emulated_tokens(sequence: PromptSequence, vocabulary_size: int) -> Iterator[int]:
    """Yield a sequence's tokens. They depend only on its prompt, as with greedy decoding."""
    seed = zlib.crc32(array("i", sequence.prompt).tobytes())
    for position in range(sequence.output_tokens):
        token = pick(seed, "emulated", position, vocabulary_size)
        yield token
        if token in sequence.stop_token_ids:
            return


def vocabulary_size(config_json: str) -> int:
    """Return how many token ids a model has.

    Raises:
        EngineError: its configuration is not a JSON object, or the number is none.
    """
    try:
        size = json.loads(config_json).get("vocab_size", _DEFAULT_VOCABULARY_SIZE)
    except (ValueError, AttributeError, RecursionError):
        raise EngineError(FailureKind.UNSUPPORTED, "the model's configuration is not a JSON object") from None
    if not isinstance(size, int) or not 1 <= size <= _MAX_VOCABULARY_SIZE:
        raise EngineError(FailureKind.UNSUPPORTED, f"vocab_size must be a positive whole number, not {size!r}")
    return size


def sleep_until(due_s: float) -> None:
    """Sleep until a time of the monotonic clock."""
    left_s = due_s - time.monotonic()
    if left_s > 0:
        time.sleep(left_s)
