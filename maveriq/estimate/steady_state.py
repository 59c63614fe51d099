"""Times of requests in an engine with continuous batching that always has the same number of them in flight.

While a request decodes, each of the others finishes once on average, and the prompt of the next one is processed: in
steps that hold prefill beside decoding sequences, or in steps of their own. The same form gives the times of closed
loops that `experiments/physics/evaluate.py` compares with measured ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

from maveriq.estimate.step_time import Chunk

StepTime: TypeAlias = Callable[[float, Sequence[Chunk]], float]
"""Returns the time of a step in µs: decoding sequences, and chunks of prompts."""


class SteadyTimes(NamedTuple):
    """Mean times of a request, µs."""

    first_us: float
    token_us: float


@dataclass(frozen=True, slots=True, kw_only=True)
class SteadyLoad:
    """Requests that an engine always has in flight.

    Args:
        in_flight: how many.
        prompt_tokens: tokens of each prompt.
        output_tokens: tokens of each output.
        stages: pipeline stages, among which the sequences are dealt in as many batches.
        max_step_tokens: most tokens of a step; longer prompts are cut into chunks.
        mixes_prefill: whether sequences go on decoding in steps that hold prefill.
        asynchronous: whether the next step is prepared already when a request arrives, so that it waits one more.
    """

    in_flight: int
    prompt_tokens: int
    output_tokens: int
    stages: int = 1
    max_step_tokens: int
    mixes_prefill: bool
    asynchronous: bool

    def times(self, step_us: StepTime) -> SteadyTimes:
        """Return the mean times of a request, from its arrival."""
        others, batches = self.in_flight - 1, min(self.stages, self.in_flight)
        decodes = self.in_flight / batches
        chunks = math.ceil(self.prompt_tokens / max(1, self.max_step_tokens - math.ceil(decodes)))
        chunk = Chunk(
            tokens=math.ceil(self.prompt_tokens / chunks),
            past=round(self.prompt_tokens * (chunks - 1) / chunks / 2),
        )
        # Steps with prefill hold so many chunks that there are no more of them than tokens.
        a_step = max(1, math.ceil(others * chunks / self.output_tokens))
        share = others * chunks / a_step / self.output_tokens
        decode_us = step_us(decodes, ())
        beside = decodes - 1 if self.mixes_prefill else 0.0
        prefill_us = step_us(beside, [chunk] * a_step)
        longer_us = max(0.0, prefill_us - decode_us) if self.mixes_prefill else prefill_us
        # A chunk of another batch delays a pipeline by one stage of it, one of the same batch by all.
        felt = 1 / batches + (1 - 1 / batches) / self.stages
        token_us = decode_us + share * longer_us * felt
        if not others:
            return SteadyTimes(first_us=chunks * prefill_us, token_us=token_us)
        # An arrival waits for the step that runs, for one more where that is prepared, and for prompts before its own:
        # as at a server of equal service times with random arrivals (M/D/1), at most for half of the others.
        own_us = chunks * step_us(beside, [chunk])
        first_us = (1.5 if self.asynchronous else 0.5) * token_us + chunks * prefill_us
        busy = others * own_us / (first_us + self.output_tokens * token_us)
        ahead = min(busy / (2 * (1 - busy)), others / 2) if busy < 1 else others / 2
        return SteadyTimes(first_us=first_us + ahead * own_us, token_us=token_us)
