"""Times of requests in an engine with continuous batching that always has the same number of them in flight.

While a request decodes, each of the others finishes once on average, and the prompt of the next one is processed: in
steps that hold prefill beside decoding sequences, or in passes of its own between steps. How many prompts begin in a
step follows from Little's law: requests in flight are those that begin in a step times the steps that each spends.
Near saturation, prompts fill what decoding leaves of a step's tokens, and further ones wait. So latency rises with the
requests in flight, and throughput does not fall.

`maveriq plan --engine` estimates with it, and `experiments/physics/evaluate.py` compares it with measured closed loops.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

from maveriq.estimate.step_time import Chunk

StepTime: TypeAlias = Callable[[float, Sequence[Chunk]], float]
"""Returns the time of a step in µs: decoding sequences, and chunks of prompts."""

_HALVINGS = 40  # of the interval in which the rate of prompts is sought
_FEW_TOKENS = 2
_MANY_CHUNKS = 32  # beyond which each further chunk of a step takes as long as the last ones


class SteadyTimes(NamedTuple):
    """Mean times of a request, µs: from its arrival to its first token, and from token to token."""

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
        max_running: the most requests that the engine works at, for which it has KV blocks; others wait. None: all.
        in_step: whether all started together and have outputs of one length. Where prompts are processed apart, they
            stay together: all prompts come before any request decodes, and all end in the same step. Where steps mix,
            they end one step after the other, so that each waits for steps that hold the prompts of others.
    """

    in_flight: float
    prompt_tokens: float
    output_tokens: float
    stages: int = 1
    max_step_tokens: int
    mixes_prefill: bool
    asynchronous: bool
    max_running: float | None = None
    in_step: bool = False

    def times(self, step_us: StepTime) -> SteadyTimes:
        """Return the mean times of a request."""
        running = self.in_flight if self.max_running is None else min(self.in_flight, self.max_running)
        batches = max(1.0, min(self.stages, running))
        engine = _Engine(self, running / batches, batches, step_us)
        if self.mixes_prefill:
            first_us, token_us = engine.mixed()
        elif self.in_step:
            first_us, token_us = engine.together()
        else:
            first_us, token_us = engine.apart()
        decoding_us = engine.decode_steps * token_us
        if (
            engine.decode_steps < _FEW_TOKENS
        ):  # no engine takes longer than one that works at one request after the other
            first_us = min(first_us, max(running, 1.0) * engine.alone_us() - decoding_us)
        # What waits and what runs, by Little's law.
        first_us += (self.in_flight / running - 1) * (first_us + decoding_us)
        return SteadyTimes(first_us, token_us)


