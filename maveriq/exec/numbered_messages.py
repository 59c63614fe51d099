"""Messages that each count once and in order, over a channel that may lose, repeat or delay them.

The sender numbers them from 1 and keeps those that are not acknowledged (`Outbox`). The receiver keeps those that came
too early, and takes them in order (`Inbox`). Acknowledgements come with heartbeats, and what was sent before the last
but one heartbeat and is still not acknowledged is sent again.
"""

from __future__ import annotations

from collections import deque
from typing import Generic, Protocol, TypeVar


class Numbered(Protocol):
    """A message with a number."""

    @property
    def number(self) -> int:
        """Its number, from 1."""


M = TypeVar("M", bound=Numbered)


class Outbox(Generic[M]):
    """The messages of one sender that are not acknowledged (mutable)."""

    def __init__(self) -> None:
        self._kept: deque[M] = deque()
        self._last = 0
        self._old = 0  # the last one that was sent before the last heartbeat

    @property
    def next_number(self) -> int:
        """The number of the next message."""
        return self._last + 1

    def add(self, message: M) -> None:
        """Keep a message that is sent, with the next number."""
        self._last = message.number
        self._kept.append(message)

    def on_heartbeat(self, acknowledged: int) -> list[M]:
        """Forget the messages up to a number, and return those to send again."""
        kept = self._kept
        while kept and kept[0].number <= acknowledged:
            kept.popleft()
        overdue = [message for message in kept if message.number <= self._old]
        self._old = self._last
        return overdue


MAX_EARLY = 100_000
"""How far ahead of the next message one may be that is kept; others are dropped, and will be sent again."""


class Inbox(Generic[M]):
    """Puts the messages of one sender in order (mutable)."""

    def __init__(self) -> None:
        self._early: dict[int, M] = {}
        self.received = 0
        """The number of the last message that was taken; all before it were, too."""

    def take(self, message: M) -> list[M]:
        """Take a message; return those whose turn it now is, none for a duplicate or one that came too early."""
        if not 0 < message.number - self.received <= MAX_EARLY:
            return []
        if message.number > self.received + 1:
            self._early.setdefault(message.number, message)
            return []
        self.received += 1
        due = [message]
        while self._early and (following := self._early.pop(self.received + 1, None)) is not None:
            self.received += 1
            due.append(following)
        return due
