"""Ctrl-C and SIGTERM, noted instead of obeyed on the spot, so that a run ends in good order and writes its records."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Self

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interruption:
    """Whether somebody wants the run to end. Enter it in the main thread; until it is left, signals do nothing else.

    So a second Ctrl-C, while engines are stopped or records written, cannot lose what the first one meant to keep.
    """

    def __init__(self) -> None:
        self.came = False
        self._tell: Callable[[], object] = lambda: None

    def __enter__(self) -> Self:
        self._before = {number: signal.signal(number, self._note) for number in _SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, _number: int, _frame: FrameType | None) -> None:
        self.came = True
        self._tell()

    @contextmanager
    def telling(self, tell: Callable[[], object]) -> Iterator[None]:
        """Let somebody be told, at once if it has come already; from a signal's handler, in the main thread."""
        self._tell = tell
        if self.came:
            tell()
        try:
            yield
        finally:
            self._tell = lambda: None
