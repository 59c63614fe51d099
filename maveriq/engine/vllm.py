"""The scheduler of vLLM V1 (`vllm/v1/core/sched/scheduler.py`, `async_scheduler.py`; SCHEDULERS 1.2 to 1.6).

`VllmScheduler` does what vLLM's `Scheduler` and `AsyncScheduler` do: `schedule` composes a step and `update` takes its
tokens. It knows no clock. `maveriq.engine.vllm_engine` is the loop around it.
"""

from __future__ import annotations

from bisect import insort
from collections import deque
from dataclasses import dataclass

from maveriq.domain.engine_defaults import VllmRules
from maveriq.engine.cohort import DecodeCohort
from maveriq.engine.kv_blocks import KVBlockPool
from maveriq.engine.queues import FcfsQueue, PriorityQueue, WaitingQueue
from maveriq.engine.requests import EngineRequest, RequestId, shareable_tokens
from maveriq.engine.sequence import Sequence, SequenceStatus
from maveriq.engine.steps import Advanced, Emitted, ScheduledTokens, Step
from maveriq.errors import InputError


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerLimits:
    """The limits of a scheduler, by the engine's argument names."""

    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    long_prefill_token_threshold: int = 0
    enable_chunked_prefill: bool = True
    scheduler_reserve_full_isl: bool = True
    by_priority: bool = False
    async_scheduling: bool = False
    pipeline_parallel_size: int = 1

    @property
    def steps_in_flight(self) -> int:
        """Steps that are composed before the first of them has run (`EngineCore.batch_queue_size`)."""
        return max(2 if self.async_scheduling else 1, self.pipeline_parallel_size)


