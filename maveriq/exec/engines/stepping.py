"""Lining up sequences that an engine serves at their own pace, so that every step has a token of each."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator

from maveriq.exec.engines.base import Step

ENDED = -1
"""In a step: this sequence had ended before."""


class StepAligner:
    """Takes tokens as they come, in any interleaving, and gives whole steps (`Engine.generate`)."""

    __slots__ = ("_ended", "_waiting")

    def __init__(self, sequences: int) -> None:
        self._waiting: list[deque[int]] = [deque() for _ in range(sequences)]
        self._ended = [False] * sequences

    def add(self, sequence: int, tokens: Iterable[int], *, ended: bool) -> None:
        """Note the next tokens of a sequence, counted from 0, and whether they were its last."""
        self._waiting[sequence].extend(tokens)
        self._ended[sequence] = self._ended[sequence] or ended

    def steps(self) -> Iterator[Step]:
        """Yield the steps that are whole by now."""
        while any(self._waiting) and all(map(self._settled, self._waiting, self._ended)):
            yield tuple(tokens.popleft() if tokens else ENDED for tokens in self._waiting)

    @staticmethod
    def _settled(tokens: deque[int], ended: bool) -> bool:  # noqa: FBT001  (mapped)
        return bool(tokens) or ended
