"""The schedulers of TensorRT-LLM: which requests may run, and what of them a step computes.

Read in NVIDIA/TensorRT-LLM, `cpp/tensorrt_llm/batch_manager/capacityScheduler.cpp` and `microBatchScheduler.cpp`, and
`tensorrt_llm/_torch/pyexecutor/scheduler/scheduler.py`; never run beside them (SCHEDULERS 2). Whole blocks are reused,
where TensorRT-LLM also reuses parts of blocks.
"""

from __future__ import annotations

from collections.abc import Iterator
from enum import Enum

from maveriq.engine.batching import BatchingEngine
from maveriq.engine.kv_blocks import KVBlockPool
from maveriq.engine.requests import BlockKey, EngineRequest
from maveriq.engine.sequence import Sequence, SequenceStatus
from maveriq.engine.steps import Step
from maveriq.errors import InputError


class CapacityPolicy(Enum):
    """Which requests may run."""

    GUARANTEED_NO_EVICT = "GUARANTEED_NO_EVICT"
    MAX_UTILIZATION = "MAX_UTILIZATION"
    STATIC_BATCH = "STATIC_BATCH"


class ChunkingPolicy(Enum):
    """How prompts that do not fit into a step share it."""

    FIRST_COME_FIRST_SERVED = "FIRST_COME_FIRST_SERVED"
    EQUAL_PROGRESS = "EQUAL_PROGRESS"


