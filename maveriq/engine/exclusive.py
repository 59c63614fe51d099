"""An engine that takes one execution at a time: a batch is computed to its end before the next one starts.

So do the engines of the published system (docs/spec.md), and all static batching.
"""

from __future__ import annotations

from maveriq.engine.batching import BatchingEngine
from maveriq.engine.kv_blocks import KVBlockPool
from maveriq.engine.steps import Step


class ExclusiveEngine(BatchingEngine):
    """An engine that computes one batch to its end (mutable).

    Args:
        pool: its KV blocks, without a prefix cache.
        max_model_len: longest sequence, prompt and output.
        max_num_seqs: requests of a batch.
    """

    def __init__(self, pool: KVBlockPool, *, max_model_len: int, max_num_seqs: int) -> None:
        super().__init__(pool, max_model_len=max_model_len, overlaps=False)
        self.max_num_seqs = max_num_seqs

    def _compose(self, step: Step) -> None:
        """Start a batch with all its prompts, or decode the one that runs."""
        if self.running:
            for sequence in self.running:
                self._hold(sequence, sequence.computed + 1)
                self._schedule(step, sequence, 1)
            return
        promised = 0
        while self.waiting and len(self.running) < self.max_num_seqs:
            sequence = self.waiting.head()
            promised += -(-sequence.limit // self.pool.block_size)
            if promised > self.pool.blocks:
                return
            self._admit(sequence, [])
            self._hold(sequence, sequence.length)
            self._schedule(step, sequence, sequence.length)

    def _is_blocked(self) -> bool:
        return True  # while anything runs
