"""What the models of TensorRT-LLM, SGLang and exclusive engines have in common: requests, steps in flight, tokens.

A kind says in `_compose` what a step computes. Sequences go one by one here; runs of steps that only decode are still
taken at once.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque

from maveriq.engine.interface import EngineCounters, QuietRun
from maveriq.engine.kv_blocks import KVBlockPool
from maveriq.engine.queues import FcfsQueue
from maveriq.engine.requests import EngineRequest, RequestId
from maveriq.engine.sequence import Sequence, SequenceStatus
from maveriq.engine.steps import Advanced, Emitted, ScheduledTokens, Step
from maveriq.errors import InputError, InvariantError


class BatchingEngine(ABC):
    """An engine that goes through its sequences one by one (mutable); `Engine` describes its public methods.

    Args:
        pool: its KV blocks.
        max_model_len: longest sequence, prompt and output.
        overlaps: whether a step is composed while the one before runs. Requests that end are then seen one step later,
            and their last token is followed by one that is dropped.
    """

    def __init__(self, pool: KVBlockPool, *, max_model_len: int, overlaps: bool) -> None:
        self.pool = pool
        self.max_model_len = max_model_len
        self.overlaps = overlaps
        self.waiting = FcfsQueue()
        self.running: list[Sequence] = []
        self.in_flight: deque[Step] = deque()
        self.preemptions = self.prompt_tokens = self.cached_tokens = 0
        self._sequences: dict[RequestId, Sequence] = {}
        self._arrivals = self._admissions = self._ticks = 0

    @abstractmethod
    def _compose(self, step: Step) -> None:
        """Decide what a step computes, by `_schedule`; admit and preempt."""

    @abstractmethod
    def _is_blocked(self) -> bool:
        """Return whether no waiting sequence can be admitted before a running one ends."""

    # Requests

    def submit(self, request: EngineRequest) -> None:
        """Add a request."""
        tokens = request.prompt_tokens + request.output_tokens
        longest = min(self.max_model_len, self.pool.blocks * self.pool.block_size)
        if tokens > longest:
            raise InputError(
                f"request {request.request_id!r}: {request.prompt_tokens} prompt and {request.output_tokens} output "
                f"tokens are more than the {longest} that the engine holds of one sequence; shorten it, or raise the "
                "engine's limits"
            )
        if request.request_id in self._sequences:
            raise InputError(f"request {request.request_id!r} is in the engine already; give each request its own ID")
        self._arrivals += 1
        sequence = Sequence(request, self.max_model_len, self._arrivals)
        self._sequences[request.request_id] = sequence
        self.waiting.add(sequence)

    def abort(self, request_id: RequestId) -> bool:
        """End a request now."""
        sequence = self._sequences.get(request_id)
        if sequence is None:
            return False
        self._end(sequence)
        return True

    # Steps

    def next_step(self) -> Step | None:
        """Compose the next step; None if the engine waits."""
        if not self._sequences or len(self.in_flight) > self.overlaps:
            return None
        step = Step(self._ticks)
        self._compose(step)
        if step.is_empty:
            return self.next_step() if step.preempted else None
        self._ticks += 1
        self.in_flight.append(step)
        return step

    def finish_step(self) -> list[Emitted]:
        """Take the tokens of the oldest step in flight."""
        if not self.in_flight:
            raise InvariantError("finish_step: no step is in flight")
        emitted = []
        for sequence, _, _, emits in self.in_flight.popleft().scheduled:
            if emits and sequence.status is not SequenceStatus.FINISHED:
                sequence.length += 1
                sequence.pending -= 1
                emitted.append(self._emit(sequence))
        return emitted

    def _emit(self, sequence: Sequence) -> Emitted:
        self.pool.register(sequence, min(sequence.computed, sequence.length))
        reason = sequence.finish_reason
        if reason is not None:
            self._end(sequence)
        return Emitted.of(sequence, sequence.length, reason)

    def _hold(self, sequence: Sequence, tokens: int) -> None:
        """Give a sequence the blocks of its first tokens, which the scheduler has found to be there."""
        if not self.pool.allocate(sequence, tokens):
            raise InvariantError(f"engine: {sequence} was scheduled without free blocks for {tokens} tokens")

    def _schedule(self, step: Step, sequence: Sequence, tokens: int) -> None:
        """Let a step compute tokens of a running sequence, which has the blocks for them."""
        past = sequence.computed
        computed = sequence.computed = past + tokens
        emits = computed >= sequence.length + sequence.pending
        if emits:
            sequence.pending += 1
        step.add(sequence, tokens, past, emits=emits)

    def _admit(self, sequence: Sequence, found: list[int]) -> None:
        """Move a waiting sequence to the running ones, with the blocks of its prefix that are cached."""
        self.waiting.remove(sequence)
        self.running.append(sequence)
        self._admissions += 1
        if found:
            self.pool.share(sequence, found)
        if sequence.admit(self._admissions, len(found) * self.pool.block_size):
            self.prompt_tokens += sequence.prompt_tokens
            self.cached_tokens += sequence.cached_tokens

    def _preempt(self, step: Step, sequence: Sequence) -> None:
        """Take a running sequence's blocks; it keeps its tokens, and computes their keys and values anew later."""
        self.running.remove(sequence)
        self.pool.release(sequence)
        sequence.preempt()
        self.waiting.put_back(sequence)
        self.preemptions += 1
        step.preempted.append(sequence)

    def _end(self, sequence: Sequence) -> None:
        if sequence.status is SequenceStatus.RUNNING:
            self.running.remove(sequence)
        else:
            self.waiting.remove(sequence)
        self.pool.release(sequence)
        sequence.status = SequenceStatus.FINISHED
        del self._sequences[sequence.request.request_id]

    def is_decoding(self, sequence: Sequence) -> bool:
        """Return whether a sequence has generated something, and only its newest token is left to compute."""
        known = sequence.length + sequence.pending
        return sequence.computed == known - 1 and known > sequence.prompt_tokens

    # Runs of steps in which nothing happens

    def quiet_run(self) -> QuietRun | None:
        """Return the next steps in which nothing happens but decoding."""
        running = self.running
        if not running or not self._is_steady() or not self._is_blocked():
            return None
        steps = min(sequence.end - sequence.length - sequence.pending for sequence in running)
        while steps > 0 and self._blocks_for(steps) > self.pool.free_blocks:
            steps //= 2
        if steps < 1:
            return None
        return QuietRun(steps, len(running), sum(sequence.computed + 1 for sequence in running))

    def _is_steady(self) -> bool:
        """Return whether the step in flight, if there is to be one, holds what the next ones hold."""
        if len(self.in_flight) != self.overlaps or not all(map(self.is_decoding, self.running)):
            return False
        for step in self.in_flight:
            if step.chunks or [entry.sequence for entry in step.scheduled] != self.running:
                return False
        return True

    def _blocks_for(self, steps: int) -> int:
        size = self.pool.block_size
        return sum(-(-(sequence.computed + steps) // size) - sequence.blocks for sequence in self.running)

    def advance(self, steps: int) -> Advanced:
        """Do `next_step` and `finish_step` so many times."""
        for sequence in self.running:
            self._hold(sequence, sequence.computed + steps)
            sequence.computed += steps
        self._ticks += steps
        if not self.overlaps:
            self._count_tokens(steps)
            ending = [sequence for sequence in self.running if sequence.length >= sequence.end]
            return Advanced([], [self._emit(sequence) for sequence in ending])
        first = self.finish_step()
        self._count_tokens(steps - 1)
        newest = Step(self._ticks - 1)
        for sequence in self.running:
            sequence.pending += 1
            newest.scheduled.append(ScheduledTokens(sequence, 1, sequence.computed - 1, emits=True))
            newest.context_tokens += sequence.computed
        newest.decodes = len(self.running)
        self.in_flight.append(newest)
        return Advanced(first, [])

    def _count_tokens(self, tokens: int) -> None:
        for sequence in self.running:
            sequence.length += tokens
            self.pool.register(sequence, min(sequence.computed, sequence.length))

    @property
    def counters(self) -> EngineCounters:
        """The state of the engine."""
        return EngineCounters.of(self)