class VllmScheduler:
    """Composes the steps of one engine (mutable).

    Args:
        limits: see there.
        rules: of the engine's version.
        pool: its KV blocks.
        counts_together: whether sequences that only decode are counted together, which is much faster. Their tokens are
            then not listed one by one. The steps are the same. It has no effect with a pipeline.
    """

    def __init__(
        self, limits: SchedulerLimits, rules: VllmRules, pool: KVBlockPool, *, counts_together: bool = True
    ) -> None:
        self.limits = limits
        self.rules = rules
        self.pool = pool
        self.waiting: WaitingQueue = PriorityQueue() if limits.by_priority else FcfsQueue()
        self.running: list[Sequence] = []
        self.in_flight: deque[Step] = deque()
        self.preemptions = self.prompt_tokens = self.cached_tokens = 0
        self.cohort = DecodeCohort(pool.block_size)
        self._reserves = rules.reserve_full_prompt and limits.scheduler_reserve_full_isl
        self._counts_together = counts_together and limits.pipeline_parallel_size == 1
        self._singles: list[Sequence] = []  # running ones outside the cohort, in their order
        self._sequences: dict[RequestId, Sequence] = {}
        self._arrivals = self._admissions = 0
        self._done = 0  # steps whose tokens have been taken
        self._budget = 0
        self._step = Step()
        # Workers learn of the end of a request with the next step, which is composed even if it is empty.
        self._has_news = False

    # Requests

    def submit(self, request: EngineRequest) -> None:
        """Add a request to the waiting ones.

        Raises:
            InputError: its ID is that of a request which has not ended.
        """
        if request.request_id in self._sequences:
            raise InputError(f"request {request.request_id!r} is in the engine already; give each request its own ID")
        self._arrivals += 1
        sequence = Sequence(request, self.limits.max_model_len, self._arrivals)
        self._sequences[request.request_id] = sequence
        self.waiting.add(sequence)

    def abort(self, request_id: RequestId) -> bool:
        """End a request now; what steps in flight compute of it is dropped. Return whether it was here."""
        sequence = self._sequences.get(request_id)
        if sequence is None:
            return False
        if sequence.cohort_entry:
            self._leave_cohort(sequence, self.cohort.tick)
        self._end(sequence)
        return True

    @property
    def has_requests(self) -> bool:
        """Whether `schedule` is to be called: requests wait or run, or ended since the last call."""
        return bool(self._sequences) or self._has_news

    # Scheduling

    def schedule(self) -> Step:
        """Compose the next step: running sequences first, then admissions (SCHEDULERS 1.2)."""
        cohort = self.cohort
        step = self._step = Step(cohort.tick)
        self.in_flight.append(step)
        self._has_news = False
        self._budget = self.limits.max_num_batched_tokens
        if cohort.size:
            blocks = cohort.blocks_needed()
            if self._fit_together(blocks):
                step.together = step.decodes = cohort.size
                step.context_tokens = cohort.context_tokens
                self.pool.take(blocks)
                self._budget -= cohort.size
            else:
                self._dissolve_cohort()
        if self._singles or self.waiting:
            scheduled: dict[Sequence, int] = {}
            if self._singles:
                self._schedule_singles(scheduled)
            if self.waiting and not step.preempted:
                self._admit(scheduled)
            self._commit(scheduled)
        cohort.tick += 1
        for sequence in cohort.ending(step.tick):
            self._leave_cohort(sequence, cohort.tick)
        return step

    def _schedule_singles(self, scheduled: dict[Sequence, int]) -> None:
        """Give each running sequence outside the cohort its next tokens, in order; preempt where blocks are short.

        Blocks are short only while the cohort is empty, so that the victim is among these.
        """
        singles = self._singles
        index = 0
        while index < len(singles) and self._budget > 0:
            sequence = singles[index]
            tokens = min(self._next_tokens(sequence), self._budget)
            if tokens > 0:
                while not self.pool.allocate(sequence, sequence.computed + tokens):
                    victim = self._victim()
                    index -= self._steps_back(victim, index, scheduled)
                    self._preempt(victim, scheduled)
                    if victim is sequence:
                        return
                self._schedule(sequence, tokens, scheduled)
            index += 1

    def _next_tokens(self, sequence: Sequence) -> int:
        """Return how many tokens of a running sequence may be computed now, by all but the budget."""
        limits, pending = self.limits, sequence.pending
        if pending:
            if sequence.computed + 2 - pending >= sequence.limit:
                return 0  # its last token is in flight
            if limits.pipeline_parallel_size > 1 and self.rules.one_decode_in_flight:
                return 0
        tokens = self._cut_long(sequence.length + pending - sequence.computed)
        return min(tokens, limits.max_model_len - 1 - sequence.computed)

    def _cut_long(self, tokens: int) -> int:
        threshold = self.limits.long_prefill_token_threshold
        if 0 < threshold < tokens and not (self.rules.threshold_needs_company and len(self._sequences) == 1):
            return threshold
        return tokens

    def _victim(self) -> Sequence:
        """Return the running sequence that loses its blocks next."""
        if self.limits.by_priority:
            return max(self.running, key=lambda sequence: sequence.order)
        return self.running[-1]

    def _steps_back(self, victim: Sequence, index: int, scheduled: dict[Sequence, int]) -> int:
        """Return by how much the pass over running sequences moves back because of a victim."""
        if self.rules.cursor_follows_victims:
            return int(self._singles.index(victim) < index)
        return int(victim in scheduled)

    def _preempt(self, victim: Sequence, scheduled: dict[Sequence, int]) -> None:
        """Put a running sequence back to the waiting ones; it keeps its tokens and recomputes them."""
        self._budget += scheduled.pop(victim, 0)
        self.running.remove(victim)
        self._singles.remove(victim)
        self.pool.register_own(victim)
        self.pool.release(victim)
        victim.preempt()
        self.waiting.put_back(victim)
        self.preemptions += 1
        self._step.preempted.append(victim)

    def _schedule(self, sequence: Sequence, tokens: int, scheduled: dict[Sequence, int]) -> None:
        scheduled[sequence] = tokens
        self._budget -= tokens
        self._register(sequence, min(sequence.computed + tokens, sequence.length))

    def _register(self, sequence: Sequence, tokens: int) -> None:
        if sequence.keys == []:
            sequence.registered = tokens  # no other request can find it in the cache
        else:
            self.pool.register(sequence, tokens)

    def _admit(self, scheduled: dict[Sequence, int]) -> None:
        """Admit waiting sequences in order, up to the first that does not fit."""
        waiting = self.waiting
        while waiting:
            sequence = waiting.head()
            placed = self._place(sequence)
            if placed is None:
                return
            found, tokens = placed
            cached = len(found) * self.pool.block_size
            if found:
                self.pool.share(sequence, found)
            self.pool.allocate(sequence, cached + tokens)
            waiting.take()
            self.running.append(sequence)
            self._singles.append(sequence)
            self._admissions += 1
            if sequence.admit(self._admissions, cached):
                self.prompt_tokens += sequence.prompt_tokens
                self.cached_tokens += cached
            self._schedule(sequence, tokens, scheduled)

    def _place(self, sequence: Sequence) -> tuple[list[int], int] | None:
        """Return the cached blocks and the next tokens of a waiting sequence, None if it must wait."""
        limits, pool, budget = self.limits, self.pool, self._budget
        if budget <= 0 or len(self.running) >= limits.max_num_seqs:
            return None
        found = pool.find(sequence)
        cached = len(found) * pool.block_size
        tokens = sequence.length - cached
        if limits.long_prefill_token_threshold:
            tokens = self._cut_long(tokens)
        if tokens > budget:
            if not limits.enable_chunked_prefill:
                return None
            tokens = budget
        needed = min(sequence.length, limits.max_model_len) if self._reserves else cached + tokens
        return (found, tokens) if pool.can_hold(needed, found) else None

    def _commit(self, scheduled: dict[Sequence, int]) -> None:
        """Count scheduled tokens as computed, before the step runs."""
        step, asynchronous = self._step, self.limits.async_scheduling
        pending = 1
        for sequence, tokens in scheduled.items():
            past = sequence.computed
            computed = sequence.computed = past + tokens
            emits = computed >= sequence.length + sequence.pending
            if emits and asynchronous:
                pending = sequence.pending = sequence.pending + 1
            step.add(sequence, tokens, past, emits=emits)
            if emits and computed <= sequence.end - 2 and self._counts_together and self._may_join(sequence):
                self._singles.remove(sequence)
                self.cohort.join(sequence, step.tick + 1, pending)

    # Sequences that are counted together

    def _fit_together(self, blocks: int) -> bool:
        """Return whether the cohort, which takes `blocks`, can decode without regard to the order of running sequences.

        That is so if the budget and the free blocks suffice for all, or if the budget is short only for sequences that
        come after the whole cohort.
        """
        left = self._budget - self.cohort.size
        if not self._singles:
            return left >= 0 and blocks <= self.pool.free_blocks
        is_short = False
        for sequence in self._singles:
            tokens = max(0, self._next_tokens(sequence))
            if tokens > left:
                is_short, tokens = True, left
            left -= tokens
            blocks += max(0, -(-(sequence.computed + tokens) // self.pool.block_size) - sequence.blocks)
        if left < 0 or blocks > self.pool.free_blocks:
            return False
        return not is_short or self.running[self.cohort.size :] == self._singles

    def _may_join(self, sequence: Sequence) -> bool:
        """Return whether no other request can find what a sequence generates in the prefix cache."""
        if sequence.keys == [] or not self.pool.prefix_caching or not sequence.request.is_shareable:
            return True
        return shareable_tokens(sequence.request) <= sequence.prompt_tokens

    def _leave_cohort(self, sequence: Sequence, tick: int) -> None:
        """Count a sequence by itself from step `tick` on; also in steps in flight."""
        self.cohort.leave(sequence, tick, self._done)
        pending = sequence.computed + 1 - sequence.length
        if self.limits.async_scheduling:
            sequence.pending = pending
        sequence.registered = max(sequence.registered, sequence.computed - sequence.pending)
        for step in self.in_flight:
            if step.together and step.tick >= sequence.joined_tick:
                step.together -= 1
                step.scheduled.append(ScheduledTokens(sequence, 1, sequence.offset + step.tick, emits=True))
        if self._singles:
            insort(self._singles, sequence, key=_admission_of)
        else:
            self._singles.append(sequence)

    def _dissolve_cohort(self) -> None:
        for sequence in self.running:
            if sequence.cohort_entry:
                self._leave_cohort(sequence, self.cohort.tick)
        self._singles = self.running.copy()

    # Runs of steps in which nothing happens

    def quiet_steps(self) -> int:
        """Return how many of the next steps only decode: no request is admitted or preempted; some may end in the last.

        It is 0 where the scheduler cannot tell. A request that is submitted or aborted ends the run.
        """
        cohort = self.cohort
        if not cohort.size or len(self.in_flight) != self.limits.async_scheduling:
            return 0
        for sequence in self._singles:
            if self._next_tokens(sequence) > 0:
                return 0  # others wait for their last token
        budget = self._budget = self.limits.max_num_batched_tokens - cohort.size
        if budget < 0:
            return 0
        if self.waiting:
            head = self.waiting.head()
            if budget and len(self.running) < self.limits.max_num_seqs and self.pool.can_hold(head.length):
                return 0  # it is most likely admitted
            if self._place(head) is not None:
                return 0
        steps = cohort.steps_within(self.pool.free_blocks, cohort.end_tick() - cohort.tick + 1)
        if self.waiting and self._singles:
            return min(steps, 1)  # they end when the step in flight has run, and make room
        return steps

    def advance(self, steps: int) -> Advanced:
        """Compose `steps` steps, at most `quiet_steps`, and take the tokens of as many."""
        cohort, in_flight = self.cohort, self.in_flight
        size = cohort.size
        self.pool.take(cohort.blocks_needed(steps))
        tick = cohort.tick = cohort.tick + steps
        if not in_flight:
            self._has_news = False
            self._done += steps
            ending = cohort.ending(tick - 1)
            for sequence in ending:
                self._leave_cohort(sequence, tick)
            if len(ending) > 1:
                ending.sort(key=_admission_of)
            return Advanced([], [self._emit(sequence) for sequence in ending])
        first = self.update()
        self._has_news &= steps == 1  # a later step has brought the news
        self._done += steps - 1
        newest = Step(tick - 1)
        newest.together = newest.decodes = size
        newest.context_tokens = cohort.context_tokens - size
        in_flight.append(newest)
        for sequence in cohort.ending(tick - 1):
            self._leave_cohort(sequence, tick)
        return Advanced(first, [])

    # Tokens

    def update(self) -> list[Emitted]:
        """Take the tokens of the oldest step in flight; return those that are not counted together, in order."""
        step = self.in_flight.popleft()
        self._done += 1
        emitted: list[Emitted] = []
        if not step.scheduled:
            return emitted
        if len(step.scheduled) > 1:
            step.scheduled.sort(key=_admission_of_entry)  # those that left the cohort came last
        for sequence, _, _, emits in step.scheduled:
            if emits and sequence.status is not SequenceStatus.FINISHED:
                if not sequence.cohort_entry:
                    self._count_token(sequence)
                emitted.append(self._emit(sequence))
        return emitted

    def _count_token(self, sequence: Sequence) -> None:
        sequence.length += 1
        if self.limits.async_scheduling:
            sequence.pending -= 1
            known = sequence.computed - sequence.pending
            if known > sequence.registered and sequence.status is SequenceStatus.RUNNING:
                self._register(sequence, known)

    def _emit(self, sequence: Sequence) -> Emitted:
        """Return a sequence's newest token; end the sequence if it is the last."""
        if sequence.cohort_entry:
            return Emitted.of(sequence, self.cohort.length_of(sequence, self._done), None)
        reason = sequence.finish_reason
        if reason is not None:
            self._end(sequence)
        return Emitted.of(sequence, sequence.length, reason)

    def _end(self, sequence: Sequence) -> None:
        """Free what a sequence holds, at once."""
        if sequence.status is SequenceStatus.RUNNING:
            self.running.remove(sequence)
            self._singles.remove(sequence)
        else:
            self.waiting.remove(sequence)
        self.pool.release(sequence)
        sequence.status = SequenceStatus.FINISHED
        del self._sequences[sequence.request.request_id]
        self._has_news = True


def _admission_of(sequence: Sequence) -> int:
    return sequence.admission


def _admission_of_entry(entry: ScheduledTokens) -> int:
    return entry.sequence.admission
