"""The emulated engine that batches continuously: a real process with a queue, which computes nothing.

It follows the rules of vLLM in small: one token budget a step, running requests first, prompts in chunks, preemption
from the end of the line, admission in order of arrival. A step takes a fixed time, and some more for each token of a
prompt. `maveriq run --backend emulated` has the whole models of engines instead (`maveriq.exec.emulated_batching`).
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator

import msgspec

from maveriq.exec.engines.continuous import StepOutput
from maveriq.exec.engines.emulated import EmulatedEngine, emulated_tokens, sleep_until, vocabulary_size
from maveriq.exec.engines.engine import EngineError, FailureKind
from maveriq.exec.messages import EngineSpec, Loaded, PromptSequence


class EmulatedBatching(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The arguments of an emulated engine that batches continuously.

    Args:
        max_num_seqs: requests that run together.
        max_num_batched_tokens: tokens of a step.
        kv_tokens: tokens that the KV cache holds.
        step_ms: time of a step, in milliseconds of the run.
        prompt_token_us: what each token of a prompt adds, in microseconds.
    """

    max_num_seqs: int = 256
    max_num_batched_tokens: int = 8192
    kv_tokens: int = 1_000_000
    step_ms: float = 10.0
    prompt_token_us: float = 20.0


class _Sequence:
    """A request in the engine (mutable)."""

    __slots__ = ("computed", "length", "produced", "request", "was_admitted")

    def __init__(self, request: PromptSequence, produced: Iterator[int]) -> None:
        self.request = request
        self.produced = produced
        self.length = len(request.prompt)  # prompt and output
        self.computed = 0
        self.was_admitted = False

    @property
    def is_complete(self) -> bool:
        return self.length - len(self.request.prompt) >= self.request.output_tokens


class EmulatedContinuousEngine:
    """A `ContinuousEngine` that sleeps, and makes tokens up."""

    def __init__(self) -> None:
        self._process = EmulatedEngine()
        self._batching = EmulatedBatching()
        self._time_scale = 1.0
        self._vocabulary_size = 1
        self._waiting: deque[_Sequence] = deque()
        self._running: list[_Sequence] = []

    def load(self, spec: EngineSpec) -> Loaded:
        """Start the other ranks and take the estimated load time.

        Raises:
            EngineError: the model's configuration is not a JSON object, or an argument is unknown.
        """
        arguments = {} if spec.batching is None else spec.batching.arguments
        try:
            self._batching = msgspec.convert(arguments, EmulatedBatching)
        except msgspec.ValidationError as error:
            raise EngineError(FailureKind.UNSUPPORTED, f"emulated engine: {error}") from None
        self._time_scale = spec.time_scale
        self._vocabulary_size = vocabulary_size(spec.config_json)
        return msgspec.structs.replace(self._process.load(spec), kv_tokens=self._batching.kv_tokens)

    def submit(self, sequence: PromptSequence, *, is_urgent: bool) -> None:
        """Put a request into the queue, an urgent one at its head.

        Raises:
            EngineError: the KV cache could never hold it.
        """
        tokens = len(sequence.prompt) + sequence.output_tokens
        if tokens > self._batching.kv_tokens:
            raise EngineError(
                FailureKind.ERROR,
                f"emulated engine: a sequence of {tokens} tokens does not fit a KV cache of {self._batching.kv_tokens}",
            )
        queued = _Sequence(sequence, self._tokens_of(sequence))
        if is_urgent:
            self._waiting.appendleft(queued)
        else:
            self._waiting.append(queued)

    def _tokens_of(self, sequence: PromptSequence) -> Iterator[int]:
        return emulated_tokens(sequence, self._vocabulary_size)

    def abort(self, request_id: int) -> None:
        """End a request."""
        self._running = [sequence for sequence in self._running if sequence.request.request_id != request_id]
        self._waiting = deque(sequence for sequence in self._waiting if sequence.request.request_id != request_id)

    def step(self) -> StepOutput:
        """Take the time of a step, and give a token to each request whose tokens so far are computed."""
        started_s = time.monotonic()
        output = StepOutput()
        scheduled = self._schedule(output)
        prompt_tokens = sum(tokens for _, tokens in scheduled if tokens > 1)
        duration_s = self._batching.step_ms / 1e3 + prompt_tokens * self._batching.prompt_token_us / 1e6
        sleep_until(started_s + duration_s * self._time_scale)
        for sequence, _ in scheduled:
            if sequence.computed == sequence.length:
                self._emit(sequence, output)
        output.running, output.waiting = len(self._running), len(self._waiting)
        output.kv_tokens = self._used_tokens
        return output

    def close(self) -> None:
        """End the other ranks."""
        self._waiting.clear()
        self._running.clear()
        self._process.close()

    @property
    def _used_tokens(self) -> int:
        return sum(sequence.computed for sequence in self._running)

    def _schedule(self, output: StepOutput) -> list[tuple[_Sequence, int]]:
        """Choose what the step computes, and return it with the tokens of each sequence."""
        budget, free = self._batching.max_num_batched_tokens, self._batching.kv_tokens - self._used_tokens
        scheduled: list[tuple[_Sequence, int]] = []
        for sequence in list(self._running):
            if sequence not in self._running:
                continue  # preempted for one before it
            tokens = min(sequence.length - sequence.computed, budget)
            while tokens > free and self._running[-1] is not sequence:
                free += self._preempt(output)
            if tokens > free:
                self._preempt(output)
                break
            if tokens:
                scheduled.append((sequence, tokens))
                budget, free = budget - tokens, free - tokens
        while self._waiting and not output.preempted and budget and len(self._running) < self._batching.max_num_seqs:
            sequence = self._waiting[0]
            tokens = min(sequence.length, budget)
            if tokens > free:
                break
            self._running.append(self._waiting.popleft())
            if not sequence.was_admitted:
                sequence.was_admitted = True
                output.admitted.append((sequence.request.request_id, 0))
            scheduled.append((sequence, tokens))
            budget, free = budget - tokens, free - tokens
        for sequence, tokens in scheduled:
            sequence.computed += tokens
            output.computed.append(sequence.request.request_id)
            output.batch_tokens += tokens
        return scheduled

    def _preempt(self, output: StepOutput) -> int:
        """Take the KV cache from the last of the running requests, and return how many tokens that frees."""
        victim = self._running.pop()
        freed, victim.computed = victim.computed, 0
        self._waiting.appendleft(victim)
        output.preempted.append(victim.request.request_id)
        return freed

    def _emit(self, sequence: _Sequence, output: StepOutput) -> None:
        token = next(sequence.produced, None)
        request_id = sequence.request.request_id
        if token is not None:
            sequence.length += 1
            output.tokens.append((request_id, (token,)))
        if token is None or sequence.is_complete or token in sequence.request.stop_token_ids:
            self._running.remove(sequence)
            output.ended.append(request_id)
