"""The emulated engine: a real process that takes the estimated time, and holds no GPU.

It is for tests, demonstrations, and for measuring what the control plane itself costs. Its ranks beyond the first
are processes too, that do nothing but end with it, so that an engine's process group is a real one.
"""

from __future__ import annotations

import json
import subprocess
import time
import zlib
from array import array
from collections.abc import Iterator

from maveriq.exec.engines.engine import EngineError, FailureKind, Step
from maveriq.exec.messages import EngineSpec, Generate, Loaded, PromptSequence
from maveriq.streams import pick

_ENDED = -1
_DEFAULT_VOCABULARY = 32_000
_MAX_VOCABULARY = 2**31  # token ids go over the channel


class EmulatedEngine:
    """Yields made-up tokens when the estimate says that they would come."""

    def __init__(self) -> None:
        self._time_scale = 1.0
        self._vocabulary = _DEFAULT_VOCABULARY
        self._stages: list[subprocess.Popen[bytes]] = []

    def load(self, spec: EngineSpec) -> Loaded:
        """Take the time that loading is estimated to take.

        Raises:
            EngineError: the model's configuration is no JSON object.
        """
        due_s = time.monotonic() + spec.load_s * spec.time_scale
        self._time_scale = spec.time_scale
        self._vocabulary = _vocabulary(spec.config_json)
        # A rank is `cat`: it waits for input that never comes, and ends when this process does.
        self._stages = [
            subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)  # noqa: S607
            for _ in range(spec.tp * spec.pp - 1)
        ]
        _sleep_until(due_s)
        return Loaded(backend="emulated", version="1")

    def generate(self, work: Generate) -> Iterator[Step]:
        """Yield made-up tokens, evenly spread from the first token's time to the last's."""
        started_s = time.monotonic()
        steps = max(sequence.output_tokens for sequence in work.sequences)
        rest_s = max(0.0, work.service_s - work.first_token_s) / max(1, steps - 1)
        drawn = [_drawn(sequence, self._vocabulary) for sequence in work.sequences]
        for step in range(steps):
            tokens = [next(one, _ENDED) for one in drawn]
            if all(token == _ENDED for token in tokens):
                return
            after_s = work.first_token_s + step * rest_s if steps > 1 else work.service_s
            _sleep_until(started_s + after_s * self._time_scale)
            yield tokens

    def close(self) -> None:
        """End the other ranks."""
        stages, self._stages = self._stages, []
        for stage in stages:
            stage.communicate()  # closes its input


def _drawn(sequence: PromptSequence, vocabulary: int) -> Iterator[int]:
    """Yield a sequence's tokens; they depend on its prompt alone, as greedy ones do."""
    seed = zlib.crc32(array("i", sequence.prompt).tobytes())
    for position in range(sequence.output_tokens):
        token = pick(seed, "emulated", position, vocabulary)
        yield token
        if token in sequence.stop_token_ids:
            return


def _vocabulary(config_json: str) -> int:
    try:
        size = json.loads(config_json).get("vocab_size", _DEFAULT_VOCABULARY)
    except (ValueError, AttributeError, RecursionError):
        raise EngineError(FailureKind.UNSUPPORTED, "the model's configuration is no JSON object") from None
    if not isinstance(size, int) or not 1 <= size <= _MAX_VOCABULARY:
        raise EngineError(FailureKind.UNSUPPORTED, f"vocab_size must be a positive whole number, not {size!r}")
    return size


def _sleep_until(due_s: float) -> None:
    left_s = due_s - time.monotonic()
    if left_s > 0:
        time.sleep(left_s)
