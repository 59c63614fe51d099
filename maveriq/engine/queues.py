"""The waiting requests of an engine, in the order of its scheduling policy (`vllm/v1/core/sched/request_queue.py`)."""

from __future__ import annotations

from bisect import insort
from collections import deque
from collections.abc import Iterator
from typing import Protocol

from maveriq.engine.sequence import Sequence


class WaitingQueue(Protocol):
    """Sequences that wait for admission; iteration goes from the head."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Sequence]: ...

    def add(self, sequence: Sequence) -> None:
        """Add a new sequence."""

    def put_back(self, sequence: Sequence) -> None:
        """Add a preempted sequence."""

    def head(self) -> Sequence:
        """Return the next sequence."""

    def pop(self) -> Sequence:
        """Remove and return the next sequence."""

    def remove(self, sequence: Sequence) -> None:
        """Remove a sequence from wherever it is."""


class FcfsQueue:
    """First come, first served; preempted sequences go to the head."""

    __slots__ = ("_items",)

    def __init__(self) -> None:
        self._items: deque[Sequence] = deque()

    def __len__(self) -> int:
        return len(self._items)

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._items)

    def add(self, sequence: Sequence) -> None:
        """Add a new sequence at the tail."""
        self._items.append(sequence)

    def put_back(self, sequence: Sequence) -> None:
        """Add a preempted sequence at the head."""
        self._items.appendleft(sequence)

    def head(self) -> Sequence:
        """Return the next sequence."""
        return self._items[0]

    def pop(self) -> Sequence:
        """Remove and return the next sequence."""
        return self._items.popleft()

    def remove(self, sequence: Sequence) -> None:
        """Remove a sequence from wherever it is."""
        self._items.remove(sequence)


class PriorityQueue:
    """The least `Sequence.order` first, wherever a sequence comes from."""

    __slots__ = ("_items",)

    def __init__(self) -> None:
        self._items: list[Sequence] = []  # from tail to head

    def __len__(self) -> int:
        return len(self._items)

    def __iter__(self) -> Iterator[Sequence]:
        return reversed(self._items)

    def add(self, sequence: Sequence) -> None:
        """Add a sequence at its place."""
        insort(self._items, sequence, key=_descending)

    def put_back(self, sequence: Sequence) -> None:
        """Add a preempted sequence at its place."""
        self.add(sequence)

    def head(self) -> Sequence:
        """Return the next sequence."""
        return self._items[-1]

    def pop(self) -> Sequence:
        """Remove and return the next sequence."""
        return self._items.pop()

    def remove(self, sequence: Sequence) -> None:
        """Remove a sequence from wherever it is."""
        self._items.remove(sequence)


def _descending(sequence: Sequence) -> tuple[int, int]:
    priority, arrival = sequence.order
    return -priority, -arrival
