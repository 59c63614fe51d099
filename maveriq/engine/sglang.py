"""The scheduler of SGLang (`managers/scheduler.py`, `schedule_policy.py`, `schedule_batch.py` of 0.5.23; SCHEDULERS 3).

Read, never run beside it. A step computes either prompts or the running requests, unless chunks are mixed with them.
How many requests are admitted depends on a guess of how much the running ones will still generate, `new_token_ratio`;
where the guess was too low, requests are retracted. The radix cache is modelled by pages that are found by their
content and reused in the order in which they were freed.
"""

from __future__ import annotations

from maveriq.engine.batching import BatchingEngine
from maveriq.engine.kv_blocks import KVBlockPool
from maveriq.engine.sequence import Sequence
from maveriq.engine.steps import Advanced, Step

_MOST_NEW_TOKENS = 4096  # of one request, in the guess (SGLANG_CLIP_MAX_NEW_TOKENS_ESTIMATION)
_INITIAL_RATIO, _LEAST_SHARE, _DECAY_STEPS = 0.7, 0.14, 600
_RETRACT_STEPS = 20


class SglangEngine(BatchingEngine):
    """An engine of SGLang (mutable).

    Args:
        pool: its KV cache, by pages.
        context_length: longest sequence, prompt and output.
        max_running_requests: requests that run together.
        max_prefill_tokens: prompt tokens of a step.
        chunked_prefill_size: the most tokens of prompts in a step, the last of which is cut; None computes them whole.
        conservativeness: scales the first guess.
        mixes_chunks: whether running requests decode beside prompts.
        overlaps: whether a step is composed while the one before runs.
    """

    def __init__(
        self,
        pool: KVBlockPool,
        *,
        context_length: int,
        max_running_requests: int,
        max_prefill_tokens: int = 16_384,
        chunked_prefill_size: int | None = 8_192,
        conservativeness: float = 1.0,
        mixes_chunks: bool = False,
        overlaps: bool = True,
    ) -> None:
        super().__init__(pool, max_model_len=context_length, overlaps=overlaps)
        self.max_running_requests = max_running_requests
        self.max_prefill_tokens = max_prefill_tokens
        self.chunked_prefill_size = chunked_prefill_size
        self.mixes_chunks = mixes_chunks
        self._first_ratio = min(_INITIAL_RATIO * conservativeness, 1.0)
        self._least_ratio = _LEAST_SHARE * self._first_ratio
        self.new_token_ratio = self._first_ratio
        self._is_full = False  # a request found no room, and none has ended since
        self._chunked: Sequence | None = None  # the one whose prompt is not computed to its end

    def _compose(self, step: Step) -> None:
        decoding = [sequence for sequence in self.running if self._is_whole(sequence)]
        prompts = self._prefill(decoding)
        for sequence, tokens in prompts:
            self._schedule(step, sequence, tokens)
            self.pool.register(sequence, sequence.computed)
        if not prompts:
            self._decode(step, decoding)
        elif self.mixes_chunks and self._pages_next(decoding) <= self.pool.free_blocks:
            for sequence in decoding:
                self._hold(sequence, sequence.computed + 1)
                self._schedule(step, sequence, 1)

    # Prompts

    def _prefill(self, decoding: list[Sequence]) -> list[tuple[Sequence, int]]:
        """Admit waiting requests; return whose prompts are computed, and how many tokens of each."""
        chosen: list[tuple[Sequence, int]] = []
        chunk = self.chunked_prefill_size if self.chunked_prefill_size is not None else 1 << 60
        left = self.max_prefill_tokens
        if self.mixes_chunks:
            chunk -= len(decoding)
            left -= len(decoding)
        room = self.pool.free_blocks * self.pool.block_size - sum(map(self._expected, decoding))
        if self._chunked is not None:
            sequence = self._chunked
            tokens = self._continue_chunked(sequence, chunk)
            if not tokens:
                return []
            chosen.append((sequence, tokens))
            chunk -= self._paged(tokens)
            left -= self._paged(tokens)
            room -= self._paged(tokens)
            if self._is_whole(sequence):
                room -= min(_new_tokens(sequence), _MOST_NEW_TOKENS)
        while self.waiting and not self._is_full and chunk > 0 and left > 0 and room > 0:
            admitted = self._admit_next(chunk, left, room, is_first=not chosen)
            if admitted is None:
                break
            sequence, tokens, reserved = admitted
            chosen.append((sequence, tokens))
            chunk -= self._paged(tokens)
            left -= self._paged(tokens)
            room -= reserved
        return chosen

    def _is_whole(self, sequence: Sequence) -> bool:
        return sequence is not self._chunked

    def _continue_chunked(self, sequence: Sequence, chunk: int) -> int:
        """Return how many tokens of the prompt that is being cut are computed; 0 if there are no pages for them."""
        page, rest = self.pool.block_size, sequence.length - sequence.computed
        tokens = rest if rest <= chunk else max(page, chunk // page * page)
        tokens = min(tokens, (self.pool.free_blocks + sequence.blocks) * page - sequence.computed)
        if tokens == rest:
            self._chunked = None
        self._hold(sequence, sequence.computed + tokens)
        return tokens

    def _admit_next(self, chunk: int, left: int, room: float, *, is_first: bool) -> tuple[Sequence, int, float] | None:
        """Admit the first waiting request; None if it does not fit. Return also what is set aside for it."""
        if len(self.running) >= self.max_running_requests:
            self._is_full = True
            return None
        pool, sequence = self.pool, self.waiting.head()
        found = pool.find(sequence)
        tokens = sequence.length - len(found) * pool.block_size
        new_tokens = min(_new_tokens(sequence), _MOST_NEW_TOKENS)
        locked = pool.unused(found) * pool.block_size  # pages that can be evicted no longer
        if tokens + new_tokens + pool.block_size >= room - locked:
            self._is_full = True
            return None
        paged = self._paged(tokens)
        if paged >= left and not is_first:
            return None
        if paged > chunk:
            tokens = chunk // pool.block_size * pool.block_size
            if not tokens:
                return None
            self._chunked = sequence
            new_tokens = 0
        self._admit(sequence, found)
        self._hold(sequence, sequence.computed + tokens)
        return sequence, tokens, self._paged(tokens) + new_tokens + locked

    def _expected(self, sequence: Sequence) -> float:
        """Return how many tokens a running request is guessed to generate still."""
        ratio = 1.0 if sequence.request.max_tokens is None else self.new_token_ratio  # the end of the text is ignored
        return min(_new_tokens(sequence), _MOST_NEW_TOKENS) * ratio

    def _paged(self, tokens: int) -> int:
        size = self.pool.block_size
        return -(-tokens // size) * size

    # Running requests

    def _decode(self, step: Step, decoding: list[Sequence]) -> None:
        if not decoding:
            return
        if self._pages_next(decoding) > self.pool.free_blocks:
            decoding = self._retract(step, decoding)
        else:
            self._decay_ratio(1)
        for sequence in decoding:
            self._hold(sequence, sequence.computed + 1)
            self._schedule(step, sequence, 1)

    def _pages_next(self, decoding: list[Sequence]) -> int:
        size = self.pool.block_size
        return sum(-(-(sequence.computed + 1) // size) - sequence.blocks for sequence in decoding)

    def _retract(self, step: Step, decoding: list[Sequence]) -> list[Sequence]:
        """Take the pages of requests until those of the others suffice; return the others.

        SGLang aborts a request that does not fit alone beside the prompt that is being cut; here it waits.
        """
        # The last one leaves first: the fewest generated tokens, then the longest prompt.
        kept = sorted(decoding, key=lambda sequence: (_generated(sequence), -sequence.prompt_tokens), reverse=True)
        while kept and self._pages_next(kept) > self.pool.free_blocks:
            self._preempt(step, kept.pop())
        generated = sum(map(_generated, kept)) + _RETRACT_STEPS * len(kept)
        asked = sum(sequence.limit - sequence.prompt_tokens for sequence in kept)
        self.new_token_ratio = min(1.0, generated / (asked + 1))
        self._is_full = False
        staying = set(kept)
        return [sequence for sequence in decoding if sequence in staying]

    def _decay_ratio(self, steps: int) -> None:
        decay = (self._first_ratio - self._least_ratio) / _DECAY_STEPS
        self.new_token_ratio = max(self.new_token_ratio - steps * decay, self._least_ratio)

    def advance(self, steps: int) -> Advanced:
        """Do `next_step` and `finish_step` so many times."""
        self._decay_ratio(steps)
        return super().advance(steps)

    def _end(self, sequence: Sequence) -> None:
        if sequence is self._chunked:
            self._chunked = None
        self._is_full = False
        super()._end(sequence)

    def _is_blocked(self) -> bool:
        return not self.waiting or self._is_full


def _generated(sequence: Sequence) -> int:
    return sequence.length - sequence.prompt_tokens


def _new_tokens(sequence: Sequence) -> int:
    return sequence.limit - sequence.length
