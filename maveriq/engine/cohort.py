"""Sequences that decode one token in every step, counted together.

Between two events of an engine most of its sequences do the same: each computes one token a step and takes a block
whenever one is full. Here they are numbers that a step, or many steps, change at once. What is true of one sequence
follows from when it joined.
"""

from __future__ import annotations

from heapq import heappop, heappush

from maveriq.engine.sequence import Sequence


class DecodeCohort:
    """The sequences of an engine that decode in every step (mutable).

    Time is counted in steps: `tick` is the number of the next step to be composed.

    Args:
        block_size: tokens of a KV block.
    """

    __slots__ = ("_block_size", "_ends", "_entries", "_offsets", "_phases", "size", "tick")

    def __init__(self, block_size: int) -> None:
        self.size = 0
        self.tick = 0
        self._block_size = block_size
        self._offsets = 0  # sum over the sequences; a sequence has computed `offset + tick` tokens
        self._phases = [0] * block_size  # sequences by the tick, modulo the block size, at which they take a block
        self._ends: list[tuple[int, int, Sequence]] = []  # by the tick of the last step; past members remain in it
        self._entries = 0

    @property
    def context_tokens(self) -> int:
        """Tokens that the sequences attend to in the next step, themselves included."""
        return self._offsets + self.size * (self.tick + 1)

    def join(self, sequence: Sequence, tick: int, pending: int) -> None:
        """Add a sequence that decodes from step `tick` on.

        Args:
            sequence: it has computed all its tokens but those of steps in flight, and ends in step `tick` or later.
            tick: its first step here, which is composed next.
            pending: steps in flight, the newest ones, that each give it a token.
        """
        self._entries += 1
        offset = sequence.offset = sequence.computed - tick
        sequence.joined_tick = tick
        sequence.counts_from = tick - pending
        sequence.cohort_entry = self._entries
        self.size += 1
        self._offsets += offset
        self._phases[-offset % self._block_size] += 1
        heappush(self._ends, (sequence.end - 2 - offset, self._entries, sequence))

    def leave(self, sequence: Sequence, tick: int, done: int) -> None:
        """Remove a sequence, and write down how far it is.

        Args:
            sequence: the sequence.
            tick: its first step elsewhere.
            done: steps whose tokens have been taken.
        """
        offset = sequence.offset
        sequence.cohort_entry = 0
        sequence.computed = offset + tick
        sequence.length = self.length_of(sequence, done)
        sequence.blocks = -(-sequence.computed // self._block_size)
        self.size -= 1
        self._offsets -= offset
        self._phases[-offset % self._block_size] -= 1

    def length_of(self, sequence: Sequence, done: int) -> int:
        """Return the length of a sequence when the tokens of `done` steps have been taken."""
        return sequence.length + max(0, done - sequence.counts_from)

    def end_tick(self) -> int:
        """Return the number of the first step in which a sequence computes its last token."""
        ends = self._ends
        while ends[0][2].cohort_entry != ends[0][1]:
            heappop(ends)
        return ends[0][0]

    def ending(self, tick: int) -> list[Sequence]:
        """Return the sequences that compute their last token in step `tick`, the first joined first."""
        ends, found = self._ends, []
        while ends and ends[0][0] <= tick:
            _, entry, sequence = heappop(ends)
            if sequence.cohort_entry == entry:
                found.append(sequence)
        return found

    def blocks_needed(self, steps: int = 1) -> int:
        """Return how many blocks the sequences take in the next steps."""
        size, phases, tick = self._block_size, self._phases, self.tick
        if steps == 1:
            return phases[tick % size]
        rounds, rest = divmod(steps, size)
        start = tick % size
        end = start + rest
        some = sum(phases[start:end]) if end <= size else sum(phases[start:]) + sum(phases[: end - size])
        return rounds * self.size + some

    def steps_within(self, blocks: int, limit: int) -> int:
        """Return how many next steps, at most `limit`, some blocks suffice for."""
        size = self._block_size
        if (limit // size + 1) * self.size <= blocks:
            return limit
        rounds = blocks // self.size
        steps, left = rounds * size, blocks - rounds * self.size
        while steps < limit:
            left -= self._phases[(self.tick + steps) % size]
            if left < 0:
                break
            steps += 1
        return min(steps, limit)