class TrtllmEngine(BatchingEngine):
    """An engine of TensorRT-LLM (mutable).

    Args:
        pool: its KV blocks.
        max_seq_len: longest sequence, prompt and output.
        max_batch_size: requests of a step.
        max_num_tokens: tokens of a step.
        capacity_policy: see there.
        chunking_policy: see there; None computes prompts whole.
        overlaps: whether a step is composed while the one before runs.
    """

    def __init__(
        self,
        pool: KVBlockPool,
        *,
        max_seq_len: int,
        max_batch_size: int,
        max_num_tokens: int,
        capacity_policy: CapacityPolicy = CapacityPolicy.GUARANTEED_NO_EVICT,
        chunking_policy: ChunkingPolicy | None = None,
        overlaps: bool = True,
    ) -> None:
        super().__init__(pool, max_model_len=max_seq_len, overlaps=overlaps)
        self.max_batch_size = max_batch_size
        self.max_num_tokens = max_num_tokens
        self.capacity_policy = capacity_policy
        self.chunking_policy = chunking_policy

    def submit(self, request: EngineRequest) -> None:
        """Add a request."""
        tokens = request.prompt_tokens
        if self.capacity_policy is CapacityPolicy.MAX_UTILIZATION:
            tokens += request.output_tokens  # a paused request computes these, too, when it comes back
        if self.chunking_policy is None and tokens > self.max_num_tokens:
            raise InputError(
                f"request {request.request_id!r}: {tokens} tokens are more than max_num_tokens {self.max_num_tokens}, "
                "and TensorRT-LLM splits prompts only if asked; set enable_chunked_prefill, or raise max_num_tokens"
            )
        super().submit(request)

    def _compose(self, step: Step) -> None:
        if self.capacity_policy is CapacityPolicy.MAX_UTILIZATION:
            chosen = self._fit_next_step(step)
        else:
            chosen = self._fit_until_end()
        generating, contexts = self._micro_batch(chosen)
        for sequence in generating:
            self._hold(sequence, sequence.computed + 1)
            self._schedule(step, sequence, 1)
        for sequence, tokens in contexts:
            self._start(sequence)
            self._hold(sequence, sequence.length)  # for the whole prompt, with its first chunk
            self._schedule(step, sequence, min(tokens, sequence.length - sequence.computed))
            self.pool.register(sequence, sequence.computed)

    def _active(self) -> Iterator[Sequence]:
        """Iterate over all requests, those that run first; within each part in the order of arrival."""
        yield from self.running
        yield from self.waiting

    def _start(self, sequence: Sequence) -> None:
        if sequence.status is not SequenceStatus.RUNNING:
            self._admit(sequence, self.pool.find(sequence))

    # Capacity

    def _fit_until_end(self) -> list[Sequence]:
        """Choose requests whose blocks suffice until they end, so that none ever loses its blocks."""
        pool, free = self.pool, self.pool.free_blocks
        generating = [sequence for sequence in self.running if self.is_decoding(sequence)]
        for sequence in generating:
            free -= self._blocks_to_end(sequence)
        chosen = generating[: self.max_batch_size]
        if self.capacity_policy is CapacityPolicy.STATIC_BATCH and generating:
            return chosen
        produced: set[BlockKey] = set()
        for sequence in self._active():
            if self.is_decoding(sequence) and sequence.status is SequenceStatus.RUNNING:
                continue
            if len(chosen) == self.max_batch_size:
                break
            found = [] if sequence.blocks else pool.find(sequence)
            if self._waits_for_block(sequence, found, produced):
                continue
            needed = self._blocks_to_end(sequence) - len(found) + pool.unused(found)
            if needed > free:
                break
            free -= needed
            chosen.append(sequence)
        return chosen

    def _blocks_to_end(self, sequence: Sequence) -> int:
        return max(0, -(-sequence.limit // self.pool.block_size) - sequence.blocks)

    def _waits_for_block(self, sequence: Sequence, found: list[int], produced: set[BlockKey]) -> bool:
        """Return whether a new request waits, to reuse a block that another one computes in this step."""
        keys = self.pool.keys_of(sequence)
        if sequence.status is SequenceStatus.RUNNING or len(found) >= len(keys):
            return False
        if keys[len(found)] in produced:
            return True
        produced.update(keys[len(found) :])
        return False

    def _fit_next_step(self, step: Step) -> list[Sequence]:
        """Choose requests whose blocks suffice for one step; pause the last started one where they do not."""
        active = list(self._active())
        chosen: list[Sequence] = []
        free = self.pool.free_blocks
        index = 0
        while index < len(active) and len(chosen) < self.max_batch_size:
            sequence = active[index]
            needed = self._blocks_next(sequence)
            if needed <= free:
                free -= needed
                chosen.append(sequence)
                index += 1
                continue
            started = [other for other in active[index:] if other.status is SequenceStatus.RUNNING]
            if not started:
                break
            victim = started[-1]
            active.remove(victim)
            free -= self.pool.free_blocks
            self._preempt(step, victim)
            free += self.pool.free_blocks
        return chosen

    def _blocks_next(self, sequence: Sequence) -> int:
        pool = self.pool
        if sequence.status is SequenceStatus.RUNNING:
            tokens = sequence.computed + 1 if self.is_decoding(sequence) else sequence.length
            return max(0, -(-tokens // pool.block_size) - sequence.blocks)
        found = pool.find(sequence)
        return -(-sequence.length // pool.block_size) - len(found) + pool.unused(found)

    # Tokens of a step

    def _micro_batch(self, chosen: list[Sequence]) -> tuple[list[Sequence], list[tuple[Sequence, int]]]:
        """Return the sequences that decode, and how many prompt tokens of each other one are computed."""
        generating: list[Sequence] = []
        contexts: list[tuple[Sequence, int]] = []
        left = self.max_num_tokens
        for sequence in chosen:
            is_generating = sequence.status is SequenceStatus.RUNNING and self.is_decoding(sequence)
            tokens = 1 if is_generating else self._uncomputed(sequence)
            if tokens > left and (is_generating or self.chunking_policy is None):
                break
            if is_generating:
                generating.append(sequence)
                left -= 1
            else:
                contexts.append((sequence, tokens))
                left -= tokens if self.chunking_policy is None else 0
        if self.chunking_policy is not None and sum(tokens for _, tokens in contexts) > left:
            contexts = self._chunks(contexts, left)
        return generating, contexts

    def _uncomputed(self, sequence: Sequence) -> int:
        if sequence.status is SequenceStatus.RUNNING:
            return sequence.length - sequence.computed
        return sequence.length - len(self.pool.find(sequence)) * self.pool.block_size

    def _chunks(self, contexts: list[tuple[Sequence, int]], left: int) -> list[tuple[Sequence, int]]:
        """Cut prompts so that they fit; a chunk that is cut is a multiple of the block size."""
        unit = self.pool.block_size
        sizes = [0] * len(contexts)
        if self.chunking_policy is ChunkingPolicy.FIRST_COME_FIRST_SERVED:
            for index, (_, tokens) in enumerate(contexts):
                sizes[index] = tokens if tokens <= left else left // unit * unit
                left -= sizes[index]
        else:
            grows = True
            while grows:
                grows = False
                for index, (_, tokens) in enumerate(contexts):
                    more = min(unit, tokens - sizes[index])
                    if 0 < more <= left:
                        sizes[index] += more
                        left -= more
                        grows = True
        return [(sequence, size) for (sequence, _), size in zip(contexts, sizes, strict=True) if size]

    def _is_blocked(self) -> bool:
        if not self.waiting or len(self.running) >= self.max_batch_size:
            return True
        if self.capacity_policy is CapacityPolicy.STATIC_BATCH:
            return True
        if self.capacity_policy is CapacityPolicy.MAX_UTILIZATION:
            return False
        return len(self._fit_until_end()) == len(self.running)
