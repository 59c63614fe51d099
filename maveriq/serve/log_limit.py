"""Limits the rate of log messages."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

_WINDOW_S = 60.0
_MAX_MESSAGES = 5  # of one kind per window
_MAX_KINDS = 256


class LogLimit(logging.Filter):
    """Lets only some messages of each kind pass per minute, so that no client can fill the disk with them."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """Create a filter; messages are of one kind if they have the same place in the code."""
        super().__init__()
        self._clock = clock
        self._windows: dict[tuple[str, int], tuple[float, int]] = {}  # beginning, messages

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether a message passes; the first one of a window says how many did not."""
        kind, now_s = (record.pathname, record.lineno), self._clock()
        begun_s, messages = self._windows.get(kind, (now_s, 0))
        left_out = 0
        if now_s - begun_s >= _WINDOW_S:
            left_out, begun_s, messages = max(0, messages - _MAX_MESSAGES), now_s, 0
        if kind not in self._windows and len(self._windows) >= _MAX_KINDS:
            self._windows.clear()
        self._windows[kind] = (begun_s, messages + 1)
        if left_out:
            record.msg = f"{record.getMessage()} ({left_out} more like this in the last minute)"
            record.args = ()
        return messages < _MAX_MESSAGES


def limit_logs(*names: str) -> None:
    """Limit the rate of the messages of some loggers."""
    for name in names:
        logger = logging.getLogger(name)
        if not any(isinstance(log_filter, LogLimit) for log_filter in logger.filters):
            logger.addFilter(LogLimit())
