"""The waiting requests of an engine, in the order of its scheduling policy (`vllm/v1/core/sched/request_queue.py`)."""

from __future__ import annotations

from bisect import insort
from collections import deque
from collections.abc import Iterator
from typing import TypeAlias

from maveriq.engine.sequence import Sequence


class FcfsQueue(deque[Sequence]):
    """First come, first served; preempted sequences go to the head."""

    __slots__ = ()

    def add(self, sequence: Sequence) -> None:
        """Add a new sequence at the tail."""
        self.append(sequence)

    def put_back(self, sequence: Sequence) -> None:
        """Add a preempted sequence at the head."""
        self.appendleft(sequence)

    def head(self) -> Sequence:
        """Return the next sequence."""
        return self[0]

    def take(self) -> Sequence:
        """Remove and return the next sequence."""
        return self.popleft()

    def in_order(self) -> Iterator[Sequence]:
        """Iterate from the head."""
        return iter(self)


class PriorityQueue(list[Sequence]):
    """The least `Sequence.order` first, wherever a sequence comes from. The list goes from the tail to the head."""

    __slots__ = ()

    def add(self, sequence: Sequence) -> None:
        """Add a sequence at its place."""
        insort(self, sequence, key=_descending)

    def put_back(self, sequence: Sequence) -> None:
        """Add a preempted sequence at its place."""
        self.add(sequence)

    def head(self) -> Sequence:
        """Return the next sequence."""
        return self[-1]

    def take(self) -> Sequence:
        """Remove and return the next sequence."""
        return self.pop()

    def in_order(self) -> Iterator[Sequence]:
        """Iterate from the head."""
        return reversed(self)


WaitingQueue: TypeAlias = FcfsQueue | PriorityQueue
"""Sequences that wait for admission."""


def _descending(sequence: Sequence) -> tuple[int, int]:
    priority, arrival = sequence.order
    return -priority, -arrival