class _Engine:
    """One batch of a pipeline's stages: `requests` of the load, which are decoded together.

    Args:
        load: the load.
        requests: those of the batch, at least one where as many are in flight.
        batches: batches that take turns.
        step_us: the time of a step of all stages.
    """

    def __init__(self, load: SteadyLoad, requests: float, batches: float, step_us: StepTime) -> None:
        self.decode_steps = max(0.0, load.output_tokens - 1)  # prefill gives the first token
        self._load, self._requests, self._batches, self._time_us = load, requests, batches, step_us
        self._steps_us: dict[tuple[float, Chunk | None, int], float] = {}
        in_flight = requests * batches
        self._others = max(0.0, requests - 1) / requests  # share of the requests that are not the one looked at
        # Steps until a new request is taken in: the rest of the one that runs, and the one that is prepared.
        # A pipeline takes a request in whenever its first stage is free.
        self._left_steps = min(0.5 / load.stages, max(0.0, in_flight - 1))
        self._wait_steps = self._left_steps * (3 if load.asynchronous else 1)
        self._most_a_step = load.max_step_tokens / (load.prompt_tokens + self.decode_steps)  # prompts

    def alone_us(self) -> float:
        """Return the time of a request that has the engine to itself."""
        return self._passes_us(1.0) + self.decode_steps * self._step_us(1.0)

    def mixed(self) -> tuple[float, float]:
        """Return the times where chunks of prompts share the steps of decoding sequences."""
        load = self._load
        rate, steps = self._mixed_rate()
        room = max(load.max_step_tokens - rate * self.decode_steps, 1.0)
        chunks = max(1.0, load.prompt_tokens / room)
        chunk, most = self._chunk(chunks), room * chunks / load.prompt_tokens
        begun = rate * chunks  # chunks of a step
        decoding = self._decoding(steps)
        token_us = self._mixed_step_us(decoding, begun, begun * self._others, chunk)
        all_us = self._mixed_step_us(rate * self.decode_steps, begun, begun, chunk)
        # Little's law: a request takes as many steps as there are requests for each that begins in one.
        first_us = self._requests / rate * all_us - self.decode_steps * token_us
        if rate == self._most_a_step:
            return first_us, token_us
        others = begun * self._others  # chunks of a step that are not the request's own
        uneven = _unevenness(self._step_us(decoding), self._filled_us(decoding, others, chunk), others)
        wait_us = (self._wait_steps + self._left_steps * uneven) * token_us
        if load.in_step:
            wait_us = max(wait_us, self._wait_steps * self._filled_us(decoding, max(1.0, others), chunk))
        own_us = chunks * self._filled_us(decoding - 1, min(1 + others, most), chunk)
        queued_us = self._mixed_step_us(rate * self.decode_steps, most, most, chunk)
        waits_us = wait_us + max(0.0, steps - chunks - self._wait_steps) * queued_us
        return max(first_us, waits_us + own_us), token_us

    def apart(self) -> tuple[float, float]:
        """Return the times where prompts are processed between steps, while no sequence decodes."""
        decoding = self._decoding(self._wait_steps)
        rate = self._requests / max(self.decode_steps + self._wait_steps, 1.0)
        others = rate * self._others
        decode_us = self._step_us(decoding)
        passes_us = self._longer_us(rate, others, self._passes_us)
        token_us = decode_us + passes_us
        wait_us = self._wait_steps * (decode_us + passes_us)
        return wait_us + self._own_pass_us(others), token_us

    def together(self) -> tuple[float, float]:
        """Return the same where all requests begin and end together: none decodes when their prompts come."""
        others = self._requests - 1
        decode_us = self._step_us(self._requests)
        own_us = self._own_pass_us(others)
        later_us = self._passes_us(1 + others) - own_us
        return own_us, decode_us + later_us / max(self.decode_steps, 1.0)

    def _mixed_rate(self) -> tuple[float, float]:
        """Return the prompts that begin in a step, and the steps from a request's arrival to its first token."""
        prompt, most = self._load.prompt_tokens, self._load.max_step_tokens

        def steps_to_first(rate: float) -> float:
            room = most - rate * self.decode_steps
            busy = self._others * rate * prompt / room
            # Prompts before its own: as at a server of equal service times with random arrivals (M/D/1).
            queued = prompt / room * busy / (2 * (1 - busy))
            return self._wait_steps + max(1.0, prompt / room) + queued

        low, high = 0.0, self._most_a_step
        if high * (self.decode_steps + steps_to_first(high)) <= self._requests:
            return high, self._requests / high - self.decode_steps  # saturated: the others wait
        for _ in range(_HALVINGS):
            rate = (low + high) / 2
            if rate * (self.decode_steps + steps_to_first(rate)) < self._requests:
                low = rate
            else:
                high = rate
        return high, steps_to_first(high)

    def _decoding(self, steps: float) -> float:
        """Return the sequences that decode beside one that does, itself included."""
        return 1 + max(0.0, self._requests - 1) * self.decode_steps / max(self.decode_steps + steps, 1.0)

    def _mixed_step_us(self, decodes: float, chunks: float, own: float, chunk: Chunk) -> float:
        """Return the mean time of a step in which sequences decode beside chunks; see `_longer_us` for these."""
        decode_us = self._step_us(decodes)
        return decode_us + self._longer_us(
            chunks, own, lambda held: max(0.0, self._filled_us(decodes, held, chunk) - decode_us)
        )

    def _longer_us(self, chunks: float, own: float, longer_us: Callable[[float], float]) -> float:
        """Return how much longer a step takes because of chunks.

        A chunk of another batch delays a pipeline by one stage of it, unless the own batch has one, which takes longer
        in all stages.

        Args:
            chunks: of a step of each other batch, on the average.
            own: of a step of the own batch.
            longer_us: how much longer a step takes with so many.
        """
        behind = (1 - min(1.0, own)) * (self._batches - 1) / self._load.stages
        return longer_us(own) + (behind * longer_us(chunks) if behind else 0.0)

    def _chunk(self, chunks: float) -> Chunk:
        """Return a chunk of a prompt that is cut into so many."""
        tokens = self._load.prompt_tokens / chunks
        return Chunk(tokens=math.ceil(tokens), past=round((self._load.prompt_tokens - tokens) / 2))

    def _filled_us(self, decodes: float, chunks: float, chunk: Chunk) -> float:
        """Return the mean time of steps that hold so many chunks on the average."""
        if chunks > _MANY_CHUNKS:
            many_us, half_us = (self._step_us(decodes, chunk, n) for n in (_MANY_CHUNKS, _MANY_CHUNKS // 2))
            return many_us + (chunks - _MANY_CHUNKS) * (many_us - half_us) / (_MANY_CHUNKS - _MANY_CHUNKS // 2)
        whole = math.floor(chunks)
        fewer_us = self._step_us(decodes, chunk, whole)
        if chunks == whole:
            return fewer_us
        return fewer_us + (chunks - whole) * (self._step_us(decodes, chunk, whole + 1) - fewer_us)

    def _step_us(self, decodes: float, chunk: Chunk | None = None, chunks: int = 0) -> float:
        """Return the time of a step with equal chunks, which is asked for several times."""
        key = (decodes, chunk if chunks else None, chunks)
        if key not in self._steps_us:
            self._steps_us[key] = self._time_us(decodes, [] if chunk is None else [chunk] * chunks)
        return self._steps_us[key]

    def _passes_us(self, prompts: float) -> float:
        """Return the time of passes without decoding that process so many prompts, the last one partly filled."""
        load = self._load
        chunks = max(1.0, load.prompt_tokens / load.max_step_tokens)
        chunk, most = self._chunk(chunks), max(1.0, load.max_step_tokens / load.prompt_tokens)
        needed = prompts * chunks
        if needed < 1:
            return needed * self._filled_us(0, 1, chunk)
        if needed <= most:
            return self._filled_us(0, needed, chunk)
        return needed / most * self._filled_us(0, most, chunk)

    def _own_pass_us(self, others: float) -> float:
        """Return the time until the pass of a prompt ends, as many others' being processed with it or before it."""
        load = self._load
        in_pass = min(others, max(0.0, load.max_step_tokens / load.prompt_tokens - 1))
        # As first of all the others or as last, and on the average half way between.
        return (self._passes_us(1 + others) + self._passes_us(1 + in_pass)) / 2


def _unevenness(decode_us: float, mean_us: float, chunks: float) -> float:
    """Return the variance of the time of a step over the square of its mean, where a share of the steps holds a chunk.

    An arrival comes in a long step more likely than in a short one, and waits by so much longer for its end.
    """
    if not 0 < chunks < 1 or mean_us <= decode_us:
        return 0.0
    return (1 - chunks) / chunks * (1 - decode_us / mean_us) ** 2
